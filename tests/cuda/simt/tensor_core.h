// ldmatrix and mma.sync m16n8k16: the collectives of a warp that tensor cores are fed and used
// with. csrc/cuda/support/tensor_core.cuh says which lane holds which element.
#pragma once

#include <cstdint>
#include <cstring>

#include "async_copy.h"
#include "collectives.h"
#include "state.h"

namespace simt {

struct MatrixRow {
  std::uint16_t at[8];
};

// Lane 8 i + j gives the address of row j of matrix i. A lane's row is read before the lanes meet:
// what other lanes wrote to it needs a __syncwarp.
inline void
load_matrices(const char* name, std::uint32_t (&r)[4], const void* row, bool transposed) {
  Thread& self = here(name);
  check_shared(self, name, row);
  MatrixRow mine;
  static_assert(sizeof(mine) == kAccess, "a row of a matrix");
  std::memcpy(&mine, row, sizeof(mine));
  const Lanes<MatrixRow> rows = exchange(self, name, 0, mine);
  const unsigned fixed = self.lane / 4, pair = self.lane % 4 * 2;
  for (unsigned i = 0; i < 4; ++i) {
    const std::uint32_t low =
        transposed ? rows[8 * i + pair].at[fixed] : rows[8 * i + fixed].at[pair];
    const std::uint32_t high =
        transposed ? rows[8 * i + pair + 1].at[fixed] : rows[8 * i + fixed].at[pair + 1];
    r[i] = low | high << 16;
  }
}

// d += a b. to_float makes a number of 16 bits. Products of two such are exact in double; their sum
// is made there and rounded to float once, where tensor cores add in an order and a width that
// nobody promises.
template <class ToFloat>
void multiply_add(
    const char* name,
    float (&d)[4],
    const std::uint32_t (&a)[4],
    const std::uint32_t (&b)[2],
    ToFloat&& to_float
) {
  struct Fragment {
    std::uint32_t a[4], b[2];
  };
  Thread& self = here(name);
  Fragment mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const Lanes<Fragment> lanes = exchange(self, name, 0, mine);
  const auto half = [&](std::uint32_t pair, unsigned i) {
    return double(to_float(static_cast<std::uint16_t>(pair >> 16 * i)));
  };
  double sums[2][2];  // rows lane / 4 and that + 8, columns lane % 4 * 2 and that + 1
  for (unsigned i = 0; i < 4; ++i)
    sums[i / 2][i % 2] = d[i];
  for (unsigned quarter = 0; quarter < 4; ++quarter) {
    const Fragment of_rows = lanes[self.lane / 4 * 4 + quarter];
    for (unsigned column = 0; column < 2; ++column) {
      const Fragment of_column = lanes[(self.lane % 4 * 2 + column) * 4 + quarter];
      for (unsigned row = 0; row < 2; ++row)
        for (unsigned k = 0; k < 4; ++k)
          sums[row][column] +=
              half(of_rows.a[k / 2 * 2 + row], k % 2) * half(of_column.b[k / 2], k % 2);
    }
  }
  for (unsigned i = 0; i < 4; ++i)
    d[i] = static_cast<float>(sums[i / 2][i % 2]);
}

}  // namespace simt

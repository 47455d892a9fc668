// Products of small matrices on tensor cores, and how a warp reads its share of them from shared
// memory (mma.sync, ldmatrix). All 32 lanes of a warp make each call together.
//
// With g = lane / 4 and t = lane % 4, a lane holds of the fragments of mma
//
//   a  16 x 16  a[0]: row g, columns 2 t, 2 t + 1      a[1]: row g + 8, the same columns
//               a[2]: row g, columns 2 t + 8, 2 t + 9  a[3]: row g + 8, the same columns
//   b  16 x 8   b[0]: rows 2 t, 2 t + 1 of column g    b[1]: rows 2 t + 8, 2 t + 9 of column g
//   d  16 x 8   d[0], d[1]: row g, columns 2 t, 2 t + 1
//               d[2], d[3]: row g + 8, the same columns
//
// where a register of a or b has the first of its two elements in the low half.
#pragma once

#include <type_traits>

#include "cuda/support/async_copy.cuh"
#include "storage.h"

namespace dcconv::cuda {

#if defined(DCCONV_SIMT)
inline const char* mma_name(BFloat16) {
  return "mma of bf16";
}
inline const char* mma_name(Half) {
  return "mma of f16";
}
#endif

// d += a b, products exact, sums in float32 in no promised order. T is BFloat16 or Half.
template <class T>
__device__ __forceinline__ void
mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T type) {
  static_assert(std::is_same<T, BFloat16>::value || std::is_same<T, Half>::value, "16-bit types");
#if defined(DCCONV_SIMT)
  simt::multiply_add(mma_name(type), d, a, b, [](uint16_t bits) {
    return portable::load(static_cast<T>(bits));
  });
#else
  (void)type;
  if constexpr (std::is_same<T, BFloat16>::value)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 8 matrices of 16-bit elements. Lane 8 i + j gives the address of row j of matrix i: 16
// bytes of shared memory, aligned to 16. r[i] gets row g, columns 2 t and 2 t + 1 of matrix i.
// Writes of other lanes to a row have to be followed by __syncwarp or more.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* shared_row) {
#if defined(DCCONV_SIMT)
  simt::load_matrices("load_matrix_x4", r, shared_row, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

// The same of the transposed matrices: r[i] gets rows 2 t and 2 t + 1 of column g.
__device__ __forceinline__ void
load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared_row) {
#if defined(DCCONV_SIMT)
  simt::load_matrices("load_matrix_x4_transposed", r, shared_row, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

}  // namespace dcconv::cuda

// Loops over taps on bands: dot products, column sums of squares, window sums. A result block is 64
// bytes; a run of blocks keeps its sums in registers over all taps.
#pragma once

#include <array>
#include <cstring>
#include <utility>

#include "cpu/depthwise/params.h"
#include "elementary.h"

namespace dcconv {
namespace cpu {
namespace DCCONV_ISA {

// Bytes of one register, and result blocks in a run: what the registers hold beside two operands.
constexpr int64_t kVectorBytes = DCCONV_VECTOR_BYTES;
constexpr int64_t kRun = kVectorBytes == 64 ? 14 : 12;

template <class A>
struct Lanes {
  typedef A Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t count = kLaneBytes / int64_t{sizeof(A)};
  static constexpr int64_t vector = kVectorBytes / int64_t{sizeof(A)};
};

template <class A>
DC_HD void load_vector(typename Lanes<A>::Vector& v, const A* p) {
  std::memcpy(&v, p, sizeof(v));
}

template <class A>
DC_HD void store_vector(A* p, const typename Lanes<A>::Vector& v) {
  std::memcpy(p, &v, sizeof(v));
}

// out[i] = init + sum over taps of x[offsets[tap] + i * step] (* w[tap]) for kBlocks blocks.
template <class A>
struct TapRun {
  const A* x;
  const int64_t* offsets;
  int64_t taps;
  const A* w;  // [taps, lanes]
  int64_t step;
  A init;
  A* out;
  int64_t out_step;
};

// kStep: blocks between outputs where that is known, else 0.
template <class A, bool kWeights, int kStep, int kBlocks>
void tap_run(const TapRun<A>& r) {
  using Vector = typename Lanes<A>::Vector;
  constexpr int64_t lanes = Lanes<A>::count;
  const int64_t step = kStep > 0 ? kStep * lanes : r.step;
  for (int64_t lane = 0; lane < lanes; lane += Lanes<A>::vector) {
    Vector sums[kBlocks];
    for (int i = 0; i < kBlocks; ++i)
      sums[i] = Vector{} + r.init;
    for (int64_t tap = 0; tap < r.taps; ++tap) {
      const A* x = r.x + r.offsets[tap] + lane;
      Vector w{};
      if constexpr (kWeights)
        load_vector<A>(w, r.w + tap * lanes + lane);
#pragma GCC unroll 16
      for (int i = 0; i < kBlocks; ++i) {
        Vector v;
        load_vector<A>(v, x + i * step);
        if constexpr (kWeights) {
          sums[i] += v * w;
        } else {
          sums[i] += v;
        }
      }
    }
    for (int i = 0; i < kBlocks; ++i)
      store_vector<A>(r.out + i * r.out_step + lane, sums[i]);
  }
}

template <class A, bool kWeights, int kStep, int... kBlocks>
constexpr auto tap_runs(std::integer_sequence<int, kBlocks...>) {
  return std::array<void (*)(const TapRun<A>&), sizeof...(kBlocks)>{
      tap_run<A, kWeights, kStep, kBlocks + 1>...
  };
}

// `count` blocks, in runs of like lengths.
template <class A, bool kWeights>
void tap_sums(TapRun<A> r, int64_t count) {
  using Sizes = std::make_integer_sequence<int, kRun>;
  static constexpr auto dense = tap_runs<A, kWeights, 1>(Sizes{});
  static constexpr auto second = tap_runs<A, kWeights, 2>(Sizes{});
  static constexpr auto any = tap_runs<A, kWeights, 0>(Sizes{});
  const auto& table = r.step == Lanes<A>::count       ? dense
                      : r.step == 2 * Lanes<A>::count ? second
                                                      : any;
  for (int64_t runs = (count + kRun - 1) / kRun; runs > 0; --runs) {
    const int64_t size = (count + runs - 1) / runs;
    table[static_cast<std::size_t>(size - 1)](r);
    r.x += size * r.step;
    r.out += size * r.out_step;
    count -= size;
  }
}

// out[i] = sum over rows of x[offsets[row * stride] + i]^2, or of x itself; count is rounded up to
// lanes.
template <class A, bool kSquare>
void column_sums(
    const A* x, const int64_t* offsets, int64_t rows, int64_t stride, int64_t count, A* out
) {
  using Vector = typename Lanes<A>::Vector;
  constexpr int64_t kUnroll = 4;
  int64_t i = 0;
  for (; i + kUnroll * Lanes<A>::vector <= count; i += kUnroll * Lanes<A>::vector) {
    Vector sums[kUnroll] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const A* from = x + offsets[r * stride] + i;
      for (int64_t j = 0; j < kUnroll; ++j) {
        Vector v;
        load_vector<A>(v, from + j * Lanes<A>::vector);
        sums[j] += kSquare ? v * v : v;
      }
    }
    for (int64_t j = 0; j < kUnroll; ++j)
      store_vector<A>(out + i + j * Lanes<A>::vector, sums[j]);
  }
  for (; i < count; i += Lanes<A>::vector) {
    Vector sum{};
    for (int64_t r = 0; r < rows; ++r) {
      Vector v;
      load_vector<A>(v, x + offsets[r * stride] + i);
      sum += kSquare ? v * v : v;
    }
    store_vector<A>(out + i, sum);
  }
}

}  // namespace DCCONV_ISA
}  // namespace cpu
}  // namespace dcconv

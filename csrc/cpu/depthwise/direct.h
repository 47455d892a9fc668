// Loops over taps on bands: dot products, column sums of squares, window sums. A result block is 64
// bytes; a run of blocks keeps its sums in registers over all taps.
#pragma once

#include <array>
#include <utility>

#include "cpu/kernels/depthwise_params.h"
#include "cpu/kernels/registers.h"

namespace dcconv::cpu::DCCONV_ISA {

// Result blocks in a run: what the registers hold beside two operands.
constexpr int64_t kRunBlocks = kVectorBytes == 64 ? 14 : 12;

// What a run makes of its taps.
enum class Run {
  dot,   // sum of x w
  sum,   // sum of x
  norm,  // b = sqrt(eps + sum of x), and 1 / b
};

// out[i] = init + sum over taps of x[offsets[tap] + i * step] (w[tap]), 64 bytes each.
template <class A>
struct TapRun {
  const A* x;
  const int64_t* offsets;
  int64_t taps;
  int64_t step;
  A* out;
  const A* w;  // [taps, lanes]
  A eps;
  A* inverse;  // 1 / b
};

// kStep: 64 bytes from one output to the next where that is known, else 0.
template <class A, Run kRun, int kStep, int kBlocks>
void tap_run(const TapRun<A>& r) {
  using Vector = typename Lanes<A>::Vector;
  constexpr int64_t lanes = Lanes<A>::count;
  const int64_t step = kStep > 0 ? kStep * lanes : r.step;
  for (int64_t lane = 0; lane < lanes; lane += Lanes<A>::vector) {
    Vector sums[kBlocks];
    for (int i = 0; i < kBlocks; ++i)
      sums[i] = kRun == Run::norm ? Vector{} + r.eps : Vector{};
    for (int64_t tap = 0; tap < r.taps; ++tap) {
      const A* x = r.x + r.offsets[tap] + lane;
      Vector w{};
      if constexpr (kRun == Run::dot)
        load_vector<A>(w, r.w + tap * lanes + lane);
#pragma GCC unroll 16
      for (int i = 0; i < kBlocks; ++i) {
        Vector v;
        load_vector<A>(v, x + i * step);
        if constexpr (kRun == Run::dot) {
          sums[i] += v * w;
        } else {
          sums[i] += v;
        }
      }
    }
    for (int i = 0; i < kBlocks; ++i) {
      if constexpr (kRun == Run::norm) {
        Vector b, inverse;
        root_of<A>(sums[i], b, inverse);
        store_vector<A>(r.out + i * lanes + lane, b);
        store_vector<A>(r.inverse + i * lanes + lane, inverse);
      } else {
        store_vector<A>(r.out + i * lanes + lane, sums[i]);
      }
    }
  }
}

template <class A, Run kRun, int kStep, int... kBlocks>
constexpr auto tap_runs(std::integer_sequence<int, kBlocks...>) {
  return std::array<void (*)(const TapRun<A>&), sizeof...(kBlocks)>{
      tap_run<A, kRun, kStep, kBlocks + 1>...
  };
}

// `count` outputs, in runs of like lengths.
template <class A, Run kRun>
void tap_sums(TapRun<A> r, int64_t count) {
  using Sizes = std::make_integer_sequence<int, kRunBlocks>;
  static constexpr auto dense = tap_runs<A, kRun, 1>(Sizes{});
  static constexpr auto second = tap_runs<A, kRun, 2>(Sizes{});
  static constexpr auto any = tap_runs<A, kRun, 0>(Sizes{});
  const auto& table = r.step == Lanes<A>::count       ? dense
                      : r.step == 2 * Lanes<A>::count ? second
                                                      : any;
  for (int64_t runs = (count + kRunBlocks - 1) / kRunBlocks; runs > 0; --runs) {
    const int64_t size = (count + runs - 1) / runs;
    table[static_cast<std::size_t>(size - 1)](r);
    r.x += size * r.step;
    r.out += size * Lanes<A>::count;
    if (kRun == Run::norm)
      r.inverse += size * Lanes<A>::count;
    count -= size;
  }
}

// out[i] = sum over rows of x[offsets[row] + i]^2, or of x itself; count is rounded up to vectors.
template <class A, bool kSquare>
void column_sums(const A* x, const int64_t* offsets, int64_t rows, int64_t count, A* out) {
  using Vector = typename Lanes<A>::Vector;
  constexpr int64_t kUnroll = 4;
  int64_t i = 0;
  for (; i + kUnroll * Lanes<A>::vector <= count; i += kUnroll * Lanes<A>::vector) {
    Vector sums[kUnroll] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const A* from = x + offsets[r] + i;
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
      load_vector<A>(v, x + offsets[r] + i);
      sum += kSquare ? v * v : v;
    }
    store_vector<A>(out + i, sum);
  }
}

}  // namespace dcconv::cpu::DCCONV_ISA

// The main loop: a ring of stages filled by asynchronous copies, multiplied on tensor cores into
// float32 accumulators, which then change places with the stages in shared memory.
#pragma once

#include <type_traits>

#include "cuda/fused/implicit_gemm/fragments.cuh"
#include "cuda/fused/implicit_gemm/loaders.cuh"
#include "cuda/support/tensor_core.cuh"

namespace dcconv::cuda {

// Transposed: the weight lies in shared memory as [depth, columns]. Squares: sums of the squares of
// every row are made beside the product, which is the patch norm of a 1x1 window.
template <class T, class Tile, bool Transposed, bool Squares>
class MainLoop {
public:
  // f() runs while the first copies are on their way. after(i, stage) may issue copies into a stage
  // that no step needs any more: for i = 0, 1, ... the one that follows the last step's, in turn;
  // they have landed after wait_async<0> and a barrier. Returns the first of these stages.
  template <class F, class After>
  __device__ __forceinline__ int
  run(const GemmProblem& p,
      const GemmPlace<Tile>& place,
      unsigned char* stages,
      F&& f,
      After&& after) {
    using Weight =
        std::conditional_t<Transposed, TransposedFilterLoader<T, Tile>, FilterLoader<T, Tile>>;
    const PixelLoader<T, Tile, Squares> pixels(p, place);
    const Weight weight(p, place);
    const int taps = p.vertical.taps * p.horizontal.taps;
    const int steps = taps * ((p.depth + Tile::kDepth - 1) / Tile::kDepth);
    GemmStep<Tile::kDepth> next;
    const auto fetch = [&](int step, int slot) {
      unsigned char* stage = stages + slot * Tile::kStageBytes;
      if (step < steps) {
        pixels.load(p, next, stage);
        weight.load(p, next, stage + Tile::kPixelBytes);
        next.advance(p);
      } else {
        after(step - steps, stage);
      }
      // Groups at the end, empty or not, keep the count of those that may be pending.
      commit_async();
    };
#pragma unroll
    for (int i = 0; i < Tile::kStages - 1; ++i)
      fetch(i, i);
    f();
    int slot = 0, free_slot = Tile::kStages - 1;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      wait_async<Tile::kStages - 2>();
      // Every thread's copies of this step have landed, and nobody reads the step before it.
      __syncthreads();
      fetch(step + Tile::kStages - 1, free_slot);
      multiply(stages + slot * Tile::kStageBytes);
      free_slot = slot;
      slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
    }
    return slot;
  }

  // Sums of squares of the tile's rows: each row by one warp.
  __device__ __forceinline__ void store_squares(float* sums) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      const int fragment = i * Tile::kWarpColumns + warp_column();
      const float low = sub_warp_sum(squares_[i][0], 4), high = sub_warp_sum(squares_[i][1], 4);
      if (lane % 4 == 0 && fragment < Tile::kRowFragments) {
        const int row = (warp_row() * Tile::kRowFragments + fragment) * 16 + lane / 4;
        sums[row] = low;
        sums[row + 8] = high;
      }
    }
  }

  // The product in a pair of columns of a fragment.
  __device__ __forceinline__ void pair(int m, int n, int half, float (&u)[2]) const {
    u[0] = sums_[m][n][2 * half];
    u[1] = sums_[m][n][2 * half + 1];
  }

  // f(m, n, half, the product) for all pairs of the thread.
  template <class F>
  __device__ __forceinline__ void each_pair(F&& f) const {
#pragma unroll
    for (int n = 0; n < Tile::kColumnFragments; ++n) {
#pragma unroll
      for (int m = 0; m < Tile::kRowFragments; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float u[2];
          pair(m, n, half, u);
          f(m, n, half, u);
        }
      }
    }
  }

  // The tile's product, read back by product_at.
  __device__ __forceinline__ void store_product(float* product) const {
    const FragmentPlace<Tile> at;
    each_pair([&](int m, int n, int half, const float (&u)[2]) {
      const int column = at.column(n);
      const int place = product_swizzled<Tile::kColumns>(at.row(m, half), column / 4) * 4;
      store_vector(product + place + column % 4, Vector<float, 2>{{u[0], u[1]}});
    });
  }

private:
  // Row fragments whose squares one of the warps side by side adds.
  static constexpr int kOwned = (Tile::kRowFragments + Tile::kWarpColumns - 1) / Tile::kWarpColumns;

  __device__ __forceinline__ static int warp_row() { return FragmentPlace<Tile>::warp_row(); }
  __device__ __forceinline__ static int warp_column() { return FragmentPlace<Tile>::warp_column(); }

  __device__ __forceinline__ void multiply(const unsigned char* stage) {
    const unsigned char* weight = stage + Tile::kPixelBytes;
#pragma unroll
    for (int depth = 0; depth < Tile::kDepth / kPiece; depth += 2) {
      uint32_t a[Tile::kRowFragments][4], b[Tile::kColumnFragments][2];
      load_weight(weight, depth, b);
      load_pixels(stage, depth, a);
      if constexpr (Squares)
        add_squares(a);
#pragma unroll
      for (int m = 0; m < Tile::kRowFragments; ++m)
#pragma unroll
        for (int n = 0; n < Tile::kColumnFragments; ++n)
          mma(sums_[m][n], a[m], b[n], T{});
    }
  }

  // Fragments of 16 channels from piece `depth` on.
  __device__ __forceinline__ void
  load_pixels(const unsigned char* pixels, int depth, uint32_t (&a)[Tile::kRowFragments][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int m = 0; m < Tile::kRowFragments; ++m) {
      const int row = (warp_row() * Tile::kRowFragments + m) * 16 + lane % 16;
      load_matrix_x4(a[m], pixels + swizzled<Tile::kDepth / kPiece>(row, depth + lane / 16) * 16);
    }
  }

  __device__ __forceinline__ void load_weight(
      const unsigned char* weight, int depth, uint32_t (&b)[Tile::kColumnFragments][2]
  ) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int first = warp_column() * Tile::kColumnFragments;
#pragma unroll
    for (int n = 0; n < Tile::kColumnFragments; n += 2) {
      uint32_t pair[4];
      if constexpr (Transposed) {
        const int row = depth * kPiece + lane % 16, piece = first + n + lane / 16;
        load_matrix_x4_transposed(
            pair, weight + swizzled<Tile::kColumns / kPiece>(row, piece) * 16
        );
      } else {
        const int row = (first + n + lane / 16) * 8 + lane % 8;
        load_matrix_x4(
            pair, weight + swizzled<Tile::kDepth / kPiece>(row, depth + lane / 8 % 2) * 16
        );
      }
      b[n][0] = pair[0];
      b[n][1] = pair[1];
      b[n + 1][0] = pair[2];
      b[n + 1][1] = pair[3];
    }
  }

  // Warps side by side hold the same fragments of x: each adds the squares of some.
  __device__ __forceinline__ void add_squares(const uint32_t (&a)[Tile::kRowFragments][4]) {
#pragma unroll
    for (int m = 0; m < Tile::kRowFragments; ++m) {
      if (m % Tile::kWarpColumns != warp_column())
        continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = load(static_cast<T>(static_cast<uint16_t>(a[m][i])));
        const float high = load(static_cast<T>(static_cast<uint16_t>(a[m][i] >> 16)));
        float& sum = squares_[m / Tile::kWarpColumns][i % 2];
        sum += low * low;
        sum += high * high;
      }
    }
  }

  float sums_[Tile::kRowFragments][Tile::kColumnFragments][4] = {};
  float squares_[kOwned][2] = {};
};

// Eight columns of a row of the product that MainLoop::store_product wrote.
template <class Tile>
__device__ __forceinline__ Vector<float, kPiece>
product_at(const float* product, int row, int vector) {
  Vector<float, kPiece> all;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = product_swizzled<Tile::kColumns>(row, vector * 2 + half) * 4;
    const Vector<float, 4> part = load_vector<float, 4>(product + place);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      all.at[half * 4 + j] = part.at[j];
  }
  return all;
}

}  // namespace dcconv::cuda

// The main loop: operands that asynchronous copies bring to shared memory, multiplied on tensor
// cores into float32 accumulators.
#pragma once

#include "cuda/fused/implicit_gemm/halo.cuh"

namespace dcconv::cuda {

// Operands: what one step after the other reads, GatheredOperands or HaloOperands. begin() and
// fetch() issue the copies of the first and of each further step, prepare() runs while the first
// are on their way and start() behind the barrier after it, next() lets the next step's be read.
// Steps come in turns of kTurn, whose number within a turn is known when compiled; fetch() is at
// those of kStages - 1 steps later. Squares: sums of the squares of every row are made beside the
// product, which is the patch norm of a 1x1 window.
template <class T, class Tile, bool Squares>
class MainLoop {
public:
  // f() runs while the first copies are on their way. after(i, place) may issue copies of quarter i
  // of a tile of 16-bit elements into a place that no step needs any more, which
  // operands.quarter(i) finds; they have landed after wait_async<0> and a barrier.
  template <class Operands, class F, class After>
  __device__ __forceinline__ void run(
      const GemmProblem& p, const GemmPlace<Tile>& place, Operands& operands, F&& f, After&& after
  ) {
    static_assert(kParts % 2 == 0, "two sets of fragments take turns");
    constexpr int kTurn = Operands::kTurn, kAhead = Operands::kStages - 1;
    const int steps = Operands::steps(p);
    operands.begin();
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      operands.fetch(p, i - kAhead, after);
      commit_async();
    }
    operands.prepare(p, place);
    f();
    wait_async<kAhead - 1>();
    __syncthreads();
    operands.start(p);
    Fragments fragments[2];
#pragma unroll
    for (int m = 0; m < Tile::kRowFragments; ++m)
      read(operands, 0, 0, m, fragments[0]);
#pragma unroll 1
    for (int step = 0; step < steps; step += kTurn) {
#pragma unroll
      for (int turn = 0; turn < kTurn; ++turn) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const Fragments& now = fragments[part % 2];
          Fragments& then = fragments[(part + 1) % 2];
          const bool last = part + 1 == kParts;
          if constexpr (Squares)
            add_squares(now.pixels);
          // What the next products need is read between those of this part, which wait for none of
          // it.
#pragma unroll
          for (int m = 0; m < Tile::kRowFragments; ++m) {
            multiply(m, now);
            if (m == 0 && part == 0) {
              operands.fetch(p, turn, after);
              // Groups at the end, empty or not, keep the count of those that may be pending.
              commit_async();
            }
            if (m == 0 && last) {
              wait_async<kAhead - 1>();
              // Every thread's copies of the next step have landed, and nobody reads this one's
              // stage any more. What is read after the last step, nobody multiplies.
              __syncthreads();
              operands.next(p, turn);
            }
            read(operands, last ? (turn + 1) % kTurn : turn, last ? 0 : part + 1, m, then);
          }
        }
      }
    }
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

  // Operands of a warp for 16 of a step's depth.
  struct Fragments {
    uint32_t pixels[Tile::kRowFragments][4], weight[Tile::kColumnFragments][2];
  };
  static constexpr int kParts = Tile::kDepth / 16;

  __device__ __forceinline__ void multiply(int m, const Fragments& fragments) {
#pragma unroll
    for (int n = 0; n < Tile::kColumnFragments; ++n)
      mma(sums_[m][n], fragments.pixels[m], fragments.weight[n], T{});
  }

  // Portion m of the fragments.
  template <class Operands>
  __device__ __forceinline__ void
  read(const Operands& operands, int turn, int part, int m, Fragments& fragments) const {
    constexpr int kPairs = Tile::kColumnFragments / 2;
    operands.read_pixels(turn, part, m, fragments.pixels[m]);
#pragma unroll
    for (int i = m * kPairs / Tile::kRowFragments; i < (m + 1) * kPairs / Tile::kRowFragments;
         ++i) {
      uint32_t pair[4];
      operands.read_weight_pair(part, i * 2, pair);
      fragments.weight[2 * i][0] = pair[0];
      fragments.weight[2 * i][1] = pair[1];
      fragments.weight[2 * i + 1][0] = pair[2];
      fragments.weight[2 * i + 1][1] = pair[3];
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

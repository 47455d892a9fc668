// Operands of any window: a ring of stages in shared memory, each with the pixels that one tap sees
// from a tile's rows beside its part of the weight.
#pragma once

#include <type_traits>

#include "cuda/fused/implicit_gemm/fragments.cuh"
#include "cuda/fused/implicit_gemm/loaders.cuh"
#include "cuda/support/tensor_core.cuh"

namespace dcconv::cuda {

// Two fragments of the weight, from column fragment n of the warp on, for the 16 of a step's depth
// from piece `depth` on. Transposed: the weight lies there as [depth, columns].
template <class Tile, bool Transposed>
__device__ __forceinline__ void
read_weight(const unsigned char* weight, int depth, int n, uint32_t (&pair)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first = FragmentPlace<Tile>::warp_column() * Tile::kColumnFragments;
  if constexpr (Transposed) {
    const int row = depth * kPiece + lane % 16, piece = first + n + lane / 16;
    load_matrix_x4_transposed(pair, weight + swizzled<Tile::kColumns / kPiece>(row, piece) * 16);
  } else {
    const int row = (first + n + lane / 16) * 8 + lane % 8;
    load_matrix_x4(pair, weight + swizzled<Tile::kDepth / kPiece>(row, depth + lane / 8 % 2) * 16);
  }
}

// The loader of the weight.
template <class T, class Tile, bool Transposed>
using WeightLoader =
    std::conditional_t<Transposed, TransposedFilterLoader<T, Tile>, FilterLoader<T, Tile>>;

// What MainLoop asks of operands: see there.
template <class T, class Tile, bool Transposed, bool OneTap>
class GatheredOperands {
public:
  static constexpr int kTurn = 1;
  static constexpr int kStages = Tile::kStages;
  static constexpr int kBytes = kStages * Tile::kStageBytes;
  static_assert(2 * kQuarterBytes<Tile> <= Tile::kStageBytes, "half a tile in a stage");

  __device__ __forceinline__
  GatheredOperands(const GemmProblem& p, const GemmPlace<Tile>& place, unsigned char* shared)
      : pixels_(p, place), weight_(p, place), shared_(shared), steps_(steps(p)) {}

  __device__ __forceinline__ static int steps(const GemmProblem& p) {
    return p.vertical.taps * p.horizontal.taps * ((p.depth + Tile::kDepth - 1) / Tile::kDepth);
  }

  template <class After>
  __device__ __forceinline__ void fetch(const GemmProblem& p, int, After&& after) {
    unsigned char* stage = shared_ + free_ * Tile::kStageBytes;
    if (fetched_ < steps_) {
      pixels_.load(p, step_, stage);
      weight_.load(p, step_.tap, step_.channel, stage + Tile::kPixelBytes);
      if (step_.advance(p))
        pixels_.see(p, step_);
    } else if (fetched_ < steps_ + 2) {
      const int first = (fetched_ - steps_) * 2;
      after(first, stage);
      after(first + 1, stage + kQuarterBytes<Tile>);
    }
    ++fetched_;
    free_ = following(free_);
  }

  __device__ __forceinline__ void begin() const {}
  __device__ __forceinline__ void prepare(const GemmProblem&, const GemmPlace<Tile>&) const {}
  __device__ __forceinline__ void start(const GemmProblem&) const {}

  __device__ __forceinline__ void next(const GemmProblem&, int) {
    if (++read_ < steps_)
      now_ = following(now_);
  }

  __device__ __forceinline__ void read_pixels(int, int part, int m, uint32_t (&a)[4]) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int row = (FragmentPlace<Tile>::warp_row() * Tile::kRowFragments + m) * 16 + lane % 16;
    const int piece = swizzled<Tile::kDepth / kPiece>(row, part * 2 + lane / 16);
    load_matrix_x4(a, shared_ + now_ * Tile::kStageBytes + piece * 16);
  }

  __device__ __forceinline__ void read_weight_pair(int part, int n, uint32_t (&pair)[4]) const {
    const unsigned char* stage = shared_ + now_ * Tile::kStageBytes;
    read_weight<Tile, Transposed>(stage + Tile::kPixelBytes, part * 2, n, pair);
  }

  // After the loop, where a quarter of a tile was put.
  __device__ __forceinline__ unsigned char* quarter(int i) const {
    // One stage past the last one that was filled for a step, and one more.
    const int slot = i < 2 ? following(free_) : following(following(free_));
    return shared_ + slot * Tile::kStageBytes + i % 2 * kQuarterBytes<Tile>;
  }

private:
  __device__ __forceinline__ static int following(int slot) {
    return slot + 1 == kStages ? 0 : slot + 1;
  }

  PixelLoader<T, Tile, OneTap> pixels_;
  WeightLoader<T, Tile, Transposed> weight_;
  GemmStep<Tile::kDepth> step_;
  unsigned char* shared_;
  int steps_, fetched_ = 0, read_ = 0;
  int free_ = 0, now_ = 0;  // stages: the next to be filled, and the one that is read
};

}  // namespace dcconv::cuda

// Operands of 3x3 windows whose result has the size of what they read: the pixels that a tile's
// windows see lie in shared memory once for all nine taps, side by side as in memory, and only the
// weight moves on from tap to tap. From L2 comes 10 KiB for a step of a 128x128 tile, not 16.
#pragma once

#include "cuda/fused/implicit_gemm/gathered.cuh"

namespace dcconv::cuda {

// What MainLoop asks of operands: see there. Depth runs over taps inside, channels outside, and the
// loop is unrolled over the taps: which stage and which bit belongs to a tap is known when
// compiled.
template <class T, class Tile, bool Transposed>
class HaloOperands {
public:
  static constexpr int kTurn = kHaloTaps;
  static constexpr int kStages = 3;
  static constexpr int kPieces = Tile::kDepth / kPiece;
  static constexpr int kRowBytes = Tile::kDepth * 2;
  static constexpr int kHaloBytes = kHaloRows * kRowBytes;
  // In shared memory: two halos in turn, the weight's stages, a row of zeros for pixels outside of
  // the image, and a word of taps for each of the tile's rows.
  static constexpr int kWeights = 2 * kHaloBytes;
  static constexpr int kZeros = kWeights + kStages * Tile::kWeightBytes;
  static constexpr int kSeen = kZeros + kRowBytes;
  static constexpr int kBytes = kSeen + Tile::kRows * 4;
  static constexpr int kStride = Tile::kThreads / kPieces;
  static constexpr int kCount = kHaloRows / kStride;  // copies of a thread for a halo
  // The next halo's copies go out with the first taps of this one, and have landed, as all that is
  // issued kStages - 1 steps before, when its first tap is read.
  static constexpr int kCopyTaps = 4, kAtOnce = kCount / kCopyTaps;
  static_assert(kHaloTaps % kStages == 0, "a stage for each tap");
  static_assert(kPieces == 4 && kStride % 8 == 0, "a swizzle of four pieces, one per thread");
  static_assert(kAtOnce * kCopyTaps == kCount, "as many copies with each tap");
  static_assert(kCopyTaps + kStages - 1 <= kHaloTaps, "landed in time");
  static_assert(kQuarterBytes<Tile> == Tile::kWeightBytes, "a quarter of a tile in a stage");
  static_assert(2 * kQuarterBytes<Tile> <= kHaloBytes, "half a tile in a halo");

  __device__ __forceinline__
  HaloOperands(const GemmProblem& p, const GemmPlace<Tile>& place, unsigned char* shared)
      : weight_(p, place), shared_(shared) {
    const int thread = static_cast<int>(threadIdx.x), piece = thread % kPieces;
    first_ = thread / kPieces;
    place_ = swizzled<kPieces>(first_, piece) * 16;
    depth_ = p.depth - piece * kPiece;
    pitch_ = int64_t(p.groups) * p.depth;
    const int64_t origin = place.first_row + p.halo.low;
    pixels_ = static_cast<const T*>(p.pixels) + (origin + first_) * pitch_ +
              int64_t(place.group) * p.depth + piece * kPiece;
    begin_ = (origin < 0 ? static_cast<int>(-origin) : 0) - first_;
    end_ = static_cast<int>(at_most(int64_t(kHaloRows), p.rows - origin)) - first_;
    row_ = FragmentPlace<Tile>::warp_row() * (Tile::kRowFragments * 16) + thread % kWarp % 16;
  }

  // While the first copies are on their way: which taps of each row find their pixels.
  __device__ __forceinline__ void
  prepare(const GemmProblem& p, const GemmPlace<Tile>& place) const {
    uint32_t* seen = reinterpret_cast<uint32_t*>(shared_ + kSeen);
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int row = thread; row < Tile::kRows; row += Tile::kThreads)
      seen[row] = row < place.rows ? p.taps_seen(place.first_row + row) : 0;
    if (thread < kRowBytes / 4)
      reinterpret_cast<uint32_t*>(shared_ + kZeros)[thread] = 0;
  }

  // When all threads have.
  __device__ __forceinline__ void start(const GemmProblem& p) {
    const uint32_t* seen = reinterpret_cast<const uint32_t*>(shared_ + kSeen);
#pragma unroll
    for (int m = 0; m < Tile::kRowFragments; ++m)
      seen_[m] = seen[row_ + m * 16];
    row_ -= p.halo.low;
    look(p, 0);
  }

  __device__ __forceinline__ static int steps(const GemmProblem& p) {
    return kHaloTaps * ((p.depth + Tile::kDepth - 1) / Tile::kDepth);
  }

  __device__ __forceinline__ void begin() const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      copy_pixels(0, 0, i);
  }

  template <class After>
  __device__ __forceinline__ void fetch(const GemmProblem& p, int turn, After&& after) const {
    const int ahead = turn + kStages - 1, tap = ahead % kHaloTaps;
    unsigned char* stage = shared_ + kWeights + tap % kStages * Tile::kWeightBytes;
    if (ahead < kHaloTaps || more(p)) {
      weight_.load(p, tap, channel_ + ahead / kHaloTaps * Tile::kDepth, stage);
    } else {
      if (tap == 0) {
        after(0, quarter(0));
        after(1, quarter(1));
      }
      after(2 + tap, quarter(2 + tap));
    }
    if (turn >= 0 && turn < kCopyTaps && more(p)) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        copy_pixels(halo_ ^ kHaloBytes, channel_ + Tile::kDepth, turn * kAtOnce + i);
    }
  }

  // From the step at `turn` to the one that follows it; after the last one, to what can be read.
  __device__ __forceinline__ void next(const GemmProblem& p, int turn) {
    const int tap = (turn + 1) % kHaloTaps;
    stage_ = kWeights + tap % kStages * Tile::kWeightBytes;
    if (tap == 0) {
      if (more(p)) {
        channel_ += Tile::kDepth;
        halo_ ^= kHaloBytes;
      } else {
        stage_ = kWeights + turn % kStages * Tile::kWeightBytes;
      }
    }
    look(p, tap);
  }

  __device__ __forceinline__ void read_pixels(int turn, int part, int m, uint32_t (&a)[4]) const {
    const int lane_piece = static_cast<int>(threadIdx.x) % kWarp / 16;
    // Sixteen rows further on the swizzle is the same.
    const int at =
        (seen_[m] >> turn & 1) != 0 ? from_ + m * (16 * kRowBytes) : kZeros + lane_piece * 16;
    load_matrix_x4(a, shared_ + (at ^ part * 32));
  }

  __device__ __forceinline__ void read_weight_pair(int part, int n, uint32_t (&pair)[4]) const {
    read_weight<Tile, Transposed>(shared_ + stage_, part * 2, n, pair);
  }

  // Where a quarter of a tile is put while the last steps are multiplied.
  __device__ __forceinline__ unsigned char* quarter(int i) const {
    const int place = i < 2 ? (halo_ ^ kHaloBytes) + i * kQuarterBytes<Tile>
                            : kWeights + (i - 2) * Tile::kWeightBytes;
    return shared_ + place;
  }

private:
  // Whether there are channels after the present ones.
  __device__ __forceinline__ bool more(const GemmProblem& p) const {
    return channel_ + Tile::kDepth < p.depth;
  }

  // Where the first of the lane's rows reads a tap, in the present halo.
  __device__ __forceinline__ void look(const GemmProblem& p, int tap) {
    const int lane_piece = static_cast<int>(threadIdx.x) % kWarp / 16;
    from_ = halo_ + swizzled<kPieces>(row_ + p.halo_offset(tap), lane_piece) * 16;
  }

  __device__ __forceinline__ void copy_pixels(int halo, int channel, int i) const {
    const int row = i * kStride;
    copy_async(
        shared_ + halo + place_ + row * kRowBytes,
        pixels_ + row * pitch_ + channel,
        row >= begin_ && row < end_ && channel < depth_
    );
  }

  WeightLoader<T, Tile, Transposed> weight_;
  unsigned char* shared_;
  const T* pixels_;    // of the thread's first copy
  int64_t pitch_;      // elements of a pixel
  int first_, place_;  // the first copy's row, and where its piece goes
  int begin_, end_;    // rows of the halo that exist, from there on
  int depth_;          // channels from the thread's piece on
  int channel_ = 0;    // of the step that is read
  int halo_ = 0, stage_ = kWeights;
  int row_, from_;
  uint32_t seen_[Tile::kRowFragments];
};

// Those of a kernel.
template <class T, class Tile, bool Transposed, bool OneTap, bool Halo>
using OperandsOf = std::conditional_t<
    Halo,
    HaloOperands<T, Tile, Transposed>,
    GatheredOperands<T, Tile, Transposed, OneTap>>;

// f(whether a problem reads its windows from a halo), known to the compiler. Tiles of 64 rows, for
// problems that do not fill a device, have no kernel that does.
template <class Tile, class F>
void with_halo(const GemmProblem& p, F&& f) {
  if constexpr (Tile::kRows == 128) {
    if (p.takes_halo(Tile::kRows))
      return f(std::true_type{});
  }
  f(std::false_type{});
}

}  // namespace dcconv::cuda

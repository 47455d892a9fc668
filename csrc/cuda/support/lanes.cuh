// How the threads of a block lie on a map over positions and channels, in both layouts.
#pragma once

#include "cuda/support/launch.cuh"

namespace dcconv::cuda {

constexpr int kThreads = 256;

// Channels last: a row is one position, `channels` elements in vectors of V. Every thread owns one
// vector of channels and walks down the rows, so that what belongs to channels stays in registers.
// More vectors than threads are done in chunks, one after the other.
struct RowLanes {
  int vectors;  // of a row
  int columns;  // vectors of a chunk: threads side by side
  int rows;     // rows at a time
  int threads;
  int chunk_groups;  // most groups that a chunk touches
};

inline RowLanes row_lanes(int channels, int groups, int width) {
  RowLanes lanes{};
  lanes.vectors = channels / width;
  const int chunks = static_cast<int>(ceil_div(lanes.vectors, kThreads));
  lanes.columns = static_cast<int>(ceil_div(lanes.vectors, chunks));
  lanes.rows = kThreads / lanes.columns;
  lanes.threads = static_cast<int>(ceil_div(lanes.columns * lanes.rows, kWarp)) * kWarp;
  const int per_group = channels / groups;
  lanes.chunk_groups = static_cast<int>(
      std::min<int64_t>(groups, ceil_div(lanes.columns * width - 1, per_group) + 1)
  );
  return lanes;
}

// The thread's place in a chunk.
struct RowLane {
  int row, column;

  __device__ __forceinline__ explicit RowLane(const RowLanes& lanes)
      : row(static_cast<int>(threadIdx.x) / lanes.columns),
        column(static_cast<int>(threadIdx.x) - row * lanes.columns) {}
};

// Contiguous: a warp owns 32 V neighbouring positions (flat over images) and walks over channels,
// a block all channels of a group. `ways` warps share the channels of the same positions.
struct PlaneLanes {
  int ways;   // 1, 2, 4 or 8
  int tiles;  // spans of 32 V positions side by side: 8 / ways
};

inline PlaneLanes plane_lanes(int64_t channels_per_group) {
  const int warps = kThreads / kWarp;
  const int ways = power_of_two_at_least(channels_per_group, warps);
  return {ways, warps / ways};
}

struct PlaneLane {
  int lane, way, tile;

  __device__ __forceinline__ explicit PlaneLane(const PlaneLanes& lanes) {
    // Unsigned: one instruction each, where kernels find them again for want of registers.
    const int warp = static_cast<int>(threadIdx.x / unsigned(kWarp));
    lane = static_cast<int>(threadIdx.x % unsigned(kWarp));
    tile = warp / lanes.ways;
    way = warp - tile * lanes.ways;
  }
};

}  // namespace dcconv::cuda

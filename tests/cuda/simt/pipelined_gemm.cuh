// c = a b by tensor cores, tiles in a ring of shared memory that asynchronous copies fill: what a
// pipelined kernel looks like, and what each of its usual mistakes looks like.
#pragma once

#include "cuda/support/async_copy.cuh"
#include "cuda/support/launch.cuh"
#include "cuda/support/tensor_core.cuh"

namespace pipelined_gemm {

using namespace dcconv;
using namespace dcconv::cuda;

constexpr int kTile = 64;   // rows and columns of a block's tile of c
constexpr int kDepth = 32;  // of a stage
constexpr int kThreads = 128;

enum class Fault {
  kNone,
  kNoBarrier,     // between the threads that copy and those that read
  kEarlyCopy,     // before that barrier, over what others still read
  kWeakWait,      // for one group too few
  kWrongStage,    // reads the stage after the one that landed
  kWrongSwizzle,  // reads where nobody swizzled
  kWrongDepth,    // leaves out the last chunk of the rows of a
  kWrongRows,     // copies beyond the last row of a
};

struct Params {
  const void* a;  // [m, k]
  const void* b;  // [k, n]
  float* c;       // [m, n]
  int m, n, k;    // n and k multiples of 8
};

// Chunks of 8 elements are exchanged within a row such that the 8 rows of a matrix that ldmatrix
// reads lie in different banks. a: [kTile, kDepth], 4 chunks a row; b: [kDepth, kTile], 8 chunks.
__device__ __forceinline__ int a_offset(int row, int chunk) {
  return row * kDepth + (chunk ^ (row / 2 % 4)) * 8;
}
__device__ __forceinline__ int b_offset(int row, int chunk) {
  return row * kTile + (chunk ^ (row % 8)) * 8;
}

template <class T, int kStages>
std::size_t shared_bytes() {
  return SharedBytes()
      .take<T>(kStages * kTile * kDepth)
      .template take<T>(kStages * kDepth * kTile)
      .total();
}

template <class T, int kStages, Fault kFault>
__global__ void __launch_bounds__(kThreads) pipelined_gemm_kernel(Params p) {
  SharedMemory shared;
  T* a_stages = shared.take<T>(kStages * kTile * kDepth);
  T* b_stages = shared.take<T>(kStages * kDepth * kTile);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int first_row = static_cast<int>(blockIdx.y) * kTile;
  const int first_column = static_cast<int>(blockIdx.x) * kTile;
  const int tiles = (p.k + kDepth - 1) / kDepth;

  const auto copy_tile = [&](int tile) {
    T* a = a_stages + tile % kStages * kTile * kDepth;
    T* b = b_stages + tile % kStages * kDepth * kTile;
    for (int i = thread; i < kTile * kDepth / 8; i += kThreads) {
      const int row = first_row + i / 4, k = tile * kDepth + i % 4 * 8;
      const bool valid = (row < p.m || kFault == Fault::kWrongRows) &&
                         k + (kFault == Fault::kWrongDepth) * 8 < p.k;
      const T* from = static_cast<const T*>(p.a) + (valid ? int64_t(row) * p.k + k : 0);
      copy_async(a + a_offset(i / 4, i % 4), from, valid);
    }
    for (int i = thread; i < kDepth * kTile / 8; i += kThreads) {
      const int k = tile * kDepth + i / 8, column = first_column + i % 8 * 8;
      const bool valid = k < p.k && column < p.n;
      const T* from = static_cast<const T*>(p.b) + (valid ? int64_t(k) * p.n + column : 0);
      copy_async(b + b_offset(i / 8, i % 8), from, valid);
    }
  };

  // Warps lie 2 x 2, each owns 32 x 32 of c: 2 x 4 fragments.
  const int warp_row = thread / kWarp / 2 * 32, warp_column = thread / kWarp % 2 * 32;
  float sums[2][4][4] = {};
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < tiles)
      copy_tile(tile);
    commit_async();
  }
  for (int tile = 0; tile < tiles; ++tile) {
    wait_async<kStages - 2 + (kFault == Fault::kWeakWait)>();
    // Every thread's copies of this tile are there, and nobody reads the tile before it any more.
    if (kFault != Fault::kNoBarrier && kFault != Fault::kEarlyCopy)
      __syncthreads();
    if (tile + kStages - 1 < tiles)
      copy_tile(tile + kStages - 1);
    if (kFault == Fault::kEarlyCopy)
      __syncthreads();
    commit_async();
    const int stage = (tile + (kFault == Fault::kWrongStage)) % kStages;
    const T* a = a_stages + stage * kTile * kDepth;
    const T* b = b_stages + stage * kDepth * kTile;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a_fragments[2][4], b_fragments[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = warp_row + 16 * i + lane % 16, chunk = k / 8 + lane / 16;
        load_matrix_x4(
            a_fragments[i],
            a + (kFault == Fault::kWrongSwizzle ? row * kDepth + chunk * 8 : a_offset(row, chunk))
        );
        load_matrix_x4_transposed(
            b_fragments[i], b + b_offset(k + lane % 16, (warp_column + 16 * i) / 8 + lane / 16)
        );
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t b_fragment[2] = {
              b_fragments[j / 2][j % 2 * 2], b_fragments[j / 2][j % 2 * 2 + 1]
          };
          mma(sums[i][j], a_fragments[i], b_fragment, T{});
        }
    }
  }
  wait_async<0>();

  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first_row + warp_row + 16 * i + lane / 4 + e / 2 * 8;
        const int column = first_column + warp_column + 8 * j + lane % 4 * 2 + e % 2;
        if (row < p.m && column < p.n)
          p.c[int64_t(row) * p.n + column] = sums[i][j][e];
      }
}

template <class T, int kStages, Fault kFault>
void multiply(const Params& p, Stream stream) {
  launch(
      "pipelined_gemm",
      pipelined_gemm_kernel<T, kStages, kFault>,
      {ceil_div(p.n, kTile), ceil_div(p.m, kTile)},
      kThreads,
      shared_bytes<T, kStages>(),
      stream,
      p
  );
}

}  // namespace pipelined_gemm

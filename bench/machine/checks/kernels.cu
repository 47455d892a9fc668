// Kernels whose times on GPUs are known, for the model to be held against. kernels.txt is their
// machine code: `python -m bench machine listing` makes it, where nvcc is installed.
//
// The products have the structure of three kernels of waynehacking8/blackwell-tensorcore-kernels,
// whose times on an H100 SXM5 are in that repository's results/bench_sm90a.csv.

#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <mma.h>

struct CopyParams {
  const uint4* from;
  uint4* to;
  int count;
};

// A vector of 16 bytes per thread and trip.
extern "C" __global__ void __launch_bounds__(256) copy(CopyParams p) {
  for (int i = blockIdx.x * 256 + threadIdx.x; i < p.count; i += gridDim.x * 256)
    p.to[i] = p.from[i];
}

struct Product {
  const void* a;  // [m, k]
  const void* b;  // [k, n]
  float* c;       // [m, n]
  int m, n, k;
};

// A block makes 16 x 16 outputs, a thread one of them, and nothing is shared.
extern "C" __global__ void product_plain(Product p) {
  const float* a = static_cast<const float*>(p.a);
  const float* b = static_cast<const float*>(p.b);
  const int row = blockIdx.y * 16 + threadIdx.x / 16, column = blockIdx.x * 16 + threadIdx.x % 16;
  if (row >= p.m || column >= p.n)
    return;
  float sum = 0;
  for (int k = 0; k < p.k; ++k)
    sum += a[row * p.k + k] * b[k * p.n + column];
  p.c[row * p.n + column] = sum;
}

// A block makes 32 x 32 outputs from tiles of as many operands in shared memory.
extern "C" __global__ void product_tiled(Product p) {
  constexpr int kTile = 32;
  __shared__ float tile_a[kTile][kTile], tile_b[kTile][kTile];
  const float* a = static_cast<const float*>(p.a);
  const float* b = static_cast<const float*>(p.b);
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  const int row = blockIdx.y * kTile + y, column = blockIdx.x * kTile + x;
  float sum = 0;
  for (int first = 0; first < p.k; first += kTile) {
    tile_a[y][x] = row < p.m && first + x < p.k ? a[row * p.k + first + x] : 0.f;
    tile_b[y][x] = column < p.n && first + y < p.k ? b[(first + y) * p.n + column] : 0.f;
    __syncthreads();
    for (int k = 0; k < kTile; ++k)
      sum += tile_a[y][k] * tile_b[k][x];
    __syncthreads();
  }
  if (row < p.m && column < p.n)
    p.c[row * p.n + column] = sum;
}

// 16 warps of 32 x 32 outputs each on tensor cores; steps of 32, three of them in shared memory,
// whose rows meet in the same banks.
extern "C" __global__ void __launch_bounds__(512) product_tensor(Product p) {
  using namespace nvcuda;
  constexpr int kTile = 128, kDepth = 32, kStages = 3, kThreads = 512, kVector = 8;
  extern __shared__ __half shared[];
  const __half* a = static_cast<const __half*>(p.a);
  const __half* b = static_cast<const __half*>(p.b);
  const int warp = threadIdx.x / 32, warp_row = warp / 4 * 32, warp_column = warp % 4 * 32;
  const int row = blockIdx.y * kTile, column = blockIdx.x * kTile;

  const auto stage = [&](int step) { return shared + step % kStages * 2 * kTile * kDepth; };
  const auto load = [&](int step) {
    __half* to_a = stage(step);
    __half* to_b = to_a + kTile * kDepth;
    const int first = step * kDepth;
#pragma unroll
    for (int i = threadIdx.x * kVector; i < kTile * kDepth; i += kThreads * kVector) {
      const int r = i / kDepth, k = i % kDepth, d = i / kTile, s = i % kTile;
      if (row + r < p.m)
        __pipeline_memcpy_async(to_a + i, a + (row + r) * p.k + first + k, 16);
      if (column + s < p.n)
        __pipeline_memcpy_async(to_b + i, b + (first + d) * p.n + column + s, 16);
    }
  };

  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums[2][2];
  for (auto& line : sums)
    for (auto& sum : line)
      wmma::fill_fragment(sum, 0.f);
  const int steps = p.k / kDepth;
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps)
      load(step);
    __pipeline_commit();
  }
  for (int step = 0; step < steps; ++step) {
    if (step + kStages - 1 < steps) {
      load(step + kStages - 1);
      __pipeline_commit();
    }
    __pipeline_wait_prior(kStages - 1);
    __syncthreads();
    const __half* from_a = stage(step);
    const __half* from_b = from_a + kTile * kDepth;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> part_a[2];
      wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major> part_b[2];
      for (int i = 0; i < 2; ++i) {
        wmma::load_matrix_sync(part_a[i], from_a + (warp_row + 16 * i) * kDepth + k, kDepth);
        wmma::load_matrix_sync(part_b[i], from_b + k * kTile + warp_column + 16 * i, kTile);
      }
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j)
          wmma::mma_sync(sums[i][j], part_a[i], part_b[j], sums[i][j]);
    }
    __syncthreads();
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j)
      wmma::store_matrix_sync(
          p.c + (row + warp_row + 16 * i) * p.n + column + warp_column + 16 * j,
          sums[i][j],
          p.n,
          wmma::mem_row_major
      );
}

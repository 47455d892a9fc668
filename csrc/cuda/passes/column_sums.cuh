// Partial column sums [kinds, rows, o] -> totals [kinds, o] in double: the second stage, in a
// fixed order.
#pragma once

#include "cuda/support/lanes.cuh"

namespace dcconv::cuda {

// Threads that share the rows of a filter.
constexpr int kSumWays = kThreads / kWarp;

template <class A>
__global__ void __launch_bounds__(kThreads) column_sums_kernel(ColumnSumsParams p) {
  SharedMemory shared;
  double* partial = shared.take<double>(kThreads);  // [kSumWays, kWarp]
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int way = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t filter = int64_t(blockIdx.x) * kWarp + lane, kind = blockIdx.y;
  double total = 0;
  if (filter < p.o) {
    const A* parts = static_cast<const A*>(p.parts) + kind * p.rows * p.o + filter;
#pragma unroll 4
    for (int64_t row = way; row < p.rows; row += kSumWays)
      total += double(parts[row * p.o]);
  }
  partial[threadIdx.x] = total;
  __syncthreads();
  if (way == 0 && filter < p.o) {
    for (int other = 1; other < kSumWays; ++other)
      total += partial[other * kWarp + lane];
    p.totals[kind * p.o + filter] = total;
  }
}

template <class A>
void column_sums_typed(const ColumnSumsParams& p, Stream stream) {
  launch(
      "column_sums",
      column_sums_kernel<A>,
      Grid{ceil_div(p.o, kWarp), p.kinds},
      kThreads,
      SharedBytes().take<double>(kThreads).total(),
      stream,
      p
  );
}

}  // namespace dcconv::cuda

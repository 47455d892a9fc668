// Sums of squares -> b = sqrt(window sum + eps), and its sum per block where the mean is wanted.
#pragma once

#include "cuda/support/functions.cuh"
#include "cuda/support/lanes.cuh"
#include "cuda/support/window.cuh"

namespace dcconv::cuda {

struct WindowNormArgs {
  WindowNormParams p;
  PixelOf pixel_of;
};

template <class A>
__global__ void __launch_bounds__(kThreads, 4) window_norm_kernel(WindowNormArgs args) {
  const WindowNormParams& p = args.p;
  SharedMemory shared;
  double* scratch = shared.take<double>(kWarp);
  const int64_t outputs = int64_t(p.window.rows.output) * p.window.columns.output;
  const int64_t inputs = int64_t(p.window.rows.input) * p.window.columns.input;
  const int64_t count = p.n * outputs * p.groups;
  const A* sums = static_cast<const A*>(p.sums);
  A* b = static_cast<A*>(p.b);
  double total = 0;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    int64_t position = i;
    int group = 0;
    if (p.groups > 1) {
      if (p.channels_last) {
        position = i / p.groups;
        group = static_cast<int>(i - position * p.groups);
      } else {
        const int64_t plane = i / outputs;
        group = static_cast<int>(plane % p.groups);
        position = plane / p.groups * outputs + (i - plane * outputs);
      }
    }
    const Pixel at = args.pixel_of(position);
    const MapPlane plane = map_plane(at.image, group, inputs, p.groups, p.channels_last);
    const A norm = sqrt_of(window_sum(p.window, sums, plane, at.y, at.x) + A(p.eps));
    b[i] = norm;
    total += double(norm);
  }
  if (p.block_sums == nullptr)
    return;
  total = block_sum(total, scratch);
  if (threadIdx.x == 0)
    p.block_sums[blockIdx.x] = total;
}

inline int64_t window_norm_count(const WindowNormParams& p) {
  return p.n * p.window.rows.output * p.window.columns.output * p.groups;
}

// Blocks of a launch, and so the number of partial sums.
inline int64_t window_norm_grid(const WindowNormParams& p) {
  return persistent_blocks(ceil_div(window_norm_count(p), kThreads), kThreads);
}

template <class A>
void window_norm_typed(const WindowNormParams& p, Stream stream) {
  const WindowNormArgs args{p, PixelOf(p.n, p.window.rows.output, p.window.columns.output)};
  // An empty map still writes its sums: the mean reads them.
  const bool runs = window_norm_count(p) > 0 || p.block_sums != nullptr;
  launch(
      "window_norm",
      window_norm_kernel<A>,
      Grid{runs ? window_norm_grid(p) : 0},
      kThreads,
      SharedBytes().take<double>(kWarp).total(),
      stream,
      args
  );
}

}  // namespace dcconv::cuda

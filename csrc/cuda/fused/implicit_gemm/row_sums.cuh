// What a row of the product needs of a map over the pixels that its window reads.
#pragma once

#include "cuda/fused/implicit_gemm/problem.cuh"

namespace dcconv::cuda {

// Loads of a row that are on their way together: two rounds for 3x3 taps.
constexpr int kTogether = 5;

// Sum of value(index in a map [images, vertical.size, horizontal.size, groups]) over the taps of a
// row, in their order.
template <class F>
__device__ __forceinline__ float
gathered_sum(const GemmProblem& p, int64_t row, int group, F&& value) {
  const Pixel at = p.pixel_of(row);
  const int top = at.y * p.vertical.stride + p.vertical.origin;
  const int left = at.x * p.horizontal.stride + p.horizontal.origin;
  const int64_t image = at.image * p.vertical.size;
  float total = 0;
  int r = 0, s = 0;
#pragma unroll 1
  while (r < p.vertical.taps) {
    float part[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int y = top + r * p.vertical.step, x = left + s * p.horizontal.step;
      const bool valid = r < p.vertical.taps && inside(p.vertical, y) && inside(p.horizontal, x);
      part[i] = valid ? value(((image + y) * p.horizontal.size + x) * p.groups + group) : 0.0f;
      if (++s == p.horizontal.taps) {
        s = 0;
        ++r;
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      total += part[i];
  }
  return total;
}

// The same for nine taps at stride 1 between sizes that agree, given which of them find a pixel:
// all loads are on their way together.
template <class F>
__device__ __forceinline__ float
halo_sum(const GemmProblem& p, int64_t row, int group, uint32_t seen, F&& value) {
  float part[kHaloTaps];
#pragma unroll
  for (int tap = 0; tap < kHaloTaps; ++tap) {
    const int64_t pixel = row + p.halo_offset(tap);
    part[tap] = (seen >> tap & 1) != 0 ? value(pixel * p.groups + group) : 0.0f;
  }
  float total = 0;
#pragma unroll
  for (int tap = 0; tap < kHaloTaps; ++tap)
    total += part[tap];
  return total;
}

}  // namespace dcconv::cuda

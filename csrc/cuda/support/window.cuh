// Window sums of maps: what a position's window sees of the input, and the transposed sum of what
// the windows that see a pixel say about it. Both run in a fixed order.
#pragma once

#include "cuda/kernels.h"
#include "cuda/support/device.cuh"
#include "elementary.h"

namespace dcconv::cuda {

using namespace ::dcconv::portable;

// The input index that padded index `before + i` shows, or -1 where it shows a zero.
__device__ __forceinline__ int source_of(const WindowAxis& axis, int i) {
  if (i >= 0 && i < axis.input)
    return i;
  switch (axis.mode) {
  case PaddingMode::reflect:
    return i < 0 ? -i : 2 * (axis.input - 1) - i;
  case PaddingMode::replicate:
    return i < 0 ? 0 : axis.input - 1;
  case PaddingMode::circular:
    return i < 0 ? i + axis.input : i - axis.input;
  default:
    return -1;
  }
}

// The padded indices that show an input index, in rising order: at most one run of the padding
// before, the index itself, one run of the padding after.
class Showing {
public:
  __device__ __forceinline__ Showing(const WindowAxis& axis, int i) : own_(i + axis.before) {
    const int after = axis.before + axis.input, padded = after + axis.after;
    if (axis.mode == PaddingMode::zeros)
      return;
    int low = -1, high = -1, low_count = 1, high_count = 1;
    if (axis.mode == PaddingMode::reflect) {
      low = i > 0 ? axis.before - i : -1;
      high = i < axis.input - 1 ? axis.before + 2 * (axis.input - 1) - i : -1;
    } else if (axis.mode == PaddingMode::circular) {
      low = i + axis.before - axis.input;
      high = i + axis.before + axis.input;
    } else {
      low = i == 0 ? 0 : -1;
      low_count = axis.before;
      high = i == axis.input - 1 ? after : -1;
      high_count = axis.after;
    }
    if (low >= 0) {
      low_ = low;
      low_end_ = low + low_count;
    }
    if (high >= 0 && high < padded) {
      high_ = high;
      high_end_ = high + high_count;
    }
  }

  // f(padded index) for each.
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    // Selected members, not an array: indexed arrays live in slow local memory.
#pragma unroll 1
    for (int run = 0; run < 3; ++run) {
      const int end = run == 0 ? low_end_ : run == 1 ? own_ + 1 : high_end_;
      for (int i = run == 0 ? low_ : run == 1 ? own_ : high_; i < end; ++i)
        f(i);
    }
  }

private:
  int own_;
  int low_ = 0, low_end_ = 0;
  int high_ = 0, high_end_ = 0;
};

// Taps of a long window that wait for memory side by side.
constexpr int kMapTaps = 4;

// Where the values of one image and group lie in a map: value (i, j) of a `width` wide image is
// at base + (i * width + j) * step.
struct MapPlane {
  int64_t base;
  int step;
};

__device__ __forceinline__ MapPlane
map_plane(int64_t image, int group, int64_t pixels, int groups, bool channels_last) {
  if (channels_last)
    return {image * pixels * groups + group, groups};
  return {(image * groups + group) * pixels, 1};
}

// Sum of tap(offset) over rows x columns offsets in row-major order: `first` and steps from there,
// which may go down. Taps wait for memory side by side; one that is not there counts as +0, which
// changes no bit, because a sum that begins with +0 is never -0.
template <class A, class F>
__device__ __forceinline__ A
grid_sum(int rows, int columns, int64_t first, int64_t row_step, int64_t step, F&& tap) {
  A total = 0;
  if (rows <= 3 && columns <= 3) {
    A values[3][3];
#pragma unroll
    for (int r = 0; r < 3; ++r) {
#pragma unroll
      for (int s = 0; s < 3; ++s)
        values[r][s] = r < rows && s < columns ? tap(first + r * row_step + s * step) : A(0);
    }
#pragma unroll
    for (int r = 0; r < 3; ++r) {
#pragma unroll
      for (int s = 0; s < 3; ++s)
        total += values[r][s];
    }
    return total;
  }
#pragma unroll 1
  for (int r = 0; r < rows; ++r, first += row_step) {
    int64_t at = first;
#pragma unroll 1
    for (int left = columns; left > 0; left -= kMapTaps) {
      A values[kMapTaps];
#pragma unroll
      for (int s = 0; s < kMapTaps; ++s, at += step)
        values[s] = s < left ? tap(at) : A(0);
#pragma unroll
      for (int s = 0; s < kMapTaps; ++s)
        total += values[s];
    }
  }
  return total;
}

// Whether windows meet zeros outside of the input and have no holes: what they see of it, and what
// sees a pixel, is a rectangle then, with bounds that a few instructions find.
__device__ __forceinline__ bool is_solid(const WindowAxis& axis) {
  return axis.mode == PaddingMode::zeros && (axis.dilation == 1 || axis.kernel == 1);
}

__device__ __forceinline__ bool is_solid(const Window& w) {
  return is_solid(w.rows) && is_solid(w.columns);
}

template <class A>
__device__ __forceinline__ A
any_window_sum(const Window& w, const A* sums, MapPlane plane, int p, int q) {
  const int top = p * w.rows.stride - w.rows.before;
  const int left = q * w.columns.stride - w.columns.before;
  A total = 0;
  for (int r = 0; r < w.rows.kernel; ++r) {
    const int i = source_of(w.rows, top + r * w.rows.dilation);
    if (i < 0)
      continue;
    for (int s = 0; s < w.columns.kernel; ++s) {
      const int j = source_of(w.columns, left + s * w.columns.dilation);
      if (j >= 0)
        total += sums[plane.base + (int64_t(i) * w.columns.input + j) * plane.step];
    }
  }
  return total;
}

// Sum of what the window at (p, q) sees of a map over input pixels.
template <class A>
__device__ __forceinline__ A
window_sum(const Window& w, const A* sums, MapPlane plane, int p, int q) {
  if (!is_solid(w))
    return any_window_sum(w, sums, plane, p, q);
  const int top = p * w.rows.stride - w.rows.before;
  const int left = q * w.columns.stride - w.columns.before;
  const int i = at_least(top, 0), j = at_least(left, 0);
  return grid_sum<A>(
      at_most(top + w.rows.kernel, w.rows.input) - i,
      at_most(left + w.columns.kernel, w.columns.input) - j,
      plane.base + (int64_t(i) * w.columns.input + j) * plane.step,
      int64_t(w.columns.input) * plane.step,
      plane.step,
      [&](int64_t at) { return sums[at]; }
  );
}

// f(output index) for the windows along an axis in which some tap lies on a padded index.
template <class F>
__device__ __forceinline__ void each_window(const WindowAxis& axis, int padded, F&& f) {
  for (int r = 0; r < axis.kernel; ++r) {
    const int start = padded - r * axis.dilation;
    if (start < 0)
      return;
    const int output = axis.stride == 1 ? start : start / axis.stride;
    if (output * axis.stride == start && output < axis.output)
      f(output);
  }
}

template <class A, class F>
__device__ __forceinline__ A
any_transposed_window_sum(const Window& w, MapPlane plane, int h, int column, F&& tap) {
  const Showing rows(w.rows, h), columns(w.columns, column);
  A total = 0;
  rows.each([&](int i) {
    each_window(w.rows, i, [&](int p) {
      columns.each([&](int j) {
        each_window(w.columns, j, [&](int q) {
          total += tap(plane.base + (int64_t(p) * w.columns.output + q) * plane.step);
        });
      });
    });
  });
  return total;
}

// The windows along an axis without holes that see an input index: `count` of them, from the last
// one down.
struct Windows {
  int last, count;

  __device__ __forceinline__ Windows(const WindowAxis& axis, int i) {
    const int padded = i + axis.before, beyond = padded - axis.kernel;
    last = padded;
    int first = beyond + 1;
    if (axis.stride > 1) {
      last = padded / axis.stride;
      first = (beyond + axis.stride) / axis.stride;
    }
    last = at_most(last, axis.output - 1);
    count = last + 1 - (beyond < 0 ? 0 : first);
  }
};

// Sum of tap(offset in the map over outputs) over all windows that see input pixel (h, w).
template <class A, class F>
__device__ __forceinline__ A
transposed_window_sum(const Window& w, MapPlane plane, int h, int column, F&& tap) {
  if (!is_solid(w))
    return any_transposed_window_sum<A>(w, plane, h, column, tap);
  const Windows rows(w.rows, h), columns(w.columns, column);
  return grid_sum<A>(
      rows.count,
      columns.count,
      plane.base + (int64_t(rows.last) * w.columns.output + columns.last) * plane.step,
      -int64_t(w.columns.output) * plane.step,
      -plane.step,
      tap
  );
}

// Row-major position in [images, height, width].
struct Pixel {
  int64_t image;
  int y, x;
};

// Splits flat positions into image, row and column. Below 2^31 positions by multiplications; the
// host decides once which way is taken.
class PixelOf {
public:
  PixelOf() = default;
  PixelOf(int64_t images, int height, int width)
      : width_(static_cast<uint32_t>(width)),
        pixels_(static_cast<uint32_t>(int64_t(height) * width)),
        wide_(images * height * width > 0x7fffffff) {}

  __device__ __forceinline__ Pixel operator()(int64_t position) const {
    int64_t image;
    uint32_t pixel;
    if (wide_) {
      image = position / pixels_.divisor();
      pixel = static_cast<uint32_t>(position - image * pixels_.divisor());
    } else {
      const uint32_t flat = static_cast<uint32_t>(position);
      const uint32_t n = pixels_.divide(flat);
      image = n;
      pixel = flat - n * pixels_.divisor();
    }
    const uint32_t y = width_.divide(pixel);
    return {image, static_cast<int>(y), static_cast<int>(pixel - y * width_.divisor())};
  }

  // The image alone.
  __device__ __forceinline__ int64_t image(int64_t position) const {
    return wide_ ? position / pixels_.divisor() : pixels_.divide(static_cast<uint32_t>(position));
  }

private:
  Divider width_, pixels_;
  bool wide_ = false;
};

}  // namespace dcconv::cuda

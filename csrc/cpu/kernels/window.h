// Box filters over per-pixel maps: the patch norm, and the transposed filter of backward. Rows
// first, then columns: r + s additions a position instead of r s, in a fixed order.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "elementary.h"

namespace dcconv::cpu::DCCONV_ISA {

using namespace ::dcconv::DCCONV_ISA;

// One task is one output row of one plane.
template <class A>
void window_norm(
    const WindowParams& w, const void* sums, void* b, double* row_sums, int64_t begin, int64_t end
) {
  const int64_t width = w.width;
  const int64_t input_row = w.columns.input * width, output_row = w.columns.output * width;
  const A eps = A(w.eps);
  std::vector<A> column(static_cast<std::size_t>(input_row));
  std::vector<A> padded(static_cast<std::size_t>(w.columns.padded() * width));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t plane = task / w.rows.output, p = task % w.rows.output;
    const A* in = static_cast<const A*>(sums) + plane * w.rows.input * input_row;
    std::fill(column.begin(), column.end(), A(0));
    for (int64_t r = 0; r < w.rows.kernel; ++r) {
      const int64_t h = w.row_sources[p * w.rows.stride + r * w.rows.dilation];
      if (h < 0)
        continue;
      const A* v = in + h * input_row;
      A* to = column.data();
#pragma omp simd
      for (int64_t i = 0; i < input_row; ++i)
        to[i] += v[i];
    }
    // The columns inside are themselves; only the padding goes through the table.
    std::copy(column.begin(), column.end(), padded.begin() + w.columns.before * width);
    for (int64_t i = 0; i < w.columns.padded(); ++i) {
      if (i == w.columns.before)
        i += w.columns.input;
      if (i == w.columns.padded())
        break;
      const int64_t source = w.column_sources[i];
      for (int64_t j = 0; j < width; ++j)
        padded[static_cast<std::size_t>(i * width + j)] =
            source < 0 ? A(0) : column[static_cast<std::size_t>(source * width + j)];
    }
    A* out = static_cast<A*>(b) + task * output_row;
    std::fill_n(out, output_row, eps);
    for (int64_t s = 0; s < w.columns.kernel; ++s) {
      const A* v = padded.data() + s * w.columns.dilation * width;
      if (w.columns.stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < output_row; ++i)
          out[i] += v[i];
      } else if (width == 1 && w.columns.stride == 2) {
#pragma omp simd
        for (int64_t q = 0; q < output_row; ++q)
          out[q] += v[2 * q];
      } else {
        for (int64_t q = 0; q < w.columns.output; ++q)
          for (int64_t j = 0; j < width; ++j)
            out[q * width + j] += v[q * w.columns.stride * width + j];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < output_row; ++i)
      out[i] = sqrt_of(out[i]);
    if (row_sums == nullptr)
      continue;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < output_row; ++i)
      sum += double(out[i]);
    row_sums[task] = sum;
  }
}

// One task is one input row of one plane. Output rows are visited in order, so each sum has one
// order whatever the number of tasks.
template <class A>
void window_transposed(
    const WindowParams& w, const void* t, void* out, int64_t begin, int64_t end
) {
  const int64_t width = w.width;
  const int64_t input_row = w.columns.input * width, output_row = w.columns.output * width;
  std::vector<A> column(static_cast<std::size_t>(output_row));
  std::vector<A> padded(static_cast<std::size_t>(w.columns.padded() * width));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t plane = task / w.rows.input, h = task % w.rows.input;
    const A* in = static_cast<const A*>(t) + plane * w.rows.output * output_row;
    std::fill(column.begin(), column.end(), A(0));
    // Without wrap-around only padded rows next to h can show it.
    const bool local = w.rows.mode == PaddingMode::zeros;
    const int64_t first = local ? h + w.rows.before : 0;
    const int64_t last = local ? first + 1 : w.rows.padded();
    for (int64_t i = first; i < last; ++i) {
      if (w.row_sources[i] != h)
        continue;
      for (int64_t r = 0; r < w.rows.kernel; ++r) {
        const int64_t start = i - r * w.rows.dilation;
        if (start < 0 || start % w.rows.stride != 0)
          continue;
        const int64_t p = start / w.rows.stride;
        if (p >= w.rows.output)
          continue;
        const A* v = in + p * output_row;
        A* to = column.data();
#pragma omp simd
        for (int64_t j = 0; j < output_row; ++j)
          to[j] += v[j];
      }
    }
    std::fill(padded.begin(), padded.end(), A(0));
    for (int64_t s = 0; s < w.columns.kernel; ++s) {
      A* to = padded.data() + s * w.columns.dilation * width;
      const A* v = column.data();
      if (w.columns.stride == 1) {
#pragma omp simd
        for (int64_t j = 0; j < output_row; ++j)
          to[j] += v[j];
      } else {
        for (int64_t q = 0; q < w.columns.output; ++q)
          for (int64_t j = 0; j < width; ++j)
            to[q * w.columns.stride * width + j] += v[q * width + j];
      }
    }
    A* row = static_cast<A*>(out) + task * input_row;
    std::fill_n(row, input_row, A(0));
    for (int64_t i = 0; i < w.columns.padded(); ++i) {
      const int64_t source = w.column_sources[i];
      if (source < 0)
        continue;
      for (int64_t j = 0; j < width; ++j)
        row[source * width + j] += padded[static_cast<std::size_t>(i * width + j)];
    }
  }
}

// t <- t + add / b, or t <- grad_b / b.
template <class A>
void finish_t(const void* b, const void* grad_b, double add, void* t, int64_t begin, int64_t end) {
  const A* norm = static_cast<const A*>(b);
  const A* grad = static_cast<const A*>(grad_b);
  A* out = static_cast<A*>(t);
  const A sum = A(add);
  if (grad != nullptr) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i)
      out[i] = grad[i] / norm[i];
  } else {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i)
      out[i] += sum / norm[i];
  }
}

}  // namespace dcconv::cpu::DCCONV_ISA

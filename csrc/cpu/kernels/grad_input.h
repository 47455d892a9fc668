// dx = fold(library gradient of the padded input) + x * t: the padding is undone by summing the
// padded pixels that show a pixel, in rising order.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "storage.h"

namespace dcconv::cpu::DCCONV_ISA {

using namespace ::dcconv::DCCONV_ISA;

// One task is one input row of one image.
template <class T, class U, class A>
void grad_input_channels_last(const GradInputParams& p, int64_t begin, int64_t end) {
  const int64_t channels = p.c / p.groups, w = p.columns.input;
  const int64_t library_row = p.columns.padded() * p.c;
  const bool plain = p.library_grad != nullptr && p.rows.padded() == p.rows.input &&
                     p.columns.padded() == p.columns.input;
  std::vector<A> sum(static_cast<std::size_t>(p.c));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / p.rows.input, h = task % p.rows.input;
    const T* x = static_cast<const T*>(p.x) + task * w * p.c;
    const A* t = static_cast<const A*>(p.t) + task * w * p.groups;
    T* out = static_cast<T*>(p.grad_x) + task * w * p.c;
    const U* grad = static_cast<const U*>(p.library_grad);
    if (plain) {
      grad += task * library_row;
      for (int64_t i = 0; i < w * p.groups; ++i) {
        const A scale = t[i];
        const int64_t at = i * channels;
#pragma omp simd
        for (int64_t c = at; c < at + channels; ++c)
          out[c] = Store<T>::from(load(grad[c]) + load(x[c]) * scale);
      }
      continue;
    }
    for (int64_t i = 0; i < w; ++i) {
      std::fill(sum.begin(), sum.end(), A(0));
      if (grad != nullptr) {
        for (int64_t r = p.row_starts[h]; r < p.row_starts[h + 1]; ++r)
          for (int64_t s = p.column_starts[i]; s < p.column_starts[i + 1]; ++s) {
            const U* v = grad + (image * p.rows.padded() + p.row_list[r]) * library_row +
                         p.column_list[s] * p.c;
            A* to = sum.data();
#pragma omp simd
            for (int64_t c = 0; c < p.c; ++c)
              to[c] += load(v[c]);
          }
      }
      for (int64_t g = 0; g < p.groups; ++g) {
        const A scale = t[i * p.groups + g];
        const int64_t first = g * channels;
        const A* from = sum.data();
#pragma omp simd
        for (int64_t c = first; c < first + channels; ++c)
          out[i * p.c + c] = Store<T>::from(from[c] + load(x[i * p.c + c]) * scale);
      }
    }
  }
}

// One task is one plane of one image.
template <class T, class U, class A>
void grad_input_planar(const GradInputParams& p, int64_t begin, int64_t end) {
  const int64_t channels = p.c / p.groups, w = p.columns.input, h = p.rows.input;
  const int64_t library_row = p.columns.padded();
  const bool plain = p.library_grad != nullptr && p.rows.padded() == h && library_row == w;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t map = task / p.c * p.groups + task % p.c / channels;
    const int64_t plane = p.plane > 0 ? p.plane : h * w;
    const T* x = static_cast<const T*>(p.x) + task * plane;
    const A* t = static_cast<const A*>(p.t) + map * h * w;
    T* out = static_cast<T*>(p.grad_x) + task * plane;
    const U* grad = static_cast<const U*>(p.library_grad);
    if (grad != nullptr)
      grad += task * (plain ? plane : p.rows.padded() * library_row);
    if (plain) {
#pragma omp simd
      for (int64_t i = 0; i < h * w; ++i)
        out[i] = Store<T>::from(load(grad[i]) + load(x[i]) * t[i]);
      continue;
    }
    for (int64_t i = 0; i < h; ++i)
      for (int64_t j = 0; j < w; ++j) {
        A sum = 0;
        if (grad != nullptr) {
          for (int64_t r = p.row_starts[i]; r < p.row_starts[i + 1]; ++r)
            for (int64_t s = p.column_starts[j]; s < p.column_starts[j + 1]; ++s)
              sum += load(grad[p.row_list[r] * library_row + p.column_list[s]]);
        }
        out[i * w + j] = Store<T>::from(sum + load(x[i * w + j]) * t[i * w + j]);
      }
  }
}

template <class T, class U, class A>
void grad_input(const GradInputParams& p, int64_t begin, int64_t end) {
  if (p.channels_last) {
    grad_input_channels_last<T, U, A>(p, begin, end);
  } else {
    grad_input_planar<T, U, A>(p, begin, end);
  }
}

}  // namespace dcconv::cpu::DCCONV_ISA

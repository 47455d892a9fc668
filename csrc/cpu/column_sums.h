// Column sums of backward: per task, in task order, and as gradients of parameters.
#pragma once

#include <vector>

#include "cpu/library.h"

namespace dcconv {
namespace cpu {

// Sums over tasks of one kind of column sum, in task order.
template <class A>
struct Columns {
  std::vector<A> parts;
  std::vector<double> total;

  void* prepare(bool wanted, int64_t tasks, int64_t o) {
    if (!wanted)
      return nullptr;
    total.resize(static_cast<std::size_t>(o), 0.0);
    parts.resize(static_cast<std::size_t>(tasks * o));
    return parts.data();
  }

  void add(int64_t tasks, int64_t o) {
    if (total.empty())
      return;
    for (int64_t task = 0; task < tasks; ++task)
      for (int64_t i = 0; i < o; ++i)
        total[static_cast<std::size_t>(i)] += double(parts[static_cast<std::size_t>(task * o + i)]);
  }
};

// Per-filter totals as a gradient of a [], or [o], parameter.
template <class A>
Tensor parameter_grad(const Tensor& parameter, const std::vector<double>& totals, double factor) {
  const Ints sizes(parameter.sizes().begin(), parameter.sizes().end());
  Tensor grad = empty(sizes, parameter.scalar_type());
  A* out = static_cast<A*>(grad.mutable_data_ptr());
  if (parameter.numel() != 1) {
    for (std::size_t i = 0; i < totals.size(); ++i)
      out[i] = A(totals[i] * factor);
  } else {
    double sum = 0;
    for (double v : totals)
      sum += v;
    out[0] = A(sum * factor);
  }
  return grad;
}

}  // namespace cpu
}  // namespace dcconv

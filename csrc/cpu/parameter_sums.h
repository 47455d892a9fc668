// Sums of backward: per task, in task order, and as gradients of parameters.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/directions.h"
#include "cpu/operands.h"

namespace dcconv::cpu {

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

// Zeroes the totals of radii on their floor and returns the gradient of the mean norm. An empty
// batch has no totals.
template <class A>
double finish_radius(const BackwardInputs& in, double factor, std::vector<double>& totals) {
  double mean_grad = 0;
  if (totals.empty())
    return mean_grad;
  const std::vector<A> radii =
      FilterVectors<A>::values(in.radius, static_cast<int64_t>(totals.size()), A(1));
  for (std::size_t i = 0; i < totals.size(); ++i) {
    if (radii[i] * A(factor) < A(kRhoFloor))
      totals[i] = 0;
    mean_grad += double(radii[i]) * totals[i];
  }
  return mean_grad;
}

// The column sums that a backward call needs.
template <class A>
class ParameterSums {
public:
  // barrier: whether the gradient of the mean norm goes on into x.
  ParameterSums(const Call& call, const BackwardInputs& in, bool barrier)
      : o_(call.shape.o),
        wants_rho_(in.radius.has_value() && ((in.needs & (kRadius | kNormMean)) != 0 || barrier)),
        wants_a_(is_weighted(call.op) && (in.needs & kWeight) != 0),
        wants_k_((in.needs & kK) != 0 && in.k.has_value()), wants_bias_((in.needs & kBias) != 0) {}

  ColumnSums prepare(int64_t tasks) {
    return {
        rho_.prepare(wants_rho_, tasks, o_),
        a_.prepare(wants_a_, tasks, o_),
        k_.prepare(wants_k_, tasks, o_),
        bias_.prepare(wants_bias_, tasks, o_)
    };
  }

  void add(int64_t tasks) {
    for (Columns<A>* sums : {&rho_, &a_, &k_, &bias_})
      sums->add(tasks, o_);
  }

  // The gradient of the mean norm; behind it the totals of radii are final.
  double finish_radius(const BackwardInputs& in, double factor) {
    return wants_rho_ ? cpu::finish_radius<A>(in, factor, rho_.total) : 0.0;
  }

  // dL/da per filter; empty where the operator does not depend on a.
  const std::vector<double>& a() const { return a_.total; }

  // Gradients of bias (o values), radius, norm mean and k; empty tensors for those not wanted.
  Tensor grad_bias(const Call& call) const {
    Tensor sums = empty({o_}, call.compute);
    std::copy(bias_.total.begin(), bias_.total.end(), static_cast<A*>(sums.mutable_data_ptr()));
    return to_dtype(sums, call.storage);
  }
  Tensor grad_radius(const Call& call, const BackwardInputs& in, double factor) const {
    if ((in.needs & kRadius) == 0 || !in.radius.has_value())
      return empty({0}, call.compute);
    return parameter_grad<A>(*in.radius, totals(rho_), factor);
  }
  Tensor grad_mean(const Call& call, const BackwardInputs& in, double value) const {
    if ((in.needs & kNormMean) == 0 || !in.norm_mean.has_value())
      return empty({0}, call.compute);
    return filled(empty({}, call.compute), value);
  }
  Tensor grad_k(const Call& call, const BackwardInputs& in) const {
    if (!wants_k_)
      return empty({0}, call.compute);
    return parameter_grad<A>(*in.k, totals(k_), 1.0);
  }

private:
  std::vector<double> totals(const Columns<A>& sums) const {
    return sums.total.empty() ? std::vector<double>(static_cast<std::size_t>(o_), 0.0) : sums.total;
  }

  int64_t o_;
  bool wants_rho_, wants_a_, wants_k_, wants_bias_;
  Columns<A> rho_, a_, k_, bias_;
};

// The whole batch's t with the gradient of the mean of its norms.
inline void add_mean_grad(const Call& call, const Tensor& norm_map, double mean_grad, Tensor& t) {
  const double add = mean_grad / double(std::max<int64_t>(call.map_elements(), 1));
  run_tasks((call.map_elements() + kTask - 1) / kTask, [&](int64_t begin, int64_t end) {
    call.table.finish_t(
        norm_map.const_data_ptr(),
        nullptr,
        add,
        t.mutable_data_ptr(),
        begin * kTask,
        std::min(end * kTask, call.map_elements())
    );
  });
}

// The gradient of the filters from that of what x is convolved with, both in the layout of
// call.weight_last.
template <class A>
Tensor weight_grad(
    const Call& call,
    const BackwardInputs& in,
    const Weight& weight,
    const FilterVectors<A>& filters,
    const void* grad_folded,
    const std::vector<double>& grad_a
) {
  const ConvShape& shape = call.shape;
  const Ints sizes(in.weight.sizes().begin(), in.weight.sizes().end());
  Tensor grad_weight = empty(sizes, call.storage, call.weight_last);
  FilterParams f{};
  f.o = shape.o;
  f.size = shape.filter_size();
  f.weight = weight.stored.const_data_ptr();
  f.a = weight.a.data_ptr();
  f.grad_folded = grad_folded;
  f.project = !call.norm_free || call.scaled_by_a;
  std::vector<A> extra, scale;
  for (double v : grad_a)
    extra.push_back(A(v));
  if (call.norm_free)
    for (int64_t i = 0; i < shape.o; ++i)
      scale.push_back(
          A(call.op.alpha) *
          (call.scaled_by_a ? filters.inverse_a[static_cast<std::size_t>(i)] : A(1))
      );
  f.extra = extra.empty() ? nullptr : extra.data();
  f.grad_scale = scale.empty() ? nullptr : scale.data();
  f.grad_weight = grad_weight.mutable_data_ptr();
  run_tasks(
      shape.o,
      [&](int64_t begin, int64_t end) { call.table.filter_grad(f, begin, end); },
      kTask / f.size + 1
  );
  return grad_weight;
}

}  // namespace dcconv::cpu

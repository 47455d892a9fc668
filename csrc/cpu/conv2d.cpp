// The operator on the CPU, one op per direction, and the settings of its strategies.

#include <string>
#include <vector>

#include "cpu/fused/fused.h"

namespace dcconv::cpu {
namespace {

// library or fused: how one direction of a call goes.
Strategy strategy_for(const Call& call, bool backward) {
  const bool depthwise = backward ? takes_depthwise_backward(call) : takes_depthwise(call);
  return depthwise || takes_fused(call, backward) ? Strategy::fused : Strategy::library;
}

void check_norm(const std::string& norm) {
  DCCONV_CHECK(
      norm == "none" || norm == "batch" || norm == "given",
      "norm must be one of none, batch, given, got '",
      norm,
      "'"
  );
}

ForwardResults conv2d_forward(
    Tensor x,
    Tensor weight,
    std::optional<Tensor> bias,
    std::optional<Tensor> radius,
    std::optional<Tensor> norm_mean,
    std::optional<Tensor> k,
    Ints stride,
    Ints padding,
    Ints dilation,
    int64_t groups,
    std::string padding_mode,
    std::string magnitude,
    std::string angular,
    std::string weighting,
    double alpha,
    double beta,
    double power,
    double eps,
    double delta,
    std::string norm,
    bool keep_dot,
    bool keep_map,
    std::optional<Tensor> sums
) {
  const Call call = make_call(
      x,
      weight,
      stride,
      padding,
      dilation,
      groups,
      padding_mode,
      magnitude,
      angular,
      weighting,
      alpha,
      beta,
      power,
      delta,
      false
  );
  check_bias(bias, call.shape.o, call.storage);
  check_norm(norm);
  if (sums.has_value()) {
    check_sizes(*sums, {call.sums_elements()}, "sums");
    check_dtype(*sums, call.compute, "sums");
    sums = contiguous(*sums, false);
  }
  const ForwardInputs in{
      x, weight, bias, radius, norm_mean, k, sums, eps, norm == "batch", keep_dot, keep_map
  };
  const Strategy strategy = strategy_for(call, false);
  taken_strategy() = strategy;
  const bool wide = call.dtype == Dtype::f64;
  if (strategy == Strategy::library)
    return wide ? library_forward<double>(call, in) : library_forward<float>(call, in);
  if (takes_depthwise(call))
    return wide ? depthwise_forward<double>(call, in) : depthwise_forward<float>(call, in);
  return fused_forward(call, in);
}

BackwardResults conv2d_backward(
    Tensor grad_y,
    Tensor x,
    Tensor weight,
    Tensor kept,
    Tensor norm_map,
    Tensor mean,
    std::optional<Tensor> radius,
    std::optional<Tensor> norm_mean,
    std::optional<Tensor> k,
    Ints stride,
    Ints padding,
    Ints dilation,
    int64_t groups,
    std::string padding_mode,
    std::string magnitude,
    std::string angular,
    std::string weighting,
    double alpha,
    double beta,
    double power,
    double eps,
    double delta,
    std::string norm,
    bool norm_grad,
    std::string kept_is,
    int64_t needs
) {
  const Call call = make_call(
      x,
      weight,
      stride,
      padding,
      dilation,
      groups,
      padding_mode,
      magnitude,
      angular,
      weighting,
      alpha,
      beta,
      power,
      delta,
      true
  );
  const ConvShape& s = call.shape;
  const Ints sizes{s.n, s.o, s.rows.output, s.columns.output};
  check_sizes(grad_y, sizes, "grad_y");
  check_dtype(grad_y, call.storage, "grad_y");
  if (!call.norm_free) {
    check_sizes(kept, sizes, "kept");
    check_dtype(kept, call.storage, "kept");
    check_sizes(norm_map, {call.map_elements()}, "norm_map");
    check_dtype(norm_map, call.compute, "norm_map");
    norm_map = contiguous(norm_map, false);
  }
  check_norm(norm);
  DCCONV_CHECK(
      call.norm_free || kept_is == "output" || kept_is == "dot",
      "kept_is must be one of output, dot, got '",
      kept_is,
      "'"
  );
  const BackwardInputs in{
      grad_y,
      x,
      weight,
      kept,
      norm_map,
      mean,
      radius,
      norm_mean,
      k,
      eps,
      norm == "batch",
      norm_grad,
      kept_is == "output" ? Kept::output : Kept::dot,
      needs
  };
  const Strategy strategy = strategy_for(call, true);
  taken_strategy() = strategy;
  const bool wide = call.dtype == Dtype::f64;
  if (strategy == Strategy::library)
    return wide ? library_backward<double>(call, in) : library_backward<float>(call, in);
  if (takes_depthwise_backward(call))
    return wide ? depthwise_backward<double>(call, in) : depthwise_backward<float>(call, in);
  return fused_backward(call, in);
}

void set_cpu_chunk(int64_t images) {
  forced_chunk() = images;
}

void set_cpu_bfloat16(bool by_library) {
  library_has_bfloat16() = by_library;
}

void set_cpu_strategy(std::string strategy) {
  forced_strategy() = strategy_of(strategy);
}

std::string name_of(Strategy strategy) {
  switch (strategy) {
  case Strategy::fused:
    return "fused";
  case Strategy::library:
    return "library";
  default:
    return "";
  }
}

std::string cpu_strategy_taken() {
  return name_of(taken_strategy());
}

std::vector<std::string> cpu_strategies(
    Tensor x,
    Tensor weight,
    Ints stride,
    Ints padding,
    Ints dilation,
    int64_t groups,
    std::string padding_mode,
    std::string magnitude,
    std::string angular,
    std::string weighting
) {
  std::vector<std::string> names;
  for (bool backward : {false, true}) {
    const Call call = make_call(
        x,
        weight,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        magnitude,
        angular,
        weighting,
        1.0,
        0.0,
        1.0,
        0.0,
        backward
    );
    names.push_back(name_of(strategy_for(call, backward)));
  }
  return names;
}

}  // namespace
}  // namespace dcconv::cpu

STABLE_TORCH_LIBRARY_IMPL(dcconv, CompositeExplicitAutograd, m) {
  m.impl("set_cpu_chunk", TORCH_BOX(&dcconv::cpu::set_cpu_chunk));
  m.impl("set_cpu_bfloat16", TORCH_BOX(&dcconv::cpu::set_cpu_bfloat16));
  m.impl("cpu_strategy_taken", TORCH_BOX(&dcconv::cpu::cpu_strategy_taken));
  m.impl("set_cpu_strategy", TORCH_BOX(&dcconv::cpu::set_cpu_strategy));
}

STABLE_TORCH_LIBRARY_IMPL(dcconv, CPU, m) {
  m.impl("conv2d_forward", TORCH_BOX(&dcconv::Guarded<&dcconv::cpu::conv2d_forward>::run));
  m.impl("conv2d_backward", TORCH_BOX(&dcconv::Guarded<&dcconv::cpu::conv2d_backward>::run));
  m.impl("cpu_strategies", TORCH_BOX(&dcconv::cpu::cpu_strategies));
}

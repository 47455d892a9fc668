// Depthwise convolutions on the CPU through kernels of their own: x is read and y written once, dot
// products and norms stay in cache. float16 is computed in float32 like everything here.

#include <algorithm>
#include <vector>

#include "cpu/depthwise/plan.h"
#include "cpu/directions.h"
#include "cpu/operands.h"
#include "cpu/parameter_sums.h"

namespace dcconv::cpu {
namespace {

// Parameters by lane where lanes are filters.
template <class A>
struct Parameters {
  std::vector<A> storage[7];
  DepthwiseFilters pointers;

  Parameters(const DepthwiseShape& s, const FilterVectors<A>& f, const A* weight) {
    int next = 0;
    const auto of = [&](const A* values, int64_t size) -> const A* {
      if (!s.channels_last || values == nullptr)
        return values;
      storage[next] = by_block(s, values, size);
      return storage[next++].data();
    };
    pointers = {
        of(f.a.data(), 1),
        of(f.inverse_a.data(), 1),
        of(f.rho.data(), 1),
        of(f.inverse_rho.data(), 1),
        of(f.k.data(), 1),
        of(f.bias.empty() ? nullptr : f.bias.data(), 1),
        of(weight, s.taps())
    };
  }
};

// Phases of one axis: the kernel's taps by (tap * dilation) % stride.
struct Phases {
  std::vector<int64_t> starts, taps;

  explicit Phases(const Axis& axis) {
    for (int64_t phase = 0; phase < axis.stride; ++phase) {
      starts.push_back(static_cast<int64_t>(taps.size()));
      for (int64_t tap = 0; tap < axis.kernel; ++tap)
        if (tap * axis.dilation % axis.stride == phase)
          taps.push_back(tap);
    }
    starts.push_back(static_cast<int64_t>(taps.size()));
  }
};

// The weight [o, taps] with the taps phase by phase.
template <class A>
std::vector<A>
by_phase(const DepthwiseShape& s, const A* weight, const Phases& rows, const Phases& columns) {
  std::vector<A> to;
  for (int64_t filter = 0; filter < s.o; ++filter)
    for (std::size_t i = 0; i + 1 < rows.starts.size(); ++i)
      for (std::size_t j = 0; j + 1 < columns.starts.size(); ++j)
        for (int64_t r = rows.starts[i]; r < rows.starts[i + 1]; ++r)
          for (int64_t c = columns.starts[j]; c < columns.starts[j + 1]; ++c)
            to.push_back(
                weight
                    [filter * s.taps() + rows.taps[static_cast<std::size_t>(r)] * s.columns.kernel +
                     columns.taps[static_cast<std::size_t>(c)]]
            );
  return to;
}

// A map [n, groups, pixels] as [n, pixels, groups].
Tensor map_channels_last(const Tensor& map, const ConvShape& s) {
  const Ints sizes{s.n, s.groups, s.rows.output, s.columns.output};
  return contiguous(dispatch_tensor("aten::view", "", map, sizes), true);
}

// Sums of backward over the tasks in their order: [blocks, size, lanes] parts of groups.
template <class Part>
void add_parts(
    const DepthwiseGradParams& p,
    const std::vector<Part>& parts,
    int64_t size,
    std::vector<double>& to
) {
  const DepthwiseShape& s = p.forward.shape;
  to.assign(static_cast<std::size_t>(s.o * size), 0.0);
  for (int64_t task = 0; task < p.tasks(); ++task)
    for (int64_t i = 0; i < s.group; ++i) {
      const int64_t block = task % s.groups() * s.group + i;
      const int64_t first = block * s.block_filters();
      for (int64_t lane = 0; lane < std::min(s.block_filters(), s.o - first); ++lane)
        for (int64_t j = 0; j < size; ++j)
          to[static_cast<std::size_t>((first + lane) * size + j)] += double(
              parts[static_cast<std::size_t>(((task * s.group + i) * size + j) * s.lanes + lane)]
          );
    }
}

}  // namespace

bool takes_depthwise(const Call& call) {
  const ConvShape& s = call.shape;
  return s.groups == s.c && s.o / s.c <= kMaxMultiplier && !call.norm_free &&
         forced_strategy() != Strategy::library;
}

bool takes_depthwise_backward(const Call& call) {
  return call.shape.n > 0 && call.shape.rows.mode == PaddingMode::zeros && takes_depthwise(call);
}

template <class A>
ForwardResults depthwise_forward(const Call& call, const ForwardInputs& in) {
  const ConvShape& conv = call.shape;
  const Tensor x = contiguous(in.x, conv.channels_last);
  const Weight weight = make_weight(call, in.weight, in.eps);
  const Tensor compute_weight = to_dtype(weight.stored, call.compute);
  const Ints sizes{conv.n, conv.o, conv.rows.output, conv.columns.output};
  Tensor y = empty(sizes, call.storage, conv.channels_last);
  Tensor dot =
      empty(in.keep_dot ? sizes : Ints{0}, call.storage, conv.channels_last && in.keep_dot);
  Tensor norm_map = empty({in.keep_map ? call.map_elements() : 0}, call.compute);
  Tensor mean = empty(in.batch_mean ? Ints{} : Ints{0}, call.compute);

  const DepthwisePlan plan = make_plan(conv, sizeof(A));
  DepthwiseParams p{};
  p.shape = plan.shape;
  p.op = call.op;
  p.eps = in.eps;
  p.row_sources = plan.row_sources.data();
  p.column_sources = plan.column_sources.data();
  p.row_offsets = plan.row_offsets.data();
  p.column_offsets = plan.column_offsets.data();
  p.x = x.const_data_ptr();
  p.map = in.keep_map ? norm_map.mutable_data_ptr() : nullptr;
  const auto run = [&] {
    run_tasks(p.shape.tasks(), [&](int64_t begin, int64_t end) {
      call.table.depthwise_forward(p, begin, end);
    });
  };
  double factor = 1.0;
  if (in.batch_mean) {
    std::vector<double> sums(static_cast<std::size_t>(p.shape.tasks()));
    p.norm_sums = sums.data();
    run();
    p.norm_sums = nullptr;
    p.map = nullptr;
    double sum = 0;
    for (double v : sums)
      sum += v;
    const A rounded = A(sum / double(std::max<int64_t>(call.map_elements(), 1)));
    *static_cast<A*>(mean.mutable_data_ptr()) = rounded;
    factor = double(rounded);
  } else if (in.norm_mean.has_value()) {
    factor = scalar_of<A>(*in.norm_mean, call.compute);
  }
  std::optional<Tensor> bias;
  if (in.bias.has_value())
    bias = to_dtype(*in.bias, call.compute);
  const FilterVectors<A> filters(call, weight.a, in.radius, factor, in.k, bias);
  const Parameters<A> parameters(
      plan.shape, filters, static_cast<const A*>(compute_weight.const_data_ptr())
  );
  const TanhCosineScales scales(call, filters);
  p.filters = parameters.pointers;
  p.scales = scales.pointers();
  p.y = y.mutable_data_ptr();
  p.dot = in.keep_dot ? dot.mutable_data_ptr() : nullptr;
  run();
  return {y, norm_map, mean, dot};
}

template <class A>
BackwardResults depthwise_backward(const Call& call, const BackwardInputs& in) {
  // In contiguous layout through copies: still a fraction of the library's time.
  ConvShape conv = call.shape;
  conv.channels_last = true;
  const bool needs_x = in.needs & kX, needs_weight = in.needs & kWeight;
  const bool barrier = in.batch_mean && in.norm_grad && needs_x;
  const Tensor x = contiguous(in.x, true), grad_y = contiguous(in.grad_y, true);
  const Tensor kept = contiguous(in.kept, true);
  const Tensor norm_map =
      call.shape.channels_last ? in.norm_map : map_channels_last(in.norm_map, conv);
  const Weight weight = make_weight(call, in.weight, in.eps);
  const Tensor compute_weight = to_dtype(weight.stored, call.compute);
  const double factor = backward_factor<A>(call, in);
  const FilterVectors<A> filters(call, weight.a, in.radius, factor, in.k, std::nullopt);

  DepthwisePlan plan = make_plan(conv, sizeof(A));
  DepthwiseShape& s = plan.shape;
  DepthwiseGradParams p{};
  const Phases rows(s.rows), columns(s.columns);
  p.left = (s.columns.kernel - 1) * s.columns.dilation / s.columns.stride;
  const int64_t reach = (s.columns.input - 1 + s.columns.before) / s.columns.stride + 1;
  p.width = ((p.left + std::max(s.columns.output, reach)) | 1) * s.lanes;
  p.depth = (s.rows.kernel - 1) * s.rows.dilation / s.rows.stride + 1;
  p.images = ceil_div(s.n, kMostImageGroups);
  const int64_t block_bytes =
      (s.layout.rows * s.layout.width + 2 * p.depth * p.width) * int64_t{sizeof(A)};
  const int64_t fitting = std::max<int64_t>(kGradRingBytes / block_bytes, 4);
  const int64_t groups = std::max(ceil_div(s.blocks(), fitting), ceil_div(kLeastTasks, s.n));
  s.group = ceil_div(s.blocks(), std::min(groups, s.blocks()));
  s.layout.elements = s.layout.rows * s.group * s.layout.width;

  const Parameters<A> parameters(
      s,
      filters,
      by_phase(s, static_cast<const A*>(compute_weight.const_data_ptr()), rows, columns).data()
  );
  p.forward.shape = s;
  p.forward.op = call.op;
  p.forward.filters = parameters.pointers;
  p.forward.row_sources = plan.row_sources.data();
  p.forward.column_sources = plan.column_sources.data();
  p.forward.column_offsets = plan.column_offsets.data();
  p.forward.x = x.const_data_ptr();
  p.row_starts = rows.starts.data();
  p.kernel_rows = rows.taps.data();
  p.column_starts = columns.starts.data();
  p.kernel_columns = columns.taps.data();
  p.kept_is = in.kept_is;
  p.grad_y = grad_y.const_data_ptr();
  p.kept = kept.const_data_ptr();
  p.norm = norm_map.const_data_ptr();
  const bool wants_rho =
      in.radius.has_value() && ((in.needs & (kRadius | kNormMean)) != 0 || barrier);
  const bool wants_a = is_weighted(call.op) && needs_weight;
  const bool wants_sums = wants_rho || wants_a || (in.needs & (kBias | kK)) != 0;

  std::vector<double> parts;
  std::vector<double> sums(static_cast<std::size_t>(s.o * kSumKinds), 0.0);
  const auto run = [&] {
    p.parameters = wants_sums && parts.empty();
    if (p.parameters) {
      parts.resize(static_cast<std::size_t>(p.tasks() * s.group * kSumKinds * s.lanes));
      p.sums = parts.data();
    }
    run_tasks(p.tasks(), [&](int64_t begin, int64_t end) {
      call.table.depthwise_backward(p, begin, end);
    });
    if (p.parameters)
      add_parts(p, parts, kSumKinds, sums);
  };
  const auto kind = [&](int64_t i) {
    std::vector<double> to;
    for (int64_t filter = 0; filter < s.o; ++filter)
      to.push_back(sums[static_cast<std::size_t>(filter * kSumKinds + i)]);
    return to;
  };
  double mean_grad = 0;
  std::vector<double> rho;
  const auto finish_rho = [&] {
    rho = kind(0);
    mean_grad = finish_radius<A>(in, factor, rho);
  };
  if (barrier && wants_rho) {
    // The mean of the norms depends on every patch: its gradient comes first.
    p.sums_only = true;
    run();
    finish_rho();
    p.sums_only = false;
    p.add = mean_grad / double(std::max<int64_t>(call.map_elements(), 1));
  }

  const auto none = [&] { return empty({0}, call.storage); };
  const auto none_compute = [&] { return empty({0}, call.compute); };
  Tensor grad_x = none(), grad_weight = none(), grad_bias = none();
  if (needs_x) {
    grad_x = empty({s.n, s.c, s.rows.input, s.columns.input}, call.storage, true);
    p.grad_x = grad_x.mutable_data_ptr();
  }
  std::vector<A> weight_parts;
  if (needs_weight) {
    weight_parts.resize(static_cast<std::size_t>(p.tasks() * s.group * s.taps() * s.lanes));
    p.grad_weight = weight_parts.data();
  }
  if (needs_x || needs_weight || (wants_sums && parts.empty()))
    run();
  if (rho.empty() && wants_rho)
    finish_rho();

  if (needs_x && !call.shape.channels_last)
    grad_x = contiguous(grad_x, false);
  if (needs_weight) {
    std::vector<double> total;
    add_parts(p, weight_parts, s.taps(), total);
    const std::vector<A> folded(total.begin(), total.end());
    grad_weight = weight_grad<A>(
        call, in, weight, filters, folded.data(), wants_a ? kind(1) : std::vector<double>{}
    );
  }
  if ((in.needs & kBias) != 0) {
    Tensor bias = empty({s.o}, call.compute);
    const std::vector<double> total = kind(3);
    std::copy(total.begin(), total.end(), static_cast<A*>(bias.mutable_data_ptr()));
    grad_bias = to_dtype(bias, call.storage);
  }
  Tensor grad_radius = none_compute(), grad_mean = none_compute(), grad_k = none_compute();
  if ((in.needs & kRadius) != 0 && in.radius.has_value())
    grad_radius = parameter_grad<A>(*in.radius, rho, factor);
  if ((in.needs & kNormMean) != 0 && in.norm_mean.has_value())
    grad_mean = filled(empty({}, call.compute), mean_grad);
  if ((in.needs & kK) != 0 && in.k.has_value())
    grad_k = parameter_grad<A>(*in.k, kind(2), 1.0);
  return {grad_x, grad_weight, grad_bias, grad_radius, grad_mean, grad_k};
}

template ForwardResults depthwise_forward<float>(const Call&, const ForwardInputs&);
template ForwardResults depthwise_forward<double>(const Call&, const ForwardInputs&);
template BackwardResults depthwise_backward<float>(const Call&, const BackwardInputs&);
template BackwardResults depthwise_backward<double>(const Call&, const BackwardInputs&);

}  // namespace dcconv::cpu

// Depthwise convolutions on the CPU through kernels of their own: x is read and y written once, dot
// products and norms stay in cache. float16 is computed in float32 like everything here.

#include "cpu/depthwise/params.h"

#include <algorithm>
#include <vector>

#include "cpu/column_sums.h"
#include "cpu/directions.h"
#include "cpu/operands.h"

namespace dcconv {
namespace cpu {
namespace {

// Bytes of a band: with the output beside it, it stays in a second-level cache.
constexpr int64_t kBandBytes = 128 << 10;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Offsets in a band, with the shape that points nowhere else.
struct Plan {
  DepthwiseShape shape;
  std::vector<int64_t> row_sources, column_sources, offsets, row_offsets, column_offsets;
};

Plan make_plan(const ConvShape& conv, int64_t element) {
  Plan plan{};
  DepthwiseShape& s = plan.shape;
  s.n = conv.n;
  s.c = conv.c;
  s.o = conv.o;
  s.rows = conv.rows;
  s.columns = conv.columns;
  s.channels_last = conv.channels_last;
  s.lanes = kLaneBytes / element;
  BandLayout& l = s.layout;
  if (s.channels_last) {
    l.width = s.columns.padded() * s.lanes;
    l.step = s.columns.stride * s.lanes;
    l.line = s.rows.stride * l.width;
  } else {
    l.phase = ceil_div(s.columns.padded(), s.columns.stride);
    l.width = l.phase * s.columns.stride;
    l.step = s.lanes;
    l.line = l.width;
  }
  // Rows of x for one output row, and for each one more.
  const int64_t halo = (s.rows.kernel - 1) * s.rows.dilation + 1;
  const int64_t fitting = kBandBytes / (l.width * element);
  const int64_t most = std::max<int64_t>((fitting - halo) / s.rows.stride + 1, 1);
  s.band = ceil_div(s.rows.output, ceil_div(s.rows.output, most));
  const int64_t rows = (s.band - 1) * s.rows.stride + halo;
  const int64_t phase_rows = ceil_div(rows, s.rows.stride);
  l.row_phase = phase_rows * l.width;
  l.elements = (s.channels_last ? rows : phase_rows * s.rows.stride) * l.width + 4 * s.lanes;
  s.images = 1;

  plan.row_sources = s.rows.sources();
  plan.column_sources = s.columns.sources();
  for (int64_t r = 0; r < s.rows.kernel; ++r) {
    const int64_t i = r * s.rows.dilation;
    plan.row_offsets.push_back(
        s.channels_last
            ? i * l.width
            : i % s.rows.stride * l.row_phase + i / s.rows.stride * l.width
    );
  }
  for (int64_t c = 0; c < s.columns.kernel; ++c) {
    const int64_t j = c * s.columns.dilation;
    plan.column_offsets.push_back(
        s.channels_last ? j * s.lanes : j % s.columns.stride * l.phase + j / s.columns.stride
    );
  }
  for (int64_t row : plan.row_offsets)
    for (int64_t column : plan.column_offsets)
      plan.offsets.push_back(row + column);
  return plan;
}

template <class A>
ForwardResults forward(const Call& call, const ForwardInputs& in) {
  const ConvShape& conv = call.shape;
  const Tensor x = contiguous(in.x, conv.channels_last);
  const Weight weight = make_weight(call, in.weight, in.eps);
  const Tensor compute_weight = to_dtype(weight.stored, call.compute);
  const Ints sizes{conv.n, conv.o, conv.rows.output, conv.columns.output};
  Tensor y = empty(sizes, call.storage, conv.channels_last);
  Tensor dot = empty(
      in.keep_dot ? sizes : Ints{0}, call.storage, conv.channels_last && in.keep_dot
  );
  Tensor norm_map = empty({in.keep_map ? call.map_elements() : 0}, call.compute);
  Tensor mean = empty(in.batch_mean ? Ints{} : Ints{0}, call.compute);

  const Plan plan = make_plan(conv, sizeof(A));
  DepthwiseParams p{};
  p.shape = plan.shape;
  p.op = call.op;
  p.eps = in.eps;
  p.row_sources = plan.row_sources.data();
  p.column_sources = plan.column_sources.data();
  p.offsets = plan.offsets.data();
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
  p.filters = {
      filters.a.data(),
      filters.inverse_a.data(),
      filters.rho.data(),
      filters.inverse_rho.data(),
      filters.k.data(),
      bias.has_value() ? filters.bias.data() : nullptr,
      compute_weight.const_data_ptr()
  };
  p.y = y.mutable_data_ptr();
  p.dot = in.keep_dot ? dot.mutable_data_ptr() : nullptr;
  run();
  return {y, norm_map, mean, dot};
}

}  // namespace

bool takes_depthwise(const Call& call) {
  const ConvShape& s = call.shape;
  return s.groups == s.c && s.o / s.c <= kMaxMultiplier && !call.norm_free &&
         forced_scheme() != Scheme::library;
}

ForwardResults depthwise_forward(const Call& call, const ForwardInputs& in) {
  return call.dtype == Dtype::f64 ? forward<double>(call, in) : forward<float>(call, in);
}

}  // namespace cpu
}  // namespace dcconv

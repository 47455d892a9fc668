// The patch-norm map as an op, and the norm pass that forward and backward share.

#include "cpu/patch_norm.h"

#include <numeric>
#include <string>

#include "arguments.h"

namespace dcconv::cpu {

PatchNorm::PatchNorm(const ConvShape& shape, double eps)
    : row_sources_(shape.rows.sources()), column_sources_(shape.columns.sources()), eps_(eps) {}

WindowParams PatchNorm::params(const ConvShape& shape, int64_t count) const {
  return {
      planes(shape, count),
      shape.channels_last ? shape.groups : 1,
      shape.rows,
      shape.columns,
      row_sources_.data(),
      column_sources_.data(),
      eps_
  };
}

void PatchNorm::norms(
    const Kernels& kernels,
    const ConvShape& shape,
    int64_t count,
    const void* x,
    const void* sums,
    void* b,
    double* row_sums
) const {
  const WindowParams window = params(shape, count);
  std::vector<char> found;
  if (sums == nullptr) {
    found.resize(
        static_cast<std::size_t>(count * shape.groups * shape.input_pixels()) * kernels.compute_size
    );
    const PixelSumsqParams sumsq{
        count, shape.input_pixels(), shape.c, shape.groups, shape.channels_last, x, found.data()
    };
    run_tasks(sumsq.tasks(), [&](int64_t begin, int64_t end) {
      kernels.pixel_sumsq(sumsq, begin, end);
    });
    sums = found.data();
  }
  run_tasks(window.planes * shape.rows.output, [&](int64_t begin, int64_t end) {
    kernels.window_norm(window, sums, b, row_sums, begin, end);
  });
}

Tensor PatchNorm::transposed(
    const Kernels& kernels, const ConvShape& shape, int64_t count, const void* t, ScalarType compute
) const {
  const WindowParams window = params(shape, count);
  Tensor out = empty({count * shape.groups * shape.input_pixels()}, compute);
  void* to = out.mutable_data_ptr();
  run_tasks(window.planes * shape.rows.input, [&](int64_t begin, int64_t end) {
    kernels.window_transposed(window, t, to, begin, end);
  });
  return out;
}

Shown::Shown(const Axis& axis) : starts(static_cast<std::size_t>(axis.input + 1), 0) {
  const std::vector<int64_t> sources = axis.sources();
  for (int64_t source : sources)
    if (source >= 0)
      ++starts[static_cast<std::size_t>(source + 1)];
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  list.resize(static_cast<std::size_t>(starts.back()));
  std::vector<int64_t> next = starts;
  for (std::size_t j = 0; j < sources.size(); ++j)
    if (sources[j] >= 0)
      list[static_cast<std::size_t>(next[static_cast<std::size_t>(sources[j])]++)] =
          static_cast<int64_t>(j);
}

namespace {

Tensor patch_norm_forward(
    Tensor x,
    Ints kernel,
    Ints stride,
    Ints padding,
    Ints dilation,
    int64_t groups,
    std::string padding_mode,
    double eps
) {
  check_dimensions(x, 4, "x");
  const bool channels_last = is_channels_last(x);
  const ConvShape shape =
      conv_shape(x, groups, kernel, stride, padding, dilation, groups, padding_mode, channels_last);
  const Dtype dtype = dtype_of(x);
  x = contiguous(x, channels_last);
  Tensor b = empty(
      {shape.n, groups, shape.rows.output, shape.columns.output}, compute_type(dtype), channels_last
  );
  PatchNorm(shape, eps)
      .norms(
          kernels(dtype), shape, shape.n, x.const_data_ptr(), nullptr, b.mutable_data_ptr(), nullptr
      );
  return b;
}

Tensor patch_norm_backward(
    Tensor grad_b,
    Tensor x,
    Tensor b,
    Ints kernel,
    Ints stride,
    Ints padding,
    Ints dilation,
    int64_t groups,
    std::string padding_mode
) {
  check_dimensions(x, 4, "x");
  const bool channels_last = is_channels_last(x);
  const ConvShape shape =
      conv_shape(x, groups, kernel, stride, padding, dilation, groups, padding_mode, channels_last);
  const Dtype dtype = dtype_of(x);
  const Ints sizes{shape.n, groups, shape.rows.output, shape.columns.output};
  check_sizes(b, sizes, "b");
  check_dtype(b, compute_type(dtype), "b");
  check_sizes(grad_b, sizes, "grad_b");
  check_dtype(grad_b, compute_type(dtype), "grad_b");
  const Kernels& table = kernels(dtype);
  x = contiguous(x, channels_last);
  b = contiguous(b, channels_last);
  grad_b = contiguous(grad_b, channels_last);
  Tensor t = empty({b.numel()}, compute_type(dtype));
  run_tasks((b.numel() + kTask - 1) / kTask, [&](int64_t begin, int64_t end) {
    table.finish_t(
        b.const_data_ptr(),
        grad_b.const_data_ptr(),
        0.0,
        t.mutable_data_ptr(),
        begin * kTask,
        std::min(end * kTask, b.numel())
    );
  });
  const Tensor sums =
      PatchNorm(shape, 0.0)
          .transposed(table, shape, shape.n, t.const_data_ptr(), compute_type(dtype));
  Tensor grad_x = empty(
      {shape.n, shape.c, shape.rows.input, shape.columns.input}, x.scalar_type(), channels_last
  );
  GradInputParams params{};
  params.n = shape.n;
  params.c = shape.c;
  params.groups = groups;
  params.rows = shape.rows;
  params.columns = shape.columns;
  params.channels_last = channels_last;
  params.x = x.const_data_ptr();
  params.t = sums.const_data_ptr();
  params.grad_x = grad_x.mutable_data_ptr();
  run_tasks(params.tasks(), [&](int64_t begin, int64_t end) {
    table.grad_input(params, begin, end);
  });
  return grad_x;
}

}  // namespace
}  // namespace dcconv::cpu

STABLE_TORCH_LIBRARY_IMPL(dcconv, CPU, m) {
  m.impl("patch_norm_forward", TORCH_BOX(&dcconv::Guarded<&dcconv::cpu::patch_norm_forward>::run));
  m.impl(
      "patch_norm_backward", TORCH_BOX(&dcconv::Guarded<&dcconv::cpu::patch_norm_backward>::run)
  );
}

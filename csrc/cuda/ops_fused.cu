// The kernels of fused as ops (dcconv/passes/fused.py): guards, and the choice of the kernel by
// name. Under DCCONV_SIMT the ops run in the SIMT model, on CPU tensors.

#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "cuda/support/launch.cuh"
#include "cuda/support/op_support.h"
#include "schemas.h"

namespace dcconv::cuda {
namespace {

Tensor filter_norm_op(Tensor weight, double eps) {
  const OnDevice device(weight);
  const Dtype dtype = dtype_of(weight);
  check_dense_either(weight, "weight");
  Tensor a = empty(weight, {weight.size(0)}, compute_type(dtype));
  FilterNormParams p{};
  p.o = weight.size(0);
  p.size = weight.numel() / std::max<int64_t>(p.o, 1);
  p.weight = weight.const_data_ptr();
  p.a = a.mutable_data_ptr();
  p.eps = eps;
  p.alpha = 1;
  filter_norm(dtype, p, device.stream());
  return a;
}

ConvShape shape_of(const Tensor& x, const Tensor& weight, const Geometry& geometry) {
  check_weight(x, weight, geometry.groups);
  return geometry.shape(
      x.size(0), x.size(1), x.size(2), x.size(3), weight.size(0), {weight.size(2), weight.size(3)}
  );
}

constexpr char kImplicitGemm[] = "implicit_gemm", kDepthwise[] = "depthwise", kStem[] = "stem";

// The number of a tile, -1 for the kernel's own rule; the kernel knows how many it has.
int tile_of(int64_t tile) {
  DCCONV_CHECK(tile >= -1 && tile <= kMostPixels, "tile must be -1 or a tile's number, got ", tile);
  return static_cast<int>(tile);
}

// An operand as a kernel takes it: the implicit GEMM copies pieces of 16 bytes, which begin at
// multiples of 16. Where a view begins elsewhere its elements move; allocations begin at multiples
// of 512.
Tensor operand_of(const std::string& kernel, const Tensor& t) {
  if (kernel != kImplicitGemm || t.numel() == 0 || aligned16(t.const_data_ptr()))
    return t;
  return dispatch_tensor("aten::clone", "", t, std::optional<MemoryFormat>(MemoryFormat::Preserve));
}

std::tuple<Tensor, Tensor, Tensor> conv2d_one_pass(
    Tensor x,
    Tensor weight,
    Tensor a,
    MaybeTensor map,
    MaybeTensor bias_in,
    MaybeTensor radius_in,
    MaybeTensor mean,
    MaybeTensor k_in,
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
    double delta,
    double eps,
    bool map_is_norm,
    bool keep_norm,
    bool keep_dot,
    std::string kernel,
    int64_t tile,
    bool channels_last
) {
  const OnDevice device(x);
  check_devices(x, {weight, a, map, bias_in, radius_in, mean, k_in});
  const Dtype dtype = dtype_of(x);
  const ScalarType compute = compute_type(dtype);
  check_dense(x, x, channels_last, "x");
  check_dense(weight, x, channels_last, "weight");
  const Geometry geometry{stride, padding, dilation, groups, padding_mode};
  const ConvShape shape = shape_of(x, weight, geometry);
  const int64_t outputs = shape.positions() * groups;
  DCCONV_CHECK(map.has_value() || !map_is_norm, "map must be there with map_is_norm, got none");
  if (map.has_value())
    check_map(*map, map_is_norm ? outputs : shape.n * shape.input_pixels() * groups, dtype, "map");
  DCCONV_CHECK(
      !map.has_value() || map_is_norm || kernel == kImplicitGemm,
      "map must be the norms for kernel '",
      kernel,
      "', got sums of squares"
  );
  const MaybeTensor bias = dense_parameter(bias_in);
  check_bias(bias, shape.o, x.scalar_type());
  const MaybeTensor radius = dense_parameter(radius_in), k = dense_parameter(k_in);
  const Ints sizes{shape.n, shape.o, shape.rows.output, shape.columns.output};
  Tensor y = empty(x, sizes, x.scalar_type(), channels_last);
  Tensor dot =
      keep_dot ? empty(x, sizes, x.scalar_type(), channels_last) : absent(x, x.scalar_type());
  const bool writes_norm = keep_norm && !map_is_norm;
  Tensor norm = empty(x, {writes_norm ? outputs : 0}, compute);
  FusedParams p{};
  p.n = shape.n;
  p.c = to_int(shape.c);
  p.o = to_int(shape.o);
  p.groups = to_int(groups);
  p.window = window_of(shape);
  p.channels_last = channels_last;
  p.op = operator_of(magnitude, angular, weighting, alpha, beta, power, delta);
  p.eps = eps;
  p.filters = filter_operands(shape.o, a, radius, mean, k, dtype);
  p.bias = data(bias);
  const Tensor x_operand = operand_of(kernel, x), weight_operand = operand_of(kernel, weight);
  p.x = x_operand.const_data_ptr();
  p.weight = weight_operand.const_data_ptr();
  p.map = data(map);
  p.map_is_norm = map_is_norm;
  p.y = y.mutable_data_ptr();
  p.dot = keep_dot ? dot.mutable_data_ptr() : nullptr;
  p.norm = writes_norm ? norm.mutable_data_ptr() : nullptr;
  p.tile = tile_of(tile);
  if (kernel == kImplicitGemm) {
    implicit_gemm(dtype, p, device.stream());
  } else if (kernel == kDepthwise) {
    depthwise(dtype, p, device.stream());
  } else {
    DCCONV_CHECK(
        kernel == kStem, "kernel must be one of implicit_gemm, depthwise, stem, got '", kernel, "'"
    );
    stem(dtype, p, device.stream());
  }
  return {y, norm, dot};
}

Tensor conv2d_one_pass_grad_input(
    Tensor grad_u,
    Tensor weight,
    Tensor x,
    Tensor t,
    Tensor norm_map,
    MaybeTensor sigma,
    Ints stride,
    Ints padding,
    Ints dilation,
    int64_t groups,
    std::string padding_mode,
    std::string kernel,
    int64_t tile,
    bool channels_last
) {
  const OnDevice device(x);
  check_devices(x, {grad_u, weight, t, norm_map, sigma});
  const Dtype dtype = dtype_of(x);
  check_dense(x, x, channels_last, "x");
  check_dense(weight, x, channels_last, "weight");
  check_dense(grad_u, x, channels_last, "grad_u");
  const Geometry geometry{stride, padding, dilation, groups, padding_mode};
  const ConvShape shape = shape_of(x, weight, geometry);
  const int64_t outputs = shape.positions() * groups;
  check_sizes(grad_u, {shape.n, shape.o, shape.rows.output, shape.columns.output}, "grad_u");
  check_map(t, outputs, dtype, "t");
  if (sigma.has_value())
    check_map(norm_map, outputs, dtype, "norm_map");
  parameter_stride(sigma, 1, dtype, "sigma");
  const Ints sizes = sizes_of(x);
  Tensor grad_x = empty(x, sizes, x.scalar_type(), channels_last);
  FusedGradInputParams p{};
  p.n = shape.n;
  p.c = to_int(shape.c);
  p.o = to_int(shape.o);
  p.groups = to_int(groups);
  p.window = window_of(shape);
  p.channels_last = channels_last;
  const Tensor grad_u_operand = operand_of(kernel, grad_u), x_operand = operand_of(kernel, x);
  const Tensor weight_operand = operand_of(kernel, weight);
  p.grad_u = grad_u_operand.const_data_ptr();
  p.weight = weight_operand.const_data_ptr();
  p.x = x_operand.const_data_ptr();
  p.tap = sigma.has_value() ? Tap::with_mean : Tap::plain;
  p.t = t.const_data_ptr();
  p.norm = norm_map.const_data_ptr();
  p.sigma = data(sigma);
  p.grad_x = grad_x.mutable_data_ptr();
  p.tile = tile_of(tile);
  if (kernel == kImplicitGemm) {
    implicit_gemm_grad_input(dtype, p, device.stream());
  } else {
    DCCONV_CHECK(
        kernel == kDepthwise, "kernel must be one of implicit_gemm, depthwise, got '", kernel, "'"
    );
    depthwise_grad_input(dtype, p, device.stream());
  }
  return grad_x;
}

Tensor depthwise_grad_weight_op(
    Tensor grad_u,
    Tensor x,
    Ints kernel_size,
    Ints stride,
    Ints padding,
    Ints dilation,
    int64_t groups,
    std::string padding_mode,
    int64_t rows,
    bool weight_channels_last,
    bool channels_last
) {
  const OnDevice device(x);
  check_devices(x, {grad_u});
  const Dtype dtype = dtype_of(x);
  check_dense(x, x, channels_last, "x");
  check_dense(grad_u, x, channels_last, "grad_u");
  DCCONV_CHECK(
      groups == x.size(1), "groups must be the ", x.size(1), " channels of x, got ", groups
  );
  DCCONV_CHECK(
      rows > 0 && rows <= kMostPixels, "rows must be at least 1 and below 2^31, got ", rows
  );
  const Geometry geometry{stride, padding, dilation, groups, padding_mode};
  const ConvShape shape =
      geometry.shape(x.size(0), x.size(1), x.size(2), x.size(3), grad_u.size(1), kernel_size);
  check_sizes(grad_u, {shape.n, shape.o, shape.rows.output, shape.columns.output}, "grad_u");
  DCCONV_CHECK(
      is_countable({rows, kernel_size[0], kernel_size[1], shape.o}),
      "rows must leave parts at most 2^50 elements, got ",
      rows
  );
  Tensor grad_weight =
      empty(x, {shape.o, 1, kernel_size[0], kernel_size[1]}, x.scalar_type(), weight_channels_last);
  Tensor parts = empty(x, {rows, kernel_size[0] * kernel_size[1], shape.o}, compute_type(dtype));
  DepthwiseGradWeightParams p{};
  p.n = shape.n;
  p.c = to_int(shape.c);
  p.o = to_int(shape.o);
  p.window = window_of(shape);
  p.channels_last = channels_last;
  p.grad_u = grad_u.const_data_ptr();
  p.x = x.const_data_ptr();
  p.parts = parts.mutable_data_ptr();
  p.rows = rows;
  p.grad_weight = grad_weight.mutable_data_ptr();
  depthwise_grad_weight(dtype, p, device.stream());
  return grad_weight;
}

}  // namespace
}  // namespace dcconv::cuda

#if defined(DCCONV_SIMT)
STABLE_TORCH_LIBRARY_FRAGMENT(dcconv_simt, m) {
  dcconv::define_fused(m);
}

STABLE_TORCH_LIBRARY_IMPL(dcconv_simt, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(dcconv, CUDA, m) {
#endif
  m.impl("filter_norm", TORCH_BOX(&dcconv::cuda::filter_norm_op));
  m.impl("conv2d_one_pass", TORCH_BOX(&dcconv::cuda::conv2d_one_pass));
  m.impl("conv2d_one_pass_grad_input", TORCH_BOX(&dcconv::cuda::conv2d_one_pass_grad_input));
  m.impl("depthwise_grad_weight", TORCH_BOX(&dcconv::cuda::depthwise_grad_weight_op));
}

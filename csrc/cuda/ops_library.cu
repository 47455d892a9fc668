// The passes of library as ops: tensors in, tensors out. Python composes them with the library's
// convolutions (dcconv/passes/library.py), has checked what the user typed and made tensors dense;
// the checks here guard memory. Under DCCONV_SIMT the ops run in the SIMT model, on CPU tensors.

#include <algorithm>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "affine_relu.h"
#include "cuda/support/op_support.h"
#include "schemas.h"

namespace dcconv::cuda {
namespace {

// Bits of `needs`, in the order of the operands (dcconv/native.py).
enum Needs { kX = 1, kWeight = 2, kBias = 4, kRadius = 8, kNormMean = 16, kK = 32 };

void check_sums(int64_t sums) {
  constexpr int64_t all = kSumRho | kSumA | kSumK | kSumBias;
  DCCONV_CHECK(sums >= 0 && sums <= all, "sums must be bits of ", all, ", got ", sums);
}

// Sums of the squares of x per pixel and group, a map; x is dense in the layout.
Tensor pixel_sums(const Tensor& x, const ConvShape& shape, bool channels_last, Stream stream) {
  const Dtype dtype = dtype_of(x);
  Tensor sums = empty(x, {shape.n * shape.input_pixels() * shape.groups}, compute_type(dtype));
  PixelSumsqParams p{};
  p.n = shape.n;
  p.pixels = to_int(shape.input_pixels());
  p.c = to_int(shape.c);
  p.groups = to_int(shape.groups);
  p.channels_last = channels_last;
  p.x = x.const_data_ptr();
  p.sums = sums.mutable_data_ptr();
  pixel_sumsq(dtype, p, stream);
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> conv2d_norms(
    Tensor x,
    Tensor weight,
    Ints stride,
    Ints padding,
    Ints dilation,
    int64_t groups,
    std::string padding_mode,
    double eps,
    bool batch_mean,
    bool channels_last,
    MaybeTensor given
) {
  const OnDevice device(x);
  check_devices(x, {weight, given});
  const Dtype dtype = dtype_of(x);
  const ScalarType compute = compute_type(dtype);
  check_dense(x, x, channels_last, "x");
  check_weight(x, weight, groups);
  check_dense_either(weight, "weight");
  const Geometry geometry{stride, padding, dilation, groups, padding_mode};
  const ConvShape shape = geometry.shape(
      x.size(0), x.size(1), x.size(2), x.size(3), weight.size(0), {weight.size(2), weight.size(3)}
  );
  const int64_t outputs = shape.positions() * groups;
  if (given.has_value())
    check_map(*given, shape.n * shape.input_pixels() * groups, dtype, "sums");
  const Tensor sums =
      given.has_value() ? *given : pixel_sums(x, shape, channels_last, device.stream());

  // The norms of windows have a pass of their own, though it is one launch more than to take the
  // sums where a norm is needed: maps are 1 / channels of a tensor's size, and a sum costs its
  // reader's every row far more than a load.
  Tensor map = empty(x, {outputs}, compute), mean = absent(x, compute), block_sums;
  WindowNormParams w{};
  w.n = shape.n;
  w.groups = to_int(groups);
  w.window = window_of(shape);
  w.channels_last = channels_last;
  w.eps = eps;
  w.sums = sums.const_data_ptr();
  w.b = map.mutable_data_ptr();
  FilterNormParams f{};
  if (batch_mean) {
    mean = empty(x, {}, compute);
    f.blocks = window_norm_blocks(w);
    block_sums = empty(x, {f.blocks}, ScalarType::Double);
    w.block_sums = static_cast<double*>(block_sums.mutable_data_ptr());
    f.block_sums = w.block_sums;
    f.map_count = outputs;
    f.mean = mean.mutable_data_ptr();
  }
  window_norm(dtype, w, device.stream());
  Tensor a = empty(x, {shape.o}, compute);
  f.o = shape.o;
  f.size = shape.filter_size();
  f.weight = weight.const_data_ptr();
  f.a = a.mutable_data_ptr();
  f.eps = eps;
  f.alpha = 1;
  filter_norm(dtype, f, device.stream());
  return {a, map, mean};
}

// y over u when `y` is u; returns what the schema has for a norm map, [0]: `map` is it.
Tensor run_epilogue(
    const Tensor& u,
    Tensor y,
    const Tensor& a,
    const Tensor& map,
    const MaybeTensor& bias_in,
    const MaybeTensor& radius_in,
    const MaybeTensor& mean,
    const MaybeTensor& k_in,
    const Ints& input_size,
    const Ints& kernel_size,
    const Geometry& geometry,
    const Operator& op,
    bool map_is_norm,
    bool channels_last
) {
  const OnDevice device(u);
  check_devices(u, {y, a, map, bias_in, radius_in, mean, k_in});
  const Dtype dtype = dtype_of(u);
  const ScalarType compute = compute_type(dtype);
  check_dense(u, u, channels_last, "u");
  check_dense(y, u, channels_last, "y");
  const int64_t groups = geometry.groups;
  DCCONV_CHECK(input_size.size() == 2, "input_size must be 2 numbers, got ", list_of(input_size));
  // The channels of x do not matter here: one per group stands for them.
  const ConvShape shape =
      geometry.shape(u.size(0), groups, input_size[0], input_size[1], u.size(1), kernel_size);
  check_sizes(u, {shape.n, shape.o, shape.rows.output, shape.columns.output}, "u");
  const int64_t outputs = shape.positions() * groups;
  // conv2d_norms gives nothing else; a program that was exported when it did would take b for sums.
  DCCONV_CHECK(map_is_norm, "map_is_norm must be true, for maps of conv2d_norms, got false");
  check_map(map, outputs, dtype, "map");
  const MaybeTensor bias = dense_parameter(bias_in);
  check_bias(bias, shape.o, u.scalar_type());
  const MaybeTensor radius = dense_parameter(radius_in), k = dense_parameter(k_in);
  EpilogueParams p{};
  p.positions = shape.positions();
  p.pixels = to_int(shape.rows.output * shape.columns.output);
  p.o = to_int(shape.o);
  p.groups = to_int(groups);
  p.channels_last = channels_last;
  p.op = op;
  p.filters = filter_operands(shape.o, a, radius, mean, k, dtype);
  p.bias = data(bias);
  // In place the writable pointer comes first: asking for it may move the data.
  p.y = y.mutable_data_ptr();
  p.u = u.const_data_ptr();
  p.norm = map.const_data_ptr();
  epilogue(dtype, p, device.stream());
  return absent(u, compute);
}

std::tuple<Tensor, Tensor> conv2d_epilogue(
    Tensor u,
    Tensor a,
    Tensor map,
    MaybeTensor bias,
    MaybeTensor radius,
    MaybeTensor mean,
    MaybeTensor k,
    Ints input_size,
    Ints kernel_size,
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
    double /* eps, of the map */,
    bool map_is_norm,
    bool channels_last
) {
  const Ints sizes = sizes_of(u);
  Tensor y = empty(u, sizes, u.scalar_type(), channels_last);
  Tensor norm = run_epilogue(
      u,
      y,
      a,
      map,
      bias,
      radius,
      mean,
      k,
      input_size,
      kernel_size,
      {stride, padding, dilation, groups, padding_mode},
      operator_of(magnitude, angular, weighting, alpha, beta, power, delta),
      map_is_norm,
      channels_last
  );
  return {y, norm};
}

Tensor conv2d_epilogue_(
    Tensor u,
    Tensor a,
    Tensor map,
    MaybeTensor bias,
    MaybeTensor radius,
    MaybeTensor mean,
    MaybeTensor k,
    Ints input_size,
    Ints kernel_size,
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
    double /* eps, of the map */,
    bool map_is_norm,
    bool channels_last
) {
  return run_epilogue(
      u,
      u,
      a,
      map,
      bias,
      radius,
      mean,
      k,
      input_size,
      kernel_size,
      {stride, padding, dilation, groups, padding_mode},
      operator_of(magnitude, angular, weighting, alpha, beta, power, delta),
      map_is_norm,
      channels_last
  );
}

std::tuple<Tensor, Tensor, Tensor> conv2d_grad_dot(
    Tensor grad_y,
    Tensor kept,
    Tensor norm_map,
    Tensor a,
    MaybeTensor radius_in,
    MaybeTensor mean,
    MaybeTensor k_in,
    int64_t groups,
    std::string magnitude,
    std::string angular,
    std::string weighting,
    double alpha,
    double beta,
    double power,
    double delta,
    std::string kept_is,
    bool wants_t,
    int64_t sums,
    int64_t rows,
    bool channels_last
) {
  const OnDevice device(grad_y);
  check_devices(grad_y, {kept, norm_map, a, radius_in, mean, k_in});
  const Dtype dtype = dtype_of(grad_y);
  const ScalarType compute = compute_type(dtype);
  check_dense(grad_y, grad_y, channels_last, "grad_y");
  check_dense(kept, grad_y, channels_last, "kept");
  const int64_t n = grad_y.size(0), o = grad_y.size(1);
  const int64_t pixels = grad_y.size(2) * grad_y.size(3);
  check_sizes(kept, sizes_of(grad_y), "kept");
  DCCONV_CHECK(
      groups > 0 && o > 0 && o % groups == 0,
      "groups must divide the ",
      o,
      " channels of grad_y, got ",
      groups
  );
  DCCONV_CHECK(
      pixels > 0, "grad_y must have rows and columns, got shape ", list_of(grad_y.sizes())
  );
  check_sums(sums);
  DCCONV_CHECK(
      rows > 0 && rows <= kMostPixels && is_countable({4, rows, o}),
      "rows must be at least 1 and below 2^31, and parts at most 2^50 elements, got ",
      rows
  );
  check_map(norm_map, n * pixels * groups, dtype, "norm_map");
  const MaybeTensor radius = dense_parameter(radius_in), k = dense_parameter(k_in);
  const Ints sizes = sizes_of(grad_y);
  Tensor grad_u = empty(grad_y, sizes, grad_y.scalar_type(), channels_last);
  Tensor t = empty(grad_y, {wants_t ? norm_map.numel() : 0}, compute);
  const int64_t kinds = sum_kinds(static_cast<int>(sums));
  Tensor parts = empty(grad_y, kinds == 0 ? Ints{0} : Ints{kinds, rows, o}, compute);
  GradDotParams p{};
  p.positions = n * pixels;
  p.pixels = pixels;
  to_int(pixels);
  p.o = to_int(o);
  p.groups = to_int(groups);
  p.channels_last = channels_last;
  p.op = operator_of(magnitude, angular, weighting, alpha, beta, power, delta);
  DCCONV_CHECK(
      kept_is == "output" || kept_is == "dot",
      "kept_is must be one of output, dot, got '",
      kept_is,
      "'"
  );
  p.kept_is = kept_is == "output" ? Kept::output : Kept::dot;
  p.filters = filter_operands(o, a, radius, mean, k, dtype);
  p.grad_y = grad_y.const_data_ptr();
  p.kept = kept.const_data_ptr();
  p.norm = norm_map.const_data_ptr();
  p.grad_u = grad_u.mutable_data_ptr();
  p.t = wants_t ? t.mutable_data_ptr() : nullptr;
  p.sums = static_cast<int>(sums);
  p.parts = kinds == 0 ? nullptr : parts.mutable_data_ptr();
  p.rows = rows;
  grad_dot(dtype, p, device.stream());
  return {grad_u, t, parts};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv2d_grad_filters(
    Tensor parts,
    MaybeTensor library_grad,
    Tensor weight,
    Tensor a,
    MaybeTensor radius_in,
    MaybeTensor mean,
    MaybeTensor k_in,
    int64_t map_count,
    int64_t sums,
    bool barrier,
    int64_t needs
) {
  const OnDevice device(weight);
  check_devices(weight, {parts, library_grad, a, radius_in, mean, k_in});
  const Dtype dtype = dtype_of(weight);
  const ScalarType compute = compute_type(dtype);
  check_dimensions(weight, 4, "weight");
  check_sums(sums);
  DCCONV_CHECK(map_count >= 0, "map_count must be at least 0, got ", map_count);
  const int64_t o = weight.size(0), kinds = sum_kinds(static_cast<int>(sums));
  const MaybeTensor radius = dense_parameter(radius_in), k = dense_parameter(k_in);
  FilterGradParams p{};
  p.o = o;
  p.size = weight.numel() / std::max<int64_t>(o, 1);
  p.alpha = 1;
  p.project = true;
  p.sums = static_cast<int>(sums);
  p.filters = filter_operands(o, a, radius, mean, k, dtype);
  p.a = p.filters.a;
  p.map_count = map_count;
  Tensor totals;
  if (kinds > 0) {
    check_dtype(parts, compute, "parts");
    DCCONV_CHECK(
        parts.dim() == 3 && parts.size(0) == kinds && parts.size(2) == o && parts.is_contiguous(),
        "parts must be contiguous and have shape [",
        kinds,
        ", rows, ",
        o,
        "], got ",
        list_of(parts.sizes())
    );
    totals = empty(weight, {kinds, o}, ScalarType::Double);
    ColumnSumsParams c{};
    c.parts = parts.const_data_ptr();
    c.totals = static_cast<double*>(totals.mutable_data_ptr());
    c.kinds = kinds;
    c.rows = parts.size(1);
    c.o = o;
    column_sums(dtype, c, device.stream());
    p.totals = c.totals;
  }
  const auto wanted = [&](int64_t bit, int64_t sum) {
    return (needs & bit) != 0 && (sums & sum) != 0;
  };
  Tensor grad_weight = absent(weight, weight.scalar_type());
  if (library_grad.has_value() && (needs & kWeight) != 0) {
    const bool last = is_channels_last(weight);
    check_dense(weight, weight, last, "weight");
    check_dense(*library_grad, weight, last, "library_grad");
    check_sizes(*library_grad, sizes_of(weight), "library_grad");
    grad_weight = empty(weight, sizes_of(weight), weight.scalar_type(), last);
    p.weight = weight.const_data_ptr();
    p.library_grad = library_grad->const_data_ptr();
    p.grad_weight = grad_weight.mutable_data_ptr();
  }
  Tensor grad_bias = absent(weight, weight.scalar_type()), grad_radius = absent(weight, compute),
         grad_mean = absent(weight, compute), grad_k = absent(weight, compute),
         sigma = absent(weight, compute);
  if (wanted(kBias, kSumBias)) {
    grad_bias = empty(weight, {o}, weight.scalar_type());
    p.grad_bias = grad_bias.mutable_data_ptr();
  }
  if (wanted(kRadius, kSumRho) && radius.has_value()) {
    grad_radius = empty(weight, sizes_of(*radius), compute);
    p.grad_radius = grad_radius.mutable_data_ptr();
  }
  if (wanted(kNormMean, kSumRho) && mean.has_value()) {
    grad_mean = empty(weight, {}, compute);
    p.grad_mean = grad_mean.mutable_data_ptr();
  }
  if (wanted(kK, kSumK) && k.has_value()) {
    grad_k = empty(weight, sizes_of(*k), compute);
    p.grad_k = grad_k.mutable_data_ptr();
  }
  if (barrier) {
    DCCONV_CHECK(
        (sums & kSumRho) != 0, "sums must have the bit of rho behind a barrier, got ", sums
    );
    sigma = empty(weight, {}, compute);
    p.sigma = sigma.mutable_data_ptr();
  }
  filter_grad(dtype, p, device.stream());
  return {grad_weight, grad_bias, grad_radius, grad_mean, grad_k, sigma};
}

void run_grad_input(
    const MaybeTensor& library_grad,
    const Tensor& x,
    const Tensor& t,
    const Tensor& norm_map,
    const MaybeTensor& sigma,
    const Ints& kernel_size,
    const Geometry& geometry,
    Tap tap,
    bool padded,
    bool channels_last,
    Tensor grad_x
) {
  const OnDevice device(x);
  check_devices(x, {library_grad, t, norm_map, sigma, grad_x});
  const Dtype dtype = dtype_of(x);
  const int64_t groups = geometry.groups;
  check_dense(x, x, channels_last, "x");
  const ConvShape shape =
      geometry.shape(x.size(0), x.size(1), x.size(2), x.size(3), groups, kernel_size);
  check_dense(grad_x, x, channels_last, "grad_x");
  check_sizes(grad_x, sizes_of(x), "grad_x");
  check_map(t, shape.positions() * groups, dtype, "t");
  if (tap != Tap::plain)
    check_map(norm_map, shape.positions() * groups, dtype, "norm_map");
  parameter_stride(sigma, 1, dtype, "sigma");
  if (library_grad.has_value()) {
    check_dense(*library_grad, x, channels_last, "library_grad");
    const int64_t rows = padded ? shape.rows.padded() : shape.rows.input;
    const int64_t columns = padded ? shape.columns.padded() : shape.columns.input;
    check_sizes(*library_grad, {shape.n, shape.c, rows, columns}, "library_grad");
  }
  GradInputParams p{};
  p.n = shape.n;
  p.c = to_int(shape.c);
  p.groups = to_int(groups);
  p.window = window_of(shape);
  p.channels_last = channels_last;
  p.padded = padded;
  p.grad_x = grad_x.mutable_data_ptr();
  p.library_grad = data(library_grad);
  p.x = x.const_data_ptr();
  p.tap = tap;
  p.t = t.const_data_ptr();
  p.norm = norm_map.const_data_ptr();
  p.sigma = data(sigma);
  grad_input(dtype, p, device.stream());
}

Tap tap_of(const MaybeTensor& sigma) {
  return sigma.has_value() ? Tap::with_mean : Tap::plain;
}

Tensor conv2d_grad_input(
    Tensor library_grad,
    Tensor x,
    Tensor t,
    Tensor norm_map,
    MaybeTensor sigma,
    Ints kernel_size,
    Ints stride,
    Ints padding,
    Ints dilation,
    int64_t groups,
    std::string padding_mode,
    bool padded,
    bool channels_last
) {
  const Ints sizes = sizes_of(x);
  Tensor grad_x = empty(x, sizes, x.scalar_type(), channels_last);
  run_grad_input(
      library_grad,
      x,
      t,
      norm_map,
      sigma,
      kernel_size,
      {stride, padding, dilation, groups, padding_mode},
      tap_of(sigma),
      padded,
      channels_last,
      grad_x
  );
  return grad_x;
}

void conv2d_grad_input_(
    Tensor library_grad,
    Tensor x,
    Tensor t,
    Tensor norm_map,
    MaybeTensor sigma,
    Ints kernel_size,
    Ints stride,
    Ints padding,
    Ints dilation,
    int64_t groups,
    std::string padding_mode,
    bool channels_last
) {
  run_grad_input(
      library_grad,
      x,
      t,
      norm_map,
      sigma,
      kernel_size,
      {stride, padding, dilation, groups, padding_mode},
      tap_of(sigma),
      false,
      channels_last,
      library_grad
  );
}

std::tuple<Tensor, Tensor> filter_scale(Tensor weight, double alpha, double eps, bool divide) {
  const OnDevice device(weight);
  const Dtype dtype = dtype_of(weight);
  check_dimensions(weight, 4, "weight");
  const bool last = is_channels_last(weight);
  check_dense(weight, weight, last, "weight");
  const Ints sizes = sizes_of(weight);
  Tensor scaled = empty(weight, sizes, weight.scalar_type(), last);
  Tensor a = empty(weight, {weight.size(0)}, compute_type(dtype));
  FilterNormParams p{};
  p.o = weight.size(0);
  p.size = weight.numel() / std::max<int64_t>(p.o, 1);
  p.weight = weight.const_data_ptr();
  p.a = a.mutable_data_ptr();
  p.scaled = scaled.mutable_data_ptr();
  p.eps = eps;
  p.alpha = alpha;
  p.divide = divide;
  filter_norm(dtype, p, device.stream());
  return {scaled, a};
}

Tensor filter_scale_grad(Tensor library_grad, Tensor weight, Tensor a, double alpha, bool divide) {
  const OnDevice device(weight);
  check_devices(weight, {library_grad, a});
  const Dtype dtype = dtype_of(weight);
  check_dimensions(weight, 4, "weight");
  const bool last = is_channels_last(weight);
  check_dense(weight, weight, last, "weight");
  check_dense(library_grad, weight, last, "library_grad");
  check_sizes(library_grad, sizes_of(weight), "library_grad");
  check_map(a, weight.size(0), dtype, "a");
  const Ints sizes = sizes_of(weight);
  Tensor grad_weight = empty(weight, sizes, weight.scalar_type(), last);
  FilterGradParams p{};
  p.o = weight.size(0);
  p.size = weight.numel() / std::max<int64_t>(p.o, 1);
  p.weight = weight.const_data_ptr();
  p.library_grad = library_grad.const_data_ptr();
  p.a = a.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  p.alpha = alpha;
  p.divide = p.project = divide;
  filter_grad(dtype, p, device.stream());
  return grad_weight;
}

std::tuple<Tensor, Tensor>
affine_relu_op(Tensor x, Tensor scale_in, Tensor shift_in, int64_t groups, bool channels_last) {
  const OnDevice device(x);
  check_devices(x, {scale_in, shift_in});
  check_affine_relu(x, scale_in, shift_in, groups, channels_last);
  const Tensor scale = contiguous(scale_in, false), shift = contiguous(shift_in, false);
  const int64_t pixels = x.size(2) * x.size(3);
  Tensor y = empty(x, sizes_of(x), x.scalar_type(), channels_last);
  Tensor sums = empty(x, {x.size(0) * pixels * groups}, compute_type(dtype_of(x)));
  AffineReluParams p{};
  p.n = x.size(0);
  p.pixels = to_int(pixels);
  p.c = to_int(x.size(1));
  p.groups = to_int(groups);
  p.channels_last = channels_last;
  p.x = x.const_data_ptr();
  p.scale = scale.const_data_ptr();
  p.shift = shift.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.sums = sums.mutable_data_ptr();
  affine_relu(dtype_of(x), p, device.stream());
  return {y, sums};
}

Tensor window_norm_op(
    Tensor x,
    Ints kernel_size,
    Ints stride,
    Ints padding,
    Ints dilation,
    int64_t groups,
    std::string padding_mode,
    double eps
) {
  const OnDevice device(x);
  const Dtype dtype = dtype_of(x);
  const ScalarType compute = compute_type(dtype);
  check_dimensions(x, 4, "x");
  const bool channels_last = x.size(0) > 0 && is_channels_last(x);
  check_dense(x, x, channels_last, "x");
  const Geometry geometry{stride, padding, dilation, groups, padding_mode};
  const ConvShape shape =
      geometry.shape(x.size(0), x.size(1), x.size(2), x.size(3), groups, kernel_size);
  const Tensor sums = pixel_sums(x, shape, channels_last, device.stream());
  Tensor b =
      empty(x, {shape.n, groups, shape.rows.output, shape.columns.output}, compute, channels_last);
  WindowNormParams w{};
  w.n = shape.n;
  w.groups = to_int(groups);
  w.window = window_of(shape);
  w.channels_last = channels_last;
  w.eps = eps;
  w.sums = sums.const_data_ptr();
  w.b = b.mutable_data_ptr();
  window_norm(dtype, w, device.stream());
  return b;
}

Tensor window_norm_grad(
    Tensor grad_b,
    Tensor x,
    Tensor b,
    Ints kernel_size,
    Ints stride,
    Ints padding,
    Ints dilation,
    int64_t groups,
    std::string padding_mode
) {
  check_dimensions(x, 4, "x");
  const bool channels_last = x.size(0) > 0 && is_channels_last(x);
  check_dtype(b, compute_type(dtype_of(x)), "b");
  check_dense(b, b, channels_last, "b");
  check_dense(grad_b, b, channels_last, "grad_b");
  check_sizes(grad_b, sizes_of(b), "grad_b");
  const Ints sizes = sizes_of(x);
  Tensor grad_x = empty(x, sizes, x.scalar_type(), channels_last);
  const auto flat = [](const Tensor& t) {
    return dispatch_tensor(
        "aten::as_strided", "", t, Ints{t.numel()}, Ints{1}, std::optional<int64_t>()
    );
  };
  run_grad_input(
      std::nullopt,
      x,
      flat(grad_b),
      flat(b),
      std::nullopt,
      kernel_size,
      {stride, padding, dilation, groups, padding_mode},
      Tap::over_norm,
      false,
      channels_last,
      grad_x
  );
  return grad_x;
}

}  // namespace
}  // namespace dcconv::cuda

#if defined(DCCONV_SIMT)
// Ops of their own, which tests put in the place of the real ones.
STABLE_TORCH_LIBRARY(dcconv_simt, m) {
  dcconv::define_passes(m);
}

STABLE_TORCH_LIBRARY_IMPL(dcconv_simt, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(dcconv, CUDA, m) {
#endif
  m.impl("conv2d_norms", TORCH_BOX(&dcconv::cuda::conv2d_norms));
  m.impl("conv2d_epilogue", TORCH_BOX(&dcconv::cuda::conv2d_epilogue));
  m.impl("conv2d_epilogue_", TORCH_BOX(&dcconv::cuda::conv2d_epilogue_));
  m.impl("conv2d_grad_dot", TORCH_BOX(&dcconv::cuda::conv2d_grad_dot));
  m.impl("conv2d_grad_filters", TORCH_BOX(&dcconv::cuda::conv2d_grad_filters));
  m.impl("conv2d_grad_input", TORCH_BOX(&dcconv::cuda::conv2d_grad_input));
  m.impl("conv2d_grad_input_", TORCH_BOX(&dcconv::cuda::conv2d_grad_input_));
  m.impl("filter_scale", TORCH_BOX(&dcconv::cuda::filter_scale));
  m.impl("filter_scale_grad", TORCH_BOX(&dcconv::cuda::filter_scale_grad));
  m.impl("affine_relu", TORCH_BOX(&dcconv::cuda::affine_relu_op));
  m.impl("window_norm", TORCH_BOX(&dcconv::cuda::window_norm_op));
  m.impl("window_norm_grad", TORCH_BOX(&dcconv::cuda::window_norm_grad));
}

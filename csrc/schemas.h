// Schemas of the passes of library and fused, for every library that implements them.
#pragma once

#include <string>

namespace dcconv {

// The passes between the library convolutions, composed in dcconv/passes/library.py. Tensors are
// dense in the layout channels_last says; maps are 1-d, [n, pixels, groups] or, in contiguous
// layout, [n, groups, pixels]. mean is the factor of the radius, absent for 1.
template <class Library>
void define_passes(Library& library) {
  const std::string geometry =
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str padding_mode";
  const std::string op =
      "str magnitude, str angular, str weighting, float alpha, float beta, float power, "
      "float delta";
  const std::string epilogue =
      "Tensor a, Tensor map, Tensor? bias, Tensor? radius, Tensor? mean, Tensor? k, "
      "SymInt[] input_size, SymInt[] kernel_size, " +
      geometry + ", " + op + ", float eps, bool map_is_norm, bool channels_last";
  const std::string grad_input =
      "Tensor x, Tensor t, Tensor norm_map, Tensor? sigma, SymInt[] kernel_size, " + geometry;
  const auto define = [&](const std::string& schema) { library.def(schema.c_str()); };

  // map: b. mean: the mean of b with batch_mean, else [0]. sums: a map, the sums of the squares of
  // x per pixel and group; absent where the op finds them itself.
  define(
      "conv2d_norms(Tensor x, Tensor weight, " + geometry +
      ", float eps, bool batch_mean, bool channels_last, Tensor? sums=None) "
      "-> (Tensor a, Tensor map, Tensor mean)"
  );
  // input_size: rows and columns of x. map_is_norm: true on CUDA. norm_map: [0] then, for map is b.
  define("conv2d_epilogue(Tensor u, " + epilogue + ") -> (Tensor y, Tensor norm_map)");
  // y is written over u.
  define("conv2d_epilogue_(Tensor(a!) u, " + epilogue + ") -> Tensor norm_map");
  // sums: bits 1 rho, 2 a, 4 k, 8 bias. parts: [kinds in sums, rows, o], a partial sum per row.
  define(
      "conv2d_grad_dot(Tensor grad_y, Tensor kept, Tensor norm_map, Tensor a, Tensor? radius, "
      "Tensor? mean, Tensor? k, SymInt groups, " +
      op +
      ", str kept_is, bool wants_t, int sums, SymInt rows, bool channels_last) "
      "-> (Tensor grad_u, Tensor t, Tensor parts)"
  );
  // needs: as in conv2d_backward. sigma: what the mean norm adds to t b, [0] without barrier.
  define(
      "conv2d_grad_filters(Tensor parts, Tensor? library_grad, Tensor weight, Tensor a, "
      "Tensor? radius, Tensor? mean, Tensor? k, SymInt map_count, int sums, bool barrier, "
      "int needs) -> (Tensor grad_weight, Tensor grad_bias, Tensor grad_radius, "
      "Tensor grad_mean, Tensor grad_k, Tensor sigma)"
  );
  // library_grad is of the padded input where padded.
  define(
      "conv2d_grad_input(Tensor library_grad, " + grad_input +
      ", bool padded, bool channels_last) -> Tensor grad_x"
  );
  // grad_x is written over library_grad, which is of x's size.
  define(
      "conv2d_grad_input_(Tensor(a!) library_grad, " + grad_input + ", bool channels_last) -> ()"
  );
  // Norm-free operators: scaled = alpha weight, over a with divide.
  define(
      "filter_scale(Tensor weight, float alpha, float eps, bool divide) "
      "-> (Tensor scaled, Tensor a)"
  );
  define(
      "filter_scale_grad(Tensor library_grad, Tensor weight, Tensor a, float alpha, bool divide) "
      "-> Tensor grad_weight"
  );
  // y = max(0, x scale[c] + shift[c]), in storage dtype; scale, shift: [c]. sums: of the squares of
  // y per pixel and group, a map. On the CPU as well.
  define(
      "affine_relu(Tensor x, Tensor scale, Tensor shift, SymInt groups, bool channels_last) "
      "-> (Tensor y, Tensor sums)"
  );
  define("window_norm(Tensor x, SymInt[] kernel_size, " + geometry + ", float eps) -> Tensor b");
  define(
      "window_norm_grad(Tensor grad_b, Tensor x, Tensor b, SymInt[] kernel_size, " + geometry +
      ") -> Tensor grad_x"
  );
}

// The kernels of fused, composed in dcconv/passes/fused.py: the whole forward, or the whole
// gradient of the input, in one pass. kernel: "implicit_gemm", "depthwise" or "stem" (forward
// only). tile: which of the kernel's tile configurations, -1 for its own rule.
template <class Library>
void define_fused(Library& library) {
  const std::string geometry =
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str padding_mode";
  const std::string op =
      "str magnitude, str angular, str weighting, float alpha, float beta, float power, "
      "float delta";
  const auto define = [&](const std::string& schema) { library.def(schema.c_str()); };

  define("filter_norm(Tensor weight, float eps) -> Tensor a");
  // map: absent where the kernel sums the squares itself (1x1, depthwise, stem), else the norms b
  // with map_is_norm or the sums of squares per input pixel. norm_map: b, [0] when map already is b
  // or without keep_norm. dot: u, [0] without keep_dot.
  define(
      "conv2d_one_pass(Tensor x, Tensor weight, Tensor a, Tensor? map, Tensor? bias, "
      "Tensor? radius, Tensor? mean, Tensor? k, " +
      geometry + ", " + op +
      ", float eps, bool map_is_norm, bool keep_norm, bool keep_dot, str kernel, int tile, "
      "bool channels_last) -> (Tensor y, Tensor norm_map, Tensor dot)"
  );
  // grad_x = transposed convolution of grad_u + x times the transposed window sums of
  // t + sigma / b; implicit_gemm at stride 1 only.
  define(
      "conv2d_one_pass_grad_input(Tensor grad_u, Tensor weight, Tensor x, Tensor t, "
      "Tensor norm_map, Tensor? sigma, " +
      geometry + ", str kernel, int tile, bool channels_last) -> Tensor grad_x"
  );
  // The library's gradient of the weight, [o, c / groups, r, s], by a kernel of our own: parts in
  // `rows` partial sums, added in a fixed order.
  define(
      "depthwise_grad_weight(Tensor grad_u, Tensor x, SymInt[] kernel_size, " + geometry +
      ", SymInt rows, bool weight_channels_last, bool channels_last) -> Tensor grad_weight"
  );
}

}  // namespace dcconv

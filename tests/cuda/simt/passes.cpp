// The CUDA passes on numpy arrays, in the SIMT model. Every function takes the dtype's name and the
// members of its parameter struct by name; arrays stand for pointers, None for null. Without
// SIMT_EVERY_KERNEL there are the passes of the strategy library alone.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "cuda/kernels.h"
#include "functions.h"
#include "simt.h"

namespace py = pybind11;

namespace dcconv::cuda {
namespace {

Dtype dtype_of(const std::string& name) {
  if (name == "float64")
    return Dtype::f64;
  if (name == "float32")
    return Dtype::f32;
  if (name == "bfloat16")
    return Dtype::bf16;
  if (name == "float16")
    return Dtype::f16;
  throw py::value_error("simt: dtype must be a floating dtype, got " + name);
}

// Reads members of a struct from keyword arguments, and insists that every argument is read.
class Members {
public:
  explicit Members(py::dict values) : values_(std::move(values)) {}
  ~Members() noexcept(false) {
    if (!std::uncaught_exceptions() && read_ != values_.size())
      throw py::value_error("simt: some arguments belong to no member");
  }

  template <class T>
  void operator()(const char* name, T& member) {
    member = value(name).cast<T>();
  }

  void operator()(const char* name, const void*& member) { member = pointer(name); }
  void operator()(const char* name, void*& member) { member = pointer(name); }
  void operator()(const char* name, double*& member) {
    member = static_cast<double*>(pointer(name));
  }
  void operator()(const char* name, const double*& member) {
    member = static_cast<double*>(pointer(name));
  }

  void operator()(const char* name, Operator& op) {
    Members of(value(name));
    of("magnitude", op.magnitude);
    of("angular", op.angular);
    of("times_a", op.times_a);
    of("alpha", op.alpha);
    of("beta", op.beta);
    of("power", op.power);
    of("delta", op.delta);
  }

  void operator()(const char* name, FilterOperands& filters) {
    Members of(value(name));
    of("a", filters.a);
    of("radius", filters.radius);
    of("radius_stride", filters.radius_stride);
    of("mean", filters.mean);
    of("k", filters.k);
    of("k_stride", filters.k_stride);
  }

  void operator()(const char* name, WindowAxis& axis) {
    Members of(value(name));
    of("input", axis.input);
    of("output", axis.output);
    of("kernel", axis.kernel);
    of("stride", axis.stride);
    of("dilation", axis.dilation);
    of("before", axis.before);
    of("after", axis.after);
    int mode = 0;
    of("mode", mode);
    axis.mode = static_cast<PaddingMode>(mode);
  }

  void operator()(const char* name, Window& window) {
    Members of(value(name));
    of("rows", window.rows);
    of("columns", window.columns);
  }

private:
  py::object value(const char* name) {
    if (!values_.contains(name))
      throw py::key_error(name);
    ++read_;
    return values_[name];
  }

  void* pointer(const char* name) {
    const py::object object = value(name);
    if (object.is_none())
      return nullptr;
    return const_cast<void*>(object.cast<py::array>().data());
  }

  py::dict values_;
  std::size_t read_ = 0;
};

void run_pixel_sumsq(const std::string& dtype, const py::kwargs& values) {
  PixelSumsqParams p{};
  {
    Members of(values);
    of("n", p.n);
    of("pixels", p.pixels);
    of("c", p.c);
    of("groups", p.groups);
    of("channels_last", p.channels_last);
    of("x", p.x);
    of("sums", p.sums);
  }
  pixel_sumsq(dtype_of(dtype), p, nullptr);
}

void run_affine_relu(const std::string& dtype, const py::kwargs& values) {
  AffineReluParams p{};
  {
    Members of(values);
    of("n", p.n);
    of("pixels", p.pixels);
    of("c", p.c);
    of("groups", p.groups);
    of("channels_last", p.channels_last);
    of("x", p.x);
    of("scale", p.scale);
    of("shift", p.shift);
    of("y", p.y);
    of("sums", p.sums);
  }
  affine_relu(dtype_of(dtype), p, nullptr);
}

WindowNormParams window_norm_params(const py::kwargs& values) {
  WindowNormParams p{};
  Members of(values);
  of("n", p.n);
  of("groups", p.groups);
  of("window", p.window);
  of("channels_last", p.channels_last);
  of("eps", p.eps);
  of("sums", p.sums);
  of("b", p.b);
  of("block_sums", p.block_sums);
  return p;
}

void run_filter_norm(const std::string& dtype, const py::kwargs& values) {
  FilterNormParams p{};
  {
    Members of(values);
    of("o", p.o);
    of("size", p.size);
    of("weight", p.weight);
    of("a", p.a);
    of("scaled", p.scaled);
    of("eps", p.eps);
    of("alpha", p.alpha);
    of("divide", p.divide);
    of("block_sums", p.block_sums);
    of("blocks", p.blocks);
    of("map_count", p.map_count);
    of("mean", p.mean);
  }
  filter_norm(dtype_of(dtype), p, nullptr);
}

void run_epilogue(const std::string& dtype, const py::kwargs& values) {
  EpilogueParams p{};
  {
    Members of(values);
    of("positions", p.positions);
    of("pixels", p.pixels);
    of("o", p.o);
    of("groups", p.groups);
    of("channels_last", p.channels_last);
    of("op", p.op);
    of("filters", p.filters);
    of("bias", p.bias);
    of("u", p.u);
    of("y", p.y);
    of("norm", p.norm);
  }
  epilogue(dtype_of(dtype), p, nullptr);
}

void run_grad_dot(const std::string& dtype, const py::kwargs& values) {
  GradDotParams p{};
  {
    Members of(values);
    of("positions", p.positions);
    of("pixels", p.pixels);
    of("o", p.o);
    of("groups", p.groups);
    of("channels_last", p.channels_last);
    of("op", p.op);
    int kept_is = 0;
    of("kept_is", kept_is);
    p.kept_is = static_cast<Kept>(kept_is);
    of("filters", p.filters);
    of("grad_y", p.grad_y);
    of("kept", p.kept);
    of("norm", p.norm);
    of("grad_u", p.grad_u);
    of("t", p.t);
    of("sums", p.sums);
    of("parts", p.parts);
    of("rows", p.rows);
  }
  grad_dot(dtype_of(dtype), p, nullptr);
}

void run_column_sums(const std::string& dtype, const py::kwargs& values) {
  ColumnSumsParams p{};
  {
    Members of(values);
    of("parts", p.parts);
    of("totals", p.totals);
    of("kinds", p.kinds);
    of("rows", p.rows);
    of("o", p.o);
  }
  column_sums(dtype_of(dtype), p, nullptr);
}

void run_filter_grad(const std::string& dtype, const py::kwargs& values) {
  FilterGradParams p{};
  {
    Members of(values);
    of("o", p.o);
    of("size", p.size);
    of("weight", p.weight);
    of("library_grad", p.library_grad);
    of("a", p.a);
    of("grad_weight", p.grad_weight);
    of("alpha", p.alpha);
    of("divide", p.divide);
    of("project", p.project);
    of("totals", p.totals);
    of("sums", p.sums);
    of("filters", p.filters);
    of("map_count", p.map_count);
    of("grad_bias", p.grad_bias);
    of("grad_radius", p.grad_radius);
    of("grad_mean", p.grad_mean);
    of("grad_k", p.grad_k);
    of("sigma", p.sigma);
  }
  filter_grad(dtype_of(dtype), p, nullptr);
}

void run_grad_input(const std::string& dtype, const py::kwargs& values) {
  GradInputParams p{};
  {
    Members of(values);
    of("n", p.n);
    of("c", p.c);
    of("groups", p.groups);
    of("window", p.window);
    of("channels_last", p.channels_last);
    of("padded", p.padded);
    of("library_grad", p.library_grad);
    of("x", p.x);
    int tap = 0;
    of("tap", tap);
    p.tap = static_cast<Tap>(tap);
    of("t", p.t);
    of("norm", p.norm);
    of("sigma", p.sigma);
    of("grad_x", p.grad_x);
  }
  grad_input(dtype_of(dtype), p, nullptr);
}

#if defined(SIMT_EVERY_KERNEL)

// implicit_gemm, depthwise and stem.
template <void (*kernel)(Dtype, const FusedParams&, Stream)>
void run_fused(const std::string& dtype, const py::kwargs& values) {
  FusedParams p{};
  {
    Members of(values);
    of("n", p.n);
    of("c", p.c);
    of("o", p.o);
    of("groups", p.groups);
    of("window", p.window);
    of("channels_last", p.channels_last);
    of("op", p.op);
    of("eps", p.eps);
    of("filters", p.filters);
    of("bias", p.bias);
    of("x", p.x);
    of("weight", p.weight);
    of("map", p.map);
    of("map_is_norm", p.map_is_norm);
    of("y", p.y);
    of("dot", p.dot);
    of("norm", p.norm);
    of("tile", p.tile);
  }
  kernel(dtype_of(dtype), p, nullptr);
}

template <void (*kernel)(Dtype, const FusedGradInputParams&, Stream)>
void run_fused_grad_input(const std::string& dtype, const py::kwargs& values) {
  FusedGradInputParams p{};
  {
    Members of(values);
    of("n", p.n);
    of("c", p.c);
    of("o", p.o);
    of("groups", p.groups);
    of("window", p.window);
    of("channels_last", p.channels_last);
    of("grad_u", p.grad_u);
    of("weight", p.weight);
    of("x", p.x);
    int tap = 0;
    of("tap", tap);
    p.tap = static_cast<Tap>(tap);
    of("t", p.t);
    of("norm", p.norm);
    of("sigma", p.sigma);
    of("grad_x", p.grad_x);
    of("tile", p.tile);
  }
  kernel(dtype_of(dtype), p, nullptr);
}

void run_depthwise_grad_weight(const std::string& dtype, const py::kwargs& values) {
  DepthwiseGradWeightParams p{};
  {
    Members of(values);
    of("n", p.n);
    of("c", p.c);
    of("o", p.o);
    of("window", p.window);
    of("channels_last", p.channels_last);
    of("grad_u", p.grad_u);
    of("x", p.x);
    of("parts", p.parts);
    of("rows", p.rows);
    of("grad_weight", p.grad_weight);
  }
  depthwise_grad_weight(dtype_of(dtype), p, nullptr);
}

#endif

}  // namespace
}  // namespace dcconv::cuda

template <class... F>
std::vector<std::string> names_of(dcconv::portable::TypeList<F...>) {
  return {F::name...};
}

PYBIND11_MODULE(dcconv_passes, m) {
  using namespace dcconv::cuda;
  // An operator's magnitude is an index into the two lists, one after the other.
  m.attr("magnitudes") = names_of(dcconv::portable::Magnitudes{});
  m.attr("weighted_magnitudes") = names_of(dcconv::portable::WeightedMagnitudes{});
  m.attr("angulars") = names_of(dcconv::portable::Angulars{});
  m.def("set_seed", &simt::set_seed);
  m.def("set_concurrent_blocks", &simt::set_concurrent_blocks);
  m.def("set_multiprocessors", &simt::set_multiprocessors);
  // 1: approximate instructions are as far off as they may be; 0: rounded correctly.
  m.def("set_approximate_errors", [](double factor) { simt::approximate_errors = factor; });
  // The address of a simt::Observer, 0 for none.
  m.def("set_observer", [](std::uintptr_t observer) {
    simt::set_observer(reinterpret_cast<simt::Observer>(observer));
  });
  m.def("pixel_sumsq", &run_pixel_sumsq);
  m.def("affine_relu", &run_affine_relu);
  m.def("window_norm_blocks", [](const py::kwargs& values) {
    return window_norm_blocks(window_norm_params(values));
  });
  m.def("window_norm", [](const std::string& dtype, const py::kwargs& values) {
    window_norm(dtype_of(dtype), window_norm_params(values), nullptr);
  });
  m.def("filter_norm", &run_filter_norm);
  m.def("epilogue", &run_epilogue);
  m.def("grad_dot", &run_grad_dot);
  m.def("column_sums", &run_column_sums);
  m.def("filter_grad", &run_filter_grad);
  m.def("grad_input", &run_grad_input);
#if defined(SIMT_EVERY_KERNEL)
  m.def("implicit_gemm", &run_fused<implicit_gemm>);
  m.def("implicit_gemm_grad_input", &run_fused_grad_input<implicit_gemm_grad_input>);
  m.def("depthwise", &run_fused<depthwise>);
  m.def("depthwise_grad_input", &run_fused_grad_input<depthwise_grad_input>);
  m.def("depthwise_grad_weight", &run_depthwise_grad_weight);
  m.def("stem", &run_fused<stem>);
#endif
}

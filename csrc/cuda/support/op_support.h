// What every file of ops needs: the tensors' device and stream, guards, and plain structs made of
// tensors. Under DCCONV_SIMT the ops run in the SIMT model, on CPU tensors.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if !defined(DCCONV_SIMT)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include "arguments.h"
#include "cuda/kernels.h"
#include "tensor.h"

namespace dcconv::cuda {

using MaybeTensor = std::optional<Tensor>;

// The tensor's device and its current stream, for the time of an op.
class OnDevice {
public:
#if defined(DCCONV_SIMT)
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_) != TORCH_SUCCESS)
      library_failed("the question for the current stream");
  }
#endif
  Stream stream() const { return stream_; }

private:
#if !defined(DCCONV_SIMT)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_ = nullptr;
};

// Kernels follow pointers: one of another device would fault.
inline void check_devices(const Tensor& first, std::initializer_list<MaybeTensor> others) {
  for (const MaybeTensor& t : others)
    DCCONV_CHECK(
        !t.has_value() ||
            (t->is_cuda() == first.is_cuda() && t->get_device_index() == first.get_device_index()),
        "all tensors of an op must be on one device, got devices ",
        first.get_device_index(),
        " and ",
        t->get_device_index()
    );
}

inline Tensor
empty(const Tensor& like, const Ints& sizes, ScalarType dtype, bool channels_last = false) {
  return empty_on(like.device(), sizes, dtype, channels_last);
}

// A result that is not wanted; outputs of an op must not alias each other.
inline Tensor absent(const Tensor& like, ScalarType dtype) {
  return empty(like, {0}, dtype);
}

// A tensor that is read in the order of its memory, whichever layout that is.
inline void check_dense_either(const Tensor& t, const char* name) {
  check_dense(t, t, t.dim() == 4 && is_dense(t, true), name);
}

inline void check_map(const Tensor& t, int64_t count, Dtype dtype, const char* name) {
  check_dtype(t, compute_type(dtype), name);
  DCCONV_CHECK(
      t.numel() == count && t.is_contiguous(),
      name,
      " must have ",
      count,
      " contiguous values, got shape ",
      list_of(t.sizes()),
      " with strides ",
      list_of(t.strides())
  );
}

inline int to_int(int64_t value) {
  DCCONV_CHECK(
      value >= 0 && value < (int64_t{1} << 31), "a size must be below 2^31 on a GPU, got ", value
  );
  return static_cast<int>(value);
}

inline WindowAxis window_axis(const Axis& axis) {
  return {
      to_int(axis.input),
      to_int(axis.output),
      to_int(axis.kernel),
      to_int(axis.stride),
      to_int(axis.dilation),
      to_int(axis.before),
      to_int(axis.after),
      axis.mode
  };
}

inline Window window_of(const ConvShape& shape) {
  to_int(shape.input_pixels());
  to_int(shape.output_pixels());
  // Kernels reach for windows at padded indices in 32 bits.
  to_int((shape.rows.output + 1) * shape.rows.stride + shape.rows.dilation * shape.rows.kernel);
  to_int(
      (shape.columns.output + 1) * shape.columns.stride +
      shape.columns.dilation * shape.columns.kernel
  );
  return {window_axis(shape.rows), window_axis(shape.columns)};
}

struct Geometry {
  Ints stride, padding, dilation;
  int64_t groups;
  std::string padding_mode;

  // x: sizes of the unpadded input.
  ConvShape shape(int64_t n, int64_t c, int64_t h, int64_t w, int64_t o, const Ints& kernel) const {
    return conv_shape(
        n, c, h, w, o, kernel, stride, padding, dilation, groups, padding_mode, false
    );
  }
};

inline Operator operator_of(
    const std::string& magnitude,
    const std::string& angular,
    const std::string& weighting,
    double alpha,
    double beta,
    double power,
    double delta
) {
  return {
      magnitude_index(magnitude, weighting),
      angular_index(angular),
      weighting == "linear",
      alpha,
      beta,
      power,
      delta
  };
}

inline const void* data(const MaybeTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

// The stride of a [] or [o] parameter.
inline int parameter_stride(const MaybeTensor& t, int64_t o, Dtype dtype, const char* name) {
  if (!t.has_value())
    return 0;
  check_dtype(*t, compute_type(dtype), name);
  DCCONV_CHECK(
      (t->numel() == 1 || t->numel() == o) && t->is_contiguous(),
      name,
      " must be one value",
      o == 1 ? "" : " or one per filter",
      ", contiguous, got shape ",
      list_of(t->sizes()),
      " with strides ",
      list_of(t->strides())
  );
  return t->numel() == 1 ? 0 : 1;
}

// Parameters that arrive as views are copied: kernels read them densely.
inline MaybeTensor dense_parameter(const MaybeTensor& t) {
  return t.has_value() ? MaybeTensor(contiguous(*t, false)) : t;
}

inline FilterOperands filter_operands(
    int64_t o,
    const Tensor& a,
    const MaybeTensor& radius,
    const MaybeTensor& mean,
    const MaybeTensor& k,
    Dtype dtype
) {
  check_map(a, o, dtype, "a");
  parameter_stride(mean, 1, dtype, "mean");
  return {
      a.const_data_ptr(),
      data(radius),
      parameter_stride(radius, o, dtype, "radius"),
      data(mean),
      data(k),
      parameter_stride(k, o, dtype, "k")
  };
}

}  // namespace dcconv::cuda

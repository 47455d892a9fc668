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

#include "cuda/kernels.h"
#include "problem.h"
#include "tensor.h"

namespace dcconv {
namespace cuda {

using MaybeTensor = std::optional<Tensor>;

// The tensor's device and its current stream, for the time of an op.
class OnDevice {
public:
#if defined(DCCONV_SIMT)
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
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
    STD_TORCH_CHECK(
        !t.has_value() ||
            (t->is_cuda() == first.is_cuda() && t->get_device_index() == first.get_device_index()),
        "dcconv: all tensors of an op must be on one device"
    );
}

inline Tensor
empty(const Tensor& like, const Ints& sizes, ScalarType dtype, bool channels_last = false) {
  return torch::stable::empty(
      sizes, dtype, std::nullopt, like.device(), std::nullopt, format_of(channels_last)
  );
}

// A result that is not wanted; outputs of an op must not alias each other.
inline Tensor absent(const Tensor& like, ScalarType dtype) {
  return empty(like, {0}, dtype);
}

inline void check_dense(const Tensor& t, const Tensor& like, bool channels_last, const char* name) {
  STD_TORCH_CHECK(
      t.dim() == 4 && t.scalar_type() == like.scalar_type() && is_dense(t, channels_last),
      "dcconv: ",
      name,
      " must be 4-d and dense in the layout of the call"
  );
}

inline void check_sizes(const Tensor& library_grad, const Tensor& weight) {
  STD_TORCH_CHECK(
      std::equal(
          library_grad.sizes().begin(),
          library_grad.sizes().end(),
          weight.sizes().begin(),
          weight.sizes().end()
      ),
      "dcconv: library_grad must have the sizes of weight"
  );
}

inline void check_map(const Tensor& t, int64_t count, Dtype dtype, const char* name) {
  STD_TORCH_CHECK(
      t.numel() == count && t.scalar_type() == compute_type(dtype) && t.is_contiguous(),
      "dcconv: ",
      name,
      " must have ",
      count,
      " values in compute dtype, got ",
      t.numel()
  );
}

inline int to_int(int64_t value) {
  STD_TORCH_CHECK(
      value >= 0 && value < (int64_t{1} << 31), "dcconv: a size must be below 2^31, got ", value
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
    STD_TORCH_CHECK(
        kernel.size() == 2 && stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
        "dcconv: geometry must come as 2, 2, 4 and 2 numbers"
    );
    STD_TORCH_CHECK(
        groups > 0 && c % groups == 0 && o % groups == 0 && c > 0 && o > 0,
        "dcconv: groups must divide channels and filters"
    );
    const PaddingMode mode = padding_mode_of(padding_mode);
    return {
        n,
        c,
        o,
        groups,
        axis_of(h, kernel[0], stride[0], padding[0], padding[1], dilation[0], mode),
        axis_of(w, kernel[1], stride[1], padding[2], padding[3], dilation[1], mode),
        false
    };
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
      index_of(portable::Angulars{}, angular, "angular function"),
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
  STD_TORCH_CHECK(
      (t->numel() == 1 || t->numel() == o) && t->scalar_type() == compute_type(dtype) &&
          t->is_contiguous(),
      "dcconv: ",
      name,
      " must be one value or one per filter, in compute dtype"
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
  STD_TORCH_CHECK(parameter_stride(mean, 1, dtype, "mean") == 0, "dcconv: mean must be one value");
  return {
      a.const_data_ptr(),
      data(radius),
      parameter_stride(radius, o, dtype, "radius"),
      data(mean),
      data(k),
      parameter_stride(k, o, dtype, "k")
  };
}

}  // namespace cuda
}  // namespace dcconv

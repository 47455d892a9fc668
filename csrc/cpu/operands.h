// The small operands of a call as the kernels read them.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/directions.h"
#include "cpu/patch_norm.h"

namespace dcconv::cpu {

// The weight in library dtype and one layout, its norms, and for norm-free operators the weight
// with the operator folded in.
struct Weight {
  Tensor stored;   // storage dtype, contiguous in call.weight_last
  Tensor library;  // what the library convolves with
  Tensor a;        // [o], compute dtype
  Tensor scale;    // [o], compute dtype: norm-free operators' factor alpha
};

inline Weight make_weight(const Call& call, const Tensor& weight, double eps) {
  Weight result{contiguous(weight, call.weight_last), {}, empty({call.shape.o}, call.compute), {}};
  const bool fold = call.norm_free && (call.scaled_by_a || call.op.alpha != 1.0);
  FilterParams p{};
  p.o = call.shape.o;
  p.size = call.shape.filter_size();
  p.eps = eps;
  p.weight = result.stored.const_data_ptr();
  p.a = result.a.mutable_data_ptr();
  p.project = call.scaled_by_a;
  if (fold) {
    const Ints sizes(weight.sizes().begin(), weight.sizes().end());
    result.library = empty(sizes, call.library, call.weight_last);
    result.scale = filled(empty({call.shape.o}, call.compute), call.op.alpha);
    p.scaled = result.library.mutable_data_ptr();
    p.scale = result.scale.const_data_ptr();
  } else {
    result.library =
        call.library == call.storage ? result.stored : to_dtype(result.stored, call.library);
  }
  run_tasks(
      call.shape.o,
      [&](int64_t begin, int64_t end) { call.table.filter_norm(p, begin, end); },
      kTask / p.size + 1
  );
  return result;
}

// Per-filter vectors, repeated over the positions of a channels-last tile.
template <class A>
struct FilterVectors {
  std::vector<A> a, inverse_a, rho, inverse_rho, k, bias;
  double mean = 1;  // factor of the radius
  bool radius_per_filter = false;

  FilterVectors(
      const Call& call,
      const Tensor& norms,
      const std::optional<Tensor>& radius,
      double mean,
      const std::optional<Tensor>& k_values,
      const std::optional<Tensor>& bias_values
  )
      : mean(mean) {
    const int64_t o = call.shape.o;
    const Positions positions = {1, 1, o, call.shape.groups, call.shape.channels_last, false};
    const int64_t repeat = call.shape.channels_last ? positions.tile_rows() : 1;
    const A* norm = static_cast<const A*>(norms.const_data_ptr());
    const auto inverse = [](A v) { return A(1) / v; };
    a.assign(norm, norm + o);
    inverse_a.resize(a.size());
    std::transform(a.begin(), a.end(), inverse_a.begin(), inverse);
    rho = values(radius, o, A(1));
    for (A& v : rho) {
      const A product = v * A(mean);
      v = product < A(kRhoFloor) ? A(kRhoFloor) : product;
    }
    inverse_rho.resize(rho.size());
    std::transform(rho.begin(), rho.end(), inverse_rho.begin(), inverse);
    radius_per_filter = radius.has_value() && radius->numel() > 1;
    k = values(k_values, o, A(1));
    if (bias_values.has_value())
      bias = values(bias_values, o, A(0));
    for (std::vector<A>* v : {&a, &inverse_a, &rho, &inverse_rho, &k, &bias}) {
      const std::size_t once = v->size();
      v->resize(once * static_cast<std::size_t>(repeat));
      for (std::size_t i = once; i < v->size(); ++i)
        (*v)[i] = (*v)[i - once];
    }
  }

  // A [], [o] or absent parameter as o values.
  static std::vector<A> values(const std::optional<Tensor>& t, int64_t o, A otherwise) {
    if (!t.has_value())
      return std::vector<A>(static_cast<std::size_t>(o), otherwise);
    const Tensor dense = contiguous(*t, false);
    DCCONV_CHECK(
        dense.numel() == 1 || dense.numel() == o,
        "a parameter must have one value or ",
        o,
        ", got shape ",
        list_of(dense.sizes())
    );
    check_dtype(dense, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float, "a parameter");
    const A* p = static_cast<const A*>(dense.const_data_ptr());
    if (dense.numel() == 1)
      return std::vector<A>(static_cast<std::size_t>(o), p[0]);
    return std::vector<A>(p, p + o);
  }

  Filters pointers() const {
    return {a.data(), inverse_a.data(), rho.data(), inverse_rho.data(), k.data()};
  }
};

// The factors of tanh x cosine; none for other operators and in double.
class TanhCosineScales {
public:
  template <class A>
  TanhCosineScales(const Call& call, const FilterVectors<A>& filters) {
    if constexpr (std::is_same_v<A, float>) {
      const Operator& op = call.op;
      if (op.magnitude != magnitude_index(portable::Tanh::name, "none") ||
          op.angular != angular_index(portable::Cosine::name))
        return;
      constexpr int64_t whole = 4 * kScaleGroup;  // the widest panel of a product
      const int64_t o = call.shape.o, count = (o + whole - 1) / whole * whole;
      for (std::vector<float>* v : {&scale_, &slope_, &factor_, &bias_})
        v->assign(static_cast<std::size_t>(count), 0.0f);
      most_.assign(static_cast<std::size_t>(count / kScaleGroup), 0.0f);
      for (std::size_t i = 0; i < static_cast<std::size_t>(o); ++i) {
        const float inverse_rho = filters.inverse_rho[i];
        scale_[i] = inverse_rho * inverse_rho;
        factor_[i] = float(op.alpha) * filters.inverse_a[i];
        if (op.times_a)
          factor_[i] *= filters.a[i];
        slope_[i] = 2.0f * factor_[i] * inverse_rho;
        if (!filters.bias.empty())
          bias_[i] = filters.bias[i];
        float& most = most_[i / kScaleGroup];
        most = std::max(most, scale_[i]);
      }
      pointers_ = {
          scale_.data(),
          slope_.data(),
          factor_.data(),
          filters.bias.empty() ? nullptr : bias_.data(),
          most_.data()
      };
    }
  }

  const FilterScales* pointers() const { return scale_.empty() ? nullptr : &pointers_; }

private:
  std::vector<float> scale_, slope_, factor_, bias_, most_;
  FilterScales pointers_{};
};

// Whether the magnitude depends on the norm of the filter.
inline bool is_weighted(const Operator& op) {
  return op.times_a || op.magnitude >= static_cast<int>(portable::Magnitudes::size);
}

inline Positions positions_of(const Call& call, int64_t images, bool radius_per_filter) {
  return {
      images,
      call.shape.output_pixels(),
      call.shape.o,
      call.shape.groups,
      call.shape.channels_last,
      !is_weighted(call.op) && !radius_per_filter
  };
}

template <class A>
double scalar_of(const Tensor& t, ScalarType compute) {
  DCCONV_CHECK(t.numel() == 1, "norm_mean must be one value, got shape ", list_of(t.sizes()));
  check_dtype(t, compute, "norm_mean");
  return double(*static_cast<const A*>(t.const_data_ptr()));
}

// The norms of the whole batch and their mean, which is also returned.
template <class A>
double batch_norms(
    const Call& call,
    const PatchNorm& patch_norm,
    const Tensor& x,
    const void* sums,
    Tensor& norm_map,
    Tensor& mean
) {
  const ConvShape& shape = call.shape;
  std::vector<double> row_sums(
      static_cast<std::size_t>(patch_norm.planes(shape, shape.n) * shape.rows.output)
  );
  patch_norm.norms(
      call.table,
      shape,
      shape.n,
      x.const_data_ptr(),
      sums,
      norm_map.mutable_data_ptr(),
      row_sums.data()
  );
  double sum = 0;
  for (double v : row_sums)
    sum += v;
  const A rounded = A(sum / double(std::max<int64_t>(call.map_elements(), 1)));
  *static_cast<A*>(mean.mutable_data_ptr()) = rounded;
  return double(rounded);
}

// The factor of the radius in backward.
template <class A>
double backward_factor(const Call& call, const BackwardInputs& in) {
  if (in.norm_mean.has_value())
    return scalar_of<A>(*in.norm_mean, call.compute);
  return in.batch_mean && in.mean.numel() == 1 ? scalar_of<A>(in.mean, call.compute) : 1.0;
}

}  // namespace dcconv::cpu

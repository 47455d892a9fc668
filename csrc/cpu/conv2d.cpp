// The operator on the CPU, one op per direction: the batch goes through in chunks of images, each
// through the library convolution and the fused passes while its data is in cache.

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/chunk.h"
#include "cpu/library.h"
#include "cpu/patch_norm.h"
#include "problem.h"

namespace dcconv {
namespace cpu {
namespace {

// Bits of `needs`, in the order of the results of conv2d_backward.
enum Needs { kX = 1, kWeight = 2, kBias = 4, kRadius = 8, kNormMean = 16, kK = 32 };

// What forward and backward derive from their common arguments.
struct Call {
  ConvShape shape;
  Operator op;
  Dtype dtype;
  ScalarType storage, library, compute;
  const Kernels& table;
  LibraryGeometry geometry;
  bool pad;          // x is padded for the library
  bool norm_free;    // linear x cosine: the patch norm cancels
  bool scaled_by_a;  // norm_free: the weight is divided by its norm
  bool weight_last;  // layout in which weights are read
  int64_t chunk;     // images at a time

  int64_t output_elements() const { return shape.positions() * shape.o; }
  int64_t map_elements() const { return shape.positions() * shape.groups; }
};

Call make_call(
    const Tensor& x,
    const Tensor& weight,
    const Ints& stride,
    const Ints& padding,
    const Ints& dilation,
    int64_t groups,
    const std::string& padding_mode,
    const std::string& magnitude,
    const std::string& angular,
    const std::string& weighting,
    double alpha,
    double beta,
    double power,
    double delta,
    bool backward
) {
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.scalar_type() == x.scalar_type() &&
          weight.size(1) * groups == x.size(1),
      "dcconv: weight does not fit x"
  );
  const bool channels_last = x.size(0) > 0 && (is_channels_last(x) || is_channels_last(weight));
  const ConvShape shape = conv_shape(
      x,
      weight.size(0),
      {weight.size(2), weight.size(3)},
      stride,
      padding,
      dilation,
      groups,
      padding_mode,
      channels_last
  );
  const Dtype dtype = dtype_of(x);
  const bool symmetric = shape.rows.mode == PaddingMode::zeros &&
                         shape.rows.before == shape.rows.after &&
                         shape.columns.before == shape.columns.after;
  const Ints library_padding =
      symmetric ? Ints{shape.rows.before, shape.columns.before} : Ints{0, 0};
  const ScalarType storage = x.scalar_type(), library = library_type(dtype, storage);
  const int64_t element = dtype == Dtype::f64 ? 8 : library == ScalarType::Float ? 4 : 2;
  const bool norm_free = magnitude == portable::Linear::name && angular == portable::Cosine::name &&
                         (weighting == "none" || weighting == "linear");
  const int64_t input_bytes = element * shape.c * shape.input_pixels();
  const int64_t output_bytes = element * shape.o * shape.output_pixels();
  // Norm-free operators have no pass of their own to keep in cache.
  const int64_t chunk = norm_free && library == storage ? std::max<int64_t>(shape.n, 1)
                        : backward ? backward_chunk(shape.n, input_bytes, output_bytes)
                                   : forward_chunk(shape.n, output_bytes);
  return {
      shape,
      {magnitude_index(magnitude, weighting),
       index_of(portable::Angulars{}, angular, "angular function"),
       weighting == "linear",
       alpha,
       beta,
       power,
       delta},
      dtype,
      storage,
      library,
      compute_type(dtype),
      kernels(dtype),
      {stride, library_padding, dilation, groups},
      !symmetric,
      norm_free,
      norm_free && weighting == "none",
      is_channels_last(weight),
      chunk
  };
}

// The weight in library dtype and one layout, its norms, and for norm-free operators the weight
// with the operator folded in.
struct Weight {
  Tensor stored;   // storage dtype, contiguous in call.weight_last
  Tensor library;  // what the library convolves with
  Tensor a;        // [o], compute dtype
  Tensor scale;    // [o], compute dtype: norm-free operators' factor alpha
};

Weight make_weight(const Call& call, const Tensor& weight, double eps) {
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
    result.scale = torch::stable::fill_(empty({call.shape.o}, call.compute), call.op.alpha);
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
    a.assign(norm, norm + o);
    for (A v : a)
      inverse_a.push_back(A(1) / v);
    rho = values(radius, o, A(1));
    for (A& v : rho) {
      const A product = v * A(mean);
      v = product < A(kRhoFloor) ? A(kRhoFloor) : product;
      inverse_rho.push_back(A(1) / v);
    }
    radius_per_filter = radius.has_value() && radius->numel() > 1;
    k = values(k_values, o, A(1));
    if (bias_values.has_value())
      bias = values(bias_values, o, A(0));
    for (std::vector<A>* v : {&a, &inverse_a, &rho, &inverse_rho, &k, &bias}) {
      v->reserve(v->size() * static_cast<std::size_t>(repeat));
      const std::vector<A> once = *v;
      for (int64_t i = 1; i < repeat; ++i)
        v->insert(v->end(), once.begin(), once.end());
    }
  }

  // A [], [o] or absent parameter as o values.
  static std::vector<A> values(const std::optional<Tensor>& t, int64_t o, A otherwise) {
    if (!t.has_value())
      return std::vector<A>(static_cast<std::size_t>(o), otherwise);
    const Tensor dense = contiguous(*t, false);
    STD_TORCH_CHECK(dense.numel() == 1 || dense.numel() == o, "dcconv: bad parameter size");
    STD_TORCH_CHECK(dense.element_size() == sizeof(A), "dcconv: bad parameter dtype");
    const A* p = static_cast<const A*>(dense.const_data_ptr());
    if (dense.numel() == 1)
      return std::vector<A>(static_cast<std::size_t>(o), p[0]);
    return std::vector<A>(p, p + o);
  }

  Filters pointers() const {
    return {a.data(), inverse_a.data(), rho.data(), inverse_rho.data(), k.data()};
  }
};

Positions positions_of(const Call& call, int64_t images, bool radius_per_filter) {
  const bool weighted =
      call.op.times_a || call.op.magnitude >= static_cast<int>(portable::Magnitudes::size);
  return {
      images,
      call.shape.output_pixels(),
      call.shape.o,
      call.shape.groups,
      call.shape.channels_last,
      !weighted && !radius_per_filter
  };
}

template <class A>
double scalar_of(const Tensor& t, ScalarType compute) {
  STD_TORCH_CHECK(
      t.numel() == 1 && t.scalar_type() == compute, "dcconv: a mean norm must be one compute value"
  );
  return double(*static_cast<const A*>(t.const_data_ptr()));
}

// Convert a dense tensor between storage and library dtype, same layout.
Tensor as_library(const Call& call, const Tensor& t) {
  return call.library == call.storage ? t : to_dtype(t, call.library);
}

Tensor library_input(const Call& call, const Tensor& x) {
  const Tensor converted = as_library(call, x);
  return call.pad ? pad(converted, call.shape) : converted;
}

char* at(const Tensor& t, int64_t element) {
  return static_cast<char*>(t.data_ptr()) + element * static_cast<int64_t>(t.element_size());
}

// The library may number the strides of one-element axes its own way: give the tensor exactly the
// strides that empty() gives, which the fakes promise.
Tensor with_strides_of(const Tensor& t, const Tensor& like) {
  const auto a = t.strides(), b = like.strides();
  if (std::equal(a.begin(), a.end(), b.begin()))
    return t;
  return dispatch_tensor(
      "aten::as_strided",
      "",
      t,
      Ints(t.sizes().begin(), t.sizes().end()),
      Ints(b.begin(), b.end()),
      std::optional<int64_t>()
  );
}

template <class A>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Call& call,
    Tensor x,
    const Tensor& weight_in,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& radius,
    const std::optional<Tensor>& norm_mean,
    const std::optional<Tensor>& k,
    double eps,
    const std::string& norm,
    bool keep_dot
) {
  const ConvShape& shape = call.shape;
  const bool batch_mean = norm == "batch";
  x = contiguous(x, shape.channels_last);
  const Weight weight = make_weight(call, weight_in, eps);
  const Ints sizes{shape.n, shape.o, shape.rows.output, shape.columns.output};
  Tensor mean = empty(batch_mean ? Ints{} : Ints{0}, call.compute);
  Tensor norm_map = empty({call.norm_free ? 0 : call.map_elements()}, call.compute);
  const bool wants_dot = keep_dot && !call.norm_free;
  const bool one_chunk = call.chunk >= shape.n && call.library == call.storage;
  Tensor y = empty(
      one_chunk && !wants_dot ? Ints{0} : sizes,
      call.storage,
      shape.channels_last && !(one_chunk && !wants_dot)
  );
  Tensor dot = empty(
      wants_dot && !one_chunk ? sizes : Ints{0},
      call.storage,
      shape.channels_last && wants_dot && !one_chunk
  );

  const Window window(shape, eps);
  double factor = 1.0;
  if (!call.norm_free && batch_mean) {
    std::vector<double> row_sums(
        static_cast<std::size_t>(window.planes(shape, shape.n) * shape.rows.output)
    );
    window.norms(
        call.table, shape, shape.n, x.const_data_ptr(), norm_map.mutable_data_ptr(), row_sums.data()
    );
    double sum = 0;
    for (double v : row_sums)
      sum += v;
    const A rounded = A(sum / double(std::max<int64_t>(call.map_elements(), 1)));
    *static_cast<A*>(mean.mutable_data_ptr()) = rounded;
    factor = double(rounded);
  } else if (norm_mean.has_value()) {
    factor = scalar_of<A>(*norm_mean, call.compute);
  }
  std::optional<Tensor> compute_bias, library_bias;
  if (bias.has_value()) {
    if (call.norm_free) {
      library_bias = to_dtype(*bias, call.library);
    } else {
      compute_bias = to_dtype(*bias, call.compute);
    }
  }
  const FilterVectors<A> filters(call, weight.a, radius, factor, k, compute_bias);

  EpilogueParams p{};
  p.op = call.op;
  p.filters = filters.pointers();
  p.bias = filters.bias.empty() ? nullptr : filters.bias.data();
  const int64_t image_map = shape.groups * shape.output_pixels();
  const int64_t image_output = shape.o * shape.output_pixels();
  for (int64_t first = 0; first < std::max<int64_t>(shape.n, 1); first += call.chunk) {
    const int64_t count = std::min(call.chunk, shape.n - first);
    const Tensor x_chunk = images(x, first, count);
    if (!call.norm_free && !batch_mean)
      window.norms(
          call.table,
          shape,
          count,
          x_chunk.const_data_ptr(),
          at(norm_map, first * image_map),
          nullptr
      );
    Tensor u =
        convolution(library_input(call, x_chunk), weight.library, library_bias, call.geometry);
    u = contiguous(u, shape.channels_last);
    if (one_chunk) {
      u = with_strides_of(u, empty(sizes, call.storage, shape.channels_last));
      if (wants_dot) {
        dot = u;
      } else {
        y = u;
      }
    }
    const int64_t offset = first * image_output, elements = count * image_output;
    if (call.norm_free) {
      // float16 only: the library's float result is rounded once.
      if (!one_chunk)
        run_tasks((elements + kTask - 1) / kTask, [&](int64_t begin, int64_t end) {
          call.table.round(
              u.const_data_ptr(), at(y, offset), begin * kTask, std::min(end * kTask, elements)
          );
        });
      continue;
    }
    p.shape = positions_of(call, count, filters.radius_per_filter);
    p.u = u.const_data_ptr();
    p.norm = at(norm_map, first * image_map);
    p.y = at(y, offset);
    p.dot = wants_dot && !one_chunk ? at(dot, offset) : nullptr;
    run_tasks(p.shape.tasks(), [&](int64_t begin, int64_t end) {
      call.table.epilogue(p, begin, end);
    });
  }
  return {y, norm_map, mean, dot};
}

// Sums over tasks of one kind of column sum, in task order.
template <class A>
struct Columns {
  std::vector<A> parts;
  std::vector<double> total;

  void* prepare(bool wanted, int64_t tasks, int64_t o) {
    if (!wanted)
      return nullptr;
    total.resize(static_cast<std::size_t>(o), 0.0);
    parts.resize(static_cast<std::size_t>(tasks * o));
    return parts.data();
  }

  void add(int64_t tasks, int64_t o) {
    if (total.empty())
      return;
    for (int64_t task = 0; task < tasks; ++task)
      for (int64_t i = 0; i < o; ++i)
        total[static_cast<std::size_t>(i)] += double(parts[static_cast<std::size_t>(task * o + i)]);
  }
};

// Per-filter totals as a gradient of a [], or [o], parameter.
template <class A>
Tensor parameter_grad(const Tensor& parameter, const std::vector<double>& totals, double factor) {
  const Ints sizes(parameter.sizes().begin(), parameter.sizes().end());
  Tensor grad = empty(sizes, parameter.scalar_type());
  A* out = static_cast<A*>(grad.mutable_data_ptr());
  if (parameter.numel() != 1) {
    for (std::size_t i = 0; i < totals.size(); ++i)
      out[i] = A(totals[i] * factor);
  } else {
    double sum = 0;
    for (double v : totals)
      sum += v;
    out[0] = A(sum * factor);
  }
  return grad;
}

template <class A>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Call& call,
    Tensor grad_y,
    Tensor x,
    const Tensor& weight_in,
    Tensor kept,
    const Tensor& norm_map,
    const Tensor& mean,
    const std::optional<Tensor>& radius,
    const std::optional<Tensor>& norm_mean,
    const std::optional<Tensor>& k,
    double eps,
    const std::string& norm,
    bool norm_grad,
    const std::string& kept_is,
    int64_t needs
) {
  const ConvShape& shape = call.shape;
  const bool batch_mean = norm == "batch";
  const bool needs_x = needs & kX, needs_weight = needs & kWeight;
  // The mean of the norms depends on every patch: t is finished after all of the batch.
  const bool barrier = batch_mean && norm_grad && needs_x && !call.norm_free;
  x = contiguous(x, shape.channels_last);
  grad_y = contiguous(grad_y, shape.channels_last);
  if (!call.norm_free)
    kept = contiguous(kept, shape.channels_last);
  const Weight weight = make_weight(call, weight_in, eps);
  // Results that are not wanted; outputs of an op must not alias each other.
  const auto none = [&] { return empty({0}, call.storage); };
  const auto none_compute = [&] { return empty({0}, call.compute); };

  double factor = 1.0;
  if (batch_mean && mean.numel() == 1)
    factor = scalar_of<A>(mean, call.compute);
  if (norm_mean.has_value())
    factor = scalar_of<A>(*norm_mean, call.compute);
  const FilterVectors<A> filters(call, weight.a, radius, factor, k, std::nullopt);

  const Ints input_sizes{shape.n, shape.c, shape.rows.input, shape.columns.input};
  const Ints weight_sizes(weight_in.sizes().begin(), weight_in.sizes().end());
  Tensor grad_x = none(), grad_weight = none();
  const bool one_chunk = call.chunk >= shape.n;
  const bool reuse = one_chunk && call.library == call.storage && !call.pad;
  if (needs_x && !reuse)
    grad_x = empty(input_sizes, call.storage, shape.channels_last);
  std::vector<A> weight_sum;
  if (needs_weight)
    weight_sum.resize(static_cast<std::size_t>(shape.o * shape.filter_size()), A(0));

  const int64_t image_map = shape.groups * shape.output_pixels();
  const int64_t image_output = shape.o * shape.output_pixels();
  const int64_t image_input = shape.c * shape.input_pixels();
  const int64_t chunk = std::max<int64_t>(std::min(call.chunk, shape.n), 1);
  Tensor t;
  if (needs_x && !call.norm_free)
    t = empty({(barrier ? shape.n : chunk) * image_map}, call.compute);
  Tensor grad_u;
  if (!call.norm_free)
    grad_u = empty(
        {chunk, shape.o, shape.rows.output, shape.columns.output}, call.library, shape.channels_last
    );

  Columns<A> sum_rho, sum_a, sum_k, sum_bias;
  const bool wants_rho = radius.has_value() && ((needs & (kRadius | kNormMean)) != 0 || barrier);
  const bool weighted =
      call.op.times_a || call.op.magnitude >= static_cast<int>(portable::Magnitudes::size);
  GradDotParams p{};
  p.op = call.op;
  p.filters = filters.pointers();
  p.kept_is = kept_is == "output" ? Kept::output : Kept::dot;

  const Window window(shape, eps);
  const Shown shown_rows(shape.rows), shown_columns(shape.columns);
  GradInputParams g{};
  g.c = shape.c;
  g.groups = shape.groups;
  g.rows = shape.rows;
  g.columns = shape.columns;
  if (!call.pad) {
    g.rows.before = g.rows.after = 0;
    g.columns.before = g.columns.after = 0;
  }
  g.channels_last = shape.channels_last;
  g.row_starts = shown_rows.starts.data();
  g.row_list = shown_rows.list.data();
  g.column_starts = shown_columns.starts.data();
  g.column_list = shown_columns.list.data();

  // grad_x of some images from the library's gradient and the finished t.
  const auto finish_input = [&](int64_t first,
                                int64_t count,
                                const void* library_grad,
                                const void* t_images) {
    const Tensor sums = window.transposed(call.table, shape, count, t_images, call.compute);
    g.n = count;
    g.library_grad = library_grad;
    g.x = at(x, first * image_input);
    g.t = sums.const_data_ptr();
    g.grad_x = at(grad_x, first * image_input);
    run_tasks(g.tasks(), [&](int64_t begin, int64_t end) { call.table.grad_input(g, begin, end); });
  };

  std::vector<Tensor> library_grads;  // behind the barrier
  Tensor grad_bias = none();
  std::vector<A> bias_sum(static_cast<std::size_t>(shape.o), A(0));  // norm-free operators
  for (int64_t first = 0; first < shape.n; first += call.chunk) {
    const int64_t count = std::min(call.chunk, shape.n - first);
    Tensor du;
    if (call.norm_free) {
      du = as_library(call, images(grad_y, first, count));
    } else {
      p.shape = positions_of(call, count, filters.radius_per_filter);
      const int64_t tasks = p.shape.tasks();
      p.grad_y = at(grad_y, first * image_output);
      p.kept = at(kept, first * image_output);
      p.norm = at(norm_map, first * image_map);
      p.grad_u = grad_u.mutable_data_ptr();
      p.t = needs_x ? at(t, barrier ? first * image_map : 0) : nullptr;
      p.sums.rho = sum_rho.prepare(wants_rho, tasks, shape.o);
      p.sums.a = sum_a.prepare(weighted && needs_weight, tasks, shape.o);
      p.sums.k = sum_k.prepare((needs & kK) != 0 && k.has_value(), tasks, shape.o);
      p.sums.bias = sum_bias.prepare((needs & kBias) != 0, tasks, shape.o);
      run_tasks(tasks, [&](int64_t begin, int64_t end) { call.table.grad_dot(p, begin, end); });
      for (Columns<A>* sums : {&sum_rho, &sum_a, &sum_k, &sum_bias})
        sums->add(tasks, shape.o);
      du = images(grad_u, 0, count);
    }
    const bool bias_by_library = call.norm_free && (needs & kBias) != 0;
    if (!needs_x && !needs_weight && !bias_by_library)
      continue;
    const Tensor x_library = library_input(call, images(x, first, count));
    auto [library_x, library_w, library_b] = convolution_backward(
        du, x_library, weight.library, call.geometry, {needs_x, needs_weight, bias_by_library}
    );
    if (bias_by_library)
      call.table.accumulate(library_b.const_data_ptr(), bias_sum.data(), 0, shape.o);
    if (needs_weight) {
      const Tensor dense = contiguous(library_w, call.weight_last);
      run_tasks((dense.numel() + kTask - 1) / kTask, [&](int64_t begin, int64_t end) {
        call.table.accumulate(
            dense.const_data_ptr(),
            weight_sum.data(),
            begin * kTask,
            std::min(end * kTask, dense.numel())
        );
      });
    }
    if (!needs_x)
      continue;
    const Tensor dense = contiguous(library_x, shape.channels_last);
    if (reuse)
      grad_x = with_strides_of(dense, empty(input_sizes, call.storage, shape.channels_last));
    if (call.norm_free) {
      if (!reuse) {
        // Fold the padding back and round: the pass with t = 0.
        const Tensor zero = torch::stable::fill_(empty({count * image_map}, call.compute), 0.0);
        finish_input(first, count, dense.const_data_ptr(), zero.const_data_ptr());
      }
    } else if (barrier) {
      library_grads.push_back(dense);
    } else {
      finish_input(first, count, dense.const_data_ptr(), t.const_data_ptr());
    }
  }

  // Totals of the radius, zero where rho sits on its floor.
  double mean_grad = 0;
  if (wants_rho) {
    const std::vector<A> radii = FilterVectors<A>::values(radius, shape.o, A(1));
    for (std::size_t i = 0; i < sum_rho.total.size(); ++i) {
      if (radii[i] * A(factor) < A(kRhoFloor))
        sum_rho.total[i] = 0;
      mean_grad += double(radii[i]) * sum_rho.total[i];
    }
  }
  if (barrier && shape.n > 0) {
    const double add = mean_grad / double(std::max<int64_t>(call.map_elements(), 1));
    run_tasks((call.map_elements() + kTask - 1) / kTask, [&](int64_t begin, int64_t end) {
      call.table.finish_t(
          norm_map.const_data_ptr(),
          nullptr,
          add,
          t.mutable_data_ptr(),
          begin * kTask,
          std::min(end * kTask, call.map_elements())
      );
    });
    for (std::size_t i = 0; i < library_grads.size(); ++i) {
      const int64_t first = static_cast<int64_t>(i) * call.chunk;
      finish_input(
          first,
          std::min(call.chunk, shape.n - first),
          library_grads[i].const_data_ptr(),
          at(t, first * image_map)
      );
    }
  }
  if (needs_x && shape.n == 0)
    grad_x = empty(input_sizes, call.storage, shape.channels_last);

  if (needs_weight) {
    grad_weight = empty(weight_sizes, call.storage, call.weight_last);
    FilterParams f{};
    f.o = shape.o;
    f.size = shape.filter_size();
    f.weight = weight.stored.const_data_ptr();
    f.a = weight.a.data_ptr();
    f.grad_folded = weight_sum.data();
    f.project = !call.norm_free || call.scaled_by_a;
    std::vector<A> extra, scale;
    for (double v : sum_a.total)
      extra.push_back(A(v));
    if (call.norm_free)
      for (int64_t i = 0; i < shape.o; ++i)
        scale.push_back(
            A(call.op.alpha) *
            (call.scaled_by_a ? filters.inverse_a[static_cast<std::size_t>(i)] : A(1))
        );
    f.extra = extra.empty() ? nullptr : extra.data();
    f.grad_scale = scale.empty() ? nullptr : scale.data();
    f.grad_weight = grad_weight.mutable_data_ptr();
    run_tasks(
        shape.o,
        [&](int64_t begin, int64_t end) { call.table.filter_grad(f, begin, end); },
        kTask / f.size + 1
    );
  }

  if ((needs & kBias) != 0) {
    if (shape.n == 0) {
      grad_bias = torch::stable::fill_(empty({shape.o}, call.storage), 0.0);
    } else {
      Tensor sums = empty({shape.o}, call.compute);
      A* to = static_cast<A*>(sums.mutable_data_ptr());
      if (call.norm_free) {
        std::copy(bias_sum.begin(), bias_sum.end(), to);
      } else {
        std::copy(sum_bias.total.begin(), sum_bias.total.end(), to);
      }
      grad_bias = to_dtype(sums, call.storage);
    }
  }
  const std::vector<double> zeros(static_cast<std::size_t>(shape.o), 0.0);
  const auto totals = [&](const Columns<A>& sums) -> const std::vector<double>& {
    return sums.total.empty() ? zeros : sums.total;
  };
  Tensor grad_radius = none_compute(), grad_mean = none_compute(), grad_k = none_compute();
  if ((needs & kRadius) != 0 && radius.has_value())
    grad_radius = parameter_grad<A>(*radius, totals(sum_rho), factor);
  if ((needs & kNormMean) != 0 && norm_mean.has_value())
    grad_mean = torch::stable::fill_(empty({}, call.compute), mean_grad);
  if ((needs & kK) != 0 && k.has_value())
    grad_k = parameter_grad<A>(*k, totals(sum_k), 1.0);
  return {grad_x, grad_weight, grad_bias, grad_radius, grad_mean, grad_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_forward(
    Tensor x,
    Tensor weight,
    std::optional<Tensor> bias,
    std::optional<Tensor> radius,
    std::optional<Tensor> norm_mean,
    std::optional<Tensor> k,
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
    double eps,
    double delta,
    std::string norm,
    bool keep_dot
) {
  const Call call = make_call(
      x,
      weight,
      stride,
      padding,
      dilation,
      groups,
      padding_mode,
      magnitude,
      angular,
      weighting,
      alpha,
      beta,
      power,
      delta,
      false
  );
  const auto run = call.dtype == Dtype::f64 ? forward<double> : forward<float>;
  return run(call, x, weight, bias, radius, norm_mean, k, eps, norm, keep_dot);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv2d_backward(
    Tensor grad_y,
    Tensor x,
    Tensor weight,
    Tensor kept,
    Tensor norm_map,
    Tensor mean,
    std::optional<Tensor> radius,
    std::optional<Tensor> norm_mean,
    std::optional<Tensor> k,
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
    double eps,
    double delta,
    std::string norm,
    bool norm_grad,
    std::string kept_is,
    int64_t needs
) {
  const Call call = make_call(
      x,
      weight,
      stride,
      padding,
      dilation,
      groups,
      padding_mode,
      magnitude,
      angular,
      weighting,
      alpha,
      beta,
      power,
      delta,
      true
  );
  STD_TORCH_CHECK(
      call.norm_free ||
          (norm_map.numel() == call.map_elements() && kept.numel() == call.output_elements()),
      "dcconv: saved tensors do not fit the call"
  );
  STD_TORCH_CHECK(grad_y.numel() == call.output_elements(), "dcconv: grad_y does not fit the call");
  const auto run = call.dtype == Dtype::f64 ? backward<double> : backward<float>;
  return run(
      call,
      grad_y,
      x,
      weight,
      kept,
      norm_map,
      mean,
      radius,
      norm_mean,
      k,
      eps,
      norm,
      norm_grad,
      kept_is,
      needs
  );
}

void set_cpu_chunk(int64_t images) {
  forced_chunk() = images;
}

}  // namespace
}  // namespace cpu
}  // namespace dcconv

STABLE_TORCH_LIBRARY_IMPL(dcconv, CompositeExplicitAutograd, m) {
  m.impl("set_cpu_chunk", TORCH_BOX(&dcconv::cpu::set_cpu_chunk));
}

STABLE_TORCH_LIBRARY_IMPL(dcconv, CPU, m) {
  m.impl("conv2d_forward", TORCH_BOX(&dcconv::cpu::conv2d_forward));
  m.impl("conv2d_backward", TORCH_BOX(&dcconv::cpu::conv2d_backward));
}

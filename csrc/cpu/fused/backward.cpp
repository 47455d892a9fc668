// Backward in one pass: a block of du is used for dx and dw while it is in cache. The gradient of
// the filters is summed per group of blocks, and the groups in order.

#include "cpu/fused/fused.h"
#include "cpu/fused/operands.h"
#include "cpu/parameter_sums.h"

namespace dcconv::cpu {
namespace {

// Vectors of a product's right side may be read this far behind its last column.
constexpr int64_t kSlack = 16;

// What the tasks of one call share.
struct Pass {
  const Call& call;
  const PackedFilters* turned;  // null where x needs no gradient and in contiguous layout
  GradDotParams grad_dot;       // without shape and pointers to maps
  const float *grad_y, *kept, *norm, *x;
  float* grad_x;   // null where not needed
  float* t;        // of the whole batch: behind a barrier and in contiguous layout, else null
  float* weights;  // [groups, o, r s c], or null where not needed
  int64_t groups;
  int64_t sums_per_unit;
  bool barrier;  // x t is added when all of the batch is done

  // du and t of positions [first, first + count), the unit-th of their kind.
  void positions(int64_t unit, int64_t first, int64_t count, float* grad_u, float* t_block) const {
    GradDotParams p = grad_dot;
    const int64_t o = call.shape.o, offset = first * o, sums = unit * sums_per_unit * o;
    p.shape.n = 1;
    p.shape.pixels = count;
    p.grad_y = grad_y + offset;
    p.kept = kept + offset;
    p.norm = norm + first;
    p.grad_u = grad_u;
    p.t = grad_x == nullptr ? nullptr : t_block;
    for (void** part : {&p.sums.rho, &p.sums.a, &p.sums.k, &p.sums.bias})
      if (*part != nullptr)
        *part = static_cast<float*>(*part) + sums;
    call.table.grad_dot(p, 0, p.shape.tasks());
  }

  // dx += x t for `rows` rows of `width` pixels.
  void add_norm_term(int64_t first_pixel, int64_t rows, int64_t width, const float* sums) const {
    GradInputParams g{};
    g.n = 1;
    g.c = call.shape.c;
    g.groups = 1;
    g.rows = {rows, rows, 1, 1, 1, 0, 0, PaddingMode::zeros};
    g.columns = {width, width, 1, 1, 1, 0, 0, PaddingMode::zeros};
    g.channels_last = true;
    g.library_grad = g.grad_x = grad_x + first_pixel * g.c;
    g.x = x + first_pixel * g.c;
    g.t = sums;
    call.table.grad_input(g, 0, g.tasks());
  }

  // The same for `count` pixels of all planes of an image in contiguous layout.
  void add_planar_norm_term(int64_t input, int64_t count, const float* t_pixels) const {
    GradInputParams g{};
    g.n = 1;
    g.c = call.shape.c;
    g.groups = 1;
    g.rows = {1, 1, 1, 1, 1, 0, 0, PaddingMode::zeros};
    g.columns = {count, count, 1, 1, 1, 0, 0, PaddingMode::zeros};
    g.plane = call.shape.output_pixels();
    g.library_grad = g.grad_x = grad_x + input;
    g.x = x + input;
    g.t = t_pixels;
    call.table.grad_input(g, 0, g.tasks());
  }

  // The units of group `group` of `units`.
  std::pair<int64_t, int64_t> range(int64_t group, int64_t units) const {
    return {group * units / groups, (group + 1) * units / groups};
  }
};

void pointwise(const Pass& pass) {
  const Call& call = pass.call;
  const int64_t c = call.shape.c, o = call.shape.o, positions = call.shape.positions();
  const int64_t block = pointwise_block(call.shape), units = (positions + block - 1) / block;
  const bool copies = c % kSlack != 0;
  const int64_t stride = copies ? (c + kSlack - 1) / kSlack * kSlack : c;
  run_tasks(pass.groups, [&](int64_t begin, int64_t end) {
    const Scratch grad_u(block * o), t_block(block), copy(copies ? block * stride : 0);
    const int64_t offset = 0;
    for (int64_t group = begin; group < end; ++group) {
      const auto [from, to] = pass.range(group, units);
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t first = unit * block, count = std::min(block, positions - first);
        float* t = pass.t == nullptr ? t_block.get() : pass.t + first;
        pass.positions(unit, first, count, grad_u.get(), t);
        if (pass.grad_x != nullptr) {
          GemmParams p = pass.turned->product(call.table, 1);
          p.m = count;
          p.a = grad_u.get();
          p.a_row = o;
          p.a_k = 1;
          p.a_offsets = &offset;
          p.c = pass.grad_x + first * c;
          p.c_row = c;
          call.table.gemm(p);
          if (pass.t == nullptr)
            pass.add_norm_term(first, 1, count, t);
        }
        if (pass.weights == nullptr)
          continue;
        const float* x = pass.x + first * c;
        if (copies) {
          for (int64_t i = 0; i < count; ++i)
            std::copy_n(x + i * c, c, copy.get() + i * stride);
          x = copy.get();
        }
        GemmParams p{};
        p.m = o;
        p.n = c;
        p.k = count;
        p.segments = 1;
        p.a = grad_u.get();
        p.a_row = 1;
        p.a_k = o;
        p.a_offsets = &offset;
        p.b = x;
        p.b_k = stride;
        p.b_panel = call.table.panel;
        p.c = pass.weights + group * o * c;
        p.c_row = c;
        p.add = unit > from;
        call.table.gemm(p);
      }
    }
  });
}

// In contiguous layout a unit is a block of pixels of one image, as in the elementwise passes, and
// the rows of its du lie apart by a little more than kTile, which keeps them in different cache
// sets.
void planar_pointwise(const Pass& pass, const float* filters) {
  const Call& call = pass.call;
  const int64_t c = call.shape.c, o = call.shape.o, pixels = call.shape.output_pixels();
  const int64_t row = kTile + kSlack;
  GradDotParams grad_dot = pass.grad_dot;
  grad_dot.shape.n = call.shape.n;
  grad_dot.grad_y = pass.grad_y;
  grad_dot.kept = pass.kept;
  grad_dot.norm = pass.norm;
  grad_dot.t = pass.t;
  grad_dot.grad_u_row = row;
  const int64_t blocks = grad_dot.shape.blocks();
  run_tasks(pass.groups, [&](int64_t begin, int64_t end) {
    const Scratch grad_u(o * row);
    const int64_t offset = 0;
    GradDotParams dot = grad_dot;
    dot.grad_u = grad_u.get();
    for (int64_t group = begin; group < end; ++group) {
      const auto [from, to] = pass.range(group, call.shape.n * blocks);
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t image = unit / blocks, first = unit % blocks * kTile;
        const int64_t count = std::min(kTile, pixels - first), map = image * pixels + first;
        const int64_t input = image * c * pixels + first;
        call.table.grad_dot(dot, unit, unit + 1);
        if (pass.grad_x != nullptr) {
          GemmParams p{};
          p.m = c;
          p.n = count;
          p.k = o;
          p.segments = 1;
          p.a = filters;
          p.a_row = 1;
          p.a_k = c;
          p.a_offsets = &offset;
          p.b = grad_u.get();
          p.b_k = row;
          p.b_panel = call.table.panel;
          p.c = pass.grad_x + input;
          p.c_row = pixels;
          call.table.gemm(p);
          if (!pass.barrier)
            pass.add_planar_norm_term(input, count, pass.t + map);
        }
        if (pass.weights == nullptr)
          continue;
        InnerParams p{};
        p.m = o;
        p.n = c;
        p.k = count;
        p.a = grad_u.get();
        p.a_row = row;
        p.b = pass.x + input;
        p.b_row = pixels;
        p.c = pass.weights + group * o * c;
        p.c_row = c;
        p.add = unit > from;
        call.table.inner_products(p);
      }
    }
  });
}

// du of one image with the zeros that windows of dx reach, [h + reach, w + reach, o].
struct PaddedGrad {
  explicit PaddedGrad(const ConvShape& shape)
      : shape(shape), row((shape.columns.input + reach(shape.columns)) * shape.o),
        rows(shape.rows.input + reach(shape.rows)) {}

  static int64_t reach(const Axis& axis) { return (axis.kernel - 1) * axis.dilation; }

  void copy(const float* grad_u, float* to) const {
    const int64_t top = reach(shape.rows) - shape.rows.before;
    const int64_t left = reach(shape.columns) - shape.columns.before;
    const int64_t width = row / shape.o, q = shape.columns.output, o = shape.o;
    // Columns of du that fall inside.
    const int64_t first = std::max<int64_t>(-left, 0), last = std::min(q, width - left);
    std::fill_n(to, rows * row, 0.0f);
    for (int64_t i = 0; i < rows; ++i)
      if (i >= top && i - top < shape.rows.output && last > first)
        std::copy_n(
            grad_u + ((i - top) * q + first) * o,
            (last - first) * o,
            to + i * row + (left + first) * o
        );
  }

  const ConvShape& shape;
  int64_t row, rows;
};

void windows(const Pass& pass) {
  const Call& call = pass.call;
  const ConvShape& shape = call.shape;
  const int64_t c = shape.c, o = shape.o, size = shape.filter_size();
  const int64_t w = shape.columns.input, p_rows = shape.rows.output, q = shape.columns.output;
  const PaddedRows padded(shape, true);
  const PaddedGrad padded_grad(shape);
  const std::vector<int64_t> patch = patch_offsets(shape, padded.row(), c);
  const std::vector<int64_t> turned = patch_offsets(shape, padded_grad.row, o);
  const int64_t part = size / static_cast<int64_t>(patch.size());
  std::vector<int64_t> grad_rows;
  for (int64_t i = 0; i < p_rows; ++i)
    grad_rows.push_back(i * q * o);
  const WindowParams window = padded.window(0.0);
  run_tasks(pass.groups, [&](int64_t begin, int64_t end) {
    const bool needs_x = pass.grad_x != nullptr, needs_weight = pass.weights != nullptr;
    const Scratch grad_u(shape.output_pixels() * o), t_image(shape.output_pixels());
    const Scratch t_sums(needs_x ? shape.input_pixels() : 0);
    const Scratch wide(needs_x ? padded_grad.rows * padded_grad.row : 0);
    const Scratch rows(needs_weight ? padded.scratch(p_rows) : 0);
    for (int64_t group = begin; group < end; ++group) {
      const auto [from, to] = pass.range(group, shape.n);
      for (int64_t image = from; image < to; ++image) {
        const int64_t pixel = image * shape.input_pixels(), position = image * p_rows * q;
        float* t = pass.t == nullptr ? t_image.get() : pass.t + position;
        pass.positions(image, position, p_rows * q, grad_u.get(), t);
        if (needs_x) {
          padded_grad.copy(grad_u.get(), wide.get());
          GemmParams p = pass.turned->product(call.table, static_cast<int64_t>(turned.size()));
          p.m = w;
          p.a_row = o;
          p.a_k = 1;
          p.a_offsets = turned.data();
          p.c_row = c;
          for (int64_t h = 0; h < shape.rows.input; ++h) {
            p.a = wide.get() + h * padded_grad.row;
            p.c = pass.grad_x + (pixel + h * w) * c;
            call.table.gemm(p);
          }
          if (pass.t == nullptr) {
            call.table.window_transposed(window, t, t_sums.get(), 0, shape.rows.input);
            pass.add_norm_term(pixel, shape.rows.input, w, t_sums.get());
          }
        }
        if (!needs_weight)
          continue;
        const float* patches = padded.copy(pass.x + pixel * c, 0, p_rows, rows.get());
        GemmParams p{};
        p.m = o;
        p.n = part;
        p.k = q;
        p.segments = p_rows;
        p.a = grad_u.get();
        p.a_row = 1;
        p.a_k = o;
        p.a_offsets = grad_rows.data();
        p.b_k = c;
        p.b_segment = padded.row();
        p.b_panel = call.table.panel;
        p.c_row = size;
        p.add = image > from;
        for (std::size_t i = 0; i < patch.size(); ++i) {
          p.b = patches + patch[i];
          p.c = pass.weights + group * o * size + static_cast<int64_t>(i) * part;
          call.table.gemm(p);
        }
      }
    }
  });
}

// The sum of the groups, in order, in the layout of call.weight_last.
Tensor summed(const Call& call, const Ints& sizes, const float* weights, int64_t groups) {
  Tensor total = filled(empty(sizes, call.compute, true), 0.0);
  const int64_t count = total.numel();
  float* to = static_cast<float*>(total.mutable_data_ptr());
  run_tasks((count + kTask - 1) / kTask, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kTask, last = std::min(end * kTask, count);
    for (int64_t group = 0; group < groups; ++group)
      call.table.accumulate(weights + group * count, to, first, last);
  });
  return contiguous(total, call.weight_last);
}

}  // namespace

BackwardResults fused_backward(const Call& call, const BackwardInputs& in) {
  const ConvShape& shape = call.shape;
  const bool last = shape.channels_last;
  const bool needs_x = in.needs & kX, needs_weight = in.needs & kWeight;
  // The mean of the norms depends on every patch: t is finished after all of the batch.
  const bool barrier = in.batch_mean && in.norm_grad && needs_x;
  const Tensor x = contiguous(in.x, last), grad_y = contiguous(in.grad_y, last);
  const Tensor kept = contiguous(in.kept, last);
  const Weight weight = make_weight(call, in.weight, in.eps);
  const double factor = backward_factor<float>(call, in);
  const FilterVectors<float> vectors(call, weight.a, in.radius, factor, in.k, std::nullopt);
  std::optional<PackedFilters> turned;
  if (needs_x && last)
    turned.emplace(call, weight.stored, true);

  // Positions of a unit of work: in contiguous layout the epilogue's own, else what suits the
  // cache.
  const int64_t block = !last                 ? shape.output_pixels()
                        : is_pointwise(shape) ? pointwise_block(shape)
                                              : shape.output_pixels();
  GradDotParams grad_dot{};
  grad_dot.shape = positions_of(call, 1, vectors.radius_per_filter);
  grad_dot.shape.pixels = block;
  grad_dot.op = call.op;
  grad_dot.filters = vectors.pointers();
  grad_dot.kept_is = in.kept_is;
  const int64_t sums_per_unit = last ? grad_dot.shape.tasks() : 1;
  const int64_t units =
      last ? (shape.positions() + block - 1) / block : shape.n * grad_dot.shape.blocks();
  ParameterSums<float> sums(call, in, barrier);
  grad_dot.sums = sums.prepare(units * sums_per_unit);

  const auto none = [&] { return empty({0}, call.storage); };
  const Ints input_sizes{shape.n, shape.c, shape.rows.input, shape.columns.input};
  Tensor grad_x = needs_x ? empty(input_sizes, call.storage, last) : none();
  const bool whole_t = barrier || (needs_x && !last);
  Tensor t = empty({whole_t ? call.map_elements() : 0}, call.compute);
  const int64_t groups = needs_weight ? std::min(units, most_groups(shape)) : units;
  const Scratch weights(needs_weight ? groups * shape.o * shape.filter_size() : 0);
  const Pass pass{
      call,
      turned.has_value() ? &*turned : nullptr,
      grad_dot,
      static_cast<const float*>(grad_y.const_data_ptr()),
      static_cast<const float*>(kept.const_data_ptr()),
      static_cast<const float*>(in.norm_map.const_data_ptr()),
      static_cast<const float*>(x.const_data_ptr()),
      needs_x ? static_cast<float*>(grad_x.mutable_data_ptr()) : nullptr,
      whole_t ? static_cast<float*>(t.mutable_data_ptr()) : nullptr,
      needs_weight ? weights.get() : nullptr,
      groups,
      sums_per_unit,
      barrier
  };
  if (!last) {
    planar_pointwise(pass, static_cast<const float*>(weight.stored.const_data_ptr()));
  } else if (is_pointwise(shape)) {
    pointwise(pass);
  } else {
    windows(pass);
  }
  sums.add(units * sums_per_unit);
  const double mean_grad = sums.finish_radius(in, factor);
  if (barrier) {
    add_mean_grad(call, in.norm_map, mean_grad, t);
    const Tensor t_sums =
        PatchNorm(shape, in.eps)
            .transposed(call.table, shape, shape.n, t.const_data_ptr(), call.compute);
    const float* values = static_cast<const float*>(t_sums.const_data_ptr());
    if (last) {
      run_tasks(shape.n * shape.rows.input, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * shape.columns.input;
        pass.add_norm_term(first, end - begin, shape.columns.input, values + first);
      });
    } else {
      const int64_t pixels = shape.output_pixels();
      run_tasks(shape.n, [&](int64_t begin, int64_t end) {
        for (int64_t image = begin; image < end; ++image)
          pass.add_planar_norm_term(image * shape.c * pixels, pixels, values + image * pixels);
      });
    }
  }
  Tensor grad_weight = none();
  if (needs_weight) {
    const Ints sizes(in.weight.sizes().begin(), in.weight.sizes().end());
    const Tensor folded = summed(call, sizes, weights.get(), groups);
    grad_weight = weight_grad<float>(call, in, weight, vectors, folded.const_data_ptr(), sums.a());
  }
  return {
      grad_x,
      grad_weight,
      (in.needs & kBias) != 0 ? sums.grad_bias(call) : none(),
      sums.grad_radius(call, in, factor),
      sums.grad_mean(call, in, mean_grad),
      sums.grad_k(call, in)
  };
}

}  // namespace dcconv::cpu

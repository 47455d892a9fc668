// Backward around the library's convolution, in chunks of images like forward.

#include <algorithm>
#include <vector>

#include "cpu/directions.h"
#include "cpu/library/operands.h"
#include "cpu/operands.h"
#include "cpu/parameter_sums.h"
#include "cpu/patch_norm.h"

namespace dcconv::cpu {

template <class A>
BackwardResults library_backward(const Call& call, const BackwardInputs& in) {
  const ConvShape& shape = call.shape;
  const bool needs_x = in.needs & kX, needs_weight = in.needs & kWeight;
  // The mean of the norms depends on every patch: t is finished after all of the batch.
  const bool barrier = in.batch_mean && in.norm_grad && needs_x && !call.norm_free;
  const Tensor x = contiguous(in.x, shape.channels_last);
  const Tensor grad_y = contiguous(in.grad_y, shape.channels_last);
  const Tensor kept = call.norm_free ? in.kept : contiguous(in.kept, shape.channels_last);
  const Weight weight = make_weight(call, in.weight, in.eps);
  // Results that are not wanted; outputs of an op must not alias each other.
  const auto none = [&] { return empty({0}, call.storage); };

  const double factor = backward_factor<A>(call, in);
  const FilterVectors<A> filters(call, weight.a, in.radius, factor, in.k, std::nullopt);

  const Ints input_sizes{shape.n, shape.c, shape.rows.input, shape.columns.input};
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

  ParameterSums<A> sums(call, in, barrier);
  GradDotParams p{};
  p.op = call.op;
  p.filters = filters.pointers();
  p.kept_is = in.kept_is;

  const PatchNorm patch_norm(shape, in.eps);
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
    const Tensor t_sums = patch_norm.transposed(call.table, shape, count, t_images, call.compute);
    g.n = count;
    g.library_grad = library_grad;
    g.x = at(x, first * image_input);
    g.t = t_sums.const_data_ptr();
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
      p.norm = at(in.norm_map, first * image_map);
      p.grad_u = grad_u.mutable_data_ptr();
      p.t = needs_x ? at(t, barrier ? first * image_map : 0) : nullptr;
      p.sums = sums.prepare(tasks);
      run_tasks(tasks, [&](int64_t begin, int64_t end) { call.table.grad_dot(p, begin, end); });
      sums.add(tasks);
      du = images(grad_u, 0, count);
    }
    const bool bias_by_library = call.norm_free && (in.needs & kBias) != 0;
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
      grad_x = with_exact_strides(dense, shape.channels_last);
    if (call.norm_free) {
      if (!reuse) {
        // Fold the padding back and round: the pass with t = 0.
        const Tensor zero = filled(empty({count * image_map}, call.compute), 0.0);
        finish_input(first, count, dense.const_data_ptr(), zero.const_data_ptr());
      }
    } else if (barrier) {
      library_grads.push_back(dense);
    } else {
      finish_input(first, count, dense.const_data_ptr(), t.const_data_ptr());
    }
  }

  const double mean_grad = sums.finish_radius(in, factor);
  if (barrier && shape.n > 0) {
    add_mean_grad(call, in.norm_map, mean_grad, t);
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

  if (needs_weight)
    grad_weight = weight_grad<A>(call, in, weight, filters, weight_sum.data(), sums.a());
  if ((in.needs & kBias) != 0) {
    if (shape.n == 0) {
      grad_bias = filled(empty({shape.o}, call.storage), 0.0);
    } else if (call.norm_free) {
      Tensor by_library = empty({shape.o}, call.compute);
      std::copy(bias_sum.begin(), bias_sum.end(), static_cast<A*>(by_library.mutable_data_ptr()));
      grad_bias = to_dtype(by_library, call.storage);
    } else {
      grad_bias = sums.grad_bias(call);
    }
  }
  return {
      grad_x,
      grad_weight,
      grad_bias,
      sums.grad_radius(call, in, factor),
      sums.grad_mean(call, in, mean_grad),
      sums.grad_k(call, in)
  };
}

template BackwardResults library_backward<float>(const Call&, const BackwardInputs&);
template BackwardResults library_backward<double>(const Call&, const BackwardInputs&);

}  // namespace dcconv::cpu

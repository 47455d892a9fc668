// Forward around the library's convolution: the batch goes through in chunks of images, each
// through the library and the fused passes while its data is in cache.

#include <algorithm>
#include <vector>

#include "cpu/directions.h"
#include "cpu/library/operands.h"
#include "cpu/operands.h"
#include "cpu/patch_norm.h"

namespace dcconv::cpu {

template <class A>
ForwardResults library_forward(const Call& call, const ForwardInputs& in) {
  const ConvShape& shape = call.shape;
  const Tensor x = contiguous(in.x, shape.channels_last);
  const Weight weight = make_weight(call, in.weight, in.eps);
  const Ints sizes{shape.n, shape.o, shape.rows.output, shape.columns.output};
  Tensor mean = empty(in.batch_mean ? Ints{} : Ints{0}, call.compute);
  Tensor norm_map = empty({call.norm_free ? 0 : call.map_elements()}, call.compute);
  const bool wants_dot = in.keep_dot && !call.norm_free;
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

  const PatchNorm patch_norm(shape, in.eps);
  double factor = 1.0;
  if (!call.norm_free && in.batch_mean) {
    factor = batch_norms<A>(call, patch_norm, x, in.sums_from(shape, 0), norm_map, mean);
  } else if (in.norm_mean.has_value()) {
    factor = scalar_of<A>(*in.norm_mean, call.compute);
  }
  std::optional<Tensor> compute_bias, library_bias;
  if (in.bias.has_value()) {
    if (call.norm_free) {
      library_bias = to_dtype(*in.bias, call.library);
    } else {
      compute_bias = to_dtype(*in.bias, call.compute);
    }
  }
  const FilterVectors<A> filters(call, weight.a, in.radius, factor, in.k, compute_bias);
  const TanhCosineScales scales(call, filters);

  EpilogueParams p{};
  p.op = call.op;
  p.filters = filters.pointers();
  p.bias = filters.bias.empty() ? nullptr : filters.bias.data();
  p.scales = scales.pointers();
  const int64_t image_map = shape.groups * shape.output_pixels();
  const int64_t image_output = shape.o * shape.output_pixels();
  for (int64_t first = 0; first < std::max<int64_t>(shape.n, 1); first += call.chunk) {
    const int64_t count = std::min(call.chunk, shape.n - first);
    const Tensor x_chunk = images(x, first, count);
    if (!call.norm_free && !in.batch_mean)
      patch_norm.norms(
          call.table,
          shape,
          count,
          x_chunk.const_data_ptr(),
          in.sums_from(shape, first),
          at(norm_map, first * image_map),
          nullptr
      );
    Tensor u =
        convolution(library_input(call, x_chunk), weight.library, library_bias, call.geometry);
    u = contiguous(u, shape.channels_last);
    if (one_chunk) {
      u = with_exact_strides(u, shape.channels_last);
      if (wants_dot) {
        dot = u;
      } else {
        y = u;
      }
    }
    const int64_t offset = first * image_output, elements = count * image_output;
    if (call.norm_free) {
      // The library's float result is rounded once.
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
  return {y, in.keep_map ? norm_map : empty({0}, call.compute), mean, dot};
}

template ForwardResults library_forward<float>(const Call&, const ForwardInputs&);
template ForwardResults library_forward<double>(const Call&, const ForwardInputs&);

}  // namespace dcconv::cpu

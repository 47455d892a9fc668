// Forward in one pass: x is read once, y written once, and dot products stay in cache.

#include "cpu/fused/fused.h"
#include "cpu/fused/operands.h"

namespace dcconv::cpu {
namespace {

// What the tasks of one call share.
struct Pass {
  const Call& call;
  const PackedFilters* filters;  // null in contiguous layout
  EpilogueParams epilogue;       // without shape and pointers to maps
  const float* x;
  float* norm;
  float* y;
  float* dot;  // null unless kept
  double eps;
  bool norms;  // whether norms are computed here

  // Products that write y from position `first` on: its values where the product makes them, else
  // u.
  void write(GemmParams& p, int64_t first) const {
    p.c = y + first * call.shape.o;
    p.c_row = call.shape.o;
    if (dot == nullptr) {
      p.scales = epilogue.scales;
      p.norm = norm + first;
    }
  }

  // Whether the products write y: values, not u.
  bool writes_values() const { return dot == nullptr && epilogue.scales != nullptr; }

  // What takes y, which holds u, to its values; `first` is its first position.
  EpilogueParams rest(int64_t first, int64_t count) const {
    EpilogueParams p = epilogue;
    const int64_t offset = first * call.shape.o;
    p.shape.n = 1;
    p.shape.pixels = count;
    p.norm = norm + first;
    p.u = p.y = y + offset;
    p.dot = dot == nullptr ? nullptr : dot + offset;
    return p;
  }

  // Sums of squares of `count` pixels.
  void squares(const float* pixels, int64_t count, float* sums) const {
    const PixelSumsqParams p{1, count, call.shape.c, 1, true, pixels, sums};
    call.table.pixel_sumsq(p, 0, p.tasks());
  }

  // The pixels of x that positions [first, first + count) see, where windows are single pixels: x
  // itself where they are neighbours, else a copy in `scratch`.
  const float* sample(int64_t first, int64_t count, float* scratch) const {
    const ConvShape& s = call.shape;
    if (is_pointwise(s))
      return x + first * s.c;
    for (int64_t i = first; i < first + count; ++i, scratch += s.c) {
      const int64_t image = i / s.output_pixels(), pixel = i % s.output_pixels();
      const int64_t row = pixel / s.columns.output * s.rows.stride;
      const int64_t column = pixel % s.columns.output * s.columns.stride;
      std::copy_n(
          x + (image * s.input_pixels() + row * s.columns.input + column) * s.c, s.c, scratch
      );
    }
    return scratch - count * s.c;
  }
};

void pointwise(const Pass& pass) {
  const Call& call = pass.call;
  const int64_t c = call.shape.c, positions = call.shape.positions();
  const int64_t block = pointwise_block(call.shape);
  run_tasks((positions + block - 1) / block, [&](int64_t begin, int64_t end) {
    const Scratch sums(block), rows(is_pointwise(call.shape) ? 0 : block * c);
    const int64_t offset = 0, source = 0;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * block, count = std::min(block, positions - first);
      const float* x = pass.sample(first, count, rows.get());
      if (pass.norms) {
        pass.squares(x, count, sums.get());
        const Axis one{1, 1, 1, 1, 1, 0, 0, PaddingMode::zeros};
        const Axis line{count, count, 1, 1, 1, 0, 0, PaddingMode::zeros};
        const WindowParams window{1, 1, one, line, &source, nullptr, pass.eps};
        call.table.window_norm(window, sums.get(), pass.norm + first, nullptr, 0, 1);
      }
      GemmParams p = pass.filters->product(call.table, 1);
      p.m = count;
      p.a = x;
      p.a_row = c;
      p.a_k = 1;
      p.a_offsets = &offset;
      pass.write(p, first);
      call.table.gemm(p);
      if (!pass.writes_values()) {
        const EpilogueParams rest = pass.rest(first, count);
        call.table.epilogue(rest, 0, rest.shape.tasks());
      }
    }
  });
}

// The same in contiguous layout: a task is a block of pixels of one image, as in the epilogue; its
// x goes into panels, its filters are read as they are.
void planar_pointwise(const Pass& pass, const float* filters) {
  const Call& call = pass.call;
  const int64_t c = call.shape.c, o = call.shape.o, pixels = call.shape.output_pixels();
  const int64_t panel = call.table.panel, panels = (kTile + panel - 1) / panel;
  EpilogueParams epilogue = pass.epilogue;
  epilogue.norm = pass.norm;
  epilogue.u = epilogue.y = pass.y;
  epilogue.dot = pass.dot;
  const int64_t blocks = epilogue.shape.blocks();
  run_tasks(call.shape.n * blocks, [&](int64_t begin, int64_t end) {
    const Scratch packed(panels * panel * c), sums(pixels);
    const int64_t offset = 0, source = 0;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks, first = task % blocks * kTile;
      const int64_t count = std::min(kTile, pixels - first), map = image * pixels + first;
      const float* x = pass.x + image * c * pixels + first;
      const PanelParams pack{c, count, x, pixels, 1, packed.get(), c * panel};
      call.table.pack_panels(pack, 0, (count + panel - 1) / panel);
      if (pass.norms) {
        const PixelSumsqParams squares{1, pixels, c, 1, false, x - first, sums.get()};
        call.table.pixel_sumsq(squares, task % blocks, task % blocks + 1);
        const Axis one{1, 1, 1, 1, 1, 0, 0, PaddingMode::zeros};
        const Axis line{count, count, 1, 1, 1, 0, 0, PaddingMode::zeros};
        const WindowParams window{1, 1, one, line, &source, nullptr, pass.eps};
        call.table.window_norm(window, sums.get() + first, pass.norm + map, nullptr, 0, 1);
      }
      GemmParams p{};
      p.m = o;
      p.n = count;
      p.k = c;
      p.segments = 1;
      p.a = filters;
      p.a_row = c;
      p.a_k = 1;
      p.a_offsets = &offset;
      p.b = packed.get();
      p.b_k = panel;
      p.b_panel = c * panel;
      p.c = pass.y + image * o * pixels + first;
      p.c_row = pixels;
      call.table.gemm(p);
      call.table.epilogue(epilogue, task, task + 1);
    }
  });
}

// Output rows at a time: u and the rows of x below it take about half of a second-level cache of
// 512 KB, and there are 32 tasks or more where the problem has the rows for it.
int64_t window_block(const ConvShape& shape) {
  const int64_t bytes =
      4 * (shape.columns.output * shape.o + shape.columns.padded() * shape.c * shape.rows.stride);
  const int64_t fitting = (int64_t{256} << 10) / bytes;
  const int64_t shared = (shape.n * shape.rows.output + 31) / 32;
  return std::max<int64_t>(1, std::min({fitting, shared, shape.rows.output}));
}

void windows(const Pass& pass) {
  const Call& call = pass.call;
  const ConvShape& shape = call.shape;
  const int64_t q = shape.columns.output;
  const int64_t block = window_block(shape), blocks = (shape.rows.output + block - 1) / block;
  const PaddedRows padded(shape);
  const std::vector<int64_t> offsets = patch_offsets(shape, padded.row(), shape.c);
  const WindowParams window = padded.window(pass.eps);
  run_tasks(shape.n * blocks, [&](int64_t begin, int64_t end) {
    const Scratch sums(pass.norms ? shape.input_pixels() : 0), rows(padded.scratch(block));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks, first = task % blocks * block;
      const int64_t count = std::min(block, shape.rows.output - first);
      const int64_t pixel = image * shape.input_pixels();
      const int64_t position = image * shape.output_pixels();
      if (pass.norms) {
        const auto [low, high] = padded.shown(first, count);
        const int64_t skipped = low * shape.columns.input;
        pass.squares(
            pass.x + (pixel + skipped) * shape.c,
            (high - low) * shape.columns.input,
            sums.get() + skipped
        );
        call.table.window_norm(
            window, sums.get(), pass.norm + position, nullptr, first, first + count
        );
      }
      const float* patches = padded.copy(pass.x + pixel * shape.c, first, count, rows.get());
      GemmParams p = pass.filters->product(call.table, static_cast<int64_t>(offsets.size()));
      p.m = q;
      p.a_row = shape.columns.stride * shape.c;
      p.a_k = 1;
      p.a_offsets = offsets.data();
      for (int64_t i = 0; i < count; ++i) {
        p.a = patches + i * shape.rows.stride * padded.row();
        pass.write(p, position + (first + i) * q);
        call.table.gemm(p);
      }
      if (!pass.writes_values()) {
        const EpilogueParams rest = pass.rest(position + first * q, count * q);
        call.table.epilogue(rest, 0, rest.shape.tasks());
      }
    }
  });
}

}  // namespace

ForwardResults fused_forward(const Call& call, const ForwardInputs& in) {
  const ConvShape& shape = call.shape;
  const bool last = shape.channels_last;
  const Tensor x = contiguous(in.x, last);
  const Weight weight = make_weight(call, in.weight, in.eps);
  const Ints sizes{shape.n, shape.o, shape.rows.output, shape.columns.output};
  Tensor mean = empty(in.batch_mean ? Ints{} : Ints{0}, call.compute);
  Tensor norm_map = empty({call.map_elements()}, call.compute);
  Tensor y = empty(sizes, call.storage, last);
  Tensor dot = in.keep_dot ? empty(sizes, call.storage, last) : empty({0}, call.storage);
  double factor = 1.0;
  const PatchNorm patch_norm(shape, in.eps);
  const void* sums = in.sums_from(shape, 0);
  if (in.batch_mean) {
    factor = batch_norms<float>(call, patch_norm, x, sums, norm_map, mean);
  } else {
    if (sums != nullptr)
      patch_norm.norms(
          call.table, shape, shape.n, x.const_data_ptr(), sums, norm_map.mutable_data_ptr(), nullptr
      );
    if (in.norm_mean.has_value())
      factor = scalar_of<float>(*in.norm_mean, call.compute);
  }
  std::optional<Tensor> bias;
  if (in.bias.has_value())
    bias = to_dtype(*in.bias, call.compute);
  const FilterVectors<float> vectors(call, weight.a, in.radius, factor, in.k, bias);
  const TanhCosineScales scales(call, vectors);
  EpilogueParams epilogue{};
  epilogue.shape = positions_of(call, shape.n, vectors.radius_per_filter);
  epilogue.op = call.op;
  epilogue.filters = vectors.pointers();
  epilogue.bias = vectors.bias.empty() ? nullptr : vectors.bias.data();
  epilogue.scales = scales.pointers();
  std::optional<PackedFilters> packed;
  if (last)
    packed.emplace(call, weight.stored, false);
  const Pass pass{
      call,
      last ? &*packed : nullptr,
      epilogue,
      static_cast<const float*>(x.const_data_ptr()),
      static_cast<float*>(norm_map.mutable_data_ptr()),
      static_cast<float*>(y.mutable_data_ptr()),
      in.keep_dot ? static_cast<float*>(dot.mutable_data_ptr()) : nullptr,
      in.eps,
      !in.batch_mean && sums == nullptr
  };
  if (!last) {
    planar_pointwise(pass, static_cast<const float*>(weight.stored.const_data_ptr()));
  } else if (is_sampled(shape)) {
    pointwise(pass);
  } else {
    windows(pass);
  }
  return {y, in.keep_map ? norm_map : empty({0}, call.compute), mean, dot};
}

}  // namespace dcconv::cpu

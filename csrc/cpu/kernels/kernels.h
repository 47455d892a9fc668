// What the CPU kernels take and the table they are called through: one table per instruction set
// and storage dtype. Pointers are untyped here; each kernel knows its types.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels/depthwise_params.h"
#include "operator.h"
#include "shape.h"

namespace dcconv::cpu {

constexpr int kDtypes = 4;

// Elements of one working tile: about eight float buffers of it fit a 32 KB first-level cache.
constexpr int64_t kTile = 512;

// Elements of one task, the unit of parallel work and of partial sums. Fixed, so that results do
// not depend on the number of threads.
constexpr int64_t kTask = 16384;

// Longest sum over channels or filters that is added up term by term where lanes are pixels; longer
// ones are sums of such sums, which rounds less.
constexpr int64_t kAddends = 64;

// Per-filter vectors in compute dtype, [repeat * o]: repeated so that a tile of several positions
// in channels-last order reads them as one vector.
struct Filters {
  const void* a;
  const void* inverse_a;
  const void* rho;
  const void* inverse_rho;
  const void* k;
};

// Layout of a map over positions and filters, n * output_pixels * o elements.
struct Positions {
  int64_t n, pixels, o, groups;
  bool channels_last;
  // Whether h depends on the position alone: no weighting, no radius per filter.
  bool h_per_position;

  int64_t filters_per_group() const { return o / groups; }
  // Channels last: positions in a tile, filters in a tile.
  int64_t tile_rows() const { return o >= kTile ? 1 : kTile / o; }
  int64_t task_rows() const {
    const int64_t tiles = kTask / (tile_rows() * o);
    return (tiles < 1 ? 1 : tiles) * tile_rows();
  }
  int64_t blocks() const { return (pixels + kTile - 1) / kTile; }
  int64_t tasks() const {
    if (channels_last)
      return (n * pixels + task_rows() - 1) / task_rows();
    return n * blocks();
  }
};

// u -> y = h g + bias.
struct EpilogueParams {
  Positions shape;
  Operator op;
  Filters filters;
  const void* u;               // dot products, library dtype
  const void* norm;            // b, [n, pixels, groups] or [n, groups, pixels], compute dtype
  const void* bias;            // [repeat * o], compute dtype, or null
  void* y;                     // storage dtype; may be u
  void* dot;                   // copy of u in storage dtype, or null
  const FilterScales* scales;  // null unless the operator is tanh x cosine in float
};

// Column sums that a backward call needs, each [o] per task.
struct ColumnSums {
  void* rho;   // sum dy g h_rho
  void* a;     // sum dy g h_a
  void* k;     // sum dy h g_k
  void* bias;  // sum dy
};

// dy and (y or u) -> du, t0 = sum_o dy (d g + h e) / b^2, column sums.
struct GradDotParams {
  Positions shape;
  Operator op;
  Filters filters;
  Kept kept_is;
  const void* grad_y;  // storage dtype
  const void* kept;    // storage dtype
  const void* norm;    // b
  void* grad_u;        // library dtype
  // Contiguous layout: 0, or the distance of filters in a grad_u that holds one task alone.
  int64_t grad_u_row;
  void* t;          // like norm, or null
  ColumnSums sums;  // per task; null members are not computed
};

// Window sums of a map of `planes` images with `width` interleaved values per pixel.
struct WindowParams {
  int64_t planes;
  int64_t width;
  Axis rows, columns;
  const int64_t* row_sources;     // [padded rows]
  const int64_t* column_sources;  // [padded columns]
  double eps;
};

struct PixelSumsqParams {
  int64_t n, pixels, c, groups;
  bool channels_last;
  const void* x;
  void* sums;  // [n, pixels, groups] or [n, groups, pixels], compute dtype

  int64_t task_pixels() const {
    const int64_t pixels_per_task = kTask / c;
    return pixels_per_task < 1 ? 1 : pixels_per_task;
  }
  int64_t blocks() const { return (pixels + kTile - 1) / kTile; }
  int64_t tasks() const {
    if (channels_last)
      return (n * pixels + task_pixels() - 1) / task_pixels();
    return n * groups * blocks();
  }
};

// y = max(0, x scale[c] + shift[c]), and the sums of squares of y as stored.
struct AffineReluParams {
  int64_t n, pixels, c, groups;
  bool channels_last;
  const void* x;      // storage dtype
  const void* scale;  // [c], compute dtype
  const void* shift;  // [c], compute dtype
  void* y;            // storage dtype
  void* sums;         // as in PixelSumsqParams

  PixelSumsqParams squares() const { return {n, pixels, c, groups, channels_last, y, sums}; }
};

// dx = fold(library gradient of the padded input) + x * t.
struct GradInputParams {
  int64_t n, c, groups;
  Axis rows, columns;  // sources of the padding that was done for the library
  bool channels_last;
  const int64_t* row_starts;  // padded rows that show a row: [row_starts[h], row_starts[h + 1])
  const int64_t* row_list;
  const int64_t* column_starts;
  const int64_t* column_list;
  const void* library_grad;  // library dtype, padded size; null for x * t alone
  const void* x;             // storage dtype
  const void* t;             // window sums of t, like the pixel sums
  void* grad_x;              // storage dtype; may be library_grad when nothing was padded
  // Contiguous layout without padding: 0, or the distance of planes that are parts of larger ones.
  int64_t plane;

  int64_t tasks() const { return channels_last ? n * rows.input : n * c; }
};

// One row of the filter side: norms, and the gradient of the filters.
struct FilterParams {
  int64_t o;
  int64_t size;  // c / groups * r * s
  double eps;
  const void* weight;       // storage dtype, [o, size]
  void* a;                  // [o], compute dtype
  void* scaled;             // weight * scale[o] in library dtype, or null
  const void* scale;        // [o], compute dtype
  const void* grad_folded;  // gradient of the library's weight, compute dtype, [o, size]
  const void* extra;        // [o]: dL/da, or null
  const void* grad_scale;   // [o]: factor of grad_folded, or null
  bool project;             // subtract <grad, w> / a^2 w
  void* grad_weight;        // storage dtype, [o, size]
};

// c = a b, or c + a b: c [m, n]; the sums run over `segments` parts of k values each. Reads whole
// vectors of b: up to 15 floats behind the last column.
struct GemmParams {
  int64_t m, n, k, segments;
  const float* a;
  int64_t a_row, a_k;
  const int64_t* a_offsets;  // [segments], where each begins in a
  const float* b;
  int64_t b_k, b_segment;
  int64_t b_panel;  // distance of every `Kernels::panel` columns
  float* c;
  int64_t c_row;
  bool add;
  // Null, or c becomes tanh x cosine of the dot products: its columns are filters, and b of its
  // rows is in norm.
  const FilterScales* scales;
  const float* norm;
};

// c = a b^T, or c + a b^T: a [m, k] and b [n, k] with neighbouring values in rows.
struct InnerParams {
  int64_t m, n, k;
  const float* a;
  int64_t a_row;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  bool add;
};

// A matrix [k, n] of any strides -> panels of `Kernels::panel` columns, [panels, k, panel].
struct PanelParams {
  int64_t k, n;
  const float* from;
  int64_t from_k, from_n;
  float* to;
  int64_t to_panel;  // distance of panels
};

// Function values and derivatives, for tests and the accuracy benchmark.
struct FunctionParams {
  Operator op;
  int64_t count;
  const void *a, *b, *rho, *c, *k;
  void *out0, *out1, *out2, *out3;
};

struct Kernels {
  const char* isa;
  std::size_t compute_size;  // bytes of a compute value
  void (*pixel_sumsq)(const PixelSumsqParams&, int64_t begin, int64_t end);
  // The same tasks: those of `squares`.
  void (*affine_relu)(const AffineReluParams&, int64_t begin, int64_t end);
  // sums -> b = sqrt(window sum + eps); row_sums [planes * output rows] in double, or null.
  void (*window_norm)(
      const WindowParams&, const void* sums, void* b, double* row_sums, int64_t begin, int64_t end
  );
  // t over outputs -> its transposed window sum over inputs.
  void (*window_transposed)(
      const WindowParams&, const void* t, void* out, int64_t begin, int64_t end
  );
  void (*epilogue)(const EpilogueParams&, int64_t begin, int64_t end);
  void (*grad_dot)(const GradDotParams&, int64_t begin, int64_t end);
  void (*grad_input)(const GradInputParams&, int64_t begin, int64_t end);
  void (*filter_norm)(const FilterParams&, int64_t begin, int64_t end);
  void (*filter_grad)(const FilterParams&, int64_t begin, int64_t end);
  // t <- grad_b / b, or t <- t + add / b when grad_b is null; elementwise over a map.
  void (*finish_t)(const void* b, const void* grad_b, double add, void* t, int64_t b0, int64_t b1);
  // to <- to + from, storage or library dtype into compute dtype.
  void (*accumulate)(const void* from, void* to, int64_t begin, int64_t end);
  // library dtype to storage dtype
  void (*round)(const void* from, void* to, int64_t begin, int64_t end);
  void (*depthwise_forward)(const DepthwiseParams&, int64_t begin, int64_t end);
  void (*depthwise_backward)(const DepthwiseGradParams&, int64_t begin, int64_t end);
  void (*magnitude)(const FunctionParams&);
  void (*angular)(const FunctionParams&);
  // Float32 products, and the columns in a panel of theirs.
  void (*gemm)(const GemmParams&);
  void (*inner_products)(const InnerParams&);
  void (*pack_panels)(const PanelParams&, int64_t begin, int64_t end);
  int64_t panel;
};

// float_library: whether the library convolves bfloat16 in float32, as it does float16 anyhow.
namespace baseline {
const Kernels& kernels(Dtype dtype, bool float_library);
}
namespace avx2 {
const Kernels& kernels(Dtype dtype, bool float_library);
}
namespace avx512 {
const Kernels& kernels(Dtype dtype, bool float_library);
}

}  // namespace dcconv::cpu

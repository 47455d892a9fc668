// What the CUDA passes take and the functions that launch them: one per pass. Pointers are device
// pointers, untyped here; `dtype` is the storage dtype T, norms and sums are in compute dtype A.
// Maps over positions are [n, pixels, groups] in channels-last order, [n, groups, pixels]
// otherwise.
#pragma once

#include <cstdint>

#include "elementary.h"
#include "operator.h"
#include "shape.h"

namespace dcconv::cuda {

using Stream = void*;  // cudaStream_t

// One axis of a window in the 32-bit arithmetic of kernels.
struct WindowAxis {
  int input;   // h or w
  int output;  // p or q
  int kernel;  // r or s
  int stride;
  int dilation;
  int before;  // padding at the start
  int after;   // padding at the end
  PaddingMode mode;
};

struct Window {
  WindowAxis rows, columns;
};

// Per-filter operands; absent ones are null. A stride is 0 for a scalar, 1 for [o].
struct FilterOperands {
  const void* a;       // [o]
  const void* radius;  // A
  int radius_stride;
  const void* mean;  // A, one value: factor of radius
  const void* k;     // A
  int k_stride;
};

// x -> sums of squares over the channels of a group, per pixel.
struct PixelSumsqParams {
  int64_t n, pixels;
  int c, groups;
  bool channels_last;
  const void* x;  // T
  void* sums;     // A, map over input pixels
};

// x -> y = max(0, x scale[c] + shift[c]) and the sums of squares of y as stored.
struct AffineReluParams {
  int64_t n, pixels;
  int c, groups;
  bool channels_last;
  const void* x;      // T
  const void* scale;  // A [c]
  const void* shift;  // A [c]
  void* y;            // T
  void* sums;         // A, map over pixels
};

// Sums of squares -> b = sqrt(window sum + eps).
struct WindowNormParams {
  int64_t n;
  int groups;
  Window window;
  bool channels_last;
  double eps;
  const void* sums;    // A, map over input pixels
  void* b;             // A, map over output pixels
  double* block_sums;  // [blocks]: partial sums of b, or null
};

// a = sqrt(||w||^2 + eps); scaled = weight * alpha, / a with `divide`; the mean of b.
struct FilterNormParams {
  int64_t o, size;     // weight is [o, size], elements of a filter in any one order
  const void* weight;  // T
  void* a;             // A
  void* scaled;        // T, or null
  double eps, alpha;
  bool divide;
  // The mean is finished here: block_sums [blocks] -> mean, or null.
  const double* block_sums;
  int64_t blocks, map_count;
  void* mean;  // A
};

// u -> y = h(a, b) g(u / (a b)) + bias.
struct EpilogueParams {
  int64_t positions, pixels;  // of outputs: n p q, p q
  int o, groups;
  bool channels_last;
  Operator op;
  FilterOperands filters;
  const void* bias;  // T [o], or null
  const void* u;     // T
  void* y;           // T; may be u
  const void* norm;  // A: b
};

// Kinds of column sums, in the order of their rows in `parts`.
enum Sums { kSumRho = 1, kSumA = 2, kSumK = 4, kSumBias = 8 };

DC_HD int sum_kinds(int sums) {
  return (sums & 1) + (sums >> 1 & 1) + (sums >> 2 & 1) + (sums >> 3 & 1);
}

// dy and (y or u) -> du, t = sum_o dy (d g + h e) / b^2, partial column sums per block.
struct GradDotParams {
  int64_t positions, pixels;  // of outputs: n p q, p q
  int o, groups;
  bool channels_last;
  Operator op;
  Kept kept_is;
  FilterOperands filters;
  const void* grad_y;  // T
  const void* kept;    // T
  const void* norm;    // A: b
  void* grad_u;        // T
  void* t;             // A, map over outputs, or null
  int sums;            // of Sums
  void* parts;         // A [kinds, rows, o], or null
  int64_t rows;        // partial sums per filter, also the number of blocks
};

// Partial column sums -> totals in double, in a fixed order.
struct ColumnSumsParams {
  const void* parts;  // A [kinds, rows, o]
  double* totals;     // [kinds, o]
  int64_t kinds, rows, o;
};

// dw = f (G - <G, w> / a^2 w) + extra / a w with f = alpha / a if divide, else alpha; and the
// gradients of the parameters per filter.
struct FilterGradParams {
  int64_t o, size;
  const void* weight;        // T
  const void* library_grad;  // T: G, or null: no gradient of the weight
  const void* a;             // A
  void* grad_weight;         // T
  double alpha;
  bool divide, project;
  // Column sums, and what they are wanted for; null where not wanted.
  const double* totals;  // [kinds, o]
  int sums;              // of Sums
  FilterOperands filters;
  int64_t map_count;  // elements of b
  void* grad_bias;    // T [o]
  void* grad_radius;  // A [o] or []
  void* grad_mean;    // A []
  void* grad_k;       // A [o] or []
  void* sigma;        // A []: what the mean of b adds to b t
};

// What a window position adds to the gradient of the sums of squares that it sees.
enum class Tap {
  plain,      // t
  with_mean,  // t + sigma / b
  over_norm   // t / b
};

// dx = fold(gradient of the padded input) + x * (transposed window sum of taps).
struct GradInputParams {
  int64_t n;
  int c, groups;
  Window window;
  bool channels_last;
  bool padded;               // whether library_grad belongs to the padded input
  const void* library_grad;  // T, or null
  const void* x;             // T
  Tap tap;
  const void* t;      // A, map over outputs
  const void* norm;   // A: b, unless tap is plain
  const void* sigma;  // A [], for with_mean
  void* grad_x;       // T; may be library_grad when not padded
};

// x and w -> u, b and y = h(a, b) g(u / (a b)) + bias, in one kernel.
struct FusedParams {
  int64_t n;
  int c, o, groups;
  Window window;
  bool channels_last;
  Operator op;
  double eps;
  FilterOperands filters;
  const void* bias;  // T [o], or null
  const void* x;     // T
  const void*
      weight;  // T, [o, r, s, c / groups] for channels-last kernels, else [o, c / groups, r, s]
  const void* map;  // A: b if map_is_norm, else sums of squares over input pixels; or null
  bool map_is_norm;
  void* y;     // T
  void* dot;   // T: u, or null
  void* norm;  // A: b, or null
  int tile;    // configuration, -1 for the rule
};

// du and x -> dx = transposed convolution of du + x * (transposed window sum of taps).
struct FusedGradInputParams {
  int64_t n;
  int c, o, groups;
  Window window;
  bool channels_last;
  const void* grad_u;  // T
  const void* weight;  // T, as in FusedParams
  const void* x;       // T
  Tap tap;
  const void* t;      // A, map over outputs
  const void* norm;   // A: b, unless tap is plain
  const void* sigma;  // A [], for with_mean
  void* grad_x;       // T
  int tile;
};

// du and x -> dw, by partial sums of blocks that a second kernel adds in a fixed order.
struct DepthwiseGradWeightParams {
  int64_t n;
  int c, o;
  Window window;
  bool channels_last;
  const void* grad_u;  // T
  const void* x;       // T
  void* parts;         // A [rows, r s, o]
  int64_t rows;
  void* grad_weight;  // T [o, 1, r, s] or [o, r, s, 1]
};

void pixel_sumsq(Dtype dtype, const PixelSumsqParams& p, Stream stream);
void affine_relu(Dtype dtype, const AffineReluParams& p, Stream stream);
int64_t window_norm_blocks(const WindowNormParams& p);
void window_norm(Dtype dtype, const WindowNormParams& p, Stream stream);
void filter_norm(Dtype dtype, const FilterNormParams& p, Stream stream);
void epilogue(Dtype dtype, const EpilogueParams& p, Stream stream);
void grad_dot(Dtype dtype, const GradDotParams& p, Stream stream);
void column_sums(Dtype dtype, const ColumnSumsParams& p, Stream stream);
void filter_grad(Dtype dtype, const FilterGradParams& p, Stream stream);
void grad_input(Dtype dtype, const GradInputParams& p, Stream stream);
void implicit_gemm(Dtype dtype, const FusedParams& p, Stream stream);
void implicit_gemm_grad_input(Dtype dtype, const FusedGradInputParams& p, Stream stream);
void depthwise(Dtype dtype, const FusedParams& p, Stream stream);
void depthwise_grad_input(Dtype dtype, const FusedGradInputParams& p, Stream stream);
void depthwise_grad_weight(Dtype dtype, const DepthwiseGradWeightParams& p, Stream stream);
void stem(Dtype dtype, const FusedParams& p, Stream stream);

}  // namespace dcconv::cuda

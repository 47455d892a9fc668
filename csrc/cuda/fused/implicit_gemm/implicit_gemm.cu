// The implicit GEMM by dtype and tile, and what it does not take.

#include "check.h"
#include "cuda/fused/implicit_gemm/problem.cuh"
#include "cuda/support/typed.h"

namespace dcconv::cuda {
namespace {

#define DCCONV_NEEDS(holds, ...) DCCONV_CHECK(holds, "kernel implicit_gemm must have ", __VA_ARGS__)

// What forward and gradient have in common.
template <class Params>
void check_call(Dtype dtype, const Params& p) {
  DCCONV_NEEDS(
      dtype == Dtype::bf16 || dtype == Dtype::f16,
      "bfloat16 or float16, got ",
      dtype == Dtype::f32 ? "float32" : "float64"
  );
  DCCONV_NEEDS(p.channels_last, "channels_last tensors, got contiguous ones");
  DCCONV_NEEDS(
      p.c / p.groups % 8 == 0 && p.o / p.groups % 8 == 0,
      "multiples of 8 input channels and filters in each group, got ",
      p.c / p.groups,
      " and ",
      p.o / p.groups
  );
  const WindowAxis axes[] = {p.window.rows, p.window.columns};
  for (const WindowAxis& axis : axes) {
    DCCONV_NEEDS(axis.mode == PaddingMode::zeros, "zero padding, got another mode");
    const int64_t extent = int64_t(axis.kernel) * axis.dilation;
    DCCONV_NEEDS(extent < 1 << 30, "a window below 2^30 pixels, got ", extent);
  }
  DCCONV_NEEDS(
      p.tile >= -1 && p.tile < kGemmTiles, "a tile from -1 to ", kGemmTiles - 1, ", got ", p.tile
  );
}

// The number of the tile.
int prepared(const GemmProblem& p, int64_t outputs, int tile) {
  DCCONV_NEEDS(
      p.rows == 0 || offsets_fit(p, outputs),
      "an image and a weight of less than 2^31 pieces, got an image of ",
      outputs,
      " pixels"
  );
  return tile >= 0 ? tile : gemm_tile(p.rows, p.columns, p.groups, 2 * multiprocessors());
}

}  // namespace

void implicit_gemm(Dtype dtype, const FusedParams& p, Stream stream) {
  check_call(dtype, p);
  const WindowAxis& rows = p.window.rows;
  const WindowAxis& columns = p.window.columns;
  if (p.n == 0)
    return;  // tensors without elements may be null
  const bool padded = rows.before > 0 || rows.after > 0 || columns.before > 0 || columns.after > 0;
  DCCONV_NEEDS(
      p.map != nullptr || (rows.kernel == 1 && columns.kernel == 1 && !padded),
      "a map of norms or sums of squares unless the window is 1x1 without padding, got none for ",
      rows.kernel,
      "x",
      columns.kernel
  );
  DCCONV_NEEDS(
      aligned16(p.x) && aligned16(p.weight) && aligned16(p.y) && aligned16(p.dot),
      "tensors aligned to 16 bytes, got another address"
  );
  const int64_t outputs = int64_t(rows.output) * columns.output;
  const int tile = prepared(forward_problem(p), outputs, p.tile);
  if (dtype == Dtype::bf16)
    implicit_gemm_typed<BFloat16>(p, tile, stream);
  else
    implicit_gemm_typed<Half>(p, tile, stream);
}

void implicit_gemm_grad_input(Dtype dtype, const FusedGradInputParams& p, Stream stream) {
  check_call(dtype, p);
  const WindowAxis& rows = p.window.rows;
  const WindowAxis& columns = p.window.columns;
  DCCONV_NEEDS(
      rows.stride == 1 && columns.stride == 1,
      "stride 1 for the gradient of x, got ",
      rows.stride,
      "x",
      columns.stride
  );
  DCCONV_NEEDS(
      aligned16(p.x) && aligned16(p.weight) && aligned16(p.grad_u) && aligned16(p.grad_x),
      "tensors aligned to 16 bytes, got another address"
  );
  const int64_t inputs = int64_t(rows.input) * columns.input;
  const int tile = prepared(gradient_problem(p), inputs, p.tile);
  if (dtype == Dtype::bf16)
    implicit_gemm_grad_input_typed<BFloat16>(p, tile, stream);
  else
    implicit_gemm_grad_input_typed<Half>(p, tile, stream);
}

}  // namespace dcconv::cuda

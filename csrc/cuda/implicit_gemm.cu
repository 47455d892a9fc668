// The implicit GEMM by dtype and tile, and what it does not take.

#include <sstream>
#include <stdexcept>

#include "cuda/implicit_gemm/problem.cuh"
#include "cuda/typed.h"

namespace dcconv {
namespace cuda {
namespace {

void check(bool holds, const char* rule) {
  if (holds)
    return;
  std::ostringstream text;
  text << "dcconv: kernel implicit_gemm needs " << rule;
  throw std::runtime_error(text.str());
}

// What forward and gradient have in common.
template <class Params>
void check_call(Dtype dtype, const Params& p) {
  check(dtype == Dtype::bf16 || dtype == Dtype::f16, "bfloat16 or float16");
  check(p.channels_last, "channels_last tensors");
  check(
      p.c / p.groups % 8 == 0 && p.o / p.groups % 8 == 0,
      "multiples of 8 input channels and filters in each group"
  );
  const WindowAxis axes[] = {p.window.rows, p.window.columns};
  for (const WindowAxis& axis : axes) {
    check(axis.mode == PaddingMode::zeros, "zero padding");
    check(int64_t(axis.kernel) * axis.dilation < 1 << 30, "a window below 2^30 pixels");
  }
  check(p.tile >= -1 && p.tile < kGemmTiles, "a tile that exists");
}

// The number of the tile.
int prepared(const GemmProblem& p, int64_t outputs, int tile) {
  check(p.rows == 0 || offsets_fit(p, outputs), "an image and a weight of less than 2^31 pieces");
  return tile >= 0 ? tile : gemm_tile(p.rows, p.columns, p.groups, 2 * multiprocessors());
}

}  // namespace

void implicit_gemm(Dtype dtype, const OnePassParams& p, Stream stream) {
  check_call(dtype, p);
  const WindowAxis& rows = p.window.rows;
  const WindowAxis& columns = p.window.columns;
  if (p.n == 0)
    return;  // tensors without elements may be null
  const bool padded = rows.before > 0 || rows.after > 0 || columns.before > 0 || columns.after > 0;
  check(
      p.map != nullptr || (rows.kernel == 1 && columns.kernel == 1 && !padded),
      "a map of norms or sums of squares unless the window is 1x1 without padding"
  );
  check(
      aligned16(p.x) && aligned16(p.weight) && aligned16(p.y) && aligned16(p.dot),
      "tensors aligned to 16 bytes"
  );
  const int64_t outputs = int64_t(rows.output) * columns.output;
  const int tile = prepared(forward_problem(p), outputs, p.tile);
  if (dtype == Dtype::bf16)
    implicit_gemm_typed<BFloat16>(p, tile, stream);
  else
    implicit_gemm_typed<Half>(p, tile, stream);
}

void implicit_gemm_grad_input(Dtype dtype, const OnePassGradInputParams& p, Stream stream) {
  check_call(dtype, p);
  const WindowAxis& rows = p.window.rows;
  const WindowAxis& columns = p.window.columns;
  check(rows.stride == 1 && columns.stride == 1, "stride 1 for the gradient of x");
  check(
      aligned16(p.x) && aligned16(p.weight) && aligned16(p.grad_u) && aligned16(p.grad_x),
      "tensors aligned to 16 bytes"
  );
  const int64_t inputs = int64_t(rows.input) * columns.input;
  const int tile = prepared(gradient_problem(p), inputs, p.tile);
  if (dtype == Dtype::bf16)
    implicit_gemm_grad_input_typed<BFloat16>(p, tile, stream);
  else
    implicit_gemm_grad_input_typed<Half>(p, tile, stream);
}

}  // namespace cuda
}  // namespace dcconv

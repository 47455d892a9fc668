// dx = transposed convolution of du + x * (transposed window sum of taps) in one kernel, at stride
// 1, where the transposed convolution is a convolution with the window turned around.
#pragma once

#include "cuda/fused/implicit_gemm/main_loop.cuh"
#include "cuda/fused/implicit_gemm/row_sums.cuh"

namespace dcconv::cuda {

struct GemmGradientArgs {
  GemmProblem problem;
  GemmGrid grid;
  FusedGradInputParams p;
};

// What the windows that see a row's pixel say about their norms.
template <class Tile>
__device__ __forceinline__ float
transposed_norm(const GemmGradientArgs& args, const GemmPlace<Tile>& place, int row) {
  const float* t = static_cast<const float*>(args.p.t);
  const float* b = static_cast<const float*>(args.p.norm);
  const bool with_mean = args.p.tap == Tap::with_mean;
  const float sigma = with_mean ? *static_cast<const float*>(args.p.sigma) : 0.0f;
  return gathered_sum(args.problem, place.first_row + row, place.group, [&](int64_t i) {
    return with_mean ? t[i] + sigma / b[i] : t[i];
  });
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) implicit_gemm_grad_input_kernel(
    GemmGradientArgs args
) {
  constexpr int kVectors = Tile::kColumns / kPiece, kStride = Tile::kThreads / kVectors;
  const FusedGradInputParams& p = args.p;
  SharedMemory shared;
  unsigned char* stages = shared.take<unsigned char>(Tile::kBytes);
  float* scales = shared.take<float>(Tile::kRows);
  const GemmPlace<Tile> place(args.problem, args.grid);
  const int thread = static_cast<int>(threadIdx.x);
  MainLoop<T, Tile, true, false> loop;
  loop.run(args.problem, place, stages, [&] {
#pragma unroll 1
    for (int row = thread; row < place.rows; row += Tile::kThreads)
      scales[row] = transposed_norm(args, place, row);
  });
  // The product takes the place of the stages.
  __syncthreads();
  float* product = reinterpret_cast<float*>(stages);
  loop.store_product(product);
  __syncthreads();
  const int vector = thread % kVectors, column = place.first_column + vector * kPiece;
  if (column >= args.problem.columns)
    return;
  const int64_t first =
      place.first_row * p.c + int64_t(place.group) * args.problem.columns + column;
  const T* x = static_cast<const T*>(p.x) + first;
  T* grad_x = static_cast<T*>(p.grad_x) + first;
  const auto fetch = [&](int row) {
    Vector<T, kPiece> v{};
    if (row < place.rows)
      v = load_vector<T, kPiece>(x + int64_t(row) * p.c);
    return v;
  };
  const int first_row = thread / kVectors;
  // Two vectors are on their way while a third is worked on.
  Vector<T, kPiece> input = fetch(first_row), next = fetch(first_row + kStride);
#pragma unroll 1
  for (int row = first_row; row < place.rows; row += kStride) {
    const Vector<T, kPiece> after = fetch(row + 2 * kStride);
    const Vector<float, kPiece> sum = product_at<Tile>(product, row, vector);
    const float t = scales[row];
    Vector<T, kPiece> result;
#pragma unroll
    for (int j = 0; j < kPiece; ++j)
      result.at[j] = Store<T>::from(sum.at[j] + load(input.at[j]) * t);
    store_vector(grad_x + int64_t(row) * p.c, result);
    input = next;
    next = after;
  }
}

template <class T, class Tile>
void launch_implicit_gemm_grad_input(const FusedGradInputParams& p, Stream stream) {
  const GemmProblem problem = gradient_problem(p);
  const GemmGradientArgs args{problem, gemm_grid<Tile>(problem), p};
  launch(
      "implicit_gemm_grad_input",
      implicit_gemm_grad_input_kernel<T, Tile>,
      Grid{args.grid.blocks},
      Tile::kThreads,
      SharedBytes().take<unsigned char>(Tile::kBytes).template take<float>(Tile::kRows).total(),
      stream,
      args
  );
}

template <class T>
void implicit_gemm_grad_input_typed(const FusedGradInputParams& p, int tile, Stream stream) {
  with_gemm_tile(tile, [&](auto type) {
    launch_implicit_gemm_grad_input<T, decltype(type)>(p, stream);
  });
}

}  // namespace dcconv::cuda

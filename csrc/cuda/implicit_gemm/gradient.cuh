// dx = transposed convolution of du + x * (transposed window sum of taps) in one kernel, at stride
// 1, where the transposed convolution is a convolution with the window turned around.
#pragma once

#include "cuda/grad_input.cuh"
#include "cuda/implicit_gemm/main_loop.cuh"

namespace dcconv {
namespace cuda {

struct GemmGradientArgs {
  GemmProblem problem;
  GemmGrid grid;
  GradInputArgs pass;
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) implicit_gemm_grad_input_kernel(
    GemmGradientArgs args
) {
  constexpr int kVectors = Tile::kColumns / kPiece, kStride = Tile::kThreads / kVectors;
  const GradInputParams& p = args.pass.p;
  SharedMemory shared;
  unsigned char* stages = shared.take<unsigned char>(Tile::kBytes);
  float* scales = shared.take<float>(Tile::kRows);
  const GemmPlace<Tile> place(args.problem, args.grid);
  const int thread = static_cast<int>(threadIdx.x);
  MainLoop<T, Tile, true, false> loop;
  loop.run(args.problem, place, stages, [&] {
#pragma unroll 1
    for (int row = thread; row < place.rows; row += Tile::kThreads)
      scales[row] =
          transposed_norm<float>(args.pass, args.pass.pixel_of(place.first_row + row), place.group);
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
#pragma unroll 2
  for (int row = thread / kVectors; row < place.rows; row += kStride) {
    const Vector<T, kPiece> input = load_vector<T, kPiece>(x + int64_t(row) * p.c);
    const Vector<float, kPiece> sum = product_at<Tile>(product, row, vector);
    const float t = scales[row];
    Vector<T, kPiece> result;
#pragma unroll
    for (int j = 0; j < kPiece; ++j)
      result.at[j] = Store<T>::from(sum.at[j] + load(input.at[j]) * t);
    store_vector(grad_x + int64_t(row) * p.c, result);
  }
}

inline GradInputParams grad_input_params(const OnePassGradInputParams& p) {
  GradInputParams g{};
  g.n = p.n;
  g.c = p.c;
  g.groups = p.groups;
  g.window = p.window;
  g.channels_last = p.channels_last;
  g.x = p.x;
  g.tap = p.tap;
  g.t = p.t;
  g.norm = p.norm;
  g.sigma = p.sigma;
  g.grad_x = p.grad_x;
  return g;
}

template <class T>
void implicit_gemm_grad_input_typed(const OnePassGradInputParams& p, int tile, Stream stream) {
  with_gemm_tile(tile, [&](auto type) {
    using Tile = decltype(type);
    const GemmProblem problem = gradient_problem(p);
    const GemmGradientArgs args{
        problem,
        gemm_grid<Tile>(problem),
        {grad_input_params(p), RowLanes{}, PlaneLanes{}, problem.pixel_of}
    };
    launch(
        "implicit_gemm_grad_input",
        implicit_gemm_grad_input_kernel<T, Tile>,
        Grid{args.grid.blocks},
        Tile::kThreads,
        SharedBytes().take<unsigned char>(Tile::kBytes).template take<float>(Tile::kRows).total(),
        stream,
        args
    );
  });
}

}  // namespace cuda
}  // namespace dcconv

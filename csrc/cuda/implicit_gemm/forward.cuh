// x and w -> u -> y = h(a, b) g(u / (a b)) + bias in one kernel. b comes from its map, from the
// sums of squares per input pixel, or, for 1x1 windows, from the tiles of x that the main loop
// reads.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/implicit_gemm/main_loop.cuh"
#include "cuda/implicit_gemm/row_sums.cuh"

namespace dcconv {
namespace cuda {

struct GemmForwardArgs {
  GemmProblem problem;
  GemmGrid grid;
  EpilogueArgs epilogue;
  void* dot;  // T: u, or null
};

// What a row of the tile needs of b: 1 / b, and h or b. The first column tile writes the norms.
template <class Tile>
__device__ __forceinline__ void store_row_operands(
    const GemmForwardArgs& args,
    const GemmPlace<Tile>& place,
    int row,
    float b,
    float* inverse_b,
    float* b_or_h
) {
  const EpilogueParams& p = args.epilogue.p;
  inverse_b[row] = 1.0f / b;
  b_or_h[row] =
      args.epilogue.per_position
          ? position_magnitude(p.op, constants_of<float>(p.op), b, radius_of<float>(p.filters, 0))
          : b;
  if (p.norm != nullptr && place.first_column == 0)
    static_cast<float*>(p.norm)[(place.first_row + row) * p.groups + place.group] = b;
}

// b of a row whose map is given.
template <class Tile>
__device__ __forceinline__ float
mapped_norm(const GemmForwardArgs& args, const GemmPlace<Tile>& place, int row) {
  const EpilogueParams& p = args.epilogue.p;
  const float* map = static_cast<const float*>(p.map);
  const int64_t position = place.first_row + row;
  if (p.map_is_norm)
    return map[position * p.groups + place.group];
  const float sum =
      gathered_sum(args.problem, position, place.group, [&](int64_t i) { return map[i]; });
  return sqrt_of(sum + float(p.eps));
}

// y (and u) of the tile, 16 bytes at a time.
template <class T, class Tile>
__device__ __forceinline__ void store_outputs(
    const GemmForwardArgs& args,
    const GemmPlace<Tile>& place,
    const float* product,
    const float* inverse_b,
    const float* b_or_h
) {
  constexpr int kVectors = Tile::kColumns / kPiece, kStride = Tile::kThreads / kVectors;
  const EpilogueParams& p = args.epilogue.p;
  const int vector = static_cast<int>(threadIdx.x) % kVectors;
  const int column = place.first_column + vector * kPiece;
  if (column >= args.problem.columns)
    return;
  const int64_t filter = int64_t(place.group) * args.problem.columns + column;
  const Constants<float> constants = constants_of<float>(p.op);
  FilterValues<float, kPiece> filters;
  filters.load(p.filters, filter, 1);
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / kVectors; row < place.rows; row += kStride) {
    const Vector<float, kPiece> u = product_at<Tile>(product, row, vector);
    const int64_t offset = (place.first_row + row) * p.o + filter;
    if (args.dot != nullptr) {
      Vector<T, kPiece> rounded;
#pragma unroll
      for (int j = 0; j < kPiece; ++j)
        rounded.at[j] = Store<T>::from(u.at[j]);
      store_vector(static_cast<T*>(args.dot) + offset, rounded);
    }
    float row_inverse[kPiece], row_value[kPiece];
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      row_inverse[j] = inverse_b[row];
      row_value[j] = b_or_h[row];
    }
    store_vector(
        static_cast<T*>(p.y) + offset,
        epilogue_vector<AnyAngular, T>(
            args.epilogue, constants, filters, filter, 1, u, row_inverse, row_value
        )
    );
  }
}

template <class T, class Tile, bool Squares>
__global__ void
__launch_bounds__(Tile::kThreads, Tile::kBlocks) implicit_gemm_kernel(GemmForwardArgs args) {
  const EpilogueParams& p = args.epilogue.p;
  SharedMemory shared;
  unsigned char* stages = shared.take<unsigned char>(Tile::kBytes);
  float* inverse_b = shared.take<float>(Tile::kRows);
  float* b_or_h = shared.take<float>(Tile::kRows);
  const GemmPlace<Tile> place(args.problem, args.grid);
  const int thread = static_cast<int>(threadIdx.x);
  MainLoop<T, Tile, false, Squares> loop;
  loop.run(args.problem, place, stages, [&] {
    if constexpr (!Squares) {
#pragma unroll 1
      for (int row = thread; row < place.rows; row += Tile::kThreads)
        store_row_operands(args, place, row, mapped_norm(args, place, row), inverse_b, b_or_h);
    }
  });
  if constexpr (Squares)
    loop.store_squares(inverse_b);
  // The product takes the place of the stages.
  __syncthreads();
  float* product = reinterpret_cast<float*>(stages);
  loop.store_product(product);
  if constexpr (Squares) {
#pragma unroll 1
    for (int row = thread; row < place.rows; row += Tile::kThreads)
      store_row_operands(
          args, place, row, sqrt_of(inverse_b[row] + float(p.eps)), inverse_b, b_or_h
      );
  }
  __syncthreads();
  store_outputs<T>(args, place, product, inverse_b, b_or_h);
}

inline EpilogueParams epilogue_params(const OnePassParams& p) {
  EpilogueParams e{};
  e.n = p.n;
  e.o = p.o;
  e.groups = p.groups;
  e.window = p.window;
  e.channels_last = p.channels_last;
  e.op = p.op;
  e.eps = p.eps;
  e.filters = p.filters;
  e.bias = p.bias;
  e.y = p.y;
  e.map = p.map;
  e.map_is_norm = p.map_is_norm;
  e.norm = p.norm;
  return e;
}

template <class T, class Tile>
void launch_implicit_gemm(const OnePassParams& p, Stream stream) {
  const GemmProblem problem = forward_problem(p);
  const GemmForwardArgs args{
      problem, gemm_grid<Tile>(problem), epilogue_args(epilogue_params(p), kPiece), p.dot
  };
  launch(
      "implicit_gemm",
      p.map == nullptr ? implicit_gemm_kernel<T, Tile, true> : implicit_gemm_kernel<T, Tile, false>,
      Grid{args.grid.blocks},
      Tile::kThreads,
      SharedBytes()
          .take<unsigned char>(Tile::kBytes)
          .template take<float>(Tile::kRows)
          .template take<float>(Tile::kRows)
          .total(),
      stream,
      args
  );
}

template <class T>
void implicit_gemm_typed(const OnePassParams& p, int tile, Stream stream) {
  with_gemm_tile(tile, [&](auto type) { launch_implicit_gemm<T, decltype(type)>(p, stream); });
}

}  // namespace cuda
}  // namespace dcconv

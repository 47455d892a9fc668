// x and w -> u -> y = h(a, b) g(u / (a b)) + bias in one kernel. b comes from its map, from the
// sums of squares per input pixel, or, for 1x1 windows, from the tiles of x that the main loop
// reads.
#pragma once

#include "cuda/fused/implicit_gemm/columns.cuh"
#include "cuda/fused/implicit_gemm/main_loop.cuh"
#include "cuda/fused/implicit_gemm/row_sums.cuh"

namespace dcconv::cuda {

struct GemmForwardArgs {
  GemmProblem problem;
  GemmGrid grid;
  FusedParams p;
  bool per_position;  // h depends on the position alone, up to a factor a
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
  const FusedParams& p = args.p;
  inverse_b[row] = 1.0f / b;
  b_or_h[row] =
      args.per_position
          ? position_magnitude(p.op, constants_of<float>(p.op), b, radius_of<float>(p.filters, 0))
          : b;
  if (p.norm != nullptr && place.first_column == 0)
    static_cast<float*>(p.norm)[(place.first_row + row) * p.groups + place.group] = b;
}

// b of a row whose map is given.
template <class Tile>
__device__ __forceinline__ float
mapped_norm(const GemmForwardArgs& args, const GemmPlace<Tile>& place, int row) {
  const FusedParams& p = args.p;
  const float* map = static_cast<const float*>(p.map);
  const int64_t position = place.first_row + row;
  if (p.map_is_norm)
    return map[position * p.groups + place.group];
  const float sum =
      gathered_sum(args.problem, position, place.group, [&](int64_t i) { return map[i]; });
  return sqrt_of(sum + float(p.eps));
}

// y of eight columns of a row.
template <class T, class Tile>
__device__ __forceinline__ Vector<T, kPiece> outputs_of(
    const GemmForwardArgs& args,
    const Constants<float>& constants,
    const float* columns,
    int vector,
    const Vector<float, kPiece>& u,
    float inverse_b,
    float b_or_h
) {
  constexpr int kHalf = kPiece / 2;
  const FusedParams& p = args.p;
  Vector<T, kPiece> y;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto read = [&](ColumnArray array, float (&out)[kHalf]) {
      const Vector<float, kHalf> all = load_vector<float, kHalf>(
          columns + array * Tile::kColumns + column_place<Tile::kColumns>(vector, half)
      );
#pragma unroll
      for (int j = 0; j < kHalf; ++j)
        out[j] = all.at[j];
    };
    float a[kHalf], h[kHalf], k[kHalf], c[kHalf], g[kHalf], bias[kHalf];
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      a[j] = k[j] = 1;
      h[j] = b_or_h;
    }
    if (wants_a(p.op))
      read(kA, a);
    if (!args.per_position) {
      FilterValues<float, kHalf> filters;
      read(kRho, filters.rho);
      read(kInverseRho, filters.inverse_rho);
      const float b[kHalf] = {b_or_h, b_or_h, b_or_h, b_or_h};
      filter_magnitudes(p.op, constants, filters, 0, a, b, h);
    }
    if (p.filters.k != nullptr)
      read(kCurvature, k);
    read(kInverseA, c);
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      c[j] = u.at[half * kHalf + j] * (c[j] * inverse_b);
      h[j] = p.op.times_a ? h[j] * a[j] : h[j];
    }
    angular_values<AnyAngular>(p.op, constants, c, k, g);
    read(kBias, bias);
#pragma unroll
    for (int j = 0; j < kHalf; ++j)
      y.at[half * kHalf + j] = Store<T>::from(h[j] * g[j] + bias[j]);
  }
  return y;
}

// y (and u) of the tile, 16 bytes at a time.
template <class T, class Tile>
__device__ __forceinline__ void store_outputs(
    const GemmForwardArgs& args,
    const GemmPlace<Tile>& place,
    const float* product,
    const float* columns,
    const float* inverse_b,
    const float* b_or_h
) {
  constexpr int kVectors = Tile::kColumns / kPiece, kStride = Tile::kThreads / kVectors;
  const FusedParams& p = args.p;
  const int vector = static_cast<int>(threadIdx.x) % kVectors;
  const int column = place.first_column + vector * kPiece;
  if (column >= args.problem.columns)
    return;
  const int64_t filter = int64_t(place.group) * args.problem.columns + column;
  const Constants<float> constants = constants_of<float>(p.op);
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / kVectors; row < place.rows; row += kStride) {
    const Vector<float, kPiece> u = product_at<Tile>(product, row, vector);
    const int64_t offset = (place.first_row + row) * p.o + filter;
    if (p.dot != nullptr) {
      Vector<T, kPiece> rounded;
#pragma unroll
      for (int j = 0; j < kPiece; ++j)
        rounded.at[j] = Store<T>::from(u.at[j]);
      store_vector(static_cast<T*>(p.dot) + offset, rounded);
    }
    store_vector(
        static_cast<T*>(p.y) + offset,
        outputs_of<T, Tile>(args, constants, columns, vector, u, inverse_b[row], b_or_h[row])
    );
  }
}

// Bytes of the stages, or of what takes their place.
template <class Tile>
constexpr int kForwardBytes =
    Tile::kProductBytes + kColumnArrays * Tile::kColumns * 4 > Tile::kBytes
        ? Tile::kProductBytes + kColumnArrays * Tile::kColumns * 4
        : Tile::kBytes;

template <class T, class Tile, bool Squares>
__global__ void
__launch_bounds__(Tile::kThreads, Tile::kBlocks) implicit_gemm_kernel(GemmForwardArgs args) {
  const FusedParams& p = args.p;
  SharedMemory shared;
  unsigned char* stages = shared.take<unsigned char>(kForwardBytes<Tile>);
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
  const int column = place.first_column + thread;
  const bool owns = thread < Tile::kColumns && column < args.problem.columns;
  const ColumnOperands<T> operands(p, int64_t(place.group) * args.problem.columns + column, owns);
  // The product and the operands of columns take the place of the stages.
  __syncthreads();
  float* product = reinterpret_cast<float*>(stages);
  float* columns = product + Tile::kRows * Tile::kColumns;
  loop.store_product(product);
  if constexpr (Squares) {
#pragma unroll 1
    for (int row = thread; row < place.rows; row += Tile::kThreads)
      store_row_operands(
          args, place, row, sqrt_of(inverse_b[row] + float(p.eps)), inverse_b, b_or_h
      );
  }
  if (owns)
    operands.template store<Tile::kColumns>(columns, thread);
  __syncthreads();
  store_outputs<T>(args, place, product, columns, inverse_b, b_or_h);
}

template <class T, class Tile>
void launch_implicit_gemm(const FusedParams& p, Stream stream) {
  const GemmProblem problem = forward_problem(p);
  const GemmForwardArgs args{
      problem, gemm_grid<Tile>(problem), p, h_per_position(Magnitudes{}, p.op, p.filters)
  };
  launch(
      "implicit_gemm",
      p.map == nullptr ? implicit_gemm_kernel<T, Tile, true> : implicit_gemm_kernel<T, Tile, false>,
      Grid{args.grid.blocks},
      Tile::kThreads,
      SharedBytes()
          .take<unsigned char>(kForwardBytes<Tile>)
          .template take<float>(Tile::kRows)
          .template take<float>(Tile::kRows)
          .total(),
      stream,
      args
  );
}

template <class T>
void implicit_gemm_typed(const FusedParams& p, int tile, Stream stream) {
  with_gemm_tile(tile, [&](auto type) { launch_implicit_gemm<T, decltype(type)>(p, stream); });
}

}  // namespace dcconv::cuda

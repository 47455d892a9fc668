// x and w -> u -> y = h(a, b) g(u / (a b)) + bias in one kernel. b comes from its map, from the
// sums of squares per input pixel, or, for 1x1 windows, from the tiles of x that the main loop
// reads.
#pragma once

#include "cuda/fused/implicit_gemm/outputs.cuh"
#include "cuda/fused/implicit_gemm/row_sums.cuh"

namespace dcconv::cuda {

// What a row of the tile needs of b: 1 / b, and h or b; h / b where that is all of a row. The first
// column tile writes the norms.
template <class E, class Tile>
__device__ __forceinline__ void store_row_operands(
    const GemmForwardArgs& args,
    const GemmPlace<Tile>& place,
    int row,
    float b,
    float* inverse_b,
    float* b_or_h
) {
  const FusedParams& p = args.p;
  const float inverse = reciprocal_of(b);
  float value = b;
  if (args.per_position) {
    const Radius<float> radius = radius_of<float>(p.filters, 0);
    const Radius<E> own{E(radius.rho), E(radius.inverse)};
    value = value_of(position_magnitude(p.op, constants_of<E>(p.op), E(b), own));
  }
  inverse_b[row] = inverse;
  b_or_h[row] = args.last_step == LastStep::position_cosine ? value * inverse : value;
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

// Bytes of the operands, or of the product, which takes their place.
template <class Tile, class Operands>
constexpr int kForwardBytes =
    Tile::kProductBytes > Operands::kBytes ? Tile::kProductBytes : Operands::kBytes;

template <class T, class Tile, bool Squares, bool Halo>
__global__ void
__launch_bounds__(Tile::kThreads, Tile::kBlocks) implicit_gemm_kernel(GemmForwardArgs args) {
  using E = typename EvaluationType<T>::type;
  using Operands = OperandsOf<T, Tile, false, Squares, Halo>;
  const FusedParams& p = args.p;
  SharedMemory shared;
  unsigned char* stages = shared.take<unsigned char>(kForwardBytes<Tile, Operands>);
  float* columns = shared.take<float>(kColumnArrays * Tile::kColumns);
  float* inverse_b = shared.take<float>(Tile::kRows);
  float* b_or_h = shared.take<float>(Tile::kRows);
  const GemmPlace<Tile> place(args.problem, args.grid);
  const int thread = static_cast<int>(threadIdx.x);
  // What the last step needs of filters and positions, while the first copies are on their way.
  const auto store_sides = [&] {
    const int column = place.first_column + thread;
    const bool owns = thread < Tile::kColumns && column < args.problem.columns;
    const ColumnOperands<T> operands(p, int64_t(place.group) * args.problem.columns + column, owns);
    if constexpr (!Squares) {
      constexpr int kOwn = (Tile::kRows + Tile::kThreads - 1) / Tile::kThreads;
      float b[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int row = thread + i * Tile::kThreads;
        b[i] = row < place.rows ? mapped_norm(args, place, row) : 1;
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int row = thread + i * Tile::kThreads;
        if (row < place.rows)
          store_row_operands<E>(args, place, row, b[i], inverse_b, b_or_h);
      }
    }
    if (owns)
      operands.template store<Tile::kColumns>(columns, thread, cosine_factor(args));
  };
  MainLoop<T, Tile, Squares> loop;
  Operands of_steps(args.problem, place, stages);
  loop.run(args.problem, place, of_steps, store_sides, [](int, unsigned char*) {});
  if constexpr (Squares) {
    loop.store_squares(inverse_b);
    __syncthreads();
#pragma unroll 1
    for (int row = thread; row < place.rows; row += Tile::kThreads)
      store_row_operands<E>(
          args, place, row, sqrt_of(inverse_b[row] + float(p.eps)), inverse_b, b_or_h
      );
  }
  // The tile takes the place of the operands.
  __syncthreads();
  if (args.last_step == LastStep::chosen) {
    float* product = reinterpret_cast<float*>(stages);
    loop.store_product(product);
    __syncthreads();
    return store_chosen_outputs<T>(args, place, product, columns, inverse_b, b_or_h);
  }
  with_known_functions(args.last_step, [&](auto magnitude, auto angular) {
    store_known_outputs<decltype(magnitude), decltype(angular), T>(
        args, place, loop, stages, columns, inverse_b, b_or_h
    );
  });
}

template <class T, class Tile>
void launch_implicit_gemm(const FusedParams& p, Stream stream) {
  const GemmProblem problem = forward_problem(p);
  const bool per_position = h_per_position(Magnitudes{}, p.op, p.filters);
  const GemmForwardArgs args{
      problem, gemm_grid<Tile>(problem), p, per_position, last_step_of(p.op, per_position)
  };
  const auto start = [&](auto kernel, int bytes) {
    launch(
        "implicit_gemm",
        kernel,
        Grid{args.grid.blocks},
        Tile::kThreads,
        SharedBytes()
            .take<unsigned char>(bytes)
            .template take<float>(kColumnArrays * Tile::kColumns)
            .template take<float>(Tile::kRows)
            .template take<float>(Tile::kRows)
            .total(),
        stream,
        args
    );
  };
  if (p.map == nullptr)
    return start(
        implicit_gemm_kernel<T, Tile, true, false>,
        kForwardBytes<Tile, OperandsOf<T, Tile, false, true, false>>
    );
  with_halo<Tile>(problem, [&](auto halo) {
    constexpr bool kHalo = decltype(halo)::value;
    start(
        implicit_gemm_kernel<T, Tile, false, kHalo>,
        kForwardBytes<Tile, OperandsOf<T, Tile, false, false, kHalo>>
    );
  });
}

template <class T>
void implicit_gemm_typed(const FusedParams& p, int tile, Stream stream) {
  with_gemm_tile(tile, [&](auto type) { launch_implicit_gemm<T, decltype(type)>(p, stream); });
}

}  // namespace dcconv::cuda

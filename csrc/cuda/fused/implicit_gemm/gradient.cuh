// dx = transposed convolution of du + x * (transposed window sum of taps) in one kernel, at stride
// 1, where the transposed convolution is a convolution with the window turned around.
#pragma once

#include "cuda/fused/implicit_gemm/main_loop.cuh"
#include "cuda/fused/implicit_gemm/row_sums.cuh"
#include "cuda/fused/implicit_gemm/stored_tile.cuh"

namespace dcconv::cuda {

struct GemmGradientArgs {
  GemmProblem problem;
  GemmGrid grid;
  FusedGradInputParams p;
};

// What the windows that see a row's pixel say about their norms.
template <class Tile, bool Halo>
__device__ __forceinline__ float
transposed_norm(const GemmGradientArgs& args, const GemmPlace<Tile>& place, int row) {
  const float* t = static_cast<const float*>(args.p.t);
  const float* b = static_cast<const float*>(args.p.norm);
  const bool with_mean = args.p.tap == Tap::with_mean;
  const float sigma = with_mean ? *static_cast<const float*>(args.p.sigma) : 0.0f;
  const auto tap = [&](int64_t i) { return with_mean ? t[i] + sigma * reciprocal_of(b[i]) : t[i]; };
  const int64_t at = place.first_row + row;
  if constexpr (Halo)
    return halo_sum(args.problem, at, place.group, args.problem.taps_seen(at), tap);
  else
    return gathered_sum(args.problem, at, place.group, tap);
}

template <class T, class Tile, bool Halo>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) implicit_gemm_grad_input_kernel(
    GemmGradientArgs args
) {
  using Operands = OperandsOf<T, Tile, true, false, Halo>;
  using Stored = StoredTile<T, Tile>;
  static_assert(Tile::kWarpRows == 2, "half of the tile's rows for a warp");
  const FusedGradInputParams& p = args.p;
  SharedMemory shared;
  unsigned char* stages = shared.take<unsigned char>(Operands::kBytes);
  float* scales = shared.take<float>(Tile::kRows);
  const GemmPlace<Tile> place(args.problem, args.grid);
  const Stored tile(place, args.problem.columns, p.c);
  const auto store_scales = [&] {
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x); row < place.rows; row += Tile::kThreads)
      scales[row] = transposed_norm<Tile, Halo>(args, place, row);
  };
  // x of the tile comes while the last steps are multiplied.
  const auto fetch_x = [&](int quarter, unsigned char* to) {
    tile.fetch(static_cast<const T*>(p.x), quarter, to);
  };
  MainLoop<T, Tile, false> loop;
  Operands operands(args.problem, place, stages);
  loop.run(args.problem, place, operands, store_scales, fetch_x);
  unsigned char* quarters[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    quarters[i] = operands.quarter(i);
  wait_async<0>();
  __syncthreads();
  const FragmentPlace<Tile> at;
  const bool upper = at.warp_row() == 0;
  unsigned char* own[2] = {upper ? quarters[0] : quarters[2], upper ? quarters[1] : quarters[3]};
  const int before = upper ? 0 : 2 * Stored::kQuarterRows;
  float scale[Tile::kRowFragments][2];
#pragma unroll
  for (int m = 0; m < Tile::kRowFragments; ++m) {
    scale[m][0] = scales[at.row(m, 0)];
    scale[m][1] = scales[at.row(m, 1)];
  }
  loop.each_pair([&](int m, int n, int half, const float (&sum)[2]) {
    const int part = m * 16 / Stored::kQuarterRows;
    uint32_t* pair = at.pair(own[part], m, n, half, before + part * Stored::kQuarterRows);
    float low, high;
    unpack_word(T{}, *pair, low, high);
    *pair = pack_word<T>(sum[0] + low * scale[m][half], sum[1] + high * scale[m][half]);
  });
  __syncthreads();
  tile.copy(quarters, static_cast<T*>(p.grad_x));
}

template <class T, class Tile>
void launch_implicit_gemm_grad_input(const FusedGradInputParams& p, Stream stream) {
  const GemmProblem problem = gradient_problem(p);
  const GemmGradientArgs args{problem, gemm_grid<Tile>(problem), p};
  with_halo<Tile>(problem, [&](auto halo) {
    constexpr bool kHalo = decltype(halo)::value;
    launch(
        "implicit_gemm_grad_input",
        implicit_gemm_grad_input_kernel<T, Tile, kHalo>,
        Grid{args.grid.blocks},
        Tile::kThreads,
        SharedBytes()
            .take<unsigned char>(OperandsOf<T, Tile, true, false, kHalo>::kBytes)
            .template take<float>(Tile::kRows)
            .total(),
        stream,
        args
    );
  });
}

template <class T>
void implicit_gemm_grad_input_typed(const FusedGradInputParams& p, int tile, Stream stream) {
  with_gemm_tile(tile, [&](auto type) {
    launch_implicit_gemm_grad_input<T, decltype(type)>(p, stream);
  });
}

}  // namespace dcconv::cuda

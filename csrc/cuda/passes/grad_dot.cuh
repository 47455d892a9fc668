// dy and (y or u) -> du = dy h g_c / (a b), the row scalar t = sum_o dy (d g + h e) / b^2 of the
// patch-norm gradient, and partial column sums where parameters need them. Sums over filters and
// positions have a fixed order; column sums are kept per block and added by column_sums.
#pragma once

#include "cuda/passes/epilogue.cuh"
#include "cuda/passes/grad_dot_channels_last.cuh"
#include "cuda/passes/grad_dot_contiguous.cuh"

namespace dcconv::cuda {

// Vectors of a thread in a tile, at most: its terms of t lie in shared memory.
constexpr int kGradTurns = 8;

template <class A>
GradDotArgs grad_dot_args(const GradDotParams& p, int width) {
  const int per_group = p.o / p.groups;
  const RowLanes lanes = p.channels_last ? row_lanes(p.o, p.groups, width) : RowLanes{};
  // Threads that have eight terms each to add.
  const int64_t own = ceil_div(std::min(per_group / width, lanes.columns), 8);
  return {
      p,
      lanes,
      // 16 vectors of a warp in a tile, where there are so many: a tile's beginning is costly.
      plane_lanes(static_cast<int>(ceil_div(per_group, 16))),
      PixelOf(p.positions / p.pixels, static_cast<int>(p.pixels), 1),
      p.channels_last ? tile_turns<A>(lanes, kGradTurns) : 0,
      power_of_two_at_least(own, kWarp),
      h_per_position(Magnitudes{}, p.op, p.filters),
      false
  };
}

template <class M>
int64_t grad_dot_blocks(const GradDotParams& p, int threads) {
  return persistent_blocks(p.rows, threads, kGradBlocks<M> * threads);
}

template <class T, class M, class G, Kept kKept, int kSums, int V>
void launch_grad_dot_channels_last(const GradDotParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const GradDotArgs args = grad_dot_args<A>(p, V);
  const RowLanes& lanes = args.row_lanes;
  launch(
      "grad_dot_channels_last",
      grad_dot_channels_last_kernel<T, M, G, kKept, kSums, V>,
      Grid{grad_dot_blocks<M>(p, lanes.threads)},
      lanes.threads,
      SharedBytes()
          .take<unsigned char>(VectorRing<T, V, 2, kGradSlots>::kBytes)
          .template take<A>(int64_t(2) * 4 * lanes.rows * args.turns * lanes.chunk_groups)
          .template take<A>(grad_terms<V>(lanes, args.turns))
          .total(),
      stream,
      args
  );
}

template <class T, class M, class G, Kept kKept, int kSums, int V>
void launch_grad_dot_contiguous(const GradDotParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  GradDotArgs args = grad_dot_args<A>(p, V);
  const auto shared = [&](bool with_sums) {
    const int64_t tiles = args.plane_lanes.tiles;
    SharedBytes bytes;
    bytes.take<unsigned char>(VectorRing<T, V, 2, kGradSlots>::kBytes);
    FilterTable<A>::take(bytes);
    bytes.take<A>(2 * 4 * int64_t(kWarp) * V * tiles).template take<A>(2 * kThreads * V);
    if (with_sums)
      bytes.take<A>(tiles * sum_kinds(p.sums) * (p.o / p.groups));
    return bytes.total();
  };
  // Fewer tiles side by side, though some warps have no channel then. Sums that grow in the block's
  // row of parts take one tile: those of several would meet there.
  while (args.plane_lanes.tiles > 1 && shared(kSums != 0) > kGradShared) {
    args.plane_lanes.ways *= 2;
    args.plane_lanes.tiles /= 2;
  }
  args.shared_sums = kSums != 0 && shared(true) <= kGradShared;
  launch(
      "grad_dot_contiguous",
      grad_dot_contiguous_kernel<T, M, G, kKept, kSums, V>,
      Grid{
          // Only sums in shared memory clear the rows of parts that have no block.
          args.shared_sums || p.sums == 0 ? grad_dot_blocks<M>(p, kThreads) : p.rows,
          std::min<int64_t>(p.groups, kMaxGridY)
      },
      kThreads,
      shared(args.shared_sums),
      stream,
      args
  );
}

template <class T, class M, class G, Kept kKept, int kSums, int V>
void launch_grad_dot(const GradDotParams& p, Stream stream) {
  if (p.channels_last)
    launch_grad_dot_channels_last<T, M, G, kKept, kSums, V>(p, stream);
  else
    launch_grad_dot_contiguous<T, M, G, kKept, kSums, V>(p, stream);
}

// The sums of known functions: none, or that of a radius.
template <class T, class M, class G>
void launch_known_grad_dot(const GradDotParams& p, Stream stream) {
  constexpr int kV = kWide<T>;
  const bool output = p.kept_is == Kept::output;
  if constexpr (std::is_same<M, PerPosition>::value) {
    if (p.sums == 0) {
      const auto run = output ? launch_grad_dot<T, M, G, Kept::output, 0, kV>
                              : launch_grad_dot<T, M, G, Kept::dot, 0, kV>;
      return run(p, stream);
    }
  }
  const auto run = output ? launch_grad_dot<T, M, G, Kept::output, kSumRho, kV>
                          : launch_grad_dot<T, M, G, Kept::dot, kSumRho, kV>;
  run(p, stream);
}

// Channels last, other functions: an instantiation per angular function.
template <class T, class... G>
void grad_dot_by_angular(TypeList<G...>, const GradDotParams& p, Stream stream) {
  constexpr int kV = kWide<T>;
  static constexpr void (*table[])(const GradDotParams&, Stream) = {
      launch_grad_dot_channels_last<T, AnyMagnitude, G, Kept::output, kAllSums, kV>...
  };
  table[p.op.angular](p, stream);
}

template <class T>
void grad_dot_typed(const GradDotParams& p, Stream stream) {
  constexpr int kV = kWide<T>;
  if (p.positions == 0 && p.sums == 0)
    return;
  // What backward has kept is chosen at run time by all that is not known.
  constexpr Kept kAny = Kept::output;
  if (!takes_wide_vectors<T>(
          p.channels_last, p.o / p.groups, p.pixels, {p.grad_y, p.kept, p.grad_u}
      ))
    return launch_grad_dot<T, AnyMagnitude, AnyAngular, kAny, kAllSums, 1>(p, stream);
  if constexpr (std::is_same<T, double>::value) {
    launch_grad_dot<T, AnyMagnitude, AnyAngular, kAny, kAllSums, kV>(p, stream);
  } else {
    const bool per_position = h_per_position(Magnitudes{}, p.op, p.filters);
    const bool known =
        (p.sums & ~kSumRho) == 0 && with_known_functions(p.op, per_position, [&](auto m, auto g) {
          launch_known_grad_dot<T, decltype(m), decltype(g)>(p, stream);
        });
    if (known)
      return;
    if (p.channels_last)
      grad_dot_by_angular<T>(Angulars{}, p, stream);
    else
      launch_grad_dot_contiguous<T, AnyMagnitude, AnyAngular, kAny, kAllSums, kV>(p, stream);
  }
}

}  // namespace dcconv::cuda

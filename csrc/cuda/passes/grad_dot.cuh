// dy and (y or u) -> du = dy h g_c / (a b), the row scalar t = sum_o dy (d g + h e) / b^2 of the
// patch-norm gradient, and partial column sums where parameters need them. Sums over filters and
// positions have a fixed order; column sums are kept per block and added by column_sums.
#pragma once

#include "cuda/passes/epilogue.cuh"

namespace dcconv::cuda {

struct GradDotArgs {
  GradDotParams p;
  RowLanes row_lanes;
  PlaneLanes plane_lanes;
  Divider pixels;
  bool wide;          // 64-bit positions
  bool per_position;  // h depends on the position alone, up to a factor a
  int sum_width;      // channels last: threads per row sum, a power of two
  bool shared_sums;   // contiguous: whether column sums fit in shared memory
};

// Rows of a tile per thread.
constexpr int kGradRows = 4;

// What the kernels are instantiated for: no column sums, the radius alone, any.
constexpr int kAllSums = kSumRho | kSumA | kSumK | kSumBias;

// What a position tells each of its elements.
template <class A, int V>
struct PositionValues {
  A inverse_b[V];
  A b_or_h[V];
  A d[V];
  A h_rho[V];
};

// Column sums: one per element where each has its own filter (N = V), or one of all (N = 1).
template <class A, int N>
struct SumValues {
  A rho[N];
  A a[N];
  A k[N];
  A bias[N];
};

// One vector: du, the terms dy (d g + h e) and additions to the column sums. kSums: which sums the
// instantiation knows; p.sums: which of them are wanted.
template <class G, int kSums, class T, class A, int V, int N>
__device__ __forceinline__ Vector<T, V> grad_vector(
    const GradDotArgs& args,
    const Constants<A>& constants,
    const FilterValues<A, V>& filters,
    int64_t first,
    int step,
    const Vector<T, V>& grad_y,
    const Vector<T, V>& kept,
    const PositionValues<A, V>& position,
    A (&term)[V],
    SumValues<A, N>& sums
) {
  constexpr int kP = kPart<V>;
  const GradDotParams& p = args.p;
  Vector<T, V> grad_u;
#pragma unroll
  for (int from = 0; from < V; from += kP) {
    const int64_t filter = first + from * step;
    A a[kP], k[kP], y[kP], c[kP], h[kP], scale[kP];
    MagnitudeGrad<A> m[kP];
    AngularGrad<A> g[kP];
    filter_values(p.filters.a, wants_a(p.op), filter, step, A(1), a);
    if (args.per_position) {
#pragma unroll
      for (int j = 0; j < kP; ++j)
        m[j] = {position.b_or_h[from + j], position.d[from + j], position.h_rho[from + j], A(0)};
    } else {
      with_magnitude(p.op.magnitude, [&](auto type) {
        using Function = decltype(type);
        if constexpr (Function::uses_rho) {
#pragma unroll
          for (int j = 0; j < kP; ++j) {
            const Radius<A> radius{filters.rho[from + j], filters.inverse_rho[from + j]};
            m[j] = Function::grad(a[j], position.b_or_h[from + j], radius, constants);
          }
        }
      });
    }
    if (p.op.times_a) {
#pragma unroll
      for (int j = 0; j < kP; ++j)
        m[j] = {m[j].h * a[j], m[j].d * a[j], m[j].h_rho * a[j], m[j].h};
    }
#pragma unroll
    for (int j = 0; j < kP; ++j) {
      k[j] = kUsesK<G> ? curvature_of<A>(p.filters, filter + j * step) : A(1);
      scale[j] = filters.inverse_a[from + j] * position.inverse_b[from + j];
      y[j] = load(kept.at[from + j]);
      h[j] = m[j].h;
    }
    cosines_of<G>(p.op, p.kept_is, y, h, scale, c);
    angular_grads<G>(p.op, constants, c, k, g);
#pragma unroll
    for (int j = 0; j < kP; ++j) {
      const int i = from + j;
      const A dy = load(grad_y.at[i]);
      grad_u.at[i] = Store<T>::from(dy * h[j] * g[j].g_c * scale[j]);
      term[i] = dy * (m[j].d * g[j].g + h[j] * g[j].e);
      if constexpr ((kSums & kSumRho) != 0)
        sums.rho[i % N] += dy * g[j].g * m[j].h_rho;
      if constexpr ((kSums & kSumA) != 0)
        sums.a[i % N] += dy * g[j].g * m[j].h_a;
      if constexpr ((kSums & kSumK) != 0)
        sums.k[i % N] += dy * h[j] * g[j].g_k;
      if constexpr ((kSums & kSumBias) != 0)
        sums.bias[i % N] += dy;
    }
  }
  return grad_u;
}

// f(bit, values) for the kinds of kSums.
template <int kSums, class A, int N, class F>
__device__ __forceinline__ void each_sum(const SumValues<A, N>& sums, F&& f) {
  if constexpr ((kSums & kSumRho) != 0)
    f(kSumRho, sums.rho);
  if constexpr ((kSums & kSumA) != 0)
    f(kSumA, sums.a);
  if constexpr ((kSums & kSumK) != 0)
    f(kSumK, sums.k);
  if constexpr ((kSums & kSumBias) != 0)
    f(kSumBias, sums.bias);
}

// Number of wanted kinds before `bit`: its row in parts.
__device__ __forceinline__ int sum_row(int sums, int bit) {
  return sum_kinds(sums & (bit - 1));
}

template <class A>
__device__ __forceinline__ MagnitudeGrad<A>
position_values(const GradDotArgs& args, const Constants<A>& constants, A b) {
  if (!args.per_position)
    return {b, A(0), A(0), A(0)};
  return position_magnitude_grad(args.p.op, constants, b, radius_of<A>(args.p.filters, 0));
}

template <class T, class G, int V, int kSums>
__global__ void __launch_bounds__(
    kThreads, kSums == kAllSums ? 1 : 2
) grad_dot_channels_last_kernel(GradDotArgs args) {
  using A = typename ComputeType<T>::type;
  const GradDotParams& p = args.p;
  const RowLanes& lanes = args.row_lanes;
  const RowLane lane(lanes);
  const Constants<A> constants = constants_of<A>(p.op);
  const int tile_rows = lanes.rows * kGradRows, per_group = p.o / p.groups;
  const int tile_values = tile_rows * lanes.chunk_groups;
  SharedMemory shared;
  A* inverse_norms = shared.take<A>(tile_values);
  A* norms_or_h = shared.take<A>(tile_values);
  A* row_d = shared.take<A>(tile_values);
  A* row_h_rho = shared.take<A>(tile_values);
  A* terms = shared.take<A>(tile_rows * lanes.columns);
  A* columns = kSums == 0 ? nullptr : shared.take<A>(lanes.rows * lanes.columns * V);
  const int64_t tiles = (p.positions + tile_rows - 1) / tile_rows;
  const T* grad_y = static_cast<const T*>(p.grad_y);
  const T* kept = static_cast<const T*>(p.kept);
  const A* norm = static_cast<const A*>(p.norm);
  T* grad_u = static_cast<T*>(p.grad_u);
  A* t = static_cast<A*>(p.t);
  for (int chunk = 0; chunk < lanes.vectors; chunk += lanes.columns) {
    const int channel = (chunk + lane.column) * V;
    const bool active = lane.row < lanes.rows && channel < p.o;
    const int chunk_end = at_most((chunk + lanes.columns) * V, p.o);
    const int first_group = chunk * V / per_group;
    const int groups = (chunk_end - 1) / per_group + 1 - first_group;
    const int own_group = channel / per_group - first_group;
    FilterValues<A, V> filters{};
    if (active)
      filters.load(p.filters, channel, 1);
    SumValues<A, V> sums{};
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int64_t first = tile * tile_rows;
      const int rows = static_cast<int>(at_most(int64_t(tile_rows), p.positions - first));
      const int64_t offset = first * p.o + channel;
      const auto fetch = [&](const T* from, int row) {
        Vector<T, V> v{};
        if (active && row < rows)
          v = load_vector<T, V>(from + offset + int64_t(row) * p.o);
        return v;
      };
      Vector<T, V> dy = fetch(grad_y, lane.row), value = fetch(kept, lane.row);
      for (int i = static_cast<int>(threadIdx.x); i < rows * groups; i += lanes.threads) {
        const int row = groups == 1 ? i : i / groups, group = first_group + i - row * groups;
        const A b = norm[(first + row) * p.groups + group];
        const MagnitudeGrad<A> m = position_values(args, constants, b);
        inverse_norms[i] = A(1) / b;
        norms_or_h[i] = m.h;
        row_d[i] = m.d;
        row_h_rho[i] = m.h_rho;
      }
      __syncthreads();
      if (active) {
#pragma unroll 1
        for (int row = lane.row; row < rows; row += lanes.rows) {
          const Vector<T, V> next_dy = fetch(grad_y, row + lanes.rows);
          const Vector<T, V> next_value = fetch(kept, row + lanes.rows);
          const int at = row * groups + own_group;
          PositionValues<A, V> position;
#pragma unroll
          for (int j = 0; j < V; ++j) {
            position.inverse_b[j] = inverse_norms[at];
            position.b_or_h[j] = norms_or_h[at];
            position.d[j] = row_d[at];
            position.h_rho[j] = row_h_rho[at];
          }
          A term[V];
          store_vector(
              grad_u + offset + int64_t(row) * p.o,
              grad_vector<G, kSums>(
                  args, constants, filters, channel, 1, dy, value, position, term, sums
              )
          );
          A total = term[0];
#pragma unroll
          for (int j = 1; j < V; ++j)
            total += term[j];
          terms[row * lanes.columns + lane.column] = total;
          dy = next_dy;
          value = next_value;
        }
      }
      __syncthreads();
      if (t == nullptr)
        continue;
      // Row sums: `sum_width` threads per row and group, over the group's vectors in this chunk.
      const int width = args.sum_width;
      const int slot = static_cast<int>(threadIdx.x) / width;
      const int member = static_cast<int>(threadIdx.x) - slot * width;
      for (int start = 0; start < rows * groups; start += lanes.threads / width) {
        const int i = start + slot;
        const bool inside = i < rows * groups;
        const int row = groups == 1 ? i : i / groups, group = first_group + i - row * groups;
        A total = 0;
        if (inside) {
          const int begin = at_least(group * per_group / V - chunk, 0);
          const int end = at_most((group + 1) * per_group / V - chunk, chunk_end / V - chunk);
          for (int j = begin + member; j < end; j += width)
            total += terms[row * lanes.columns + j];
        }
        total = sub_warp_sum(total, width);
        if (inside && member == 0) {
          const A inverse = inverse_norms[i];
          A* out = t + (first + row) * p.groups + group;
          // A group that began in an earlier chunk has a sum already, from this block.
          const A before = group * per_group < chunk * V ? *out : A(0);
          *out = before + total * inverse * inverse;
        }
      }
      __syncthreads();
    }
    if constexpr (kSums != 0) {
      each_sum<kSums>(sums, [&](int bit, const A(&own)[V]) {
        if ((p.sums & bit) == 0)
          return;
        if (active) {
#pragma unroll
          for (int j = 0; j < V; ++j)
            columns[(lane.row * lanes.columns + lane.column) * V + j] = own[j];
        }
        __syncthreads();
        A* parts =
            static_cast<A*>(p.parts) + (sum_row(p.sums, bit) * p.rows + int64_t(blockIdx.x)) * p.o;
        for (int c = static_cast<int>(threadIdx.x); c < chunk_end - chunk * V; c += lanes.threads) {
          A total = 0;
          for (int row = 0; row < lanes.rows; ++row)
            total += columns[row * lanes.columns * V + c];
          parts[chunk * V + c] = total;
        }
        __syncthreads();
      });
    }
  }
}

template <class T, class G, int V, int kSums>
__global__ void __launch_bounds__(kThreads, 1) grad_dot_contiguous_kernel(GradDotArgs args) {
  using A = typename ComputeType<T>::type;
  const GradDotParams& p = args.p;
  const PlaneLane lane(args.plane_lanes);
  const int ways = args.plane_lanes.ways, side_by_side = args.plane_lanes.tiles;
  const Constants<A> constants = constants_of<A>(p.op);
  const int span = kWarp * V, tile_positions = span * side_by_side;
  const int per_group = p.o / p.groups;
  const int kinds = sum_kinds(p.sums);
  SharedMemory shared;
  A* partial = shared.take<A>(kThreads * V);  // [tiles, ways, span]
  // Column sums of the group, [tiles, kinds, per_group]; each has one thread that adds to it.
  A* columns = nullptr;
  if (kSums != 0 && args.shared_sums)
    columns = shared.take<A>(side_by_side * kinds * per_group);
  const int64_t tiles = (p.positions + tile_positions - 1) / tile_positions;
  const int own = lane.tile * span + lane.lane * V;
  for (int group = static_cast<int>(blockIdx.y); group < p.groups;
       group += static_cast<int>(gridDim.y)) {
    // Without room in shared memory the sums grow in the block's own row of parts.
    const auto column = [&](int bit, int c) -> A* {
      const int row = sum_row(p.sums, bit);
      if (args.shared_sums)
        return columns + (lane.tile * kinds + row) * per_group + c;
      return static_cast<A*>(p.parts) + (row * p.rows + int64_t(blockIdx.x)) * p.o +
             int64_t(group) * per_group + c;
    };
    if constexpr (kSums != 0) {
      if (lane.lane == 0) {
        for (int bit = 1; bit <= kAllSums; bit *= 2)
          for (int c = lane.way; (p.sums & bit) != 0 && c < per_group; c += ways)
            *column(bit, c) = A(0);
      }
    }
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int64_t position = tile * tile_positions + own;
      const bool inside = position < p.positions;
      int64_t image = 0, pixel = 0;
      if (inside) {
        image = args.wide ? position / p.pixels
                          : int64_t(args.pixels.divide(static_cast<uint32_t>(position)));
        pixel = position - image * p.pixels;
      }
      PositionValues<A, V> values;
      A row_sum[V] = {};
      const int64_t map = (image * p.groups + group) * p.pixels + pixel;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A b = inside ? static_cast<const A*>(p.norm)[map + j] : A(1);
        const MagnitudeGrad<A> m = position_values(args, constants, b);
        values.inverse_b[j] = A(1) / b;
        values.b_or_h[j] = m.h;
        values.d[j] = m.d;
        values.h_rho[j] = m.h_rho;
      }
      const int64_t base = (image * p.o + int64_t(group) * per_group) * p.pixels + pixel;
      const auto fetch = [&](const void* from, int c) {
        Vector<T, V> v{};
        if (inside && c < per_group)
          v = load_vector<T, V>(static_cast<const T*>(from) + base + c * p.pixels);
        return v;
      };
      Vector<T, V> dy = fetch(p.grad_y, lane.way), kept = fetch(p.kept, lane.way);
#pragma unroll 1
      for (int c = lane.way; c < per_group; c += ways) {
        const Vector<T, V> next_dy = fetch(p.grad_y, c + ways);
        const Vector<T, V> next_kept = fetch(p.kept, c + ways);
        const int64_t filter = int64_t(group) * per_group + c;
        FilterValues<A, V> filters;
        filters.load(p.filters, filter, 0);
        A term[V];
        SumValues<A, 1> sums{};
        const Vector<T, V> grad_u = grad_vector<G, kSums>(
            args, constants, filters, filter, 0, dy, kept, values, term, sums
        );
        if (inside)
          store_vector(static_cast<T*>(p.grad_u) + base + c * p.pixels, grad_u);
#pragma unroll
        for (int j = 0; j < V; ++j)
          row_sum[j] += term[j];
        if constexpr (kSums != 0) {
          each_sum<kSums>(sums, [&](int bit, const A(&all)[1]) {
            if ((p.sums & bit) == 0)
              return;
            const A total = sub_warp_sum(inside ? all[0] : A(0), kWarp);
            if (lane.lane == 0)
              *column(bit, c) += total;
          });
        }
        dy = next_dy;
        kept = next_kept;
      }
      if (p.t == nullptr)
        continue;
      A* slot = partial + (lane.tile * ways + lane.way) * span + lane.lane * V;
#pragma unroll
      for (int j = 0; j < V; ++j)
        slot[j] = row_sum[j];
      __syncthreads();
      if (inside && lane.way == 0) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          A total = row_sum[j];
          for (int way = 1; way < ways; ++way)
            total += slot[way * span + j];
          static_cast<A*>(p.t)[map + j] = total * values.inverse_b[j] * values.inverse_b[j];
        }
      }
      __syncthreads();
    }
    if (kSums != 0 && args.shared_sums) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < kinds * per_group; i += kThreads) {
        A total = columns[i];
        for (int other = 1; other < side_by_side; ++other)
          total += columns[other * kinds * per_group + i];
        const int row = i / per_group, c = i - row * per_group;
        static_cast<A*>(
            p.parts
        )[(row * p.rows + int64_t(blockIdx.x)) * p.o + int64_t(group) * per_group + c] = total;
      }
      __syncthreads();
    }
  }
}

inline GradDotArgs grad_dot_args(const GradDotParams& p, int width) {
  const int per_group = p.o / p.groups;
  GradDotArgs args{
      p,
      p.channels_last ? row_lanes(p.o, p.groups, width) : RowLanes{},
      plane_lanes(per_group),
      Divider(static_cast<uint32_t>(p.pixels)),
      p.positions > 0x7fffffff,
      h_per_position(Magnitudes{}, p.op, p.filters),
      1,
      false
  };
  if (p.channels_last)
    args.sum_width =
        power_of_two_at_least(std::min(per_group / width, args.row_lanes.columns), kWarp);
  return args;
}

template <class T, class G, int V, int kSums>
void launch_grad_dot_channels_last(const GradDotParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const GradDotArgs args = grad_dot_args(p, V);
  const RowLanes& lanes = args.row_lanes;
  const int64_t tile_rows = int64_t(lanes.rows) * kGradRows;
  const int64_t tile_values = tile_rows * lanes.chunk_groups;
  SharedBytes bytes;
  for (int i = 0; i < 4; ++i)
    bytes.take<A>(tile_values);
  bytes.take<A>(tile_rows * lanes.columns);
  if (kSums != 0)
    bytes.take<A>(int64_t(lanes.rows) * lanes.columns * V);
  launch(
      "grad_dot_channels_last",
      grad_dot_channels_last_kernel<T, G, V, kSums>,
      Grid{p.rows},
      lanes.threads,
      bytes.total(),
      stream,
      args
  );
}

template <class T, class G, int V, int kSums>
void launch_grad_dot_contiguous(const GradDotParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  GradDotArgs args = grad_dot_args(p, V);
  SharedBytes bytes, with_sums;
  bytes.take<A>(kThreads * V);
  with_sums.take<A>(kThreads * V)
      .template take<A>(int64_t(args.plane_lanes.tiles) * sum_kinds(p.sums) * (p.o / p.groups));
  args.shared_sums = kSums != 0 && with_sums.total() <= kSharedLimit;
  launch(
      "grad_dot_contiguous",
      grad_dot_contiguous_kernel<T, G, V, kSums>,
      Grid{p.rows, std::min<int64_t>(p.groups, kMaxGridY)},
      kThreads,
      args.shared_sums ? with_sums.total() : bytes.total(),
      stream,
      args
  );
}

template <class T, class G, int V>
void grad_dot_by_sums(const GradDotParams& p, Stream stream) {
  const auto run = p.sums == 0         ? launch_grad_dot_channels_last<T, G, V, 0>
                   : p.sums == kSumRho ? launch_grad_dot_channels_last<T, G, V, kSumRho>
                                       : launch_grad_dot_channels_last<T, G, V, kAllSums>;
  run(p, stream);
}

// Instantiated like the epilogue; column sums are told apart where speed matters.
template <class T, class... G>
void grad_dot_by_angular(TypeList<G...>, const GradDotParams& p, Stream stream) {
  constexpr int kV = kWide<T>;
  if (p.positions == 0 && p.sums == 0)
    return;
  const bool wide = takes_wide_vectors<T>(
      p.channels_last, p.o / p.groups, p.pixels, {p.grad_y, p.kept, p.grad_u}
  );
  if (!p.channels_last) {
    const auto run = wide ? launch_grad_dot_contiguous<T, AnyAngular, kV, kAllSums>
                          : launch_grad_dot_contiguous<T, AnyAngular, 1, kAllSums>;
    run(p, stream);
  } else if (!wide) {
    launch_grad_dot_channels_last<T, AnyAngular, 1, kAllSums>(p, stream);
  } else if constexpr (std::is_same<T, double>::value) {
    launch_grad_dot_channels_last<T, AnyAngular, kV, kAllSums>(p, stream);
  } else {
    static constexpr void (*table[])(const GradDotParams&, Stream) = {
        grad_dot_by_sums<T, G, kV>...
    };
    table[p.op.angular](p, stream);
  }
}

template <class T>
void grad_dot_typed(const GradDotParams& p, Stream stream) {
  grad_dot_by_angular<T>(Angulars{}, p, stream);
}

}  // namespace dcconv::cuda

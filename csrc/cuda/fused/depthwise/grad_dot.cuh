// The du pass of depthwise layers in channels last: every element has a b and a t of its own, so
// that maps and tensors have one shape and nothing is summed over filters.
#pragma once

#include "cuda/fused/depthwise/forward.cuh"
#include "cuda/passes/grad_dot.cuh"

namespace dcconv::cuda {

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2) grad_dot_elementwise_kernel(GradDotArgs args) {
  using A = typename ComputeType<T>::type;
  const GradDotParams& p = args.p;
  const RowLanes& lanes = args.row_lanes;
  const RowLane lane(lanes);
  const Constants<A> constants = constants_of<A>(p.op);
  const Constants<typename EvaluationType<T>::type> own_constants =
      constants_of<typename EvaluationType<T>::type>(p.op);
  SharedMemory shared;
  A* columns = shared.take<A>(lanes.rows * lanes.columns * V);
  const int64_t step = int64_t(gridDim.x) * lanes.rows;
  for (int chunk = 0; chunk < lanes.vectors; chunk += lanes.columns) {
    const int channel = (chunk + lane.column) * V;
    const bool active = lane.row < lanes.rows && channel < p.o;
    const int chunk_end = at_most((chunk + lanes.columns) * V, p.o);
    Filters<Each<A, V>> filters{};
    if (active)
      load_filters<T>(p.filters, nullptr, channel, filters);
    SumValues<A, V> sums{};
    int64_t row = int64_t(blockIdx.x) * lanes.rows + lane.row;
    Vector<T, V> dy{}, kept{};
    Vector<A, V> b{};
    const auto fetch = [&](int64_t at) {
      if (!active || at >= p.positions)
        return;
      dy = load_vector<T, V>(static_cast<const T*>(p.grad_y) + at * p.o + channel);
      kept = load_vector<T, V>(static_cast<const T*>(p.kept) + at * p.o + channel);
      b = load_vector<A, V>(static_cast<const A*>(p.norm) + at * p.o + channel);
    };
    fetch(row);
#pragma unroll 1
    for (; active && row < p.positions; row += step) {
      const Vector<T, V> own_dy = dy, own_kept = kept;
      GradPositions<Each<A, V>> position;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        A own[4];
        grad_position<AnyMagnitude, AnyAngular, Kept::output>(
            p, args.per_position, constants, b.at[j], own
        );
        position.inverse_b.at[j] = own[0];
        position.b_or_h.at[j] = own[1];
        position.d.at[j] = own[2];
        position.h_rho.at[j] = own[3];
      }
      fetch(row + step);
      const Vector<T, V> vectors[2] = {own_dy, own_kept};
      A term[V];
      store_vector(
          static_cast<T*>(p.grad_u) + row * p.o + channel,
          grads_of<AnyMagnitude, AnyAngular, Kept::output, kAllSums>(
              args, own_constants, filters, channel, 1, position, vectors, term, sums
          )
      );
      if (p.t == nullptr)
        continue;
      Vector<A, V> t;
#pragma unroll
      for (int j = 0; j < V; ++j)
        t.at[j] = term[j] * position.inverse_b[j] * position.inverse_b[j];
      store_vector(static_cast<A*>(p.t) + row * p.o + channel, t);
    }
    each_sum<kAllSums>(sums, [&](int bit, const A(&own)[V]) {
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
        for (int other = 0; other < lanes.rows; ++other)
          total += columns[other * lanes.columns * V + c];
        parts[chunk * V + c] = total;
      }
      __syncthreads();
    });
  }
}

// Runs the pass where it takes the call and says so; the general one takes the others.
template <class T>
bool grad_dot_elementwise_typed(const GradDotParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  if constexpr (std::is_same<T, double>::value) {
    (void)p;
    (void)stream;
    return false;
  } else {
    constexpr int kV = kDirectVector;
    const bool empty = p.positions == 0 && p.sums == 0;
    if (empty || !p.channels_last ||
        !takes_channel_vectors(p.o, p.o, p.groups, {p.grad_y, p.kept, p.norm, p.grad_u, p.t}))
      return false;
    const GradDotArgs args = grad_dot_args<A>(p, kV);
    launch(
        "grad_dot_elementwise",
        grad_dot_elementwise_kernel<T, kV>,
        Grid{p.rows},
        args.row_lanes.threads,
        SharedBytes().take<A>(int64_t(args.row_lanes.rows) * args.row_lanes.columns * kV).total(),
        stream,
        args
    );
    return true;
  }
}

}  // namespace dcconv::cuda

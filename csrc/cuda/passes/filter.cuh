// The filter side: norms and scaled filters, the gradient of the filters, and the gradients of the
// parameters per filter. One block per filter; one more finishes what needs all of a map or all
// filters, so that it costs no launch of its own.
#pragma once

#include "cuda/support/functions.cuh"
#include "cuda/support/lanes.cuh"

namespace dcconv::cuda {

// m = mean of b from the sums of its blocks, in their order. One block.
template <class A>
__device__ void finish_mean(const FilterNormParams& p, double* scratch) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < p.blocks; i += kThreads)
    total += p.block_sums[i];
  total = block_sum(total, scratch);
  if (threadIdx.x == 0)
    *static_cast<A*>(p.mean) = A(total / double(p.map_count > 0 ? p.map_count : 1));
}

template <class T>
__global__ void __launch_bounds__(kThreads) filter_norm_kernel(FilterNormParams p) {
  using A = typename ComputeType<T>::type;
  SharedMemory shared;
  double* mean_scratch = shared.take<double>(kWarp);
  A* scratch = shared.take<A>(kWarp);
  A* factor = shared.take<A>(1);
  const int64_t o = blockIdx.x;
  if (o == p.o) {
    finish_mean<A>(p, mean_scratch);
    return;
  }
  const T* w = static_cast<const T*>(p.weight) + o * p.size;
  A total = 0;
  for (int64_t i = threadIdx.x; i < p.size; i += kThreads) {
    const A value = load(w[i]);
    total += value * value;
  }
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) {
    const A a = sqrt_of(total + A(p.eps));
    static_cast<A*>(p.a)[o] = a;
    *factor = A(p.alpha) / (p.divide ? a : A(1));
  }
  if (p.scaled == nullptr)
    return;
  __syncthreads();
  T* out = static_cast<T*>(p.scaled) + o * p.size;
  for (int64_t i = threadIdx.x; i < p.size; i += kThreads)
    out[i] = Store<T>::from(load(w[i]) * *factor);
}

// Row of a kind in totals, which holds the kinds of `sums` in rising order.
__device__ __forceinline__ const double* total_of(const FilterGradParams& p, int kind) {
  int row = 0;
  for (int bit = 1; bit < kind; bit *= 2)
    row += (p.sums & bit) != 0;
  return p.totals + row * p.o;
}

// Gradients of bias, radius, mean norm and k from the column sums. One block.
template <class T>
__device__ void finish_parameters(const FilterGradParams& p, double* scratch) {
  using A = typename ComputeType<T>::type;
  const A factor = p.filters.mean == nullptr ? A(1) : *static_cast<const A*>(p.filters.mean);
  double of_radius = 0, of_mean = 0, of_k = 0;
  for (int64_t o = threadIdx.x; o < p.o; o += kThreads) {
    if ((p.sums & kSumRho) != 0) {
      const A radius = p.filters.radius == nullptr
                           ? A(1)
                           : static_cast<const A*>(p.filters.radius)[o * p.filters.radius_stride];
      // On its floor rho is constant.
      const double s = radius * factor < A(kRhoFloor) ? 0.0 : total_of(p, kSumRho)[o];
      of_mean += double(radius) * s;
      of_radius += s;
      if (p.grad_radius != nullptr && p.filters.radius_stride == 1)
        static_cast<A*>(p.grad_radius)[o] = A(s * double(factor));
    }
    if ((p.sums & kSumK) != 0) {
      const double s = total_of(p, kSumK)[o];
      of_k += s;
      if (p.grad_k != nullptr && p.filters.k_stride == 1)
        static_cast<A*>(p.grad_k)[o] = A(s);
    }
    if (p.grad_bias != nullptr)
      static_cast<T*>(p.grad_bias)[o] = Store<T>::from(A(total_of(p, kSumBias)[o]));
  }
  of_radius = block_sum(of_radius, scratch);
  __syncthreads();
  of_mean = block_sum(of_mean, scratch);
  __syncthreads();
  of_k = block_sum(of_k, scratch);
  if (threadIdx.x != 0)
    return;
  if (p.grad_radius != nullptr && p.filters.radius_stride == 0)
    *static_cast<A*>(p.grad_radius) = A(of_radius * double(factor));
  if (p.grad_k != nullptr && p.filters.k_stride == 0)
    *static_cast<A*>(p.grad_k) = A(of_k);
  if (p.grad_mean != nullptr)
    *static_cast<A*>(p.grad_mean) = A(of_mean);
  if (p.sigma != nullptr)
    *static_cast<A*>(p.sigma) = A(of_mean / double(p.map_count > 0 ? p.map_count : 1));
}

template <class T>
__global__ void __launch_bounds__(kThreads) filter_grad_kernel(FilterGradParams p) {
  using A = typename ComputeType<T>::type;
  SharedMemory shared;
  double* total_scratch = shared.take<double>(kWarp);
  A* scratch = shared.take<A>(kWarp);
  A* along = shared.take<A>(1);
  // Without a gradient of the weight the one block is the last one.
  const int64_t o = p.library_grad == nullptr ? p.o : blockIdx.x;
  if (o == p.o) {
    finish_parameters<T>(p, total_scratch);
    return;
  }
  const T* w = static_cast<const T*>(p.weight) + o * p.size;
  const T* g = static_cast<const T*>(p.library_grad) + o * p.size;
  T* out = static_cast<T*>(p.grad_weight) + o * p.size;
  const A a = static_cast<const A*>(p.a)[o];
  const A scale = A(p.alpha) / (p.divide ? a : A(1));
  A total = 0;
  if (p.project) {
    for (int64_t i = threadIdx.x; i < p.size; i += kThreads)
      total += load(g[i]) * load(w[i]);
    total = block_sum(total, scratch);
  }
  if (threadIdx.x == 0) {
    A factor = -scale * total / (a * a);
    if ((p.sums & kSumA) != 0)
      factor += A(total_of(p, kSumA)[o]) / a;
    *along = factor;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < p.size; i += kThreads)
    out[i] = Store<T>::from(load(g[i]) * scale + load(w[i]) * *along);
}

template <class T>
void filter_norm_typed(const FilterNormParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  launch(
      "filter_norm",
      filter_norm_kernel<T>,
      Grid{p.o + (p.mean != nullptr ? 1 : 0)},
      kThreads,
      SharedBytes().take<double>(kWarp).template take<A>(kWarp).template take<A>(1).total(),
      stream,
      p
  );
}

template <class T>
void filter_grad_typed(const FilterGradParams& p, Stream stream) {
  using A = typename ComputeType<T>::type;
  const int64_t filters = p.library_grad == nullptr ? 0 : p.o;
  const bool parameters = p.grad_bias != nullptr || p.grad_radius != nullptr ||
                          p.grad_mean != nullptr || p.grad_k != nullptr || p.sigma != nullptr;
  launch(
      "filter_grad",
      filter_grad_kernel<T>,
      Grid{filters + (parameters ? 1 : 0)},
      kThreads,
      SharedBytes().take<double>(kWarp).template take<A>(kWarp).template take<A>(1).total(),
      stream,
      p
  );
}

}  // namespace dcconv::cuda

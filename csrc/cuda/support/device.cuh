// The CUDA constructs that kernels are written in: nvcc's own, or those of the SIMT model of
// tests/cuda/simt under a host compiler (DCCONV_SIMT). Nothing here knows about convolution.
#pragma once

#if defined(DCCONV_SIMT)
#include "simt.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>

namespace dcconv::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

__host__ __device__ constexpr std::size_t align16(std::size_t bytes) {
  return (bytes + 15) / 16 * 16;
}

// V elements that are loaded and stored together.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

// Elements of a 16-byte access.
template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

template <class T, int V>
__device__ __forceinline__ Vector<T, V> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, V>*>(p);
}

template <class T, int V>
__device__ __forceinline__ void store_vector(T* p, const Vector<T, V>& v) {
#if !defined(DCCONV_SIMT)
  // An assignment may come out as one store per member: nvcc does not always merge them again.
  if constexpr (sizeof(v) == sizeof(uint4)) {
    uint4 bits;
    memcpy(&bits, &v, sizeof(bits));
    __stwb(reinterpret_cast<uint4*>(p), bits);
    return;
  }
#endif
  *reinterpret_cast<Vector<T, V>*>(p) = v;
}

// Dynamic shared memory, taken piece by piece in the same order by every thread of a block.
class SharedMemory {
public:
#if defined(DCCONV_SIMT)
  template <class A>
  A* take(int count) {
    return static_cast<A*>(simt::shared_piece(sizeof(A) * static_cast<std::size_t>(count)));
  }
#else
  __device__ __forceinline__ SharedMemory() {
    extern __shared__ uint4 dcconv_shared_memory[];
    next_ = reinterpret_cast<unsigned char*>(dcconv_shared_memory);
  }
  template <class A>
  __device__ __forceinline__ A* take(int count) {
    A* piece = reinterpret_cast<A*>(next_);
    next_ += align16(sizeof(A) * static_cast<std::size_t>(count));
    return piece;
  }

private:
  unsigned char* next_;
#endif
};

// The host's side of SharedMemory: the bytes of pieces.
class SharedBytes {
public:
  template <class A>
  SharedBytes& take(int64_t count) {
    bytes_ += align16(sizeof(A) * static_cast<std::size_t>(count));
    return *this;
  }
  std::size_t total() const { return bytes_; }

private:
  std::size_t bytes_ = 0;
};

// Division of numbers below 2^31 by a divisor known on the host: one multiplication.
class Divider {
public:
  Divider() = default;
  // Zero counts as one: sizes of maps without elements, which nobody divides by.
  explicit Divider(uint32_t divisor) : divisor_(divisor > 0 ? divisor : 1) {
    while ((uint64_t(1) << shift_) < divisor_)
      ++shift_;
    const uint64_t power = uint64_t(1) << shift_;
    multiplier_ = static_cast<uint32_t>(((power - divisor_) << 32) / divisor_ + 1);
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return (__umulhi(n, multiplier_) + n) >> shift_;
  }
  __device__ __forceinline__ uint32_t divisor() const { return divisor_; }

private:
  uint32_t divisor_ = 1;
  uint32_t multiplier_ = 1;
  uint32_t shift_ = 0;
};

// Sum over the lanes of aligned sub-warps of `width` threads, a power of two; every lane gets it.
template <class A>
__device__ __forceinline__ A sub_warp_sum(A value, int width) {
  for (int step = width / 2; step > 0; step /= 2)
    value += __shfl_xor_sync(kFullMask, value, step);
  return value;
}

// Sum over a block, in thread 0 only. scratch: [kWarp]; the caller synchronises before reuse.
template <class A>
__device__ __forceinline__ A block_sum(A value, A* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  value = sub_warp_sum(value, kWarp);
  if (lane == 0)
    scratch[warp] = value;
  __syncthreads();
  if (warp == 0)
    value = sub_warp_sum(lane < warps ? scratch[lane] : A(0), kWarp);
  return value;
}

}  // namespace dcconv::cuda

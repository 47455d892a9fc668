// Vectors of 16-bit scalars stay packed in 32-bit registers until they are worked on: an array of
// scalars that is loaded under a condition would be merged half by half.
#pragma once

#include <type_traits>

#include "cuda/support/device.cuh"
#include "storage.h"

namespace dcconv::cuda {

using namespace ::dcconv::portable;

// Two neighbouring scalars in one word, the first in the low half.
template <class T>
constexpr bool kPacked = sizeof(T) == 2;

__device__ __forceinline__ void unpack_word(BFloat16, uint32_t word, float& low, float& high) {
  low = float_of(static_cast<int32_t>(word << 16));
  high = float_of(static_cast<int32_t>(word & 0xffff0000u));
}

__device__ __forceinline__ void unpack_word(Half, uint32_t word, float& low, float& high) {
  low = load(static_cast<Half>(word & 0xffffu));
  high = load(static_cast<Half>(word >> 16));
}

template <class T>
__device__ __forceinline__ uint32_t pack_word(float low, float high) {
#if defined(DCCONV_SIMT)
  return static_cast<uint32_t>(Store<T>::from(low)) |
         (static_cast<uint32_t>(Store<T>::from(high)) << 16);
#else
  uint32_t word;
  if constexpr (std::is_same<T, BFloat16>::value)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#endif
}

// The elements of a vector in the compute dtype.
template <class T, int V, class A>
__device__ __forceinline__ void unpack(const Vector<T, V>& v, A (&out)[V]) {
  if constexpr (kPacked<T> && V % 2 == 0) {
    uint32_t words[V / 2];
    memcpy(words, &v, sizeof(words));
#pragma unroll
    for (int j = 0; j < V / 2; ++j)
      unpack_word(T{}, words[j], out[2 * j], out[2 * j + 1]);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j)
      out[j] = load(v.at[j]);
  }
}

template <class T, int V, class A>
__device__ __forceinline__ Vector<T, V> pack(const A (&values)[V]) {
  Vector<T, V> v;
  if constexpr (kPacked<T> && V % 2 == 0) {
    uint32_t words[V / 2];
#pragma unroll
    for (int j = 0; j < V / 2; ++j)
      words[j] = pack_word<T>(values[2 * j], values[2 * j + 1]);
    memcpy(&v, words, sizeof(words));
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j)
      v.at[j] = Store<T>::from(values[j]);
  }
  return v;
}

}  // namespace dcconv::cuda

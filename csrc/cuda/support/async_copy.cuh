// Copies from global to shared memory that run beside the threads that issue them (cp.async).
#pragma once

#include "cuda/support/device.cuh"

namespace dcconv::cuda {

#if !defined(DCCONV_SIMT)
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif

// 16 bytes from global to shared memory, both aligned to 16, past the L1 cache; zeros instead, and
// global memory is not read, where !valid. What shared memory holds is undefined from here until
// the thread's wait_async, and unseen by other threads until a barrier after it.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
#if defined(DCCONV_SIMT)
  simt::copy_async(shared, global, valid);
#else
  const uint32_t to = shared_address(shared);
  const std::size_t from = __cvta_generic_to_global(global);
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(from), "r"(bytes)
               : "memory");
#endif
}

// The same, of an address that is known to be valid.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if defined(DCCONV_SIMT)
  simt::copy_async(shared, global, true);
#else
  const uint32_t to = shared_address(shared);
  const std::size_t from = __cvta_generic_to_global(global);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to), "l"(from) : "memory");
#endif
}

// Makes a group of the copies that the thread has issued since the last one.
__device__ __forceinline__ void commit_async() {
#if defined(DCCONV_SIMT)
  simt::commit_async();
#else
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Waits for the thread's own groups, but for the last Pending of them; groups may be empty. Every
// copy has to be waited for before its thread exits.
template <int Pending>
__device__ __forceinline__ void wait_async() {
  static_assert(Pending >= 0, "a number of groups");
#if defined(DCCONV_SIMT)
  simt::wait_async(Pending);
#else
  asm volatile("cp.async.wait_group %0;" : : "n"(Pending) : "memory");
#endif
}

}  // namespace dcconv::cuda

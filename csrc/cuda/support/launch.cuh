// Starts a kernel on a stream, or in the SIMT model; a failed launch raises with the kernel's name.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/support/device.cuh"

namespace dcconv::cuda {

struct Grid {
  int64_t x;
  int64_t y = 1;
};

// Shared memory that every launch may have; more is asked for, up to what the device has.
constexpr std::size_t kSharedLimit = 48 << 10;

constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridY = 65535;

inline int multiprocessors() {
#if defined(DCCONV_SIMT)
  return simt::multiprocessors();
#else
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    throw std::runtime_error("dcconv: the CUDA device does not report its multiprocessors");
  return count;
#endif
}

// Shared memory of the largest block that the device runs.
inline std::size_t largest_shared() {
#if defined(DCCONV_SIMT)
  return simt::kMaxSharedBytes;
#else
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess)
    throw std::runtime_error("dcconv: the CUDA device does not report its shared memory");
  return static_cast<std::size_t>(bytes);
#endif
}

// Lets the kernel be launched with so much shared memory on the current device; false where the
// device has less.
inline bool allow_shared(const void* kernel, std::size_t bytes) {
  if (bytes <= kSharedLimit)
    return true;
  if (bytes > largest_shared())
    return false;
#if defined(DCCONV_SIMT)
  (void)kernel;
  simt::allow_shared(bytes);
  return true;
#else
  struct Allowed {
    const void* kernel;
    int device;
    std::size_t bytes;
  };
  static std::mutex mutex;
  static std::vector<Allowed> all;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess)
    throw std::runtime_error("dcconv: there is no current CUDA device");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = std::find_if(all.begin(), all.end(), [&](const Allowed& allowed) {
    return allowed.kernel == kernel && allowed.device == device;
  });
  if (known != all.end() && known->bytes >= bytes)
    return true;
  if (cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)
      ) != cudaSuccess) {
    cudaGetLastError();  // or the next launch would report it
    return false;
  }
  if (known != all.end())
    known->bytes = bytes;
  else
    all.push_back({kernel, device, bytes});
  return true;
#endif
}

// Blocks of a loop over `tasks`: enough to fill the device when each multiprocessor holds
// `threads_resident` threads, and no more than tasks.
inline int64_t persistent_blocks(int64_t tasks, int threads, int threads_resident = 1024) {
  const int64_t per_multiprocessor = std::max(threads_resident / threads, 1);
  return std::min(std::max<int64_t>(tasks, 1), multiprocessors() * per_multiprocessor);
}

// kernel(params) on `grid` blocks of `threads` threads. Grids without blocks do nothing.
template <class Params>
void launch(
    const char* name,
    void (*kernel)(Params),
    Grid grid,
    int threads,
    std::size_t shared_bytes,
    Stream stream,
    const Params& params
) {
  if (grid.x == 0 || grid.y == 0)
    return;
  std::ostringstream problem;
  if (grid.x > kMaxGridX || grid.y > kMaxGridY) {
    problem << "too many blocks";
  } else if (!allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes)) {
    problem << "the device has " << largest_shared() << " bytes";
  } else {
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), 1);
#if defined(DCCONV_SIMT)
    (void)stream;
    const simt::Request request{reinterpret_cast<const void*>(kernel), &params, sizeof(params)};
    simt::launch(
        name,
        blocks,
        static_cast<unsigned>(threads),
        shared_bytes,
        [&] { kernel(params); },
        &request
    );
#else
    kernel<<<
        blocks,
        static_cast<unsigned>(threads),
        shared_bytes,
        static_cast<cudaStream_t>(stream)>>>(params);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
      problem << cudaGetErrorString(error);
#endif
  }
  if (problem.str().empty())
    return;
  std::ostringstream text;
  text << "dcconv: kernel " << name << " did not start on a grid of " << grid.x << " x " << grid.y
       << " blocks, " << threads << " threads and " << shared_bytes
       << " bytes of shared memory: " << problem.str();
  throw std::runtime_error(text.str());
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int power_of_two_at_least(int64_t n, int limit) {
  int power = 1;
  while (power < n && power < limit)
    power *= 2;
  return power;
}

inline bool aligned16(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

}  // namespace dcconv::cuda

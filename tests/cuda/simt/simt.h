// CUDA's own spelling for a host compiler: a kernel's source runs thread by thread on the CPU.
// README.md says what the model shows and what it cannot.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "approximate.h"
#include "async_copy.h"
#include "collectives.h"
#include "state.h"
#include "tensor_core.h"

namespace simt {

// Shared memory of a block: what every launch may use, and what the largest device has.
constexpr std::size_t kSharedBytes = 48 << 10;
constexpr std::size_t kMaxSharedBytes = 227 << 10;

// A kernel by its address, and the bytes of what it is launched with.
struct Request {
  const void* kernel;
  const void* parameters;
  std::size_t parameter_bytes;
};

// Sees a launch before it runs: name, blocks, threads, bytes of shared memory, kernel, parameters
// and their bytes. What it answers says whether the model runs the launch: nothing of it at 0.
using Observer = int (*)(
    const char*, unsigned, unsigned, unsigned, std::size_t, const void*, const void*, std::size_t
);

struct Settings {
  std::atomic<Observer> observer{nullptr};
  std::atomic<std::uint64_t> seed{0};
  std::atomic<std::uint64_t> launches{0};  // since the seed was set
  std::atomic<int> multiprocessors{2};
  std::atomic<int> concurrent_blocks{4};
};

inline Settings settings;
inline thread_local std::size_t allowed_shared = kSharedBytes;

// The schedules of all launches that follow depend on the seed and on their order.
inline void set_seed(std::uint64_t seed) {
  settings.seed = seed;
  settings.launches = 0;
}

// Null: nobody sees the launches.
inline void set_observer(Observer observer) {
  settings.observer = observer;
}

// What a kernel's host code is told about the device.
inline void set_multiprocessors(int count) {
  settings.multiprocessors = count;
}

inline int multiprocessors() {
  return settings.multiprocessors;
}

// How many blocks run at once where threads are the operating system's; 1: one after another, in
// shuffled order, as fibers always do.
inline void set_concurrent_blocks(int count) {
  settings.concurrent_blocks = count;
}

inline void check_launch(const char* name, bool valid, const char* rule, const std::string& got) {
  if (!valid)
    throw std::runtime_error(
        std::string("simt: launch of '") + name + "': " + rule + ", got " + got
    );
}

// Lets the calling thread's next launch use more than 48 KiB of shared memory.
inline void allow_shared(std::size_t bytes) {
  if (bytes > kMaxSharedBytes)
    throw std::runtime_error(
        "simt: shared memory must be at most " + std::to_string(kMaxSharedBytes) + " bytes, got " +
        std::to_string(bytes)
    );
  allowed_shared = bytes > kSharedBytes ? bytes : kSharedBytes;
}

// Runs kernel_call() as every thread of every block; throws where CUDA would refuse the launch.
// With a request the observer sees it.
template <class F>
void launch(
    const char* name,
    dim3 grid,
    unsigned threads,
    std::size_t shared_bytes,
    F&& kernel_call,
    const Request* request = nullptr
) {
  using Kernel = std::remove_reference_t<F>;
  const std::size_t allowed = allowed_shared;
  allowed_shared = kSharedBytes;
  check_launch(
      name,
      threads % kLanes == 0 && threads > 0 && threads <= kMaxThreads,
      "threads must be a multiple of 32 up to 1024",
      std::to_string(threads)
  );
  check_launch(
      name,
      grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x < 1u << 31 && grid.y < 1u << 16 &&
          grid.z < 1u << 16,
      "grid must be at least (1, 1, 1) and at most (2147483647, 65535, 65535)",
      "(" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) +
          ")"
  );
  check_launch(
      name,
      shared_bytes <= allowed,
      allowed == kSharedBytes ? "shared memory must be at most 49152 bytes without allow_shared"
                              : "shared memory must be at most what allow_shared was given",
      std::to_string(shared_bytes)
  );
  if (current != nullptr)
    fail(*current, std::string("launches '") + name + "' from inside a kernel");
  const Observer observer = settings.observer;
  if (observer != nullptr && request != nullptr &&
      observer(
          name,
          grid.x,
          grid.y,
          threads,
          shared_bytes,
          request->kernel,
          request->parameters,
          request->parameter_bytes
      ) == 0)
    return;
  Random mix{settings.seed + 0x632be59bd9b4e019u * settings.launches++};
  const Launch description{
      name,
      grid,
      dim3(threads),
      shared_bytes,
      [](void* kernel) { (*static_cast<Kernel*>(kernel))(); },
      const_cast<void*>(static_cast<const void*>(std::addressof(kernel_call))),
      mix.next(),
      settings.concurrent_blocks
  };
  Engine::run(description);
}

}  // namespace simt

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define threadIdx (::simt::here("threadIdx").index)
#define blockIdx (::simt::here("blockIdx").block->index)
#define blockDim (::simt::here("blockDim").block->launch->block)
#define gridDim (::simt::here("gridDim").block->launch->grid)

inline void __syncthreads() {
  simt::Thread& self = simt::here("__syncthreads");
  simt::Engine::wait_block(self);
}

inline void __syncwarp(unsigned mask = simt::kFullMask) {
  simt::Thread& self = simt::here("__syncwarp");
  simt::check_mask(self, "__syncwarp", mask);
  simt::Engine::wait_warp(self, "__syncwarp", 0);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return simt::shuffle("__shfl_sync", mask, value, width, [=](int, int first) {
    return first + (source & (width - 1));
  });
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::shuffle("__shfl_up_sync", mask, value, width, [=](int lane, int first) {
    return delta <= static_cast<unsigned>(lane - first) ? lane - static_cast<int>(delta) : lane;
  });
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::shuffle("__shfl_down_sync", mask, value, width, [=](int lane, int first) {
    const unsigned left = static_cast<unsigned>(first + width - 1 - lane);
    return delta <= left ? lane + static_cast<int>(delta) : lane;
  });
}

// A lane of an earlier segment is read, one of a later segment is not.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return simt::shuffle("__shfl_xor_sync", mask, value, width, [=](int lane, int first) {
    const int source = lane ^ lane_mask;
    return source >= 0 && source < first + width ? source : lane;
  });
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(std::uint64_t{a} * b >> 32);
}

// What a launch, a block, a warp and a thread are, and what is said when a kernel breaks a rule.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxPieces = 32;
constexpr std::size_t kPieceAlign = 16;
constexpr std::size_t kSlotBytes = 64;  // of one lane's payload in a collective

// splitmix64.
struct Random {
  std::uint64_t state;

  std::uint64_t next() {
    std::uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  unsigned below(unsigned bound) { return static_cast<unsigned>((next() >> 32) * bound >> 32); }
};

struct Launch {
  const char* name;
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes;
  void (*call)(void* kernel);
  void* kernel;
  std::uint64_t seed;
  int concurrent_blocks;

  std::uint64_t blocks() const { return std::uint64_t{grid.x} * grid.y * grid.z; }
};

// The blocks of a grid, each once: start, start + step, ... modulo their number.
class BlockOrder {
public:
  BlockOrder(const Launch& launch, Random& random) : grid(launch.grid), blocks(launch.blocks()) {
    start = random.next() % blocks;
    if (blocks >> 32)
      return;  // i * step would overflow
    do
      step = 1 + random.next() % blocks;
    while (std::gcd(step, blocks) != 1);
  }

  dim3 operator[](std::uint64_t i) const {
    const std::uint64_t number = (start + i * step % blocks) % blocks;
    const std::uint64_t row = number / grid.x;
    return dim3(
        static_cast<unsigned>(number % grid.x),
        static_cast<unsigned>(row % grid.y),
        static_cast<unsigned>(row / grid.y)
    );
  }

private:
  dim3 grid;
  std::uint64_t blocks, start, step = 1;
};

struct Warp;
struct Block;

// An asynchronous copy that has not landed.
// Bytes that cp.async and ldmatrix take of a thread's address at once, aligned to as many.
constexpr unsigned kAccess = 16;

struct Copy {
  void* shared;
  const void* global;
  bool valid;  // zeros otherwise
  std::uint64_t group;
  bool is_read = false;
  unsigned char data[kAccess] = {};
};

struct Thread {
  dim3 index{0, 0, 0};
  unsigned lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
  // Of the running block.
  unsigned pieces = 0;
  std::size_t taken = 0;
  unsigned parity = 0;
  Random random{0};
  std::vector<Copy> copies;      // in the order of their groups
  std::uint64_t copy_group = 0;  // that the next copy belongs to
  // What the thread waits at, null while it runs. Another thread may be describing this one.
  std::atomic<const char*> waits_at{nullptr};
  std::atomic<int> width{0};
  std::atomic<bool> exited{false};

  void restart(std::uint64_t seed) {
    pieces = 0;
    taken = 0;
    parity = 0;
    random.state = seed;
    copy_group = 0;
    run();
    exited.store(false, std::memory_order_relaxed);
  }

  void wait(const char* at, int at_width) {
    waits_at.store(at, std::memory_order_relaxed);
    width.store(at_width, std::memory_order_relaxed);
  }

  void run() { waits_at.store(nullptr, std::memory_order_relaxed); }

  void exit() { exited.store(true, std::memory_order_relaxed); }
};

struct Warp {
  Thread* lanes = nullptr;
  // Two sets of slots, used in turn: a lane that writes a set for the second time has passed the
  // collective between, which every lane reaches only after it has read the first.
  alignas(16) unsigned char slots[2][kLanes][kSlotBytes];
};

struct Block {
  const Launch* launch = nullptr;
  dim3 index;
  std::unique_ptr<Thread[]> threads{new Thread[kMaxThreads]};
  std::unique_ptr<Warp[]> warps{new Warp[kMaxThreads / kLanes]};
  // Bytes of each shared piece, as its first taker said. Relaxed: agreeing on a size must not order
  // the threads.
  std::atomic<std::size_t> sizes[kMaxPieces];

  Block() {
    for (unsigned i = 0; i < kMaxThreads; ++i) {
      threads[i].index = dim3(i, 0, 0);
      threads[i].lane = i % kLanes;
      threads[i].warp = &warps[i / kLanes];
      threads[i].block = this;
    }
    for (unsigned i = 0; i < kMaxThreads / kLanes; ++i)
      warps[i].lanes = &threads[i * kLanes];
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  unsigned count() const { return launch->block.x; }

  void restart(dim3 at) {
    index = at;
    Random seeds{launch->seed ^ (std::uint64_t{at.z} << 48 ^ std::uint64_t{at.y} << 32 ^ at.x)};
    for (unsigned i = 0; i < count(); ++i)
      threads[i].restart(seeds.next());
    for (std::atomic<std::size_t>& size : sizes)
      size.store(SIZE_MAX, std::memory_order_relaxed);
  }
};

inline std::string doing(const Thread& thread) {
  if (thread.exited.load(std::memory_order_relaxed))
    return "exited";
  const char* at = thread.waits_at.load(std::memory_order_relaxed);
  if (at == nullptr)
    return "running";
  std::string text = std::string("waiting at ") + at;
  if (const int width = thread.width.load(std::memory_order_relaxed))
    text += " of width " + std::to_string(width);
  return text;
}

// "threads 0-30 waiting at __syncthreads, thread 31 exited".
inline std::string doing(const Block& block, unsigned first, unsigned last) {
  std::string text;
  for (unsigned i = first; i < last;) {
    const std::string one = doing(block.threads[i]);
    unsigned end = i + 1;
    while (end < last && doing(block.threads[end]) == one)
      ++end;
    text += text.empty() ? "" : ", ";
    text += end - i == 1 ? "thread " + std::to_string(i)
                         : "threads " + std::to_string(i) + "-" + std::to_string(end - 1);
    text += " " + one;
    i = end;
  }
  return text;
}

inline std::string doing(const Warp& warp) {
  const unsigned first = warp.lanes->index.x;
  return doing(*warp.lanes->block, first, first + kLanes);
}

inline std::string doing(const Block& block) {
  return doing(block, 0, block.count());
}

[[noreturn]] inline void fail(const Block& block, const std::string& what) {
  static std::atomic<bool> failing{false};
  while (failing.exchange(true)) {
    // Another thread is about to abort the process.
  }
  std::fprintf(
      stderr,
      "simt: kernel '%s', block (%u, %u, %u): %s\n",
      block.launch->name,
      block.index.x,
      block.index.y,
      block.index.z,
      what.c_str()
  );
  std::fflush(stderr);
  std::abort();
}

[[noreturn]] inline void fail(const Thread& thread, const std::string& what) {
  fail(*thread.block, "thread " + std::to_string(thread.index.x) + ": " + what);
}

inline void check_copies_landed(const Thread& thread) {
  if (!thread.copies.empty())
    fail(
        thread,
        "exits while " + std::to_string(thread.copies.size()) + " of its copies are under way"
    );
}

[[noreturn]] inline void fail_divergent(const Warp& warp) {
  fail(*warp.lanes->block, "divergent collective: " + doing(warp));
}

[[noreturn]] inline void fail_barrier(const Block& block) {
  fail(block, "deadlock: __syncthreads is not reached by every thread: " + doing(block));
}

inline void check_agreement(const Warp& warp) {
  const char* name = warp.lanes->waits_at.load(std::memory_order_relaxed);
  const int width = warp.lanes->width.load(std::memory_order_relaxed);
  for (unsigned i = 1; i < kLanes; ++i) {
    const char* other = warp.lanes[i].waits_at.load(std::memory_order_relaxed);
    if (warp.lanes[i].width.load(std::memory_order_relaxed) != width ||
        (other != name && std::strcmp(other, name) != 0))
      fail_divergent(warp);
  }
}

// The thread that runs; null outside kernels.
inline thread_local Thread* current = nullptr;

inline Thread& here(const char* what) {
  if (__builtin_expect(current == nullptr, 0)) {
    std::fprintf(stderr, "simt: %s is used outside a kernel\n", what);
    std::abort();
  }
  return *current;
}

// Fills memory with 0xff bytes: NaN in every floating type.
inline void poison(void* memory, std::size_t bytes) {
  if (bytes)
    std::memset(memory, 0xff, bytes);
}

}  // namespace simt

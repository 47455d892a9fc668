// Kernels that exercise the model, right ones and faulty ones: self_test COMMAND [SEED [BLOCKS]],
// where BLOCKS run at once. Exits 0 when every value is right.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "simt.h"

namespace {

constexpr unsigned kFull = 0xffffffffu;

int wrong = 0;

template <class T>
void expect(const char* what, std::size_t i, const T& got, const T& expected) {
  if (std::memcmp(&got, &expected, sizeof(T)) == 0)
    return;
  if (++wrong <= 5)
    std::printf("%s[%zu] is %.9g, not %.9g\n", what, i, double(got), double(expected));
}

template <class T>
std::vector<T> poisoned(std::size_t count) {
  std::vector<T> values(count);
  simt::poison(values.data(), count * sizeof(T));
  return values;
}

template <class T>
T* shared(std::size_t count) {
  return static_cast<T*>(simt::shared_piece(count * sizeof(T)));
}

// ---- indices

struct IndexParams {
  unsigned* out;
};

__global__ void index_kernel(IndexParams p) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned i = block * blockDim.x + threadIdx.x;
  p.out[i] = i ^ (threadIdx.y + threadIdx.z + blockDim.y + blockDim.z);
}

void index() {
  for (const dim3 grid : {dim3(1), dim3(7, 5, 3), dim3(2, 1, 40)}) {
    const unsigned blocks = grid.x * grid.y * grid.z;
    std::vector<unsigned> out = poisoned<unsigned>(blocks * 64);
    simt::launch("index", grid, 64, 0, [&] { index_kernel({out.data()}); });
    for (unsigned i = 0; i < out.size(); ++i)
      expect("index", i, out[i], i ^ 2);
  }
}

// ---- barriers

struct ReduceParams {
  const float* x;
  float* sums;
  unsigned count;
};

__global__ void __launch_bounds__(1024) reduce_kernel(ReduceParams p) {
  float* partial = shared<float>(blockDim.x);
  float sum = 0;
  for (unsigned i = threadIdx.x; i < p.count; i += blockDim.x)
    sum += __ldg(p.x + blockIdx.x * p.count + i);
  partial[threadIdx.x] = sum;
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half)
      partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0)
    p.sums[blockIdx.x] = partial[0];
}

void reduce() {
  for (const unsigned threads : {32u, 256u}) {
    const unsigned blocks = 2, count = 300;
    std::vector<float> x(blocks * count), sums = poisoned<float>(blocks);
    for (std::size_t i = 0; i < x.size(); ++i)
      x[i] = static_cast<float>(i * 7 % 31);
    simt::launch("reduce", dim3(blocks), threads, threads * sizeof(float), [&] {
      reduce_kernel({x.data(), sums.data(), count});
    });
    for (unsigned block = 0; block < blocks; ++block) {
      float sum = 0;
      for (unsigned i = 0; i < count; ++i)
        sum += x[block * count + i];
      expect("sum", block, sums[block], sum);
    }
  }
}

// Tiles go through two buffers; the faulty variant lacks the barrier between writing and reading.
template <bool kBarrier>
__global__ void pipeline_kernel(ReduceParams p) {
  float* buffers[2] = {shared<float>(blockDim.x), shared<float>(blockDim.x)};
  const unsigned tiles = p.count / blockDim.x;
  float kept[4] = {0, 0, 0, 0};
  buffers[0][threadIdx.x] = p.x[threadIdx.x];
  for (unsigned tile = 0; tile < tiles; ++tile) {
    if (kBarrier)
      __syncthreads();
    if (tile + 1 < tiles)
      buffers[(tile + 1) % 2][threadIdx.x] = p.x[(tile + 1) * blockDim.x + threadIdx.x];
    kept[tile % 4] += buffers[tile % 2][blockDim.x - 1 - threadIdx.x] * float(tile + 1);
  }
  p.sums[blockIdx.x * blockDim.x + threadIdx.x] = kept[0] + kept[1] + kept[2] + kept[3];
}

template <bool kBarrier>
void pipeline() {
  const unsigned threads = 96, tiles = 7, blocks = 3;
  std::vector<float> x(threads * tiles), out = poisoned<float>(blocks * threads);
  for (std::size_t i = 0; i < x.size(); ++i)
    x[i] = static_cast<float>(i * 11 % 53);
  simt::launch("pipeline", dim3(blocks), threads, 2 * threads * sizeof(float), [&] {
    pipeline_kernel<kBarrier>({x.data(), out.data(), threads * tiles});
  });
  for (unsigned i = 0; i < out.size(); ++i) {
    float sum = 0;
    for (unsigned tile = 0; tile < tiles; ++tile)
      sum += x[tile * threads + threads - 1 - i % threads] * float(tile + 1);
    expect("pipeline", i, out[i], sum);
  }
}

// Each warp turns its 32 values round through shared memory.
template <bool kBarrier>
__global__ void turn_kernel(ReduceParams p) {
  float* values = shared<float>(blockDim.x);
  values[threadIdx.x] = p.x[threadIdx.x];
  if (kBarrier)
    __syncwarp();
  p.sums[blockIdx.x * blockDim.x + threadIdx.x] = values[threadIdx.x ^ 31];
}

template <bool kBarrier>
void turn() {
  const unsigned threads = 64;
  std::vector<float> x(threads), out = poisoned<float>(2 * threads);
  for (unsigned i = 0; i < threads; ++i)
    x[i] = static_cast<float>(i);
  simt::launch("turn", dim3(2), threads, threads * sizeof(float), [&] {
    turn_kernel<kBarrier>({x.data(), out.data(), threads});
  });
  for (unsigned i = 0; i < out.size(); ++i)
    expect("turn", i, out[i], static_cast<float>(i % threads ^ 31));
}

// ---- shuffles

enum Kind { kIndexed, kUp, kDown, kXor };

template <class T>
__device__ __forceinline__ T shuffled(Kind kind, T value, int argument, int width) {
  if (kind == kIndexed)
    return __shfl_sync(kFull, value, argument, width);
  if (kind == kUp)
    return __shfl_up_sync(kFull, value, static_cast<unsigned>(argument), width);
  if (kind == kDown)
    return __shfl_down_sync(kFull, value, static_cast<unsigned>(argument), width);
  return __shfl_xor_sync(kFull, value, argument, width);
}

template <class T>
T payload(unsigned thread) {
  return static_cast<T>(thread * 0x1000000010001 + 3);
}

constexpr Kind kKinds[] = {kIndexed, kUp, kDown, kXor};
constexpr int kArguments[] = {0, 1, 2, 7, 16, 31};

template <class T>
__global__ void shuffle_kernel(T* out) {
  for (const Kind kind : kKinds)
    for (int width = 1; width <= 32; width *= 2)
      for (const int argument : kArguments) {
        out[threadIdx.x] = shuffled(kind, payload<T>(threadIdx.x), argument, width);
        out += blockDim.x;
      }
}

template <class T>
void shuffle_type() {
  const int threads = 64;
  std::vector<T> out = poisoned<T>(4 * 6 * 6 * threads);
  simt::launch("shuffle", dim3(1), threads, 0, [&] { shuffle_kernel(out.data()); });
  std::size_t at = 0;
  for (const Kind kind : kKinds)
    for (int width = 1; width <= 32; width *= 2)
      for (const int argument : kArguments)
        for (int i = 0; i < threads; ++i) {
          const int lane = i % 32, warp = i - lane, segment = i / width * width;
          int source = i;
          if (kind == kIndexed)
            source = segment + argument % width;
          else if (kind == kUp && i - argument >= segment)
            source = i - argument;
          else if (kind == kDown && i + argument < segment + width)
            source = i + argument;
          else if (kind == kXor && warp + (lane ^ argument) < segment + width)
            source = warp + (lane ^ argument);
          expect("shuffle", at, out[at], payload<T>(static_cast<unsigned>(source)));
          ++at;
        }
}

void shuffle() {
  shuffle_type<float>();
  shuffle_type<double>();
  shuffle_type<int>();
  shuffle_type<unsigned>();
  shuffle_type<std::int64_t>();
  shuffle_type<std::uint64_t>();
}

// Many shuffles in a row, each lane with an argument of its own: slots are not reused too early.
void shuffle_chain() {
  const unsigned threads = 128;
  std::vector<int> out = poisoned<int>(threads);
  simt::launch("chain", dim3(1), threads, 0, [&] {
    int value = static_cast<int>(threadIdx.x);
    for (int i = 0; i < 50; ++i)
      value = __shfl_sync(kFull, value, static_cast<int>(threadIdx.x) * 5 + i) + 1;
    out[threadIdx.x] = value;
  });
  std::vector<int> values(threads), before;
  for (unsigned i = 0; i < threads; ++i)
    values[i] = static_cast<int>(i);
  for (unsigned step = 0; step < 50; ++step) {
    before = values;
    for (unsigned i = 0; i < threads; ++i)
      values[i] = before[i / 32 * 32 + (i * 5 + step) % 32] + 1;
  }
  for (unsigned i = 0; i < threads; ++i)
    expect("chain", i, out[i], values[i]);
}

void arithmetic() {
  std::vector<unsigned> out = poisoned<unsigned>(32);
  simt::launch("umulhi", dim3(1), 32, 0, [&] {
    out[threadIdx.x] = __umulhi(0x89abcdefu + threadIdx.x, 0xfedcba98u);
  });
  for (unsigned i = 0; i < 32; ++i)
    expect("umulhi", i, out[i], unsigned((0x89abcdefull + i) * 0xfedcba98ull >> 32));
}

// ---- shared memory

__global__ void pieces_kernel(unsigned char* out) {
  unsigned char* bytes = shared<unsigned char>(blockDim.x + 3);
  double* doubles = shared<double>(blockDim.x);
  const unsigned i = threadIdx.x;
  unsigned char poison[8];
  std::memcpy(poison, doubles + i, 8);
  bool right = bytes[i] == 0xff;
  for (const unsigned char byte : poison)
    right &= byte == 0xff;
  right &= reinterpret_cast<std::uintptr_t>(bytes) % 16 == 0;
  right &= reinterpret_cast<std::uintptr_t>(doubles) % 16 == 0;
  __syncthreads();
  bytes[i] = static_cast<unsigned char>(i);
  doubles[i] = i;
  __syncthreads();
  const unsigned j = blockDim.x - 1 - i;
  right &= bytes[j] == j && doubles[j] == j;
  out[blockIdx.x * blockDim.x + i] = right;
}

void pieces() {
  const unsigned threads = 64, blocks = 9;
  std::vector<unsigned char> out = poisoned<unsigned char>(blocks * threads);
  simt::launch("pieces", dim3(blocks), threads, 80 + 64 * 8, [&] { pieces_kernel(out.data()); });
  for (std::size_t i = 0; i < out.size(); ++i)
    expect("right", i, out[i], static_cast<unsigned char>(1));
}

// 60 KiB, which need the permission, for the one launch after it.
void large_shared() {
  std::vector<float> out = poisoned<float>(32);
  const auto run = [&] {
    simt::launch("large", dim3(1), 32, 60 << 10, [&] {
      float* values = shared<float>(15 << 10);
      values[threadIdx.x] = 1;
      out[threadIdx.x] = values[threadIdx.x];
    });
  };
  simt::allow_shared(60 << 10);
  run();
  for (unsigned i = 0; i < 32; ++i)
    expect("large", i, out[i], 1.0f);
  run();
}

// ---- schedules

std::atomic<unsigned> turns;

// Prints which block and thread came when.
void schedule() {
  const unsigned threads = 64, blocks = 8;
  std::vector<unsigned> order = poisoned<unsigned>(threads * blocks);
  simt::launch("schedule", dim3(blocks), threads, 0, [&] {
    const unsigned turn = turns.fetch_add(1, std::memory_order_relaxed);
    order[turn] = blockIdx.x * blockDim.x + threadIdx.x;
  });
  std::vector<bool> seen(order.size());
  for (const unsigned thread : order) {
    expect("seen twice", thread, int(seen.at(thread)), 0);
    seen[thread] = true;
    std::printf("%u ", thread);
  }
  std::printf("\n");
}

void host_threads() {
  std::vector<std::vector<float>> out;
  for (int i = 0; i < 2; ++i)
    out.push_back(poisoned<float>(64 * 20));
  std::vector<std::thread> callers;
  for (std::vector<float>& values : out)
    callers.emplace_back([&values] {
      simt::launch("caller", dim3(20), 64, 256, [&] {
        float* memory = shared<float>(64);
        memory[threadIdx.x] = static_cast<float>(threadIdx.x);
        __syncthreads();
        values[blockIdx.x * 64 + threadIdx.x] = memory[63 - threadIdx.x];
      });
    });
  for (std::thread& caller : callers)
    caller.join();
  for (const std::vector<float>& values : out)
    for (std::size_t i = 0; i < values.size(); ++i)
      expect("caller", i, values[i], static_cast<float>(63 - i % 64));
}

// ---- faults

template <class F>
void run_faulty(F&& kernel, dim3 grid = dim3(1), unsigned threads = 64, std::size_t bytes = 0) {
  simt::launch("faulty", grid, threads, bytes, kernel);
}

void block_race() {
  std::vector<int> out(64);
  run_faulty([&] { out[threadIdx.x] = static_cast<int>(blockIdx.x); }, dim3(2));
}

// The collectives of a warp do not order it before another one.
void warp_race() {
  std::vector<float> out = poisoned<float>(64);
  const auto kernel = [&] {
    float* values = shared<float>(64);
    values[threadIdx.x] = 1;
    __syncwarp();
    const float one = __shfl_xor_sync(kFull, 1.0f, 1);
    __syncwarp();
    out[threadIdx.x] = values[threadIdx.x ^ 32] * one;
  };
  run_faulty(kernel, dim3(1), 64, 256);
  for (unsigned i = 0; i < 64; ++i)
    expect("warp", i, out[i], 1.0f);
}

// Nor do the barriers of a block order it before another one.
void neighbour_race() {
  std::vector<int> out(128), sums(128);
  run_faulty(
      [&] {
        const unsigned i = blockIdx.x * 64 + threadIdx.x;
        __syncthreads();
        out[i] = 1;
        __syncthreads();
        sums[i] = out[i ^ 64];
        __syncthreads();
      },
      dim3(2)
  );
}

void divergent_exit() {
  run_faulty([] {
    if (threadIdx.x % 32 < 8)
      __shfl_xor_sync(kFull, 1.0f, 1, 8);
  });
}

void divergent_kind() {
  run_faulty([] {
    if (threadIdx.x < 48)
      __shfl_xor_sync(kFull, 1, 1);
    else
      __shfl_down_sync(kFull, 1, 1);
  });
}

void divergent_width() {
  run_faulty([] { __shfl_sync(kFull, 1, 0, threadIdx.x == 33 ? 16 : 32); });
}

void divergent_barrier() {
  run_faulty([] {
    if (threadIdx.x < 40)
      __syncthreads();
    else
      __syncwarp();
  });
}

void partial_mask() {
  run_faulty([] { __shfl_down_sync(0xffffu, 1.0f, 1); });
}

void bad_width() {
  run_faulty([] { __shfl_down_sync(kFull, 1.0f, 1, 12); });
}

void early_exit() {
  run_faulty(
      [] {
        if (blockIdx.y == 1 && threadIdx.x >= 60)
          return;
        __syncthreads();
      },
      dim3(1, 2)
  );
}

void early_exit_of_warp() {
  run_faulty([] {
    __syncthreads();
    if (threadIdx.x < 32)
      __syncthreads();
  });
}

// Fibers never come back from this one.
void spin() {
  std::atomic<bool> never{false};
  run_faulty([&] {
    while (threadIdx.x == 5 && !never.load(std::memory_order_relaxed))
      std::this_thread::yield();
    __syncthreads();
  });
}

void shared_overrun() {
  run_faulty(
      [] {
        float* first = shared<float>(64);
        shared<float>(64);
        first[threadIdx.x + 1] = 1;
      },
      dim3(1),
      64,
      512
  );
}

void global_overrun() {
  std::vector<float> x(64), y(64);
  run_faulty([&] { y[threadIdx.x] = x.data()[threadIdx.x + (threadIdx.x == 63)]; });
}

struct alignas(16) Four {
  float at[4];
};

void misaligned() {
  std::vector<float> x(64 * 4 + 1), y(64);
  run_faulty([&] {
    y[threadIdx.x] = reinterpret_cast<const Four*>(x.data() + 1)[threadIdx.x].at[0];
  });
}

void shared_beyond_launch() {
  run_faulty(
      [] {
        shared<float>(32);
        shared<float>(33);
      },
      dim3(1),
      64,
      256
  );
}

void shared_disagreement() {
  run_faulty([] { shared<float>(threadIdx.x == 40 ? 8 : 16); }, dim3(1), 64, 256);
}

void nested_launch() {
  run_faulty([] { simt::launch("inner", dim3(1), 32, 0, [] {}); });
}

void outside() {
  __syncthreads();
}

void bad_launches() {
  struct Try {
    dim3 grid;
    unsigned threads;
    std::size_t bytes;
  };
  for (const Try& bad :
       {Try{dim3(1), 0, 0},
        Try{dim3(1), 33, 0},
        Try{dim3(1), 1056, 0},
        Try{dim3(0), 32, 0},
        Try{dim3(1u << 31), 32, 0},
        Try{dim3(1, 65536), 32, 0},
        Try{dim3(1, 1, 65536), 32, 0},
        Try{dim3(1), 32, 49153}}) {
    try {
      run_faulty([] { ++wrong; }, bad.grid, bad.threads, bad.bytes);
      ++wrong;
    } catch (const std::runtime_error& error) {
      std::printf("%s\n", error.what());
    }
  }
  try {
    simt::allow_shared(228 << 10);
    ++wrong;
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
  }
}

const std::map<std::string, std::function<void()>> commands = {
    {"index", index},
    {"reduce", reduce},
    {"pipeline", pipeline<true>},
    {"turn", turn<true>},
    {"shuffle", shuffle},
    {"shuffle_chain", shuffle_chain},
    {"arithmetic", arithmetic},
    {"pieces", pieces},
    {"large_shared", large_shared},
    {"schedule", schedule},
    {"host_threads", host_threads},
    {"bad_launches", bad_launches},
    {"pipeline_race", pipeline<false>},
    {"turn_race", turn<false>},
    {"warp_race", warp_race},
    {"block_race", block_race},
    {"neighbour_race", neighbour_race},
    {"divergent_exit", divergent_exit},
    {"divergent_kind", divergent_kind},
    {"divergent_width", divergent_width},
    {"divergent_barrier", divergent_barrier},
    {"partial_mask", partial_mask},
    {"bad_width", bad_width},
    {"early_exit", early_exit},
    {"early_exit_of_warp", early_exit_of_warp},
    {"spin", spin},
    {"shared_overrun", shared_overrun},
    {"global_overrun", global_overrun},
    {"misaligned", misaligned},
    {"shared_beyond_launch", shared_beyond_launch},
    {"shared_disagreement", shared_disagreement},
    {"nested_launch", nested_launch},
    {"outside", outside},
};

}  // namespace

int main(int argc, char** argv) {
  const auto command = argc > 1 ? commands.find(argv[1]) : commands.end();
  if (command == commands.end())
    return std::fprintf(stderr, "self_test COMMAND [SEED [BLOCKS]]\n"), 2;
  simt::set_seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  if (argc > 3)
    simt::set_concurrent_blocks(std::atoi(argv[3]));
  try {
    command->second();
  } catch (const std::runtime_error& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 3;
  }
  if (wrong)
    std::printf("%d wrong\n", wrong);
  return wrong ? 1 : 0;
}

// Asynchronous copies and tensor cores in the SIMT model: primitives_test COMMAND [SEED]. Exits 0
// when every value is right, 1 when one is wrong, 3 when a launch is refused.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "pipelined_gemm.cuh"

namespace {

using namespace dcconv;
using namespace dcconv::cuda;
using pipelined_gemm::Fault;
using portable::load;
using portable::Store;

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

template <class F>
void run(F&& kernel, unsigned threads = 32, std::size_t bytes = 4096) {
  simt::launch("primitive", dim3(1), threads, bytes, kernel);
}

// ---- a pipelined product

// Whole numbers small enough for every sum to be exact in any order.
template <class T>
std::vector<T> whole(std::size_t count, unsigned step, int range) {
  std::vector<T> values;
  for (std::size_t i = 0; i < count; ++i)
    values.push_back(Store<T>::from(float(int(i * step % unsigned(2 * range + 1)) - range)));
  return values;
}

template <class T, int kStages, Fault kFault>
void multiply(int m, int n, int k) {
  const std::vector<T> a = whole<T>(std::size_t(m) * k, 37, 8),
                       b = whole<T>(std::size_t(k) * n, 23, 5);
  std::vector<float> c = poisoned<float>(std::size_t(m) * n);
  pipelined_gemm::multiply<T, kStages, kFault>({a.data(), b.data(), c.data(), m, n, k}, nullptr);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      float sum = 0;
      for (int l = 0; l < k; ++l)
        sum += load(a[std::size_t(i) * k + l]) * load(b[std::size_t(l) * n + j]);
      expect("product", std::size_t(i) * n + j, c[std::size_t(i) * n + j], sum);
    }
}

template <Fault kFault>
void faulty() {
  multiply<BFloat16, 3, kFault>(88, 64, 152);
}

void gemm() {
  multiply<BFloat16, 3, Fault::kNone>(64, 64, 32);
  multiply<BFloat16, 3, Fault::kNone>(1, 8, 8);
  multiply<BFloat16, 3, Fault::kNone>(88, 72, 152);
  multiply<Half, 2, Fault::kNone>(64, 64, 96);
}

// 56 KiB: more than a launch has without asking, twice, for the permission is of one launch.
void large_shared() {
  multiply<Half, 7, Fault::kNone>(40, 64, 256);
  multiply<Half, 7, Fault::kNone>(40, 64, 256);
}

// 232 KiB.
void too_large_shared() {
  multiply<Half, 29, Fault::kNone>(64, 64, 32);
}

// ---- asynchronous copies

// What one copy takes.
struct alignas(16) Four {
  float at[4];
};

std::vector<Four> fours(std::size_t count, float value) {
  return std::vector<Four>(count, Four{{value, value, value, value}});
}

// Thread i copies element i, every third one as zeros; without a wait and a barrier it reads what
// it must not.
template <bool kWait>
void copy() {
  std::vector<Four> x(64), y(64);
  for (unsigned i = 0; i < 64; ++i)
    for (unsigned j = 0; j < 4; ++j)
      x[i].at[j] = float(4 * i + j + 1);
  run(
      [&] {
        SharedMemory shared;
        Four* values = shared.take<Four>(64);
        const unsigned i = threadIdx.x;
        const bool valid = i % 3 != 0;
        // No byte of null is read.
        copy_async(values + i, valid ? x.data() + i : nullptr, valid);
        commit_async();
        if (kWait)
          wait_async<0>();
        y[i] = values[i];
        wait_async<0>();
      },
      64
  );
  for (unsigned i = 0; i < 64; ++i)
    for (unsigned j = 0; j < 4; ++j)
      expect("copy", 4 * i + j, y[i].at[j], i % 3 == 0 ? 0 : x[i].at[j]);
}

// Which of three groups have landed after a wait for all but one; a copy outside of a group is in
// none that a wait is for.
void groups() {
  std::vector<Four> x(4);
  for (unsigned i = 0; i < 4; ++i)
    x[i].at[3] = float(i + 1);
  std::vector<float> y = poisoned<float>(12);
  run([&] {
    SharedMemory shared;
    Four* values = shared.take<Four>(4 * 32);
    Four* mine = values + threadIdx.x * 4;
    const auto look = [&](unsigned row) {
      for (unsigned i = 0; i < 4 && threadIdx.x == 5; ++i)
        y[row * 4 + i] = mine[i].at[3];
    };
    for (unsigned i = 0; i < 3; ++i) {
      copy_async(mine + i, x.data() + i, true);
      commit_async();
    }
    copy_async(mine + 3, x.data() + 3, true);
    wait_async<1>();
    look(0);
    wait_async<0>();
    look(1);
    commit_async();
    wait_async<0>();
    look(2);
  });
  const float none = y[2];
  expect("poison", 2, std::isnan(none), true);
  const std::vector<float> expected = {1, 2, none, none, 1, 2, 3, none, 1, 2, 3, 4};
  for (std::size_t i = 0; i < y.size(); ++i)
    expect("landed", i, y[i], expected[i]);
}

// Prints what is copied of a source that changes between issue and wait: either.
void changed_source() {
  std::vector<Four> x = fours(32, 1);
  std::vector<float> y = poisoned<float>(32);
  run([&] {
    SharedMemory shared;
    Four* values = shared.take<Four>(32);
    copy_async(values + threadIdx.x, x.data() + threadIdx.x, true);
    commit_async();
    x[threadIdx.x].at[3] = 2;
    wait_async<0>();
    y[threadIdx.x] = values[threadIdx.x].at[3];
  });
  for (const float value : y)
    std::printf("%g ", value);
}

// A buffer that a copy goes to while another thread still reads it.
void overwritten() {
  const std::vector<Four> x = fours(64, 2);
  std::vector<float> y = poisoned<float>(64);
  run(
      [&] {
        SharedMemory shared;
        Four* values = shared.take<Four>(64);
        values[threadIdx.x].at[3] = 1;
        __syncthreads();
        y[threadIdx.x] = values[63 - threadIdx.x].at[3];
        copy_async(values + threadIdx.x, x.data() + threadIdx.x, true);
        commit_async();
        wait_async<0>();
      },
      64
  );
  for (std::size_t i = 0; i < y.size(); ++i)
    expect("kept", i, y[i], 1.0f);
}

void never_waited() {
  const std::vector<Four> x = fours(32, 1);
  run([&] {
    SharedMemory shared;
    Four* values = shared.take<Four>(32);
    copy_async(values + threadIdx.x, x.data() + threadIdx.x, true);
    commit_async();
    if (threadIdx.x != 9)
      wait_async<0>();
  });
}

// One copy by thread 7, so many bytes from where it belongs: the piece ends within the 16 bytes
// from 256 on.
void one_copy(std::size_t to, std::size_t from) {
  const std::vector<Four> x = fours(16, 1);
  run([&] {
    SharedMemory shared;
    shared.take<float>(64);
    float* values = shared.take<float>(65);
    if (threadIdx.x == 7)
      copy_async(
          reinterpret_cast<char*>(values) + to, reinterpret_cast<const char*>(x.data()) + from, true
      );
    commit_async();
    wait_async<0>();
  });
}

// ---- tensor cores

// 4 matrices of 8 x 8 numbers that say where they are.
uint16_t place(unsigned matrix, unsigned row, unsigned column) {
  return static_cast<uint16_t>(matrix << 8 | row << 4 | column);
}

template <class F>
void matrices(bool transposed, F&& load_matrix) {
  std::vector<uint32_t> out = poisoned<uint32_t>(32 * 4);
  run([&] {
    SharedMemory shared;
    uint16_t* rows = shared.take<uint16_t>(32 * 8);
    // Row j of matrix i lies at 4 j + i.
    const unsigned i = threadIdx.x / 8, j = threadIdx.x % 8;
    uint16_t* row = rows + (4 * j + i) * 8;
    for (unsigned k = 0; k < 8; ++k)
      row[k] = place(i, j, k);
    __syncwarp();
    uint32_t r[4];
    load_matrix(r, row);
    for (unsigned k = 0; k < 4; ++k)
      out[threadIdx.x * 4 + k] = r[k];
  });
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned g = lane / 4, t = lane % 4;
      const uint16_t low = transposed ? place(i, 2 * t, g) : place(i, g, 2 * t);
      const uint16_t high = transposed ? place(i, 2 * t + 1, g) : place(i, g, 2 * t + 1);
      expect("matrix", lane * 4 + i, out[lane * 4 + i], uint32_t(low) | uint32_t(high) << 16);
    }
}

void load_matrix() {
  matrices(false, [](uint32_t (&r)[4], const void* row) { load_matrix_x4(r, row); });
  matrices(true, [](uint32_t (&r)[4], const void* row) { load_matrix_x4_transposed(r, row); });
}

// One instruction, fragments filled element by element after the table in tensor_core.cuh.
template <class T>
void one_mma(float scale) {
  const std::vector<T> a = whole<T>(16 * 16, 37, 8), b = whole<T>(16 * 8, 23, 5);
  std::vector<float> d = poisoned<float>(16 * 8);
  run([&] {
    const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
    const auto pair = [](T low, T high) {
      return uint32_t(static_cast<uint16_t>(low)) | uint32_t(static_cast<uint16_t>(high)) << 16;
    };
    uint32_t of_a[4], of_b[2];
    for (unsigned i = 0; i < 4; ++i) {
      const T* at = a.data() + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
      of_a[i] = pair(at[0], at[1]);
    }
    for (unsigned i = 0; i < 2; ++i) {
      const T* at = b.data() + (2 * t + i * 8) * 8 + g;
      of_b[i] = pair(at[0], at[8]);
    }
    float of_d[4];
    for (unsigned i = 0; i < 4; ++i)
      of_d[i] = scale * float(threadIdx.x * 4 + i);
    mma(of_d, of_a, of_b, T{});
    for (unsigned i = 0; i < 4; ++i)
      d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = of_d[i];
  });
  for (unsigned row = 0; row < 16; ++row)
    for (unsigned column = 0; column < 8; ++column) {
      const unsigned lane = row % 8 * 4 + column / 2, i = row / 8 * 2 + column % 2;
      float sum = scale * float(lane * 4 + i);
      for (unsigned k = 0; k < 16; ++k)
        sum += load(a[row * 16 + k]) * load(b[k * 8 + column]);
      expect("d", row * 8 + column, d[row * 8 + column], sum);
    }
}

// Registers that all hold one pair of 16-bit numbers.
template <class T>
float uniform_mma(float of_d, float of_a, float of_b) {
  float result = 0;
  run([&] {
    const uint32_t x = uint32_t(static_cast<uint16_t>(Store<T>::from(of_a))) * 0x10001u;
    const uint32_t y = uint32_t(static_cast<uint16_t>(Store<T>::from(of_b))) * 0x10001u;
    const uint32_t a[4] = {x, x, x, x}, b[2] = {y, y};
    float d[4] = {of_d, of_d, of_d, of_d};
    mma(d, a, b, T{});
    if (threadIdx.x == 0)
      result = d[0];
  });
  return result;
}

void tensor_core() {
  one_mma<BFloat16>(0);
  one_mma<Half>(0);
  one_mma<BFloat16>(0.5f);
  // Products are exact, subnormal halves too; infinities and NaN come through.
  expect(
      "exact", 0, uniform_mma<Half>(0, 1 + 0x1p-10f, 1 + 0x1p-10f), 16 * (1 + 0x1p-9f + 0x1p-20f)
  );
  expect("subnormal", 0, uniform_mma<Half>(0, 0x1p-24f, 0x1p-24f), 0x1p-44f);
  expect("wide", 0, uniform_mma<BFloat16>(0, 0x1p100f, 0x1p20f), 0x1p124f);
  expect("infinite", 0, uniform_mma<BFloat16>(1, 0x1p100f, 0x1p100f), INFINITY);
  expect("undefined", 0, std::isnan(uniform_mma<Half>(1, INFINITY, 0)), true);
}

void divergent_mma() {
  run(
      [] {
        const uint32_t a[4] = {}, b[2] = {};
        float d[4] = {};
        if (threadIdx.x < 48)
          mma(d, a, b, BFloat16{});
        else
          mma(d, a, b, Half{});
      },
      64
  );
}

void divergent_load() {
  run([] {
    SharedMemory shared;
    uint16_t* rows = shared.take<uint16_t>(32 * 8);
    uint32_t r[4];
    if (threadIdx.x != 4)
      load_matrix_x4(r, rows + threadIdx.x * 8);
  });
}

// Lane 31 reads a row that begins so many bytes after its own.
void one_row(std::size_t offset) {
  run([&] {
    SharedMemory shared;
    char* rows = reinterpret_cast<char*>(shared.take<uint16_t>(32 * 8));
    uint32_t r[4];
    load_matrix_x4(r, rows + threadIdx.x * 16 + (threadIdx.x == 31 ? offset : 0));
  });
}

// The lanes of a warp fill the rows that others of them read.
void row_race() {
  std::vector<uint32_t> out = poisoned<uint32_t>(32);
  run([&] {
    SharedMemory shared;
    uint16_t* rows = shared.take<uint16_t>(32 * 8);
    for (unsigned k = 0; k < 8; ++k)
      rows[(threadIdx.x ^ 1) * 8 + k] = 3;
    uint32_t r[4];
    load_matrix_x4(r, rows + threadIdx.x * 8);
    out[threadIdx.x] = r[0];
  });
  for (unsigned i = 0; i < 32; ++i)
    expect("row", i, out[i], 0x30003u);
}

const std::map<std::string, std::function<void()>> commands = {
    {"gemm", gemm},
    {"large_shared", large_shared},
    {"too_large_shared", too_large_shared},
    {"copies", copy<true>},
    {"groups", groups},
    {"changed_source", changed_source},
    {"load_matrix", load_matrix},
    {"tensor_core", tensor_core},
    {"no_barrier", faulty<Fault::kNoBarrier>},
    {"early_copy", faulty<Fault::kEarlyCopy>},
    {"weak_wait", faulty<Fault::kWeakWait>},
    {"wrong_stage", faulty<Fault::kWrongStage>},
    {"wrong_swizzle", faulty<Fault::kWrongSwizzle>},
    {"wrong_depth", faulty<Fault::kWrongDepth>},
    {"wrong_rows", faulty<Fault::kWrongRows>},
    {"early_read", copy<false>},
    {"overwritten", overwritten},
    {"never_waited", never_waited},
    {"copy_across_end", [] { one_copy(256, 0); }},
    {"copy_beyond_end", [] { one_copy(272, 0); }},
    {"copy_unaligned", [] { one_copy(8, 0); }},
    {"copy_from_unaligned", [] { one_copy(0, 8); }},
    {"copy_beyond_global", [] { one_copy(0, 256); }},
    {"divergent_mma", divergent_mma},
    {"divergent_load", divergent_load},
    {"row_beyond_piece", [] { one_row(16); }},
    {"row_unaligned", [] { one_row(8); }},
    {"row_race", row_race},
};

}  // namespace

int main(int argc, char** argv) {
  const auto command = argc > 1 ? commands.find(argv[1]) : commands.end();
  if (command == commands.end())
    return std::fprintf(stderr, "primitives_test COMMAND [SEED]\n"), 2;
  simt::set_seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  try {
    command->second();
  } catch (const std::runtime_error& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 3;
  }
  if (wrong)
    std::printf("%d wrong\n", wrong);
  return wrong ? 1 : 0;
}

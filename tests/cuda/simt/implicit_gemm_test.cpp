// The implicit GEMM in bfloat16 next to plain loops in double.
//
//   implicit_gemm_test CASE TILE SEED    exit status 0: y, u, the norms and the gradient of x agree
//   implicit_gemm_test rule ROWS COLUMNS GROUPS PLACES    prints the tile that the rule chooses
//   implicit_gemm_test fits SIDE CHANNELS FILTERS KERNEL    prints whether 32-bit offsets do
//
// Every array ends where a page begins that nobody may touch; outputs are NaN before they are
// written. With SIMT_ONE_TILE there is the tile of that number alone, for builds that are many.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "cuda/fused/implicit_gemm/forward.cuh"
#include "cuda/fused/implicit_gemm/gradient.cuh"

namespace {

using namespace dcconv;
using namespace dcconv::cuda;

// Allocates up to the end of a page, with a page behind it that nobody may touch.
template <class T>
struct BeforeGuard {
  using value_type = T;
  BeforeGuard() = default;
  template <class U>
  BeforeGuard(const BeforeGuard<U>&) {}

  static std::size_t pages(std::size_t count) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return (count * sizeof(T) + page - 1) / page * page;
  }
  T* allocate(std::size_t count) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t bytes = pages(count);
    void* memory =
        mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* end = static_cast<char*>(memory) + bytes;
    if (memory == MAP_FAILED || mprotect(end, page, PROT_NONE) != 0)
      throw std::bad_alloc();
    return reinterpret_cast<T*>(end - count * sizeof(T));
  }
  void deallocate(T* array, std::size_t count) {
    char* end = reinterpret_cast<char*>(array) + count * sizeof(T);
    munmap(end - pages(count), pages(count) + static_cast<std::size_t>(sysconf(_SC_PAGESIZE)));
  }
  bool operator==(const BeforeGuard&) const { return true; }
  bool operator!=(const BeforeGuard&) const { return false; }
};

template <class T>
using Array = std::vector<T, BeforeGuard<T>>;
using Storage = Array<BFloat16>;
using Numbers = std::vector<double>;

// Where the norms come from.
enum class Norms { in_loop, sums, given };

struct Case {
  const char* name;
  int n, c, h, w, o, kernel, stride, before, after, dilation, groups;
  Norms norms;
};

// Rows, columns and depth that fill no tile, taps outside of the image, more steps than stages.
constexpr Case kCases[] = {
    {"one", 2, 40, 9, 8, 72, 1, 1, 0, 0, 1, 1, Norms::in_loop},
    {"taps", 1, 40, 7, 8, 72, 3, 1, 1, 1, 1, 1, Norms::sums},
    {"groups", 1, 16, 9, 9, 48, 3, 2, 2, 1, 2, 2, Norms::given},
    {"wide", 3, 8, 3, 5, 136, 2, 1, 0, 1, 1, 1, Norms::sums},
    // Three halos, the last of them with a tail of channels, under two tiles of 128 rows.
    {"halo", 3, 72, 7, 8, 72, 3, 1, 1, 1, 1, 1, Norms::given},
};

// What y is made of, for each way of the last step; a times h is chosen at run time.
struct Functions {
  LastStep last_step;
  bool square, one_radius, times_a, keeps_u;
};

constexpr Functions kFunctions[] = {
    {LastStep::tanh_cosine, false, false, false, true},
    {LastStep::tanh_square, true, false, false, false},
    {LastStep::position_cosine, false, true, false, false},
    {LastStep::position_square, true, true, false, true},
    {LastStep::chosen, false, false, true, true},
};

Storage random_values(std::mt19937& random, std::size_t count, double scale = 1) {
  std::normal_distribution<double> normal(0, scale);
  Storage values(count);
  for (BFloat16& value : values)
    value = portable::Store<BFloat16>::from(float(normal(random)));
  return values;
}

Array<float> positive_values(std::mt19937& random, std::size_t count) {
  std::uniform_real_distribution<float> uniform(0.5f, 1.5f);
  Array<float> values(count);
  for (float& value : values)
    value = uniform(random);
  return values;
}

template <class T>
Array<T> place(std::size_t count) {
  Array<T> values(count);
  simt::poison(values.data(), sizeof(T) * count);
  return values;
}

double number(BFloat16 value) {
  return portable::load(value);
}
double number(float value) {
  return value;
}

// Largest error, relative to the largest value; infinity where a value is not finite.
template <class T>
bool agree(const char* what, const Array<T>& got, const Numbers& want, double allowed) {
  double largest = 0, error = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double difference = std::fabs(number(got[i]) - want[i]);
    largest = std::fmax(largest, std::fabs(want[i]));
    error = std::isfinite(difference) ? std::fmax(error, difference) : INFINITY;
  }
  if (got.size() == want.size() && error <= allowed * largest)
    return true;
  std::fprintf(stderr, "%s: error %g of %g\n", what, error, largest);
  return false;
}

template <class F>
void with_tile(int tile, F&& f) {
#if defined(SIMT_ONE_TILE)
  if (tile == SIMT_ONE_TILE)
    f(std::conditional_t<SIMT_ONE_TILE == 1, TallTile, SmallTile>{});
#else
  with_gemm_tile(tile, f);
#endif
}

class Problem {
public:
  Problem(const Case& of, unsigned seed) : c(of), random(seed) {
    const auto axis = [&](int size) {
      const int output =
          (size + c.before + c.after - c.dilation * (c.kernel - 1) - 1) / c.stride + 1;
      return WindowAxis{
          size, output, c.kernel, c.stride, c.dilation, c.before, c.after, PaddingMode::zeros
      };
    };
    window = {axis(c.h), axis(c.w)};
    p = window.rows.output;
    q = window.columns.output;
    cg = c.c / c.groups;
    og = c.o / c.groups;
    taps = c.kernel * c.kernel;
    positions = std::size_t(c.n) * p * q;
    x = random_values(random, std::size_t(c.n) * c.h * c.w * c.c);
    weight = random_values(random, std::size_t(c.o) * taps * cg, 1 / std::sqrt(cg * taps));
  }

  // f(position, input pixel, tap) for everything that windows see.
  template <class F>
  void each_tap(F&& f) const {
    for (std::size_t at = 0; at < positions; ++at)
      for (int r = 0; r < c.kernel; ++r)
        for (int s = 0; s < c.kernel; ++s) {
          const int i = int(at / q % p) * c.stride - c.before + r * c.dilation;
          const int j = int(at % q) * c.stride - c.before + s * c.dilation;
          if (i >= 0 && i < c.h && j >= 0 && j < c.w)
            f(at, (at / (p * q) * c.h + i) * c.w + j, r * c.kernel + s);
        }
  }

  bool forward(int tile) {
    Numbers u(positions * c.o), sums(positions * c.groups), b(sums.size());
    each_tap([&](std::size_t at, std::size_t pixel, int tap) {
      for (int o = 0; o < c.o; ++o)
        for (int i = 0; i < cg; ++i)
          u[at * c.o + o] += number(x[pixel * c.c + o / og * cg + i]) *
                             number(weight[(std::size_t(o) * taps + tap) * cg + i]);
      for (int i = 0; i < c.c; ++i)
        sums[at * c.groups + i / cg] += std::pow(number(x[pixel * c.c + i]), 2);
    });
    const Array<float> a = positive_values(random, c.o), radius = positive_values(random, c.o);
    const Storage bias = random_values(random, c.o);
    for (std::size_t i = 0; i < b.size(); ++i)
      b[i] = std::sqrt(sums[i] + 1e-4);
    Array<float> map;
    if (c.norms == Norms::given)
      map.assign(b.begin(), b.end());
    if (c.norms == Norms::sums)
      for (std::size_t i = 0; i < x.size(); i += cg) {
        double sum = 0;
        for (int j = 0; j < cg; ++j)
          sum += std::pow(number(x[i + j]), 2);
        map.push_back(float(sum));
      }
    const double alpha = 1.25;
    bool right = true;
    for (const Functions& functions : kFunctions) {
      Numbers y(u.size());
      for (std::size_t i = 0; i < y.size(); ++i) {
        const std::size_t o = i % c.o;
        const double norm = b[i / c.o * c.groups + o / og], cosine = u[i] / (a[o] * norm);
        const double h = std::tanh(norm / radius[functions.one_radius ? 0 : o]);
        y[i] = alpha * (functions.times_a ? a[o] : 1) * h *
                   (functions.square ? cosine * std::fabs(cosine) : cosine) +
               number(bias[o]);
      }
      auto norm = place<float>(b.size());
      auto got = place<BFloat16>(y.size()), dot = place<BFloat16>(u.size());
      FusedParams args{};
      args.n = c.n;
      args.c = c.c;
      args.o = c.o;
      args.groups = c.groups;
      args.window = window;
      args.channels_last = true;
      args.op = {2, functions.square ? 3 : 1, functions.times_a, alpha, 0, 1, 1e-3};  // tanh
      args.eps = 1e-4;
      args.filters = {a.data(), radius.data(), !functions.one_radius, nullptr, nullptr, 0};
      args.bias = bias.data();
      args.x = x.data();
      args.weight = weight.data();
      args.map = c.norms == Norms::in_loop ? nullptr : map.data();
      args.map_is_norm = c.norms == Norms::given;
      args.y = got.data();
      args.dot = functions.keeps_u ? dot.data() : nullptr;
      args.norm = args.map_is_norm ? nullptr : norm.data();
      if (last_step_of(args.op, functions.one_radius) != functions.last_step) {
        std::fprintf(stderr, "another last step\n");
        return false;
      }
      with_tile(tile, [&](auto type) {
        launch_implicit_gemm<BFloat16, decltype(type)>(args, nullptr);
      });
      if (functions.keeps_u)
        right = agree("u", dot, u, 4e-3) && right;
      // The tanh of 16-bit types is off by 2^-11 (docs/accuracy.md).
      right = agree("y", got, y, 4e-3 + 0x1p-11) && right;
      if (args.norm != nullptr)
        right = agree("norms", norm, b, 1e-6) && right;
    }
    return right;
  }

  bool gradient(int tile) {
    const Storage grad_u = random_values(random, positions * c.o);
    const Array<float> t = positive_values(random, positions * c.groups);
    const Array<float> b = positive_values(random, positions * c.groups);
    const float sigma = 0.75f;
    Numbers grad_x(x.size());
    each_tap([&](std::size_t at, std::size_t pixel, int tap) {
      for (int i = 0; i < c.c; ++i) {
        double& sum = grad_x[pixel * c.c + i];
        for (int o = i / cg * og; o < (i / cg + 1) * og; ++o)
          sum += number(grad_u[at * c.o + o]) *
                 number(weight[(std::size_t(o) * taps + tap) * cg + i % cg]);
        const std::size_t row = at * c.groups + i / cg;
        sum += number(x[pixel * c.c + i]) * (t[row] + sigma / b[row]);
      }
    });
    auto got = place<BFloat16>(x.size());
    FusedGradInputParams args{};
    args.n = c.n;
    args.c = c.c;
    args.o = c.o;
    args.groups = c.groups;
    args.window = window;
    args.channels_last = true;
    args.grad_u = grad_u.data();
    args.weight = weight.data();
    args.x = x.data();
    args.tap = Tap::with_mean;
    args.t = t.data();
    args.norm = b.data();
    args.sigma = &sigma;
    args.grad_x = got.data();
    with_tile(tile, [&](auto type) {
      launch_implicit_gemm_grad_input<BFloat16, decltype(type)>(args, nullptr);
    });
    return agree("grad_x", got, grad_x, 4e-3);
  }

private:
  const Case& c;
  std::mt19937 random;
  Window window;
  int p, q, cg, og, taps;
  std::size_t positions;
  Storage x, weight;
};

}  // namespace

int main(int argc, char** argv) {
  const auto size = [&](int i) { return int64_t(std::atoll(argv[i])); };
  if (argc == 6 && std::string(argv[1]) == "rule") {
    std::printf("%d\n", gemm_tile(size(2), size(3), size(4), size(5)));
    return 0;
  }
  if (argc == 6 && std::string(argv[1]) == "fits") {
    FusedParams p{};
    const int side = int(size(2)), kernel = int(size(5));
    const WindowAxis axis{side, side, kernel, 1, 1, kernel / 2, kernel / 2, PaddingMode::zeros};
    p.n = p.groups = 1;
    p.c = int(size(3));
    p.o = int(size(4));
    p.window = {axis, axis};
    std::printf("%d\n", offsets_fit(forward_problem(p), int64_t(side) * side));
    return 0;
  }
  for (const Case& c : kCases) {
    if (argc != 4 || std::string(argv[1]) != c.name)
      continue;
    const int tile = std::atoi(argv[2]);
    const auto seed = static_cast<unsigned>(std::atoi(argv[3]));
    simt::set_seed(seed);
    Problem problem(c, seed);
    bool right = problem.forward(tile);
    if (c.stride == 1)
      right = problem.gradient(tile) && right;
    return right ? 0 : 1;
  }
  std::fprintf(stderr, "implicit_gemm_test: unknown arguments\n");
  return 2;
}

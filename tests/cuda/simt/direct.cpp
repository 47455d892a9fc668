// Runs the direct kernels on small problems and writes the bytes that come out to a file:
//
//     direct RESULTS SEED [BLOCKS AT A TIME]
//
// Outputs are poisoned, and every buffer has just its size. DIRECT_DEPTHWISE or DIRECT_STEM alone
// leaves out the rest, for builds that are many.

#if !defined(DIRECT_DEPTHWISE) && !defined(DIRECT_STEM)
#define DIRECT_DEPTHWISE
#define DIRECT_STEM
#endif

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(DIRECT_DEPTHWISE)
#include "cuda/fused/depthwise/grad_dot.cuh"
#include "cuda/fused/depthwise/grad_input.cuh"
#include "cuda/fused/depthwise/grad_weight.cuh"
#endif
#if defined(DIRECT_STEM)
#include "cuda/fused/stem/stem.cuh"
#endif

using namespace dcconv;
using namespace dcconv::cuda;

namespace {

std::FILE* results = nullptr;

template <class T>
class Buffer {
public:
  // Values between -2 and 2, or 1 and 3 where positive.
  Buffer(int64_t count, unsigned seed, bool positive = false) : Buffer(count) {
    unsigned state = 2654435761u * (seed + 1);
    for (int64_t i = 0; i < count; ++i) {
      state = 1664525u * state + 1013904223u;
      const float value = static_cast<float>(state >> 8) * 0x1p-22f - 2.0f;
      at_[i] = Store<T>::from(positive ? 0.5f * value + 2.0f : value);
    }
  }
  explicit Buffer(int64_t count) : at_(new T[count]), count_(count) {
    simt::poison(at_.get(), sizeof(T) * static_cast<std::size_t>(count));
  }
  void* get() { return at_.get(); }
  void write() {
    const std::size_t count = static_cast<std::size_t>(count_);
    if (std::fwrite(at_.get(), sizeof(T), count, results) != count)
      std::abort();
  }

private:
  std::unique_ptr<T[]> at_;
  int64_t count_;
};

struct Problem {
  int n, c, o, groups, height, width, kernel, stride, padding;
  bool channels_last;

  WindowAxis axis(int size) const {
    const int output = (size + 2 * padding - kernel) / stride + 1;
    return {size, output, kernel, stride, 1, padding, padding, PaddingMode::zeros};
  }
  Window window() const { return {axis(height), axis(width)}; }
  int64_t inputs() const { return int64_t(n) * c * height * width; }
  int64_t positions() const { return int64_t(n) * axis(height).output * axis(width).output; }
  int64_t weights() const { return int64_t(o) * (c / groups) * kernel * kernel; }
};

// tanh of a b / rho times a sigmoid: everything that an operator can read.
constexpr Operator kOperator{7, 2, false, 1.25, 0.5, 2.5, 1e-6};

template <class T>
void forward(const Problem& s, bool norms_given, void (*run)(const FusedParams&, Stream)) {
  Buffer<T> x(s.inputs(), 1), weight(s.weights(), 2), bias(s.o, 3);
  Buffer<float> a(s.o, 4, true), radius(s.o, 5, true), k(s.o, 6, true);
  Buffer<float> given(s.positions() * s.groups, 7, true), norm(s.positions() * s.groups);
  Buffer<T> y(s.positions() * s.o), dot(s.positions() * s.o);
  FusedParams p{};
  p.n = s.n;
  p.c = s.c;
  p.o = s.o;
  p.groups = s.groups;
  p.window = s.window();
  p.channels_last = s.channels_last;
  p.op = kOperator;
  p.eps = 1e-4;
  p.filters = {a.get(), radius.get(), 1, nullptr, k.get(), 1};
  p.bias = bias.get();
  p.x = x.get();
  p.weight = weight.get();
  p.map_is_norm = norms_given;
  p.map = norms_given ? given.get() : nullptr;
  p.norm = norms_given ? nullptr : norm.get();
  p.y = y.get();
  p.dot = dot.get();
  run(p, nullptr);
  y.write();
  dot.write();
  if (!norms_given)
    norm.write();
}

#if defined(DIRECT_DEPTHWISE)
void grad_input(const Problem& s, void (*run)(const FusedGradInputParams&, Stream)) {
  Buffer<float> x(s.inputs(), 1), weight(s.weights(), 2), grad_u(s.positions() * s.o, 3);
  Buffer<float> t(s.positions() * s.groups, 4), b(s.positions() * s.groups, 5, true), sigma(1, 6);
  Buffer<float> grad_x(s.inputs());
  FusedGradInputParams p{};
  p.n = s.n;
  p.c = s.c;
  p.o = s.o;
  p.groups = s.groups;
  p.window = s.window();
  p.channels_last = s.channels_last;
  p.grad_u = grad_u.get();
  p.weight = weight.get();
  p.x = x.get();
  p.tap = Tap::with_mean;
  p.t = t.get();
  p.norm = b.get();
  p.sigma = sigma.get();
  p.grad_x = grad_x.get();
  run(p, nullptr);
  grad_x.write();
}

void grad_weight(const Problem& s, void (*run)(const DepthwiseGradWeightParams&, Stream)) {
  constexpr int64_t kRows = 3;
  Buffer<float> x(s.inputs(), 1), grad_u(s.positions() * s.o, 2);
  Buffer<float> parts(kRows * s.weights()), result(s.weights());
  DepthwiseGradWeightParams p{};
  p.n = s.n;
  p.c = s.c;
  p.o = s.o;
  p.window = s.window();
  p.channels_last = s.channels_last;
  p.grad_u = grad_u.get();
  p.x = x.get();
  p.parts = parts.get();
  p.rows = kRows;
  p.grad_weight = result.get();
  run(p, nullptr);
  sum_weight_parts<float>(p, nullptr);
  result.write();
}

void grad_dot(int64_t positions, int o) {
  constexpr int64_t kRows = 3;
  Buffer<float> a(o, 1, true), radius(o, 2, true), k(o, 3, true), b(positions * o, 4, true);
  Buffer<float> grad_y(positions * o, 5), kept(positions * o, 6);
  Buffer<float> grad_u(positions * o), t(positions * o), parts(4 * kRows * o);
  GradDotParams p{};
  p.positions = p.pixels = positions;
  p.o = p.groups = o;
  p.channels_last = true;
  p.op = kOperator;
  p.kept_is = Kept::dot;
  p.filters = {a.get(), radius.get(), 1, nullptr, k.get(), 1};
  p.grad_y = grad_y.get();
  p.kept = kept.get();
  p.norm = b.get();
  p.grad_u = grad_u.get();
  p.t = t.get();
  p.sums = kAllSums;
  p.parts = parts.get();
  p.rows = kRows;
  if (!grad_dot_elementwise_typed<float>(p, nullptr))
    std::abort();
  grad_u.write();
  t.write();
  parts.write();
}

void depthwise_problems() {
  const Problem vectors{1, 8, 8, 8, 5, 7, 3, 1, 1, true}, groups{1, 6, 9, 3, 5, 6, 3, 2, 1, true};
  const Problem multiplier{1, 3, 6, 3, 5, 6, 3, 2, 1, true};
  Problem planes = vectors, small = groups;
  planes.channels_last = small.channels_last = false;
  forward<float>(vectors, false, launch_depthwise_channels_last<float, 4, 3>);
  forward<float>(vectors, true, launch_depthwise_channels_last<float, 4, 3>);
  forward<float>(groups, false, launch_depthwise_channels_last<float, 1, 0>);
  forward<float>(planes, false, launch_depthwise_contiguous<float, 3>);
  forward<float>(small, false, launch_depthwise_contiguous<float, 0>);
  grad_input(vectors, launch_depthwise_grad_input_channels_last<float, 4, 3>);
  grad_input(groups, launch_depthwise_grad_input_channels_last<float, 1, 0>);
  grad_input(planes, launch_depthwise_grad_input_contiguous<float, 3>);
  grad_input(small, launch_depthwise_grad_input_contiguous<float, 0>);
  grad_weight(vectors, launch_grad_weight_channels_last<float, 4, 3>);
  grad_weight(multiplier, launch_grad_weight_channels_last<float, 1, 0>);
  grad_weight(planes, launch_grad_weight_contiguous<float>);
  grad_dot(70, 12);
}
#endif

#if defined(DIRECT_STEM)
void stem_problems() {
  const Problem vectors{1, 3, 68, 1, 9, 10, 3, 1, 1, true};
  Problem planes{2, 3, 5, 1, 9, 10, 4, 2, 1, false};
  forward<BFloat16>(vectors, false, launch_stem<BFloat16, 4>);
  forward<float>(vectors, true, launch_stem<float, 4>);
  forward<float>(planes, false, launch_stem<float, 1>);
}
#endif

}  // namespace

int main(int count, char** words) {
  if (count < 3)
    return 2;
  results = std::fopen(words[1], "wb");
  if (results == nullptr)
    return 2;
  simt::set_seed(std::strtoull(words[2], nullptr, 10));
  if (count > 3)
    simt::set_concurrent_blocks(std::atoi(words[3]));
#if defined(DIRECT_DEPTHWISE)
  depthwise_problems();
#endif
#if defined(DIRECT_STEM)
  stem_problems();
#endif
  return std::fclose(results) == 0 ? 0 : 2;
}

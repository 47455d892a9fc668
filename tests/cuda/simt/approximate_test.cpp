// Functions in the evaluation types of the GPU against float64, over dense arguments:
//
//   approximate_test [INSTRUCTION FACTOR]
//
// prints "instruction NAME ERROR", "function NAME ERROR ..." and "ulp NAME ERROR", the largest of
// each, with the error of one instruction in the model, or of "all", scaled by FACTOR.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cuda/support/approximate.cuh"
#include "simt.h"

namespace {

using namespace dcconv;
using namespace dcconv::cuda;
using namespace dcconv::portable;

constexpr const char* kNames[] = {"tanh", "ex2", "lg2", "rcp", "sqrt", "rsqrt"};

// Relative errors count the truth as this at least: what underflows is lost.
constexpr double kSmall = 1e-20;

class Largest {
public:
  void see(double got, double truth, double scale) {
    const double error = std::fabs(got - truth) / std::max(std::fabs(scale), kSmall);
    value_ = error <= value_ ? value_ : error;  // NaN stays
  }
  void see(double got, double truth) { see(got, truth, truth); }
  double value() const { return value_; }

private:
  double value_ = 0;
};

std::vector<float> logarithmic(double from, double to, int count) {
  std::vector<float> values;
  for (int i = 0; i < count; ++i)
    values.push_back(float(from * std::pow(to / from, double(i) / (count - 1))));
  return values;
}

std::vector<float> cosines() {
  std::vector<float> all;
  for (int i = 0; i <= 20000; ++i)
    all.push_back(float(i) / 10000 - 1);
  for (float x : logarithmic(1e-6, 0.1, 2000)) {
    all.push_back(x);
    all.push_back(-x);
    all.push_back(1 - x);
    all.push_back(x - 1);
  }
  for (int i = 0; i < 64; ++i)
    all.push_back(1 - float(i) * 0x1p-24f);
  all.push_back(1.0007f);  // as 16 bits round what is kept
  all.push_back(-1.0007f);
  return all;
}

void instructions() {
  for (int i = 0; i < simt::kInstructions; ++i) {
    const auto which = static_cast<simt::Instruction>(i);
    Largest largest;
    const bool any_sign = which == simt::Instruction::tanh || which == simt::Instruction::ex2;
    for (float x : logarithmic(1e-4, 100, 100000)) {
      for (float argument : {x, any_sign ? -x : x}) {
        const double truth = simt::exact_value(which, argument);
        const bool absolute = which == simt::Instruction::lg2 && argument > 0.5f && argument < 2;
        largest.see(simt::approximate(which, argument), truth, absolute ? 1 : truth);
      }
    }
    std::printf("instruction %s %.6g\n", kNames[i], largest.value());
  }
}

template <class T>
Constants<T> constants() {
  return {T(1.25), T(0.5), T(2.5), T(1e-3)};
}

// h; d = b dh/db - h and h_a a beside h, to which they are added; dh/drho.
template <class F, class T>
void magnitude(const char* name) {
  Largest h, d, rho, a;
  for (float b : logarithmic(1e-3, 1e3, 4000))
    for (float r : {0.01f, 0.31f, 1.0f, 1.7f, 40.0f, 1000.0f})
      for (float filter : {0.01f, 0.3f, 1.0f, 3.0f}) {
        const Radius<T> radius{T(r), T(1.0f / r)};
        const Radius<double> wide{r, 1.0 / r};
        const MagnitudeGrad<double> truth =
            F::grad(double(filter), double(b), wide, constants<double>());
        const MagnitudeGrad<T> got = F::grad(T(filter), T(b), radius, constants<T>());
        h.see(value_of(F::value(T(filter), T(b), radius, constants<T>())), truth.h);
        h.see(value_of(got.h), truth.h);
        d.see(value_of(got.d), truth.d, truth.h);
        rho.see(value_of(got.h_rho), truth.h_rho);
        a.see(value_of(got.h_a), truth.h_a);
      }
  std::printf(
      "function h-%s %.6g %.6g %.6g %.6g\n", name, h.value(), d.value(), rho.value(), a.value()
  );
}

// g; dg/dc; e = g - c dg/dc beside its terms; dg/dk beside its terms; c of g.
template <class F, class T>
void angular(const char* name) {
  Largest g, g_c, e, g_k, inverse;
  for (float c : cosines())
    for (float k : {0.05f, 0.3f, 1.0f, 2.0f}) {
      const AngularGrad<double> truth = F::grad(double(c), double(k), constants<double>());
      const AngularGrad<T> got = F::grad(T(c), T(k), constants<T>());
      g.see(value_of(F::value(T(c), T(k), constants<T>())), truth.g);
      g.see(value_of(got.g), truth.g);
      g_c.see(value_of(got.g_c), truth.g_c);
      e.see(value_of(got.e), truth.e, std::fabs(truth.g) + std::fabs(c * truth.g_c));
      const double inside = clamp_unit(double(c));
      const double slope =
          truth.g_c * std::sqrt(std::max((1 - double(c)) * (1 + double(c)), double(1e-3f)));
      const double second = std::asin(inside) * slope / k;
      g_k.see(value_of(got.g_k), truth.g_k, std::fabs(truth.g_k + second) + std::fabs(second));
      if (F::invertible && std::fabs(c) <= 1)
        inverse.see(value_of(F::inverse(T(c))), F::inverse(double(c)));
    }
  std::printf(
      "function g-%s %.6g %.6g %.6g %.6g %.6g\n",
      name,
      g.value(),
      g_c.value(),
      e.value(),
      F::uses_k ? g_k.value() : 0.0,
      inverse.value()
  );
}

template <class... F>
void magnitudes(TypeList<F...>, const char* suffix) {
  (magnitude<F, Approximate>((std::string(F::name) + suffix).c_str()), ...);
}

template <class... F>
void angulars(TypeList<F...>) {
  (angular<F, Approximate>(F::name), ...);
}

// Errors of the device's float in units of the last place of the truth.
class Ulps {
public:
  void see(float got, double truth) {
    const float at = std::fabs(static_cast<float>(truth));
    const double unit = double(std::nextafter(at, HUGE_VALF)) - at;
    const double error = std::fabs(got - truth) / unit;
    largest_ = error <= largest_ ? largest_ : error;
  }
  void print(const char* name) const { std::printf("ulp %s %.4g\n", name, largest_); }

private:
  double largest_ = 0;
};

void floats() {
  Ulps reciprocal, quotient, root, inverse_root, tanh, log, asin;
  for (float x : logarithmic(1e-6, 1e6, 200000)) {
    reciprocal.see(reciprocal_of(x), 1 / double(x));
    reciprocal.see(reciprocal_of(x * 0x1p80f), 1 / (double(x) * 0x1p80));
    quotient.see(quotient_of(x, 3.3f), double(x) / 3.3f);
    quotient.see(quotient_of(0.7f, x), double(0.7f) / x);
    root.see(sqrt_of(x), std::sqrt(double(x)));
    inverse_root.see(inverse_sqrt_of(x), 1 / std::sqrt(double(x)));
    tanh.see(tanh_of(x), std::tanh(double(x)));
    log.see(log1p_of(x), std::log1p(double(x)));
  }
  for (float c : cosines())
    if (std::fabs(c) <= 1 && c != 0)
      asin.see(asin_of(c), std::asin(double(c)));
  reciprocal.print("reciprocal_of");
  quotient.print("quotient_of");
  root.print("sqrt_of");
  inverse_root.print("inverse_sqrt_of");
  tanh.print("tanh_of");
  log.print("log1p_of");
  asin.print("asin_of");
}

int wrong = 0;

void expect(const char* what, double got, double expected) {
  if (got == expected || (std::isnan(got) && std::isnan(expected)))
    return;
  ++wrong;
  std::printf("%s is %.9g, not %.9g\n", what, got, expected);
}

// 0, infinity and NaN, where T is to behave as float on any device.
template <class T>
void special() {
  const float infinity = HUGE_VALF, nan = NAN;
  const auto reciprocal = [](float x) { return value_of(reciprocal_of(T(x))); };
  expect("1 / 0", reciprocal(0), infinity);
  expect("1 / -0", reciprocal(-0.0f), -infinity);
  expect("1 / infinity", reciprocal(infinity), 0);
  expect("1 / -infinity", reciprocal(-infinity), 0);
  expect("1 / NaN", reciprocal(nan), nan);
  expect("1 / 2^127", reciprocal(0x1p127f), 0);
  expect("1 / 2^-140", reciprocal(0x1p-140f), infinity);
  const Constants<T> constants = ::constants<T>();
  const Radius<T> endless{T(infinity), T(0.0f)};
  expect("tanh at rho = infinity", value_of(Tanh::value(T(1), T(2), endless, constants)), 0);
  const MagnitudeGrad<T> flat = Tanh::grad(T(1), T(2), endless, constants);
  expect("its h", value_of(flat.h), 0);
  expect("its d", value_of(flat.d), 0);
  expect("its dh/drho", value_of(flat.h_rho), 0);
  expect("ball at rho = infinity", value_of(Ball::value(T(1), T(2), endless, constants)), 0);
  const Radius<T> one{T(1), T(1)};
  expect("d of saturated tanh", value_of(Tanh::grad(T(1), T(infinity), one, constants).h_rho), nan);
  expect("log(1 + infinity)", value_of(log1p_of(T(infinity))), infinity);
  expect("log(1 + 0)", value_of(log1p_of(T(0))), 0);
  expect("root of 0", value_of(sqrt_of(T(0))), 0);
  expect("root of infinity", value_of(sqrt_of(T(infinity))), infinity);
  expect("root of -1", value_of(sqrt_of(T(-1))), nan);
  expect("0^0", value_of(pow_of(T(0), T(0))), 1);
  expect("0^1.5", value_of(pow_of(T(0), T(1.5))), 0);
  expect("asin 0", value_of(asin_of(T(0))), 0);
  for (T x : {T(nan)}) {
    expect("tanh NaN", value_of(tanh_of(x)), nan);
    expect("slope of tanh at NaN", value_of(tanh_slope(x).slope), nan);
    expect("log(1 + NaN)", value_of(log1p_of(x)), nan);
    expect("asin NaN", value_of(asin_of(clamp_unit(x))), nan);
    expect("sin NaN", value_of(sin_half_pi(clamp_unit(x))), nan);
    expect("root of NaN", value_of(sqrt_of(x)), nan);
    expect("inverse root of NaN", value_of(inverse_sqrt_of(x)), nan);
    expect("NaN^1.5", value_of(pow_of(x, T(1.5))), nan);
    expect("|NaN|", value_of(abs_of(x)), nan);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "all") == 0)
    simt::approximate_errors = std::atof(argv[2]);
  for (int i = 0; argc == 3 && i < simt::kInstructions; ++i)
    if (std::strcmp(argv[1], kNames[i]) == 0)
      simt::approximate_bounds[i] *= std::atof(argv[2]);
  instructions();
  magnitudes(Magnitudes{}, "");
  magnitude<TanhProduct, Approximate>("tanh-product");
  magnitude<TanhSeparate, Approximate>("tanh-separate");
  angulars(Angulars{});
  floats();
  special<float>();
  special<Approximate>();
  return wrong == 0 ? 0 : 1;
}

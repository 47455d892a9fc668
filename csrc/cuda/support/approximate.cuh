// What h and g of 16-bit tensors are evaluated in: floats whose elementary functions are the GPU's
// approximate instructions. docs/accuracy.md has their errors and what the functions make of them.
#pragma once

#include <cmath>

#include "cuda/support/device.cuh"
#include "functions.h"
#include "storage.h"

namespace dcconv::cuda {

// The instructions by their PTX names, all flushing subnormal numbers but tanh. Under the SIMT
// model each is off by as much as its documentation allows.
#if defined(__CUDA_ARCH__)
#define DCCONV_APPROXIMATE(name, instruction, exact)                                               \
  DC_HD float name(float x) {                                                                      \
    float value;                                                                                   \
    asm(instruction ".f32 %0, %1;" : "=f"(value) : "f"(x));                                        \
    return value;                                                                                  \
  }
#elif defined(DCCONV_SIMT)
#define DCCONV_APPROXIMATE(name, instruction, exact)                                               \
  DC_HD float name(float x) {                                                                      \
    return simt::approximate(simt::Instruction::name, x);                                          \
  }
#else
#define DCCONV_APPROXIMATE(name, instruction, exact)                                               \
  DC_HD float name(float x) {                                                                      \
    return exact;                                                                                  \
  }
#endif
namespace approximate {
DCCONV_APPROXIMATE(tanh, "tanh.approx", ::tanhf(x))
DCCONV_APPROXIMATE(ex2, "ex2.approx.ftz", ::exp2f(x))
DCCONV_APPROXIMATE(lg2, "lg2.approx.ftz", ::log2f(x))
DCCONV_APPROXIMATE(rcp, "rcp.approx.ftz", 1.0f / x)
DCCONV_APPROXIMATE(sqrt, "sqrt.approx.ftz", ::sqrtf(x))
DCCONV_APPROXIMATE(rsqrt, "rsqrt.approx.ftz", 1.0f / ::sqrtf(x))
}  // namespace approximate
#undef DCCONV_APPROXIMATE

// A float for the function templates of functions.h, which find what is below by its type.
class Approximate {
public:
  Approximate() = default;
  DC_HD explicit Approximate(float x) : x_(x) {}
  DC_HD explicit Approximate(double x) : x_(static_cast<float>(x)) {}
  DC_HD explicit Approximate(int x) : x_(static_cast<float>(x)) {}

  DC_HD float value() const { return x_; }

  DC_HD Approximate operator-() const { return Approximate(-x_); }
  DC_HD Approximate& operator+=(Approximate y) { return *this = *this + y; }
  DC_HD Approximate& operator-=(Approximate y) { return *this = *this - y; }
  DC_HD Approximate& operator*=(Approximate y) { return *this = *this * y; }
  DC_HD Approximate& operator/=(Approximate y) { return *this = *this / y; }

  friend DC_HD Approximate operator+(Approximate x, Approximate y) {
    return Approximate(x.x_ + y.x_);
  }
  friend DC_HD Approximate operator-(Approximate x, Approximate y) {
    return Approximate(x.x_ - y.x_);
  }
  friend DC_HD Approximate operator*(Approximate x, Approximate y) {
    return Approximate(x.x_ * y.x_);
  }
  friend DC_HD Approximate operator/(Approximate x, Approximate y) {
    return Approximate(x.x_ * approximate::rcp(y.x_));
  }
  friend DC_HD bool operator<(Approximate x, Approximate y) { return x.x_ < y.x_; }
  friend DC_HD bool operator>(Approximate x, Approximate y) { return x.x_ > y.x_; }
  friend DC_HD bool operator<=(Approximate x, Approximate y) { return x.x_ <= y.x_; }
  friend DC_HD bool operator>=(Approximate x, Approximate y) { return x.x_ >= y.x_; }
  friend DC_HD bool operator==(Approximate x, Approximate y) { return x.x_ == y.x_; }
  friend DC_HD bool operator!=(Approximate x, Approximate y) { return x.x_ != y.x_; }

private:
  float x_;
};

// What h and g of a storage type are evaluated in. Maps, parameters and sums have the ComputeType.
template <class T>
struct EvaluationType {
  using type = typename ComputeType<T>::type;
};
template <>
struct EvaluationType<BFloat16> {
  using type = Approximate;
};
template <>
struct EvaluationType<Half> {
  using type = Approximate;
};

// The number that an evaluation gives, as it is stored and summed.
DC_HD float value_of(float x) {
  return x;
}
DC_HD double value_of(double x) {
  return x;
}
DC_HD float value_of(Approximate x) {
  return x.value();
}

// The dtype of parameters and maps beside evaluations in E.
template <class E>
using NumberOf = decltype(value_of(E{}));

// Overloads beside those for float and double, which they would hide.
using portable::abs_of;
using portable::asin_of;
using portable::at_least;
using portable::at_most;
using portable::clamp_unit;
using portable::half_reciprocal_of;
using portable::inverse_sqrt_of;
using portable::log1p_of;
using portable::log_defect;
using portable::pow_of;
using portable::quotient_of;
using portable::reciprocal_of;
using portable::sin_half_pi;
using portable::sqrt_of;
using portable::tanh_defect;
using portable::tanh_of;
using portable::tanh_slope;
using portable::with_sign;

DC_HD Approximate at_most(Approximate x, Approximate high) {
  return Approximate(portable::at_most(x.value(), high.value()));
}
DC_HD Approximate at_least(Approximate x, Approximate low) {
  return Approximate(portable::at_least(x.value(), low.value()));
}
DC_HD Approximate clamp_unit(Approximate c) {
  return Approximate(portable::clamp_unit(c.value()));
}
DC_HD Approximate abs_of(Approximate x) {
  return Approximate(portable::abs_of(x.value()));
}
DC_HD Approximate with_sign(Approximate size, Approximate sign) {
  return Approximate(portable::with_sign(size.value(), sign.value()));
}

DC_HD Approximate reciprocal_of(Approximate x) {
  return Approximate(approximate::rcp(x.value()));
}
DC_HD Approximate half_reciprocal_of(Approximate x) {
  return Approximate(0.5f * approximate::rcp(x.value()));
}
DC_HD Approximate quotient_of(Approximate a, Approximate b) {
  return a / b;
}
DC_HD Approximate sqrt_of(Approximate x) {
  return Approximate(approximate::sqrt(x.value()));
}
DC_HD Approximate inverse_sqrt_of(Approximate x) {
  return Approximate(approximate::rsqrt(x.value()));
}

DC_HD Approximate tanh_of(Approximate x) {
  return Approximate(approximate::tanh(x.value()));
}

// With t = tanh z and e = exp(-2 z), 1 / (1 + e) = (1 + t) / 2: the derivative 4 e / (1 + e)^2 is
// e (1 + t)^2, a product that keeps the relative errors of both.
DC_HD portable::TanhSlope<Approximate> tanh_slope(Approximate z) {
  const float t = approximate::tanh(z.value());
  const float e = approximate::ex2(-2.88539008f * z.value());
  const float sum = 1.0f + t;
  return {Approximate(t), Approximate(e * sum * sum)};
}

// z / cosh(z)^2 - tanh(z) is added to h = tanh(z), with the same t: what counts is its error beside
// t, which the difference has at small z too.
DC_HD Approximate tanh_defect(Approximate z, portable::TanhSlope<Approximate> v) {
  return z * v.slope - v.t;
}

// log(1 + x) for x >= 0: a polynomial where the rounding of 1 + x and the absolute error of lg2
// would count, within 2^-17 of x.
DC_HD Approximate log1p_of(Approximate value) {
  const float x = value.value();
  const float small = x * ((0.321958184f * x - 0.499868184f) * x + 1.0f);
  const float large = 0.693147182f * approximate::lg2(1.0f + x);
  return Approximate(x < 0.03125f ? small : large);
}

// b / (1 + b) - log(1 + b) is added to l = log(1 + b): its error beside l counts.
DC_HD Approximate log_defect(Approximate b, Approximate l) {
  return b / (Approximate(1.0f) + b) - l;
}

// The float's formula with fewer terms: x + x^3 P(x^2) within 2^-19 of x.
DC_HD Approximate asin_of(Approximate value) {
  const float x = value.value(), size = portable::abs_of(x);
  const bool large = size > 0.5f;
  const float t = large ? 0.5f - 0.5f * size : size * size;
  const float s = large ? approximate::sqrt(t) : size;
  const float p = (0.0641734749f * t + 0.0718766898f) * t + 0.166803062f;
  const float small = s + s * t * p;
  return Approximate(portable::with_sign(large ? 1.57079637f - 2.0f * small : small, x));
}

// sin(pi/2 x) for |x| <= 1, within 2^-20 of itself.
DC_HD Approximate sin_half_pi(Approximate value) {
  const float x = value.value(), t = x * x;
  const float p = ((-0.00436246628f * t + 0.0794876516f) * t - 0.645920992f) * t + 1.57079482f;
  return Approximate(x * p);
}

// x^y for x >= 0, y >= 0: lg2 0 is minus infinity, of which ex2 makes 0.
DC_HD Approximate pow_of(Approximate x, Approximate y) {
  const float value = approximate::ex2(y.value() * approximate::lg2(x.value()));
  return Approximate(y.value() == 0.0f ? 1.0f : value);
}

}  // namespace dcconv::cuda

// Elementary functions for float that vectorise and run on host and device alike, within 4 ulp;
// double goes to the standard library. All keep NaN and none branches: the device's quotients and
// roots are made of its approximate instructions and Newton's method, not of IEEE division, whose
// slow path is a branch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DC_HD __host__ __device__ __forceinline__
#else
#define DC_HD inline __attribute__((always_inline))
#endif

// The CPU kernels are compiled once per instruction set from one source; every copy has its own
// namespace, or the linker would merge them.
#ifndef DCCONV_ISA
#define DCCONV_ISA portable
#endif

// The device's arithmetic, or that of its emulator (tests/cuda/simt).
#if defined(__CUDA_ARCH__) || defined(DCCONV_SIMT)
#define DCCONV_DEVICE_ARITHMETIC
#endif

namespace dcconv::DCCONV_ISA {

DC_HD int32_t bits_of(float x) {
  int32_t i;
  std::memcpy(&i, &x, sizeof(i));
  return i;
}

DC_HD float float_of(int32_t i) {
  float x;
  std::memcpy(&x, &i, sizeof(x));
  return x;
}

// min and max that return a NaN first argument.
template <class T>
DC_HD T at_most(T x, T high) {
  return x > high ? high : x;
}

template <class T>
DC_HD T at_least(T x, T low) {
  return x < low ? low : x;
}

#if defined(__CUDA_ARCH__)
// One instruction, where a comparison and a choice are two.
DC_HD float at_most(float x, float high) {
  float value;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(x), "f"(high));
  return value;
}

DC_HD float at_least(float x, float low) {
  float value;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(x), "f"(low));
  return value;
}
#endif

template <class T>
DC_HD T clamp_unit(T c) {
  return at_least(at_most(c, T(1)), T(-1));
}

DC_HD float abs_of(float x) {
  return float_of(bits_of(x) & 0x7fffffff);
}
DC_HD double abs_of(double x) {
  return std::fabs(x);
}

DC_HD float with_sign(float size, float sign) {
  return float_of((bits_of(size) & 0x7fffffff) | (bits_of(sign) & ~0x7fffffff));
}
DC_HD double with_sign(double size, double sign) {
  return std::copysign(size, sign);
}

#if defined(DCCONV_DEVICE_ARITHMETIC)
// 1 / x within an ulp; the emulator has the right one. Subnormal numbers count as 0 here and in the
// product of flushing_fma.
DC_HD float rcp_approx(float x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
#else
  const float value = 1.0f / (abs_of(x) < 0x1p-126f ? with_sign(0.0f, x) : x);
  return abs_of(value) < 0x1p-126f ? with_sign(0.0f, value) : value;
#endif
}

DC_HD float flushing_fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(value) : "f"(a), "f"(b), "f"(c));
  return value;
#else
  return ::fmaf(abs_of(a) < 0x1p-126f ? 0.0f : a, b, c);
#endif
}
#endif

// 1 / x for every x. On the device within an ulp; subnormal x and results count as 0.
DC_HD float reciprocal_of(float x) {
#if defined(DCCONV_DEVICE_ARITHMETIC)
  const float r = rcp_approx(x);
  // 0 and infinity have no error to correct: their product is NaN, which fmin replaces.
  return ::fmaf(r, ::fminf(flushing_fma(-x, r, 1.0f), 1.0f), r);
#else
  return 1.0f / x;
#endif
}
DC_HD double reciprocal_of(double x) {
  return 1.0 / x;
}

// 1 / (2 x), in the same way.
DC_HD float half_reciprocal_of(float x) {
#if defined(DCCONV_DEVICE_ARITHMETIC)
  return 0.5f * reciprocal_of(x);
#else
  return 0.5f / x;
#endif
}
DC_HD double half_reciprocal_of(double x) {
  return 0.5 / x;
}

// a / b for b from 2^-100 to 2^100 in size, whatever a is. On the device within an ulp, NaN for
// other b.
DC_HD float quotient_of(float a, float b) {
#if defined(DCCONV_DEVICE_ARITHMETIC)
  const float r = rcp_approx(b), q = a * r;
  return ::fmaf(::fmaf(-q, b, a), r, q);
#else
  return a / b;
#endif
}
DC_HD double quotient_of(double a, double b) {
  return a / b;
}

DC_HD float sqrt_of(float x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(value) : "f"(x));  // within 2^-23, subnormal numbers too
  return value;
#else
  return ::sqrtf(x);
#endif
}
DC_HD double sqrt_of(double x) {
  return ::sqrt(x);
}

// 1 / sqrt(x) for normal x; on the device within 2 ulp, NaN for 0 and infinity.
DC_HD float inverse_sqrt_of(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  const float half = 0.5f * r;
  return ::fmaf(half, ::fmaf(-x * r, r, 1.0f), r);
#else
  return 1.0f / sqrt_of(x);
#endif
}
DC_HD double inverse_sqrt_of(double x) {
  return 1.0 / sqrt_of(x);
}

// 2^n for shifted = n + 1.5 * 2^23: the low bits of such a sum are n itself. Bits, not a
// conversion, because NaN has no integer.
DC_HD float power_of_two(float shifted) {
  return float_of(
      static_cast<int32_t>((static_cast<uint32_t>(bits_of(shifted)) << 23) + 0x3f800000u)
  );
}

// tanh x for x >= 0 and its derivative 1 / cosh(x)^2, which 1 - tanh(x)^2 would lose to
// cancellation: with e = exp(-2 x), tanh = (1 - e) / (1 + e) and the derivative 4 e / (1 + e)^2.
template <class T>
struct TanhSlope {
  T t;
  T slope;
};

DC_HD TanhSlope<float> tanh_slope(float x) {
  // At 44 e has no exponent left and is 0, as float32 rounds it.
  const float y = -2.0f * at_most(x, 44.0f);
  // Adding and subtracting 1.5 * 2^23 rounds to an integer.
  const float shifted = y * 1.44269502f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // ln 2 in two parts, the first exact in products with an exponent.
  const float r = (y - n * 0.693145752f) - n * 1.42860677e-06f;
  float p = 0.00138888566f;
  p = p * r + 0.0083690742f;
  p = p * r + 0.0416671373f;
  p = p * r + 0.166665062f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  const float scale = power_of_two(shifted);
  const float minus = scale * (r * p) + (scale - 1.0f);   // exp(y) - 1
  const float inverse = quotient_of(1.0f, 2.0f + minus);  // by 1 to 2
  const float e = scale * (r * p) + scale;
  return {-minus * inverse, 4.0f * e * inverse * inverse};
}

DC_HD TanhSlope<double> tanh_slope(double x) {
  const double e = ::exp(-2.0 * x), minus = ::expm1(-2.0 * x), inverse = 1.0 / (1.0 + e);
  return {-minus * inverse, 4.0 * e * inverse * inverse};
}

// tanh x = 2 n q / (q^2 + n^2) where n / q = tanh(x / 2), n = x P(x^2), q = Q(x^2) and |x| <= 9.01;
// tanh 9.01 rounds to 1. What n / q is wrong by counts 1 / cosh x times, so that low degrees do:
// minimax with that weight, 8e-9. With P(0) = 0.925 most sums round to the upper half of a binade,
// which costs less. For float and vectors of it.
template <class V>
DC_HD V tanh_numerator(V t) {
  const V p = 0.000105595297f * t + 0.0275366791f;
  return p * t + 0.925f;
}

template <class V>
DC_HD V tanh_denominator(V t) {
  V q = 2.26981943e-06f * t + 0.00223125657f;
  q = q * t + 0.209239960f;
  return q * t + 1.85f;
}

// Within 3.5 ulp of every float; with fused multiply-add within 3.1.
DC_HD float tanh_of(float x) {
  const float z = at_least(at_most(x, 9.01f), -9.01f);
  const float t = z * z;
  const float n = z * tanh_numerator(t), q = tanh_denominator(t);
  return clamp_unit(quotient_of((n + n) * q, q * q + n * n));  // by 3.4 to 2400
}
DC_HD double tanh_of(double x) {
  return ::tanh(x);
}

// x = 2^exponent * (1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1]; x positive and normal.
DC_HD void split(float x, float& exponent, float& f) {
  const int32_t e = (bits_of(x) - 0x3f3504f3) >> 23;
  exponent = static_cast<float>(e);
  f = float_of(bits_of(x) - e * (1 << 23)) - 1.0f;
}

// log(1 + x) for x >= 0: log of the rounded sum u, plus (x - (u - 1)) / u for what rounding lost.
DC_HD float log1p_of(float x) {
  const float u = 1.0f + x;
  const float lost = quotient_of(x - (u - 1.0f), u);  // 0 beyond 2^24
  float e, f;
  split(u, e, f);
  float p = -0.0797415748f;
  p = p * f + 0.126556724f;
  p = p * f - 0.129892841f;
  p = p * f + 0.142099485f;
  p = p * f - 0.166415811f;
  p = p * f + 0.200012013f;
  p = p * f - 0.25000304f;
  p = p * f + 0.333333313f;
  const float r = f * f * (f * p - 0.5f);
  // ln 2 in two parts, the first exact in products with an exponent.
  const float value = e * 0.693145752f + (f + (r + (e * 1.42860677e-06f + lost)));
  return x < 3.0e38f ? value : x;
}
DC_HD double log1p_of(double x) {
  return ::log1p(x);
}

// asin x for |x| <= 1: x + x^3 P(x^2) below 1/2, pi/2 - 2 asin(sqrt((1 - x) / 2)) above.
DC_HD float asin_of(float x) {
  const float size = abs_of(x);
  const bool large = size > 0.5f;
  const float t = large ? 0.5f - 0.5f * size : size * size;
  const float s = large ? sqrt_of(t) : size;
  float p = 0.0381963216f;
  p = p * t + 0.0264993571f;
  p = p * t + 0.0450099036f;
  p = p * t + 0.0749881342f;
  p = p * t + 0.166666731f;
  const float small = s + s * t * p;
  // pi/2 in two parts keeps the difference within an ulp.
  const float value = large ? 1.57079637f - (2.0f * small + 4.37113883e-08f) : small;
  return with_sign(value, x);
}
DC_HD double asin_of(double x) {
  return ::asin(x);
}

// sin(pi/2 x) for |x| <= 1.
DC_HD float sin_half_pi(float x) {
  const float t = x * x;
  float p = 0.000151485117f;
  p = p * t - 0.00467376644f;
  p = p * t + 0.0796896815f;
  p = p * t - 0.645963728f;
  p = p * t + 1.57079637f;
  return x * p;
}
DC_HD double sin_half_pi(double x) {
#if defined(__CUDA_ARCH__)
  return ::sinpi(0.5 * x);  // needs no reduction of huge arguments, which takes a stack
#else
  return ::sin(x * 1.57079632679489661923);
#endif
}

// x^y for x >= 0, y >= 0: exp2(y log2 x), the leading product in two parts.
DC_HD float pow_of(float x, float y) {
  float e, f;
  split(x, e, f);
  float p = -0.112212539f;
  p = p * f + 0.184337556f;
  p = p * f - 0.189195678f;
  p = p * f + 0.204807162f;
  p = p * f - 0.239878252f;
  p = p * f + 0.288562626f;
  p = p * f - 0.360684991f;
  p = p * f + 0.480898231f;
  p = p * f - 0.721347511f;
  const float fraction = y * (1.44269502f * f + (1.92596303e-08f * f + f * f * p));
  const float whole = y * e;
  const float total = at_least(at_most(whole + fraction, 127.0f), -126.0f);
  // Adding and subtracting 1.5 * 2^23 rounds to an integer.
  const float shifted = total + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = at_least(at_most((whole - n) + fraction, 1.0f), -1.0f);
  float q = 0.000153533605f;
  q = q * r + 0.0013398875f;
  q = q * r + 0.00961843692f;
  q = q * r + 0.0555033237f;
  q = q * r + 0.240226477f;
  q = q * r + 0.693147182f;
  q = q * r + 1.0f;
  const float value = q * power_of_two(shifted);
  const float nonzero = x > 0.0f ? value : x;  // 0 and NaN come out as they are
  return y == 0.0f ? 1.0f : nonzero;
}
DC_HD double pow_of(double x, double y) {
  return ::pow(x, y);
}

}  // namespace dcconv::DCCONV_ISA

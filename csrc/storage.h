// Storage dtypes of tensors and their conversion to and from the compute dtype. The conversions
// are integer arithmetic without branches on the host, so that they vectorise on every instruction
// set, and single instructions on the device.
#pragma once

#include "elementary.h"

namespace dcconv {

// Scalar types of their own, not structs: compilers do not vectorise loads of structs.
enum class BFloat16 : uint16_t {};
enum class Half : uint16_t {};

// The dtype of norms, sums, c, h and g.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

namespace DCCONV_ISA {

DC_HD float load(float x) {
  return x;
}
DC_HD double load(double x) {
  return x;
}
DC_HD float load(BFloat16 x) {
  return float_of(static_cast<int32_t>(uint32_t(x) << 16));
}

DC_HD float load(Half x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(x)));
  return value;
#else
  const uint32_t size = (uint32_t(x) & 0x7fffu) << 13;
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal.
  const float finite = float_of(static_cast<int32_t>(size)) * 0x1.0p112f;
  const uint32_t special = uint32_t(bits_of(finite)) | 0x7f800000u;
  const uint32_t value = size >= 0x0f800000u ? special : uint32_t(bits_of(finite));
  return float_of(static_cast<int32_t>(value | ((uint32_t(x) & 0x8000u) << 16)));
#endif
}

template <class T>
struct Store;

template <>
struct Store<float> {
  DC_HD static float from(float x) { return x; }
};

template <>
struct Store<double> {
  DC_HD static double from(double x) { return x; }
};

// Round to nearest even; NaN stays NaN.
template <>
struct Store<BFloat16> {
  DC_HD static BFloat16 from(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t value;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(value) : "f"(x));
    return static_cast<BFloat16>(value);
#else
    const uint32_t bits = static_cast<uint32_t>(bits_of(x));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return BFloat16(nan ? 0x7fc0u : rounded);
#endif
  }
};

// Round to nearest even; beyond 65504 + half an ulp comes infinity; NaN stays NaN.
template <>
struct Store<Half> {
  DC_HD static Half from(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t value;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value) : "f"(x));
    return static_cast<Half>(value);
#else
    const uint32_t bits = static_cast<uint32_t>(bits_of(x));
    const uint32_t size = bits & 0x7fffffffu;
    // Normal results: add the rounding increment, move the exponent bias from 127 to 15.
    const uint32_t normal = (size + 0xfffu + ((size >> 13) & 1u) - 0x38000000u) >> 13;
    // Subnormal results: adding 1/2 lets the float addition round at 2^-24.
    const float shifted = float_of(static_cast<int32_t>(size)) + 0.5f;
    const uint32_t subnormal = uint32_t(bits_of(shifted)) - 0x3f000000u;
    uint32_t value = size < 0x38800000u ? subnormal : normal;
    value = size >= 0x477ff000u ? 0x7c00u : value;
    value = size > 0x7f800000u ? 0x7e00u : value;
    return Half(value | ((bits >> 16) & 0x8000u));
#endif
  }
};

}  // namespace DCCONV_ISA
}  // namespace dcconv

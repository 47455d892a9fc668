// The GPU's approximate instructions on float, each as far off as its documentation allows: up or
// down by the argument's bits, so that a function of it is one. docs/accuracy.md names the sources.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace simt {

enum class Instruction { tanh, ex2, lg2, rcp, sqrt, rsqrt };
constexpr int kInstructions = 6;

// Largest relative errors by Instruction; that of lg2 between 1/2 and 2 is absolute. Tests change
// them, to see what notices.
inline double approximate_bounds[kInstructions] = {
    0x1p-11,     // tanh
    0x1p-22,     // ex2
    0x1p-22,     // lg2
    0x1p-23,     // rcp
    0x1p-23,     // sqrt
    1.27767e-7,  // rsqrt: 2^-22.9
};

// What they are scaled by; at 0 results are rounded correctly.
inline double approximate_errors = 1;

inline float flushed(float x) {
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

inline double exact_value(Instruction instruction, double x) {
  switch (instruction) {
  case Instruction::tanh:
    return std::tanh(x);
  case Instruction::ex2:
    return std::exp2(x);
  case Instruction::lg2:
    return std::log2(x);
  case Instruction::rcp:
    return 1 / x;
  case Instruction::sqrt:
    return std::sqrt(x);
  default:
    return 1 / std::sqrt(x);
  }
}

inline float approximate(Instruction instruction, float argument) {
  const bool flushes = instruction != Instruction::tanh;
  const float x = flushes ? flushed(argument) : argument;
  const double exact = exact_value(instruction, x);
  if (!std::isfinite(exact) || exact == 0)
    return static_cast<float>(exact);
  const double bound = approximate_errors * approximate_bounds[static_cast<int>(instruction)];
  const bool absolute = instruction == Instruction::lg2 && x > 0.5f && x < 2.0f;
  const double most = absolute ? bound : bound * std::fabs(exact);
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const bool up = (bits * 0x9e3779b9u) >> 31 != 0;
  float value = static_cast<float>(exact + (up ? most : -most));
  // Rounding does not take it beyond a bound that leaves a choice.
  if (most > 0 && std::fabs(double(value) - exact) > most)
    value = std::nextafter(value, static_cast<float>(exact));
  return flushes ? flushed(value) : value;
}

}  // namespace simt

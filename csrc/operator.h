// What a kernel of any device is told about the operator and the tensors' types.
#pragma once

namespace dcconv {

// rho never falls below this (dcconv/operator/numerics.py has the same constant).
constexpr double kRhoFloor = 1e-12;

enum class Dtype { f64, f32, bf16, f16 };

// What backward recovers c from.
enum class Kept { output, dot };

struct Operator {
  int magnitude;  // index in Magnitudes, then in WeightedMagnitudes
  int angular;    // index in Angulars
  bool times_a;   // weighting "linear"
  double alpha, beta, power, delta;
};

}  // namespace dcconv

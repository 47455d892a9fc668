// Per-filter factors of tanh x cosine, the default operator, whose kernels need no root and no
// division by b: y = u slope R(t), t = scale b^2, where R(t) is proportional to tanh(z) / z.
#pragma once

#include <cstdint>

namespace dcconv::cpu {

// Filters that share an entry of `most`; a vector of any instruction set lies in one group.
constexpr int64_t kScaleGroup = 16;

// In float, for whole groups of filters, zeros behind the last one.
struct FilterScales {
  const float* scale;   // 1 / rho^2
  const float* slope;   // 2 alpha / (a rho), times a where h is
  const float* factor;  // alpha / a, times a where h is
  const float* bias;    // or null
  const float* most;    // [groups] the largest scale
};

}  // namespace dcconv::cpu

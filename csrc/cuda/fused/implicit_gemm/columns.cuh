// What the columns of a tile need of their filters, in shared memory: loaded once per tile, by one
// thread per column.
#pragma once

#include "cuda/fused/implicit_gemm/fragments.cuh"
#include "cuda/fused/implicit_gemm/problem.cuh"
#include "cuda/passes/elements.cuh"

namespace dcconv::cuda {

// Arrays of [Columns], absent operands as what changes nothing.
enum ColumnArray { kInverseA, kA, kRho, kInverseRho, kCurvature, kBias, kColumnArrays };

// One column's operands on their way from global memory.
template <class T>
class ColumnOperands {
public:
  __device__ __forceinline__ ColumnOperands(const FusedParams& p, int64_t filter, bool exists) {
    if (!exists)
      return;
    const FilterOperands& f = p.filters;
    a_ = static_cast<const float*>(f.a)[filter];
    if (f.radius != nullptr)
      radius_ = static_cast<const float*>(f.radius)[filter * f.radius_stride];
    if (f.mean != nullptr)
      mean_ = *static_cast<const float*>(f.mean);
    if (f.k != nullptr)
      k_ = static_cast<const float*>(f.k)[filter * f.k_stride];
    if (p.bias != nullptr)
      bias_ = load(static_cast<const T*>(p.bias)[filter]);
  }

  // With 1 / a times a factor of c.
  template <int Columns>
  __device__ __forceinline__ void store(float* arrays, int column, float factor) const {
    const int place =
        column_place<Columns>(column / kPiece, column / (kPiece / 2) % 2) + column % (kPiece / 2);
    const float rho = at_least(radius_ * mean_, float(kRhoFloor));
    arrays[kInverseA * Columns + place] = factor * reciprocal_of(a_);
    arrays[kA * Columns + place] = a_;
    arrays[kRho * Columns + place] = rho;
    arrays[kInverseRho * Columns + place] = reciprocal_of(rho);
    arrays[kCurvature * Columns + place] = k_;
    arrays[kBias * Columns + place] = bias_;
  }

private:
  float a_ = 1, radius_ = 1, mean_ = 1, k_ = 1, bias_ = 0;
};

}  // namespace dcconv::cuda

// The last step of the forward kernel: the product of a tile -> y (and u). Functions that are
// common are known to the compiler and evaluated where the product's fragments are, in registers;
// the tile then crosses shared memory in 16 bits. All others are chosen at run time and cross it in
// float32, eight columns of a row at a time.
#pragma once

#include "cuda/fused/implicit_gemm/columns.cuh"
#include "cuda/fused/implicit_gemm/main_loop.cuh"
#include "cuda/fused/implicit_gemm/stored_tile.cuh"

namespace dcconv::cuda {

// How y is made of the product.
enum class LastStep { chosen, position_cosine, position_square, tanh_cosine, tanh_square };

struct GemmForwardArgs {
  GemmProblem problem;
  GemmGrid grid;
  FusedParams p;
  bool per_position;  // h depends on the position alone, up to a factor a
  LastStep last_step;
};

inline LastStep last_step_of(const Operator& op, bool per_position) {
  LastStep step = LastStep::chosen;
  with_known_functions(op, per_position, [&](auto magnitude, auto angular) {
    constexpr bool kSquare = std::is_same<decltype(angular), SquareCosine>::value;
    if constexpr (std::is_same<decltype(magnitude), PerPosition>::value)
      step = kSquare ? LastStep::position_square : LastStep::position_cosine;
    else
      step = kSquare ? LastStep::tanh_square : LastStep::tanh_cosine;
  });
  return step;
}

// alpha goes into 1 / a where y is linear in both h and c: a product less for each element.
__device__ __forceinline__ float cosine_factor(const GemmForwardArgs& args) {
  return args.last_step == LastStep::tanh_cosine ? float(args.p.op.alpha) : 1.0f;
}

// f(where h comes from, g), types known to the compiler.
template <class F>
__device__ __forceinline__ void with_known_functions(LastStep step, F&& f) {
  switch (step) {
  case LastStep::position_cosine:
    return f(PerPosition{}, Cosine{});
  case LastStep::position_square:
    return f(PerPosition{}, SquareCosine{});
  case LastStep::tanh_cosine:
    return f(Tanh{}, Cosine{});
  default:
    return f(Tanh{}, SquareCosine{});
  }
}

// y of the tile from the fragments of the product; u where it is wanted. `shared`: for the 16-bit
// tile.
template <class M, class G, class T, class Tile, class Loop>
__device__ __forceinline__ void store_known_outputs(
    const GemmForwardArgs& args,
    const GemmPlace<Tile>& place,
    const Loop& loop,
    unsigned char* shared,
    const float* columns,
    const float* inverse_b,
    const float* b_or_h
) {
  using E = typename EvaluationType<T>::type;
  const FusedParams& p = args.p;
  const StoredTile<T, Tile> tile(place, args.problem.columns, p.o);
  const FragmentPlace<Tile> at;
  if (p.dot != nullptr) {
    loop.each_pair([&](int m, int n, int half, const float (&u)[2]) {
      *at.pair(shared, m, n, half) = pack_word<T>(u[0], u[1]);
    });
    __syncthreads();
    tile.copy(shared, static_cast<T*>(p.dot));
    __syncthreads();
  }
  Constants<E> constants = constants_of<E>(p.op);
  if constexpr (std::is_same<M, Tanh>::value && std::is_same<G, Cosine>::value)
    constants.alpha = E(1);  // see cosine_factor
  float row_inverse[Tile::kRowFragments][2], row_value[Tile::kRowFragments][2];
#pragma unroll
  for (int m = 0; m < Tile::kRowFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_inverse[m][half] = inverse_b[at.row(m, half)];
      row_value[m][half] = b_or_h[at.row(m, half)];
    }
  }
  const auto filters_of = [&](int n) {
    Filters<Each<float, 2>> filters;
    const auto read = [&](ColumnArray array, Each<float, 2>& out) {
      const Vector<float, 2> pair =
          load_vector<float, 2>(at.columns(columns + array * Tile::kColumns, n));
      out.at[0] = pair.at[0];
      out.at[1] = pair.at[1];
    };
    read(kInverseA, filters.inverse_a);
    read(kRho, filters.rho);
    read(kInverseRho, filters.inverse_rho);
    read(kBias, filters.bias);
    return filters;
  };
  Filters<Each<float, 2>> next = filters_of(0);
#pragma unroll
  for (int n = 0; n < Tile::kColumnFragments; ++n) {
    const Filters<Each<float, 2>> filters = next;
    if (n + 1 < Tile::kColumnFragments)
      next = filters_of(n + 1);
#pragma unroll
    for (int m = 0; m < Tile::kRowFragments; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const OutputPositions<Uniform<float>> position{
            {row_inverse[m][half]}, {row_value[m][half]}
        };
        float u[2], y[2];
        loop.pair(m, n, half, u);
        output_elements<M, G>(constants, filters, position, u, y);
        *at.pair(shared, m, n, half) = pack_word<T>(y[0], y[1]);
      }
    }
  }
  __syncthreads();
  tile.copy(shared, static_cast<T*>(p.y));
}

// y of eight columns of a row, by functions chosen at run time.
template <class T, class Tile>
__device__ __forceinline__ Vector<T, kPiece> chosen_outputs(
    const GemmForwardArgs& args,
    const Constants<typename EvaluationType<T>::type>& constants,
    const float* columns,
    int vector,
    const Vector<float, kPiece>& u,
    float inverse_b,
    float b_or_h
) {
  using E = typename EvaluationType<T>::type;
  constexpr int kHalf = kPiece / 2;
  const FusedParams& p = args.p;
  float y[kPiece];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const auto read = [&](ColumnArray array, auto(&out)[kHalf]) {
      const Vector<float, kHalf> all = load_vector<float, kHalf>(
          columns + array * Tile::kColumns + column_place<Tile::kColumns>(vector, part)
      );
#pragma unroll
      for (int j = 0; j < kHalf; ++j)
        out[j] = std::decay_t<decltype(out[j])>(all.at[j]);
    };
    E a[kHalf], h[kHalf], k[kHalf], c[kHalf], g[kHalf];
    float inverse_a[kHalf], bias[kHalf];
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      a[j] = k[j] = E(1);
      h[j] = E(b_or_h);
    }
    if (wants_a(p.op))
      read(kA, a);
    if (!args.per_position) {
      E rho[kHalf], inverse_rho[kHalf];
      read(kRho, rho);
      read(kInverseRho, inverse_rho);
      const float b[kHalf] = {b_or_h, b_or_h, b_or_h, b_or_h};
      filter_magnitudes(p.op, constants, rho, inverse_rho, 0, a, b, h);
    }
    if (p.filters.k != nullptr)
      read(kCurvature, k);
    read(kInverseA, inverse_a);
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      c[j] = E(u.at[part * kHalf + j] * (inverse_a[j] * inverse_b));
      h[j] = p.op.times_a ? h[j] * a[j] : h[j];
    }
    angular_values<AnyAngular>(p.op, constants, c, k, g);
    read(kBias, bias);
#pragma unroll
    for (int j = 0; j < kHalf; ++j)
      y[part * kHalf + j] = value_of(h[j] * g[j]) + bias[j];
  }
  return pack<T, kPiece>(y);
}

// y (and u) of the tile from the product in shared memory, 16 bytes at a time.
template <class T, class Tile>
__device__ __forceinline__ void store_chosen_outputs(
    const GemmForwardArgs& args,
    const GemmPlace<Tile>& place,
    const float* product,
    const float* columns,
    const float* inverse_b,
    const float* b_or_h
) {
  const FusedParams& p = args.p;
  const StoredTile<T, Tile> tile(place, args.problem.columns, p.o);
  const auto constants = constants_of<typename EvaluationType<T>::type>(p.op);
  int64_t offset = tile.offset;
#pragma unroll 1
  for (int row = tile.first_row; row < tile.rows; row += tile.kStride, offset += tile.step) {
    const Vector<float, kPiece> u = product_at<Tile>(product, row, tile.vector);
    if (p.dot != nullptr)
      store_vector(static_cast<T*>(p.dot) + offset, pack<T, kPiece>(u.at));
    store_vector(
        static_cast<T*>(p.y) + offset,
        chosen_outputs<T, Tile>(
            args, constants, columns, tile.vector, u, inverse_b[row], b_or_h[row]
        )
    );
  }
}

}  // namespace dcconv::cuda

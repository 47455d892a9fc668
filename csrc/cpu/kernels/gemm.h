// Matrix products in float32 that stay in cache: register tiles over panels of a packed matrix.
#pragma once

#include <algorithm>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/tanh_cosine.h"
#include "cpu/kernels/vector.h"

namespace dcconv::cpu::DCCONV_ISA {

// Vectors beside each other in a tile, of which a panel is as wide, and rows of a tile that is
// `vectors` wide: accumulators, one row of b and a broadcast fit 32 registers with AVX-512 and 16
// elsewhere. Measured with AVX-512 on one core of 118 GFLOP/s: tiles of 6 x 4 vectors reach 93 to
// 112, tiles of 12 x 2 only 80 to 100, and 8 x 1 reach 111 where 24 x 1 reach 82.
constexpr int kVectors = kLanes == 16 ? 4 : 2;
constexpr int64_t kPanel = kVectors * kLanes;
constexpr int tile_height(int vectors) {
  return vectors == 4 ? 6 : kLanes == 16 || vectors == 1 ? 8 : 6;
}

// Longest sum over which a panel's part of b is used tile by tile, while it is in cache.
constexpr int64_t kDepth = 384;

// Longest sum in one accumulator; longer ones are sums of such sums. Equal terms, those of constant
// operands, round one way: n of them are wrong by n / 8 units on average, n / 4 at worst.
constexpr int64_t kChain = 64;

// One register tile of a product.
struct ProductTile {
  const float *a, *b;
  float* c;
  const float* norm;       // of the first row; null unless these are the last sums of tanh x cosine
  int64_t column;          // the first one
  int64_t columns;         // of c that exist
  int64_t segments, k;     // sums of `segments` times k products
  const int64_t* offsets;  // of the segments in a
  bool add;
};

// Tanh x cosine of the dot products of a tile, in place.
template <int kRows, int kWidth>
DC_HD void
finish_tile(const GemmParams& p, const ProductTile& tile, Vector (&sums)[kRows][kWidth]) {
  float squares[kRows], most = 0.0f;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    squares[i] = tile.norm[i] * tile.norm[i];
    most = std::max(most, squares[i]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < kWidth; ++j) {
    const TanhCosine f(*p.scales, tile.column + j * kLanes);
    if (f.saturates(most)) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
        sums[i][j] = f.value<true>(sums[i][j], Vector{} + squares[i]);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
        sums[i][j] = f.value<false>(sums[i][j], Vector{} + squares[i]);
    }
  }
}

template <int kRows, int kWidth>
void product_tile(const GemmParams& p, const ProductTile& tile) {
  Vector sums[kRows][kWidth];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; ++j)
      sums[i][j] = Vector{};
  const int64_t a_row = p.a_row, a_k = p.a_k, b_k = p.b_k;
  // Chains of one length, as few as there may be: parts of a long segment, or
  // several short ones. What all but the last leave waits in memory.
  const int64_t parts = (tile.k + kChain - 1) / kChain, part = (tile.k + parts - 1) / parts;
  const int64_t together = parts > 1 ? 1 : std::max<int64_t>(kChain / tile.k, 1);
  Vector totals[kRows][kWidth];
  bool chained = false;
  for (int64_t first = 0; first < tile.segments; first += together)
    for (int64_t from = 0; from < tile.k; from += part) {
      if (first + from > 0) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < kWidth; ++j) {
            if (chained)
              sums[i][j] += totals[i][j];
            totals[i][j] = sums[i][j];
            sums[i][j] = Vector{};
          }
        chained = true;
      }
      const int64_t last = std::min(first + together, tile.segments);
      const int64_t to = std::min(from + part, tile.k);
      for (int64_t segment = first; segment < last; ++segment) {
        const float* a = tile.a + tile.offsets[segment] + from * a_k;
        const float* b = tile.b + segment * p.b_segment + from * b_k;
        for (int64_t k = from; k < to; ++k) {
          Vector row[kWidth];
#pragma GCC unroll 4
          for (int j = 0; j < kWidth; ++j)
            row[j] = load_vector(b + j * kLanes);
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            const float value = a[i * a_row];
#pragma GCC unroll 4
            for (int j = 0; j < kWidth; ++j)
              sums[i][j] += value * row[j];
          }
          a += a_k;
          b += b_k;
        }
      }
    }
  if (chained)
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; ++j)
        sums[i][j] += totals[i][j];
  if (tile.add)
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; ++j) {
        const float* c = tile.c + i * p.c_row + j * kLanes;
        const int64_t left = tile.columns - j * kLanes;
        sums[i][j] += left >= kLanes ? load_vector(c) : load_lanes(c, left);
      }
  if (tile.norm != nullptr)
    finish_tile(p, tile, sums);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; ++j) {
      float* c = tile.c + i * p.c_row + j * kLanes;
      const int64_t left = tile.columns - j * kLanes;
      if (left >= kLanes) {
        store_vector(c, sums[i][j]);
      } else {
        float rest[kLanes];
        store_vector(rest, sums[i][j]);
        std::copy_n(rest, left, c);
      }
    }
}

using ProductFunction = void (*)(const GemmParams&, const ProductTile&);

template <int kWidth>
ProductFunction pick_product_height(int64_t rows) {
  static constexpr ProductFunction table[] = {
      product_tile<1, kWidth>,
      product_tile<2, kWidth>,
      product_tile<3, kWidth>,
      product_tile<4, kWidth>,
      product_tile<5, kWidth>,
      product_tile<6, kWidth>,
      product_tile<std::min(7, tile_height(kWidth)), kWidth>,
      product_tile<std::min(8, tile_height(kWidth)), kWidth>,
  };
  return table[rows - 1];
}

DC_HD ProductFunction pick_product(int64_t rows, int64_t vectors) {
  switch (vectors) {
  case 1:
    return pick_product_height<1>(rows);
  case 2:
    return pick_product_height<2>(rows);
  case 3:
    return pick_product_height<std::min(3, kVectors)>(rows);
  default:
    return pick_product_height<kVectors>(rows);
  }
}

// All tiles of one part of the sums: rows split evenly, so that no tile is much lower than others.
inline void product_part(const GemmParams& p, ProductTile tile) {
  const float *a = tile.a, *b = tile.b, *norm = tile.norm;
  for (int64_t column = 0; column < p.n; column += kPanel) {
    tile.column = column;
    tile.columns = std::min(kPanel, p.n - column);
    tile.b = b + column / kPanel * p.b_panel;
    const int64_t vectors = (tile.columns + kLanes - 1) / kLanes;
    const int64_t height = tile_height(static_cast<int>(vectors));
    const int64_t tiles = (p.m + height - 1) / height, each = p.m / tiles, taller = p.m % tiles;
    const ProductFunction low = pick_product(each, vectors);
    const ProductFunction tall = taller > 0 ? pick_product(each + 1, vectors) : low;
    int64_t row = 0;
    for (int64_t i = 0; i < tiles; ++i) {
      tile.a = a + row * p.a_row;
      tile.c = p.c + row * p.c_row + column;
      tile.norm = norm == nullptr ? nullptr : norm + row;
      (i < taller ? tall : low)(p, tile);
      row += i < taller ? each + 1 : each;
    }
  }
}

inline void gemm(const GemmParams& p) {
  ProductTile tile{};
  tile.add = p.add;
  const int64_t together = std::max<int64_t>(kDepth / p.k, 1);
  for (int64_t segment = 0; segment < p.segments; segment += together)
    for (int64_t k = 0; k < p.k; k += kDepth) {
      tile.segments = std::min(together, p.segments - segment);
      tile.k = std::min(kDepth, p.k - k);
      tile.offsets = p.a_offsets + segment;
      tile.a = p.a + k * p.a_k;
      tile.b = p.b + segment * p.b_segment + k * p.b_k;
      const bool last = segment + together >= p.segments && k + kDepth >= p.k;
      tile.norm = last && p.scales != nullptr ? p.norm : nullptr;
      product_part(p, tile);
      tile.add = true;
    }
}

// Rows of a and b in a tile of inner products: as many sums as a vector has lanes.
constexpr int64_t kInnerRows = kLanes == 16 ? 4 : 2;
constexpr int64_t kInnerColumns = kLanes / kInnerRows;

// One tile of inner products. Rows behind the last repeat it and are not stored.
inline void inner_tile(const InnerParams& p, int64_t row, int64_t column) {
  const float *a[kInnerRows], *b[kInnerColumns];
  for (int64_t i = 0; i < kInnerRows; ++i)
    a[i] = p.a + std::min(row + i, p.m - 1) * p.a_row;
  for (int64_t j = 0; j < kInnerColumns; ++j)
    b[j] = p.b + std::min(column + j, p.n - 1) * p.b_row;
  Vector sums[kLanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i)
    sums[i] = Vector{};
  const int64_t whole = p.k / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    Vector right[kInnerColumns];
#pragma GCC unroll 4
    for (int64_t j = 0; j < kInnerColumns; ++j)
      right[j] = load_vector(b[j] + k);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kInnerRows; ++i) {
      const Vector left = load_vector(a[i] + k);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kInnerColumns; ++j)
        sums[i * kInnerColumns + j] += left * right[j];
    }
  }
  if (whole < p.k) {
    Vector right[kInnerColumns];
#pragma GCC unroll 4
    for (int64_t j = 0; j < kInnerColumns; ++j)
      right[j] = load_lanes(b[j] + whole, p.k - whole);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kInnerRows; ++i) {
      const Vector left = load_lanes(a[i] + whole, p.k - whole);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kInnerColumns; ++j)
        sums[i * kInnerColumns + j] += left * right[j];
    }
  }
  float values[kLanes];
  store_vector(values, lane_sums(sums));
  for (int64_t i = 0; i < std::min(kInnerRows, p.m - row); ++i)
    for (int64_t j = 0; j < std::min(kInnerColumns, p.n - column); ++j) {
      float& c = p.c[(row + i) * p.c_row + column + j];
      const float value = values[i * kInnerColumns + j];
      c = p.add ? c + value : value;
    }
}

inline void inner_products(const InnerParams& p) {
  for (int64_t column = 0; column < p.n; column += kInnerColumns)
    for (int64_t row = 0; row < p.m; row += kInnerRows)
      inner_tile(p, row, column);
}

// Panels [begin, end) of a matrix: kPanel columns beside each other, zeros behind the last one.
inline void pack_panels(const PanelParams& p, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t columns = std::min(kPanel, p.n - panel * kPanel);
    const float* from = p.from + panel * kPanel * p.from_n;
    float* to = p.to + panel * p.to_panel;
    int64_t k = 0;
    // A cache line of a column at once: lines of all columns together may not stay in cache.
    constexpr int64_t kLine = 16;
    if (p.from_k == 1)
      for (; k + kLine <= p.k; k += kLine) {
        for (int64_t j = 0; j < columns; ++j)
#pragma GCC unroll 16
          for (int64_t i = 0; i < kLine; ++i)
            to[(k + i) * kPanel + j] = from[k + i + j * p.from_n];
        for (int64_t i = k; i < k + kLine; ++i)
          std::fill(to + i * kPanel + columns, to + (i + 1) * kPanel, 0.0f);
      }
    for (; k < p.k; ++k) {
      for (int64_t j = 0; j < columns; ++j)
        to[k * kPanel + j] = from[k * p.from_k + j * p.from_n];
      std::fill(to + k * kPanel + columns, to + (k + 1) * kPanel, 0.0f);
    }
  }
}

}  // namespace dcconv::cpu::DCCONV_ISA

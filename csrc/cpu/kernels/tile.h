// How a channels-last tile of positions and filters takes values that exist once per position and
// group.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector.h"

namespace dcconv::cpu::DCCONV_ISA {

using namespace ::dcconv::DCCONV_ISA;

// Whole vectors first, of a length the compiler knows: a tile has many short rows.
template <class A>
DC_HD void fill(A* to, int64_t count, A value) {
  constexpr int64_t kWidth = 16;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth)
    for (int64_t j = 0; j < kWidth; ++j)
      to[i + j] = value;
  for (; i < count; ++i)
    to[i] = value;
}

// `rows` positions times filters [from, from + filters). Several rows only with all filters.
struct Tile {
  int64_t rows, from, filters;
  int64_t per_group;
  int64_t first_group, groups;  // groups that the filters touch

  Tile(const Positions& shape, int64_t rows, int64_t from)
      : rows(rows), from(from), filters(std::min(kTile, shape.o - from)),
        per_group(shape.filters_per_group()), first_group(from / per_group),
        groups((from + filters - 1) / per_group - first_group + 1) {}

  int64_t count() const { return rows * filters; }
  int64_t values() const { return rows * groups; }

  // Filters of the tile that belong to its i-th group.
  int64_t begin_of(int64_t i) const {
    return std::max<int64_t>((first_group + i) * per_group - from, 0);
  }
  int64_t end_of(int64_t i) const {
    return std::min((first_group + i + 1) * per_group - from, filters);
  }

  // values [rows, groups] -> to [rows, filters]
  template <class A>
  void spread(const A* values, A* to) const {
    if (groups == 1) {
      for (int64_t r = 0; r < rows; ++r)
        fill(to + r * filters, filters, values[r]);
      return;
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < groups; ++i)
        std::fill(
            to + r * filters + begin_of(i), to + r * filters + end_of(i), values[r * groups + i]
        );
  }

  // to [rows, groups] += sums over the filters of each group of values [rows, filters]
  template <class A>
  void add_sums(const A* values, A* to) const {
    int64_t r = 0;
    if constexpr (std::is_same_v<A, float>) {
      // Rows of one or a few vectors: the lanes of several rows are added up together.
      if (groups == 1 && filters % kLanes == 0 && filters <= 8 * kLanes)
        for (; r + kLanes <= rows; r += kLanes) {
          Vector lanes[kLanes];
          for (int64_t i = 0; i < kLanes; ++i) {
            const float* v = values + (r + i) * filters;
            Vector sum = load_vector(v);
            for (int64_t j = kLanes; j < filters; j += kLanes)
              sum += load_vector(v + j);
            lanes[i] = sum;
          }
          store_vector(to + r, load_vector(to + r) + lane_sums(lanes));
        }
    }
    for (; r < rows; ++r)
      for (int64_t i = 0; i < groups; ++i) {
        const A* v = values + r * filters;
        const int64_t first = begin_of(i), last = end_of(i);
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = first; j < last; ++j)
          sum += v[j];
        to[r * groups + i] += sum;
      }
  }

  // to [filters] += sums over the rows of values [rows, filters] * factors
  template <class A>
  void add_columns(const A* values, const A* factors, A* to) const {
    alignas(64) A terms[kTile];
    const int64_t elements = count();
#pragma omp simd
    for (int64_t i = 0; i < elements; ++i)
      terms[i] = values[i] * factors[i];
    fold_columns(terms, to);
  }

  template <class A>
  void add_columns(const A* values, A* to) const {
    alignas(64) A terms[kTile];
    std::copy_n(values, count(), terms);
    fold_columns(terms, to);
  }

private:
  // to [filters] += sums over the rows of terms [rows, filters], which are overwritten. Pairwise:
  // with one filter a tile has kTile rows, and as many equal terms in a row round one way.
  template <class A>
  void fold_columns(A* terms, A* to) const {
    for (int64_t left = rows; left > 1;) {
      const int64_t rest = (left + 1) / 2, elements = (left - rest) * filters;
      const A* upper = terms + rest * filters;
#pragma omp simd
      for (int64_t i = 0; i < elements; ++i)
        terms[i] += upper[i];
      left = rest;
    }
#pragma omp simd
    for (int64_t j = 0; j < filters; ++j)
      to[j] += terms[j];
  }
};

}  // namespace dcconv::cpu::DCCONV_ISA

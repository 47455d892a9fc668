// u and b of a tile from a band, then y = h(a, b) g(u / (a b)) + bias: one pass over x and y.
#pragma once

#include "cpu/depthwise/lines.h"
#include "cpu/epilogue.h"

namespace dcconv {
namespace cpu {
namespace DCCONV_ISA {

// sums -> b and 1 / b in place.
template <class A>
void finish_norms(A* b, A* inverse, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    b[i] = sqrt_of(b[i]);
    inverse[i] = A(1) / b[i];
  }
}

template <class A>
struct ForwardTile {
  // Runs write whole blocks: up to a block behind the tile.
  alignas(64) A u[kLineTile + Lanes<A>::count];
  alignas(64) A b[kLineTile + Lanes<A>::count];
  alignas(64) A inverse_b[kLineTile];
  alignas(64) A h[kLineTile];
};

template <class T, class A>
class Forward {
public:
  explicit Forward(const DepthwiseParams& p)
      : p_(p), s_(p.shape), band_(s_.layout.elements), columns_(s_.layout.width + 4 * lanes),
        weights_(s_.channels_last ? s_.taps() * lanes : s_.multiplier() * s_.taps() * lanes) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t blocks = s_.blocks(), bands = s_.bands();
      const Place at(s_, task / blocks / bands, task / blocks % bands, task % blocks);
      load_band<T>(p_, at, band_.data());
      sum_ = 0;
      if (s_.channels_last) {
        channels(at);
      } else {
        pixels(at);
      }
      if (p_.norm_sums != nullptr)
        p_.norm_sums[task] = sum_;
    }
  }

private:
  static constexpr int64_t lanes = Lanes<A>::count;

  // Sums of squares (from the row's column sums) and dot products of `count` blocks from `start`
  // elements into a row.
  void norms(int64_t start, int64_t count, A* to) {
    tap_sums<A, false>(
        {columns_.data() + start,
         p_.column_offsets,
         s_.columns.kernel,
         nullptr,
         s_.layout.step,
         A(p_.eps),
         to,
         lanes},
        count
    );
  }

  void dots(int64_t row, int64_t start, int64_t count, const A* weights, A* to) {
    tap_sums<A, true>(
        {band_.data() + row * s_.layout.line + start,
         p_.offsets,
         s_.taps(),
         weights,
         s_.layout.step,
         A(0),
         to,
         lanes},
        count
    );
  }

  void columns(int64_t row) {
    column_sums<A, true>(
        band_.data() + row * s_.layout.line,
        p_.row_offsets,
        s_.rows.kernel,
        1,
        s_.layout.width,
        columns_.data()
    );
  }

  // Rows of a band as tiles of whole rows, or rows cut into tiles: work(first position, positions)
  // after fill(row, first column, columns, place in the tile).
  template <class Fill, class Work>
  void tiles(const Place& at, int64_t capacity, const Fill& fill, const Work& work) {
    const int64_t q = s_.columns.output, rows = at.end_row - at.first_row;
    const int64_t cuts = (q + capacity - 1) / capacity, piece = (q + cuts - 1) / cuts;
    int64_t start = 0, count = 0;
    for (int64_t row = 0; row < rows; ++row) {
      columns(row);
      for (int64_t first = 0; first < q; first += piece) {
        const int64_t size = std::min(piece, q - first);
        if (count + size > capacity) {
          work(start, count);
          start += count;
          count = 0;
        }
        fill(row, first, size, count);
        count += size;
      }
    }
    work(start, count);
  }

  void add_norms(int64_t count, int64_t width, int64_t used, int64_t each) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < used; j += each)
        sum_ += double(tile_.b[i * width + j]);
  }

  void magnitudes(const TileFilters<A>& f, int64_t count, bool vector) {
    MagnitudeRow<A> m{};
    m.count = count;
    m.a = f.a;
    m.b = tile_.b;
    m.rho = f.rho;
    m.inverse_rho = f.inverse_rho;
    m.constants = constants_of<A>(p_.op);
    m.times_a = p_.op.times_a;
    m.h = tile_.h;
    (vector ? pick_magnitude_value<A, true>(Magnitudes{}, WeightedMagnitudes{}, p_.op.magnitude)
            : pick_magnitude_value<A, false>(Magnitudes{}, WeightedMagnitudes{}, p_.op.magnitude))(m
    );
  }

  AngularRow<T, A, A> angular_row(const TileFilters<A>& f, int64_t count, T* y) {
    return {
        count,
        tile_.u,
        f.inverse_a,
        tile_.inverse_b,
        tile_.h,
        f.k,
        f.bias,
        constants_of<A>(p_.op),
        y
    };
  }

  void channels(const Place& at) {
    const int64_t base = (at.image * s_.rows.output + at.first_row) * s_.columns.output;
    if (p_.y != nullptr) {
      block_weights<A>(s_, p_.filters.weight, at.first_filter, at.filters, weights_.data());
      filters_.set(p_.filters, at.first_filter, at.filters);
    }
    const TileFilters<A> f(filters_, p_.filters.bias != nullptr);
    const auto angular = pick_angular_value<T, A, A, true>(Angulars{}, p_.op.angular);
    tiles(
        at,
        kLineTile / lanes,
        [&](int64_t row, int64_t first, int64_t count, int64_t place) {
          const int64_t from = first * s_.layout.step;
          norms(from, count, tile_.b + place * lanes);
          if (p_.y != nullptr)
            dots(row, from, count, weights_.data(), tile_.u + place * lanes);
        },
        [&](int64_t start, int64_t count) {
          finish_norms(tile_.b, tile_.inverse_b, count * lanes);
          const int64_t m = s_.multiplier(), position = base + start;
          if (p_.norm_sums != nullptr)
            add_norms(count, lanes, at.filters, m);
          if (p_.map != nullptr) {
            A* map = static_cast<A*>(p_.map) + position * s_.c + at.first_channel;
            if (m == 1) {
              scatter_lanes<A>(tile_.b, count, at.filters, map, s_.c);
            } else {
              for (int64_t i = 0; i < count; ++i)
                for (int64_t c = 0; c < at.channels; ++c)
                  map[i * s_.c + c] = tile_.b[i * lanes + c * m];
            }
          }
          if (p_.y == nullptr)
            return;
          const int64_t offset = position * s_.o + at.first_filter;
          if (p_.dot != nullptr) {
            copy_dot(tile_.u, y_, count * lanes);
            scatter_lanes<A>(y_, count, at.filters, static_cast<T*>(p_.dot) + offset, s_.o);
          }
          magnitudes(f, count * lanes, true);
          angular(angular_row(f, count * lanes, y_));
          scatter_lanes<A>(y_, count, at.filters, static_cast<T*>(p_.y) + offset, s_.o);
        }
    );
  }

  void pixels(const Place& at) {
    const int64_t m = s_.multiplier(), taps = s_.taps();
    const int64_t base = at.first_row * s_.columns.output;
    const auto blocks = [](int64_t count) { return (count + lanes - 1) / lanes; };
    const auto angular = pick_angular_value<T, A, A, false>(Angulars{}, p_.op.angular);
    for (int64_t j = 0; j < (p_.y == nullptr ? 1 : m); ++j) {
      const int64_t filter = at.first_filter + j;
      const TileFilters<A> f(p_.filters, filter);
      A* weights = weights_.data() + j * taps * lanes;
      if (p_.y != nullptr)
        block_weights<A>(s_, p_.filters.weight, filter, 1, weights);
      tiles(
          at,
          kLineTile,
          [&](int64_t row, int64_t first, int64_t count, int64_t place) {
            // What a row has behind its end is overwritten by the next row.
            norms(first, blocks(count), tile_.b + place);
            if (p_.y != nullptr)
              dots(row, first, blocks(count), weights, tile_.u + place);
          },
          [&](int64_t start, int64_t count) {
            finish_norms(tile_.b, tile_.inverse_b, count);
            if (j == 0) {
              if (p_.norm_sums != nullptr)
                add_norms(count, 1, 1, 1);
              if (p_.map != nullptr)
                std::copy_n(
                    tile_.b,
                    count,
                    static_cast<A*>(p_.map) + (at.image * s_.c + at.first_channel) * s_.pixels() +
                        base + start
                );
            }
            if (p_.y == nullptr)
              return;
            const int64_t offset = (at.image * s_.o + filter) * s_.pixels() + base + start;
            if (p_.dot != nullptr)
              copy_dot(tile_.u, static_cast<T*>(p_.dot) + offset, count);
            magnitudes(f, count, false);
            angular(angular_row(f, count, static_cast<T*>(p_.y) + offset));
          }
      );
    }
  }

  const DepthwiseParams& p_;
  const DepthwiseShape& s_;
  Buffer<A> band_, columns_, weights_;
  ForwardTile<A> tile_;
  BlockFilters<A> filters_;
  alignas(64) T y_[kLineTile];
  double sum_ = 0;
};

// x -> y, dot, map and sums of norms, as far as they are wanted; without y the norms alone.
template <class T, class A>
void depthwise_forward(const DepthwiseParams& p, int64_t begin, int64_t end) {
  Forward<T, A>(p).run(begin, end);
}

}  // namespace DCCONV_ISA
}  // namespace cpu
}  // namespace dcconv

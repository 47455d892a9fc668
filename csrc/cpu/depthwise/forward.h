// u and b of a row or tile from taps in cache, then y = h(a, b) g(u / (a b)) + bias: one pass over
// x and y.
#pragma once

#include <vector>

#include "cpu/depthwise/in_place.h"

namespace dcconv::cpu::DCCONV_ISA {

// Working memory of a tile. Runs of pixels write whole lanes: up to that much behind the tile.
template <class A>
struct ForwardTile {
  static constexpr int64_t size = 512;
  alignas(kLaneBytes) A u[size + Lanes<A>::count];
  alignas(kLaneBytes) A b[size + Lanes<A>::count];
  alignas(kLaneBytes) A inverse_b[size + Lanes<A>::count];
  alignas(kLaneBytes) A h[size];
};

// Lanes are filters: row by row, the rows of x in a ring.
template <class T, class A>
class ChannelsForward {
public:
  explicit ChannelsForward(const DepthwiseParams& p)
      : p_(p), s_(p.shape), ring_(s_.layout.elements), columns_(s_.layout.width),
        y_(s_.columns.output * s_.group * lanes),
        magnitude_(pick_magnitude_lanes<A>(Magnitudes{}, WeightedMagnitudes{}, p.op)),
        angular_(pick_angular_lanes<T, A>(Angulars{}, p.op.angular, p.filters.bias != nullptr)) {}

  double run(int64_t task) {
    const Place at(s_, task);
    double sum = 0;
    int64_t loaded = at.first_row * s_.rows.stride;  // padded rows before this one are there
    for (int64_t row = at.first_row; row < at.end_row; ++row) {
      const int64_t first = row * s_.rows.stride;
      const int64_t slot = s_.group * s_.layout.width;
      loaded = std::max(loaded, first);
      for (; loaded < first + s_.layout.rows; ++loaded)
        if (p_.row_sources[loaded] >= 0)
          load_row<T>(p_, at, loaded, ring_.data() + loaded % s_.layout.rows * slot);
      // Rows of zeros are left out; the others are neighbours.
      row_offsets_.clear();
      offsets_.clear();
      first_tap_row_ = 0;
      for (int64_t r = 0; r < s_.rows.kernel; ++r) {
        const int64_t padded = first + r * s_.rows.dilation;
        if (p_.row_sources[padded] < 0) {
          if (row_offsets_.empty())
            first_tap_row_ = r + 1;
          continue;
        }
        const int64_t offset = padded % s_.layout.rows * slot;
        row_offsets_.push_back(offset);
        for (int64_t c = 0; c < s_.columns.kernel; ++c)
          offsets_.push_back(offset + p_.column_offsets[c]);
      }
      for (int64_t block = at.first_block; block < at.end_block; ++block)
        sum += block_row(at, row, block);
      if (p_.y != nullptr)
        store_row(at, row);
    }
    return sum;
  }

private:
  static constexpr int64_t lanes = Lanes<A>::count;

  // Filters of the task.
  int64_t pitch(const Place& at) const {
    const int64_t first = at.first_block * s_.block_filters();
    return std::min(at.end_block * s_.block_filters(), s_.o) - first;
  }

  void store_row(const Place& at, int64_t row) {
    const int64_t count = pitch(at);
    T* y = static_cast<T*>(p_.y) + (at.image * s_.rows.output + row) * s_.columns.output * s_.o +
           at.first_block * s_.block_filters();
    const bool all = count == s_.o;
    for (int64_t i = 0; i < (all ? 1 : s_.columns.output); ++i) {
      const T* from = y_.data() + i * count;
      T* to = y + i * s_.o;
#pragma omp simd
      for (int64_t j = 0; j < (all ? count * s_.columns.output : count); ++j)
        to[j] = from[j];
    }
  }

  double block_row(const Place& at, int64_t row, int64_t block) {
    const A* x = ring_.data() + (block - at.first_block) * s_.layout.width;
    const A* weight = static_cast<const A*>(p_.filters.weight) +
                      (block * s_.taps() + first_tap_row_ * s_.columns.kernel) * lanes;
    const int64_t rows = static_cast<int64_t>(row_offsets_.size());
    column_sums<A, true>(
        x, row_offsets_.data(), rows, s_.columns.padded() * lanes, columns_.data()
    );
    const int64_t filters = std::min(s_.block_filters(), s_.o - block * s_.block_filters());
    const int64_t m = s_.multiplier(), step = s_.layout.step;
    const int64_t position = (at.image * s_.rows.output + row) * s_.columns.output;
    constexpr int64_t capacity = ForwardTile<A>::size / lanes;
    const int64_t cuts = (s_.columns.output + capacity - 1) / capacity;
    const int64_t piece = (s_.columns.output + cuts - 1) / cuts;
    alignas(kLaneBytes) A lane_sums[lanes] = {};
    for (int64_t first = 0; first < s_.columns.output; first += piece) {
      const int64_t count = std::min(piece, s_.columns.output - first);
      tap_sums<A, Run::norm>(
          {columns_.data() + first * step,
           p_.column_offsets,
           s_.columns.kernel,
           step,
           tile_.b,
           nullptr,
           A(p_.eps),
           tile_.inverse_b},
          count
      );
      if (p_.norm_sums != nullptr)
        add_lanes(count, lane_sums);
      if (p_.map != nullptr) {
        A* map = static_cast<A*>(p_.map) + (position + first) * s_.c + block * s_.block_channels();
        for (int64_t i = 0; i < count; ++i)
          if (m == 1) {
            store_lanes<A>(tile_.b + i * lanes, filters, map + i * s_.c);
          } else {
            for (int64_t j = 0; j < filters; j += m)
              map[i * s_.c + j / m] = tile_.b[i * lanes + j];
          }
      }
      if (p_.y == nullptr)
        continue;
      tap_sums<A, Run::dot>(
          {x + first * step,
           offsets_.data(),
           rows * s_.columns.kernel,
           step,
           tile_.u,
           weight,
           A(0),
           nullptr},
          count
      );
      const int64_t offset = (position + first) * s_.o + block * s_.block_filters();
      if (p_.dot != nullptr)
        for (int64_t i = 0; i < count; ++i) {
          T u[lanes];
          copy_dot(tile_.u + i * lanes, u, lanes);
          store_lanes<A>(u, filters, static_cast<T*>(p_.dot) + offset + i * s_.o);
        }
      const BlockFilters<A> f(p_.filters, block);
      const Constants<A> constants = constants_of<A>(p_.op);
      magnitude_({count, f, constants, tile_.b, tile_.h});
      angular_(
          {count,
           f,
           constants,
           tile_.u,
           tile_.inverse_b,
           tile_.h,
           filters,
           pitch(at),
           y_.data() + first * pitch(at) + (block - at.first_block) * s_.block_filters()}
      );
    }
    double sum = 0;
    for (int64_t j = 0; j < filters; j += m)
      sum += double(lane_sums[j]);
    return sum;
  }

  void add_lanes(int64_t count, A* sums) const {
    typename Lanes<A>::Vector total, v;
    for (int64_t lane = 0; lane < lanes; lane += Lanes<A>::vector) {
      load_vector<A>(total, sums + lane);
      for (int64_t i = 0; i < count; ++i) {
        load_vector<A>(v, tile_.b + i * lanes + lane);
        total += v;
      }
      store_vector<A>(sums + lane, total);
    }
  }

  const DepthwiseParams& p_;
  const DepthwiseShape& s_;
  Buffer<A> ring_, columns_;
  Buffer<T> y_;  // a row of outputs: whole rows are written faster than their pieces
  std::vector<int64_t> row_offsets_, offsets_;
  int64_t first_tap_row_ = 0;
  MagnitudeLanes<A> magnitude_;
  AngularLanes<T, A> angular_;
  ForwardTile<A> tile_;
};

// Lanes are pixels: a band of one channel, its rows one after the other in tiles.
template <class T, class A>
class PixelsForward {
public:
  explicit PixelsForward(const DepthwiseParams& p)
      : p_(p), s_(p.shape), band_(s_.layout.elements), columns_(s_.layout.width + 4 * lanes),
        weight_(s_.taps() * lanes),
        magnitude_(
            pick_magnitude_value<A, false>(Magnitudes{}, WeightedMagnitudes{}, p.op.magnitude)
        ),
        angular_(pick_angular_value<T, A, A, false>(Angulars{}, p.op.angular)) {
    for (int64_t r = 0; r < s_.rows.kernel; ++r)
      for (int64_t c = 0; c < s_.columns.kernel; ++c)
        offsets_.push_back(p.row_offsets[r] + p.column_offsets[c]);
  }

  double run(int64_t task) {
    const Place at(s_, task);
    load_band<T>(p_, at, band_.data());
    double sum = 0;
    for (int64_t j = 0; j < (p_.y == nullptr ? 1 : s_.multiplier()); ++j)
      sum += filter(at, at.first_block * s_.multiplier() + j, j == 0);
    return sum;
  }

private:
  static constexpr int64_t lanes = Lanes<A>::count;

  double filter(const Place& at, int64_t filter, bool first_of_channel) {
    if (p_.y != nullptr) {
      const A* w = static_cast<const A*>(p_.filters.weight) + filter * s_.taps();
      for (int64_t tap = 0; tap < s_.taps(); ++tap)
        std::fill_n(weight_.data() + tap * lanes, lanes, w[tap]);
    }
    constexpr int64_t capacity = ForwardTile<A>::size;
    const int64_t cuts = (s_.columns.output + capacity - 1) / capacity;
    const int64_t piece = (s_.columns.output + cuts - 1) / cuts;
    double sum = 0;
    // A tile holds whole rows, or a piece of one: pixels [start, start + count).
    int64_t start = at.first_row * s_.columns.output, count = 0;
    const auto finish = [&] {
      sum += tile(at, filter, first_of_channel, start, count);
      start += count;
      count = 0;
    };
    for (int64_t row = 0; row < at.end_row - at.first_row; ++row) {
      const A* x = band_.data() + row * s_.layout.width;
      column_sums<A, true>(x, p_.row_offsets, s_.rows.kernel, s_.layout.width, columns_.data());
      for (int64_t first = 0; first < s_.columns.output; first += piece) {
        const int64_t pixels = std::min(piece, s_.columns.output - first);
        if (count + pixels > capacity)
          finish();
        // What the last lanes write behind the row is overwritten by the next one.
        const int64_t blocks = (pixels + lanes - 1) / lanes;
        tap_sums<A, Run::norm>(
            {columns_.data() + first,
             p_.column_offsets,
             s_.columns.kernel,
             lanes,
             tile_.b + count,
             nullptr,
             A(p_.eps),
             tile_.inverse_b + count},
            blocks
        );
        if (p_.y != nullptr)
          tap_sums<A, Run::dot>(
              {x + first,
               offsets_.data(),
               s_.taps(),
               lanes,
               tile_.u + count,
               weight_.data(),
               A(0),
               nullptr},
              blocks
          );
        count += pixels;
      }
    }
    finish();
    return sum;
  }

  // Returns the sum of b.
  double
  tile(const Place& at, int64_t filter, bool first_of_channel, int64_t start, int64_t count) {
    double sum = 0;
    if (first_of_channel && p_.norm_sums != nullptr)
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < count; ++i)
        sum += double(tile_.b[i]);
    if (first_of_channel && p_.map != nullptr)
      std::copy_n(
          tile_.b,
          count,
          static_cast<A*>(p_.map) + (at.image * s_.c + at.first_block) * s_.pixels() + start
      );
    if (p_.y == nullptr)
      return sum;
    const int64_t offset = (at.image * s_.o + filter) * s_.pixels() + start;
    if (p_.dot != nullptr)
      copy_dot(tile_.u, static_cast<T*>(p_.dot) + offset, count);
    MagnitudeRow<A> m{};
    m.count = count;
    m.a = vector_of<A>(p_.filters.a, filter);
    m.b = tile_.b;
    m.rho = vector_of<A>(p_.filters.rho, filter);
    m.inverse_rho = vector_of<A>(p_.filters.inverse_rho, filter);
    m.constants = constants_of<A>(p_.op);
    m.times_a = p_.op.times_a;
    m.h = tile_.h;
    magnitude_(m);
    AngularRow<T, A, A> g{};
    g.count = count;
    g.u = tile_.u;
    g.inverse_a = vector_of<A>(p_.filters.inverse_a, filter);
    g.inverse_b = tile_.inverse_b;
    g.h = tile_.h;
    g.k = vector_of<A>(p_.filters.k, filter);
    g.bias = vector_of<A>(p_.filters.bias, filter);
    g.constants = m.constants;
    g.y = static_cast<T*>(p_.y) + offset;
    angular_(g);
    return sum;
  }

  const DepthwiseParams& p_;
  const DepthwiseShape& s_;
  Buffer<A> band_, columns_, weight_;
  std::vector<int64_t> offsets_;
  MagnitudeFunction<A> magnitude_;
  AngularFunction<T, A, A> angular_;
  ForwardTile<A> tile_;
};

// x -> y, dot, map and sums of norms, as far as they are wanted; without y the norms alone.
template <class T, class A>
void depthwise_forward(const DepthwiseParams& p, int64_t begin, int64_t end) {
  const auto run = [&](auto&& pass) {
    for (int64_t task = begin; task < end; ++task) {
      const double sum = pass.run(task);
      if (p.norm_sums != nullptr)
        p.norm_sums[task] = sum;
    }
  };
  if constexpr (kFusedMultiplyAdd && (std::is_same_v<T, float> || std::is_same_v<T, BFloat16>))
    if (InPlaceForward<T, A>::takes(p.shape)) {
      run(InPlaceForward<T, A>(p));
      return;
    }
  if (p.shape.channels_last) {
    run(ChannelsForward<T, A>(p));
  } else {
    run(PixelsForward<T, A>(p));
  }
}

}  // namespace dcconv::cpu::DCCONV_ISA

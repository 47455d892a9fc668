// dy and (y or u) -> du and t of a row of outputs, kept in rings; from them the gradient of the
// filters, of finished rows of x, and column sums: one pass over everything. Lanes are filters.
#pragma once

#include <vector>

#include "cpu/depthwise/forward.h"
#include "cpu/kernels/grad_dot.h"

namespace dcconv::cpu::DCCONV_ISA {

template <class A>
struct GradLaneTile {
  static constexpr int64_t size = ForwardTile<A>::size;
  alignas(kLaneBytes) A b[size];
  alignas(kLaneBytes) A h[size];
  alignas(kLaneBytes) A d[size];
  alignas(kLaneBytes) A h_rho[size];
  alignas(kLaneBytes) A h_a[size];
  alignas(kLaneBytes) A dy[size];
  alignas(kLaneBytes) A kept[size];
};

template <class M, bool kTimesA, class A>
void magnitude_grad_lanes(
    int64_t count,
    const BlockFilters<A>& filters,
    const Constants<A>& constants,
    GradLaneTile<A>& tile
) {
  constexpr int64_t lanes = Lanes<A>::count;
  const BlockFilters<A> f = filters;
  const Constants<A> k = constants;
  for (int64_t i = 0; i < count * lanes; i += lanes) {
    const A* b = tile.b + i;
    A *h = tile.h + i, *d = tile.d + i, *h_rho = tile.h_rho + i, *h_a = tile.h_a + i;
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) {
      const MagnitudeGrad<A> m = M::grad(f.a[j], b[j], Radius<A>{f.rho[j], f.inverse_rho[j]}, k);
      const A scale = kTimesA ? f.a[j] : A(1);
      h[j] = m.h * scale;
      d[j] = m.d * scale;
      h_rho[j] = m.h_rho * scale;
      h_a[j] = kTimesA ? m.h : m.h_a;
    }
  }
}

template <class A>
struct GradLanes {
  int64_t count;
  BlockFilters<A> filters;
  Constants<A> constants;
  A add;  // to t b
  A* du;
  A* t;
  double* sums;  // [kinds, lanes], added to
};

template <class G, Kept kKept, bool kSums, class A>
void angular_grad_lanes(const GradLanes<A>& p, const GradLaneTile<A>& tile) {
  constexpr int64_t lanes = Lanes<A>::count;
  const BlockFilters<A> f = p.filters;
  const Constants<A> s = p.constants;
  const A add = p.add;
  alignas(kLaneBytes) A rho[lanes] = {}, a[lanes] = {}, k[lanes] = {}, bias[lanes] = {};
  for (int64_t i = 0; i < p.count * lanes; i += lanes) {
    const A *b = tile.b + i, *h = tile.h + i, *d = tile.d + i;
    const A *h_rho = tile.h_rho + i, *h_a = tile.h_a + i, *grad_y = tile.dy + i;
    const A* kept = tile.kept + i;
    A *du = p.du + i, *t = p.t + i;
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) {
      const A inverse_b = A(1) / b[j], scale = f.inverse_a[j] * inverse_b;
      const A dy = grad_y[j], h_j = h[j];
      const AngularGrad<A> m = G::grad(cosine_of<G, kKept>(kept[j], h_j, scale), f.k[j], s);
      du[j] = dy * h_j * m.g_c * scale;
      t[j] = (norm_term<G>(dy, h_j, d[j], m.g, m.e) * inverse_b + add) * inverse_b;
      if constexpr (kSums) {
        rho[j] += dy * m.g * h_rho[j];
        a[j] += dy * m.g * h_a[j];
        k[j] += dy * h_j * m.g_k;
        bias[j] += dy;
      }
    }
  }
  if constexpr (kSums) {
    const A* kinds[kSumKinds] = {rho, a, k, bias};
    for (int64_t kind = 0; kind < kSumKinds; ++kind)
      for (int64_t j = 0; j < lanes; ++j)
        p.sums[kind * lanes + j] += double(kinds[kind][j]);
  }
}

template <class A>
using MagnitudeGradLanes =
    void (*)(int64_t, const BlockFilters<A>&, const Constants<A>&, GradLaneTile<A>&);

template <class A, class... M, class... W>
MagnitudeGradLanes<A>
pick_magnitude_grad_lanes(TypeList<M...>, TypeList<W...>, const Operator& op) {
  static constexpr MagnitudeGradLanes<A> plain[] = {
      magnitude_grad_lanes<M, false, A>..., magnitude_grad_lanes<W, false, A>...
  };
  static constexpr MagnitudeGradLanes<A> times_a[] = {
      magnitude_grad_lanes<M, true, A>..., magnitude_grad_lanes<W, true, A>...
  };
  return (op.times_a ? times_a : plain)[op.magnitude];
}

template <class A>
using AngularGradLanes = void (*)(const GradLanes<A>&, const GradLaneTile<A>&);

template <class A, Kept kKept, class... G>
AngularGradLanes<A> pick_angular_grad_lanes(TypeList<G...>, int index, bool sums) {
  static constexpr AngularGradLanes<A> plain[] = {
      angular_grad_lanes<G, kept_of<G, kKept>, false, A>...
  };
  static constexpr AngularGradLanes<A> with_sums[] = {
      angular_grad_lanes<G, kept_of<G, kKept>, true, A>...
  };
  return (sums ? with_sums : plain)[index];
}

// sums[i] += sum over the outputs of a row of du x[offsets[i]] for kTaps taps.
template <class A>
struct FilterRun {
  const A* du;
  const A* x;
  const int64_t* offsets;
  int64_t step;
  int64_t count;
  A* sums;  // [taps, lanes]
};

template <class A, int kTaps>
void filter_run(const FilterRun<A>& r) {
  using Vector = typename Lanes<A>::Vector;
  constexpr int64_t lanes = Lanes<A>::count;
  for (int64_t lane = 0; lane < lanes; lane += Lanes<A>::vector) {
    Vector sums[kTaps] = {};
    const A* x[kTaps];
    for (int i = 0; i < kTaps; ++i)
      x[i] = r.x + r.offsets[i] + lane;
    for (int64_t q = 0; q < r.count; ++q) {
      Vector du, v;
      load_vector<A>(du, r.du + q * lanes + lane);
#pragma GCC unroll 16
      for (int i = 0; i < kTaps; ++i) {
        load_vector<A>(v, x[i] + q * r.step);
        sums[i] += v * du;
      }
    }
    for (int i = 0; i < kTaps; ++i) {
      Vector total;
      load_vector<A>(total, r.sums + i * lanes + lane);
      store_vector<A>(r.sums + i * lanes + lane, total + sums[i]);
    }
  }
}

template <class A, int... kTaps>
void filter_sums(FilterRun<A> r, int64_t taps, std::integer_sequence<int, kTaps...>) {
  static constexpr std::array<void (*)(const FilterRun<A>&), sizeof...(kTaps)> table{
      filter_run<A, kTaps + 1>...
  };
  constexpr int64_t most = sizeof...(kTaps);
  for (int64_t runs = (taps + most - 1) / most; runs > 0; --runs) {
    const int64_t size = (taps + runs - 1) / runs;
    table[static_cast<std::size_t>(size - 1)](r);
    r.offsets += size;
    r.sums += size * Lanes<A>::count;
    taps -= size;
  }
}

template <class T, class A>
class ChannelsBackward {
public:
  explicit ChannelsBackward(const DepthwiseGradParams& p)
      : p_(p), s_(p.forward.shape), x_(s_.layout.elements), du_(p.depth * s_.group * p.width),
        t_(p.depth * s_.group * p.width), columns_(p.width),
        part_(s_.group * s_.taps() * Lanes<A>::count),
        magnitude_(pick_magnitude_grad_lanes<A>(Magnitudes{}, WeightedMagnitudes{}, p.forward.op)),
        angular_(
            p.kept_is == Kept::output ? pick_angular_grad_lanes<A, Kept::output>(
                                            Angulars{}, p.forward.op.angular, p.parameters
                                        )
                                      : pick_angular_grad_lanes<A, Kept::dot>(
                                            Angulars{}, p.forward.op.angular, p.parameters
                                        )
        ) {
    // The columns of zeros; nothing else is ever written there.
    std::fill_n(du_.data(), p.depth * s_.group * p.width, A(0));
    std::fill_n(t_.data(), p.depth * s_.group * p.width, A(0));
  }

  void run(int64_t task) {
    const int64_t group = task % s_.groups(), first = task / s_.groups() * p_.images;
    task_ = task;
    const int64_t blocks = s_.group;
    if (p_.parameters)
      std::fill_n(sums_of(0), blocks * kSumKinds * lanes, 0.0);
    if (p_.grad_weight != nullptr) {
      std::fill_n(weight_of(0), blocks * s_.taps() * lanes, A(0));
      std::fill_n(part_.data(), blocks * s_.taps() * lanes, A(0));
    }
    for (int64_t image = first; image < std::min(first + p_.images, s_.n); ++image) {
      Place at(s_, group);
      at.image = image;
      at.first_row = 0;
      at.end_row = s_.rows.output;
      plane(at);
    }
  }

private:
  static constexpr int64_t lanes = Lanes<A>::count;
  // Outputs of a row and rows whose products are summed one after another; longer sums are sums of
  // such sums, since equal terms round one way.
  static constexpr int64_t kPartOutputs = 64, kPartRows = 8;

  double* sums_of(int64_t block) const {
    return p_.sums + (task_ * s_.group + block) * kSumKinds * lanes;
  }
  A* weight_of(int64_t block) const {
    return static_cast<A*>(p_.grad_weight) + (task_ * s_.group + block) * s_.taps() * lanes;
  }

  // Output rows in order, behind each the rows of x that no later one reaches.
  void plane(const Place& at) {
    int64_t loaded = 0, input = 0;
    for (int64_t row = 0; row < s_.rows.output; ++row) {
      for (int64_t block = at.first_block; block < at.end_block; ++block)
        grad_row(at, row, block);
      if (p_.sums_only)
        continue;
      if (p_.grad_weight != nullptr) {
        filters_row(at, row, loaded);
        if ((row + 1) % kPartRows == 0 || row + 1 == s_.rows.output)
          add_up(part_.data(), weight_of(0), s_.group * s_.taps() * lanes);
      }
      if (p_.grad_x != nullptr)
        for (; input < s_.rows.input && input + s_.rows.before < (row + 1) * s_.rows.stride;
             ++input)
          input_row(at, input);
    }
    if (!p_.sums_only && p_.grad_x != nullptr)
      for (; input < s_.rows.input; ++input)
        input_row(at, input);
  }

  int64_t slot(int64_t row) const { return row % p_.depth * s_.group * p_.width; }

  // du and t of an output row, column sums.
  void grad_row(const Place& at, int64_t row, int64_t block) {
    const int64_t filters = std::min(s_.block_filters(), s_.o - block * s_.block_filters());
    const int64_t m = s_.multiplier(), channels = filters / m;
    const int64_t position = (at.image * s_.rows.output + row) * s_.columns.output;
    const int64_t place = slot(row) + (block - at.first_block) * p_.width + p_.left * lanes;
    const T* grad_y = static_cast<const T*>(p_.grad_y) + block * s_.block_filters();
    const T* kept = static_cast<const T*>(p_.kept) + block * s_.block_filters();
    const A* norm = static_cast<const A*>(p_.norm) + block * s_.block_channels();
    const BlockFilters<A> f(p_.forward.filters, block);
    const Constants<A> constants = constants_of<A>(p_.forward.op);
    constexpr int64_t capacity = GradLaneTile<A>::size / lanes;
    for (int64_t first = 0; first < s_.columns.output; first += capacity) {
      const int64_t count = std::min(capacity, s_.columns.output - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t q = position + first + i;
        load_lanes(grad_y + q * s_.o, filters, 1, tile_.dy + i * lanes);
        load_lanes(kept + q * s_.o, filters, 1, tile_.kept + i * lanes);
        load_lanes(norm + q * s_.c, channels, m, tile_.b + i * lanes);
        // Lanes without a filter: any norm but zero.
        for (int64_t j = filters; j < lanes; ++j)
          tile_.b[i * lanes + j] = A(1);
      }
      magnitude_(count, f, constants, tile_);
      angular_(
          {count,
           f,
           constants,
           A(p_.add / double(m)),
           du_.data() + place + first * lanes,
           t_.data() + place + first * lanes,
           p_.parameters ? sums_of(block - at.first_block) : nullptr},
          tile_
      );
    }
  }

  // Adds the row's part to the gradient of the filters.
  void filters_row(const Place& at, int64_t row, int64_t& loaded) {
    const int64_t first = row * s_.rows.stride, size = s_.group * s_.layout.width;
    const DepthwiseParams& f = p_.forward;
    loaded = std::max(loaded, first);
    for (; loaded < first + s_.layout.rows; ++loaded)
      if (f.row_sources[loaded] >= 0)
        load_row<T>(f, at, loaded, x_.data() + loaded % s_.layout.rows * size);
    for (int64_t block = 0; block < at.end_block - at.first_block; ++block)
      for (int64_t r = 0; r < s_.rows.kernel; ++r) {
        const int64_t padded = first + r * s_.rows.dilation;
        if (f.row_sources[padded] < 0)
          continue;
        const A* du = du_.data() + slot(row) + block * p_.width + p_.left * lanes;
        const A* x = x_.data() + padded % s_.layout.rows * size + block * s_.layout.width;
        A* sums = part_.data() + (block * s_.taps() + r * s_.columns.kernel) * lanes;
        for (int64_t q = 0; q < s_.columns.output; q += kPartOutputs)
          filter_sums<A>(
              {du + q * lanes,
               x + q * s_.layout.step,
               f.column_offsets,
               s_.layout.step,
               std::min(kPartOutputs, s_.columns.output - q),
               sums},
              s_.columns.kernel,
              std::make_integer_sequence<int, 8>{}
          );
      }
  }

  // dx = taps of du + x * taps of t, a row of x.
  void input_row(const Place& at, int64_t h) {
    const int64_t padded = h + s_.rows.before, row_phase = padded % s_.rows.stride;
    // The kernel's rows that reach this row, neighbours in the list of their phase.
    int64_t first = p_.row_starts[row_phase];
    row_offsets_.clear();
    for (int64_t i = first; i < p_.row_starts[row_phase + 1]; ++i) {
      const int64_t row = (padded - p_.kernel_rows[i] * s_.rows.dilation) / s_.rows.stride;
      if (padded < p_.kernel_rows[i] * s_.rows.dilation)
        break;
      if (row >= s_.rows.output) {
        ++first;
        continue;
      }
      row_offsets_.push_back(slot(row));
    }
    const int64_t rows = static_cast<int64_t>(row_offsets_.size());
    for (int64_t phase = 0; phase < s_.columns.stride; ++phase) {
      const int64_t start = p_.column_starts[phase];
      const int64_t taps = p_.column_starts[phase + 1] - start;
      column_offsets_.clear();
      for (int64_t i = start; i < start + taps; ++i)
        column_offsets_.push_back(
            (phase - p_.kernel_columns[i] * s_.columns.dilation) / s_.columns.stride * lanes
        );
      offsets_.clear();
      for (int64_t row : row_offsets_)
        for (int64_t column : column_offsets_)
          offsets_.push_back(row + column);
      // Weights: all columns of the phases of rows before this one, then those of column phases.
      const int64_t phase_rows = p_.row_starts[row_phase + 1] - p_.row_starts[row_phase];
      const int64_t tap = p_.row_starts[row_phase] * s_.columns.kernel + phase_rows * start +
                          (first - p_.row_starts[row_phase]) * taps;
      // The first column of this phase, and how many there are.
      const int64_t shift = phase - s_.columns.before % s_.columns.stride;
      const int64_t w = shift < 0 ? shift + s_.columns.stride : shift;
      if (w >= s_.columns.input)
        continue;
      const int64_t count = (s_.columns.input - w + s_.columns.stride - 1) / s_.columns.stride;
      const int64_t place = (p_.left + (w + s_.columns.before) / s_.columns.stride) * lanes;
      for (int64_t block = at.first_block; block < at.end_block; ++block)
        input_block(at, h, block, rows, tap, taps, w, count, place);
    }
  }

  void input_block(
      const Place& at,
      int64_t h,
      int64_t block,
      int64_t rows,
      int64_t tap,
      int64_t taps,
      int64_t w,
      int64_t count,
      int64_t place
  ) {
    const int64_t from = (block - at.first_block) * p_.width;
    const A* weight =
        static_cast<const A*>(p_.forward.filters.weight) + (block * s_.taps() + tap) * lanes;
    column_sums<A, false>(t_.data() + from, row_offsets_.data(), rows, p_.width, columns_.data());
    const int64_t m = s_.multiplier();
    const int64_t channels = std::min(s_.block_channels(), s_.c - block * s_.block_channels());
    const int64_t offset = ((at.image * s_.rows.input + h) * s_.columns.input + w) * s_.c +
                           block * s_.block_channels();
    const T* x = static_cast<const T*>(p_.forward.x) + offset;
    T* grad_x = static_cast<T*>(p_.grad_x) + offset;
    constexpr int64_t capacity = GradLaneTile<A>::size / lanes;
    A *sums = tile_.h, *dots = tile_.d;
    for (int64_t i = 0; i < count; i += capacity) {
      const int64_t size = std::min(capacity, count - i);
      tap_sums<A, Run::sum>(
          {columns_.data() + place + i * lanes,
           column_offsets_.data(),
           taps,
           lanes,
           sums,
           nullptr,
           A(0),
           nullptr},
          size
      );
      tap_sums<A, Run::dot>(
          {du_.data() + from + place + i * lanes,
           offsets_.data(),
           rows * taps,
           lanes,
           dots,
           weight,
           A(0),
           nullptr},
          size
      );
      for (int64_t j = 0; j < size; ++j) {
        const T* v = x + (i + j) * s_.columns.stride * s_.c;
        T* out = grad_x + (i + j) * s_.columns.stride * s_.c;
        const A *sum = sums + j * lanes, *dot = dots + j * lanes;
        if (m == 1 && channels == lanes) {
#pragma omp simd
          for (int64_t c = 0; c < lanes; ++c)
            out[c] = Store<T>::from(dot[c] + load(v[c]) * sum[c]);
          continue;
        }
        for (int64_t c = 0; c < channels; ++c) {
          A all_dots = 0, all_sums = 0;
          for (int64_t k = c * m; k < (c + 1) * m; ++k) {
            all_dots += dot[k];
            all_sums += sum[k];
          }
          out[c] = Store<T>::from(all_dots + load(v[c]) * all_sums);
        }
      }
    }
  }

  const DepthwiseGradParams& p_;
  const DepthwiseShape& s_;
  int64_t task_ = 0;
  Buffer<A> x_, du_, t_, columns_;
  Buffer<A> part_;  // [group, taps, lanes] of the last rows' part of the filters' gradient
  std::vector<int64_t> row_offsets_, column_offsets_, offsets_;
  MagnitudeGradLanes<A> magnitude_;
  AngularGradLanes<A> angular_;
  GradLaneTile<A> tile_;
};

template <class T, class A>
void depthwise_backward(const DepthwiseGradParams& p, int64_t begin, int64_t end) {
  ChannelsBackward<T, A> pass(p);
  for (int64_t task = begin; task < end; ++task)
    pass.run(task);
}

}  // namespace dcconv::cpu::DCCONV_ISA

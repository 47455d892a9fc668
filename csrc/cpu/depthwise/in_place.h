// Forward where lanes are filters and blocks are whole: windows over the rows of x where they lie,
// without a copy. Kernels of 3, 5 or 7 columns, strides 1 and 2.
#pragma once

#include <vector>

#include "cpu/depthwise/lanes.h"
#include "cpu/depthwise/window.h"
#include "cpu/kernels/epilogue.h"
#include "cpu/kernels/tanh_cosine.h"

namespace dcconv::cpu::DCCONV_ISA {

// What becomes of the sums of a run.
enum class Finish {
  norms,        // b alone
  functions,    // y by the functions of lanes
  tanh_cosine,  // y in registers
};

// Outputs of a run, one block.
template <class T, class A>
struct WindowRun {
  Window<T, A> window;
  BlockFilters<A> filters;
  Operator op;
  const FilterScales* scales;
  int64_t fresh;  // the first output that no run before had
  int64_t map_pitch, y_pitch;
  A* map;  // or null
  T* y;
  T* dot;        // or null
  A* norm_sums;  // [lanes], added to; or null
  MagnitudeLanes<A> magnitude;
  AngularLanes<T, A> angular;
};

template <class T, class A, int kKernel, int kStride, int kRun, Finish kFinish>
void window_run(const WindowRun<T, A>& p) {
  using Vector = typename Lanes<A>::Vector;
  constexpr int64_t lanes = Lanes<A>::count;
  constexpr bool kDot = kFinish != Finish::norms;
  alignas(kLaneBytes) A u[kRun * lanes], b[kRun * lanes], inverse_b[kRun * lanes];
  alignas(kLaneBytes) A h[kRun * lanes];
  for (int64_t lane = 0; lane < lanes; lane += Lanes<A>::vector) {
    Vector dots[kRun], sums[kRun];
    window_sums<T, A, kKernel, kStride, kRun, kDot>(p.window, lane, dots, sums);
    if (kFinish == Finish::functions || p.map != nullptr || p.norm_sums != nullptr) {
      Vector total{};
      if (p.norm_sums != nullptr)
        load_vector<A>(total, p.norm_sums + lane);
#pragma GCC unroll 8
      for (int i = 0; i < kRun; ++i) {
        Vector root, inverse;
        root_of<A>(sums[i], root, inverse);
        if (p.map != nullptr)
          store_vector<A>(p.map + i * p.map_pitch + lane, root);
        if (i >= p.fresh)
          total += root;
        if constexpr (kFinish == Finish::functions) {
          store_vector<A>(b + i * lanes + lane, root);
          store_vector<A>(inverse_b + i * lanes + lane, inverse);
          store_vector<A>(u + i * lanes + lane, dots[i]);
        }
      }
      if (p.norm_sums != nullptr)
        store_vector<A>(p.norm_sums + lane, total);
    }
    if constexpr (kDot)
      if (p.dot != nullptr)
#pragma GCC unroll 8
        for (int i = 0; i < kRun; ++i)
          store_pixels(p.dot + i * p.y_pitch + lane, dots[i]);
    if constexpr (kFinish == Finish::tanh_cosine) {
      const TanhCosine f(*p.scales, p.window.channel + lane);
      Vector most = sums[0];
#pragma GCC unroll 8
      for (int i = 1; i < kRun; ++i)
        most = sums[i] > most ? sums[i] : most;
      if (f.saturates(most)) {
#pragma GCC unroll 8
        for (int i = 0; i < kRun; ++i)
          dots[i] = f.value<true>(dots[i], sums[i]);
      } else {
#pragma GCC unroll 8
        for (int i = 0; i < kRun; ++i)
          dots[i] = f.value<false>(dots[i], sums[i]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRun; ++i)
        store_pixels(p.y + i * p.y_pitch + lane, dots[i]);
    }
  }
  if constexpr (kFinish == Finish::functions) {
    const Constants<A> constants = constants_of<A>(p.op);
    p.magnitude({kRun, p.filters, constants, b, h});
    p.angular({kRun, p.filters, constants, u, inverse_b, h, lanes, p.y_pitch, p.y});
  }
}

// Bytes of x and y together beyond which rows are fetched ahead: less stays in the third-level
// cache, where fetching costs 5 % and gains nothing. Beyond, measured on [8, 96, 56, 56], 3x3, it
// gained a quarter when the tensors had left the caches, and cost a fifth when they had not.
constexpr int64_t kAheadBytes = 8 << 20;

// Memory fetched a few lines at a time, long before its use: pixels of some channels.
class Ahead {
public:
  Ahead() = default;

  // `steps`: calls of fetch() that are to come.
  Ahead(const void* first, int64_t pixels, int64_t pitch, int64_t bytes, int64_t steps)
      : pixel_(static_cast<const char*>(first)), pixels_(std::max<int64_t>(pixels, 0)),
        pitch_(pitch), bytes_(bytes),
        lines_((pixels_ * ((bytes + kLaneBytes - 1) / kLaneBytes) + steps - 1) / steps) {}

  void fetch() {
    for (int64_t i = 0; i < lines_ && pixels_ > 0; ++i) {
      __builtin_prefetch(pixel_ + done_, 0, 2);
      done_ += kLaneBytes;
      if (done_ >= bytes_) {
        done_ = 0;
        pixel_ += pitch_;
        --pixels_;
      }
    }
  }

private:
  const char* pixel_ = nullptr;
  int64_t pixels_ = 0, pitch_ = 0, bytes_ = 0, lines_ = 0, done_ = 0;
};

template <class T, class A>
class InPlaceForward {
public:
  static bool takes(const DepthwiseShape& s) {
    const Axis& c = s.columns;
    return kFusedMultiplyAdd && s.channels_last && s.o == s.c && s.c % lanes == 0 &&
           (c.kernel == 3 || c.kernel == 5 || c.kernel == 7) && c.stride <= 2 && c.dilation == 1 &&
           c.output >= kShortRun;
  }

  explicit InPlaceForward(const DepthwiseParams& p)
      : p_(p), s_(p.shape), zeros_(static_cast<std::size_t>(s_.c)),
        pixels_(static_cast<std::size_t>(s_.layout.rows * s_.columns.padded())),
        squares_(s_.layout.rows * s_.group * s_.columns.output * lanes),
        squared_(static_cast<std::size_t>(s_.layout.rows)) {
    WindowRun<T, A>& r = run_;
    r.window.eps = A(p.eps);
    r.op = p.op;
    r.scales = p.scales;
    r.map_pitch = s_.c;
    r.y_pitch = s_.o;
    r.magnitude = pick_magnitude_lanes<A>(Magnitudes{}, WeightedMagnitudes{}, p.op);
    r.angular = pick_angular_lanes<T, A>(Angulars{}, p.op.angular, p.filters.bias != nullptr);
    const int64_t elements = s_.n * s_.c * (s_.rows.input * s_.columns.input + s_.pixels());
    fetches_ = elements * int64_t{sizeof(T)} > kAheadBytes;
    const Finish finish = p.y == nullptr        ? Finish::norms
                          : p.scales != nullptr ? Finish::tanh_cosine
                                                : Finish::functions;
    long_run_ = pick<kLongRun>(finish);
    short_run_ = pick<kShortRun>(finish);
  }

  double run(int64_t task) {
    const Place at(s_, task);
    double sum = 0;
    std::fill(squared_.begin(), squared_.end(), -1);
    int64_t seen = at.first_row * s_.rows.stride;  // padded rows before this one are there
    for (int64_t row = at.first_row; row < at.end_row; ++row) {
      const int64_t first = row * s_.rows.stride;
      seen = std::max(seen, first);
      for (; seen < first + s_.layout.rows; ++seen)
        point(at, seen);
      // Rows of zeros are left out; the others are neighbours. Those whose squares an output row
      // before this one left behind come first.
      rows_.clear();
      square_rows_.clear();
      int64_t first_tap_row = 0, known = 0;
      for (int64_t r = 0; r < s_.rows.kernel; ++r) {
        const int64_t padded = first + r * s_.rows.dilation;
        if (p_.row_sources[padded] >= 0) {
          const int64_t slot = padded % s_.layout.rows;
          int64_t& squared = squared_[static_cast<std::size_t>(slot)];
          known += squared == padded;
          squared = padded;
          rows_.push_back(pixels_of(padded));
          square_rows_.push_back(squares_.data() + slot * s_.group * s_.columns.output * lanes);
        } else if (rows_.empty()) {
          first_tap_row = r + 1;
        }
      }
      run_.window.rows = rows_.data();
      if (fetches_)
        look_ahead(at, row, seen);
      run_.window.squares = square_rows_.data();
      run_.window.known_rows = known;
      run_.window.kernel_rows = static_cast<int64_t>(rows_.size());
      for (int64_t block = at.first_block; block < at.end_block; ++block)
        sum += block_row(at, row, block, first_tap_row);
    }
    return sum;
  }

private:
  static constexpr int64_t lanes = Lanes<A>::count;
  using Function = void (*)(const WindowRun<T, A>&);

  template <int kRun, int kKernel, int kStride>
  static Function pick(Finish finish) {
    static constexpr Function table[] = {
        window_run<T, A, kKernel, kStride, kRun, Finish::norms>,
        window_run<T, A, kKernel, kStride, kRun, Finish::functions>,
        window_run<T, A, kKernel, kStride, kRun, Finish::tanh_cosine>,
    };
    return table[static_cast<int>(finish)];
  }

  template <int kRun>
  Function pick(Finish finish) const {
    const bool dense = s_.columns.stride == 1;
    switch (s_.columns.kernel) {
    case 3:
      return dense ? pick<kRun, 3, 1>(finish) : pick<kRun, 3, 2>(finish);
    case 5:
      return dense ? pick<kRun, 5, 1>(finish) : pick<kRun, 5, 2>(finish);
    default:
      return dense ? pick<kRun, 7, 1>(finish) : pick<kRun, 7, 2>(finish);
    }
  }

  const T** pixels_of(int64_t padded_row) {
    return pixels_.data() + padded_row % s_.layout.rows * s_.columns.padded();
  }

  void point(const Place& at, int64_t padded_row) {
    const int64_t h = p_.row_sources[padded_row];
    if (h < 0)
      return;
    const T* row =
        static_cast<const T*>(p_.x) + (at.image * s_.rows.input + h) * s_.columns.input * s_.c;
    const T** to = pixels_of(padded_row);
    for (int64_t j = 0; j < s_.columns.padded(); ++j) {
      const int64_t w = p_.column_sources[j];
      to[j] = w < 0 ? zeros_.data() : row + w * s_.c;
    }
  }

  // The rows of x and y that the next output row adds.
  void look_ahead(const Place& at, int64_t row, int64_t seen) {
    const int64_t blocks = at.end_block - at.first_block, channel = at.first_block * lanes;
    const int64_t steps = blocks * ((s_.columns.output + kLongRun - 1) / kLongRun);
    const int64_t pitch = s_.c * int64_t{sizeof(T)}, bytes = blocks * lanes * int64_t{sizeof(T)};
    const int64_t h = std::clamp<int64_t>(seen - s_.rows.before, 0, s_.rows.input);
    const int64_t rows = std::min(s_.rows.stride, s_.rows.input - h);
    x_ahead_ = Ahead(
        static_cast<const T*>(p_.x) + (at.image * s_.rows.input + h) * s_.columns.input * s_.c +
            channel,
        row + 1 < at.end_row ? rows * s_.columns.input : 0,
        pitch,
        bytes,
        steps
    );
    if (p_.y != nullptr)
      y_ahead_ = Ahead(
          static_cast<const T*>(p_.y) +
              (at.image * s_.rows.output + row + 1) * s_.columns.output * s_.c + channel,
          row + 1 < at.end_row ? s_.columns.output : 0,
          pitch,
          bytes,
          steps
      );
  }

  double block_row(const Place& at, int64_t row, int64_t block, int64_t first_tap_row) {
    const int64_t position = (at.image * s_.rows.output + row) * s_.columns.output;
    WindowRun<T, A>& r = run_;
    r.filters = BlockFilters<A>(p_.filters, block);
    r.window.weights = static_cast<const A*>(p_.filters.weight) +
                       (block * s_.taps() + first_tap_row * s_.columns.kernel) * lanes;
    r.window.channel = block * lanes;
    alignas(kLaneBytes) A lane_sums[lanes] = {};
    r.norm_sums = p_.norm_sums == nullptr ? nullptr : lane_sums;
    for (int64_t done = 0; done < s_.columns.output;) {
      const int64_t left = s_.columns.output - done;
      const bool is_long = left > kShortRun && s_.columns.output >= kLongRun;
      const int64_t length = is_long ? kLongRun : kShortRun;
      // The last run reaches back over outputs that are there already.
      const int64_t first = std::min(done, s_.columns.output - length);
      const int64_t offset = (position + first) * s_.c + block * lanes;
      r.fresh = done - first;
      r.window.square = ((block - at.first_block) * s_.columns.output + first) * lanes;
      r.window.column = first * s_.columns.stride;
      r.map = p_.map == nullptr ? nullptr : static_cast<A*>(p_.map) + offset;
      r.y = p_.y == nullptr ? nullptr : static_cast<T*>(p_.y) + offset;
      r.dot = p_.dot == nullptr ? nullptr : static_cast<T*>(p_.dot) + offset;
      if (fetches_) {
        x_ahead_.fetch();
        y_ahead_.fetch();
      }
      (is_long ? long_run_ : short_run_)(r);
      done = first + length;
    }
    double sum = 0;
    for (A v : lane_sums)
      sum += double(v);
    return sum;
  }

  const DepthwiseParams& p_;
  const DepthwiseShape& s_;
  std::vector<T> zeros_;  // a pixel of padding
  std::vector<const T*> pixels_;
  std::vector<const T* const*> rows_;
  Buffer<A> squares_;             // [ring of rows, blocks, outputs, lanes]
  std::vector<int64_t> squared_;  // the padded row that a row of the ring is of
  std::vector<A*> square_rows_;
  bool fetches_;
  Ahead x_ahead_, y_ahead_;
  WindowRun<T, A> run_{};
  Function long_run_, short_run_;
};

}  // namespace dcconv::cpu::DCCONV_ISA

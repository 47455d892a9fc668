// Window sums of windows without holes against the sums that suit every window, bit by bit, and
// against plain loops. Exits 0 when all agree, 1 otherwise; says how many sums it compared.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/support/window.cuh"

namespace {

using namespace dcconv::cuda;

int wrong = 0;
int64_t compared = 0;

uint32_t state = 1;

// Of either sign, some of them zeros of either sign; sums round.
float value() {
  state = state * 1664525u + 1013904223u;
  if (state % 7 == 0)
    return state % 2 == 0 ? 0.0f : -0.0f;
  return (static_cast<float>(state >> 8) / 16777216.0f - 0.5f) * 3.0f;
}

std::vector<float> values(int64_t count) {
  std::vector<float> all(static_cast<std::size_t>(count));
  for (float& one : all)
    one = value();
  return all;
}

void expect(const char* what, const Window& w, float got, float expected) {
  ++compared;
  if (std::memcmp(&got, &expected, sizeof(float)) == 0 || ++wrong > 5)
    return;
  std::printf(
      "%s of %d x %d at stride %d x %d: %.9g, not %.9g\n",
      what,
      w.rows.kernel,
      w.columns.kernel,
      w.rows.stride,
      w.columns.stride,
      double(got),
      double(expected)
  );
}

// The windows that see a pixel, from the last one on: those whose tap r at p stride + r is it.
float plain_transposed_sum(const Window& w, const float* map, const MapPlane& plane, int h, int x) {
  const auto sees = [](const WindowAxis& axis, int output, int i) {
    const int tap = i + axis.before - output * axis.stride;
    return tap >= 0 && tap < axis.kernel;
  };
  float total = 0;
  for (int p = w.rows.output - 1; p >= 0; --p) {
    for (int q = w.columns.output - 1; q >= 0; --q) {
      if (sees(w.rows, p, h) && sees(w.columns, q, x))
        total += map[plane.base + (int64_t(p) * w.columns.output + q) * plane.step];
    }
  }
  return total;
}

float plain_sum(const Window& w, const float* map, const MapPlane& plane, int p, int q) {
  float total = 0;
  for (int h = 0; h < w.rows.input; ++h) {
    for (int x = 0; x < w.columns.input; ++x) {
      const int r = h + w.rows.before - p * w.rows.stride;
      const int s = x + w.columns.before - q * w.columns.stride;
      if (r >= 0 && r < w.rows.kernel && s >= 0 && s < w.columns.kernel)
        total += map[plane.base + (int64_t(h) * w.columns.input + x) * plane.step];
    }
  }
  return total;
}

// All positions of two images with `groups` groups.
void compare(const Window& w, int groups, bool last) {
  const int inputs = w.rows.input * w.columns.input, outputs = w.rows.output * w.columns.output;
  const std::vector<float> seen = values(int64_t(2) * groups * inputs),
                           said = values(int64_t(2) * groups * outputs);
  for (int image = 0; image < 2; ++image) {
    for (int group = 0; group < groups; ++group) {
      const MapPlane in = map_plane(image, group, inputs, groups, last);
      for (int p = 0; p < w.rows.output; ++p) {
        for (int q = 0; q < w.columns.output; ++q) {
          const float sum = window_sum(w, seen.data(), in, p, q);
          expect("a sum", w, sum, any_window_sum(w, seen.data(), in, p, q));
          expect("a plain sum", w, sum, plain_sum(w, seen.data(), in, p, q));
        }
      }
      const MapPlane out = map_plane(image, group, outputs, groups, last);
      const auto tap = [&](int64_t i) { return said.at(static_cast<std::size_t>(i)); };
      for (int h = 0; h < w.rows.input; ++h) {
        for (int x = 0; x < w.columns.input; ++x) {
          const float sum = transposed_window_sum<float>(w, out, h, x, tap);
          expect("a transposed sum", w, sum, any_transposed_window_sum<float>(w, out, h, x, tap));
          expect("a plain transposed sum", w, sum, plain_transposed_sum(w, said.data(), out, h, x));
        }
      }
    }
  }
}

// An axis whose last window may end before the padding does.
bool axis_of(int input, int kernel, int stride, int before, int after, WindowAxis& axis) {
  const int padded = input + before + after;
  axis = {input, 0, kernel, stride, 1, before, after, dcconv::PaddingMode::zeros};
  if (padded < kernel)
    return false;
  axis.output = (padded - kernel) / stride + 1;
  return true;
}

}  // namespace

int main() {
  std::vector<WindowAxis> axes;
  for (int kernel : {1, 2, 3, 4, 5, 7, 9}) {
    for (int stride : {1, 2, 3, 5}) {
      for (int before : {0, 1, 3}) {
        WindowAxis axis;
        if (axis_of(6 + kernel % 3, kernel, stride, before, (before + kernel) % 4, axis))
          axes.push_back(axis);
      }
    }
  }
  for (std::size_t i = 0; i < axes.size(); ++i) {
    for (std::size_t j = i % 3; j < axes.size(); j += 3) {
      Window w{axes[i], axes[j]};
      if (!is_solid(w))
        ++wrong;
      compare(w, 1 + int(j % 2) * 2, i % 2 == 0);
    }
  }
  // Holes and other padding go the general way.
  Window w{axes[0], axes[0]};
  w.rows.dilation = 2;
  w.rows.kernel = 2;
  wrong += is_solid(w);
  w.rows.kernel = 1;
  wrong += !is_solid(w);
  w.columns.mode = dcconv::PaddingMode::reflect;
  wrong += is_solid(w);
  std::printf("%lld sums, %d wrong\n", static_cast<long long>(compared), wrong);
  return wrong == 0 ? 0 : 1;
}

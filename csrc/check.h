// Errors that a user can see: one sentence, "dcconv: <what> must <rule>, got <value>", and no word
// of where the source lay when it was compiled, which STD_TORCH_CHECK begins with.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace dcconv {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "dcconv: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

[[noreturn]] inline void no_memory() {
  fail("can't allocate memory for the values that a call keeps for a while");
}

// Numbers as a list: [1, 2, 3].
template <class Numbers>
std::string list_of(const Numbers& numbers) {
  std::ostringstream text;
  const char* before = "[";
  for (const auto& number : numbers) {
    text << before << number;
    before = ", ";
  }
  return (numbers.begin() == numbers.end() ? "[" : text.str()) + "]";
}

// Most rows and columns of windows, paddings, strides and dilations, and most elements of a tensor:
// sums and products of the few of them that kernels and plans take fit 64 bits.
constexpr int64_t kMostPixels = (int64_t{1} << 31) - 1;
constexpr int64_t kMostElements = int64_t{1} << 50;

// Whether a tensor of these sizes, none of them negative, has so few elements; an empty batch
// counts as one image, because plans are made for it all the same.
inline bool is_countable(std::initializer_list<int64_t> sizes) {
  int64_t count = 1;
  for (int64_t size : sizes) {
    if (size > kMostElements / count)
      return false;
    count *= size > 1 ? size : 1;
  }
  return true;
}

}  // namespace dcconv

// The parts of the sentence are made only where it is needed.
#define DCCONV_CHECK(holds, ...)                                                                   \
  do {                                                                                             \
    if (!(holds))                                                                                  \
      ::dcconv::fail(__VA_ARGS__);                                                                 \
  } while (false)

namespace dcconv {

// A number of groups that divides the channels of x, of which there are some.
inline void check_groups(int64_t groups, int64_t channels) {
  DCCONV_CHECK(
      groups > 0 && channels > 0 && channels % groups == 0,
      "groups must divide the ",
      channels,
      " channels of x, got ",
      groups
  );
}

}  // namespace dcconv

// How many images of a batch go through library convolution and epilogue at a time.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include <unistd.h>

namespace dcconv {
namespace cpu {

// Bytes of the last-level cache, or 8 MB where the system does not say.
inline int64_t last_level_cache() {
  static const int64_t bytes = [] {
    long found = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    found = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (found <= 0) found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found > 0 ? static_cast<int64_t>(found) : int64_t{8} << 20;
  }();
  return bytes;
}

// Images per chunk that tests and measurements ask for; 0 leaves the choice to the rule.
inline std::atomic<int64_t>& forced_chunk() {
  static std::atomic<int64_t> images{0};
  return images;
}

// A chunk's input and output fit half of the last-level cache.
inline int64_t images_per_chunk(int64_t n, int64_t bytes_per_image) {
  const int64_t fitting = last_level_cache() / 2 / std::max<int64_t>(bytes_per_image, 1);
  const int64_t forced = forced_chunk();
  return std::max<int64_t>(1, std::min(n, forced > 0 ? forced : fitting));
}

}  // namespace cpu
}  // namespace dcconv

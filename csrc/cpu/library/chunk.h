// How many images of a batch go through library convolution and epilogue at a time.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>

#include <unistd.h>

namespace dcconv::cpu {

// Bytes of the last-level cache, or 8 MB where the system does not say. The kernel's own figure
// comes first: on virtual machines sysconf may answer ten times too much (320 MB for 32, measured).
inline int64_t last_level_cache() {
  static const int64_t bytes = [] {
    long found = 0;
    if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
      long kilobytes = 0;
      if (std::fscanf(file, "%ldK", &kilobytes) == 1)
        found = kilobytes * 1024;
      std::fclose(file);
    }
#if defined(_SC_LEVEL3_CACHE_SIZE)
    if (found <= 0)
      found = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (found <= 0)
      found = sysconf(_SC_LEVEL2_CACHE_SIZE);
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

// Forward: the output of a chunk, read once more by the epilogue, fits the last-level cache.
inline int64_t forward_chunk(int64_t n, int64_t output_bytes) {
  const int64_t fitting = last_level_cache() / std::max<int64_t>(output_bytes, 1);
  const int64_t forced = forced_chunk();
  return std::max<int64_t>(1, std::min(n, forced > 0 ? forced : fitting));
}

// Backward: dy, the kept tensor and du of a chunk fit the last-level cache. Only where the output
// is the larger side: a chunk's input gradient is copied once more, and each chunk repeats the
// library's preparation. Measured on [8, 64, 56, 56] -> 256, 1x1: 1.5 times the plain convolution
// in chunks, 2.2 times whole; on [64, 96, 32, 32] -> 96, 3x3: 1.2 in chunks, 1.1 whole.
inline int64_t backward_chunk(int64_t n, int64_t input_bytes, int64_t output_bytes) {
  const int64_t forced = forced_chunk();
  if (forced > 0)
    return std::max<int64_t>(1, std::min(n, forced));
  if (output_bytes <= input_bytes)
    return std::max<int64_t>(1, n);
  const int64_t fitting = last_level_cache() / (3 * output_bytes + input_bytes);
  return std::max<int64_t>(1, std::min(n, fitting));
}

}  // namespace dcconv::cpu

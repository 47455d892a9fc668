// What the lanes of a warp, or the threads of a block, do together.
#pragma once

#include <cstddef>
#include <cstring>
#include <string>
#include <type_traits>

#include "state.h"
#if defined(SIMT_OS_THREADS)
#include "os_threads.h"
#else
#include "fibers.h"
#endif

namespace simt {

constexpr unsigned kFullMask = 0xffffffffu;

// The payloads of a warp's lanes; to be read before the lane's next collective.
template <class T>
class Lanes {
public:
  explicit Lanes(const unsigned char (*slots)[kSlotBytes]) : slots(slots) {}

  T operator[](unsigned lane) const {
    T payload;
    std::memcpy(&payload, slots[lane], sizeof(T));
    return payload;
  }

private:
  const unsigned char (*slots)[kSlotBytes];
};

inline void check_mask(const Thread& self, const char* name, unsigned mask) {
  if (mask == kFullMask)
    return;
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  fail(self, std::string(name) + ": mask must be 0xffffffff, got " + text);
}

// Every warp collective: each lane gives a payload and sees those of all 32. The lanes must agree
// on name and width.
template <class T>
Lanes<T> exchange(Thread& self, const char* name, int width, const T& payload) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= kSlotBytes, "payload");
  unsigned char (*slots)[kSlotBytes] = self.warp->slots[self.parity];
  self.parity ^= 1;
  std::memcpy(slots[self.lane], &payload, sizeof(T));
  Engine::wait_warp(self, name, width);
  return Lanes<T>(slots);
}

template <class T>
constexpr bool is_shuffled = std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8);

// `source` maps a lane and the first lane of its segment to the lane to read; a lane outside the
// segment's end reads its own.
template <class T, class Source>
T shuffle(const char* name, unsigned mask, const T& value, int width, Source&& source) {
  static_assert(is_shuffled<T>, "CUDA shuffles 4 and 8 byte numbers");
  Thread& self = here(name);
  check_mask(self, name, mask);
  if (width < 1 || width > static_cast<int>(kLanes) || (width & (width - 1)) != 0)
    fail(
        self,
        std::string(name) + ": width must be a power of two up to 32, got " + std::to_string(width)
    );
  const Lanes<T> lanes = exchange(self, name, width, value);
  const int lane = static_cast<int>(self.lane);
  return lanes[static_cast<unsigned>(source(lane, lane & ~(width - 1)))];
}

// The i-th call of each thread of a block returns the i-th piece of the block's shared memory.
inline void* shared_piece(std::size_t bytes) {
  Thread& self = here("shared memory");
  Block& block = *self.block;
  const unsigned number = self.pieces++;
  const std::size_t offset = self.taken;
  self.taken += (bytes + kPieceAlign - 1) / kPieceAlign * kPieceAlign;
  if (number >= kMaxPieces)
    fail(self, "takes more than " + std::to_string(kMaxPieces) + " shared pieces");
  if (bytes > block.launch->shared_bytes || self.taken > block.launch->shared_bytes)
    fail(
        self,
        "shared piece " + std::to_string(number) + " of " + std::to_string(bytes) +
            " bytes begins at byte " + std::to_string(offset) + ", the launch gave " +
            std::to_string(block.launch->shared_bytes)
    );
  std::size_t agreed = SIZE_MAX;
  const bool first =
      block.sizes[number].compare_exchange_strong(agreed, bytes, std::memory_order_relaxed);
  if (!first && agreed != bytes)
    fail(
        self,
        "takes " + std::to_string(bytes) + " bytes as shared piece " + std::to_string(number) +
            ", another thread took " + std::to_string(agreed)
    );
  return Engine::shared_piece(self, number, offset, bytes, first);
}

}  // namespace simt

// cp.async: copies from global to shared memory that their thread issues and has to wait for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "collectives.h"
#include "state.h"

namespace simt {

// What a thread accesses in shared memory at once lies in one piece, aligned.
inline void check_shared(Thread& self, const char* name, const void* address) {
  const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(address);
  if (at % kAccess != 0)
    fail(
        self,
        std::string(name) + ": the address in shared memory must be aligned to " +
            std::to_string(kAccess) + " bytes"
    );
  std::size_t offset = 0;
  for (unsigned number = 0; number < self.pieces; ++number) {
    const std::size_t size = self.block->sizes[number].load(std::memory_order_relaxed);
    const std::uintptr_t begin =
        reinterpret_cast<std::uintptr_t>(Engine::piece(self, number, offset));
    if (at >= begin && at - begin <= size && size - (at - begin) >= kAccess)
      return;
    offset += (size + kPieceAlign - 1) / kPieceAlign * kPieceAlign;
  }
  fail(self, std::string(name) + ": " + std::to_string(kAccess) + " bytes are in no shared piece");
}

inline void read(Copy& copy) {
  if (copy.valid)
    std::memcpy(copy.data, copy.global, kAccess);
  copy.is_read = true;
}

// From here on the destination may change at any time: it is poison until the copy lands. The
// source may be read at any time: it is read now or when the copy lands.
inline void copy_async(void* shared, const void* global, bool valid) {
  Thread& self = here("copy_async");
  check_shared(self, "copy_async", shared);
  if (reinterpret_cast<std::uintptr_t>(global) % kAccess != 0)
    fail(
        self,
        "copy_async: the address in global memory must be aligned to " + std::to_string(kAccess) +
            " bytes"
    );
  poison(shared, kAccess);
  self.copies.push_back(Copy{shared, global, valid, self.copy_group});
  if (self.random.below(2) == 0)
    read(self.copies.back());
}

inline void commit_async() {
  ++here("commit_async").copy_group;
}

// Lands the groups that the thread has committed, but for the last `pending` of them.
inline void wait_async(unsigned pending) {
  Thread& self = here("wait_async");
  std::size_t landed = 0;
  while (landed < self.copies.size() && self.copies[landed].group + pending < self.copy_group) {
    Copy& copy = self.copies[landed++];
    if (!copy.is_read)
      read(copy);
    std::memcpy(copy.shared, copy.data, kAccess);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

}  // namespace simt

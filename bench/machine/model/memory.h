// The load/store unit of a multiprocessor, and its share of L2 and DRAM: queues with a rate and a
// latency. Streams go through DRAM; the rest is in L2, and in L1 where the block has read its line.
#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_set>
#include <vector>

#include "interface.h"

// Cycles and rates that no data sheet has.
constexpr double kUnitBytes = 128;  // a cycle
constexpr double kQueue = 24;       // cycles that the unit may be behind
constexpr double kFromL2 = 40;      // after the last byte has left L2
constexpr double kFromDram = 60;    // ... DRAM

class Memory {
public:
  Memory(const Config& config, const int64_t* streams)
      : c_(config), streams_(streams), lines_(config.resident) {}

  // When an access is done, and when its operands have been read. Bytes from DRAM that are under
  // way until then.
  struct Access {
    double done, read;
    int64_t flying;
  };

  // From when on the unit takes another access.
  double free() const { return unit_ - kQueue; }

  void start(int block) { lines_[block].clear(); }

  Access global(const Item& item, int kind, int block, double now) {
    const double begin = std::max(unit_, now), bytes = 32.0 * item.sectors;
    unit_ = begin + std::max(1.0, item.amount / kUnitBytes);
    const double read = unit_ + 8;
    if (bytes == 0)
      return {begin + c_.l1, read, 0};
    if (streamed(item.address)) {
      dram_ = std::max(dram_, begin) + bytes / c_.dram_bytes;
      dram_bytes += int64_t(bytes);
      const double done = std::max(begin + c_.dram, dram_ + kFromDram);
      return {done, read, kind == kStore ? 0 : int64_t(bytes)};
    }
    if (kind == kLoad && !lines_[block].insert(item.address >> 7).second)
      return {begin + c_.l1, read, 0};
    l2_ = std::max(l2_, begin) + bytes / c_.l2_bytes;
    l2_bytes += int64_t(bytes);
    return {std::max(begin + c_.l2, l2_ + kFromL2), read, 0};
  }

  Access shared(const Item& item, double now) {
    unit_ = std::max(unit_, now) + std::max(1, item.amount);
    return {unit_ + c_.shared - 6, unit_ + 4, 0};
  }

  int64_t dram_bytes = 0, l2_bytes = 0;

private:
  bool streamed(int64_t address) const {
    for (int64_t i = 0; i < c_.streams; ++i)
      if (address >= streams_[2 * i] && address < streams_[2 * i + 1])
        return true;
    return false;
  }

  const Config& c_;
  const int64_t* streams_;
  std::vector<std::unordered_set<int64_t>> lines_;
  double unit_ = 0, dram_ = 0, l2_ = 0;
};

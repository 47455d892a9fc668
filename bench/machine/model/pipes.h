// The pipes of a sub-partition: until when each of them is taken.
#pragma once

#include <algorithm>

#include "interface.h"

class Pipes {
public:
  double free_at(const Config& c, int pipe) const {
    // Begins within the cycle in which the pipe gets free, so that its mean rate is kept.
    if (pipe == kTensor)
      return free_[kTensor] - 0.999;
    if (c.halves && pipe == kFma)
      return std::min(halves_[0], halves_[1]);
    if (c.halves && pipe == kHeavy)
      return halves_[0];
    if (c.halves && pipe == kHalf)
      return std::max(halves_[0], halves_[1]);
    return free_[pipe == kHeavy ? int(kFma) : pipe];
  }

  void occupy(const Config& c, int pipe, double now) {
    if (c.halves && (pipe == kFma || pipe == kHeavy)) {
      const int half = pipe == kFma && halves_[1] <= now ? 1 : 0;
      halves_[half] = now + 2;  // 32 lanes on 16
    } else if (c.halves && pipe == kHalf) {
      halves_[0] = halves_[1] = now + c.cycles[kHalf];
    } else if (pipe == kTensor) {
      free_[pipe] = std::max(free_[pipe], now) + c.cycles[pipe];
    } else {
      free_[pipe == kHeavy ? int(kFma) : pipe] = now + c.cycles[pipe];
    }
  }

private:
  double free_[kPipes] = {};
  double halves_[2] = {};  // of FMA: the one that takes integer products, and the other
};

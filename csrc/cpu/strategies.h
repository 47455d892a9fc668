// The strategies of the operator on the CPU: around the library's convolution, or fused, through
// kernels that hold dot products in cache. Tests and measurements may force one; `fused` takes its
// kernels beyond the rule wherever they can compute a call, and says with cpu_strategy_taken where
// they could not.
#pragma once

#include <string>

#include <torch/csrc/stable/library.h>

#include "check.h"

namespace dcconv::cpu {

enum class Strategy { automatic, library, fused };

// Of the calling thread: an op reads it before it starts tasks, and autograd runs backward of CPU
// tensors on the thread that asks for it.
inline Strategy& forced_strategy() {
  thread_local Strategy strategy = Strategy::automatic;
  return strategy;
}

// What the thread's latest call took.
inline Strategy& taken_strategy() {
  thread_local Strategy strategy = Strategy::automatic;
  return strategy;
}

inline Strategy strategy_of(const std::string& name) {
  if (name == "auto")
    return Strategy::automatic;
  if (name == "library")
    return Strategy::library;
  DCCONV_CHECK(name == "fused", "strategy must be one of auto, library, fused, got '", name, "'");
  return Strategy::fused;
}

}  // namespace dcconv::cpu

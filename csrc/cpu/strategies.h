// Which of its own ways the operator on the CPU goes: around the library's convolution, or through
// kernels that hold dot products in cache. Tests and measurements may force one; `own` takes its
// kernels beyond the rule wherever they can compute a call, and says with cpu_scheme_taken where
// they could not.
#pragma once

#include <atomic>
#include <string>

#include <torch/csrc/stable/library.h>

#include "check.h"

namespace dcconv::cpu {

enum class Scheme { automatic, library, own };

inline std::atomic<Scheme>& forced_scheme() {
  static std::atomic<Scheme> scheme{Scheme::automatic};
  return scheme;
}

// The way that the latest call went.
inline std::atomic<Scheme>& taken_scheme() {
  static std::atomic<Scheme> scheme{Scheme::automatic};
  return scheme;
}

inline Scheme scheme_of(const std::string& name) {
  if (name == "auto")
    return Scheme::automatic;
  if (name == "library")
    return Scheme::library;
  DCCONV_CHECK(name == "own", "scheme must be one of auto, library, own, got '", name, "'");
  return Scheme::own;
}

}  // namespace dcconv::cpu

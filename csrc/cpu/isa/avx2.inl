// DCCONV_PART for x86-64 machines with AVX2 and FMA; other machines compile an empty file. Headers
// with inline functions outside the kernels' namespace come first: compiled for the target, such a
// copy could be the one that the linker gives to code that runs anywhere.

#if defined(__x86_64__)

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/kernels/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define DCCONV_ISA avx2
#define DCCONV_FMA
#define DCCONV_LANES 8
#include DCCONV_PART

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

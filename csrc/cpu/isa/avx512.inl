// DCCONV_PART for x86-64 machines with AVX-512 (F, BW, DQ, VL); other machines compile an empty
// file. Headers with inline functions outside the kernels' namespace come first: compiled for the
// target, such a copy could be the one that the linker gives to code that runs anywhere.

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

#include <immintrin.h>

#include "cpu/kernels/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function    \
)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

#define DCCONV_ISA avx512
#define DCCONV_FMA
#define DCCONV_LANES 16
#include DCCONV_PART

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

#define DCCONV_PART "cpu/isa/table.inl"
#include "cpu/isa/avx512.inl"

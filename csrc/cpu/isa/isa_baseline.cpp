#define DCCONV_PART "cpu/isa/table.inl"
#include "cpu/isa/baseline.inl"

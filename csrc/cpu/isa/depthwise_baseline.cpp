#define DCCONV_PART "cpu/isa/depthwise.inl"
#include "cpu/isa/baseline.inl"

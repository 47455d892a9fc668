// The CPU kernels for any machine.

#define DCCONV_ISA baseline
#define DCCONV_LANES 4
#include "cpu/isa/table.inl"

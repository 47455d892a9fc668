// The CPU kernels for any machine.

#define DCCONV_ISA baseline
#include "cpu/table.inl"

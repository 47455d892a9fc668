// The CPU kernels for any machine.

#define DCCONV_ISA baseline
#define DCCONV_VECTOR_BYTES 16
#include "cpu/table.inl"

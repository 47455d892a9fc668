// DCCONV_PART for any machine.

#define DCCONV_ISA baseline
#define DCCONV_LANES 4
#include DCCONV_PART

// The kernels for any processor; setup.py gives the compiler its options.
#define LONGSPAN_SIMD "simd_portable.h"
#define LONGSPAN_OPS PORTABLE_OPS
#define LONGSPAN_ISA portable
#include "isa.h"

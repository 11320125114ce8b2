// The kernels for AVX2 with FMA and F16C; setup.py gives the compiler its options.
#define LONGSPAN_SIMD "simd_avx2.h"
#define LONGSPAN_OPS AVX2_OPS
#define LONGSPAN_ISA avx2
#if defined(__x86_64__)
#include "isa.h"
#endif

// The kernels for AVX-512 (F, BW, DQ, VL); setup.py gives the compiler its options.
#define LONGSPAN_SIMD "simd_avx512.h"
#define LONGSPAN_OPS AVX512_OPS
#define LONGSPAN_ISA avx512
#if defined(__x86_64__)
#include "isa.h"
#endif

#include "gemm_tables.h"

#ifdef MOE_HAS_X86_LEVELS
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define MOE_LEVEL 1
#define MOE_NAMESPACE avx2
#include "gemm_kernels.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

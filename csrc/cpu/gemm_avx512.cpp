#include "gemm_tables.h"

#ifdef MOE_HAS_X86_LEVELS
#ifndef __clang__  // GCC 12 warns about its own header where it is inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define MOE_LEVEL 2
#define MOE_NAMESPACE avx512
#include "gemm_kernels.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

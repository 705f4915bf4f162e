#include "gemm_tables.h"

#ifdef MOE_HAS_X86_LEVELS
#ifndef __clang__  // GCC 12 warns about its own header where it is inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#define MOE_LEVEL 3
#define MOE_NAMESPACE avx512_bf16
#include "gemm_kernels.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

// In the place of the toolkit's header where there is no toolkit: bfloat16, with the toolkit's
// conversions, which are one instruction each on sm_80 and later.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __nv_bfloat16 { unsigned short bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };

#ifdef __CUDACC__

__device__ __forceinline__ float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

__device__ __forceinline__ __nv_bfloat16 __float2bfloat16_rn(float value) {
  __nv_bfloat16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
}

__device__ __forceinline__ __nv_bfloat162 __floats2bfloat162_rn(float first, float second) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return *reinterpret_cast<const __nv_bfloat162*>(&pair);
}

__device__ __forceinline__ float2 __bfloat1622float2(__nv_bfloat162 pair) {
  return {__bfloat162float(pair.x), __bfloat162float(pair.y)};
}

#else

float __bfloat162float(__nv_bfloat16 value);
__nv_bfloat16 __float2bfloat16_rn(float value);
__nv_bfloat162 __floats2bfloat162_rn(float first, float second);
float2 __bfloat1622float2(__nv_bfloat162 pair);

#endif

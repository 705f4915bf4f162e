// In the place of the toolkit's header where there is no toolkit: float16, with the toolkit's
// conversions, which are one instruction each on sm_80 and later.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __half { unsigned short bits; };
struct alignas(4) __half2 { __half x, y; };

#ifdef __CUDACC__

__device__ __forceinline__ float __half2float(__half value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

__device__ __forceinline__ __half __float2half_rn(float value) {
  __half narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(value));
  return narrow;
}

__device__ __forceinline__ __half2 __floats2half2_rn(float first, float second) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return *reinterpret_cast<const __half2*>(&pair);
}

__device__ __forceinline__ float2 __half22float2(__half2 pair) {
  return {__half2float(pair.x), __half2float(pair.y)};
}

#else

float __half2float(__half value);
__half __float2half_rn(float value);
__half2 __floats2half2_rn(float first, float second);
float2 __half22float2(__half2 pair);

#endif

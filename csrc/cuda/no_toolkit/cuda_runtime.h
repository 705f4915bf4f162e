// In the place of the toolkit's header where there is no toolkit: the few declarations that the
// .cu files use, for the C++ compiler, which compiles their launches, and for NVRTC, which compiles
// their kernels. docs/building.md says how.
#pragma once

struct CUstream_st;
using cudaStream_t = CUstream_st*;

#ifdef __CUDACC__

#define cudaError_t int  // declared by some versions of NVRTC

#else  // NVRTC knows all below

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

#define __host__
#define __device__ __attribute__((unused))
#define __global__ __attribute__((unused))
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct int2 { int x, y; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

// The C++ compiler reads the kernels and makes nothing of them.
extern const dim3 threadIdx, blockIdx, blockDim, gridDim;
void __syncthreads();
void __syncwarp(unsigned mask = ~0u);
template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes);
template <typename Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned lanes);
unsigned __ballot_sync(unsigned mask, int predicate);
unsigned __match_any_sync(unsigned mask, int value);
int __popc(unsigned value);
int atomicAdd(int* to, int value);

#endif

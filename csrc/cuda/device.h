// Thin wrappers of the hardware instructions that the kernels use, and of launches.
//
// When tests compile the kernels for the host, cuda_on_host.h provides the same functions and
// stands in for the device. CUTLASS could not run there, and would have to be installed for a
// build. In a build without nvcc, by_name.h launches what NVRTC compiles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDACC__) && !defined(__CUDACC_RTC__)
#include <map>
#include <utility>

#include "asked_once.h"
#endif
#include "host_device.h"
#include "scalar.h"

#ifdef MOE_KERNELS_BY_NAME
#include "by_name.h"
#else
// A kernel and its template arguments, which must be types, for launch().
#define MOE_KERNEL(kernel, ...) kernel __VA_OPT__(<__VA_ARGS__>)
#ifndef __CUDACC__
#include "cuda_on_host.h"
#endif
#endif

namespace moe_kernels::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ float sigmoid(float value) {
  return __fdividef(1.0f, 1.0f + __expf(-value));
}

// Copies 16 bytes to shared memory, bypassing registers and L1. Unless `present` it writes zeros
// and does not read the address.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(present ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kGroups of this thread's committed groups are incomplete.
template <int kGroups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
}

// Loads four matrices of 8 x 8 two-byte elements: lane 8 i + j has the address of row j of matrix
// i.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// acc (16, 8) += a (16, 16) b (16, 8), the fragments of mma.sync.m16n8k16.
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&acc)[4], const uint32_t (&a)[4],
                                                        const uint32_t (&b)[2]) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply<__half>(float (&acc)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads 16 bytes of a weight that is read once, past the L1, where the rows are kept.
__device__ __forceinline__ uint4 load_once(const void* global) {
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
      : "l"(global));
  return words;
}

// Brings a line of global memory into the L2.
__device__ __forceinline__ void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(global));
}

// Lets the next kernel of the stream start, if it is launched by launch_early, as soon as all
// blocks have come here.
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}

// Waits for the end of the kernel before, and for what it has written.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Shows the compiler that a value is the same in all lanes of a warp.
__device__ __forceinline__ int same_in_warp(int value) {
  return __shfl_sync(0xffffffffu, value, 0);
}

// Hides from the compiler where a value comes from, so that it does not compute what follows from
// it ahead of time.
__device__ __forceinline__ void forget(int& value) { asm volatile("" : "+r"(value)); }

#ifndef __CUDACC_RTC__
// Finds what was asked about a kernel on the current device.
inline cudaError_t find_asked(const void* kernel, AskedOnce*& asked) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, AskedOnce> all;
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  asked = &all[{kernel, device}];
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, size_t shared_bytes) {
  if (shared_bytes <= kSharedWithoutAttribute) return cudaSuccess;
  AskedOnce* asked = nullptr;
  const cudaError_t error = find_asked(reinterpret_cast<const void*>(kernel), asked);
  if (error != cudaSuccess) return error;
  return asked->allow_shared(shared_bytes, [&](int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  });
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  const cudaError_t error = allow_shared(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_with(cudaLaunchAttribute attribute, void (*kernel)(Parameters...), dim3 grid,
                        int threads, size_t shared_bytes, cudaStream_t stream,
                        const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Launches a kernel whose blocks form clusters of `cluster` neighbours. They divide the grid.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int cluster, unsigned grid, int threads,
                            size_t shared_bytes, cudaStream_t stream,
                            const Arguments&... arguments) {
  if (cluster == 1) return launch(kernel, grid, threads, shared_bytes, stream, arguments...);
  const cudaError_t error = allow_shared(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute clusters = {};
  clusters.id = cudaLaunchAttributeClusterDimension;
  clusters.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  return launch_with(clusters, kernel, grid, threads, shared_bytes, stream, arguments...);
}

// Gives whether a kernel may overlap the one before it, on the current device.
template <typename Kernel>
cudaError_t may_overlap(Kernel kernel, bool& overlaps) {
  AskedOnce* asked = nullptr;
  const cudaError_t error = find_asked(reinterpret_cast<const void*>(kernel), asked);
  if (error != cudaSuccess) return error;
  return asked->may_overlap(overlaps, [&](bool& found) {
    cudaFuncAttributes compiled;
    int driver = 0;
    cudaError_t failed = cudaFuncGetAttributes(&compiled, kernel);
    if (failed == cudaSuccess) failed = cudaDriverGetVersion(&driver);
    found = compiled.ptxVersion >= kFirstArchThatWaits && driver >= kDriverThatCapturesOverlap;
    return failed;
  });
}

// Launches a kernel that may start before the one before it in the stream has ended. It must call
// wait_for_previous_kernel before it reads what that one writes.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, int threads,
                         size_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  bool overlaps = false;
  cudaError_t error = may_overlap(kernel, overlaps);
  if (error != cudaSuccess) return error;
  if (!overlaps) return launch(kernel, grid, threads, shared_bytes, stream, arguments...);
  if (shared_bytes > kSharedWithoutAttribute) return cudaErrorInvalidValue;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  return launch_with(early, kernel, grid, threads, shared_bytes, stream, arguments...);
}
#endif

#endif

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float(float value) {
  return value;
}
template <>
__device__ inline __half from_float(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float(float value) {
  return __float2bfloat16_rn(value);
}

// Packs two neighbours into a fragment's register, the first in the lower half.
__device__ inline uint32_t packed(float first, float second, __half) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t packed(float first, float second, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <typename T>
__device__ inline uint32_t pack(float first, float second) {
  return packed(first, second, T());
}

__device__ inline float2 unpacked(uint32_t pair, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
__device__ inline float2 unpacked(uint32_t pair, __nv_bfloat16) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}
template <typename T>
__device__ inline float2 unpack(uint32_t pair) {
  return unpacked(pair, T());
}

// The elements that one access moves.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Loads elements k, k + 1, ... of a row of `size`; zeros beyond it. `aligned`: all rows begin at a
// multiple of 16 bytes and consist of whole vectors, and so does k.
template <typename T>
__device__ inline Vector<T> load_vector(const T* row, int k, int size, bool aligned) {
  Vector<T> out = {};
  if (row == nullptr || k >= size) return out;
  if (aligned) return *reinterpret_cast<const Vector<T>*>(row + k);
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    if (k + i < size) out.values[i] = row[k + i];
  }
  return out;
}

// Loads a vector of weights from an aligned address, or returns zeros.
template <typename T>
__device__ inline Vector<T> load_weights(const T* from, bool present) {
  Vector<T> out = {};
  if (present) *reinterpret_cast<uint4*>(&out) = load_once(from);
  return out;
}

// Loads group, first row and end of a tile of a map (3, num_tiles).
struct Tile {
  int64_t group;
  int64_t first;
  int64_t end;
};

__device__ inline Tile tile_of(const int64_t* tiles, int tile, int num_tiles) {
  return {tiles[tile], tiles[num_tiles + tile], tiles[2 * num_tiles + tile]};
}

// Returns the token of a sorted row. There are fewer than 2^31 rows, and 64-bit division is slow.
__device__ inline int token_of(const int64_t* perm, int64_t row, int top_k) {
  return static_cast<int>(perm[row]) / top_k;
}

__host__ __device__ inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

constexpr int ceil_div(int64_t size, int block) {
  return static_cast<int>((size + block - 1) / block);
}

}  // namespace moe_kernels::cuda

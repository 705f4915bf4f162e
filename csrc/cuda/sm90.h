// What the engine asks of an sm_90, each instruction in one thin function. On the host
// sm90_on_host.h plays the same.
#pragma once

#include <cstdint>

#include "device.h"

namespace moe_kernels::cuda::sm90 {

constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr int kSwizzle = 1024;  // bytes after which the order of the chunks repeats

// A matrix (depth, rows, columns) of two-byte elements in global memory, as the copy engine takes
// it: CUtensorMap. Boxes of box_rows x 64 elements; elements beyond an edge are zeros.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

// Values of the driver's enumerations, which never change.
constexpr int kFloat16 = 6, kBFloat16 = 9, kSwizzle128Bytes = 3, kPromoteTo256Bytes = 3;

// Arguments of the driver's cuTensorMapEncodeTiled, the innermost axis first.
struct Encoding {
  int element;
  void* matrix;
  uint64_t sizes[3];
  uint64_t strides[2];  // bytes, of rows and of matrices
  uint32_t box[3], steps[3];
};

}  // namespace moe_kernels::cuda::sm90

#if defined(__CUDACC__) && !defined(__CUDACC_RTC__)
#include <cuda.h>
#endif

#ifdef __CUDACC__

#include "wgmma.h"

namespace moe_kernels::cuda::sm90 {

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char bytes_of_engine[];
  return bytes_of_engine;
}

// Stops where a place in shared memory would have another order of chunks than load_box gives.
__device__ __forceinline__ void check_swizzle(const void* place) {
  if (shared_address(place) % kSwizzle != 0) __trap();
}

// --- barriers in shared memory: a phase ends when `arrivals` threads and all announced bytes came

__device__ __forceinline__ void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Lets the copy engine and the cluster see barriers that were just made.
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// Waits for the end of the phase of this parity, 0 or 1 in turn.
__device__ __forceinline__ void wait_barrier(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\nbra AGAIN;\nDONE:\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives at the barrier in the same place of a block of the cluster. It orders products that are
// complete before copies that another block starts then, which needs no scope beyond the default:
// .release.cluster would make each arrival wait for all of the thread's stores to global memory.
__device__ __forceinline__ void arrive_at(uint64_t* barrier, int block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(
          shared_address(barrier)),
      "r"(block)
      : "memory");
}

// Waits for all threads of the cluster.
__device__ __forceinline__ void meet_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// Arrives, and announces bytes that load_box will bring.
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Arrives when the copies that this thread has started so far are complete.
__device__ __forceinline__ void arrive_when_copied(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(
                   shared_address(barrier))
               : "memory");
}

// Waits for the other threads that wait at one of the block's 16 barriers, of which 0 is
// __syncthreads'.
__device__ __forceinline__ void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

// --- asynchronous work

// Copies a box of a matrix to shared memory at a multiple of kSwizzle bytes. Its rows are 128
// bytes, whose chunks of 16 change places: chunk c of row r is at c ^ r % 8. It goes to the same
// place of each of the cluster's kBlocks blocks, whose barriers each count its bytes.
template <int kBlocks>
__device__ __forceinline__ void load_box(const TensorMap* map, void* to, int column, int row,
                                         int depth, uint64_t* barrier) {
  if constexpr (kBlocks == 1) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];\n" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(depth)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;\n" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(depth),
        "h"(static_cast<uint16_t>((1 << kBlocks) - 1))
        : "memory");
  }
}

// Orders what threads or their copies have written before what multiply() reads.
__device__ __forceinline__ void fence_for_products() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Describes an operand of multiply() that load_box has written, or copies in the same order. Its
// atoms are of 8 rows of 128 bytes. Along memory's rows they lie kSwizzle bytes apart; `stride` is
// the distance of the next 64 elements along them, where the operand has more.
__device__ __forceinline__ uint64_t operand(const void* from, int stride) {
  return static_cast<uint64_t>((shared_address(from) & 0x3ffff) >> 4) |
         static_cast<uint64_t>(stride >> 4) << 16 | static_cast<uint64_t>(kSwizzle >> 4) << 32 |
         static_cast<uint64_t>(1) << 62;
}

__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Waits until at most kGroups of this warp's committed groups are incomplete.
template <int kGroups>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kGroups) : "memory");
}

// --- registers of each thread of a warpgroup

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

#ifndef __CUDACC_RTC__
// The function of the driver that describes a matrix. The runtime finds it, so that nothing has to
// be linked with the driver.
inline cudaError_t find_encoder(decltype(&cuTensorMapEncodeTiled)& encode) {
  static void* found = nullptr;
  static const cudaError_t error = [] {
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t failed = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t failed = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found,
                                                       cudaEnableDefault, &result);
#endif
    if (failed != cudaSuccess) return failed;
    return result == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorNotSupported;
  }();
  encode = reinterpret_cast<decltype(encode)>(found);
  return error;
}

inline cudaError_t encode_tiled(TensorMap* map, const Encoding& with) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  static_assert(kFloat16 == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 &&
                kBFloat16 == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 &&
                kSwizzle128Bytes == CU_TENSOR_MAP_SWIZZLE_128B &&
                kPromoteTo256Bytes == CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  const cudaError_t error = find_encoder(encode);
  if (error != cudaSuccess) return error;
  const CUresult result = encode(
      reinterpret_cast<CUtensorMap*>(map), static_cast<CUtensorMapDataType>(with.element), 3,
      with.matrix, with.sizes, with.strides, with.box, with.steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Counts the multiprocessors of the current device, which must be an sm_90: the kernels are empty
// for every other.
inline cudaError_t count_multiprocessors(int& number) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  ask(number, cudaDevAttrMultiProcessorCount);
  ask(major, cudaDevAttrComputeCapabilityMajor);
  ask(minor, cudaDevAttrComputeCapabilityMinor);
  if (error != cudaSuccess) return error;
  return major == 9 && minor == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
#endif

}  // namespace moe_kernels::cuda::sm90

#elif defined(MOE_KERNELS_BY_NAME)

namespace moe_kernels::cuda::sm90 {

// See above; the C++ compiler reads the kernels and makes nothing of them.
unsigned char* shared_memory();
void check_swizzle(const void* place);
void init_barrier(uint64_t* barrier, int arrivals);
void fence_barriers();
void wait_barrier(uint64_t* barrier, int parity);
void arrive(uint64_t* barrier);
void arrive_at(uint64_t* barrier, int block);
void meet_cluster();
void arrive_expecting(uint64_t* barrier, int bytes);
void arrive_when_copied(uint64_t* barrier);
void meet(int barrier, int threads);
template <int kBlocks>
void load_box(const TensorMap* map, void* to, int column, int row, int depth, uint64_t* barrier);
void fence_for_products();
uint64_t operand(const void* from, int stride);
template <typename T, bool kAcross, int kTiles>
void multiply(float (&d)[kTiles][4], uint64_t a, uint64_t b);
template <int kTiles>
void fence_sums(float (&d)[kTiles][4]);
void begin_products();
void commit_products();
template <int kGroups>
void wait_products();
template <int kRegisters>
void give_registers();
template <int kRegisters>
void take_registers();

// By the driver, in by_name.cpp.
cudaError_t encode_tiled(TensorMap* map, const Encoding& with);
cudaError_t count_multiprocessors(int& number);

}  // namespace moe_kernels::cuda::sm90

#else
#include "sm90_on_host.h"
#endif

#ifndef __CUDACC_RTC__
namespace moe_kernels::cuda::sm90 {

// Describes matrices (depth, rows, columns) of two-byte elements, whose rows are of whole vectors
// of 16 bytes, in boxes of box_rows x 64.
inline cudaError_t make_tensor_map(TensorMap& map, const void* matrices, bool is_half,
                                   int64_t depth, int64_t rows, int64_t columns, int box_rows) {
  const auto size = [](int64_t value) { return static_cast<uint64_t>(value); };
  return encode_tiled(&map, {
                                .element = is_half ? kFloat16 : kBFloat16,
                                .matrix = const_cast<void*>(matrices),
                                .sizes = {size(columns), size(rows), size(depth)},
                                .strides = {size(2 * columns), size(2 * columns * rows)},
                                .box = {64, static_cast<uint32_t>(box_rows), 1},
                                .steps = {1, 1, 1},
                            });
}

}  // namespace moe_kernels::cuda::sm90
#endif

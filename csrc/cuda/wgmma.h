// The instructions that multiply for a warpgroup: d (64, n) += a (64, 16) b (16, n), with d in the
// registers of its four warps, and a and b in shared memory. A warp's part of d is n / 8 fragments
// of mma.m16n8 next to each other.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define MOE_FOUR(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define MOE_SUMS_128(d) \
  MOE_FOUR(d, 0), MOE_FOUR(d, 1), MOE_FOUR(d, 2), MOE_FOUR(d, 3), \
  MOE_FOUR(d, 4), MOE_FOUR(d, 5), MOE_FOUR(d, 6), MOE_FOUR(d, 7), \
  MOE_FOUR(d, 8), MOE_FOUR(d, 9), MOE_FOUR(d, 10), MOE_FOUR(d, 11), \
  MOE_FOUR(d, 12), MOE_FOUR(d, 13), MOE_FOUR(d, 14), MOE_FOUR(d, 15)
#define MOE_SUMS_256(d) \
  MOE_SUMS_128(d), \
  MOE_FOUR(d, 16), MOE_FOUR(d, 17), MOE_FOUR(d, 18), MOE_FOUR(d, 19), \
  MOE_FOUR(d, 20), MOE_FOUR(d, 21), MOE_FOUR(d, 22), MOE_FOUR(d, 23), \
  MOE_FOUR(d, 24), MOE_FOUR(d, 25), MOE_FOUR(d, 26), MOE_FOUR(d, 27), \
  MOE_FOUR(d, 28), MOE_FOUR(d, 29), MOE_FOUR(d, 30), MOE_FOUR(d, 31)
#define MOE_REGISTERS_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, " \
  "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, " \
  "%60, %61, %62, %63"
#define MOE_REGISTERS_256 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, " \
  "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, " \
  "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, " \
  "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"
// a_, b_: numbers of the operands behind the registers. across: 1 if neighbours in memory are
// columns of b, 0 if they are steps of k.
#define MOE_WGMMA(type, n, a_, b_, across)                                          \
  asm volatile(                                                                     \
      "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                    \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type               \
      " {" MOE_REGISTERS_##n "}, " a_ ", " b_ ", p, 1, 1, 0, " across ";\n}"         \
      : MOE_SUMS_##n(d)                                                             \
      : "l"(a), "l"(b))

namespace moe_kernels::cuda::sm90 {

// a and b are descriptors, see operand().
template <typename T, bool kAcross, int kTiles>
__device__ __forceinline__ void multiply(float (&d)[kTiles][4], uint64_t a, uint64_t b) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kTiles == 16 || kTiles == 32);
  if constexpr (kTiles == 16 && kHalf && !kAcross) {
    MOE_WGMMA("f16", 128, "%64", "%65", "0");
  }
  if constexpr (kTiles == 16 && kHalf && kAcross) {
    MOE_WGMMA("f16", 128, "%64", "%65", "1");
  }
  if constexpr (kTiles == 16 && !kHalf && !kAcross) {
    MOE_WGMMA("bf16", 128, "%64", "%65", "0");
  }
  if constexpr (kTiles == 16 && !kHalf && kAcross) {
    MOE_WGMMA("bf16", 128, "%64", "%65", "1");
  }
  if constexpr (kTiles == 32 && kHalf && !kAcross) {
    MOE_WGMMA("f16", 256, "%128", "%129", "0");
  }
  if constexpr (kTiles == 32 && kHalf && kAcross) {
    MOE_WGMMA("f16", 256, "%128", "%129", "1");
  }
  if constexpr (kTiles == 32 && !kHalf && !kAcross) {
    MOE_WGMMA("bf16", 256, "%128", "%129", "0");
  }
  if constexpr (kTiles == 32 && !kHalf && kAcross) {
    MOE_WGMMA("bf16", 256, "%128", "%129", "1");
  }
}

// Keeps the compiler from moving what writes or reads the sums past the instructions around it: it
// does not know that products are under way.
template <int kTiles>
__device__ __forceinline__ void fence_sums(float (&d)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) asm volatile("" : MOE_FOUR(d, j)::"memory");
}

}  // namespace moe_kernels::cuda::sm90

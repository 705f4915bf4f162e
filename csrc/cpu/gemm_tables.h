// Tables of kernels: each gemm_<level>.cpp defines one, and gemm.cpp chooses among them.
#pragma once

#include <ATen/native/CPUBlas.h>

#include "gemm.h"

namespace moe_kernels::cpu {

struct KernelTables {
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<c10::BFloat16> bf16;
  Kernels<c10::Half> f16;
};

namespace baseline {
extern const KernelTables tables;
}

#if defined(__x86_64__) && defined(__GNUC__)
#define MOE_HAS_X86_LEVELS 1
namespace avx2 {
extern const KernelTables tables;
}
namespace avx512 {
extern const KernelTables tables;
}
namespace avx512_bf16 {
extern const KernelTables tables;
}
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
#define MOE_HAS_BRGEMM 1
namespace brgemm {
bool works();  // on this CPU, in this process
const Kernels<c10::BFloat16>& table();
}
#endif
#endif

}  // namespace moe_kernels::cpu

#include "gemm_tables.h"

#ifdef MOE_HAS_X86_LEVELS
#include <ATen/cpu/Utils.h>
#include <cpuid.h>
#endif

#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <optional>

namespace moe_kernels::cpu {
namespace {

struct Level {
  const char* name;
  const KernelTables* tables;
  const Kernels<c10::BFloat16>* bf16;

  Level(const char* name, const KernelTables& tables)
      : name(name), tables(&tables), bf16(&tables.bf16) {}
};

std::optional<bool> brgemm_requested;
bool level_chosen = false;

#ifdef MOE_HAS_X86_LEVELS
// Features that clang 14's __builtin_cpu_supports has no name for.
bool f16c_by_cpuid() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(1, 0, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}
bool avx512_bf16_by_cpuid() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c_by_cpuid();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && avx512_bf16_by_cpuid(); }

// The system must also permit a process to use the tiles; init_amx asks it.
bool has_amx_bf16() {
  static const bool has = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool present = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);
    return present && has_avx512_bf16() && at::cpu::init_amx();
  }();
  return has;
}

// Intel's cores leave bf16 to AMX: without it, a layer in bf16 dot products took 1.6 times as long as
// in fused multiply-adds of float32 (family 6, model 207).
bool has_slow_bf16_dots() { return __builtin_cpu_is("intel"); }

// Products widen bf16 to float32. Few rows, for which reading is the bound, keep the dot products.
const Kernels<c10::BFloat16>& widening_table() {
  static const Kernels<c10::BFloat16> table = [] {
    Kernels<c10::BFloat16> widening = avx512::tables.bf16;
    widening.tile_direct = avx512_bf16::tables.bf16.tile_direct;
    return widening;
  }();
  return table;
}

Level widest_level() {
  Level level("avx512_bf16", avx512_bf16::tables);
#ifdef MOE_HAS_BRGEMM
  const bool use_brgemm = brgemm_requested ? *brgemm_requested : has_amx_bf16();
  if (use_brgemm && brgemm::works()) {
    level.name = has_amx_bf16() ? "amx_bf16" : "avx512_bf16 through brgemm";
    level.bf16 = &brgemm::table();
    return level;
  }
#endif
  if (has_slow_bf16_dots()) {
    level.name = "avx512_bf16 in float32";
    level.bf16 = &widening_table();
  }
  return level;
}

// PyTorch's own variable, so that one setting puts both on the same level.
bool capped_to(const char* capability) {
  const char* value = std::getenv("ATEN_CPU_CAPABILITY");
  return value != nullptr && std::strcmp(value, capability) == 0;
}
#endif

Level choose_level() {
  level_chosen = true;
#ifdef MOE_HAS_X86_LEVELS
  __builtin_cpu_init();
  if (!capped_to("default")) {
    if (!capped_to("avx2")) {
      if (has_avx512_bf16()) return widest_level();
      if (has_avx512()) return {"avx512", avx512::tables};
    }
    if (has_avx2()) return {"avx2", avx2::tables};
  }
#endif
  return {"baseline", baseline::tables};
}

// Chosen once: a change of level within a process would change bits.
const Level& level() {
  static const Level chosen = choose_level();
  return chosen;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return level().tables->f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return level().tables->f64;
}
template <>
const Kernels<c10::BFloat16>& kernels<c10::BFloat16>() {
  return *level().bf16;
}
template <>
const Kernels<c10::Half>& kernels<c10::Half>() {
  return level().tables->f16;
}

void prefer_brgemm(bool on) {
  TORCH_CHECK(!level_chosen, "the kernels of this process are chosen already");
  brgemm_requested = on;
}

std::string gemm_level() { return level().name; }

std::vector<std::string> cpu_features() {
  std::vector<std::string> features;
#ifdef MOE_HAS_X86_LEVELS
  __builtin_cpu_init();
  if (has_avx2()) features.emplace_back("avx2");
  if (has_avx512()) features.emplace_back("avx512");
  if (has_avx512_bf16()) features.emplace_back("avx512_bf16");
  if (has_amx_bf16()) features.emplace_back("amx_bf16");
#endif
  return features;
}

}  // namespace moe_kernels::cpu

// The kernels, written once with vector extensions. Each gemm_<level>.cpp sets the
// target, MOE_LEVEL (0 baseline, 1 AVX2, 2 AVX-512, 3 AVX-512 with bf16 dot products) and
// MOE_NAMESPACE, and includes this file last: nothing from a standard header may be compiled for
// the wider target, or the linker could pick that copy for a smaller machine.

#if MOE_LEVEL >= 2
#define MOE_VECTOR_BYTES 64
#define MOE_MAX_ROWS 12
#elif MOE_LEVEL == 1
#define MOE_VECTOR_BYTES 32
#define MOE_MAX_ROWS 6
#else
#define MOE_VECTOR_BYTES 16
#define MOE_MAX_ROWS 6
#endif

namespace moe_kernels::cpu::MOE_NAMESPACE {
namespace {

#include "simd/lanes.h"
#include "simd/pack.h"
#include "simd/unpack.h"
#include "simd/elementwise.h"
#include "simd/activation.h"
#include "simd/multiply.h"

template <typename scalar_t>
constexpr Kernels<scalar_t> generic_table() {
  using acc_t = acc_type<scalar_t>;
  Kernels<scalar_t> table{};
  table.max_rows = MOE_MAX_ROWS;
  table.vector = VectorOf<acc_t>::size;
  table.k_multiple = 1;
  table.element_bytes = sizeof(acc_t);
  table.pack_transposed = &pack_transposed<scalar_t>;
  table.pack = &pack<scalar_t>;
  table.pack_rows = &pack_rows<scalar_t>;
  table.pack_left = &pack_left<acc_t>;
  table.tile = &tile<scalar_t>;
  table.tile_kmajor = &tile_kmajor<acc_t>;
  table.tile_direct = &tile_direct<scalar_t>;
  table.unpack_nf4 = &unpack_nf4<scalar_t>;
  table.unpack_fp8 = &unpack_fp8<scalar_t>;
  table.store = &store_scaled<scalar_t>;
  table.load = &load_scaled<scalar_t>;
  table.add_rows = &add_rows<acc_t>;
  table.add = &add<scalar_t>;
  table.activate = &activate<scalar_t>;
  table.activate_backward = &activate_backward<scalar_t>;
  return table;
}

constexpr Kernels<c10::BFloat16> bf16_table() {
  Kernels<c10::BFloat16> table = generic_table<c10::BFloat16>();
#if MOE_LEVEL >= 3
  table.k_multiple = 2;
  table.element_bytes = sizeof(c10::BFloat16);
  table.pack_transposed = &pack_transposed_bf16;
  table.pack = &pack_bf16;
  table.pack_rows = &pack_rows_bf16;
  table.pack_left = &pack_left_bf16;
  table.tile = &tile_bf16;
  table.tile_kmajor = &tile_kmajor_bf16;
#endif
  return table;
}

}  // namespace

extern const KernelTables tables;
constexpr KernelTables tables = {generic_table<float>(), generic_table<double>(), bf16_table(),
                                 generic_table<c10::Half>()};

}  // namespace moe_kernels::cpu::MOE_NAMESPACE

// bf16 products by PyTorch's brgemm, for CPUs with AMX: tiles do many times the arithmetic of vector
// registers. Panels (K / 2, N, 2) are what it takes, so all else stays as it is on AVX-512 with
// bf16 dot products.
#include "gemm_tables.h"

#ifdef MOE_HAS_X86_LEVELS
#include <ATen/native/CPUBlas.h>

#include <algorithm>

namespace moe_kernels::cpu::brgemm {
namespace {

using Bf16 = c10::BFloat16;

// Enough that a call's fixed cost is small beside its product.
constexpr int kRows = 64;

// Rows of an operand as one matrix.
struct Left {
  const Bf16* data;
  int64_t ld;
};

// Rows that lie evenly are taken as they are, others are copied; an odd K is padded with zeros.
Left left_operand(int m, int64_t K, const Bf16* const* rows, Bf16* scratch) {
  const int64_t step = m > 1 ? rows[1] - rows[0] : K;
  bool even = K % 2 == 0 && step >= K;
  for (int i = 1; even && i < m; ++i) even = rows[i] == rows[i - 1] + step;
  if (even) return {rows[0], step};
  const int64_t ld = scratch_stride(K);
  for (int i = 0; i < m; ++i) {
    std::copy_n(rows[i], K, scratch + i * ld);
    if (K % 2) scratch[i * ld + K] = Bf16(0.0f);
  }
  return {scratch, ld};
}

void tile(int m, int64_t K, const Bf16* const* rows, const void* panels, int num_panels, int nv,
          float* c, int64_t ldc, bool accumulate, float* scratch) {
  const Left left = left_operand(m, K, rows, reinterpret_cast<Bf16*>(scratch));
  const int64_t width = nv * avx512_bf16::tables.bf16.vector, padded = (K + 1) / 2 * 2;
  for (int p = 0; p < num_panels; ++p) {
    const Bf16* panel = static_cast<const Bf16*>(panels) + p * padded * width;
    at::native::cpublas::brgemm(m, width, padded, left.ld, width, ldc, accumulate, left.data, panel,
                                c + p * width);
  }
  // The tile registers' layout is this thread's; whatever oneDNN runs next must not find it.
  at::native::cpublas::brgemm_release();
}

void tile_kmajor(int m, int64_t K, const void* a, int64_t lda, const void* panels, int num_panels,
                 int nv, float* c, int64_t ldc) {
  const auto& vectors = avx512_bf16::tables.bf16;
  for (int i = 0; i < m; i += vectors.max_rows) {
    vectors.tile_kmajor(std::min(vectors.max_rows, m - i), K, static_cast<const float*>(a) + i, lda,
                        panels, num_panels, nv, c + i * ldc, ldc);
  }
}

}  // namespace

const Kernels<Bf16>& table() {
  static const Kernels<Bf16> kernels = [] {
    Kernels<Bf16> table = avx512_bf16::tables.bf16;
    table.max_rows = kRows;
    table.tile = &tile;
    table.tile_kmajor = &tile_kmajor;
    return table;
  }();
  return kernels;
}

}  // namespace moe_kernels::cpu::brgemm
#endif

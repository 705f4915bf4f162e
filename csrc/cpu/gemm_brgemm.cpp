// bf16 GEMMs by PyTorch's brgemm, for CPUs with AMX, whose tiles do many times the arithmetic of
// vector registers. brgemm takes panels (K / 2, N, 2), so everything else is as on AVX-512 with
// bf16 dot products.
//
// A GEMM that has text rows always has kRows rows, filled up with zeros. brgemm generates a kernel
// for every number of rows, and a row's bits must not depend on which of them is used.
#include "gemm_tables.h"

#ifdef MOE_HAS_BRGEMM
#include <algorithm>

namespace moe_kernels::cpu::brgemm {
namespace {

using Bf16 = c10::BFloat16;

constexpr int kRows = 32;  // height of two tile registers

// Rows of an operand as one matrix.
struct Left {
  const Bf16* data;
  int64_t ld;
};

// Returns `count` rows: m from `rows`, then zeros. Adjacent rows need no copy; an odd K is padded.
Left left_operand(int m, int count, int64_t K, const Bf16* const* rows, Bf16* scratch) {
  bool adjacent = K % 2 == 0 && m == count;
  for (int i = 1; adjacent && i < m; ++i) adjacent = rows[i] == rows[i - 1] + K;
  if (adjacent) return {rows[0], K};
  const int64_t ld = scratch_stride(K);
  for (int i = 0; i < count; ++i) {
    const int64_t copied = i < m ? K : 0;
    if (copied > 0) std::copy_n(rows[i], K, scratch + i * ld);
    std::fill(scratch + i * ld + copied, scratch + i * ld + K + K % 2, Bf16(0.0f));
  }
  return {scratch, ld};
}

// Resets the tile registers' layout, which belongs to the thread: oneDNN must not find ours later.
struct ReleaseTiles {
  ~ReleaseTiles() { at::native::cpublas::brgemm_release(); }
};

void tile(int m, int64_t K, const Bf16* const* rows, const void* panels, int num_panels, int nv,
          float* c, int64_t ldc, bool accumulate, float* scratch) {
  // Accumulation is for rows with an adapter, and other rows may lie beyond them.
  const int count = accumulate ? m : kRows;
  const Left left = left_operand(m, count, K, rows, reinterpret_cast<Bf16*>(scratch));
  const int64_t width = nv * avx512_bf16::tables.bf16.vector, padded = K + K % 2;
  const ReleaseTiles release;
  for (int p = 0; p < num_panels; ++p) {
    const Bf16* panel = static_cast<const Bf16*>(panels) + p * padded * width;
    at::native::cpublas::brgemm(count, width, padded, left.ld, width, ldc, accumulate, left.data,
                                panel, c + p * width);
  }
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

bool works() {
  const Bf16 a[2] = {}, b[32] = {};
  float c[16];
  try {
    const ReleaseTiles release;
    at::native::cpublas::brgemm(1, 16, 2, 2, 16, 16, false, a, b, c);
  } catch (const c10::Error&) {  // oneDNN is switched off, or limited to a smaller instruction set
    return false;
  }
  return true;
}

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

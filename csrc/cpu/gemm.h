// The GEMM engine of the CPU backend.
//
// Every element of C is a sum of chains of fused multiply-adds over k, broken at fixed steps,
// independent of the number of rows in the call, the row's place among them and the values of the
// others. (brgemm uses the order of one kernel with a fixed number of rows.) Hence a text row's
// output is a function of that row alone: library GEMMs choose their kernel, and so their order of
// summation, by the number of rows.
//
// A is read through one pointer per row, so gathered rows need no copy. B is packed by panels of
// one or two vectors of columns into scratch memory that lives as long as the work item; where few
// rows use each weight (tile_direct) it is read without packing, and each lane of a vector is a
// chain over its own values of k.
#pragma once

#include <ATen/OpMathType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace moe_kernels::cpu {

// float for the low precisions and float itself, double for double.
template <typename scalar_t>
using acc_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// Elements between rows copied to scratch: an odd number of cache lines, so that rows never share a
// cache set.
inline int64_t scratch_stride(int64_t K) { return (K + 15) / 16 / 2 * 32 + 16; }

// Rows of B (K, n) that are packed for all panels of a work item before the next rows, so that each
// row is read in one stretch. Even, for the pairs of bf16.
constexpr int64_t kPackRows = 16;

// What an expert computes between its two products; moe_kernels/ops/moe_mlp/activation.py has the
// formulas.
enum class ActKind { silu, gelu, gelu_tanh, relu_squared, clamped_swiglu };

struct Activation {
  ActKind kind;
  bool gated;
  double alpha, limit, shift;  // of clamped_swiglu
};

// One instruction set's kernels for operands stored as scalar_t.
template <typename scalar_t>
struct Kernels {
  using acc_t = acc_type<scalar_t>;

  int max_rows;        // rows of C in one call
  int vector;          // acc_t elements in one vector
  int k_multiple;      // K is padded to this in a panel (2: pairs of bf16)
  int element_bytes;   // size of a packed element

  // panel (K, nv * vector) from columns [0, n) of B = W^T, W (n, K) with row stride ld.
  void (*pack_transposed)(const scalar_t* w, int64_t ld, int64_t n, int64_t K, int nv, void* panel);
  // The same from B (K, n) with row stride ld.
  void (*pack)(const scalar_t* b, int64_t ld, int64_t n, int64_t K, int nv, void* panel);
  // The same from K gathered rows, columns [column, column + n); `total` rows exist for
  // prefetching.
  void (*pack_rows)(const scalar_t* const* rows, int64_t column, int64_t n, int64_t K,
                    int64_t total, int nv, void* panel);
  // Operand A of tile_kmajor from left (K, n), both with ld elements between values of k.
  void (*pack_left)(const acc_t* left, int64_t ld, int64_t n, int64_t K, void* packed);

  // C (m, num_panels * nv * vector) = or += A (m, K) @ panels; m <= max_rows.
  // All max_rows rows of C may be written, unless it accumulates.
  // scratch: max_rows * scratch_stride(K) elements, for rows that are copied or widened first.
  void (*tile)(int m, int64_t K, const scalar_t* const* rows, const void* panels, int num_panels,
               int nv, acc_t* c, int64_t ldc, bool accumulate, acc_t* scratch);
  // C += A @ panels, A as packed by pack_left: from its column a on, lda between values of k.
  void (*tile_kmajor)(int m, int64_t K, const void* a, int64_t lda, const void* panels,
                      int num_panels, int nv, acc_t* c, int64_t ldc);
  // C (m, n) = A @ W^T from unpacked W (n, K), with row stride ld; m <= max_rows. Writes up to
  // three columns beyond n. next: the rows that will be read after these, or null.
  void (*tile_direct)(int m, int64_t K, const scalar_t* const* rows, const scalar_t* w, int64_t ld,
                      int64_t n, const scalar_t* next, acc_t* c, int64_t ldc);

  // dst (n,) = scalar_t(scale * value) of packed weights: codes of NF4, n even, or float8_e4m3fn.
  void (*unpack_nf4)(const uint8_t* codes, float scale, scalar_t* dst, int64_t n);
  void (*unpack_fp8)(const uint8_t* stored, float scale, scalar_t* dst, int64_t n);
  // dst = scalar_t(scale * src) and back.
  void (*store)(const acc_t* src, acc_t scale, scalar_t* dst, int64_t n);
  void (*load)(const scalar_t* src, acc_t scale, acc_t* dst, int64_t n);
  // dst[i] (n,) += scale[i] * row i of c, for m rows.
  void (*add_rows)(int m, int64_t n, const acc_t* c, int64_t ldc, const acc_t* scale,
                   acc_t* const* dst);
  // dst += src.
  void (*add)(const scalar_t* src, acc_t* dst, int64_t n);
  // act = f(gate) * up from gate and up as rounded to scalar_t; both are written when not null.
  // Without a gate, act = f(gate), and what is said of up is left out here and below.
  void (*activate)(const Activation& form, const acc_t* gate, const acc_t* up, scalar_t* gate_out,
                   scalar_t* up_out, scalar_t* act, int64_t n);
  // Given d(act) / weight, returns <dact, act>; writes d(gate) and d(up), and act, when not null.
  acc_t (*activate_backward)(const Activation& form, const acc_t* dact, acc_t weight,
                             const scalar_t* gate, const scalar_t* up, scalar_t* dgate,
                             scalar_t* dup, scalar_t* act, int64_t n);

  int64_t panel_bytes(int64_t K, int nv) const {
    const int64_t padded = (K + k_multiple - 1) / k_multiple * k_multiple;
    return padded * nv * vector * element_bytes;
  }
};

// Returns the kernels for the CPU that this process runs on.
template <typename scalar_t>
const Kernels<scalar_t>& kernels();

// Sets whether bf16 goes through brgemm on a CPU with bf16 dot products; by default it does on a
// CPU with AMX. Raises once the kernels have been chosen.
void prefer_brgemm(bool on);

// Names for moe_kernels._C.cpu_features(): what the CPU has, and which kernels were chosen.
std::vector<std::string> cpu_features();
std::string gemm_level();

}  // namespace moe_kernels::cpu

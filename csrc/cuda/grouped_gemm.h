// Launches of the grouped GEMMs of routed rows and their experts' weights, epilogues included; no
// torch header, so that nvcc checks them alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "grouped_gemm_shapes.h"

namespace moe_kernels::cuda {

// Operands of left W + s u V, row by row. u has the compute dtype in the two GEMMs of the forward
// pass and is float32 in those of the backward pass; v is float32 or of the compute dtype. Parts of
// u are float32, and are added in order before the sum is rounded to the dtype of u.
struct GroupedGemm {
  const void* left;   // (T, size_k) where rows go by token, else (T * K, size_k)
  const void* stack;  // (num_base, ...), the frozen experts
  const void* extra;  // (num_experts - num_base, ...), the added ones, or null
  const int64_t* perm;      // (T * K)
  const int64_t* tiles;     // (3, num_tiles) of experts, the rows not dispatched after the last
  const int64_t* segments;  // (num_experts * (num_modalities + 1) + 1)
  const void* u;            // (T * K, rank), or (parts, T * K, rank), not scaled
  const void* v;            // (num_modalities, experts_of_v, ...)
  const float* scaling;     // (num_modalities)
  void* sum;      // (T * K, rank), gets u, zeros in rows without a low-rank term; or null
  int num_rows;   // T * K
  int num_parts;  // of u; 0: u is whole
  int num_tiles;
  int num_base;
  int num_experts;
  int num_modalities;
  int experts_of_v;  // num_base, or 1: all experts share it
  int rank;          // 0: no low-rank term
  int size_k;
  int size_n;
  int top_k;
};

// u = out A^T of what a GEMM stores, in parts: one for each warp across its columns.
struct PartsOfU {
  const void* a;  // (num_modalities, experts, rank, size_n), float32 or of the compute dtype
  float* parts;   // (gate_up_parts(size_n, block_m), T * K, rank); rows with an adapter are written
  int experts;    // num_base, or 1: all experts share A
  int rank;       // 0: no parts
  bool is_float;
};

// What dA' leaves for the gradients of adapters, of rows with one: du1, and sums over the rows of a
// tile. A pair of an expert and a modality has a slot for each tile that has rows of it, see
// first_folded. Where a pointer is null there is no need.
struct AdapterGradients {
  const void* u1;        // (T * K, rank), of the compute dtype
  const void* b1;        // (num_modalities, num_base, 2 * size_n, rank)
  const float* scaling;  // (num_modalities), of u1
  float* du1;            // (parts, T * K, rank): a part for each tile of columns
  float* d_b1;           // (slots, 2 * size_n, rank)
  float* d_a2;           // (slots, rank of u, size_n)
  int rank;              // of u1; 0: nothing of all this
  bool b_is_float;       // else of the compute dtype
};

struct ActBackward {
  const void* weights;  // (T, K), float32 or of the compute dtype
  const void* pre;      // (T * K, 2 * size_n), the pre-activation
  void* d_pre;          // (T * K, 2 * size_n)
  void* act;            // (T * K, size_n); only requested rows are written
  float* dots;          // (grouped_gemm_parts(size_n, block_m), num_rows), <dA', a> by slot
  int64_t num_rows;     // T * K
  bool weights_are_float;
  bool act_of_adapted;  // rows that have a low-rank term
  bool act_of_added;    // rows of added experts
  AdapterGradients adapters;
};

// Computes act = silu(gate) * up of (gate, up) = x W^T + s u B^T, and stores gate and up, rounded,
// if pre is not null. Rows that were not dispatched get zeros. left: x by token (size_k hidden);
// stack (E, 2 * size_n, size_k); v = B (M, E, 2 * size_n, rank). Parts of u2 = act A2^T need a rank
// of u.
cudaError_t launch_gate_up(const GroupedGemm& gemm, void* pre, void* act, const PartsOfU& u2,
                           Scalar dtype, Scalar v, int block_m, cudaStream_t stream);

// out (T * K, size_n) = left W^T + s u B^T; rows that were not dispatched are not written.
// left: sorted rows; stack (E, size_n, size_k); v = B (M, E, size_n, rank).
cudaError_t launch_down(const GroupedGemm& gemm, void* out, Scalar dtype, Scalar v, int block_m,
                        cudaStream_t stream);

// out (T * K, size_n) = left W + s u A, u in float32.
// left: sorted rows; stack (E, size_k, size_n); v = A (M, E or 1, rank, size_n).
cudaError_t launch_d_rows(const GroupedGemm& gemm, void* out, Scalar dtype, Scalar v, int block_m,
                          cudaStream_t stream);

// Computes dA' = dO W + s u A, u in float32. It stores <dA', a>, the gradient of the pre-activation
// for weight * dA', and on requested rows a = silu(gate) * up of the rounded pre-activation. Rows
// that were not dispatched get a <dA', a> of 0, and nothing else.
// left: dO by token; stack (E, size_k, size_n); v = A (M, E or 1, rank, size_n).
cudaError_t launch_act_backward(const GroupedGemm& gemm, const ActBackward& act, Scalar dtype,
                                Scalar v, int block_m, cudaStream_t stream);

}  // namespace moe_kernels::cuda

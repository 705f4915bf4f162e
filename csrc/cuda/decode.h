// Launches of a layer for a few tokens, without dispatch; no torch header, so that nvcc checks them
// alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "decode_shapes.h"
#include "scalar.h"

namespace moe_kernels::cuda {

// Operands of a layer. A pair of adapters is float32 or of the compute dtype.
struct Decode {
  const int64_t* topk_ids;      // (T, K)
  const int64_t* modality_ids;  // (T), or null: all are of the base modality
  const void* topk_weights;     // (T, K), float32 or of the compute dtype
  const void* hidden_states;    // (T, hidden)
  const void* gate_up;          // (num_base, 2 * inter, hidden), the frozen experts
  const void* down;             // (num_base, hidden, inter)
  // (num_experts - num_base, ...), the added ones, or null: float32 or of the compute dtype
  const void* extra_gate_up;
  const void* extra_down;
  const void* a1;         // (num_modalities, experts_of_a1, rank1, hidden)
  const void* b1;         // (num_modalities, num_base, 2 * inter, rank1)
  const float* scaling1;  // (num_modalities)
  const void* a2;         // (num_modalities, experts_of_a2, rank2, inter)
  const void* b2;         // (num_modalities, num_base, hidden, rank2)
  const float* scaling2;
  void* act;     // (T * K, inter), by slot; rows that are not dispatched are not written
  float* parts;  // (T * K, decode_parts(inter), rank2): a A2^T by columns of a; adapted rows alone
  void* out;     // (T, hidden)
  int tokens;
  int top_k;
  int num_base;
  int num_experts;
  int num_modalities;
  int hidden;
  int inter;
  int rank1;  // 0: no low-rank term
  int rank2;
  int experts_of_a1;  // num_base, or 1: all experts share it
  int experts_of_a2;
  bool weights_are_float;
  bool extra_is_float;
  bool is_float1;  // a1 and b1
  bool is_float2;
};

// Computes the weighted sum of each token's experts, SwiGLU between rows [gate; up] and down, with
// the low-rank terms of adapted rows. Rows of padding and of ids out of range are left out.
//
// There are two launches, of which the second may start before the first has ended. `dtype` is
// bfloat16 or float16. Sizes must be those of decode_takes; hidden_states, the experts' weights, a1
// and act must be aligned to 16 bytes.
cudaError_t launch_decode(const Decode& decode, Scalar dtype, cudaStream_t stream);

}  // namespace moe_kernels::cuda

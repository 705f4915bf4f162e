// The weighted sum of each token's rows: reads every row once, 16 bytes a thread and access.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "combine.h"

namespace moe_kernels::cuda {
namespace {

constexpr int kThreads = 256;

__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ T from_float(float value);
template <>
__device__ float from_float(float value) {
  return value;
}
template <>
__device__ __half from_float(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __nv_bfloat16 from_float(float value) {
  return __float2bfloat16_rn(value);
}

template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Several tokens a block where rows are short: a thread has one vector of one token.
template <typename T, typename W>
__global__ void __launch_bounds__(kThreads) combine_kernel(Combine given) {
  using Vec = Vector<T>;
  const int vectors = given.width / Vec::kSize;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t token = index / vectors;
  if (token >= given.num_tokens) return;
  const int column = static_cast<int>(index % vectors);
  const int64_t num_rows = *given.num_rows;
  const auto* rows = static_cast<const Vec*>(given.rows);
  const auto* weights = static_cast<const W*>(given.weights);
  float sums[Vec::kSize] = {};
#pragma unroll 4
  for (int k = 0; k < given.top_k; ++k) {
    const int64_t slot = token * given.top_k + k;
    const int64_t place = given.inv_perm[slot];
    if (place >= num_rows) continue;
    const Vec row = rows[place * vectors + column];
    const float weight = weights == nullptr ? 1.0f : to_float(weights[slot]);
#pragma unroll
    for (int i = 0; i < Vec::kSize; ++i) sums[i] += weight * to_float(row.values[i]);
  }
  Vec result;
#pragma unroll
  for (int i = 0; i < Vec::kSize; ++i) result.values[i] = from_float<T>(sums[i]);
  static_cast<Vec*>(given.out)[token * vectors + column] = result;
}

template <typename T>
void launch(const Combine& combine, Scalar weights, cudaStream_t stream) {
  const int64_t vectors = combine.num_tokens * (combine.width / Vector<T>::kSize);
  const auto blocks = static_cast<unsigned>((vectors + kThreads - 1) / kThreads);
  switch (weights) {
    case Scalar::kFloat:
      return combine_kernel<T, float><<<blocks, kThreads, 0, stream>>>(combine);
    case Scalar::kHalf:
      return combine_kernel<T, __half><<<blocks, kThreads, 0, stream>>>(combine);
    case Scalar::kBFloat16:
      return combine_kernel<T, __nv_bfloat16><<<blocks, kThreads, 0, stream>>>(combine);
  }
}

}  // namespace

cudaError_t launch_combine(const Combine& combine, Scalar rows, Scalar weights,
                           cudaStream_t stream) {
  if (combine.num_tokens == 0) return cudaSuccess;
  switch (rows) {
    case Scalar::kFloat:
      launch<float>(combine, weights, stream);
      break;
    case Scalar::kHalf:
      launch<__half>(combine, weights, stream);
      break;
    case Scalar::kBFloat16:
      launch<__nv_bfloat16>(combine, weights, stream);
      break;
  }
  return cudaGetLastError();
}

}  // namespace moe_kernels::cuda

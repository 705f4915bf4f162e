// The weighted sum of each token's rows: reads every row once, 16 bytes a thread and access.
#include "combine.h"
#include "device.h"

namespace moe_kernels::cuda {
namespace {

constexpr int kThreads = 256;

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
cudaError_t launch_rows(const Combine& combine, Scalar weights, cudaStream_t stream) {
  const int64_t vectors = combine.num_tokens * (combine.width / Vector<T>::kSize);
  const auto blocks = static_cast<unsigned>((vectors + kThreads - 1) / kThreads);
  switch (weights) {
    case Scalar::kFloat:
      return launch(combine_kernel<T, float>, blocks, kThreads, 0, stream, combine);
    case Scalar::kHalf:
      return launch(combine_kernel<T, __half>, blocks, kThreads, 0, stream, combine);
    case Scalar::kBFloat16:
      return launch(combine_kernel<T, __nv_bfloat16>, blocks, kThreads, 0, stream, combine);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_combine(const Combine& combine, Scalar rows, Scalar weights,
                           cudaStream_t stream) {
  switch (rows) {
    case Scalar::kFloat:
      return launch_rows<float>(combine, weights, stream);
    case Scalar::kHalf:
      return launch_rows<__half>(combine, weights, stream);
    case Scalar::kBFloat16:
      return launch_rows<__nv_bfloat16>(combine, weights, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace moe_kernels::cuda

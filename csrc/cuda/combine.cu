// Weighted sum of each token's rows. Every row is read once, 16 bytes per thread and access.
#include "combine.h"
#include "device.h"

namespace moe_kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 4;  // rows being loaded at once

// A thread has one vector of one token, so a block has several tokens where rows are short.
template <typename T, typename W>
__global__ void __launch_bounds__(kThreads) combine_kernel(Combine args) {
  using Vec = Vector<T>;
  const int vectors = args.width / Vec::kSize;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t token = index / vectors;
  if (token >= args.num_tokens) return;
  const int column = static_cast<int>(index % vectors);
  const int64_t num_rows = *args.num_rows;
  const auto* rows = static_cast<const Vec*>(args.rows);
  const auto* weights = static_cast<const W*>(args.weights);
  float sums[Vec::kSize] = {};
  for (int k = 0; k < args.top_k; k += kAhead) {
    const int64_t first = token * args.top_k + k;
    int64_t places[kAhead];
    Vec loaded[kAhead];
    float scales[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      places[i] = k + i < args.top_k ? args.inv_perm[first + i] : num_rows;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const bool present = places[i] < num_rows;
      loaded[i] = present ? rows[places[i] * vectors + column] : Vec{};
      scales[i] = !present || weights == nullptr ? 1.0f : to_float(weights[first + i]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (places[i] >= num_rows) continue;
#pragma unroll
      for (int j = 0; j < Vec::kSize; ++j) sums[j] += scales[i] * to_float(loaded[i].values[j]);
    }
  }
  Vec result;
#pragma unroll
  for (int i = 0; i < Vec::kSize; ++i) result.values[i] = from_float<T>(sums[i]);
  static_cast<Vec*>(args.out)[token * vectors + column] = result;
}

}  // namespace

#ifndef __CUDACC_RTC__
namespace {

template <typename T>
cudaError_t launch_rows(const Combine& combine, Scalar weights, cudaStream_t stream) {
  const int64_t vectors = combine.num_tokens * (combine.width / Vector<T>::kSize);
  const auto blocks = static_cast<unsigned>((vectors + kThreads - 1) / kThreads);
  switch (weights) {
    case Scalar::kFloat:
      return launch(MOE_KERNEL(combine_kernel, T, float), blocks, kThreads, 0, stream, combine);
    case Scalar::kHalf:
      return launch(MOE_KERNEL(combine_kernel, T, __half), blocks, kThreads, 0, stream, combine);
    case Scalar::kBFloat16:
      return launch(MOE_KERNEL(combine_kernel, T, __nv_bfloat16), blocks, kThreads, 0, stream,
                    combine);
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
#endif

}  // namespace moe_kernels::cuda

// GEMMs of routed rows and their experts' weights. One kernel serves all of them; its epilogue type
// says what is multiplied and how the sums are stored.
#include "grouped_gemm.h"

#include "grouped_gemm_mainloop.h"

namespace moe_kernels::cuda {
namespace {

constexpr int kGroupM = 8;  // row tiles that use the same weights one after the other

// act = silu(gate) * up, and the pre-activation if it is saved.
template <typename T>
struct GateUp {
  static constexpr bool kTransposed = true, kGated = true, kByToken = true;
  static constexpr bool kAllRows = true;  // rows that were not dispatched get zeros
  T* pre;  // (T * K, 2 * size_n), or null
  T* act;  // (T * K, size_n)

  // Stores the rows from low to high of a tile.
  template <typename Loop>
  __device__ void store(const Loop& loop, const GroupedGemm& args, const ExpertTile& tile, int low,
                        int high) const {
    const int size_n = args.size_n;
    T* own_act = act + loop.own(tile, size_n);
    T* own_pre = pre + loop.own(tile, 2 * size_n);
    const bool has_columns = tile.column + loop.column_of(loop.lane() % 4) < size_n;
#pragma unroll
    for (int i = 0; i < Loop::kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t gate[4], up[4], product[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* of_gate = &loop.acc[i][j][2 * half];
          const float* of_up = &loop.acc[i][j + 4][2 * half];
          gate[j] = pack<T>(of_gate[0], of_gate[1]);
          up[j] = pack<T>(of_up[0], of_up[1]);
          const float2 g = unpack<T>(gate[j]), u = unpack<T>(up[j]);
          product[j] = pack<T>(g.x * sigmoid(g.x) * u.x, g.y * sigmoid(g.y) * u.y);
        }
        const int row = loop.row_of(i, half), below = loop.below(i, half);
        const bool present = row >= low && row < high && has_columns;
        transpose_quad(product);
        if (present) store_words(own_act + below * size_n, product);
        if (pre == nullptr) continue;
        transpose_quad(gate);
        transpose_quad(up);
        if (present) store_words(own_pre + below * 2 * size_n, gate);
        if (present) store_words(own_pre + (below * 2 + 1) * size_n, up);
      }
    }
  }
};

// Stores the sums as rows.
template <typename T, bool kTransposed_>
struct Rows {
  static constexpr bool kTransposed = kTransposed_, kGated = false, kByToken = false;
  static constexpr bool kAllRows = false;
  T* out;  // (T * K, size_n)

  __device__ void pass_over(const GroupedGemm&, const Tile&, int) const {}

  template <typename Loop>
  __device__ void store(const Loop& loop, const GroupedGemm& args, const ExpertTile& tile, int low,
                        int high) const {
    T* own = out + loop.own(tile, args.size_n);
    const int n = tile.column + loop.column_of(loop.lane() % 4);
#pragma unroll
    for (int i = 0; i < Loop::kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = loop.row_of(i, half);
#pragma unroll
        for (int j = 0; j < kTilesN; j += 4) {
          uint32_t words[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float* values = &loop.acc[i][j + e][2 * half];
            words[e] = pack<T>(values[0], values[1]);
          }
          transpose_quad(words);
          if (row >= low && row < high && n + 8 * j < args.size_n) {
            store_words(own + loop.below(i, half) * args.size_n + 8 * j, words);
          }
        }
      }
    }
  }
};

// Gradients of one column of the pre-activation.
struct ActGradient {
  float gate, up, act;

  __device__ ActGradient(float pre_gate, float pre_up, float d_act) {
    const float sig = sigmoid(pre_gate), silu = pre_gate * sig;
    act = silu * pre_up;
    up = d_act * silu;
    gate = d_act * pre_up * sig * (1.0f + pre_gate * (1.0f - sig));
  }
};

// Computes the gradient of the pre-activation, a, and <dA', a> from dA'.
template <typename T>
struct ActGradients {
  static constexpr bool kTransposed = false, kGated = false, kByToken = true;
  static constexpr bool kAllRows = false;
  ActBackward with;

  // Handles 32 columns of a row from fragment j on; returns this lane's part of <dA', a>.
  template <typename Loop>
  __device__ float columns(const Loop& loop, const GroupedGemm& args, const ExpertTile& tile,
                           int i, int half, int j, bool present, bool keep_act,
                           float weight) const {
    const int size_n = args.size_n, row = loop.below(i, half);
    const int64_t own = loop.own(tile, 2 * size_n);
    const int of_gate = row * 2 * size_n + 8 * j, of_up = of_gate + size_n;
    const bool stored = present && tile.column + loop.column_of(loop.lane() % 4) + 8 * j < size_n;
    uint32_t gate[4] = {}, up[4] = {}, act[4];
    if (stored) {
      load_words(static_cast<const T*>(with.pre) + own + of_gate, gate);
      load_words(static_cast<const T*>(with.pre) + own + of_up, up);
    }
    transpose_quad(gate);
    transpose_quad(up);
    float dot = 0.0f;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float* d_act = &loop.acc[i][j + e][2 * half];
      const float2 g = unpack<T>(gate[e]), u = unpack<T>(up[e]);
      const ActGradient first(g.x, u.x, weight * d_act[0]), second(g.y, u.y, weight * d_act[1]);
      gate[e] = pack<T>(first.gate, second.gate);
      up[e] = pack<T>(first.up, second.up);
      act[e] = pack<T>(first.act, second.act);
      const float2 a = unpack<T>(act[e]);
      // Beyond the last column a is 0, but 0 * Inf is not.
      if (tile.column + loop.column_of(j + e) < size_n) {
        dot += d_act[0] * a.x + d_act[1] * a.y;
      }
    }
    transpose_quad(gate);
    transpose_quad(up);
    if (stored) store_words(static_cast<T*>(with.d_pre) + own + of_gate, gate);
    if (stored) store_words(static_cast<T*>(with.d_pre) + own + of_up, up);
    if (!keep_act) return dot;
    transpose_quad(act);
    T* own_act = static_cast<T*>(with.act) + loop.own(tile, size_n);
    if (stored) store_words(own_act + row * size_n + 8 * j, act);
    return dot;
  }

  __device__ float weight_of(int64_t slot) const {
    return with.weights_are_float ? static_cast<const float*>(with.weights)[slot]
                                  : to_float(static_cast<const T*>(with.weights)[slot]);
  }

  // Rows that were not dispatched get no dot.
  __device__ void pass_over(const GroupedGemm& args, const Tile& tile, int part) const {
    for (int64_t row = tile.first + threadIdx.x; row < tile.end; row += blockDim.x) {
      with.dots[part * with.num_rows + args.perm[row]] = 0.0f;
    }
  }

  template <typename Loop>
  __device__ void store(const Loop& loop, const GroupedGemm& args, const ExpertTile& tile, int low,
                        int high) const {
    // (kWarpsN, kBlockM), behind the stages
    auto* dots = reinterpret_cast<float*>(loop.stages() + Loop::kStages);
    const bool keep_act = low < tile.base ? with.act_of_added && tile.expert >= args.num_base
                                          : with.act_of_adapted;
#pragma unroll
    for (int i = 0; i < Loop::kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = loop.row_of(i, half);
        const bool present = row >= low && row < high;
        const float weight = present ? weight_of(args.perm[tile.first + row]) : 0.0f;
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < kTilesN; j += 4) {
          dot += columns(loop, args, tile, i, half, j, present, keep_act, weight);
        }
        dot += __shfl_xor_sync(0xffffffffu, dot, 1);
        dot += __shfl_xor_sync(0xffffffffu, dot, 2);
        if (loop.lane() % 4 == 0) dots[loop.warp_n() * Loop::kBlockM + row] = dot;
      }
    }
    __syncthreads();
    for (int row = low + threadIdx.x; row < high; row += Loop::kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < Loop::kWarpsN; ++warp) sum += dots[warp * Loop::kBlockM + row];
      with.dots[tile.part * with.num_rows + args.perm[tile.first + row]] = sum;
    }
    __syncthreads();
  }
};

__device__ int base_rows(const GroupedGemm& args, const ExpertTile& tile) {
  if (args.rank == 0 || tile.expert >= args.num_base) return tile.count;
  const int64_t end = args.segments[tile.expert * (args.num_modalities + 1) + 1] - tile.first;
  return static_cast<int>(end < 0 ? 0 : end < tile.count ? end : tile.count);
}

// kGroupM row tiles share their weights' tiles in the L2.
__device__ int2 tile_ids(int num_tiles_m, int num_tiles_n) {
  const int id = blockIdx.x, per_group = kGroupM * num_tiles_n;
  const int first = id / per_group * kGroupM;
  const int size = num_tiles_m - first < kGroupM ? num_tiles_m - first : kGroupM;
  return {first + id % per_group % size, id % per_group / size};
}

template <typename T>
__device__ const T* matrix_of(const GroupedGemm& args, int64_t expert, int64_t size) {
  if (expert < args.num_base) return static_cast<const T*>(args.stack) + expert * size;
  return static_cast<const T*>(args.extra) + (expert - args.num_base) * size;
}

template <typename Loop, typename Epilogue>
__global__ void __launch_bounds__(Loop::kThreads, Loop::kResident)
    grouped_gemm_kernel(GroupedGemm args, Epilogue epilogue, bool v_is_float) {
  const int2 ids =
      tile_ids(args.num_tiles, (args.size_n + Loop::kColumns - 1) / Loop::kColumns);
  const Tile of_map = tile_of(args.tiles, ids.x, args.num_tiles);
  const bool dispatched = of_map.group < args.num_experts;
  if (of_map.first >= of_map.end) return;
  if constexpr (!Epilogue::kAllRows) {
    if (!dispatched) return epilogue.pass_over(args, of_map, ids.y);
  }
  ExpertTile tile{of_map.group, of_map.first, static_cast<int>(of_map.end - of_map.first), 0,
                  ids.y * Loop::kColumns, ids.y};
  tile.base = base_rows(args, tile);
  Loop loop;
  if (dispatched) {
    const int64_t size = static_cast<int64_t>(args.size_k) * args.size_n;
    loop.run(args, tile,
             matrix_of<typename Loop::T>(args, tile.expert, Epilogue::kGated ? 2 * size : size),
             Epilogue::kByToken);
  }
  // Rows of the base modality are stored first, since 0 * Inf would poison them. Two calls instead
  // of a loop: for a loop the compiler keeps more addresses than there are registers.
  if (tile.base > 0) epilogue.store(loop, args, tile, 0, tile.base);
  if (tile.base == tile.count) return;
  if (v_is_float) {
    loop.template extend<float>(args, tile);
  } else {
    loop.template extend<typename Loop::T>(args, tile);
  }
  epilogue.store(loop, args, tile, tile.base, tile.count);
}

}  // namespace

#ifndef __CUDACC_RTC__
namespace {

template <typename T, int kBlockM, typename Epilogue>
cudaError_t launch_tiles(const GroupedGemm& gemm, const Epilogue& epilogue, bool v_is_float,
                         cudaStream_t stream) {
  using Loop = Mainloop<T, kBlockM, Epilogue::kTransposed, Epilogue::kGated>;
  const int64_t blocks =
      static_cast<int64_t>(gemm.num_tiles) * ceil_div(gemm.size_n, Loop::kColumns);
  if (blocks == 0) return cudaSuccess;
  constexpr size_t bytes = Loop::kStages * sizeof(typename Loop::Stage) +
                           sizeof(float) * Loop::kWarpsN * kBlockM;
  static_assert(bytes <= kMaxSharedBytes);
  return launch(MOE_KERNEL(grouped_gemm_kernel, Loop, Epilogue), static_cast<unsigned>(blocks),
                Loop::kThreads, bytes, stream, gemm, epilogue, v_is_float);
}

template <typename T, typename Epilogue>
cudaError_t launch_block(const GroupedGemm& gemm, const Epilogue& epilogue, bool v_is_float,
                         int block_m, cudaStream_t stream) {
  switch (block_m) {
    case 16:
      return launch_tiles<T, 16>(gemm, epilogue, v_is_float, stream);
    case 64:
      return launch_tiles<T, 64>(gemm, epilogue, v_is_float, stream);
    case 128:
      return launch_tiles<T, 128>(gemm, epilogue, v_is_float, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

// `make` gives the epilogue of a dtype; its argument is a value of that dtype.
template <typename Make>
cudaError_t launch_gemm(const GroupedGemm& gemm, Make make, Scalar dtype, Scalar v, int block_m,
                        cudaStream_t stream) {
  if (!grouped_gemm_supports(dtype, gemm.size_k, gemm.size_n) ||
      (gemm.rank > 0 && v != Scalar::kFloat && v != dtype)) {
    return cudaErrorInvalidValue;
  }
  const bool v_is_float = v == Scalar::kFloat;
  return dtype == Scalar::kHalf
             ? launch_block<__half>(gemm, make(__half()), v_is_float, block_m, stream)
             : launch_block<__nv_bfloat16>(gemm, make(__nv_bfloat16()), v_is_float, block_m,
                                           stream);
}

}  // namespace

cudaError_t launch_gate_up(const GroupedGemm& gemm, void* pre, void* act, Scalar dtype, Scalar v,
                           int block_m, cudaStream_t stream) {
  const auto make = [&](auto value) {
    using T = decltype(value);
    return GateUp<T>{static_cast<T*>(pre), static_cast<T*>(act)};
  };
  return launch_gemm(gemm, make, dtype, v, block_m, stream);
}

cudaError_t launch_down(const GroupedGemm& gemm, void* out, Scalar dtype, Scalar v, int block_m,
                        cudaStream_t stream) {
  const auto make = [&](auto value) {
    using T = decltype(value);
    return Rows<T, true>{static_cast<T*>(out)};
  };
  return launch_gemm(gemm, make, dtype, v, block_m, stream);
}

cudaError_t launch_d_rows(const GroupedGemm& gemm, void* out, Scalar dtype, Scalar v, int block_m,
                          cudaStream_t stream) {
  const auto make = [&](auto value) {
    using T = decltype(value);
    return Rows<T, false>{static_cast<T*>(out)};
  };
  return launch_gemm(gemm, make, dtype, v, block_m, stream);
}

cudaError_t launch_act_backward(const GroupedGemm& gemm, const ActBackward& act, Scalar dtype,
                                Scalar v, int block_m, cudaStream_t stream) {
  const auto make = [&](auto value) { return ActGradients<decltype(value)>{act}; };
  return launch_gemm(gemm, make, dtype, v, block_m, stream);
}
#endif

}  // namespace moe_kernels::cuda

// Epilogues of the grouped GEMMs: what is multiplied, and how a tile's sums are stored. They serve
// every main loop that keeps its sums as fragments of mma.m16n8:
//   acc[i][j][2 * half + e] is row row_of(i, half), column column_of(j) + lane % 4 * 2 + e.
#pragma once

#include <type_traits>

#include "adapter_tile.h"
#include "grouped_gemm.h"
#include "grouped_gemm_tiles.h"
#include "parts_of_u.h"

namespace moe_kernels::cuda {

// act = silu(gate) * up, the pre-activation if it is saved, and parts of u2 = act A2^T.
template <typename T>
struct GateUp {
  static constexpr bool kTransposed = true, kGated = true, kByToken = true;
  static constexpr bool kAllRows = true;  // rows that were not dispatched get zeros
  static constexpr bool kLong = false;    // whether storing takes as long as multiplying
  static constexpr bool kParts = false;   // whether u may come in parts, and its sum is wanted
  static constexpr int kScratch = 0;      // bytes of shared memory beside the main loop's
  T* pre;  // (T * K, 2 * size_n), or null
  T* act;  // (T * K, size_n)
  PartsOfU u2;

  template <typename Loop>
  __device__ void store(const Loop& loop, const GroupedGemm& args, const ExpertTile& tile, int low,
                        int high) const {
    const int size_n = args.size_n;
    T* own_act = act + loop.own(tile, size_n);
    T* own_pre = pre + loop.own(tile, 2 * size_n);
    const int n = tile.column + loop.column_of(loop.lane() % 4);
    constexpr int kGate = Loop::kTilesN / 2;  // fragments
    Stored<Loop, kGate> stored;
#pragma unroll
    for (int i = 0; i < Loop::kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = loop.row_of(i, half), below = loop.below(i, half);
#pragma unroll
        for (int first = 0; first < kGate; first += 4) {
          uint32_t gate[4], up[4], product[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float* of_gate = &loop.acc[i][first + j][2 * half];
            const float* of_up = &loop.acc[i][first + j + kGate][2 * half];
            gate[j] = pack<T>(of_gate[0], of_gate[1]);
            up[j] = pack<T>(of_up[0], of_up[1]);
            const float2 g = unpack<T>(gate[j]), u = unpack<T>(up[j]);
            product[j] = pack<T>(g.x * sigmoid(g.x) * u.x, g.y * sigmoid(g.y) * u.y);
          }
          const bool present = row >= low && row < high && n + 8 * first < size_n;
          transpose_quad(product);
          if (present) store_words(own_act + below * size_n + 8 * first, product);
          stored.keep(i, half, first, product, present);
          if (pre == nullptr) continue;
          transpose_quad(gate);
          transpose_quad(up);
          if (present) store_words(own_pre + below * 2 * size_n + 8 * first, gate);
          if (present) store_words(own_pre + (below * 2 + 1) * size_n + 8 * first, up);
        }
      }
    }
    if (u2.rank > 0 && high > tile.base) stored.multiply(u2, args, tile);
  }
};

// Stores the sums as rows.
template <typename T, bool kTransposed_>
struct Rows {
  static constexpr bool kTransposed = kTransposed_, kGated = false, kByToken = false;
  static constexpr bool kAllRows = false, kLong = false, kParts = true;
  static constexpr int kScratch = 0;
  T* out;  // (T * K, size_n)

  // Rows that were not dispatched get a u of zeros.
  __device__ void pass_over(const GroupedGemm& args, const Tile& tile, int first_part, int,
                            int thread, int num_threads) const {
    if (args.sum == nullptr || first_part > 0) return;
    using U = std::conditional_t<kTransposed, T, float>;
    for (int64_t k = tile.first * args.rank + thread; k < tile.end * args.rank; k += num_threads) {
      static_cast<U*>(args.sum)[k] = from_float<U>(0.0f);
    }
  }

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
        for (int j = 0; j < Loop::kTilesN; j += 4) {
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

// Computes the gradient of the pre-activation, a, and <dA', a> from dA'. kFolds: and what the
// gradients of adapters need of these, see AdapterTile.
template <typename T, bool kFolds>
struct ActGradients {
  static constexpr bool kTransposed = false, kGated = false, kByToken = true;
  static constexpr bool kAllRows = false, kLong = true, kParts = false;
  static constexpr int kScratch = kFolds ? 2 * static_cast<int>(sizeof(FoldedRows<T>)) : 0;
  ActBackward with;

  // Handles 32 columns of a row: fragments j to j + 3, `past` columns further on. Returns this
  // lane's part of <dA', a>. kShares: writes the gradients and a to shared memory as well, with
  // zeros where there is no row or column; else gives a.
  template <bool kShares, typename Loop>
  __device__ float columns(Loop& loop, const GroupedGemm& args, const ExpertTile& tile, int i,
                           int half, int j, int past, bool present, float weight,
                           uint32_t (&act)[4]) const {
    const int size_n = args.size_n, row = loop.below(i, half);
    const int64_t own = loop.own(tile, 2 * size_n);
    const int of_gate = row * 2 * size_n + 8 * j + past, of_up = of_gate + size_n;
    const bool stored =
        present && tile.column + loop.column_of(loop.lane() % 4) + 8 * j + past < size_n;
    uint32_t gate[4] = {}, up[4] = {};
    if (stored) {
      // Read-only, or the compiler would wait for each group's loads behind the stores before it.
      load_words_once(static_cast<const T*>(with.pre) + own + of_gate, gate);
      load_words_once(static_cast<const T*>(with.pre) + own + of_up, up);
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
      if (tile.column + loop.column_of(j + e) + past < size_n) {
        dot += d_act[0] * a.x + d_act[1] * a.y;
      }
    }
    transpose_quad(gate);
    transpose_quad(up);
    if (stored) store_words(static_cast<T*>(with.d_pre) + own + of_gate, gate);
    if (stored) store_words(static_cast<T*>(with.d_pre) + own + of_up, up);
    if constexpr (kShares) {
      transpose_quad(act);
      auto& rows = AdapterTile<Loop>::shared();
      int own_row = loop.row_of(i, half);
      forget(own_row);
      const int at = AdapterTile<Loop>::Rows::at(own_row, loop.lane() % 4);
      write_words(rows.gate + at, gate, stored);
      write_words(rows.up + at, up, stored);
      write_words(rows.act + at, act, stored);
    }
    return dot;
  }

  template <typename Loop>
  __device__ void store_act(Loop& loop, const GroupedGemm& args, const ExpertTile& tile, int i,
                            int half, int j, bool present, uint32_t (&act)[4]) const {
    transpose_quad(act);
    T* own = static_cast<T*>(with.act) + loop.own(tile, args.size_n);
    if (present && tile.column + loop.column_of(loop.lane() % 4) + 8 * j < args.size_n) {
      store_words(own + loop.below(i, half) * args.size_n + 8 * j, act);
    }
  }

  // Stores <dA', a> of a row, of which `dot` is this lane's part.
  template <typename Loop>
  __device__ void store_dot(const Loop& loop, const GroupedGemm& args, const ExpertTile& tile,
                            int row, bool present, float dot) const {
    dot += __shfl_xor_sync(0xffffffffu, dot, 1);
    dot += __shfl_xor_sync(0xffffffffu, dot, 2);
    if (loop.lane() % 4 == 0 && present) {
      const int64_t part = tile.part * Loop::kWarpsN + loop.warp_n();
      with.dots[part * with.num_rows + args.perm[tile.first + row]] = dot;
    }
  }

  // Rows that were not dispatched get no dot.
  __device__ void pass_over(const GroupedGemm& args, const Tile& tile, int first_part,
                            int num_parts, int thread, int num_threads) const {
    for (int64_t row = tile.first + thread; row < tile.end; row += num_threads) {
      for (int part = first_part; part < first_part + num_parts; ++part) {
        with.dots[part * with.num_rows + args.perm[row]] = 0.0f;
      }
    }
  }

  template <typename Loop>
  __device__ void store(Loop& loop, const GroupedGemm& args, const ExpertTile& tile, int low,
                        int high) const {
    if constexpr (kFolds) {
      if (low >= tile.base) return store_and_fold(loop, args, tile, low, high);
    }
    const bool keep_act = low < tile.base ? with.act_of_added && tile.expert >= args.num_base
                                          : with.act_of_adapted;
#pragma unroll
    for (int i = 0; i < Loop::kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = loop.row_of(i, half);
        const bool present = row >= low && row < high;
        const float weight = present ? weight_of<T>(with, args.perm[tile.first + row]) : 0.0f;
        float dot = 0.0f;
#pragma unroll
        for (int j = 0; j < Loop::kTilesN; j += 4) {
          uint32_t act[4];
          dot += columns<false>(loop, args, tile, i, half, j, 0, present, weight, act);
          if (keep_act) store_act(loop, args, tile, i, half, j, present, act);
        }
        store_dot(loop, args, tile, row, present, dot);
      }
    }
  }

  // Does the same with adapted rows, 32 columns of all rows at a time.
  template <typename Loop>
  __device__ void store_and_fold(Loop& loop, const GroupedGemm& args, const ExpertTile& tile,
                                 int low, int high) const {
    AdapterTile<Loop> fold{args, with, tile};
    fold.write_weights(low, high);
#pragma unroll 1
    for (int past = 0; past < Loop::kColumns; past += 32) {
#pragma unroll
      for (int i = 0; i < Loop::kTilesM; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int row = loop.row_of(i, half);
          forget(row);
          uint32_t act[4];
          const float dot = columns<true>(loop, args, tile, i, half, 0, past,
                                    row >= low && row < high, fold.rows.weights[row], act);
          fold.add_dot(row, past == 0, dot);
        }
      }
      fold.add(tile.column + past);
      loop.move_sums();
    }
    fold.store_dots(low, high);
  }
};

}  // namespace moe_kernels::cuda

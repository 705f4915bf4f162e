// The decisions of a layer's forward and backward: made once, from shapes alone, so that a row's
// bits do not depend on the routing. Nothing here needs CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "grouped_gemm_shapes.h"
#include "tiles.h"
#include "wgrad_shapes.h"

namespace moe_kernels::cuda {

constexpr int64_t kAdapterBlock = 32;  // rows that a block of `shrink` takes at once

// Highest rank for which u2 comes in parts with gate_up. Each block of `down` reads its rows' parts
// again: of an engine's main loop that is rank / 192 of the bytes. At a higher rank a pass over the
// activation is cheaper.
constexpr int64_t kMaxRankOfParts = 32;

// Returns whether u2 comes in parts with gate_up. That launch finds rows with an adapter by its own
// rank.
inline bool gives_u2(int64_t num_rows, int64_t num_base, int64_t inter, int64_t rank1,
                     int64_t rank2) {
  const int64_t parts = gate_up_parts(inter, grouped_gemm_block_m(num_rows, num_base));
  return rank1 > 0 && rank2 > 0 && rank2 <= kMaxRankOfParts &&
         4 * parts * num_rows * rank2 <= kMaxBytesOfParts;
}

// Returns whether dA' folds the gradients of adapters: where its tiles are the engine's, and what
// it leaves takes no more memory than the activation, which then is not written, or 256 MiB.
inline bool folds_gradients(int64_t num_rows, int64_t num_base, int64_t modalities, int64_t inter,
                            int64_t rank1, int64_t rank2) {
  const int64_t block = grouped_gemm_block_m(num_rows, num_base);
  const int64_t slots = folded_slots(num_rows, num_base * modalities);
  const int64_t bytes = 4 * slots * inter * (2 * rank1 + rank2), act = 2 * num_rows * inter;
  return block >= kFoldedRows && rank1 > 0 && rank2 > 0 &&
         std::max(rank1, rank2) <= kMaxFoldedRank &&
         4 * grouped_gemm_parts(inter, block) * num_rows * rank1 <= kMaxBytesOfParts &&
         bytes <= std::max(kMaxBytesOfParts, act);
}

struct LayerShapes {
  int64_t tokens, top_k;
  int64_t hidden, inter;
  int64_t num_base, num_added;  // experts
  int64_t modalities;           // with adapters
  int64_t rank1, rank2;         // of gate_up and down, 0 without adapters

  int64_t rows() const { return tokens * top_k; }
  int64_t num_experts() const { return num_base + num_added; }
  int64_t segments_of_expert() const { return modalities + 1; }
};

// A tile map to make: groups of rows (num, period, stride, offset, width: see tiles.h), and rows
// of a tile.
struct MapRequest {
  int64_t groups[5];
  int64_t block;
};

struct Plan {
  MapRequest experts;  // of every expert, and of the rows that were not dispatched
  MapRequest pairs;    // of every pair (modality, expert)
  MapRequest chunks;   // the same in long tiles, for sums over rows
  MapRequest added;    // of every added expert, a tile each: there are blocks enough
  bool u2_in_parts;    // u2 comes with gate_up
  bool folds;          // du1, dB1 and dA2 come with dA'
  bool du_with_dB;     // else du1 comes with dB1

  explicit Plan(const LayerShapes& of)
      : experts{{of.num_experts() + 1, of.num_experts() + 1, of.segments_of_expert(), 0,
                 of.segments_of_expert()},
                // Added experts are left out: adding some changes no bit of other rows.
                grouped_gemm_block_m(of.rows(), of.num_base)},
        pairs{{of.num_base * of.modalities, of.num_base, of.segments_of_expert(), 1, 1},
              kAdapterBlock},
        chunks(pairs),
        added{{of.num_added, of.num_added, of.segments_of_expert(),
               of.num_base * of.segments_of_expert(), of.segments_of_expert()},
              std::max<int64_t>(of.rows(), 1)},
        u2_in_parts(gives_u2(of.rows(), of.num_base, of.inter, of.rank1, of.rank2)),
        folds(folds_gradients(of.rows(), of.num_base, of.modalities, of.inter, of.rank1, of.rank2)),
        du_with_dB(gives_du(of.rank1, 2 * of.inter, of.rows())) {
    const int64_t largest_sum =
        std::max<int64_t>({1, of.rank1 * std::max(of.hidden, 2 * of.inter),
                           of.rank2 * std::max(of.hidden, of.inter)});
    chunks.block = chunk_rows(of.rows(), largest_sum);
  }
};

// The arguments of `tile_maps` for several maps.
struct RequestedMaps {
  std::vector<int64_t> blocks, groups;

  explicit RequestedMaps(std::initializer_list<const MapRequest*> maps) {
    for (const MapRequest* map : maps) {
      blocks.push_back(map->block);
      groups.insert(groups.end(), std::begin(map->groups), std::end(map->groups));
    }
  }
};

}  // namespace moe_kernels::cuda

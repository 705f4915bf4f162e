// The index arithmetic of the CUDA dispatch on the host: blocks and warps one after the other, each
// phase by one thread. Only the ranking inside a warp is written anew here, as a loop.
#include "../csrc/cuda/counting_sort.h"

#include <vector>

using namespace moe_kernels::cuda;

namespace {

void exclusive_scan(std::vector<int>& values, int size, int num_threads) {
  std::vector<int> before(num_threads, 0);
  for (int t = 1; t < num_threads; ++t) {
    before[t] = before[t - 1] + scan_sum(values.data(), size, t - 1, num_threads);
  }
  for (int t = 0; t < num_threads; ++t) scan_part(values.data(), size, before[t], t, num_threads);
}

void make_tiles(const Sort& sort, const TileMap& map, const std::vector<int>& starts,
                int num_threads, int64_t* out) {
  std::vector<int> tiles(map.num_groups(sort) + 1);
  for (int t = 0; t < num_threads; ++t) {
    count_tiles(sort, map, starts.data(), t, num_threads, tiles.data());
  }
  exclusive_scan(tiles, map.num_groups(sort), num_threads);
  for (int t = 0; t < num_threads; ++t) {
    write_tiles(sort, map, starts.data(), tiles.data(), t, num_threads, out);
  }
}

}  // namespace

extern "C" int num_tiles(int num_rows, int num_experts, int num_modalities, int block_m,
                         int num_base, int adapted) {
  const Sort sort = make_sort(nullptr, nullptr, num_rows, 1, num_experts, num_modalities);
  return TileMap{block_m, num_base, adapted != 0}.num_tiles(sort);
}

extern "C" int run(const int64_t* topk_ids, const int64_t* modality_ids, int num_rows, int top_k,
                   int num_experts, int num_modalities, int block_m, int num_base, int num_threads,
                   int64_t* perm, int64_t* inv_perm, int64_t* tokens_per_expert,
                   int64_t* expert_offsets, int64_t* segment_offsets, int64_t* expert_tiles,
                   int64_t* adapted_tiles) {
  const Sort sort =
      make_sort(topk_ids, modality_ids, num_rows, top_k, num_experts, num_modalities);
  const int num_keys = sort.num_keys();
  std::vector<int> counts(sort.num_blocks * num_keys, 0);
  for (int block = 0; block < sort.num_blocks; ++block) {
    for (int row = sort.first_row(block, 0); row < sort.first_row(block + 1, 0); ++row) {
      ++counts[block * num_keys + sort.key(row)];
    }
  }
  for (int block = 0; block < sort.num_blocks; ++block) {
    std::vector<int> starts(num_keys), before(num_keys), of_warps(kWarpsOfSort * num_keys, 0);
    for (int t = 0; t < num_threads; ++t) {
      sum_blocks(sort, counts.data(), block, t, num_threads, before.data(), starts.data());
    }
    exclusive_scan(starts, num_keys, num_threads);
    for (int warp = 0; warp < kWarpsOfSort; ++warp) {
      for (int row = sort.first_row(block, warp); row < sort.first_row(block, warp + 1); ++row) {
        ++of_warps[warp * num_keys + sort.key(row)];
      }
    }
    for (int t = 0; t < num_threads; ++t) {
      place_warps(sort, starts.data(), before.data(), t, num_threads, of_warps.data());
    }
    for (int warp = kWarpsOfSort - 1; warp >= 0; --warp) {  // no warp waits for another
      for (int row = sort.first_row(block, warp); row < sort.first_row(block, warp + 1); ++row) {
        const int place = of_warps[warp * num_keys + sort.key(row)]++;
        perm[place] = row;
        inv_perm[row] = place;
      }
    }
    for (int t = 0; t < num_threads; ++t) {
      write_offsets(sort, starts.data(), t, num_threads, segment_offsets, expert_offsets,
                    tokens_per_expert);
    }
    make_tiles(sort, {block_m, num_base, false}, starts, num_threads, expert_tiles);
    make_tiles(sort, {block_m, num_base, true}, starts, num_threads, adapted_tiles);
  }
  return sort.num_blocks;
}

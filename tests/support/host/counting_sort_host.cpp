// The index arithmetic of the CUDA dispatch and tile maps on the host: blocks and warps one after the
// other, each phase by one thread. Only the ranking inside a warp is written anew here, as a loop.
#include "../../../csrc/cuda/counting_sort.h"

#include <vector>

#include "../../../csrc/cuda/tiles.h"

using namespace moe_kernels::cuda;

namespace {

void exclusive_scan(std::vector<int>& values, int size, int num_threads) {
  std::vector<int> before(num_threads, 0);
  for (int t = 1; t < num_threads; ++t) {
    before[t] = before[t - 1] + scan_sum(values.data(), size, t - 1, num_threads);
  }
  for (int t = 0; t < num_threads; ++t) scan_part(values.data(), size, before[t], t, num_threads);
}

}  // namespace

extern "C" int num_tiles(int num_rows, int num_groups, int block) {
  return static_cast<int>(most_tiles(num_rows, num_groups, block));
}

extern "C" void run_tile_map(const int64_t* segment_offsets, int num_segments, int num_rows,
                             int block, int num, int period, int stride, int offset, int width,
                             int num_threads, int64_t* tiles, int64_t* rows) {
  const Groups groups{num, period, stride, offset, width};
  const TileMap map{groups, block, num_tiles(num_rows, num, block), tiles, rows};
  const Segments<int64_t> segments{segment_offsets, num_segments, num_rows};
  std::vector<int> first_tiles(num), partials(num);
  for (int t = 0; t < num_threads; ++t) {
    count_tiles(segments, map, t, num_threads, first_tiles.data(), partials.data());
  }
  exclusive_scan(first_tiles, num, num_threads);
  exclusive_scan(partials, num, num_threads);
  for (int t = 0; t < num_threads; ++t) {
    write_tiles(segments, map, first_tiles.data(), t, num_threads);
    write_groups(segments, map, partials.data(), t, num_threads);
  }
}

extern "C" int run(const int64_t* topk_ids, const int64_t* modality_ids, int num_rows, int top_k,
                   int num_experts, int num_modalities, int num_threads, int64_t* perm,
                   int64_t* inv_perm, int64_t* tokens_per_expert, int64_t* expert_offsets,
                   int64_t* segment_offsets) {
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
  }
  return sort.num_blocks;
}

// The launch functions of the CUDA kernels, for ctypes. Every .cu file is compiled beside this one,
// as plain C++, with cuda_on_host.h for the device.
#include "cuda_on_host.h"

#include "../../../csrc/cuda/add_low_rank.h"
#include "../../../csrc/cuda/combine.h"
#include "../../../csrc/cuda/decode.h"
#include "../../../csrc/cuda/dispatch.h"
#include "../../../csrc/cuda/grouped_gemm.h"
#include "../../../csrc/cuda/shrink.h"
#include "../../../csrc/cuda/tile_maps.h"
#include "../../../csrc/cuda/wgrad.h"

using namespace moe_kernels::cuda;

extern "C" void set_order(bool descending, bool early_copies, bool last_first) {
  host::order = {descending, early_copies, false, last_first};
}

extern "C" void set_late_launches(bool on) { host::order.late_launches = on; }

extern "C" int launches() { return host::launches; }

// Of the experts and of the pairs (modality, expert); without modalities of the experts alone.
struct Maps {
  int64_t *tiles, *groups, *pair_tiles, *pair_groups;

  TileMaps of(int rows, int experts, int modalities, int block) const {
    const int in_expert = modalities + 1, pairs = experts * modalities;
    const auto map = [&](const Groups& of, int64_t* to, int64_t* bounds) {
      return TileMap{of, block, static_cast<int>(most_tiles(rows, of.num, block)), to, bounds};
    };
    return {modalities == 0 ? 1 : 2,
            {map({experts + 1, experts + 1, in_expert, 0, in_expert}, tiles, groups),
             map({pairs, experts, in_expert, 1, 1}, pair_tiles, pair_groups)}};
  }
};

extern "C" size_t size_of_maps() { return sizeof(Maps); }
extern "C" size_t size_of_dispatchout() { return sizeof(DispatchOut); }
// With `maps` or, if it is null, without any.
extern "C" int dispatch(const DispatchOut* out, const Maps* maps, const int64_t* topk_ids,
                        const int64_t* modality_ids, int rows, int top_k, int experts,
                        int modalities, int block) {
  const Sort sort = make_sort(topk_ids, modality_ids, rows, top_k, experts, modalities);
  std::vector<int> counts(static_cast<size_t>(sort.num_blocks) * sort.num_keys(), -1);
  const TileMaps wanted = maps == nullptr ? TileMaps{0, {}}
                                          : maps->of(rows, experts, modalities, block);
  return launch_dispatch(sort, counts.data(), *out, wanted, nullptr);
}

extern "C" int tile_maps(const Maps* maps, const int64_t* segments, int rows, int experts,
                         int modalities, int block) {
  const Segments<int64_t> given{segments, experts * (modalities + 1), rows};
  return launch_tile_maps(given, maps->of(rows, experts, modalities, block), nullptr);
}

extern "C" size_t size_of_combine() { return sizeof(Combine); }
extern "C" int combine(const Combine* given, int rows, int weights) {
  return launch_combine(*given, Scalar(rows), Scalar(weights), nullptr);
}

extern "C" size_t size_of_shrink() { return sizeof(Shrink); }
extern "C" int shrink(const Shrink* given, int left, int matrix, int out) {
  return launch_shrink(*given, Scalar(left), Scalar(matrix), Scalar(out), nullptr);
}

extern "C" size_t size_of_folded() { return sizeof(Folded); }
extern "C" size_t size_of_wgrad() { return sizeof(Wgrad); }
extern "C" size_t size_of_wgradproblem() { return sizeof(WgradProblem); }
extern "C" int parts_of_wgrad(int width) { return wgrad_parts(width); }
extern "C" int wgrad(const Wgrad* given, int right) {
  return launch_wgrad(*given, Scalar(right), nullptr);
}

extern "C" size_t size_of_groupedgemm() { return sizeof(GroupedGemm); }
extern "C" size_t size_of_adaptergradients() { return sizeof(AdapterGradients); }
extern "C" size_t size_of_actbackward() { return sizeof(ActBackward); }
extern "C" size_t size_of_partsofu() { return sizeof(PartsOfU); }
extern "C" int gate_up(const GroupedGemm* given, void* pre, void* act, const PartsOfU* u2,
                       int dtype, int v, int block_m) {
  return launch_gate_up(*given, pre, act, *u2, Scalar(dtype), Scalar(v), block_m, nullptr);
}
extern "C" int down(const GroupedGemm* given, void* out, int dtype, int v, int block_m) {
  return launch_down(*given, out, Scalar(dtype), Scalar(v), block_m, nullptr);
}
extern "C" int d_rows(const GroupedGemm* given, void* out, int dtype, int v, int block_m) {
  return launch_d_rows(*given, out, Scalar(dtype), Scalar(v), block_m, nullptr);
}
extern "C" int act_backward(const GroupedGemm* given, const ActBackward* act, int dtype, int v,
                            int block_m) {
  return launch_act_backward(*given, *act, Scalar(dtype), Scalar(v), block_m, nullptr);
}
extern "C" int block_m(int64_t rows, int experts) { return grouped_gemm_block_m(rows, experts); }
extern "C" int parts(int size_n, int block_m) { return grouped_gemm_parts(size_n, block_m); }
extern "C" int parts_of_u(int size_n, int block_m) { return gate_up_parts(size_n, block_m); }
extern "C" bool supports(int dtype, int64_t size_k, int64_t size_n) {
  return grouped_gemm_supports(Scalar(dtype), size_k, size_n);
}

extern "C" size_t size_of_addlowrank() { return sizeof(AddLowRank); }
extern "C" int add_low_rank(const AddLowRank* given, int out, int v) {
  return launch_add_low_rank(*given, Scalar(out), Scalar(v), nullptr);
}

extern "C" size_t size_of_decode() { return sizeof(Decode); }
extern "C" int parts_of_decode(int inter) { return static_cast<int>(decode_parts(inter)); }
extern "C" int decode(const Decode* given, int dtype) {
  return launch_decode(*given, Scalar(dtype), nullptr);
}

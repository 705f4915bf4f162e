// Runs the engine on one hard case in every order of asynchronous work, by single blocks and by
// clusters, against float64. Exits with 0 if all are right and have the same bits.
// tests/gpu/test_engine.py also compiles it with faults in the engine.
#include <array>
#include <cstdio>
#include <random>

#include "cuda_on_host.h"
// From csrc/cuda, or from a copy of it:
#include "engine.h"
#include "epilogues.h"

using namespace moe_kernels::cuda;
using T = __nv_bfloat16;

namespace {

constexpr int kBase = 2, kExperts = 3, kTopK = 2, kTokens = 150, kRows = kTokens * kTopK;
constexpr int kInter = 136, kRank = 5, kModalities = 1;
// Less than all stages, and so many that a warpgroup could get two rounds ahead of another.
constexpr int kShort = 200, kLong = 840;

std::mt19937 generator(1);

std::vector<T> random(size_t size, float scale) {
  std::normal_distribution<float> normal;
  std::vector<T> values(size);
  for (T& value : values) value = __float2bfloat16(scale * normal(generator));
  return values;
}

double wide(T value) { return __bfloat162float(value); }

// Rows in the order of their experts. In each, the rows of the second half of the tokens are of the
// added modality; the last 20 tokens are not dispatched. The first expert has 156 rows, the others
// less than a block's.
struct Routing {
  std::vector<int64_t> perm, tiles, segments;
  std::vector<int> expert, modality;  // of each sorted row
  int num_tiles;

  explicit Routing(int block) {
    std::vector<std::vector<int64_t>> rows((kModalities + 1) * kExperts + 1);
    for (int slot = 0; slot < kRows; ++slot) {
      const int token = slot / kTopK;
      const int expert = slot % kTopK * (token % 5 + 2) / 3, modality = token >= kTokens / 2;
      rows[token >= kTokens - 20 ? rows.size() - 1 : 2 * expert + modality].push_back(slot);
    }
    std::vector<std::array<int64_t, 3>> made;
    for (size_t i = 0; i < rows.size(); ++i) {
      segments.push_back(perm.size());
      for (const int64_t slot : rows[i]) {
        perm.push_back(slot);
        expert.push_back(static_cast<int>(i) / 2);
        modality.push_back(i % 2);
      }
    }
    for (int e = 0; e <= kExperts; ++e) {
      const int64_t end = e < kExperts ? segments[2 * e + 2] : kRows;
      for (int64_t row = segments[2 * e]; row < end; row += block) {
        made.push_back({e, row, std::min(row + block, end)});
      }
    }
    made.push_back({0, 0, 0});  // a tile without rows
    num_tiles = static_cast<int>(made.size());
    for (int field = 0; field < 3; ++field) {
      for (const auto& tile : made) tiles.push_back(tile[field]);
    }
  }
};

// Of single blocks, and of clusters.
const Routing routing(128), routing_of_clusters(256);
const std::vector<T> x = random(kTokens * kShort, 1.0f);
const std::vector<T> w = random(kExperts * kInter * kLong, 0.07f);
const std::vector<T> u = random(kRows * kRank, 1.0f);
const std::vector<T> b = random(kModalities * kBase * 2 * kInter * kRank, 0.4f);
const std::vector<T> rows = random(kRows * kLong, 1.0f);
const std::vector<float> scaling = {1.5f};

GroupedGemm gemm(const std::vector<T>& left, int hidden, int width, const void* u_of) {
  return {
      .left = left.data(), .stack = w.data(), .extra = w.data() + kBase * width * hidden,
      .perm = routing.perm.data(), .tiles = routing.tiles.data(),
      .segments = routing.segments.data(), .u = u_of, .v = b.data(), .scaling = scaling.data(),
      .num_tiles = routing.num_tiles, .num_base = kBase, .num_experts = kExperts,
      .num_modalities = kModalities, .experts_of_v = kBase,
      .rank = u_of == nullptr ? 0 : kRank, .size_k = hidden, .size_n = kInter, .top_k = kTopK,
  };
}

struct Error {
  double squares = 0, size = 0;
  void add(double found, double expected) {
    squares += (found - expected) * (found - expected);
    size += expected * expected;
  }
  bool large() const { return !(squares <= 1e-4 * size); }
};

using Values = std::vector<T>;

// Runs an engine. Returns what `epilogue(out)` stores in `out`, or nothing after an error.
template <typename Loop, typename Make>
Values run(GroupedGemm gemm, int width, Make epilogue) {
  if (Loop::kCluster > 1) gemm.tiles = routing_of_clusters.tiles.data();
  if (Loop::kCluster > 1) gemm.num_tiles = routing_of_clusters.num_tiles;
  Values out(kRows * width, __float2bfloat16(NAN));
  const cudaError_t error = launch_engine<Loop>(gemm, epilogue(out.data()), false, nullptr);
  return error == cudaSuccess ? out : Values();
}

// (kRows, 3 kInter): the sums (gate, up) = x W^T + s u B^T of all rows, then their activations.
template <int kCluster>
Values gate_up() {
  return run<Engine<T, true, true, false, kCluster>>(
      gemm(x, kShort, 2 * kInter, u.data()), 3 * kInter,
      [](T* out) { return GateUp<T>{out, out + kRows * 2 * kInter, {}}; });
}

bool gate_up_is_right(const Values& out) {
  if (out.empty()) return false;
  Error of_pre, of_act;
  for (int row = 0; row < kRows; ++row) {
    const int e = routing.expert[row], token = static_cast<int>(routing.perm[row]) / kTopK;
    std::array<double, 2 * kInter> sums = {};
    for (int n = 0; n < 2 * kInter && e < kExperts; ++n) {
      for (int k = 0; k < kShort; ++k) {
        sums[n] += wide(x[token * kShort + k]) * wide(w[(e * 2 * kInter + n) * kShort + k]);
      }
      for (int r = 0; r < kRank && routing.modality[row] && e < kBase; ++r) {
        sums[n] += scaling[0] * wide(u[row * kRank + r]) * wide(b[(e * 2 * kInter + n) * kRank + r]);
      }
      of_pre.add(wide(out[row * 2 * kInter + n]), sums[n]);
    }
    for (int n = 0; n < kInter; ++n) {
      const double silu = sums[n] / (1 + std::exp(-sums[n]));
      of_act.add(wide(out[(2 * kRows + row) * kInter + n]), silu * sums[kInter + n]);
    }
  }
  return !of_pre.large() && !of_act.large();
}

// Rows times W, whose neighbours in memory are columns.
template <bool kInTurn, int kCluster>
Values rows_of(int hidden) {
  return run<Engine<T, false, false, kInTurn, kCluster>>(
      gemm(rows, hidden, kInter, nullptr), kInter, [](T* out) { return Rows<T, false>{out}; });
}

bool rows_are_right(const Values& out, int hidden) {
  if (out.empty()) return false;
  Error error;
  for (int row = 0; row < routing.segments.back(); ++row) {
    for (int n = 0; n < kInter; ++n) {
      double sum = 0;
      for (int k = 0; k < hidden; ++k) {
        sum += wide(rows[row * hidden + k]) *
               wide(w[(routing.expert[row] * hidden + k) * kInter + n]);
      }
      error.add(wide(out[row * kInter + n]), sum);
    }
  }
  return !error.large();
}

bool same(const Values& first, const Values& second) {
  return first.size() == second.size() &&
         std::memcmp(first.data(), second.data(), first.size() * sizeof(T)) == 0;
}

}  // namespace

int main() {
  std::array<Values, 3> right;  // by single blocks, in the first order
  for (int order = 0; order < 6; ++order) {
    host::order = {(order & 1) != 0, order >= 4, false, (order & 2) != 0};
    const std::array<Values, 3> single = {gate_up<1>(), rows_of<false, 1>(kShort),
                                          rows_of<true, 1>(kLong)};
    if (order == 0) {
      right = single;
      if (!gate_up_is_right(right[0]) || !rows_are_right(right[1], kShort) ||
          !rows_are_right(right[2], kLong)) {
        std::printf("wrong\n");
        return 1;
      }
    }
    host::multiprocessors = order % 2 == 0 ? 3 : 5;  // one cluster, or two
    const bool paired = same(gate_up<2>(), right[0]) && same(rows_of<false, 2>(kShort), right[1]) &&
                        same(rows_of<true, 2>(kShort), right[1]);
    host::multiprocessors = 3;
    if (paired && same(single[0], right[0]) && same(single[1], right[1]) &&
        same(single[2], right[2])) continue;
    std::printf("other bits in order %d\n", order);
    return 1;
  }
  return 0;
}

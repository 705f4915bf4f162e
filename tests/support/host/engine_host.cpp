// Runs the engine on one hard case in every order of asynchronous work, by single blocks and by
// clusters, against float64. Exits with 0 if all are right and have the same bits.
// tests/gpu/test_engine.py also compiles it with faults in the engine.
#include <array>
#include <cstdio>
#include <optional>
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

const Values pre = random(kRows * 2 * kInter, 1.0f);
const std::vector<float> routing_weights(kRows, 0.7f);
const std::vector<float> du2(kRows * kRank, 0.3f);

// What dA' leaves for the gradients of adapters; -1 where it writes nothing.
struct Folded {
  static constexpr int kParts = (kInter + 127) / 128;
  const int64_t slots = folded_slots(kRows, kBase * kModalities);
  Values d_pre = Values(kRows * 2 * kInter), act = Values(kRows * kInter);
  std::vector<float> dots = std::vector<float>(kParts * kRows, -1.0f);
  std::vector<float> du1 = std::vector<float>(kParts * kRows * kRank, -1.0f);
  std::vector<float> d_b1 = std::vector<float>(slots * 2 * kInter * kRank, -1.0f);
  std::vector<float> d_a2 = std::vector<float>(slots * kRank * kInter, -1.0f);
  bool ran = false;
};

template <int kCluster>
Folded folded() {
  Folded made;
  const ActGradients<T, true> epilogue{{
      .weights = routing_weights.data(), .pre = pre.data(), .d_pre = made.d_pre.data(),
      .act = made.act.data(), .dots = made.dots.data(), .num_rows = kRows,
      .weights_are_float = true, .act_of_adapted = false, .act_of_added = true,
      .adapters = {.u1 = u.data(), .b1 = b.data(), .scaling = scaling.data(),
                   .du1 = made.du1.data(), .d_b1 = made.d_b1.data(), .d_a2 = made.d_a2.data(),
                   .rank = kRank, .b_is_float = false},
  }};
  GroupedGemm args = gemm(x, kShort, kInter, du2.data());
  if (kCluster > 1) args.tiles = routing_of_clusters.tiles.data();
  if (kCluster > 1) args.num_tiles = routing_of_clusters.num_tiles;
  made.ran = launch_engine<Engine<T, false, false, true, kCluster>>(args, epilogue, false,
                                                                    nullptr) == cudaSuccess;
  return made;
}

// Compares with sums over the gradients that the same launch has stored.
bool folded_is_right(const Folded& made) {
  if (!made.ran) return false;
  Error of_du1, of_b1, of_a2;
  const auto rounded = [](double value) { return wide(__float2bfloat16(float(value))); };
  for (int e = 0; e < kBase; ++e) {
    const int low = routing.segments[2 * e + 1], high = routing.segments[2 * e + 2];
    const int start = routing.segments[2 * e];
    const int tiles = (high - 1 - start) / 128 - (low - start) / 128 + 1;
    const int64_t slot = first_folded(low, e);
    std::vector<double> b1(2 * kInter * kRank), a2(kRank * kInter);
    for (int row = low; row < high; ++row) {
      for (int r = 0; r < kRank; ++r) {
        double found = 0, expected = 0;
        for (int part = 0; part < Folded::kParts; ++part) {
          found += made.du1[(part * kRows + row) * kRank + r];
        }
        const double left = rounded(scaling[0] * wide(u[row * kRank + r]));
        const double of_down = rounded(scaling[0] * 0.7f * 0.3f);
        for (int n = 0; n < 2 * kInter; ++n) {
          const double gradient = wide(made.d_pre[row * 2 * kInter + n]);
          expected += gradient * wide(b[(e * 2 * kInter + n) * kRank + r]);
          b1[n * kRank + r] += left * gradient;
        }
        of_du1.add(found, expected);
        for (int n = 0; n < kInter; ++n) {
          const double gate = wide(pre[row * 2 * kInter + n]);
          const double up = wide(pre[row * 2 * kInter + kInter + n]);
          a2[r * kInter + n] += of_down * rounded(gate / (1 + std::exp(-gate)) * up);
        }
      }
    }
    const auto add = [&](Error& error, const std::vector<float>& in_slots,
                         const std::vector<double>& sums) {
      for (size_t i = 0; i < sums.size(); ++i) {
        double found = 0;
        for (int tile = 0; tile < tiles; ++tile) found += in_slots[(slot + tile) * sums.size() + i];
        error.add(found, sums[i]);
      }
    };
    add(of_b1, made.d_b1, b1);
    add(of_a2, made.d_a2, a2);
  }
  return !of_du1.large() && !of_b1.large() && !of_a2.large();
}

bool same(const Folded& first, const Folded& second) {
  return second.ran && first.du1 == second.du1 && first.d_b1 == second.d_b1 &&
         first.d_a2 == second.d_a2 && first.dots == second.dots;
}

bool same(const Values& first, const Values& second) {
  return first.size() == second.size() &&
         std::memcmp(first.data(), second.data(), first.size() * sizeof(T)) == 0;
}

}  // namespace

int main() {
  std::array<Values, 3> right;  // by single blocks, in the first order
  std::optional<Folded> right_folds;
  for (int order = 0; order < 6; ++order) {
    host::order = {(order & 1) != 0, order >= 4, false, (order & 2) != 0};
    const std::array<Values, 3> single = {gate_up<1>(), rows_of<false, 1>(kShort),
                                          rows_of<true, 1>(kLong)};
    if (order == 0) {
      right = single;
      right_folds.emplace(folded<1>());
      if (!gate_up_is_right(right[0]) || !rows_are_right(right[1], kShort) ||
          !rows_are_right(right[2], kLong) || !folded_is_right(*right_folds)) {
        std::printf("wrong\n");
        return 1;
      }
    }
    host::multiprocessors = order % 2 == 0 ? 3 : 5;  // one cluster, or two
    const bool paired = same(gate_up<2>(), right[0]) && same(rows_of<false, 2>(kShort), right[1]) &&
                        same(rows_of<true, 2>(kShort), right[1]) &&
                        (order % 2 == 0 || same(folded<2>(), *right_folds));
    host::multiprocessors = 3;
    if (paired && same(single[0], right[0]) && same(single[1], right[1]) &&
        same(single[2], right[2]) &&
        (order % 2 == 1 || same(folded<1>(), *right_folds))) {
      continue;
    }
    std::printf("other bits in order %d\n", order);
    return 1;
  }
  return 0;
}

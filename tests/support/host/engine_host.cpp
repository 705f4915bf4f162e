// Runs the engine on one hard case in every order of asynchronous work, against float64. Exits with
// 0 if all are right. tests/gpu/test_engine.py also compiles it with faults in the engine.
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
// added modality; the last 20 tokens are not dispatched. The first expert has 156 rows, two tiles.
struct Routing {
  std::vector<int64_t> perm, tiles, segments;
  std::vector<int> expert, modality;  // of each sorted row
  int num_tiles;

  Routing() {
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
      for (int64_t row = segments[2 * e]; row < end; row += 128) {
        made.push_back({e, row, std::min(row + 128, end)});
      }
    }
    made.push_back({0, 0, 0});  // a tile without rows
    num_tiles = static_cast<int>(made.size());
    for (int field = 0; field < 3; ++field) {
      for (const auto& tile : made) tiles.push_back(tile[field]);
    }
  }
};

const Routing routing;
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
      .sum = nullptr, .num_rows = kRows, .num_parts = 0,
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

// Of the sums (gate, up) = x W^T + s u B^T.
bool gate_up_is_right() {
  std::vector<T> pre(kRows * 2 * kInter, __float2bfloat16(NAN)), act(kRows * kInter, pre[0]);
  if (launch_engine<Engine<T, true, true, false>>(gemm(x, kShort, 2 * kInter, u.data()),
                                           GateUp<T>{pre.data(), act.data(), {}}, false, nullptr) !=
      cudaSuccess) {
    return false;
  }
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
      of_pre.add(wide(pre[row * 2 * kInter + n]), sums[n]);
    }
    for (int n = 0; n < kInter; ++n) {
      const double silu = sums[n] / (1 + std::exp(-sums[n]));
      of_act.add(wide(act[row * kInter + n]), silu * sums[kInter + n]);
    }
  }
  return !of_pre.large() && !of_act.large();
}

// Of rows times W, whose neighbours in memory are columns.
template <bool kInTurn>
bool rows_are_right(int hidden) {
  std::vector<T> out(kRows * kInter, __float2bfloat16(NAN));
  if (launch_engine<Engine<T, false, false, kInTurn>>(gemm(rows, hidden, kInter, nullptr),
                                             Rows<T, false>{out.data()}, false, nullptr) !=
      cudaSuccess) {
    return false;
  }
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

}  // namespace

int main() {
  for (int order = 0; order < 6; ++order) {
    host::order = {(order & 1) != 0, order >= 4, false, (order & 2) != 0};
    if (gate_up_is_right() && rows_are_right<false>(kShort) && rows_are_right<true>(kLong)) {
      continue;
    }
    std::printf("wrong in order %d\n", order);
    return 1;
  }
  return 0;
}

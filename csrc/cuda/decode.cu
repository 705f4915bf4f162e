// A layer for a few tokens in two kernels. Reading the weights takes most of the time, so nothing
// comes before it: each block finds the rows of its experts by itself.
//
// As in shrink.cu, the four lanes of a fragment's row load 16 neighbouring bytes each, since the
// order of k within a sum is free, and operands need no shared memory. The weights are the narrow
// operand of the matrix instructions, the rows of an expert the wide one. Warps split k in a way
// that follows shapes alone; a row's sums depend on no other row.
#include "decode.h"

#include <type_traits>

#include "device.h"

namespace moe_kernels::cuda {
namespace {

constexpr int kTileRows = 16;
constexpr int kVector = 8;            // two-byte elements of an access
constexpr int kStep = 4 * kVector;    // columns of k that a warp's access covers
constexpr int kProductWarps = 8;      // multiply with the experts' weights
constexpr int kAdapterWarps = 4;      // compute u meanwhile
constexpr int kMaxThreads = 32 * (kProductWarps + kAdapterWarps);
constexpr int kResident = 2;          // blocks per multiprocessor

// --- routing

// Dispatched slots, sorted by expert and cut into tiles of at most kTileRows slots of one expert.
struct Routing {
  int expert[kMaxDecodeRows];     // of each slot; -1: not dispatched
  int modality[kMaxDecodeRows];   // of each slot; 0 also where no adapter applies
  int leader[kMaxDecodeRows];     // first slot of the same expert
  bool begins[kMaxDecodeRows];    // whether the slot begins a tile
  int slots[kMaxDecodeRows];      // sorted
  int first[kMaxDecodeRows + 1];  // place in `slots` where a tile begins
  int num_tiles;
};

// Loads what a slot needs of the arguments.
__device__ void load_slot(const Decode& args, Routing& routing, int slot) {
  const int64_t expert = args.topk_ids[slot];
  const int64_t modality =
      args.modality_ids == nullptr ? 0 : args.modality_ids[slot / args.top_k];
  const bool dispatched = expert >= 0 && expert < args.num_experts && modality >= 0 &&
                          modality <= args.num_modalities;
  routing.expert[slot] = dispatched ? static_cast<int>(expert) : -1;
  routing.modality[slot] = dispatched && expert < args.num_base ? static_cast<int>(modality) : 0;
}

__device__ void find_leader(Routing& routing, int slot) {
  int leader = slot, before = 0;
  for (int i = slot - 1; i >= 0; --i) {
    if (routing.expert[i] != routing.expert[slot]) continue;
    leader = i;
    ++before;
  }
  routing.leader[slot] = leader;
  routing.begins[slot] = before % kTileRows == 0;
}

__device__ void place_slot(const Decode& args, Routing& routing, int slot) {
  const int own = routing.leader[slot], rows = args.tokens * args.top_k;
  int place = 0, tile = 0, tiles = 0, dispatched = 0;
  for (int i = 0; i < rows; ++i) {
    if (routing.expert[i] < 0) continue;
    const int leader = routing.leader[i];
    const bool before = leader < own || (leader == own && i < slot);
    place += before;
    tile += before && routing.begins[i];
    tiles += routing.begins[i];
    ++dispatched;
  }
  if (routing.expert[slot] >= 0) {
    routing.slots[place] = slot;
    if (routing.begins[slot]) routing.first[tile] = place;
  }
  if (slot > 0) return;
  routing.first[tiles] = dispatched;
  routing.num_tiles = tiles;
}

// Called by all threads of a block, of which there are as many as slots at least.
__device__ void find_tiles(const Decode& args, Routing& routing) {
  const int slot = threadIdx.x;
  const bool present = slot < args.tokens * args.top_k;
  if (present) load_slot(args, routing, slot);
  __syncthreads();
  if (present) find_leader(routing, slot);
  __syncthreads();
  if (present) place_slot(args, routing, slot);
  __syncthreads();
}

struct TileOfSlots {
  const Routing& routing;
  int begin;
  int count;
  int expert;

  __device__ TileOfSlots(const Routing& all, int tile)
      : routing(all),
        begin(all.first[tile]),
        count(all.first[tile + 1] - begin),
        expert(all.expert[all.slots[begin]]) {}

  __device__ int slot(int row) const { return routing.slots[begin + row]; }
  __device__ int modality(int row) const { return routing.modality[slot(row)]; }
};

__device__ bool has_modality(const TileOfSlots& tile, int modality) {
  bool found = false;
#pragma unroll 1
  for (int i = 0; i < tile.count; ++i) found |= tile.modality(i) == modality;
  return found;
}

__device__ bool is_adapted(const TileOfSlots& tile) {
  bool found = false;
#pragma unroll 1
  for (int i = 0; i < tile.count; ++i) found |= tile.modality(i) > 0;
  return found;
}

// --- adapters

// One of a layer's two low-rank pairs.
struct Adapter {
  const void* a;  // (modalities, experts_of_a, rank, in)
  const void* b;  // (modalities, num_base, out, rank)
  const float* scaling;
  int rank;
  int experts_of_a;
  int num_base;
  int in;
  int out;
  bool is_float;

  __device__ int64_t place_of_a(int modality, int expert, int row) const {
    const int64_t matrix =
        static_cast<int64_t>(modality - 1) * experts_of_a + (experts_of_a == 1 ? 0 : expert);
    return (matrix * rank + row) * in;
  }
  __device__ int64_t place_of_b(int modality, int expert, int column) const {
    return ((static_cast<int64_t>(modality - 1) * num_base + expert) * out + column) * rank;
  }
  __device__ int bytes() const { return is_float ? 4 : 2; }
};

__device__ Adapter adapter1(const Decode& args) {
  return {args.a1,       args.b1,     args.scaling1,  args.rank1,    args.experts_of_a1,
          args.num_base, args.hidden, 2 * args.inter, args.is_float1};
}

__device__ Adapter adapter2(const Decode& args) {
  return {args.a2,       args.b2,    args.scaling2, args.rank2,    args.experts_of_a2,
          args.num_base, args.inter, args.hidden,   args.is_float2};
}

// An element of an adapter, rounded to the compute dtype.
template <typename T>
__device__ float element(const void* matrix, int64_t place, bool is_float) {
  if (!is_float) return to_float(static_cast<const T*>(matrix)[place]);
  return to_float(from_float<T>(static_cast<const float*>(matrix)[place]));
}

template <typename T>
__device__ float rounded(float value) {
  return to_float(from_float<T>(value));
}

// The operand of B: u rounded as it is saved in training, then scaled.
template <typename T>
__device__ float scaled_u(const Adapter& adapter, int modality, float u) {
  return rounded<T>(adapter.scaling[modality - 1] * rounded<T>(u));
}

// <s u, a row of B>, the low-rank term of one column.
template <typename T>
__device__ float low_rank_term(const Adapter& adapter, int modality, int expert, int column,
                               const float* scaled) {
  const int64_t row = adapter.place_of_b(modality, expert, column);
  float sum = 0.0f;
#pragma unroll 2
  for (int r = 0; r < adapter.rank; ++r) {
    sum += scaled[r] * element<T>(adapter.b, row + r, adapter.is_float);
  }
  return sum;
}

// Brings neighbouring elements into the L2, by the lanes of a warp.
__device__ void prefetch_range(const void* matrix, int64_t place, int64_t count, int bytes) {
  const char* from = static_cast<const char*>(matrix) + place * bytes;
#pragma unroll 1
  for (int64_t i = threadIdx.x % 32 * 128; i < count * bytes; i += 32 * 128) prefetch(from + i);
}

// --- products

template <typename T, typename M>
__device__ Vector<T> load_rounded(const M* from) {
  if constexpr (std::is_same_v<T, M>) {
    return *reinterpret_cast<const Vector<T>*>(from);
  } else {
    Vector<T> out;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto part = reinterpret_cast<const Vector<float>*>(from)[half];
#pragma unroll
      for (int i = 0; i < 4; ++i) out.values[4 * half + i] = from_float<T>(part.values[i]);
    }
    return out;
  }
}

// A lane's two rows of a tile: rows lane / 4 and lane / 4 + 8.
template <typename T>
struct Rows {
  const T* from[2];  // null: there is none

  // row_of(slot) is the number of a slot's row in `all` (n, size).
  template <typename RowOf>
  __device__ Rows(const void* all, const TileOfSlots& tile, int size, RowOf row_of) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = threadIdx.x % 32 / 4 + 8 * i;
      from[i] = nullptr;
      if (row < tile.count) {
        from[i] = static_cast<const T*>(all) + static_cast<int64_t>(row_of(tile.slot(row))) * size;
      }
    }
  }
};

// First column of k that a lane loads in a step.
__device__ int lane_column() { return threadIdx.x % 4 * kVector; }

// Adds the products of kSteps steps from k on. right[step][tile] has a lane's vector of row
// lane / 4 of each tile of 8 rows of the weights.
template <typename T, int kSteps, int kTiles>
__device__ void add_products(const Rows<T>& rows, const Vector<T> (&right)[kSteps][kTiles], int k,
                             int size_k, float (&acc)[kTiles][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    Vector<T> left[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      left[i] = {};
      if (rows.from[i] == nullptr || k + step * kStep >= size_k) continue;
      left[i] = *reinterpret_cast<const Vector<T>*>(rows.from[i] + k + step * kStep);
    }
    const auto* words = reinterpret_cast<const uint32_t(*)[4]>(&left);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const auto* column = reinterpret_cast<const uint32_t*>(&right[step][tile]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t a[4] = {words[0][2 * half], words[1][2 * half], words[0][2 * half + 1],
                               words[1][2 * half + 1]};
        const uint32_t b[2] = {column[2 * half], column[2 * half + 1]};
        multiply<T>(acc[tile], a, b);
      }
    }
  }
}

// Calls store(row, column, value) for a lane's sums of a tile of 8 columns.
template <typename Store>
__device__ void for_each_sum(const float (&acc)[4], Store store) {
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) store(row + i / 2 * 8, column + i % 2, acc[i]);
}

// --- gate, up and the activation

constexpr int kSlicesUp = 2;  // of k
constexpr int kStepsUp = 4;
constexpr int kStepsOfU = 2;
static_assert(kDecodeColumns == 8 * kProductWarps / kSlicesUp);

struct SharedUp {
  Routing routing;
  float sums[kSlicesUp][kTileRows][2 * kDecodeColumns];  // gate, then up
  float u[kAdapterWarps][kTileRows][kMaxDecodeRank];     // of slices of k
  float scaled[kTileRows][kMaxDecodeRank];
  float act[kTileRows][kDecodeColumns];
};
static_assert(sizeof(SharedUp) <= 48 * 1024);

// Whether an expert's matrices are float32: added ones train, and may be wider than the others.
__device__ bool is_wide(const Decode& args, int expert) {
  return args.extra_is_float && expert >= args.num_base;
}

// An expert's matrix, of W: T, or float where is_wide.
template <typename W>
__device__ const W* matrix_of(const void* stack, const void* extra, int num_base, int expert,
                              int64_t size) {
  if (expert < num_base) return static_cast<const W*>(stack) + expert * size;
  return static_cast<const W*>(extra) + (expert - num_base) * size;
}

// Loads a lane's vector of weights of W, as T, or returns zeros.
template <typename T, typename W>
__device__ Vector<T> load_as(const W* from, bool present) {
  if constexpr (std::is_same_v<T, W>) {
    return load_weights(from, present);
  } else {
    return present ? load_rounded<T>(from) : Vector<T>{};
  }
}

// Adds a warp's slice of k for 8 columns of gate and of up, from matrices of W. Of float, a few
// steps at a time: rounding takes registers. The order of k is the same.
template <typename W, int kSteps, typename T>
__device__ void add_gate_up(const Decode& args, const TileOfSlots& tile, const Rows<T>& rows,
                            int slice, int column, float (&acc)[2][4]) {
  const int64_t size = static_cast<int64_t>(args.inter) * args.hidden;
  constexpr int kColumns = kStepsUp * kStep, kNext = kSlicesUp * kColumns;
  const W* gate =
      matrix_of<W>(args.gate_up, args.extra_gate_up, args.num_base, tile.expert, 2 * size) +
      static_cast<int64_t>(column) * args.hidden + slice * kColumns + lane_column();
  const W* up = gate + size;
  const int end = column < args.inter ? args.hidden : 0;  // beyond the last column: nothing
  constexpr int kAtOnce = kSteps * kStep;
  Vector<T> right[kSteps][2];
  const auto load = [&](int k) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const bool present = k + step * kStep < end;
      right[step][0] = load_as<T>(gate + step * kStep, present);
      right[step][1] = load_as<T>(up + step * kStep, present);
    }
  };
  int k = slice * kColumns + lane_column();
  load(k);
  for (int start = slice * kColumns; start < args.hidden;) {
    add_products(rows, right, k, args.hidden, acc);
    const int step = (start + kAtOnce) % kColumns == 0 ? kNext - kColumns + kAtOnce : kAtOnce;
    start += step;
    k += step;
    gate += step;
    up += step;
    load(k);
  }
}

// A warp's slice of k for 8 columns of gate and of up.
template <typename T>
__device__ void sum_gate_up(const Decode& args, const TileOfSlots& tile, const Rows<T>& rows,
                            SharedUp& shared) {
  const int warp = threadIdx.x / 32, slice = warp % kSlicesUp, of_block = warp / kSlicesUp * 8;
  const int column = blockIdx.x * kDecodeColumns + of_block + threadIdx.x % 32 / 4;
  float acc[2][4] = {};
  if (is_wide(args, tile.expert)) {
    add_gate_up<float, 1>(args, tile, rows, slice, column, acc);
  } else {
    add_gate_up<T, kStepsUp>(args, tile, rows, slice, column, acc);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for_each_sum(acc[i], [&](int row, int n, float value) {
      shared.sums[slice][row][i * kDecodeColumns + of_block + n] = value;
    });
  }
}

// A warp's slice of k of 16 columns of u1 = x A1^T, from column `first` on, for all rows.
template <typename T>
__device__ void sum_u1(const Decode& args, const Rows<T>& rows, int64_t place, int first,
                       float (&acc)[2][4]) {
  constexpr int kColumns = kStepsOfU * kStep;
  const int own = first + threadIdx.x % 32 / 4;
  for (int start = threadIdx.x / 32 % kAdapterWarps * kColumns; start < args.hidden;
       start += kAdapterWarps * kColumns) {
    const int k = start + lane_column();
    Vector<T> right[kStepsOfU][2] = {};
#pragma unroll
    for (int step = 0; step < kStepsOfU; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (own + 8 * i >= args.rank1 || k + step * kStep >= args.hidden) continue;
        const int64_t at = place + 8 * i * args.hidden + k + step * kStep;
        right[step][i] = args.is_float1 ? load_rounded<T>(static_cast<const float*>(args.a1) + at)
                                        : load_rounded<T>(static_cast<const T*>(args.a1) + at);
      }
    }
    add_products(rows, right, k, args.hidden, acc);
  }
}

// The same for the rows of each modality and all columns.
template <typename T>
__device__ void sum_all_u1(const Decode& args, const TileOfSlots& tile, const Rows<T>& rows,
                           SharedUp& shared) {
  const int slice = threadIdx.x / 32 % kAdapterWarps, lane_row = threadIdx.x % 32 / 4;
  // Of the lane's rows, which its sums are of.
  const int modalities[2] = {lane_row < tile.count ? tile.modality(lane_row) : 0,
                             lane_row + 8 < tile.count ? tile.modality(lane_row + 8) : 0};
#pragma unroll 1
  for (int modality = 1; modality <= args.num_modalities; ++modality) {
    if (!has_modality(tile, modality)) continue;
    const int64_t place = adapter1(args).place_of_a(modality, tile.expert, 0);
#pragma unroll 1
    for (int first = 0; first < args.rank1; first += 16) {
      float acc[2][4] = {};
      sum_u1(args, rows, place + static_cast<int64_t>(lane_row + first) * args.hidden, first, acc);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int half = i % 4 / 2, r = first + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        if (modalities[half] != modality || r >= args.rank1) continue;
        shared.u[slice][lane_row + 8 * half][r] = acc[i / 4][i % 4];
      }
    }
  }
}

// Brings what the block's last steps need of the adapters into the L2.
__device__ void prefetch_up(const Decode& args, const TileOfSlots& tile) {
  const Adapter of_up = adapter1(args), of_down = adapter2(args);
  const int warp = threadIdx.x / 32 % kAdapterWarps, column = blockIdx.x * kDecodeColumns;
  const int left = args.inter - column, columns = left < kDecodeColumns ? left : kDecodeColumns;
#pragma unroll 1
  for (int modality = 1; modality <= args.num_modalities; ++modality) {
    if (!has_modality(tile, modality)) continue;
#pragma unroll 1
    for (int half = warp; of_up.rank > 0 && half < 2; half += kAdapterWarps) {
      const int64_t row = of_up.place_of_b(modality, tile.expert, half * args.inter + column);
      prefetch_range(of_up.b, row, columns * of_up.rank, of_up.bytes());
    }
#pragma unroll 1
    for (int r = warp; r < of_down.rank; r += kAdapterWarps) {
      const int64_t row = of_down.place_of_a(modality, tile.expert, r) + column;
      prefetch_range(of_down.a, row, columns, of_down.bytes());
    }
  }
}

// Products of the experts' weights by most warps, and u1 by the others.
template <typename T>
__device__ void multiply_up(const Decode& args, const TileOfSlots& tile, SharedUp& shared) {
  const Rows<T> rows(args.hidden_states, tile, args.hidden,
                     [&](int slot) { return slot / args.top_k; });
  if (threadIdx.x < 32 * kProductWarps) {
    sum_gate_up(args, tile, rows, shared);
  } else if (is_adapted(tile)) {
    prefetch_up(args, tile);
    sum_all_u1<T>(args, tile, rows, shared);
  }
}

template <typename T>
__device__ void scale_u1(const Decode& args, const TileOfSlots& tile, SharedUp& shared) {
  const Adapter adapter = adapter1(args);
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.count * adapter.rank; i += blockDim.x) {
    const int row = i / adapter.rank, r = i % adapter.rank;
    const int modality = tile.modality(row);
    if (modality == 0) continue;
    float sum = 0.0f;
#pragma unroll
    for (int slice = 0; slice < kAdapterWarps; ++slice) sum += shared.u[slice][row][r];
    shared.scaled[row][r] = scaled_u<T>(adapter, modality, sum);
  }
}

// The activation of the block's columns, from the rounded pre-activation as in training.
template <typename T>
__device__ void activate(const Decode& args, const TileOfSlots& tile, SharedUp& shared) {
  const Adapter adapter = adapter1(args);
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.count * kDecodeColumns; i += blockDim.x) {
    const int row = i / kDecodeColumns, of_block = i % kDecodeColumns, slot = tile.slot(row);
    const int column = blockIdx.x * kDecodeColumns + of_block;
    if (column >= args.inter) continue;
    float gate = 0.0f, up = 0.0f;
#pragma unroll
    for (int slice = 0; slice < kSlicesUp; ++slice) {
      gate += shared.sums[slice][row][of_block];
      up += shared.sums[slice][row][kDecodeColumns + of_block];
    }
    const int modality = tile.modality(row);
    if (modality > 0 && adapter.rank > 0) {
      const float* scaled = shared.scaled[row];
      gate += low_rank_term<T>(adapter, modality, tile.expert, column, scaled);
      up += low_rank_term<T>(adapter, modality, tile.expert, args.inter + column, scaled);
    }
    gate = rounded<T>(gate);
    up = rounded<T>(up);
    const T act = from_float<T>(gate * sigmoid(gate) * up);
    static_cast<T*>(args.act)[static_cast<int64_t>(slot) * args.inter + column] = act;
    shared.act[row][of_block] = to_float(act);
  }
}

// The block's part of u2 = a A2^T: a warp sums its columns for one row and one row of A2.
template <typename T>
__device__ void sum_parts_of_u2(const Decode& args, const TileOfSlots& tile,
                                const SharedUp& shared) {
  const Adapter adapter = adapter2(args);
  const int lane = threadIdx.x % 32, column = blockIdx.x * kDecodeColumns + lane;
  static_assert(kDecodeColumns == 32);
  const int warps = blockDim.x / 32, num_parts = gridDim.x;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < tile.count * adapter.rank; i += warps) {
    const int row = i / adapter.rank, r = i % adapter.rank, slot = tile.slot(row);
    const int modality = tile.modality(row);
    if (modality == 0) continue;
    float sum = 0.0f;
    if (column < args.inter) {
      const int64_t place = adapter.place_of_a(modality, tile.expert, r) + column;
      sum = shared.act[row][lane] * element<T>(adapter.a, place, adapter.is_float);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (lane == 0) {
      args.parts[(static_cast<int64_t>(slot) * num_parts + blockIdx.x) * adapter.rank + r] = sum;
    }
  }
}

// A block has kDecodeColumns columns of the activation of one expert's rows.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads, kResident) decode_gate_up_kernel(Decode args) {
  start_next_kernel();
  auto& shared = *reinterpret_cast<SharedUp*>(shared_memory());
  Routing& routing = shared.routing;
  find_tiles(args, routing);
  if (static_cast<int>(blockIdx.y) >= routing.num_tiles) return;
  multiply_up<T>(args, TileOfSlots(routing, blockIdx.y), shared);
  __syncthreads();
  // Found again rather than kept: registers are scarce above.
  const TileOfSlots tile(routing, blockIdx.y);
  const bool adapted = is_adapted(tile);
  if (adapted) {
    scale_u1<T>(args, tile, shared);
    __syncthreads();
  }
  activate<T>(args, tile, shared);
  if (!adapted) return;
  __syncthreads();
  sum_parts_of_u2<T>(args, tile, shared);
}

// --- down, and the sum over a token's experts

constexpr int kColumnsDown = 8;  // of a block
constexpr int kStepsDown = 8;

// Behind it in shared memory: products (slices, rows, kColumnsDown) and s u2 (rows, rank2).
struct SharedDown {
  Routing routing;

  __device__ float* products() { return reinterpret_cast<float*>(this + 1); }
};

// Where a warp is on its way through the tiles of its experts and its slice of k.
struct Walk {
  int num_tiles, size_k;
  int tile, start;  // start: the first column of k
  int first_start, next_tile, next_start;

  __device__ bool done() const { return tile >= num_tiles; }
  __device__ bool ends_tile() const { return start + next_start >= size_k; }
  __device__ void advance() {
    if (ends_tile()) tile += next_tile;
    start = ends_tile() ? first_start : start + next_start;
  }
};

// A lane's row of an expert's matrix, of W as in matrix_of.
template <typename W>
__device__ const W* row_of_down(const Decode& args, int expert) {
  const int64_t size = static_cast<int64_t>(args.hidden) * args.inter;
  const int column = blockIdx.x * kColumnsDown + threadIdx.x % 32 / 4;
  return matrix_of<W>(args.down, args.extra_down, args.num_base, expert, size) +
         static_cast<int64_t>(column) * args.inter;
}

// Loads a lane's weights of kStepsDown steps; beyond the last column of k they are zeros.
template <typename T>
__device__ void load_down(const Decode& args, int expert, int start,
                          Vector<T> (&right)[kStepsDown][1]) {
  const T* row = row_of_down<T>(args, expert);
#pragma unroll
  for (int step = 0; step < kStepsDown; ++step) {
    const int k = start + lane_column() + step * kStep;
    right[step][0] = load_as<T>(row + k, k < args.inter);
  }
}

// Returns where a warp begins on its way.
__device__ Walk first_of_walk(const Decode& args, int slices, const Routing& routing) {
  constexpr int kColumns = kStepsDown * kStep;
  const int warp = threadIdx.x / 32, start = warp % slices * kColumns;
  return {routing.num_tiles, args.inter, warp / slices,    start,
          start,             kProductWarps / slices, slices * kColumns};
}

// Stores a lane's sums of a tile and a slice of k, and clears them.
__device__ void store_down(const Decode& args, int slices, const TileOfSlots& tile,
                           SharedDown& shared, float (&acc)[1][4]) {
  const int first = threadIdx.x / 32 % slices * args.tokens * args.top_k;
  for_each_sum(acc[0], [&](int row, int column, float value) {
    if (row >= tile.count) return;
    shared.products()[(first + tile.slot(row)) * kColumnsDown + column] = value;
  });
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[0][i] = 0.0f;
}

__device__ int slot_itself(int slot) { return slot; }

// A warp's share of a W2^T. The first weights are on their way before the activation is there.
template <typename T>
__device__ void multiply_down(const Decode& args, int slices, SharedDown& shared) {
  const Routing& routing = shared.routing;
  Walk walk = first_of_walk(args, slices, routing);
  Vector<T> right[kStepsDown][1];
  float acc[1][4] = {};
  // Passes over the tiles that multiply_wide_down has.
  const auto load = [&] {
    while (!walk.done() && is_wide(args, TileOfSlots(routing, walk.tile).expert)) walk.advance();
    if (!walk.done()) load_down(args, TileOfSlots(routing, walk.tile).expert, walk.start, right);
  };
  load();
  wait_for_previous_kernel();
  while (!walk.done()) {
    const TileOfSlots tile(routing, walk.tile);
    const Rows<T> left(args.act, tile, args.inter, slot_itself);
    add_products(left, right, walk.start + lane_column(), args.inter, acc);
    if (walk.ends_tile()) store_down(args, slices, tile, shared, acc);
    walk.advance();
    load();
  }
}

// The same for experts whose matrices are float32, a step at a time: rounding takes registers.
template <typename T>
__device__ void multiply_wide_down(const Decode& args, int slices, SharedDown& shared) {
  float acc[1][4] = {};
  for (Walk walk = first_of_walk(args, slices, shared.routing); !walk.done(); walk.advance()) {
    const TileOfSlots tile(shared.routing, walk.tile);
    if (!is_wide(args, tile.expert)) continue;
    const Rows<T> left(args.act, tile, args.inter, slot_itself);
    const float* row = row_of_down<float>(args, tile.expert);
    int k = walk.start + lane_column();
#pragma unroll 1
    for (int step = 0; step < kStepsDown; ++step, k += kStep) {
      const Vector<T> right[1][1] = {{load_as<T>(row + k, k < args.inter)}};
      add_products(left, right, k, args.inter, acc);
    }
    if (walk.ends_tile()) store_down(args, slices, tile, shared, acc);
  }
}

// s u2 of the adapted rows, from its parts: eight lanes sum those of an element.
template <typename T>
__device__ void add_parts_of_u2(const Decode& args, const Routing& routing, float* scaled) {
  constexpr int kLanes = 8, kPerWarp = 32 / kLanes;
  const Adapter adapter = adapter2(args);
  const int rank = adapter.rank, elements = args.tokens * args.top_k * rank;
  const int num_parts = static_cast<int>(decode_parts(args.inter));
  const int warp = threadIdx.x / 32 - kProductWarps, own = threadIdx.x % kLanes;
  for (int first = warp * kPerWarp; first < elements; first += kAdapterWarps * kPerWarp) {
    const int i = first + threadIdx.x % 32 / kLanes;
    const int modality = i < elements ? routing.modality[i / rank] : 0;
    float sum = 0.0f;
    if (modality > 0) {
      const float* parts =
          args.parts + static_cast<int64_t>(i / rank) * num_parts * rank + i % rank;
#pragma unroll 8
      for (int part = own; part < num_parts; part += kLanes) {
        sum += parts[static_cast<int64_t>(part) * rank];
      }
    }
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    }
    if (modality > 0 && own == 0) scaled[i] = scaled_u<T>(adapter, modality, sum);
  }
}

__device__ void prefetch_down(const Decode& args, const Routing& routing) {
  const Adapter adapter = adapter2(args);
  for (int slot = threadIdx.x / 32 - kProductWarps; slot < args.tokens * args.top_k;
       slot += kAdapterWarps) {
    const int modality = routing.modality[slot];
    if (modality == 0) continue;
    const int64_t row =
        adapter.place_of_b(modality, routing.expert[slot], blockIdx.x * kColumnsDown);
    prefetch_range(adapter.b, row, kColumnsDown * adapter.rank, adapter.bytes());
  }
}

// Adds the slices of each row's products, and its low-rank term, into the first slice.
template <typename T>
__device__ void finish_rows(const Decode& args, int slices, const float* scaled,
                            SharedDown& shared) {
  const Adapter adapter = adapter2(args);
  const int rows = args.tokens * args.top_k, size = rows * kColumnsDown;
  float* products = shared.products();
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const int slot = i / kColumnsDown, expert = shared.routing.expert[slot];
    if (expert < 0) continue;
    float sum = products[i];
    for (int slice = 1; slice < slices; ++slice) sum += products[slice * size + i];
    const int modality = shared.routing.modality[slot];
    if (modality > 0 && adapter.rank > 0) {
      const int column = blockIdx.x * kColumnsDown + i % kColumnsDown;
      sum += low_rank_term<T>(adapter, modality, expert, column, scaled + slot * adapter.rank);
    }
    products[i] = sum;
  }
}

template <typename T>
__device__ void sum_experts(const Decode& args, SharedDown& shared) {
  for (int i = threadIdx.x; i < args.tokens * kColumnsDown; i += blockDim.x) {
    const int token = i / kColumnsDown, column = i % kColumnsDown;
    float sum = 0.0f;
    for (int k = 0; k < args.top_k; ++k) {
      const int slot = token * args.top_k + k;
      if (shared.routing.expert[slot] < 0) continue;
      const float weight = args.weights_are_float
                               ? static_cast<const float*>(args.topk_weights)[slot]
                               : to_float(static_cast<const T*>(args.topk_weights)[slot]);
      sum += weight * shared.products()[slot * kColumnsDown + column];
    }
    static_cast<T*>(args.out)[static_cast<int64_t>(token) * args.hidden +
                              blockIdx.x * kColumnsDown + column] = from_float<T>(sum);
  }
}

// A block has kColumnsDown columns of the output of all tokens.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads, kResident)
    decode_down_kernel(Decode args, int slices) {
  auto& shared = *reinterpret_cast<SharedDown*>(shared_memory());
  float* scaled =
      shared.products() + slices * args.tokens * args.top_k * kColumnsDown;
  find_tiles(args, shared.routing);
  if (threadIdx.x < 32 * kProductWarps) {
    multiply_down<T>(args, slices, shared);
    if (args.extra_is_float) multiply_wide_down<T>(args, slices, shared);
  } else {
    prefetch_down(args, shared.routing);
    wait_for_previous_kernel();
    add_parts_of_u2<T>(args, shared.routing, scaled);
  }
  __syncthreads();
  finish_rows<T>(args, slices, scaled, shared);
  __syncthreads();
  sum_experts<T>(args, shared);
}

}  // namespace

#ifndef __CUDACC_RTC__
namespace {

// Slices of k of down. With more experts of a token, more of them are multiplied at once.
int slices_down(int top_k) { return top_k >= 8 ? 1 : top_k >= 4 ? 2 : top_k >= 2 ? 4 : 8; }

template <typename T>
cudaError_t launch_both(const Decode& args, cudaStream_t stream) {
  const int rows = args.tokens * args.top_k, slices = slices_down(args.top_k);
  const int most_tiles = rows / kTileRows + args.num_experts;
  const auto threads = [](int rank) {
    return 32 * (kProductWarps + (rank > 0 ? kAdapterWarps : 0));
  };
  const dim3 grid(static_cast<unsigned>(decode_parts(args.inter)),
                  rows < most_tiles ? rows : most_tiles);
  const cudaError_t error =
      launch(MOE_KERNEL(decode_gate_up_kernel, T), grid, threads(args.rank1 + args.rank2),
             sizeof(SharedUp), stream, args);
  if (error != cudaSuccess) return error;
  const size_t floats = static_cast<size_t>(rows) * (slices * kColumnsDown + args.rank2);
  return launch_early(MOE_KERNEL(decode_down_kernel, T), dim3(args.hidden / kColumnsDown),
                      threads(args.rank2), sizeof(SharedDown) + sizeof(float) * floats, stream,
                      args, slices);
}

}  // namespace

cudaError_t launch_decode(const Decode& decode, Scalar dtype, cudaStream_t stream) {
  const int rank = decode.rank1 > decode.rank2 ? decode.rank1 : decode.rank2;
  if (!decode_takes(decode.tokens, decode.top_k, decode.hidden, decode.inter, rank)) {
    return cudaErrorInvalidValue;
  }
  if (decode.tokens == 0) return cudaSuccess;
  switch (dtype) {
    case Scalar::kHalf:
      return launch_both<__half>(decode, stream);
    case Scalar::kBFloat16:
      return launch_both<__nv_bfloat16>(decode, stream);
    default:
      return cudaErrorInvalidValue;
  }
}
#endif

}  // namespace moe_kernels::cuda

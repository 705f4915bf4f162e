// Wgrad: sums of outer products over rows, with du = rows times a matrix. The wide operand is read
// once, by asynchronous copies several steps of rows ahead.
//
// A block handles 128 columns of `right` and up to 64 of `left` for one tile of rows of a problem;
// 256 and up to 32 where it also multiplies `right` by its columns of `matrix`, and 256 in the
// other problem of that launch. The rows of a step are written to shared memory one step before its
// copies start. Their entries of `perm` are loaded two steps before that, and the `weights` that
// these point to one step before, so that no load is waited for.
#include "wgrad.h"

#include <algorithm>

#include "device.h"
#include "grouped_gemm_shapes.h"

namespace moe_kernels::cuda {
namespace {

constexpr int kStages = 3;          // steps of rows being loaded or in use
constexpr int kMaxFinished = 1024;  // elements of a block of the finish
constexpr int kFinishThreads = 128;

// Sizes and dtypes of a block's work. A warp has 32 columns of right.
template <typename L, typename R, int kHeight_, int kWidth_>
struct Shape {
  using Left = L;
  using Right = R;
  static constexpr int kHeight = kHeight_;
  static constexpr int kWidth = kWidth_;
  static constexpr int kThreads = kWidth;
  static constexpr int kRows = sizeof(R) == 2 ? 32 : 16;
  // The four lanes of a fragment read rows 2 apart; with this stride they lie in different banks.
  static constexpr int kStride = kHeight + 16 / sizeof(L);
};

// The rows of one step in shared memory.
template <typename S>
struct alignas(16) Stage {
  typename S::Right right[S::kRows * S::kWidth];  // chunks of 16 bytes in another order in each row
  typename S::Left left[S::kRows * S::kStride];
};

// Chunk of a row after swizzling: eight rows of one chunk then lie in different banks.
__device__ inline int swizzled(int row, int chunk) { return chunk ^ (row & 7); }

// Position of a step's row in both operands, -1 beyond the end, and its factor.
struct Row {
  int left;
  int right;
  float factor;
};

// A block's part of a problem: a tile of rows, and the first of its columns of both operands.
struct Work {
  const Wgrad& args;
  const WgradProblem& problem;
  Tile tile;
  int height;
  int width;
  int part;  // of du
};

// Whether all rows begin at a multiple of 16 bytes and have whole vectors.
template <typename V>
__device__ bool has_vectors(const void* rows, int size) {
  return size % Vector<V>::kSize == 0 && is_aligned(rows);
}

// Returns a routing weight as stored: a conversion would wait for the load.
__device__ inline uint32_t weight_of(const WgradProblem& problem, int slot) {
  if (slot < 0 || problem.weights == nullptr) return 0;
  return problem.weights_dtype == Scalar::kFloat
             ? static_cast<const uint32_t*>(problem.weights)[slot]
             : static_cast<const uint16_t*>(problem.weights)[slot];
}

template <typename R>
__device__ float converted(const WgradProblem& problem, uint32_t weight) {
  if (problem.weights == nullptr) return 1.0f;
  if constexpr (sizeof(R) == 2) {
    if (problem.weights_dtype != Scalar::kFloat) {
      const auto half = static_cast<uint16_t>(weight);
      return to_float(*reinterpret_cast<const R*>(&half));
    }
  }
  return *reinterpret_cast<const float*>(&weight);
}

template <typename S>
struct Block {
  using Right = typename S::Right;
  static constexpr int kRows = S::kRows;

  Stage<S> stages[kStages];
  Row rows[kStages + 1][kRows];

  // Entry of perm for this thread's row of a step, -1 beyond the end.
  static __device__ int slot_of(const Work& work, int step) {
    const int64_t place = work.tile.first + static_cast<int64_t>(step) * kRows + threadIdx.x;
    return threadIdx.x < kRows && place < work.tile.end ? static_cast<int>(work.args.perm[place])
                                                        : -1;
  }

  __device__ void write_row(const Work& work, int step, int slot, uint32_t weight, float factor) {
    if (threadIdx.x >= kRows) return;
    Row row = {-1, -1, 0.0f};
    if (slot >= 0) {
      const int token = slot / work.args.top_k;
      const int place =
          static_cast<int>(work.tile.first) + step * kRows + static_cast<int>(threadIdx.x);
      row.left = work.problem.left_by_token ? token : place;
      row.right = work.problem.right_by_token ? token : place;
      row.factor = factor * converted<Right>(work.problem, weight);
    }
    rows[step % (kStages + 1)][threadIdx.x] = row;
  }

  // Starts the copies of a step's rows, columns from `column` on; without `vectors` copies at once.
  template <typename V, int kColumns, bool kIsRight>
  __device__ void copy(V* to, const Row* of, const void* from, int column, int size, bool vectors) {
    constexpr int kVector = Vector<V>::kSize, kChunks = kColumns / kVector;
    constexpr int kAtOnce = S::kThreads / kChunks;
    const int chunk = threadIdx.x % kChunks, first = column + chunk * kVector;
    const auto* own = static_cast<const V*>(from) + first;
#pragma unroll
    for (int start = 0; start < kRows; start += kAtOnce) {
      const int row = start + threadIdx.x / kChunks;
      if (kAtOnce > kRows && row >= kRows) continue;
      const int at = kIsRight ? of[row].right : of[row].left;
      V* place = kIsRight ? to + row * kColumns + swizzled(row, chunk) * kVector
                          : to + row * S::kStride + chunk * kVector;
      if (vectors) {
        copy_async(place, own + static_cast<int64_t>(at) * size, at >= 0 && first < size);
      } else {
        const V* source = static_cast<const V*>(from) + static_cast<int64_t>(at) * size;
        *reinterpret_cast<Vector<V>*>(place) =
            load_vector(at >= 0 ? source : nullptr, first, size, false);
      }
    }
  }

  __device__ void load(const Work& work, int step) {
    const WgradProblem& problem = work.problem;
    Stage<S>& stage = stages[step % kStages];
    const Row* of = rows[step % (kStages + 1)];
    copy<Right, S::kWidth, true>(stage.right, of, problem.right, work.width, problem.width,
                                 has_vectors<Right>(problem.right, problem.width));
    using Left = typename S::Left;
    copy<Left, S::kHeight, false>(stage.left, of, problem.left, work.height, problem.height,
                                  has_vectors<Left>(problem.left, problem.height));
  }
};

__device__ float* place_of(float* out, const WgradProblem& problem, int h, int w) {
  return out + (problem.transposed ? static_cast<int64_t>(w) * problem.height + h
                                   : static_cast<int64_t>(h) * problem.width + w);
}

// Sums of a warp: 32 columns of right by kHeight of left, as tensor-core fragments.
template <typename S, typename R = typename S::Right>
struct Sums {
  static constexpr int kTiles = S::kHeight / 8;
  float acc[2][kTiles][4] = {};

  __device__ void add(const Block<S>& block, int step) {
    const Stage<S>& stage = block.stages[step % kStages];
    const Row* rows = block.rows[step % (kStages + 1)];
#pragma unroll
    for (int k = 0; k < S::kRows; k += 16) add_rows(stage, rows, k);
  }

  __device__ void add_rows(const Stage<S>& stage, const Row* rows, int k) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = k + lane % 8 + lane / 16 * 8;
      const int chunk = warp * 4 + i * 2 + lane / 8 % 2;
      load_matrices_transposed(a[i], stage.right + row * S::kWidth + swizzled(row, chunk) * 8);
    }
    const int pair = k + lane % 4 * 2;
    const float factors[4] = {rows[pair].factor, rows[pair + 1].factor, rows[pair + 8].factor,
                              rows[pair + 9].factor};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float left[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = pair + e / 2 * 8 + e % 2;
        left[e] = factors[e] * to_float(stage.left[row * S::kStride + 8 * j + lane / 4]);
      }
      const uint32_t b[2] = {pack<R>(left[0], left[1]), pack<R>(left[2], left[3])};
#pragma unroll
      for (int i = 0; i < 2; ++i) multiply<R>(acc[i][j], a[i], b);
    }
  }

  __device__ void store(const Work& work, float* out) const {
    const WgradProblem& problem = work.problem;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int w = work.width + 32 * warp + 16 * i + lane / 4 + part / 2 * 8;
          const int h = work.height + 8 * j + lane % 4 * 2 + part % 2;
          if (w < problem.width && h < problem.height) {
            *place_of(out, problem, h, w) = acc[i][j][part];
          }
        }
      }
    }
  }
};

// float32 has no tensor cores: a thread has one column of right.
template <typename S>
struct Sums<S, float> {
  float acc[S::kHeight] = {};

  __device__ void add(const Block<S>& block, int step) {
    const Stage<S>& stage = block.stages[step % kStages];
    const Row* rows = block.rows[step % (kStages + 1)];
#pragma unroll 4
    for (int row = 0; row < S::kRows; ++row) {
      const int chunk = swizzled(row, threadIdx.x / 4);
      const float right = stage.right[row * S::kWidth + chunk * 4 + threadIdx.x % 4];
      const float* left = stage.left + row * S::kStride;
#pragma unroll
      for (int h = 0; h < S::kHeight; ++h) acc[h] += rows[row].factor * left[h] * right;
    }
  }

  __device__ void store(const Work& work, float* out) const {
    const WgradProblem& problem = work.problem;
    const int w = work.width + threadIdx.x;
#pragma unroll
    for (int i = 0; i < S::kHeight; ++i) {
      const int h = work.height + i;
      if (w < problem.width && h < problem.height) *place_of(out, problem, h, w) = acc[i];
    }
  }
};

// du of one step: its rows times the group's matrix. A warp has a fragment (16, 8) of the result
// for a slice of the block's columns; the slices are added a step later, when all are complete.
template <typename S>
struct DuOfStep {
  using R = typename S::Right;
  static constexpr int kRowTiles = S::kRows / 16;
  static constexpr int kFragments = kRowTiles * (S::kHeight / 8);
  static constexpr int kSlices = S::kThreads / 32 / kFragments;
  static constexpr int kColumns = S::kWidth / kSlices;  // columns of a slice
  static_assert(kSlices * kFragments * 32 == S::kThreads);
  struct Shared {
    float slices[2][kSlices][S::kRows][S::kHeight];
  };
  uint32_t matrix[kColumns / 16][2];

  static __device__ int slice() { return threadIdx.x / 32 / kFragments; }
  static __device__ int row_tile() { return threadIdx.x / 32 % kRowTiles * 16; }
  static __device__ int rank_tile() { return threadIdx.x / 32 % kFragments / kRowTiles * 8; }

  // Loads the block's columns of the group's (width, height).
  __device__ void load(const Work& work) {
    if (work.problem.matrix_dtype == Scalar::kFloat) {
      load_as<float>(work);
    } else {
      load_as<R>(work);
    }
  }

  template <typename M>
  __device__ void load_as(const Work& work) {
    const WgradProblem& problem = work.problem;
    const auto* of_group = static_cast<const M*>(problem.matrix) +
                           work.tile.group * problem.width * static_cast<int64_t>(problem.height);
    const int n = rank_tile() + threadIdx.x % 32 / 4;
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int w = work.width + slice() * kColumns + 16 * k + 8 * part + threadIdx.x % 4 * 2;
        float pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t at = static_cast<int64_t>(w + e) * problem.height + n;
          const bool present = w + e < problem.width && n < problem.height;
          pair[e] = present ? to_float(of_group[at]) : 0.0f;
        }
        matrix[k][part] = pack<R>(pair[0], pair[1]);
      }
    }
  }

  __device__ void multiply_step(const R* right, int step, Shared& shared) {
    const int lane = threadIdx.x % 32, row = row_tile() + lane % 16;
    float acc[2][4] = {};  // one for every other k: halves the chain of dependent sums
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      const int chunk = slice() * (kColumns / 8) + 2 * k + lane / 16;
      uint32_t a[4];
      load_matrices(a, right + row * S::kWidth + swizzled(row, chunk) * 8);
      multiply<R>(acc[k % 2], a, matrix[k]);
    }
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      shared.slices[step % 2][slice()][row_tile() + lane / 4 + part / 2 * 8]
                   [rank_tile() + lane % 4 * 2 + part % 2] = acc[0][part] + acc[1][part];
    }
  }

  // Stores a step's rows, if they lie in the tile; after a barrier.
  static __device__ void store(const Work& work, const Shared& shared, int step) {
    const int64_t height = work.problem.height;
    for (int i = threadIdx.x; i < S::kRows * S::kHeight; i += S::kThreads) {
      const int row = i / S::kHeight, n = i % S::kHeight;
      const int64_t place = work.tile.first + static_cast<int64_t>(step) * S::kRows + row;
      if (place >= work.tile.end || n >= height) continue;
      float sum = 0.0f;
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) sum += shared.slices[step % 2][slice][row][n];
      work.args.parts[(work.part * work.args.num_rows + place) * height + n] = sum;
    }
  }
};

// Stands in for DuOfStep where there is no matrix.
template <typename S>
struct NoDu {
  struct Shared {};

  __device__ void load(const Work&) {}
  __device__ void multiply_step(const typename S::Right*, int, Shared&) {}
  static __device__ void store(const Work&, const Shared&, int) {}
};

// Destination of a tile's sums: a group of several tiles has a partial sum for each.
__device__ float* sums_of(const WgradProblem& problem, const Tile& tile) {
  const int64_t* groups = problem.groups + tile.group;
  const int64_t low = groups[0], high = groups[problem.num_groups];
  const int64_t size = static_cast<int64_t>(problem.height) * problem.width;
  if (high - low <= problem.chunk) return problem.out + tile.group * size;
  const int64_t partial = groups[2 * problem.num_groups] + (tile.first - low) / problem.chunk;
  return problem.partial + partial * size;
}

// How a block works on a problem: its shape, and what computes du.
template <typename S_, template <typename> typename OfStep_>
struct Way {
  using S = S_;
  using OfStep = OfStep_<S>;
  struct Shared {
    Block<S> block;
    typename OfStep::Shared du;
  };

  // The number of a problem's blocks, and what one of them does.
  static MOE_HOST_DEVICE int64_t blocks(const WgradProblem& problem) {
    const int64_t heights = (problem.height + S::kHeight - 1) / S::kHeight;
    return heights * ((problem.width + S::kWidth - 1) / S::kWidth) * problem.num_tiles;
  }
  static __device__ Work work_of(const Wgrad& args, const WgradProblem& problem, int block) {
    const int heights = (problem.height + S::kHeight - 1) / S::kHeight;
    const int place = block / problem.num_tiles, part = place / heights;
    return {args, problem, tile_of(problem.tiles, block % problem.num_tiles, problem.num_tiles),
            place % heights * S::kHeight, part * S::kWidth, part};
  }
};

// Sums a tile of rows.
template <typename Way>
__device__ void sum_tile(const Wgrad& args, const WgradProblem& problem, int number) {
  using S = typename Way::S;
  using OfStep = typename Way::OfStep;
  const Work work = Way::work_of(args, problem, number);
  const Tile& tile = work.tile;
  if (tile.first >= tile.end) return;
  auto& [block, du] = *reinterpret_cast<typename Way::Shared*>(shared_memory());
  const float factor = problem.factors[tile.group / problem.groups_of_factor];
  const int steps = static_cast<int>((tile.end - tile.first + S::kRows - 1) / S::kRows);
#pragma unroll
  for (int step = 0; step < kStages; ++step) {
    const int its = Block<S>::slot_of(work, step);
    block.write_row(work, step, its, weight_of(problem, its), factor);
  }
  int slot = Block<S>::slot_of(work, kStages);
  __syncthreads();
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) block.load(work, step);
    commit_copies();
  }
  Sums<S> sums;
  OfStep of_step;
  of_step.load(work);
  for (int step = 0; step < steps; ++step) {
    const uint32_t weight = weight_of(problem, slot);
    const int next = Block<S>::slot_of(work, step + kStages + 1);
    wait_copies<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) block.load(work, step + kStages - 1);
    commit_copies();
    if (step > 0) OfStep::store(work, du, step - 1);
    of_step.multiply_step(block.stages[step % kStages].right, step, du);
    sums.add(block, step);
    block.write_row(work, step + kStages, slot, weight, factor);
    slot = next;
  }
  sums.store(work, sums_of(problem, tile));
  __syncthreads();
  OfStep::store(work, du, steps - 1);
}

// A kernel's problems: up to kHeight columns of left in a block. With kDuHeight, the first has du,
// and a block up to so many columns of its left.
template <typename R_, int kHeight, int kDuHeight_>
struct Form {
  using R = R_;
  static constexpr int kDuHeight = kDuHeight_;
  static constexpr int kThreads = kDuHeight == 0 ? 128 : kColumnsOfPart;
  template <typename L>
  using Plain = Way<Shape<L, R, kHeight, kThreads>, NoDu>;
  using WithDu = Way<Shape<R, R, kDuHeight, kThreads>, DuOfStep>;
};

// First come the blocks of the first problem.
template <typename F>
__global__ void __launch_bounds__(F::kThreads)
    wgrad_kernel(const __grid_constant__ Wgrad args, int blocks_of_first) {
  using R = typename F::R;
  const int block = blockIdx.x;
  const bool second = block >= blocks_of_first;
  if constexpr (F::kDuHeight > 0) {
    if (!second) return sum_tile<typename F::WithDu>(args, args.problems[0], block);
  }
  const WgradProblem& problem = args.problems[second];
  const int number = second ? block - blocks_of_first : block;
  if (problem.left_dtype == Scalar::kFloat) {
    sum_tile<typename F::template Plain<float>>(args, problem, number);
  } else {
    sum_tile<typename F::template Plain<R>>(args, problem, number);
  }
}

// Adds a share of the partial sums of a group, in the order of the tiles; zeros without tiles.
__device__ void finish_sums(const WgradProblem& problem, int64_t group, int64_t share) {
  const int64_t* groups = problem.groups + group;
  const int64_t rows = groups[problem.num_groups] - groups[0];
  if (rows > 0 && rows <= problem.chunk) return;
  const int64_t size = static_cast<int64_t>(problem.height) * problem.width;
  const int64_t first = share * kMaxFinished, partial = groups[2 * problem.num_groups];
  for (int64_t i = first + threadIdx.x; i < first + kMaxFinished && i < size; i += kFinishThreads) {
    float sum = 0.0f;
    for (int64_t tile = 0; tile * problem.chunk < rows; ++tile) {
      sum += problem.partial[(partial + tile) * size + i];
    }
    problem.out[group * size + i] = sum;
  }
}

// Adds elements [first, end) of `num` parts of `size` elements, in order.
template <typename Out>
__device__ void add_parts(Out* out, const float* parts, int num, int64_t size, int64_t first,
                          int64_t end) {
  end = first + kMaxFinished < end ? first + kMaxFinished : end;
  for (int64_t i = first + threadIdx.x; i < end; i += kFinishThreads) {
    float sum = 0.0f;
#pragma unroll 8
    for (int part = 0; part < num; ++part) sum += parts[part * size + i];
    out[i] = from_float<Out>(sum);
  }
}

// Adds a share of the dots.
template <typename Out>
__device__ void add_dots(const Wgrad& args, int64_t share) {
  add_parts(static_cast<Out*>(args.sum_of_dots), args.dots, args.num_dots, args.num_rows,
            share * kMaxFinished, args.num_rows);
}

// Adds a share of the slots of a pair, number modality * num_base + expert.
__device__ void add_slots(const Folded& folded, const FoldedSums& sums, int64_t pair,
                          int64_t share) {
  const int64_t modality = pair / folded.num_base, expert = pair % folded.num_base;
  const int64_t* of_expert = folded.segments + expert * (folded.num_modalities + 1);
  const int64_t low = of_expert[modality + 1], high = of_expert[modality + 2];
  const int64_t first_tile = (low - of_expert[0]) / kFoldedRows;
  const int64_t tiles = high > low ? (high - 1 - of_expert[0]) / kFoldedRows - first_tile + 1 : 0;
  const int64_t slot = first_folded(low, expert * folded.num_modalities + modality);
  const int64_t first = share * kMaxFinished;
  for (int64_t i = first + threadIdx.x; i < first + kMaxFinished && i < sums.size;
       i += kFinishThreads) {
    float sum = 0.0f;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += sums.slots[(slot + tile) * sums.size + i];
    sums.out[pair * sums.size + i] = sum;
  }
}

// Blocks of the finish, in this order, each with a share of kMaxFinished elements at most.
struct Finish {
  int of_group[kMaxProblems];  // blocks of a group
  int sums[kMaxProblems];      // of all groups
  int of_tile;                 // of the first problem, for du
  int du;                      // of all its tiles
  int of_pair[kMaxProblems];   // blocks of a pair of the folded sums
  int folded[kMaxProblems];    // of all pairs
  int dots;
};

__global__ void __launch_bounds__(kFinishThreads)
    finish_wgrad_kernel(const __grid_constant__ Wgrad args, Finish blocks) {
  int block = blockIdx.x;
#pragma unroll
  for (int i = 0; i < kMaxProblems; ++i) {
    if (block < blocks.sums[i]) {
      const int of_group = blocks.of_group[i];
      return finish_sums(args.problems[i], block / of_group, block % of_group);
    }
    block -= blocks.sums[i];
  }
  if (block < blocks.du) {
    const WgradProblem& problem = args.problems[0];
    const int64_t height = problem.height, share = block % blocks.of_tile;
    const Tile tile = tile_of(problem.tiles, block / blocks.of_tile, problem.num_tiles);
    return add_parts(args.du, args.parts, wgrad_parts(problem.width), args.num_rows * height,
                     tile.first * height + share * kMaxFinished, tile.end * height);
  }
  block -= blocks.du;
#pragma unroll
  for (int i = 0; i < kMaxProblems; ++i) {
    if (block < blocks.folded[i]) {
      const int of_pair = blocks.of_pair[i];
      return add_slots(args.folded, args.folded.sums[i], block / of_pair, block % of_pair);
    }
    block -= blocks.folded[i];
  }
  const int64_t share = block;
  if (args.dots_dtype == Scalar::kFloat) return add_dots<float>(args, share);
  if (args.dots_dtype == Scalar::kHalf) return add_dots<__half>(args, share);
  add_dots<__nv_bfloat16>(args, share);
}

}  // namespace

#ifndef __CUDACC_RTC__
namespace {

bool has_du(const Wgrad& args) {
  return args.num_problems > 0 && args.problems[0].matrix != nullptr;
}

Finish blocks_of_finish(const Wgrad& args) {
  Finish blocks = {};
  for (int i = 0; i < args.num_problems; ++i) {
    const WgradProblem& problem = args.problems[i];
    const int64_t size = static_cast<int64_t>(problem.height) * problem.width;
    blocks.of_group[i] = ceil_div(size, kMaxFinished);
    blocks.sums[i] = problem.num_groups * blocks.of_group[i];
  }
  if (has_du(args)) {
    const WgradProblem& problem = args.problems[0];
    const int64_t rows = std::min(problem.chunk, args.num_rows);
    blocks.of_tile = ceil_div(rows * problem.height, kMaxFinished);
    blocks.du = problem.num_tiles * blocks.of_tile;
  }
  for (int i = 0; i < args.folded.num_sums; ++i) {
    blocks.of_pair[i] = ceil_div(args.folded.sums[i].size, kMaxFinished);
    blocks.folded[i] =
        blocks.of_pair[i] * args.folded.num_base * args.folded.num_modalities;
  }
  if (args.num_dots > 0) blocks.dots = ceil_div(args.num_rows, kMaxFinished);
  return blocks;
}

cudaError_t launch_finish(const Wgrad& args, cudaStream_t stream) {
  const Finish blocks = blocks_of_finish(args);
  const int all = blocks.sums[0] + blocks.sums[1] + blocks.du + blocks.folded[0] +
                  blocks.folded[1] + blocks.dots;
  if (all == 0) return cudaSuccess;
  return launch(MOE_KERNEL(finish_wgrad_kernel), all, kFinishThreads, 0, stream, args, blocks);
}

template <typename F>
constexpr size_t bytes_of() {
  const size_t plain = std::max(sizeof(typename F::template Plain<float>::Shared),
                                sizeof(typename F::template Plain<typename F::R>::Shared));
  if constexpr (F::kDuHeight == 0) {
    return plain;
  } else {
    return std::max(plain, sizeof(typename F::WithDu::Shared));
  }
}

template <typename F>
int64_t blocks_of(const Wgrad& args, int problem) {
  if (args.num_rows == 0 || problem >= args.num_problems) return 0;
  if constexpr (F::kDuHeight > 0) {
    if (problem == 0) return F::WithDu::blocks(args.problems[0]);
  }
  return F::template Plain<float>::blocks(args.problems[problem]);
}

template <typename F>
cudaError_t launch_form(const Wgrad& args, cudaStream_t stream) {
  static_assert(bytes_of<F>() <= kMaxSharedBytes);
  const int64_t first = blocks_of<F>(args, 0), second = blocks_of<F>(args, 1);
  if (first + second > 0) {
    const cudaError_t error =
        launch(MOE_KERNEL(wgrad_kernel, F), static_cast<unsigned>(first + second), F::kThreads,
               bytes_of<F>(), stream, args, static_cast<int>(first));
    if (error != cudaSuccess) return error;
  }
  return launch_finish(args, stream);
}

template <typename R, int kDuHeight>
cudaError_t launch_heights(const Wgrad& args, bool tall, cudaStream_t stream) {
  return tall ? launch_form<Form<R, 64, kDuHeight>>(args, stream)
              : launch_form<Form<R, 16, kDuHeight>>(args, stream);
}

template <typename R>
cudaError_t launch_halves(const Wgrad& args, cudaStream_t stream) {
  bool tall = false;
  for (int i = has_du(args); i < args.num_problems; ++i) tall |= args.problems[i].height > 16;
  if (!has_du(args)) return launch_heights<R, 0>(args, tall, stream);
  return args.problems[0].height > 16 ? launch_heights<R, 32>(args, tall, stream)
                                      : launch_heights<R, 16>(args, tall, stream);
}

bool fits(Scalar scalar, Scalar right) { return scalar == Scalar::kFloat || scalar == right; }

bool is_supported(const Wgrad& args, Scalar right) {
  for (int i = 0; i < args.num_problems; ++i) {
    const WgradProblem& problem = args.problems[i];
    if (!fits(problem.left_dtype, right) || !fits(problem.weights_dtype, right)) return false;
    if (problem.matrix == nullptr) continue;
    if (i > 0 || right == Scalar::kFloat || problem.left_dtype != right ||
        problem.height > kMaxRankWithDu || !fits(problem.matrix_dtype, right)) {
      return false;
    }
  }
  return args.num_problems <= kMaxProblems;
}

}  // namespace

cudaError_t launch_wgrad(const Wgrad& wgrad, Scalar right, cudaStream_t stream) {
  if (!is_supported(wgrad, right)) return cudaErrorInvalidValue;
  switch (right) {
    case Scalar::kFloat:
      return launch_form<Form<float, 16, 0>>(wgrad, stream);
    case Scalar::kHalf:
      return launch_halves<__half>(wgrad, stream);
    case Scalar::kBFloat16:
      return launch_halves<__nv_bfloat16>(wgrad, stream);
  }
  return cudaErrorInvalidValue;
}
#endif

}  // namespace moe_kernels::cuda

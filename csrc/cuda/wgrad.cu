// Wgrad: sums of outer products over rows, with du = rows times a matrix. The wide operand is read
// once, by asynchronous copies several steps of rows ahead.
//
// A block handles 128 columns of `right` and up to 64 of `left` for one tile of rows; 256 and up to
// 32 where it also multiplies `right` by its columns of `matrix`. The rows of a step are written to
// shared memory one step before its copies start. Their entries of `perm` are loaded two steps
// before that, and the `weights` that these point to one step before, so that no load is waited
// for.
#include "wgrad.h"

#include <type_traits>

#include "device.h"

namespace moe_kernels::cuda {
namespace {

constexpr int kStages = 3;          // steps of rows being loaded or in use
constexpr int kMaxFinished = 1024;  // elements per block of the second pass
constexpr int kFinishThreads = 128;

// Sizes and dtypes of a block's work. A warp has 32 columns of right.
template <typename L, typename R, typename W, int kHeight_, int kWidth_>
struct Shape {
  using Left = L;
  using Right = R;
  using Weight = W;
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

// Whether all rows begin at a multiple of 16 bytes and have whole vectors.
struct Vectors {
  bool left;
  bool right;
};

template <typename S>
struct Block {
  using Weight = typename S::Weight;
  static constexpr int kRows = S::kRows;

  Stage<S> stages[kStages];
  Row rows[kStages + 1][kRows];

  // Entry of perm for this thread's row of a step, -1 beyond the end.
  static __device__ int slot_of(const Wgrad& args, int step, int64_t first, int64_t end) {
    const int64_t place = first + static_cast<int64_t>(step) * kRows + threadIdx.x;
    return threadIdx.x < kRows && place < end ? static_cast<int>(args.perm[place]) : -1;
  }

  // Returned as stored: a conversion would wait for the load.
  static __device__ Weight weight_of(const Wgrad& args, int slot) {
    const auto* weights = static_cast<const Weight*>(args.weights);
    return slot < 0 || weights == nullptr ? from_float<Weight>(1.0f) : weights[slot];
  }

  __device__ void write_row(const Wgrad& args, int step, int64_t first, int slot, Weight weight,
                            float factor) {
    if (threadIdx.x >= kRows) return;
    Row row = {-1, -1, 0.0f};
    if (slot >= 0) {
      const int token = slot / args.top_k;
      const int place = static_cast<int>(first) + step * kRows + static_cast<int>(threadIdx.x);
      row.left = args.left_by_token ? token : place;
      row.right = args.right_by_token ? token : place;
      row.factor = factor * to_float(weight);
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

  __device__ void load(const Wgrad& args, Vectors vectors, int step, int column, int height) {
    Stage<S>& stage = stages[step % kStages];
    const Row* of = rows[step % (kStages + 1)];
    copy<typename S::Right, S::kWidth, true>(stage.right, of, args.right, column, args.width,
                                             vectors.right);
    copy<typename S::Left, S::kHeight, false>(stage.left, of, args.left, height, args.height,
                                              vectors.left);
  }
};

template <typename T>
__device__ float* place_of(float* out, const T& args, int h, int w) {
  return out + (args.transposed ? static_cast<int64_t>(w) * args.height + h
                                : static_cast<int64_t>(h) * args.width + w);
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

  __device__ void store(const Wgrad& args, float* out, int height, int width) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int w = width + 32 * warp + 16 * i + lane / 4 + part / 2 * 8;
          const int h = height + 8 * j + lane % 4 * 2 + part % 2;
          if (w < args.width && h < args.height) *place_of(out, args, h, w) = acc[i][j][part];
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

  __device__ void store(const Wgrad& args, float* out, int height, int width) {
    const int w = width + threadIdx.x;
#pragma unroll
    for (int h = 0; h < S::kHeight; ++h) {
      if (w < args.width && height + h < args.height) {
        *place_of(out, args, height + h, w) = acc[h];
      }
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

  // Loads the block's columns, from `width` on, of the group's (width, height); M: its dtype.
  template <typename M>
  __device__ void load(const Wgrad& args, int64_t group, int width) {
    const auto* of_group =
        static_cast<const M*>(args.matrix) +
        group * args.width * static_cast<int64_t>(args.height);
    const int n = rank_tile() + threadIdx.x % 32 / 4;
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int w = width + slice() * kColumns + 16 * k + 8 * part + threadIdx.x % 4 * 2;
        float pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t at = static_cast<int64_t>(w + e) * args.height + n;
          pair[e] = w + e < args.width && n < args.height ? to_float(of_group[at]) : 0.0f;
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

  // Stores a step's rows, if they lie between the tile's `first` and `end`; after a barrier.
  static __device__ void store(const Wgrad& args, const Shared& shared, int step, int64_t first,
                               int64_t end) {
    for (int i = threadIdx.x; i < S::kRows * S::kHeight; i += S::kThreads) {
      const int row = i / S::kHeight, n = i % S::kHeight;
      const int64_t place = first + static_cast<int64_t>(step) * S::kRows + row;
      if (place >= end || n >= args.height) continue;
      float sum = 0.0f;
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) sum += shared.slices[step % 2][slice][row][n];
      args.parts[(blockIdx.z * args.num_rows + place) * args.height + n] = sum;
    }
  }
};

// Stands in for DuOfStep where there is no matrix.
template <typename S>
struct NoDu {
  struct Shared {};

  __device__ void multiply_step(const typename S::Right*, int, Shared&) {}
  static __device__ void store(const Wgrad&, const Shared&, int, int64_t, int64_t) {}
};

// Destination of a tile's sums: a group of several tiles has a partial sum for each.
__device__ float* sums_of(const Wgrad& args, const Tile& tile) {
  const int64_t low = args.groups[tile.group], high = args.groups[args.num_groups + tile.group];
  const int64_t size = static_cast<int64_t>(args.height) * args.width;
  if (high - low <= args.chunk) return args.out + tile.group * size;
  const int64_t partial =
      args.groups[2 * args.num_groups + tile.group] + (tile.first - low) / args.chunk;
  return args.partial + partial * size;
}

template <typename S, typename OfStep>
struct Shared {
  Block<S> block;
  typename OfStep::Shared du;
};

template <typename S, typename M, typename OfStep>
__global__ void __launch_bounds__(S::kThreads) wgrad_kernel(Wgrad args, Vectors vectors) {
  const Tile tile = tile_of(args.tiles, blockIdx.x, args.num_tiles);
  if (tile.first >= tile.end) return;
  auto& [block, du] = *reinterpret_cast<Shared<S, OfStep>*>(shared_memory());
  const int height = blockIdx.y * S::kHeight, width = blockIdx.z * S::kWidth;
  const float factor = args.factors[tile.group / args.groups_of_factor];
  const int steps = static_cast<int>((tile.end - tile.first + S::kRows - 1) / S::kRows);
#pragma unroll
  for (int step = 0; step < kStages; ++step) {
    const int its = Block<S>::slot_of(args, step, tile.first, tile.end);
    block.write_row(args, step, tile.first, its, Block<S>::weight_of(args, its), factor);
  }
  int slot = Block<S>::slot_of(args, kStages, tile.first, tile.end);
  __syncthreads();
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) block.load(args, vectors, step, width, height);
    commit_copies();
  }
  Sums<S> sums;
  OfStep of_step;
  if constexpr (!std::is_void_v<M>) of_step.template load<M>(args, tile.group, width);
  for (int step = 0; step < steps; ++step) {
    const auto weight = Block<S>::weight_of(args, slot);
    const int next = Block<S>::slot_of(args, step + kStages + 1, tile.first, tile.end);
    wait_copies<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) {
      block.load(args, vectors, step + kStages - 1, width, height);
    }
    commit_copies();
    if (step > 0) OfStep::store(args, du, step - 1, tile.first, tile.end);
    of_step.multiply_step(block.stages[step % kStages].right, step, du);
    sums.add(block, step);
    block.write_row(args, step + kStages, tile.first, slot, weight, factor);
    slot = next;
  }
  sums.store(args, sums_of(args, tile), height, width);
  if constexpr (!std::is_void_v<M>) {
    __syncthreads();
    OfStep::store(args, du, steps - 1, tile.first, tile.end);
  }
}

// Adds a share of the partial sums of a group, in the order of the tiles; zeros without tiles.
__device__ void finish_sums(const Wgrad& args, int64_t group, int64_t share) {
  const int64_t rows = args.groups[args.num_groups + group] - args.groups[group];
  if (rows > 0 && rows <= args.chunk) return;
  const int64_t size = static_cast<int64_t>(args.height) * args.width;
  const int64_t first = share * kMaxFinished;
  const int64_t partial = args.groups[2 * args.num_groups + group];
  for (int64_t i = first + threadIdx.x; i < first + kMaxFinished && i < size; i += kFinishThreads) {
    float sum = 0.0f;
    for (int64_t tile = 0; tile * args.chunk < rows; ++tile) {
      sum += args.partial[(partial + tile) * size + i];
    }
    args.out[group * size + i] = sum;
  }
}

// Adds the parts of a share of du of a tile's rows, in order.
__device__ void finish_du(const Wgrad& args, const Tile& tile, int64_t share) {
  const int64_t first = tile.first * args.height + share * kMaxFinished;
  const int64_t rest = tile.end * args.height, all = args.num_rows * args.height;
  const int64_t end = first + kMaxFinished < rest ? first + kMaxFinished : rest;
  const int parts = wgrad_parts(args.width);
  for (int64_t i = first + threadIdx.x; i < end; i += kFinishThreads) {
    float sum = 0.0f;
#pragma unroll 8
    for (int part = 0; part < parts; ++part) sum += args.parts[part * all + i];
    args.du[i] = sum;
  }
}

// First come the blocks of each group's sums, then those of each tile's du.
__global__ void __launch_bounds__(kFinishThreads)
    finish_wgrad_kernel(Wgrad args, int of_group, int of_tile) {
  const int of_sums = args.num_groups * of_group, block = blockIdx.x;
  if (block < of_sums) {
    finish_sums(args, block / of_group, block % of_group);
  } else {
    const Tile tile = tile_of(args.tiles, (block - of_sums) / of_tile, args.num_tiles);
    finish_du(args, tile, (block - of_sums) % of_tile);
  }
}

}  // namespace

#ifndef __CUDACC_RTC__
namespace {

cudaError_t launch_finish(const Wgrad& args, cudaStream_t stream) {
  const int of_group = ceil_div(static_cast<int64_t>(args.height) * args.width, kMaxFinished);
  const int64_t rows = args.chunk < args.num_rows ? args.chunk : args.num_rows;
  const int of_tile = args.matrix == nullptr ? 0 : ceil_div(rows * args.height, kMaxFinished);
  const unsigned blocks = args.num_groups * of_group + args.num_tiles * of_tile;
  return launch(MOE_KERNEL(finish_wgrad_kernel), blocks, kFinishThreads, 0, stream, args, of_group,
                of_tile);
}

// M: the dtype of the matrix, or void.
template <typename S, typename M = void>
cudaError_t launch_tiles(const Wgrad& args, cudaStream_t stream) {
  using OfStep = std::conditional_t<std::is_void_v<M>, NoDu<S>, DuOfStep<S>>;
  using Left = Vector<typename S::Left>;
  using Right = Vector<typename S::Right>;
  static_assert(sizeof(Shared<S, OfStep>) <= kMaxSharedBytes);
  if (args.num_tiles > 0 && args.num_rows > 0) {
    const dim3 grid(args.num_tiles, ceil_div(args.height, S::kHeight),
                    ceil_div(args.width, S::kWidth));
    const Vectors vectors{args.height % Left::kSize == 0 && is_aligned(args.left),
                          args.width % Right::kSize == 0 && is_aligned(args.right)};
    const cudaError_t error = launch(MOE_KERNEL(wgrad_kernel, S, M, OfStep), grid, S::kThreads,
                                     sizeof(Shared<S, OfStep>), stream, args, vectors);
    if (error != cudaSuccess) return error;
  }
  return launch_finish(args, stream);
}

template <typename L, typename R, typename W>
cudaError_t launch_heights(const Wgrad& args, cudaStream_t stream) {
  if constexpr (sizeof(R) == 2) {
    if (args.height > 16) return launch_tiles<Shape<L, R, W, 64, 128>>(args, stream);
  }
  return launch_tiles<Shape<L, R, W, 16, 128>>(args, stream);
}

template <typename R, typename W, typename M>
cudaError_t launch_with_matrix(const Wgrad& args, cudaStream_t stream) {
  return args.height > 16
             ? launch_tiles<Shape<R, R, W, 32, kColumnsOfPart>, M>(args, stream)
             : launch_tiles<Shape<R, R, W, 16, kColumnsOfPart>, M>(args, stream);
}

// Whether an operand is float32; otherwise it has right's dtype.
struct Floats {
  bool left;
  bool matrix;
};

template <typename R, typename W>
cudaError_t launch_weights(const Wgrad& args, Floats floats, cudaStream_t stream) {
  if (args.matrix != nullptr) {
    if (floats.left) return cudaErrorInvalidValue;
    return floats.matrix ? launch_with_matrix<R, W, float>(args, stream)
                         : launch_with_matrix<R, W, R>(args, stream);
  }
  return floats.left ? launch_heights<float, R, W>(args, stream)
                     : launch_heights<R, R, W>(args, stream);
}

template <typename R>
cudaError_t launch_right(const Wgrad& args, Floats floats, bool weights_are_float,
                         cudaStream_t stream) {
  return weights_are_float ? launch_weights<R, float>(args, floats, stream)
                           : launch_weights<R, R>(args, floats, stream);
}

bool fits(Scalar scalar, Scalar right) { return scalar == Scalar::kFloat || scalar == right; }

}  // namespace

cudaError_t launch_wgrad(const Wgrad& wgrad, Scalar left, Scalar right, Scalar weights,
                         Scalar matrix, cudaStream_t stream) {
  const Floats floats{left == Scalar::kFloat, matrix == Scalar::kFloat};
  const bool weights_are_float = weights == Scalar::kFloat;
  if (!fits(left, right) || !fits(weights, right) || !fits(matrix, right) ||
      (wgrad.matrix != nullptr && (right == Scalar::kFloat || wgrad.height > kMaxRankWithDu))) {
    return cudaErrorInvalidValue;
  }
  if (wgrad.num_groups == 0 || wgrad.height == 0 || wgrad.width == 0) return cudaSuccess;
  switch (right) {
    case Scalar::kFloat:
      return launch_heights<float, float, float>(wgrad, stream);
    case Scalar::kHalf:
      return launch_right<__half>(wgrad, floats, weights_are_float, stream);
    case Scalar::kBFloat16:
      return launch_right<__nv_bfloat16>(wgrad, floats, weights_are_float, stream);
  }
  return cudaErrorInvalidValue;
}
#endif

}  // namespace moe_kernels::cuda

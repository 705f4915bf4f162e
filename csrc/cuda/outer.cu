// Sums of outer products over rows: reads the wide operand once, by asynchronous copies, several
// steps of rows ahead.
//
// A block takes 128 columns of `right` and up to 64 of `left` through one tile of rows. Which rows
// a step has is looked up one step before its copies start.
#include "device.h"
#include "outer.h"

namespace moe_kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWidth = 128;  // of a block's columns of right
constexpr int kStages = 3;   // steps of rows under way or in use
constexpr int kMaxFinished = 1024;  // elements of a block of the second pass

// One step's rows in shared memory.
template <typename L, typename R, int kHeight>
struct alignas(16) Stage {
  static constexpr int kRows = sizeof(R) == 2 ? 32 : 16;
  // The four lanes of a fragment read rows 2 apart: these then lie in different banks.
  static constexpr int kStride = kHeight + 16 / sizeof(L);
  R right[kRows * kWidth];  // chunks of 16 bytes in another order in each row
  L left[kRows * kStride];
};

// Where a row of a step is read, and its factor; -1: beyond the end.
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

template <typename L, typename R, typename W, int kHeight>
struct Block {
  using Step = Stage<L, R, kHeight>;
  static constexpr int kRows = Step::kRows;

  Step stages[kStages];
  Row rows[kStages + 1][kRows];

  __device__ void look_up(const Outer& given, int step, int64_t first, int64_t end, float factor) {
    if (threadIdx.x >= kRows) return;
    Row row = {-1, -1, 0.0f};
    const int64_t place = first + static_cast<int64_t>(step) * kRows + threadIdx.x;
    if (place < end) {
      const int slot = static_cast<int>(given.perm[place]), token = slot / given.top_k;
      const auto* weights = static_cast<const W*>(given.weights);
      row.left = given.left_by_token ? token : static_cast<int>(place);
      row.right = given.right_by_token ? token : static_cast<int>(place);
      row.factor = weights == nullptr ? factor : factor * to_float(weights[slot]);
    }
    rows[step % (kStages + 1)][threadIdx.x] = row;
  }

  // Starts the copies of a step's rows, columns from `column` on; without `vectors` copies at once.
  template <typename V, int kColumns, bool kIsRight>
  __device__ void copy(V* to, const Row* of, const void* from, int column, int size, bool vectors) {
    constexpr int kVector = Vector<V>::kSize, kChunks = kColumns / kVector;
    constexpr int kAtOnce = kThreads / kChunks;
    const int chunk = threadIdx.x % kChunks, first = column + chunk * kVector;
    const auto* own = static_cast<const V*>(from) + first;
#pragma unroll
    for (int start = 0; start < kRows; start += kAtOnce) {
      const int row = start + threadIdx.x / kChunks;
      if (kAtOnce > kRows && row >= kRows) continue;
      const int at = kIsRight ? of[row].right : of[row].left;
      V* place = kIsRight ? to + row * kColumns + swizzled(row, chunk) * kVector
                          : to + row * Step::kStride + chunk * kVector;
      if (vectors) {
        copy_async(place, own + static_cast<int64_t>(at) * size, at >= 0 && first < size);
      } else {
        const V* source = static_cast<const V*>(from) + static_cast<int64_t>(at) * size;
        *reinterpret_cast<Vector<V>*>(place) =
            load_vector(at >= 0 ? source : nullptr, first, size, false);
      }
    }
  }

  // Eight rows of one chunk then lie in different banks.
  static __device__ int swizzled(int row, int chunk) { return chunk ^ (row & 7); }

  __device__ void load(const Outer& given, Vectors vectors, int step, int column, int height) {
    Step& stage = stages[step % kStages];
    const Row* of = rows[step % (kStages + 1)];
    copy<R, kWidth, true>(stage.right, of, given.right, column, given.width, vectors.right);
    copy<L, kHeight, false>(stage.left, of, given.left, height, given.height, vectors.left);
  }
};

template <typename T>
__device__ float* place_of(float* out, const T& given, int h, int w) {
  return out + (given.transposed ? static_cast<int64_t>(w) * given.height + h
                                 : static_cast<int64_t>(h) * given.width + w);
}

// Sums of a warp: 32 columns of right by kHeight of left, as fragments of the tensor cores.
template <typename L, typename R, int kHeight>
struct Sums {
  static constexpr int kTiles = kHeight / 8;
  float acc[2][kTiles][4] = {};

  template <typename Block>
  __device__ void add(const Block& block, int step) {
    const auto& stage = block.stages[step % kStages];
    const Row* rows = block.rows[step % (kStages + 1)];
#pragma unroll
    for (int k = 0; k < Block::kRows; k += 16) add_rows<Block>(stage, rows, k);
  }

  template <typename Block, typename Step>
  __device__ void add_rows(const Step& stage, const Row* rows, int k) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = k + lane % 8 + lane / 16 * 8;
      const int chunk = warp * 4 + i * 2 + lane / 8 % 2;
      load_matrices_transposed(
          a[i], stage.right + row * kWidth + Block::swizzled(row, chunk) * 8);
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
        left[e] = factors[e] * to_float(stage.left[row * Step::kStride + 8 * j + lane / 4]);
      }
      const uint32_t b[2] = {pack<R>(left[0], left[1]), pack<R>(left[2], left[3])};
#pragma unroll
      for (int i = 0; i < 2; ++i) multiply<R>(acc[i][j], a[i], b);
    }
  }

  __device__ void store(const Outer& given, float* out, int height, int width) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int w = width + 32 * warp + 16 * i + lane / 4 + part / 2 * 8;
          const int h = height + 8 * j + lane % 4 * 2 + part % 2;
          if (w < given.width && h < given.height) *place_of(out, given, h, w) = acc[i][j][part];
        }
      }
    }
  }
};

// float32 has no tensor cores: a thread has one column of right.
template <int kHeight>
struct Sums<float, float, kHeight> {
  float acc[kHeight] = {};

  template <typename Block>
  __device__ void add(const Block& block, int step) {
    using Step = typename Block::Step;
    const auto& stage = block.stages[step % kStages];
    const Row* rows = block.rows[step % (kStages + 1)];
#pragma unroll 4
    for (int row = 0; row < Block::kRows; ++row) {
      const int chunk = Block::swizzled(row, threadIdx.x / 4);
      const float right = stage.right[row * kWidth + chunk * 4 + threadIdx.x % 4];
      const float* left = stage.left + row * Step::kStride;
#pragma unroll
      for (int h = 0; h < kHeight; ++h) acc[h] += rows[row].factor * left[h] * right;
    }
  }

  __device__ void store(const Outer& given, float* out, int height, int width) {
    const int w = width + threadIdx.x;
#pragma unroll
    for (int h = 0; h < kHeight; ++h) {
      if (w < given.width && height + h < given.height) {
        *place_of(out, given, height + h, w) = acc[h];
      }
    }
  }
};

// Where a tile's sums go: a group of several tiles has a partial sum for each.
__device__ float* sums_of(const Outer& given, const Tile& tile) {
  const int64_t low = given.groups[tile.group], high = given.groups[given.num_groups + tile.group];
  const int64_t size = static_cast<int64_t>(given.height) * given.width;
  if (high - low <= given.chunk) return given.out + tile.group * size;
  const int64_t slot =
      given.groups[2 * given.num_groups + tile.group] + (tile.first - low) / given.chunk;
  return given.partial + slot * size;
}

template <typename L, typename R, typename W, int kHeight>
__global__ void __launch_bounds__(kThreads) outer_kernel(Outer given, Vectors vectors) {
  const Tile tile = tile_of(given.tiles, blockIdx.x, given.num_tiles);
  if (tile.first >= tile.end) return;
  using Shared = Block<L, R, W, kHeight>;
  auto& block = *reinterpret_cast<Shared*>(shared_memory());
  const int height = blockIdx.y * kHeight, width = blockIdx.z * kWidth;
  const float factor = given.factors[tile.group / given.groups_of_factor];
  const int steps = static_cast<int>((tile.end - tile.first + Shared::kRows - 1) / Shared::kRows);
#pragma unroll
  for (int step = 0; step < kStages; ++step) {
    block.look_up(given, step, tile.first, tile.end, factor);
  }
  __syncthreads();
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) block.load(given, vectors, step, width, height);
    commit_copies();
  }
  Sums<L, R, kHeight> sums;
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) {
      block.load(given, vectors, step + kStages - 1, width, height);
    }
    commit_copies();
    block.look_up(given, step + kStages, tile.first, tile.end, factor);
    sums.add(block, step);
  }
  sums.store(given, sums_of(given, tile), height, width);
}

// The sums of groups of several tiles, in the order of the tiles; zeros for those of none.
__global__ void __launch_bounds__(kThreads) finish_outer_kernel(Outer given) {
  const int64_t group = blockIdx.y;
  const int64_t rows = given.groups[given.num_groups + group] - given.groups[group];
  if (rows > 0 && rows <= given.chunk) return;
  const int64_t size = static_cast<int64_t>(given.height) * given.width;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kMaxFinished;
  const int64_t slot = given.groups[2 * given.num_groups + group];
  for (int64_t i = first + threadIdx.x; i < first + kMaxFinished && i < size; i += kThreads) {
    float sum = 0.0f;
    for (int64_t tile = 0; tile * given.chunk < rows; ++tile) {
      sum += given.partial[(slot + tile) * size + i];
    }
    given.out[group * size + i] = sum;
  }
}

template <typename L, typename R, typename W, int kHeight>
cudaError_t launch_tiles(const Outer& given, cudaStream_t stream) {
  if (given.num_tiles > 0) {
    const dim3 grid(given.num_tiles, ceil_div(given.height, kHeight),
                    ceil_div(given.width, kWidth));
    const Vectors vectors{given.height % Vector<L>::kSize == 0 && is_aligned(given.left),
                          given.width % Vector<R>::kSize == 0 && is_aligned(given.right)};
    const cudaError_t error =
        launch(outer_kernel<L, R, W, kHeight>, grid, kThreads, sizeof(Block<L, R, W, kHeight>),
               stream, given, vectors);
    if (error != cudaSuccess) return error;
  }
  const int64_t size = static_cast<int64_t>(given.height) * given.width;
  const dim3 grid(ceil_div(size, kMaxFinished), given.num_groups);
  return launch(finish_outer_kernel, grid, kThreads, 0, stream, given);
}

template <typename L, typename R, typename W>
cudaError_t launch_heights(const Outer& given, cudaStream_t stream) {
  if constexpr (sizeof(R) == 2) {
    if (given.height > 16) return launch_tiles<L, R, W, 64>(given, stream);
  }
  return launch_tiles<L, R, W, 16>(given, stream);
}

template <typename R, typename W>
cudaError_t launch_left(const Outer& given, bool left_is_float, cudaStream_t stream) {
  return left_is_float ? launch_heights<float, R, W>(given, stream)
                       : launch_heights<R, R, W>(given, stream);
}

// Weights are float32 or of right's dtype.
template <typename R>
cudaError_t launch_right(const Outer& given, bool left_is_float, bool weights_are_float,
                         cudaStream_t stream) {
  return weights_are_float ? launch_left<R, float>(given, left_is_float, stream)
                           : launch_left<R, R>(given, left_is_float, stream);
}

}  // namespace

cudaError_t launch_outer(const Outer& outer, Scalar left, Scalar right, Scalar weights,
                         cudaStream_t stream) {
  const bool left_is_float = left == Scalar::kFloat, weights_are_float = weights == Scalar::kFloat;
  if ((!left_is_float && left != right) || (!weights_are_float && weights != right)) {
    return cudaErrorInvalidValue;
  }
  if (outer.num_groups == 0 || outer.height == 0 || outer.width == 0) return cudaSuccess;
  switch (right) {
    case Scalar::kFloat:
      return launch_heights<float, float, float>(outer, stream);
    case Scalar::kHalf:
      return launch_right<__half>(outer, left_is_float, weights_are_float, stream);
    case Scalar::kBFloat16:
      return launch_right<__nv_bfloat16>(outer, left_is_float, weights_are_float, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace moe_kernels::cuda

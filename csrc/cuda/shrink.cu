// Shrink: GEMMs of adapted rows and a low-rank matrix. Every row is read once.
//
// The four lanes that share a row of a fragment load 16 bytes of it each, 64 neighbouring bytes
// together. Tensor cores expect other columns in these lanes. Since the order of k within a sum is
// free, both operands use the order in which the lanes hold it, and no lane needs another's loads.
// Rows are copied to shared memory several steps ahead, where a lane finds what it copied itself;
// the matrix is loaded a step ahead, into registers. The warps of a block share rows and split k;
// the only barrier is at the end.
#include "shrink.h"

#include <type_traits>

#include "device.h"

namespace moe_kernels::cuda {
namespace {

constexpr int kRows = 32;
constexpr int kSlices = 4;  // slices of k, one for each warp
constexpr int kThreads = 32 * kSlices;
constexpr int kStages = 4;    // steps of rows being copied or in use
constexpr int kFilled = 512;  // rows of a block that writes zeros

// Neighbours in memory, in as few accesses as their alignment allows.
template <typename M, int kSize>
struct alignas(kSize * sizeof(M) < 16 ? kSize * sizeof(M) : 16) Run {
  M values[kSize];
};

template <typename T, typename M>
__device__ T rounded(M value) {
  if constexpr (std::is_same_v<T, M>) {
    return value;
  } else {
    return from_float<T>(to_float(value));
  }
}

// A lane's part of the matrix: kColumns neighbouring columns from `column` on.
template <typename T, typename M, int kColumns, bool kRankFirst>
struct Columns {
  static constexpr int kVector = Vector<T>::kSize;
  const M* matrix;
  int column;
  int size_k;
  int rank;

  // Loads elements k, k + 1, ... of each column. kFast: they are aligned, and exist or belong to
  // columns that are not stored.
  template <bool kFast>
  __device__ void load(int k, Vector<T> (&out)[kColumns]) const {
    if constexpr (!kFast) {
      load_any(k, out);
    } else if constexpr (kRankFirst) {
      const M* from = matrix + static_cast<int64_t>(column) * size_k + k;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        using Part = Run<M, kVector>;
        const auto part = *reinterpret_cast<const Part*>(from + static_cast<int64_t>(n) * size_k);
#pragma unroll
        for (int i = 0; i < kVector; ++i) out[n].values[i] = rounded<T>(part.values[i]);
      }
    } else {
      const M* from = matrix + static_cast<int64_t>(k) * rank + column;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const auto part = *reinterpret_cast<const Run<M, kColumns>*>(from + i * rank);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) out[n].values[i] = rounded<T>(part.values[n]);
      }
    }
  }

  __device__ void load_any(int k, Vector<T> (&out)[kColumns]) const {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int64_t at = kRankFirst ? static_cast<int64_t>(column + n) * size_k + k + i
                                      : static_cast<int64_t>(k + i) * rank + column + n;
        const bool present = column + n < rank && k + i < size_k;
        out[n].values[i] = present ? rounded<T>(matrix[at]) : from_float<T>(0.0f);
      }
    }
  }
};

// Sums of a warp: 32 rows, 8 * kTiles columns. Two-byte elements: fragments of the tensor cores,
// whose column p of fragment j is column kTiles * p + j, so that a lane's columns are adjacent.
template <typename T, int kTiles>
struct Sums {
  static constexpr int kColumns = 8 * kTiles;
  static constexpr int kOfLane = kTiles;
  float acc[2][kTiles][4] = {};

  static __device__ int first_column() { return threadIdx.x % 32 / 4 * kTiles; }

  __device__ void add(const Vector<T> (&left)[4], const Vector<T> (&right)[kOfLane]) {
    const auto* words = reinterpret_cast<const uint32_t(*)[4]>(&left);
    const auto* columns = reinterpret_cast<const uint32_t(*)[4]>(&right);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint32_t b[2] = {columns[j][2 * step], columns[j][2 * step + 1]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t a[4] = {words[2 * i][2 * step], words[2 * i + 1][2 * step],
                                 words[2 * i][2 * step + 1], words[2 * i + 1][2 * step + 1]};
          multiply<T>(acc[i][j], a, b);
        }
      }
    }
  }

  // Stores to (32, kColumns).
  __device__ void store(float* to) const {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          to[(16 * i + row + part / 2 * 8) * kColumns + (column + part % 2) * kTiles + j] =
              acc[i][j][part];
        }
      }
    }
  }
};

// float32 has no tensor cores: a lane sums its own k, for four rows and all columns.
template <int kTiles>
struct Sums<float, kTiles> {
  static constexpr int kColumns = 8 * kTiles;
  static constexpr int kOfLane = kColumns;
  float acc[4][kColumns] = {};

  static __device__ int first_column() { return 0; }

  __device__ void add(const Vector<float> (&left)[4], const Vector<float> (&right)[kOfLane]) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][n] += left[i].values[e] * right[n].values[e];
      }
    }
  }

  __device__ void store(float* to) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        float sum = acc[i][n];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (n % 4 == lane % 4) to[(8 * i + lane / 4) * kColumns + n] = sum;
      }
    }
  }
};

// A lane's rows, lane / 4 of each group of 8. Rows beyond the end read the tile's first row and are
// not stored.
template <typename T>
struct Rows {
  const T* rows[4];

  __device__ Rows(const Shrink& args, int64_t first, int64_t end) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t own = first + threadIdx.x % 32 / 4 + 8 * i, place = own < end ? own : first;
      const int64_t row = args.by_token ? token_of(args.perm, place, args.top_k) : place;
      rows[i] = static_cast<const T*>(args.left) + row * args.size_k;
    }
  }
};

// Steps of a warp's slice of k. Two neighbouring steps of two-byte elements are one of its slice.
template <typename T>
struct Steps {
  static constexpr int kStep = 4 * Vector<T>::kSize, kPair = sizeof(T) == 2 ? 2 : 1;

  // First k of a step, of the warp and of this lane.
  static __device__ int first(int step) {
    const int warp = threadIdx.x / 32;
    return ((step / kPair * kSlices + warp) * kPair + step % kPair) * kStep;
  }
  static __device__ int of_lane(int step) {
    return first(step) + threadIdx.x % 4 * Vector<T>::kSize;
  }
};

// A ring of steps of the rows, in which each lane has its own places.
template <typename T>
struct Ring {
  Vector<T> vectors[kStages][4][kThreads];

  __device__ void start(const Rows<T>& from, int step, int size_k) {
    const int k = Steps<T>::of_lane(step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      copy_async(&vectors[step % kStages][i][threadIdx.x], from.rows[i] + k, k < size_k);
    }
    commit_copies();
  }

  __device__ void read(int step, Vector<T> (&to)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = vectors[step % kStages][i][threadIdx.x];
  }
};

// Loads a lane's elements of the matrix for a step; zeros beyond the last k.
template <bool kFast, typename T, int kOfLane, typename Columns>
__device__ void load_columns(const Columns& columns, int step, int size_k,
                             Vector<T> (&to)[kOfLane]) {
  const int k = Steps<T>::of_lane(step);
  if (k < size_k) {
    columns.template load<kFast>(k, to);
  } else {
#pragma unroll
    for (int n = 0; n < kOfLane; ++n) to[n] = {};
  }
}

// Sums the rows over this warp's slice of k; rows and matrix of whole vectors, at multiples of 16
// bytes.
template <typename Sums, typename T, typename Columns>
__device__ void sum_slice(const Rows<T>& rows, const Columns& columns, int size_k, Ring<T>& ring,
                          Sums& sums) {
  Vector<T> right[Sums::kOfLane];
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) ring.start(rows, step, size_k);
  load_columns<true>(columns, 0, size_k, right);
  for (int step = 0; Steps<T>::first(step) < size_k; ++step) {
    Vector<T> left[4], next[Sums::kOfLane];
    ring.start(rows, step + kStages - 1, size_k);
    load_columns<true>(columns, step + 1, size_k, next);
    wait_copies<kStages - 1>();
    ring.read(step, left);
    sums.add(left, right);
#pragma unroll
    for (int n = 0; n < Sums::kOfLane; ++n) right[n] = next[n];
  }
  wait_copies<0>();
}

// The same for rows and a matrix of any size and alignment.
template <typename Sums, typename T, typename Columns>
__device__ void sum_any_slice(const Rows<T>& rows, const Columns& columns, int size_k,
                              Sums& sums) {
  for (int step = 0; Steps<T>::first(step) < size_k; ++step) {
    Vector<T> left[4], right[Sums::kOfLane];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      left[i] = load_vector(rows.rows[i], Steps<T>::of_lane(step), size_k, false);
    }
    load_columns<false>(columns, step, size_k, right);
    sums.add(left, right);
  }
}

template <typename Out>
__device__ void add_slices(const float* sums, const Shrink& args, int64_t first, int64_t end,
                           int column, int columns) {
  for (int i = threadIdx.x; i < kRows * columns; i += kThreads) {
    const int64_t row = first + i / columns;
    const int n = column + i % columns;
    if (row >= end || n >= args.rank) continue;
    float sum = 0.0f;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) sum += sums[slice * kRows * columns + i];
    static_cast<Out*>(args.out)[row * args.rank + n] = from_float<Out>(sum);
  }
}

// Whether a sorted row has an adapter: its segment is of a frozen expert and an added modality.
__device__ bool is_adapted(const Shrink& args, int64_t row) {
  const int of_expert = args.num_modalities + 1, num = args.num_base * of_expert;
  if (row >= args.segments[num]) return false;
  int low = 0, high = num;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (args.segments[middle] <= row ? low : high) = middle;
  }
  return low % of_expert != 0;
}

// Writes zeros to the rows without an adapter among kFilled.
template <typename Out>
__device__ void fill(const Shrink& args, int64_t first) {
  const int64_t end = first + kFilled < args.num_rows ? first + kFilled : args.num_rows;
  const int lane = threadIdx.x % 32, rank = args.rank;
  for (int64_t start = first + threadIdx.x / 32 * 32; start < end; start += kThreads) {
    const int64_t row = start + lane;
    const unsigned without = __ballot_sync(0xffffffffu, row < end && !is_adapted(args, row));
    Out* to = static_cast<Out*>(args.out) + start * rank;
    for (int i = lane; i < 32 * rank; i += 32) {
      if (without >> (i / rank) & 1u) to[i] = from_float<Out>(0.0f);
    }
  }
}

// A block's shared memory.
template <typename T, int kTiles>
struct Shared {
  Ring<T> ring;
  float sums[kSlices][kRows][Sums<T, kTiles>::kColumns];
};

// Blocks per multiprocessor, limited by the registers of their sums.
template <typename T, int kTiles>
constexpr int kResident = sizeof(T) != 2 ? 2 : kTiles == 2 ? 4 : kTiles == 4 ? 3 : 2;

// Dtypes and sizes of a kernel.
template <typename T_, typename M_, int kTiles_, bool kRankFirst_>
struct Form {
  using T = T_;
  using M = M_;
  static constexpr int kTiles = kTiles_;
  static constexpr bool kRankFirst = kRankFirst_;
};

// First come the blocks of the tiles, then those that write zeros.
template <typename F>
__global__ void __launch_bounds__(kThreads, (kResident<typename F::T, F::kTiles>))
    shrink_kernel(Shrink args, bool fast, bool out_is_float) {
  using T = typename F::T;
  const int filled = static_cast<int>(blockIdx.x) - args.num_tiles;
  if (filled >= 0) {
    if (blockIdx.y > 0) return;
    const int64_t first = static_cast<int64_t>(filled) * kFilled;
    return out_is_float ? fill<float>(args, first) : fill<T>(args, first);
  }
  const Tile tile = tile_of(args.tiles, blockIdx.x, args.num_tiles);
  if (tile.first >= tile.end) return;
  using M = typename F::M;
  using OfWarp = Sums<T, F::kTiles>;
  auto& shared = *reinterpret_cast<Shared<T, F::kTiles>*>(shared_memory());
  const int64_t modality = tile.group / args.num_base, expert = tile.group % args.num_base;
  const int64_t index = modality * args.experts_of_m + (args.experts_of_m == 1 ? 0 : expert);
  const int column = blockIdx.y * OfWarp::kColumns, of_lane = column + OfWarp::first_column();
  const Columns<T, M, OfWarp::kOfLane, F::kRankFirst> columns{
      static_cast<const M*>(args.matrix) + index * args.size_k * args.rank,
      fast && of_lane >= args.rank ? 0 : of_lane, args.size_k, args.rank};
  for (int64_t first = tile.first; first < tile.end; first += kRows) {
    const Rows<T> rows(args, first, tile.end);
    OfWarp sums;
    if (fast) {
      sum_slice(rows, columns, args.size_k, shared.ring, sums);
    } else {
      sum_any_slice(rows, columns, args.size_k, sums);
    }
    float* of_slices = shared.sums[0][0];
    sums.store(of_slices + threadIdx.x / 32 * kRows * OfWarp::kColumns);
    __syncthreads();
    if (out_is_float) {
      add_slices<float>(of_slices, args, first, tile.end, column, OfWarp::kColumns);
    } else {
      add_slices<T>(of_slices, args, first, tile.end, column, OfWarp::kColumns);
    }
    __syncthreads();
  }
}

}  // namespace

#ifndef __CUDACC_RTC__
namespace {

template <typename T, typename M, int kTiles>
cudaError_t launch_columns(const Shrink& args, bool out_is_float, cudaStream_t stream) {
  // k and a lane's columns are whole vectors.
  const bool fast = args.size_k % Vector<T>::kSize == 0 && is_aligned(args.left) &&
                    is_aligned(args.matrix) && args.rank % Sums<T, kTiles>::kOfLane == 0;
  using First = Form<T, M, kTiles, true>;
  using Last = Form<T, M, kTiles, false>;
  const auto kernel =
      args.rank_first ? MOE_KERNEL(shrink_kernel, First) : MOE_KERNEL(shrink_kernel, Last);
  const int filling = args.segments == nullptr ? 0 : ceil_div(args.num_rows, kFilled);
  const dim3 grid(args.num_tiles + filling, ceil_div(args.rank, 8 * kTiles));
  static_assert(sizeof(Shared<T, kTiles>) <= kMaxSharedBytes);
  if (grid.x == 0) return cudaSuccess;
  return launch(kernel, grid, kThreads, sizeof(Shared<T, kTiles>), stream, args, fast,
                out_is_float);
}

template <typename T, typename M>
cudaError_t launch_half(const Shrink& args, bool out_is_float, cudaStream_t stream) {
  if (args.rank <= 16) return launch_columns<T, M, 2>(args, out_is_float, stream);
  if (args.rank <= 32) return launch_columns<T, M, 4>(args, out_is_float, stream);
  return launch_columns<T, M, 8>(args, out_is_float, stream);
}

}  // namespace

cudaError_t launch_shrink(const Shrink& shrink, Scalar left, Scalar matrix, Scalar out,
                          cudaStream_t stream) {
  const bool out_is_float = out == Scalar::kFloat, matrix_is_float = matrix == Scalar::kFloat;
  if ((!out_is_float && out != left) || (!matrix_is_float && matrix != left)) {
    return cudaErrorInvalidValue;
  }
  if (shrink.rank == 0) return cudaSuccess;
  switch (left) {
    case Scalar::kFloat:  // more sums than these would not fit into the registers
      return launch_columns<float, float, 2>(shrink, true, stream);
    case Scalar::kHalf:
      return matrix_is_float ? launch_half<__half, float>(shrink, out_is_float, stream)
                             : launch_half<__half, __half>(shrink, out_is_float, stream);
    case Scalar::kBFloat16:
      return matrix_is_float
                 ? launch_half<__nv_bfloat16, float>(shrink, out_is_float, stream)
                 : launch_half<__nv_bfloat16, __nv_bfloat16>(shrink, out_is_float, stream);
  }
  return cudaErrorInvalidValue;
}
#endif

}  // namespace moe_kernels::cuda

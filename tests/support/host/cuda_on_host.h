// Plays a CUDA device on the host, so that plain C++ runs the kernels: every thread is a fiber, and
// blocks come one after the other, those of a cluster together.
//
// A fiber gives way only where it waits for others: at a barrier and at a collective of its warp.
// Missing barriers show: a warp runs as far as it can before the next, in ascending or descending
// order, and so does a block of a cluster; an asynchronous copy happens as late as it may, in the
// wait for it, or at once (host::order); and shared memory begins as NaN. A kernel that may overlap
// the one before begins before it, if host::order says so.
// Threads that wait for each other in vain end the launch with an error.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "../../../csrc/cuda/host_device.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __global__
#define __global__
#undef __grid_constant__
#define __grid_constant__

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace host {

struct Order {
  bool descending;    // threads, and blocks; of a cluster too
  bool early_copies;  // and other asynchronous work: at once
  // A launch waits until a kernel that was launched to overlap it waits for it.
  bool late_launches;
  bool last_first;  // of the work that is under way by itself, what began last
};
inline Order order;
inline int launches;  // so far
inline int multiprocessors = 3;
inline bool idle;     // launches do nothing: what is left is the host's part

constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 64 * 1024;
constexpr size_t kSharedAlignment = 1024;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "block %u,%u,%u, thread %u: %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x, why);
  std::abort();
}

// What lanes of one mask tell each other. Two buffers: a lane can be one exchange ahead of another
// that has yet to read, but not two.
struct Exchange {
  unsigned mask = 0;
  unsigned arrived[2] = {};
  uint64_t done[2] = {};   // exchanges that have ended, the odd and the even ones
  uint64_t count[32] = {};  // of each lane
  const char* what[2] = {};
  unsigned char data[2][32][64];
};

struct Copy {
  void* to;
  const void* from;  // null: zeros

  void run() const {
    if (from == nullptr) {
      std::memset(to, 0, 16);
    } else {
      std::memcpy(to, from, 16);
    }
  }
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started, finished;
  const uint64_t* counter;  // it waits for *counter to reach target
  uint64_t target;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // how many copies each committed group has
  size_t uncommitted;
};

// A barrier in shared memory: its phase ends when all arrivals and all announced bytes have come.
struct Barrier {
  int arrivals, pending;
  int64_t bytes;
  uint64_t phases;  // that have ended
};

// What a thread asked the tensor cores for and has not waited for: groups, the last one open.
using Products = std::vector<std::vector<std::function<void()>>>;

struct Block {
  uint3 index;
  std::vector<Fiber> fibers;
  std::unique_ptr<unsigned char[]> stacks;
  std::vector<unsigned char> shared;
  std::vector<std::vector<std::unique_ptr<Exchange>>> warps;
  int alive = 0, at_barrier = 0;
  uint64_t barriers = 0;
  std::map<const void*, Barrier> barriers_in_memory;
  std::map<int, Barrier> barriers_by_number;
  std::map<unsigned, Products> products;  // of each thread
};

// Blocks that run together.
struct Cluster {
  std::vector<Block> blocks;
  int alive = 0, at_barrier = 0;  // threads
  uint64_t barriers = 0;
  std::vector<std::pair<Block*, std::function<void()>>> under_way;  // what goes on by itself
  uint64_t quiet = 0;  // how often nobody could go on and nothing was under way
  int waiting_for_quiet = 0;
};

inline Cluster cluster;
inline Block* block;  // whose thread runs
inline Fiber* current;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::function<cudaError_t()> late;  // the launch that waits
inline uint64_t grids_done;  // of those that another kernel waited for
inline cudaError_t error;  // of that launch

inline void wait_for(const uint64_t* counter, uint64_t target) {
  current->counter = counter;
  current->target = target;
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

// Of a block or a cluster.
template <typename Threads>
void release_barrier(Threads& threads) {
  if (threads.at_barrier == 0 || threads.at_barrier < threads.alive) return;
  threads.at_barrier = 0;
  ++threads.barriers;
}

template <typename Threads>
void meet(Threads& threads) {
  ++threads.at_barrier;
  const uint64_t target = threads.barriers + 1;
  release_barrier(threads);
  if (threads.barriers < target) wait_for(&threads.barriers, target);
}

inline void run_fiber() {
  body();
  current->finished = true;
  --block->alive;
  --cluster.alive;
  release_barrier(*block);
  release_barrier(cluster);
  _longjmp(scheduler, 1);
}

inline void enter(Block& entered) {
  block = &entered;
  blockIdx = entered.index;
}

__attribute__((noinline)) inline void resume(int thread) {
  current = &block->fibers[thread];
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  if (_setjmp(scheduler) != 0) return;
  if (current->started) _longjmp(current->place, 1);
  current->started = true;
  setcontext(&current->start);
}

inline void prepare(Block& block, int num_threads, size_t shared_bytes) {
  block.fibers.resize(kMaxThreads);
  if (!block.stacks) block.stacks.reset(new unsigned char[kStack * kMaxThreads]);
  block.shared.assign(shared_bytes + kSharedAlignment, 0xff);
  block.warps.clear();
  block.warps.resize((num_threads + 31) / 32);
  block.alive = num_threads;
  block.at_barrier = 0;
  block.barriers = 0;
  block.barriers_in_memory.clear();
  block.barriers_by_number.clear();
  block.products.clear();
  for (int thread = 0; thread < num_threads; ++thread) {
    Fiber& fiber = block.fibers[thread];
    fiber.started = fiber.finished = false;
    fiber.counter = nullptr;
    fiber.copies.clear();
    fiber.groups.clear();
    fiber.uncommitted = 0;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = &block.stacks[kStack * thread];
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
  }
}

// Whether a thread of the warp got any further.
inline bool run_warp(int warp, int num_threads) {
  bool progress = false, again = true;
  while (again) {
    again = false;
    for (int i = 0; i < 32; ++i) {
      const int thread = 32 * warp + (order.descending ? 31 - i : i);
      if (thread >= num_threads) continue;
      const Fiber& fiber = block->fibers[thread];
      if (fiber.finished || (fiber.counter != nullptr && *fiber.counter < fiber.target)) continue;
      resume(thread);
      progress = again = true;
    }
  }
  return progress;
}

// Begins work that no thread carries out: it is done at once, or when nobody can go on.
inline void begin(std::function<void()> work) {
  if (order.early_copies) return work();
  cluster.under_way.emplace_back(block, std::move(work));
}

// Whether something was under way, one of which is done now.
inline bool finish_one() {
  auto& all = cluster.under_way;
  if (all.empty()) return false;
  const auto at = order.last_first ? all.end() - 1 : all.begin();
  const auto [of, work] = std::move(*at);
  all.erase(at);
  enter(*of);
  work();
  return true;
}

// Lets those go on who wait as long as they may.
inline bool tell_quiet() {
  if (cluster.waiting_for_quiet == 0) return false;
  cluster.waiting_for_quiet = 0;
  ++cluster.quiet;
  return true;
}

// Runs the launch that waits, in the middle of a block of the next one.
inline void run_late_launch() {
  Cluster own;
  std::swap(cluster, own);
  const auto kept = std::make_tuple(block, threadIdx, blockIdx, blockDim, gridDim, body);
  const auto launch = std::move(late);
  late = nullptr;
  error = launch();
  std::tie(block, threadIdx, blockIdx, blockDim, gridDim, body) = kept;
  std::swap(cluster, own);
  ++grids_done;
}

// Runs a block as far as it comes without another. Returns whether it got any further.
inline bool run_block(Block& entered, int num_threads) {
  enter(entered);
  const int warps = (num_threads + 31) / 32;
  bool progress = false, again = true;
  while (again) {
    again = false;
    for (int i = 0; i < warps; ++i) {
      again |= run_warp(order.descending ? warps - 1 - i : i, num_threads);
    }
    progress |= again;
  }
  return progress;
}

// Whether all threads of the cluster came to their end.
inline bool run_cluster(int num_threads) {
  while (cluster.alive > 0) {
    bool progress = false;
    const size_t size = cluster.blocks.size();
    for (size_t i = 0; i < size; ++i) {
      progress |= run_block(cluster.blocks[order.descending ? size - 1 - i : i], num_threads);
    }
    if (!progress) progress = finish_one() || tell_quiet();
    if (progress) continue;
    if (late) {
      run_late_launch();
      continue;
    }
    for (const Block& block : cluster.blocks) {
      std::fprintf(stderr, "block %u: threads wait for each other in vain:", block.index.x);
      for (int i = 0; i < num_threads; ++i) {
        if (!block.fibers[i].finished) std::fprintf(stderr, " %d", i);
      }
      std::fprintf(stderr, "\n");
    }
    return false;
  }
  if (!cluster.under_way.empty()) fail("a copy that nobody waited for");
  return true;
}

// `size`: neighbouring blocks of a cluster, which divide grid.x.
inline cudaError_t run_grid(dim3 grid, int num_threads, size_t shared_bytes, unsigned size = 1) {
  blockDim = dim3(num_threads);
  gridDim = grid;
  if (grid.y > 65535 || grid.z > 65535 || num_threads > kMaxThreads || grid.x % size != 0) {
    return cudaErrorInvalidConfiguration;
  }
  cluster.blocks.resize(size);
  const uint64_t clusters = static_cast<uint64_t>(grid.x) / size * grid.y * grid.z;
  for (uint64_t i = 0; i < clusters; ++i) {
    const uint64_t first = (order.descending ? clusters - 1 - i : i) * size;
    cluster.alive = num_threads * static_cast<int>(size);
    cluster.at_barrier = cluster.waiting_for_quiet = 0;
    for (unsigned rank = 0; rank < size; ++rank) {
      const uint64_t at = first + rank;
      cluster.blocks[rank].index = {static_cast<unsigned>(at % grid.x),
                                    static_cast<unsigned>(at / grid.x % grid.y),
                                    static_cast<unsigned>(at / grid.x / grid.y)};
      prepare(cluster.blocks[rank], num_threads, shared_bytes);
    }
    if (!run_cluster(num_threads)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

inline Exchange& exchange_of(unsigned mask) {
  auto& exchanges = block->warps[threadIdx.x / 32];
  for (auto& exchange : exchanges) {
    if (exchange->mask == mask) return *exchange;
  }
  exchanges.push_back(std::make_unique<Exchange>());
  exchanges.back()->mask = mask;
  return *exchanges.back();
}

// Every lane of the mask gives `mine`; all get what each gave, by lane.
template <typename Value>
const unsigned char (*exchange(unsigned mask, const char* what, const Value& mine))[64] {
  static_assert(sizeof(Value) <= 64);
  const unsigned lane = threadIdx.x % 32;
  if ((mask >> lane & 1u) == 0) fail("a lane outside the mask");
  Exchange& given = exchange_of(mask);
  const uint64_t number = given.count[lane]++;
  const int buffer = number % 2;
  if (given.arrived[buffer] == 0) given.what[buffer] = what;
  if (std::strcmp(given.what[buffer], what) != 0) fail("lanes meet in different collectives");
  std::memcpy(given.data[buffer][lane], &mine, sizeof(Value));
  given.arrived[buffer] |= 1u << lane;
  if (given.arrived[buffer] == mask) {
    given.arrived[buffer] = 0;
    given.done[buffer] = number + 1;
  } else {
    wait_for(&given.done[buffer], number + 1);
  }
  return given.data[buffer];
}

template <typename Value>
Value given_by(const unsigned char (*data)[64], int lane) {
  Value value;
  std::memcpy(&value, data[lane], sizeof(Value));
  return value;
}

inline unsigned char* shared_memory(Block& of) {
  const auto address = reinterpret_cast<uintptr_t>(of.shared.data());
  return reinterpret_cast<unsigned char*>((address + kSharedAlignment - 1) / kSharedAlignment *
                                          kSharedAlignment);
}

inline void finish_copies(size_t groups_left) {
  while (current->groups.size() > groups_left) {
    const size_t count = current->groups.front();
    for (size_t i = 0; i < count; ++i) current->copies[i].run();
    current->copies.erase(current->copies.begin(), current->copies.begin() + count);
    current->groups.erase(current->groups.begin());
  }
}

}  // namespace host

// --- what CUDA declares itself

inline void __syncthreads() {
  host::meet(*host::block);
}

inline void __syncwarp(unsigned mask = 0xffffffffu) { host::exchange(mask, "syncwarp", 0); }

template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes) {
  const auto* data = host::exchange(mask, "shuffle", value);
  return host::given_by<Value>(data, threadIdx.x % 32 ^ lanes);
}

template <typename Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned lanes) {
  const auto* data = host::exchange(mask, "shuffle up", value);
  const unsigned lane = threadIdx.x % 32;
  return host::given_by<Value>(data, lane < lanes ? lane : lane - lanes);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto* data = host::exchange(mask, "ballot", predicate);
  unsigned lanes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) != 0 && host::given_by<int>(data, lane) != 0) lanes |= 1u << lane;
  }
  return lanes;
}

inline unsigned __match_any_sync(unsigned mask, int value) {
  const auto* data = host::exchange(mask, "match", value);
  unsigned lanes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) != 0 && host::given_by<int>(data, lane) == value) lanes |= 1u << lane;
  }
  return lanes;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }

inline int atomicAdd(int* to, int value) {
  const int was = *to;
  *to += value;
  return was;
}

// --- what device.h asks of the hardware

namespace moe_kernels::cuda {

inline unsigned char* shared_memory() { return host::shared_memory(*host::block); }

inline float sigmoid(float value) { return 1.0f / (1.0f + std::exp(-value)); }

inline void copy_async(void* shared, const void* global, bool present) {
  const auto unaligned =
      (reinterpret_cast<uintptr_t>(shared) | (present ? reinterpret_cast<uintptr_t>(global) : 0)) %
      16;
  if (unaligned != 0) host::fail("a copy that is not aligned to 16 bytes");
  const host::Copy copy{shared, present ? global : nullptr};
  if (host::order.early_copies) return copy.run();
  host::current->copies.push_back(copy);
  ++host::current->uncommitted;
}

inline void commit_copies() {
  host::current->groups.push_back(host::current->uncommitted);
  host::current->uncommitted = 0;
}

template <int kGroups>
void wait_copies() {
  host::finish_copies(kGroups);
}

// Four matrices of 8 x 8: lane 8 i + j has the address of row j of matrix i.
inline void load_matrices(uint32_t (&out)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) host::fail("a row that is not aligned");
  const auto* rows = host::exchange(~0u, transposed ? "ldmatrix.trans" : "ldmatrix", row);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int b = 0; b < 2; ++b) {
      const int along = lane % 4 * 2 + b, across = lane / 4;
      const int row = 8 * i + (transposed ? along : across);
      const auto* from = host::given_by<const uint16_t*>(rows, row);
      pair[b] = from[transposed ? across : along];
    }
    std::memcpy(&out[i], pair, 4);
  }
}

inline void load_matrices(uint32_t (&out)[4], const void* row) { load_matrices(out, row, false); }
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  load_matrices(out, row, true);
}

namespace on_host {

struct Fragments {
  uint32_t a[4], b[2];
};

inline float widen(__nv_bfloat16, uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline float widen(__half, uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) values[i] = __half2float(__half(__half_raw{uint16_t(i)}));
    return values;
  }();
  return table[bits];
}

}  // namespace on_host

inline uint4 load_once(const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) host::fail("a weight that is not aligned");
  return *static_cast<const uint4*>(global);
}

inline void prefetch(const void* global) {
  static_cast<void>(*static_cast<const volatile char*>(global));
}

inline void forget(int&) {}

inline int same_in_warp(int value) {
  const auto* data = host::exchange(~0u, "same in warp", value);
  if (host::given_by<int>(data, 0) != value) host::fail("lanes of a warp differ");
  return value;
}

inline void start_next_kernel() {}

inline void wait_for_previous_kernel() {
  if (host::late) host::wait_for(&host::grids_done, host::grids_done + 1);
}

// acc (16, 8) += a (16, 16) b (16, 8), the fragments of mma.sync.m16n8k16.
template <typename T>
void multiply(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  on_host::Fragments mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const auto* all = host::exchange(~0u, "mma", mine);
  const int lane = threadIdx.x % 32;
  float rows[2][16], columns[2][16];
  for (int k = 0; k < 16; ++k) {
    const int owner = k % 8 / 2, half = k % 2;
    const auto of_row = host::given_by<on_host::Fragments>(all, lane / 4 * 4 + owner);
    for (int i = 0; i < 2; ++i) {
      const int column = lane % 4 * 2 + i;
      const auto of_column = host::given_by<on_host::Fragments>(all, column * 4 + owner);
      rows[i][k] = on_host::widen(T{}, of_row.a[k / 8 * 2 + i] >> (16 * half) & 0xffff);
      columns[i][k] = on_host::widen(T{}, of_column.b[k / 8] >> (16 * half) & 0xffff);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) acc[i] += rows[i / 2][k] * columns[i % 2][k];
  }
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, int threads,
                            size_t shared_bytes, cudaStream_t, const Arguments&... arguments) {
  if (shared_bytes > 227 * 1024) return cudaErrorInvalidValue;
  ++host::launches;
  if (host::idle) return cudaSuccess;
  const auto run = [=] {
    host::body = [=] { kernel(arguments...); };
    return host::run_grid(grid, threads, shared_bytes, cluster);
  };
  if (!host::order.late_launches) return run();
  host::late = run;
  return cudaSuccess;
}

template <typename Kernel, typename... Arguments>
cudaError_t launch(Kernel kernel, dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  return launch_clusters(kernel, 1, grid, threads, shared_bytes, stream, arguments...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, int threads,
                         size_t shared_bytes, cudaStream_t, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) return cudaErrorInvalidValue;
  ++host::launches;
  if (host::idle) return cudaSuccess;
  host::error = cudaSuccess;
  host::body = [&] { kernel(arguments...); };
  const cudaError_t error = host::run_grid(grid, threads, shared_bytes);
  return error == cudaSuccess ? host::error : error;
}

}  // namespace moe_kernels::cuda

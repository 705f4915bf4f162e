// What sm90.h asks of the hardware, on the host: barriers in shared memory, the copy engine, and the
// products of a warpgroup. Asynchronous work is done at once, or as late as it may be: a copy when
// nobody can go on without it, first or last in first out; a product when its thread waits for it.
#pragma once

#include "cuda_on_host.h"
// TensorMap and Encoding come from sm90.h, which includes this file.

namespace moe_kernels::cuda::sm90 {

inline unsigned char* shared_memory() { return cuda::shared_memory(); }

// --- barriers

inline host::Barrier& barrier_of(const uint64_t* place, host::Block& block = *host::block) {
  const auto found = block.barriers_in_memory.find(place);
  if (found == block.barriers_in_memory.end()) host::fail("a barrier that was not made");
  if (block.alive == 0) host::fail("something comes to a block that has ended");
  return found->second;
}

// The same place in another block's shared memory.
template <typename T>
T* place_in(host::Block& block, T* place) {
  const auto offset = reinterpret_cast<unsigned char*>(place) - shared_memory();
  return reinterpret_cast<T*>(host::shared_memory(block) + offset);
}

inline void end_phase(host::Barrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phases;
}

inline void init_barrier(uint64_t* place, int arrivals) {
  host::block->barriers_in_memory[place] = {arrivals, arrivals, 0, 0};
}
inline void fence_barriers() {}

inline void wait_barrier(uint64_t* place, int parity) {
  const host::Barrier& barrier = barrier_of(place);
  if ((barrier.phases & 1) == static_cast<uint64_t>(parity)) {
    host::wait_for(&barrier.phases, barrier.phases + 1);
  }
}

inline void arrive(host::Barrier& barrier) {
  if (barrier.pending-- == 0) host::fail("one arrival too many");
  end_phase(barrier);
}
inline void arrive(uint64_t* place) { arrive(barrier_of(place)); }

inline void arrive_at(uint64_t* place, int rank) {
  host::Block& block = host::cluster.blocks.at(rank);
  arrive(barrier_of(place_in(block, place), block));
}

inline void meet_cluster() { host::meet(host::cluster); }

inline void arrive_expecting(uint64_t* place, int bytes) {
  barrier_of(place).bytes += bytes;
  arrive(place);
}

inline void arrive_when_copied(uint64_t* place) {
  const auto copies = std::move(host::current->copies);
  host::current->copies.clear();
  host::current->uncommitted = 0;
  host::begin([=] {
    for (const host::Copy& copy : copies) copy.run();
    arrive(place);
  });
}

// A barrier by its number, which is made where threads first come to it.
inline void meet(int number, int threads) {
  const auto [found, made] = host::block->barriers_by_number.try_emplace(
      number, host::Barrier{threads, threads, 0, 0});
  host::Barrier& barrier = found->second;
  if (barrier.arrivals != threads) host::fail("another number of threads at a barrier");
  const uint64_t phase = barrier.phases;
  --barrier.pending;
  end_phase(barrier);
  if (barrier.phases == phase) host::wait_for(&barrier.phases, phase + 1);
}

// --- the copy engine

inline void check_swizzle(const void*) {}

// Refuses what the driver refuses.
inline cudaError_t encode_tiled(TensorMap* map, const Encoding& with) {
  static_assert(sizeof(Encoding) <= sizeof(TensorMap));
  bool right = reinterpret_cast<uintptr_t>(with.matrix) % 16 == 0 && 2 * with.box[0] <= 128;
  for (int i = 0; i < 3; ++i) {
    right = right && with.sizes[i] > 0 && with.sizes[i] < 1ull << 32 && with.box[i] <= 256 &&
            with.steps[i] == 1 && (i == 2 || with.strides[i] % 16 == 0);
  }
  if (!right) return cudaErrorInvalidValue;
  std::memcpy(map, &with, sizeof(with));
  return cudaSuccess;
}

inline cudaError_t count_multiprocessors(int& number) {
  number = host::multiprocessors;
  return cudaSuccess;
}

// Address of a byte in swizzled shared memory, of its address before.
inline unsigned char* swizzled(unsigned char* address, host::Block& block = *host::block) {
  const auto at = static_cast<uintptr_t>(address - host::shared_memory(block));
  return host::shared_memory(block) + (at ^ (at >> 3 & 0x70));
}

// Copies a box to one block of the cluster.
inline void load_box_to(host::Block* block, const Encoding& matrix, unsigned char* box, int column,
                        int row, int depth, const uint64_t* barrier) {
  barrier_of(barrier, *block);  // it must be there when the copy begins
  host::begin([=] {
    host::Barrier& told = barrier_of(barrier, *block);
    const uint64_t first[] = {uint64_t(column), uint64_t(row), uint64_t(depth)};
    for (unsigned r = 0; r < matrix.box[1]; ++r) {
      for (unsigned c = 0; c < matrix.box[0]; ++c) {
        uint16_t element = 0;
        if (first[0] + c < matrix.sizes[0] && first[1] + r < matrix.sizes[1] &&
            first[2] < matrix.sizes[2]) {
          std::memcpy(&element,
                      static_cast<const char*>(matrix.matrix) + first[2] * matrix.strides[1] +
                          (first[1] + r) * matrix.strides[0] + (first[0] + c) * 2,
                      2);
        }
        std::memcpy(swizzled(box + r * 128 + c * 2, *block), &element, 2);
      }
    }
    told.bytes -= 2 * matrix.box[0] * matrix.box[1] * matrix.box[2];
    end_phase(told);
  });
}

template <int kBlocks>
void load_box(const TensorMap* map, void* to, int column, int row, int depth, uint64_t* barrier) {
  Encoding matrix;
  std::memcpy(&matrix, map, sizeof(matrix));
  auto* box = static_cast<unsigned char*>(to);
  if ((box - shared_memory()) % kSwizzle != 0) host::fail("a box between two repetitions");
  if (kBlocks == 1) return load_box_to(host::block, matrix, box, column, row, depth, barrier);
  for (int rank = 0; rank < kBlocks; ++rank) {
    host::Block& block = host::cluster.blocks.at(rank);
    load_box_to(&block, matrix, place_in(block, box), column, row, depth,
                place_in(block, barrier));
  }
}

// --- products of a warpgroup

inline void fence_for_products() {}
inline void begin_products() {}
template <int kTiles>
void fence_sums(float (&)[kTiles][4]) {}

// The same bits as on the device; the address is relative to shared memory.
inline uint64_t operand(const void* from, int stride) {
  const auto address = static_cast<uint64_t>(static_cast<const unsigned char*>(from) -
                                             shared_memory());
  if (address % 16 != 0 || address >= 1 << 18) host::fail("an operand between two chunks");
  return address >> 4 | static_cast<uint64_t>(stride >> 4) << 16 |
         static_cast<uint64_t>(kSwizzle >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

// Element of an operand in `shared` memory, `along` memory's rows of 128 bytes and `across` them.
inline uint16_t element(const unsigned char* shared, uint64_t operand, unsigned along,
                        unsigned across) {
  const unsigned start = (operand & 0x3fff) << 4, far = (operand >> 16 & 0x3fff) << 4;
  const unsigned groups = (operand >> 32 & 0x3fff) << 4;
  const unsigned at =
      start + along / 64 * far + across / 8 * groups + across % 8 * 128 + along % 64 * 2;
  uint16_t value;
  std::memcpy(&value, shared + (at ^ (at >> 3 & 0x70)), 2);
  return value;
}

template <typename T, bool kAcross, int kTiles>
void multiply(float (&d)[kTiles][4], uint64_t a, uint64_t b) {
  float(*sums)[4] = d;
  const unsigned thread = threadIdx.x;
  const auto run = [=] {
    const int lane = thread % 32, warp = thread / 32 % 4;
    const unsigned char* shared = shared_memory();
    float left[16][2];  // of the thread's two rows
    for (int k = 0; k < 16; ++k) {
      for (int half = 0; half < 2; ++half) {
        left[k][half] = on_host::widen(T{}, element(shared, a, k, warp * 16 + half * 8 + lane / 4));
      }
    }
    for (int column = 0; column < 2 * kTiles; ++column) {
      const int n = column / 2 * 8 + lane % 4 * 2 + column % 2;
      float* own = &sums[column / 2][column % 2];
      for (int k = 0; k < 16; ++k) {
        const float right =
            on_host::widen(T{}, element(shared, b, kAcross ? n : k, kAcross ? k : n));
        own[0] += left[k][0] * right;
        own[2] += left[k][1] * right;
      }
    }
  };
  if (host::order.early_copies) return run();
  auto& products = host::block->products[thread];
  if (products.empty()) products.emplace_back();
  products.back().push_back(run);
}

inline void commit_products() {
  if (!host::order.early_copies) host::block->products[threadIdx.x].emplace_back();
}

template <int kGroups>
void wait_products() {
  if (host::order.early_copies) return;
  ++host::cluster.waiting_for_quiet;
  host::wait_for(&host::cluster.quiet, host::cluster.quiet + 1);
  auto& products = host::block->products[threadIdx.x];
  while (products.size() > kGroups + 1) {
    for (const auto& product : products.front()) product();
    products.erase(products.begin());
  }
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

}  // namespace moe_kernels::cuda::sm90

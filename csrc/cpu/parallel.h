// Work items over threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "alloc.h"

namespace moe_kernels::cpu {

// Calls f(item, scratch) for every item in [0, count). Items differ in size, so each thread takes
// the next one when it is free. An item writes only its own results, so the thread that runs it
// does not matter. scratch: bytes_per_thread of 64-byte aligned memory, its contents arbitrary.
template <typename F>
void for_each_item(int64_t count, int64_t bytes_per_thread, const F& f) {
  if (count == 0) return;
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  const int64_t stride = (bytes_per_thread + 127) / 64 * 64;
  const at::Tensor memory = empty({threads * stride}, at::kByte);
  char* base = static_cast<char*>(memory.data_ptr());
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t item = next++; item < count; item = next++) f(item, base + thread * stride);
    }
  });
}

// Cuts a thread's scratch into typed pieces.
class Scratch {
 public:
  explicit Scratch(char* memory) : next_(memory) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return piece;
  }

  // Space that take<T>(count) uses.
  template <typename T>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char* next_;
};

}  // namespace moe_kernels::cpu

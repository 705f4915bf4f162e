// What CUDA was asked about a kernel on a device, or told of it. Not for NVRTC.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <mutex>

namespace moe_kernels::cuda {

// The first shared memory of a block, which needs no attribute.
constexpr size_t kSharedWithoutAttribute = 48 * 1024;

// Asks once for all threads. An error is not kept, so that the next call asks again.
class AskedOnce {
 public:
  // Calls set(bytes) unless blocks may have as much dynamic shared memory already.
  template <typename Set>
  cudaError_t allow_shared(size_t bytes, const Set& set) {
    if (bytes <= allowed_.load(std::memory_order_acquire)) return cudaSuccess;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (bytes <= allowed_.load(std::memory_order_relaxed)) return cudaSuccess;
    const cudaError_t error = set(static_cast<int>(bytes));
    if (error == cudaSuccess) allowed_.store(bytes, std::memory_order_release);
    return error;
  }

  // Gives what ask(overlaps) found: whether the kernel may overlap the one before it.
  template <typename Ask>
  cudaError_t may_overlap(bool& overlaps, const Ask& ask) {
    Overlap known = overlap_.load(std::memory_order_acquire);
    if (known == Overlap::kUnknown) {
      const std::lock_guard<std::mutex> lock(mutex_);
      known = overlap_.load(std::memory_order_relaxed);
      if (known == Overlap::kUnknown) {
        bool found = false;
        const cudaError_t error = ask(found);
        if (error != cudaSuccess) return error;
        known = found ? Overlap::kYes : Overlap::kNo;
        overlap_.store(known, std::memory_order_release);
      }
    }
    overlaps = known == Overlap::kYes;
    return cudaSuccess;
  }

 private:
  enum class Overlap { kUnknown, kNo, kYes };
  std::mutex mutex_;
  std::atomic<size_t> allowed_ = kSharedWithoutAttribute;
  std::atomic<Overlap> overlap_ = Overlap::kUnknown;
};

// Drivers before this version cannot capture a launch that overlaps in a graph.
constexpr int kDriverThatCapturesOverlap = 12030;
// Kernels compiled for an architecture before this one do not wait for the kernel before.
constexpr int kFirstArchThatWaits = 90;

}  // namespace moe_kernels::cuda

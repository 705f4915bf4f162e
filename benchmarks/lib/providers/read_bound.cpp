// The time that a plain loop takes to read memory once: the bound of decoding.

#include <omp.h>

#include <cstdint>

// Sums `count` ranges of 64-bit words. Each range is divided evenly among the threads, so that they
// finish together whatever the number of ranges is.
extern "C" uint64_t read_all(const uint64_t* const* starts, const int64_t* words, int64_t count,
                             int num_threads) {
  uint64_t total = 0;
#pragma omp parallel num_threads(num_threads) reduction(+ : total)
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    for (int64_t range = 0; range < count; ++range) {
      const int64_t begin = words[range] * thread / threads;
      const int64_t end = words[range] * (thread + 1) / threads;
      const uint64_t* data = starts[range];
      uint64_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = begin; i < end; ++i) sum += data[i];
      total += sum;
    }
  }
  return total;
}

// Launches kernels that are not linked, by their names: for a build without nvcc. The C++ compiler
// reads the .cu files for their launches and for the names and parameters of their kernels, which
// NVRTC compiles when they are first launched (moe_kernels/_nvrtc.py).
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <tuple>
#include <typeinfo>
#include <vector>

#include "../asked_once.h"

namespace moe_kernels::cuda {

constexpr int kMaxDevices = 64;

// A kernel in the context that torch has on a device.
struct LoadedKernel {
  void* function;
  AskedOnce asked = {};
};

// A kernel with its template arguments, and what is loaded of it on each device.
struct NamedKernel {
  std::string file;  // name of its .cu file
  std::string name;  // a C++ expression for it
  std::array<std::atomic<LoadedKernel*>, kMaxDevices> on_device = {};

  NamedKernel(const char* file, const char* name, std::vector<const std::type_info*> arguments);
};

// Every kernel that the launches of this library name.
const std::vector<NamedKernel*>& named_kernels();

// The digests of the sources that this build has read, as moe_kernels/_cuda_sources.py writes them.
const char* sources();

// Launches it on the device of the current context, after compiling and loading it where it is
// new there. `early`: it may start before the kernel before it has ended. `cluster`: blocks of a
// cluster. Throws c10::Error with what to do. Safe to call from several threads.
void launch_named(NamedKernel& kernel, dim3 grid, int threads, size_t shared_bytes,
                  cudaStream_t stream, void** arguments, bool early, int cluster);

// Makes this thread's context current again when it is destroyed: none, torch's or another
// library's.
class KeptContext {
 public:
  KeptContext();
  ~KeptContext();
  KeptContext(const KeptContext&) = delete;
  KeptContext& operator=(const KeptContext&) = delete;

 private:
  void* before_ = nullptr;
};

// Makes the context that torch has on a device current in this thread: the driver launches into the
// current one.
void use_context_of_torch(int device);

// What the compiler makes: an image for the driver and the kernel's symbol in it, or an error.
struct Compiled {
  std::string image, symbol, error;
};
// Compiles a kernel for a device of this compute capability.
using Compiler = std::function<Compiled(const NamedKernel& kernel, int major, int minor)>;

// Gives the compiler, once, before the first launch.
void set_compiler(Compiler compiler);

// A kernel whose parameters are known.
template <typename Function>
struct TypedKernel {
  NamedKernel* kernel;
};

// Name: a type with the names of the kernel and of its file.
template <typename Name, typename... Arguments>
struct Instance {
  static inline NamedKernel kernel{Name::file(), Name::name(), {&typeid(Arguments)...}};
};

// A kernel and its template arguments, which must be types, for launch().
#define MOE_KERNEL(kernel_, ...)                                                      \
  [] {                                                                                \
    struct Name {                                                                     \
      static const char* file() { return __FILE__; }                                  \
      static const char* name() { return #kernel_; }                                  \
    };                                                                                \
    using Function = decltype(&kernel_ __VA_OPT__(<__VA_ARGS__>));                    \
    return TypedKernel<Function>{&Instance<Name __VA_OPT__(, ) __VA_ARGS__>::kernel}; \
  }()

template <typename... Parameters, typename... Arguments>
cudaError_t launch_typed(TypedKernel<void (*)(Parameters...)> kernel, dim3 grid, int threads,
                         size_t shared_bytes, cudaStream_t stream, bool early, int cluster,
                         const Arguments&... arguments) {
  std::tuple<Parameters...> values(arguments...);
  std::apply(
      [&](auto&... each) {
        void* pointers[] = {&each...};
        launch_named(*kernel.kernel, grid, threads, shared_bytes, stream, pointers, early,
                     cluster);
      },
      values);
  return cudaSuccess;
}

template <typename Kernel, typename... Arguments>
cudaError_t launch(Kernel kernel, dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  return launch_typed(kernel, grid, threads, shared_bytes, stream, false, 1, arguments...);
}

// See device.h.
template <typename Kernel, typename... Arguments>
cudaError_t launch_early(Kernel kernel, dim3 grid, int threads, size_t shared_bytes,
                         cudaStream_t stream, const Arguments&... arguments) {
  return launch_typed(kernel, grid, threads, shared_bytes, stream, true, 1, arguments...);
}

template <typename Kernel, typename... Arguments>
cudaError_t launch_clusters(Kernel kernel, int cluster, unsigned grid, int threads,
                            size_t shared_bytes, cudaStream_t stream,
                            const Arguments&... arguments) {
  return launch_typed(kernel, grid, threads, shared_bytes, stream, false, cluster, arguments...);
}

// --- what the kernels ask of the hardware; see device.h

unsigned char* shared_memory();
float sigmoid(float value);
void copy_async(void* shared, const void* global, bool present);
void commit_copies();
template <int kGroups>
void wait_copies();
void load_matrices(uint32_t (&out)[4], const void* row);
void load_matrices_transposed(uint32_t (&out)[4], const void* row);
uint4 load_once(const void* global);
void prefetch(const void* global);
int same_in_warp(int value);
void forget(int& value);
void start_next_kernel();
void wait_for_previous_kernel();
template <typename T>
void multiply(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace moe_kernels::cuda

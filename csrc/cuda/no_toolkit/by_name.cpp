// Loads and launches kernels by the CUDA driver, which every machine with an NVIDIA GPU has. Its
// few functions are declared here, since no header of CUDA may be there.
#include "by_name.h"

#include <c10/util/Exception.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>

namespace moe_kernels::cuda {
namespace {

constexpr const char* kDriver = "libcuda.so.1";
// Values of the driver's enumerations, which never change.
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76, kMaxDynamicSharedSize = 8;
constexpr size_t kSharedBytesWithoutAttribute = 48 * 1024;

using Handle = void*;  // of a context, module or function

struct Driver {
  int (*cuGetErrorString)(int, const char**);
  int (*cuCtxGetCurrent)(Handle*);
  int (*cuCtxSetCurrent)(Handle);
  int (*cuCtxGetDevice)(int*);
  int (*cuDevicePrimaryCtxRetain)(Handle*, int);
  int (*cuDeviceGetAttribute)(int*, int, int);
  int (*cuStreamIsCapturing)(cudaStream_t, int*);
  int (*cuModuleLoadDataEx)(Handle*, const void*, unsigned, int*, void**);
  int (*cuModuleGetFunction)(Handle*, Handle, const char*);
  int (*cuFuncSetAttribute)(Handle, int, int);
  int (*cuLaunchKernel)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        unsigned, cudaStream_t, void**, void**);

  Driver() {
    void* library = dlopen(kDriver, RTLD_NOW | RTLD_LOCAL);
    TORCH_CHECK(library != nullptr, "the CUDA driver does not load (", dlerror(),
                "): install the NVIDIA driver");
    const auto find = [&](auto& function, const char* name) {
      void* address = dlsym(library, name);
      TORCH_CHECK(address != nullptr, kDriver, " has no ", name, ": update the NVIDIA driver");
      std::memcpy(&function, &address, sizeof(address));
    };
    find(cuGetErrorString, "cuGetErrorString");
    find(cuCtxGetCurrent, "cuCtxGetCurrent");
    find(cuCtxSetCurrent, "cuCtxSetCurrent");
    find(cuCtxGetDevice, "cuCtxGetDevice");
    find(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
    find(cuDeviceGetAttribute, "cuDeviceGetAttribute");
    find(cuStreamIsCapturing, "cuStreamIsCapturing");
    find(cuModuleLoadDataEx, "cuModuleLoadDataEx");
    find(cuModuleGetFunction, "cuModuleGetFunction");
    find(cuFuncSetAttribute, "cuFuncSetAttribute");
    find(cuLaunchKernel, "cuLaunchKernel");
  }

  void check(int error, const char* what, const char* of) const {
    if (error == 0) return;
    const char* text = nullptr;
    cuGetErrorString(error, &text);
    TORCH_CHECK(false, "the CUDA driver could not ", what, " ", of, ": ",
                text == nullptr ? "unknown error" : text, " (error ", error, ")");
  }
};

const Driver& driver() {
  static const Driver loaded;
  return loaded;
}

std::vector<NamedKernel*>& all_kernels() {
  static std::vector<NamedKernel*> kernels;
  return kernels;
}

Compiler& compiler() {
  static Compiler given;
  return given;
}

// The type as C++ source. Kernels lie in unnamed namespaces, which source does not name.
std::string source_of(const std::type_info& type) {
  const std::unique_ptr<char, void (*)(void*)> text(
      abi::__cxa_demangle(type.name(), nullptr, nullptr, nullptr), std::free);
  TORCH_CHECK(text != nullptr, "no name of the type ", type.name());
  std::string source = text.get();
  const std::string unnamed = "(anonymous namespace)::";
  for (size_t at; (at = source.find(unnamed)) != std::string::npos;) {
    source.erase(at, unnamed.size());
  }
  return source;
}

void* load(NamedKernel& kernel, int device, cudaStream_t stream) {
  int capturing = 0, major = 0, minor = 0;
  driver().check(driver().cuStreamIsCapturing(stream, &capturing), "ask about the stream of",
                 kernel.name.c_str());
  TORCH_CHECK(capturing == 0, "moe_kernels would have to compile and load the CUDA kernel ",
              kernel.name, " inside the capture of a CUDA graph, which the driver does not allow: "
              "call the layer once on inputs of this shape and dtype before the capture");
  const auto attribute = [&](int which, int* value) {
    driver().check(driver().cuDeviceGetAttribute(value, which, device), "describe the device for",
                   kernel.name.c_str());
  };
  attribute(kCapabilityMajor, &major);
  attribute(kCapabilityMinor, &minor);
  TORCH_CHECK(compiler(), "nothing was set to compile ", kernel.name);
  // Outside the lock: the compiler waits for Python, whose lock another launching thread may hold.
  const Compiled compiled = compiler()(kernel, major, minor);
  TORCH_CHECK(compiled.error.empty(), compiled.error);
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  void* function = kernel.functions[device].load();
  if (function != nullptr) return function;
  Handle module = nullptr;
  driver().check(
      driver().cuModuleLoadDataEx(&module, compiled.image.data(), 0, nullptr, nullptr), "load",
      kernel.name.c_str());
  driver().check(driver().cuModuleGetFunction(&function, module, compiled.symbol.c_str()), "find",
                 kernel.name.c_str());
  kernel.functions[device].store(function);
  return function;
}

}  // namespace

NamedKernel::NamedKernel(const char* path, const char* kernel,
                         std::vector<const std::type_info*> arguments)
    : file(path), name(std::string("moe_kernels::cuda::") + kernel) {
  file = file.substr(file.rfind('/') + 1);
  for (size_t i = 0; i < arguments.size(); ++i) {
    name += (i == 0 ? "<" : ", ") + source_of(*arguments[i]);
  }
  if (!arguments.empty()) name += ">";
  all_kernels().push_back(this);
}

const std::vector<NamedKernel*>& named_kernels() { return all_kernels(); }

void set_compiler(Compiler given) { compiler() = std::move(given); }

void bind_context(int device) {
  Handle context = nullptr;
  driver().check(driver().cuCtxGetCurrent(&context), "give", "the current context");
  if (context != nullptr) return;
  driver().check(driver().cuDevicePrimaryCtxRetain(&context, device), "give", "a context");
  driver().check(driver().cuCtxSetCurrent(context), "set", "a context");
}

void launch_named(NamedKernel& kernel, dim3 grid, int threads, size_t shared_bytes,
                  cudaStream_t stream, void** arguments) {
  int device = 0;
  driver().check(driver().cuCtxGetDevice(&device), "give the device of", kernel.name.c_str());
  TORCH_CHECK(device < kMaxDevices, "more than ", kMaxDevices, " devices");
  void* function = kernel.functions[device].load(std::memory_order_acquire);
  if (function == nullptr) function = load(kernel, device, stream);
  if (shared_bytes > kSharedBytesWithoutAttribute) {
    driver().check(driver().cuFuncSetAttribute(function, kMaxDynamicSharedSize,
                                               static_cast<int>(shared_bytes)),
                   "give shared memory to", kernel.name.c_str());
  }
  driver().check(driver().cuLaunchKernel(function, grid.x, grid.y, grid.z, threads, 1, 1,
                                         static_cast<unsigned>(shared_bytes), stream, arguments,
                                         nullptr),
                 "launch", kernel.name.c_str());
}

}  // namespace moe_kernels::cuda

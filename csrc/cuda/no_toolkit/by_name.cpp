// Loads and launches kernels by the CUDA driver, which every machine with an NVIDIA GPU has. Its
// few functions are declared here, since no header of CUDA may be there.
#include "by_name.h"

#include "../sm90.h"

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
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76;     // of a device
constexpr int kMultiprocessorCount = 16;                        // of a device
constexpr int kPtxVersion = 5, kMaxDynamicSharedSize = 8;       // of a function
constexpr int kClusterDimension = 4, kProgrammaticSerialization = 6;  // of a launch

using Handle = void*;  // of a context, module or function

// As CUlaunchAttribute and CUlaunchConfig of cuda.h.
struct Attribute {
  int id;
  int unused;
  unsigned value[16];
};
struct Config {
  unsigned grid[3], block[3], shared_bytes;
  cudaStream_t stream;
  Attribute* attributes;
  unsigned num_attributes;
};
static_assert(sizeof(Attribute) == 72 && sizeof(Config) == 56);

struct Driver {
  int (*cuGetErrorName)(int, const char**);
  int (*cuGetErrorString)(int, const char**);
  int (*cuDriverGetVersion)(int*);
  int (*cuCtxGetCurrent)(Handle*);
  int (*cuCtxSetCurrent)(Handle);
  int (*cuCtxGetDevice)(int*);
  int (*cuDevicePrimaryCtxRetain)(Handle*, int);
  int (*cuDeviceGetAttribute)(int*, int, int);
  int (*cuStreamIsCapturing)(cudaStream_t, int*);
  int (*cuModuleLoadDataEx)(Handle*, const void*, unsigned, int*, void**);
  int (*cuModuleGetFunction)(Handle*, Handle, const char*);
  int (*cuFuncGetAttribute)(int*, int, Handle);
  int (*cuFuncSetAttribute)(Handle, int, int);
  int (*cuLaunchKernelEx)(const Config*, Handle, void**, void**);
  int (*cuTensorMapEncodeTiled)(void*, int, unsigned, void*, const uint64_t*, const uint64_t*,
                                const unsigned*, const unsigned*, int, int, int, int);

  Driver() {
    void* library = dlopen(kDriver, RTLD_NOW | RTLD_LOCAL);
    TORCH_CHECK(library != nullptr, "the CUDA driver does not load (", dlerror(),
                "): install the NVIDIA driver");
    const auto find = [&](auto& function, const char* name) {
      void* address = dlsym(library, name);
      TORCH_CHECK(address != nullptr, kDriver, " has no ", name, ": update the NVIDIA driver");
      std::memcpy(&function, &address, sizeof(address));
    };
    find(cuGetErrorName, "cuGetErrorName");
    find(cuGetErrorString, "cuGetErrorString");
    find(cuDriverGetVersion, "cuDriverGetVersion");
    find(cuCtxGetCurrent, "cuCtxGetCurrent");
    find(cuCtxSetCurrent, "cuCtxSetCurrent");
    find(cuCtxGetDevice, "cuCtxGetDevice");
    find(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
    find(cuDeviceGetAttribute, "cuDeviceGetAttribute");
    find(cuStreamIsCapturing, "cuStreamIsCapturing");
    find(cuModuleLoadDataEx, "cuModuleLoadDataEx");
    find(cuModuleGetFunction, "cuModuleGetFunction");
    find(cuFuncGetAttribute, "cuFuncGetAttribute");
    find(cuFuncSetAttribute, "cuFuncSetAttribute");
    find(cuLaunchKernelEx, "cuLaunchKernelEx");
    find(cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled");
  }
};

const Driver& driver() {
  static const Driver loaded;
  return loaded;
}

void check(int error, const char* function, const char* what, const std::string& of) {
  if (error == 0) return;
  const char *name = nullptr, *text = nullptr;
  driver().cuGetErrorName(error, &name);
  driver().cuGetErrorString(error, &text);
  TORCH_CHECK(false, "the CUDA driver could not ", what, " ", of, ": ", function, " returned ",
              name == nullptr ? "an unknown error" : name, ", ", text == nullptr ? "" : text,
              " (", error, ")");
}

// Calls a function of the driver, or throws with what could not be done.
#define CALL_DRIVER(what, of, function, ...) \
  check(driver().function(__VA_ARGS__), #function, what, of)

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

LoadedKernel& load(NamedKernel& kernel, int device, cudaStream_t stream) {
  int capturing = 0, major = 0, minor = 0;
  CALL_DRIVER("ask about the stream of", kernel.name, cuStreamIsCapturing, stream, &capturing);
  TORCH_CHECK(capturing == 0, "moe_kernels would have to compile and load the CUDA kernel ",
              kernel.name, " inside the capture of a CUDA graph, which the driver does not allow: "
              "call the layer once on inputs of this shape and dtype before the capture");
  CALL_DRIVER("describe the device for", kernel.name, cuDeviceGetAttribute, &major,
              kCapabilityMajor, device);
  CALL_DRIVER("describe the device for", kernel.name, cuDeviceGetAttribute, &minor,
              kCapabilityMinor, device);
  TORCH_CHECK(compiler(), "nothing was set to compile ", kernel.name);
  // Outside the lock: the compiler waits for Python, whose lock another launching thread may hold.
  const Compiled compiled = compiler()(kernel, major, minor);
  TORCH_CHECK(compiled.error.empty(), compiled.error);
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  LoadedKernel* loaded = kernel.on_device[device].load();
  if (loaded != nullptr) return *loaded;
  Handle module = nullptr, function = nullptr;
  CALL_DRIVER("load", kernel.name, cuModuleLoadDataEx, &module, compiled.image.data(), 0, nullptr,
              nullptr);
  CALL_DRIVER("find", kernel.name, cuModuleGetFunction, &function, module,
              compiled.symbol.c_str());
  loaded = new LoadedKernel{function};  // never destroyed, as its module
  kernel.on_device[device].store(loaded);
  return *loaded;
}

// Returns whether a kernel may overlap the one before it.
bool may_overlap(const NamedKernel& kernel, LoadedKernel& loaded) {
  bool overlaps = false;
  loaded.asked.may_overlap(overlaps, [&](bool& found) {
    int arch = 0, version = 0;
    CALL_DRIVER("describe", kernel.name, cuFuncGetAttribute, &arch, kPtxVersion, loaded.function);
    CALL_DRIVER("describe itself for", kernel.name, cuDriverGetVersion, &version);
    found = arch >= kFirstArchThatWaits && version >= kDriverThatCapturesOverlap;
    return cudaSuccess;
  });
  return overlaps;
}

// Returns the context that torch has on a device, which CUDA's runtime calls the primary one.
Handle context_of_torch(int device) {
  TORCH_CHECK(0 <= device && device < kMaxDevices, "CUDA device ", device, " is not one of ",
              kMaxDevices);
  static std::array<std::atomic<Handle>, kMaxDevices> contexts = {};
  Handle context = contexts[device].load(std::memory_order_acquire);
  if (context != nullptr) return context;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  context = contexts[device].load();
  if (context != nullptr) return context;
  CALL_DRIVER("give the context of", "device " + std::to_string(device), cuDevicePrimaryCtxRetain,
              &context, device);
  contexts[device].store(context);
  return context;
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

KeptContext::KeptContext() {
  CALL_DRIVER("give", "the current context", cuCtxGetCurrent, &before_);
}

KeptContext::~KeptContext() {  // unchecked: a destructor does not throw
  Handle context = nullptr;
  driver().cuCtxGetCurrent(&context);
  if (context != before_) driver().cuCtxSetCurrent(before_);
}

void use_context_of_torch(int device) {
  const Handle context = context_of_torch(device);
  Handle current = nullptr;
  CALL_DRIVER("give", "the current context", cuCtxGetCurrent, &current);
  if (current == context) return;
  CALL_DRIVER("set", "the context of torch", cuCtxSetCurrent, context);
}

void launch_named(NamedKernel& kernel, dim3 grid, int threads, size_t shared_bytes,
                  cudaStream_t stream, void** arguments, bool early, int cluster) {
  int device = 0;
  CALL_DRIVER("give the device of", kernel.name, cuCtxGetDevice, &device);
  LoadedKernel* found = kernel.on_device[device].load(std::memory_order_acquire);
  LoadedKernel& loaded = found == nullptr ? load(kernel, device, stream) : *found;
  loaded.asked.allow_shared(shared_bytes, [&](int bytes) {
    CALL_DRIVER("give shared memory to", kernel.name, cuFuncSetAttribute, loaded.function,
                kMaxDynamicSharedSize, bytes);
    return cudaSuccess;
  });
  Attribute attributes[2] = {};
  unsigned number = 0;
  if (early && may_overlap(kernel, loaded)) {
    attributes[number++] = {kProgrammaticSerialization, 0, {1}};
  }
  if (cluster > 1) {
    attributes[number++] = {kClusterDimension, 0, {static_cast<unsigned>(cluster), 1, 1}};
  }
  const Config config = {.grid = {grid.x, grid.y, grid.z},
                         .block = {static_cast<unsigned>(threads), 1, 1},
                         .shared_bytes = static_cast<unsigned>(shared_bytes),
                         .stream = stream,
                         .attributes = attributes,
                         .num_attributes = number};
  CALL_DRIVER("launch", kernel.name, cuLaunchKernelEx, &config, loaded.function, arguments,
              nullptr);
}

namespace sm90 {

cudaError_t encode_tiled(TensorMap* map, const Encoding& with) {
  CALL_DRIVER("describe", "experts to the copy engine", cuTensorMapEncodeTiled, map, with.element,
              3, with.matrix, with.sizes, with.strides, with.box, with.steps, 0, kSwizzle128Bytes,
              kPromoteTo256Bytes, 0);
  return cudaSuccess;
}

cudaError_t count_multiprocessors(int& number) {
  int device = 0, major = 0, minor = 0;
  CALL_DRIVER("give", "the device of the engine", cuCtxGetDevice, &device);
  const auto ask = [&](int& value, int attribute) {
    CALL_DRIVER("describe", "the device of the engine", cuDeviceGetAttribute, &value, attribute,
                device);
  };
  ask(number, kMultiprocessorCount);
  ask(major, kCapabilityMajor);
  ask(minor, kCapabilityMinor);
  return major == 9 && minor == 0 ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace sm90

}  // namespace moe_kernels::cuda

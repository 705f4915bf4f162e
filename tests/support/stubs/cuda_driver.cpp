// Stands in for libcuda.so.1: it loads any image, notes launches, and runs nothing. Like the driver
// it launches in the current context alone, kernels that were loaded there, and loads nothing while
// a stream is captured. There are two devices.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace {

struct Launch {
  std::string symbol;
  unsigned grid[3], threads, shared;
  uint64_t stream, first;  // `first`: the first eight bytes of the kernel's first argument
  unsigned device, early, cluster;
};

struct Function {
  std::string symbol;
  void* context;
};

// As in cuda.h.
struct Attribute {
  int id, unused;
  unsigned value[16];
};
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  const Attribute* attributes;
  unsigned count;
};

std::vector<Launch> launches;
char primary[2], foreign[2];  // contexts, by their addresses, of each device
thread_local void* context = nullptr;
int loaded, retained, shared_bytes, shared_asked, overlap_asked, capturing, fails, arch = 90;
int version_of_driver = 13000;

}  // namespace

extern "C" {

// For tests.
int launches_so_far() { return static_cast<int>(launches.size()); }
void forget_launches() { launches.clear(); }
const char* symbol_of(int i) { return launches[i].symbol.c_str(); }
uint64_t number_of(int i, int which) {
  const Launch& at = launches[i];
  const uint64_t numbers[] = {at.grid[0], at.grid[1], at.grid[2], at.threads,
                              at.shared,  at.stream,  at.first,  at.device, at.early, at.cluster};
  return numbers[which];
}
int modules_loaded() { return loaded; }
int contexts_retained() { return retained; }
int shared_bytes_allowed() { return shared_bytes; }
int times_shared_was_asked() { return shared_asked; }
int times_overlap_was_asked() { return overlap_asked; }
void compile_for(int given) { arch = given; }
void set_driver_version(int given) { version_of_driver = given; }
void make_a_foreign_context_current(int device) { context = &foreign[device]; }
int a_foreign_context_is_current(int device) { return context == &foreign[device]; }
int no_context_is_current() { return context == nullptr; }
void set_capturing(int on) { capturing = on; }
void fail_next_launch(int error) { fails = error; }

int cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_ILLEGAL_ADDRESS";
  return 0;
}
int cuDriverGetVersion(int* version) {
  *version = version_of_driver;
  return 0;
}
int cuGetErrorString(int, const char** text) {
  *text = "an illegal memory access was encountered";
  return 0;
}
int cuCtxGetCurrent(void** current) {
  *current = context;
  return 0;
}
int cuCtxSetCurrent(void* current) {
  context = current;
  return 0;
}
int cuCtxGetDevice(int* device) {
  *device = context == &primary[1] || context == &foreign[1];
  return context == nullptr ? 201 : 0;
}
int cuDevicePrimaryCtxRetain(void** given, int device) {
  if (device < 0 || device > 1) return 101;
  ++retained;
  *given = &primary[device];
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : attribute == 16 ? 132 : 0;  // an H100
  return 0;
}
int cuStreamIsCapturing(void*, int* status) {
  *status = capturing;
  return 0;
}
int cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
  ++loaded;
  *module = const_cast<void*>(image);
  return capturing ? 900 : 0;
}
int cuModuleGetFunction(void** function, void*, const char* symbol) {
  *function = new Function{symbol, context};
  return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void*) {
  ++overlap_asked;
  *value = attribute == 5 ? arch : 0;
  return 0;
}
int cuFuncSetAttribute(void*, int, int bytes) {
  ++shared_asked;
  shared_bytes = bytes;
  return 0;
}
int cuTensorMapEncodeTiled(void* map, int element, unsigned rank, void* matrix, const uint64_t* sizes,
                           const uint64_t* strides, const unsigned* box, const unsigned*, int,
                           int swizzle, int, int) {
  const uint64_t given[] = {reinterpret_cast<uint64_t>(matrix), static_cast<uint64_t>(element), rank,
                            sizes[0], sizes[1], sizes[2], strides[0], strides[1], box[0], box[1],
                            box[2], static_cast<uint64_t>(swizzle)};
  std::memcpy(map, given, sizeof(given));
  return 0;
}
int cuLaunchKernelEx(const Config* config, void* loaded_function, void** arguments, void**) {
  const auto* function = static_cast<Function*>(loaded_function);
  if (context == nullptr) return 201;
  if (function->context != context) return 400;
  if (const int error = fails) return fails = 0, error;
  unsigned early = 0, cluster = 1;
  for (unsigned i = 0; i < config->count; ++i) {
    const Attribute& given = config->attributes[i];
    if (given.id == 6) early = given.value[0];
    if (given.id == 4) cluster = given.value[0];
    if (given.id == 4 && (given.value[1] != 1 || given.value[2] != 1)) return 1;
  }
  if (config->grid[0] % cluster != 0) return 1;
  const unsigned* grid = config->grid;
  Launch launch{function->symbol, {grid[0], grid[1], grid[2]}, config->block[0], config->shared,
                reinterpret_cast<uint64_t>(config->stream), 0, context == &primary[1], early, cluster};
  std::memcpy(&launch.first, arguments[0], sizeof(launch.first));
  launches.push_back(launch);
  return 0;
}

}  // extern "C"

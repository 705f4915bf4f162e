// Stands in for libcuda.so.1: it loads any image, notes launches, and runs nothing. Like the driver
// it launches in the current context alone, and loads nothing while a stream is captured.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace {

struct Launch {
  std::string symbol;
  unsigned grid[3], threads, shared;
  uint64_t stream, first;  // `first`: the first eight bytes of the kernel's first argument
};

std::vector<Launch> launches;
std::vector<std::string*> functions;
thread_local void* context = nullptr;
int loaded, retained, shared_bytes, capturing, fails;

}  // namespace

extern "C" {

// For tests.
int launches_so_far() { return static_cast<int>(launches.size()); }
void forget_launches() { launches.clear(); }
const char* symbol_of(int i) { return launches[i].symbol.c_str(); }
uint64_t number_of(int i, int which) {
  const Launch& at = launches[i];
  const uint64_t numbers[] = {at.grid[0], at.grid[1], at.grid[2], at.threads,
                              at.shared,  at.stream,  at.first};
  return numbers[which];
}
int modules_loaded() { return loaded; }
int contexts_retained() { return retained; }
int shared_bytes_allowed() { return shared_bytes; }
void set_capturing(int on) { capturing = on; }
void fail_next_launch(int error) { fails = error; }

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
  *device = 0;
  return context == nullptr ? 201 : 0;
}
int cuDevicePrimaryCtxRetain(void** primary, int) {
  ++retained;
  *primary = &retained;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : 0;  // compute capability 9.0
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
  functions.push_back(new std::string(symbol));
  *function = functions.back();
  return 0;
}
int cuFuncSetAttribute(void*, int, int bytes) {
  shared_bytes = bytes;
  return 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned,
                   unsigned, unsigned shared, void* stream, void** arguments, void**) {
  if (context == nullptr) return 201;
  if (const int error = fails) return fails = 0, error;
  Launch launch{*static_cast<std::string*>(function), {x, y, z}, threads, shared,
                reinterpret_cast<uint64_t>(stream), 0};
  std::memcpy(&launch.first, arguments[0], sizeof(launch.first));
  launches.push_back(launch);
  return 0;
}

}  // extern "C"

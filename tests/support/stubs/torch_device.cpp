// Tells torch of CUDA devices of which there are only a current device and a current stream.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/cuda/CUDAException.h>  // that of a build without nvcc

#include <string>

namespace {

int current;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(current)}; }
  void* getStreamNativeHandle(const c10::Stream) const override {
    return reinterpret_cast<void*>(0x5712);
  }
};

}  // namespace

namespace {

cudaError_t launch_it(int) { return cudaErrorInvalidValue; }

}  // namespace

// For tests.
extern "C" {

void set_current_device(int device) { current = device; }

const char* words_of_an_error() {
  static std::string words;
  try {
    C10_CUDA_CHECK(launch_it(2));
  } catch (const c10::Error& error) {
    words = error.what_without_backtrace();
  }
  return words.c_str();
}

}  // extern "C"

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

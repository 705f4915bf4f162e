// Tells torch of CUDA devices of which there are only a current device and a current stream. As with
// CUDA's runtime, a change of the device makes the context that torch has there current.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/cuda/CUDAException.h>  // that of a build without nvcc, as is the next
#include <c10/cuda/CUDAGuard.h>

#include <string>

namespace {

int current;

extern "C" int cuCtxGetDevice(int* device);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override {
    int device = 0;
    if (cuCtxGetDevice(&device) != 0) device = current;  // no context is current
    return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device)};
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(c10::Device device) const override {
    if (device == getDevice()) return;
    current = device.index();
    moe_kernels::cuda::use_context_of_torch(current);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { setDevice(device); }
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

// Enters and leaves what guards a launch on tensors of a device; returns the device within.
int device_within_a_guard(int device) {
  const c10::cuda::CUDAGuard guard({c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device)});
  cuCtxGetDevice(&device);
  return device;
}

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

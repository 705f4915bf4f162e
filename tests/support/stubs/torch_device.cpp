// Tells torch of a CUDA device of which there are only a current device and a current stream.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, 0}; }
  void* getStreamNativeHandle(const c10::Stream) const override {
    return reinterpret_cast<void*>(0x5712);
  }
};

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

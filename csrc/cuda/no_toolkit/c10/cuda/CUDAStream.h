// In the place of torch's header where there is no toolkit.
#pragma once

#include <c10/core/impl/VirtualGuardImpl.h>
#include <cuda_runtime.h>

namespace c10::cuda {

inline cudaStream_t getCurrentCUDAStream() {
  const c10::impl::VirtualGuardImpl torch(c10::DeviceType::CUDA);
  return static_cast<cudaStream_t>(torch.getStream(torch.getDevice()).native_handle());
}

}  // namespace c10::cuda

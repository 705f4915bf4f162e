// In the place of torch's header where there is no toolkit.
#pragma once

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "../../by_name.h"

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(c10::Device device)
      : guard(device), context(impl::VirtualGuardImpl(DeviceType::CUDA).getDevice().index()) {}
  c10::DeviceGuard guard;
  moe_kernels::cuda::ContextGuard context;  // of the device that `guard` has made torch's current
};

}  // namespace c10::cuda

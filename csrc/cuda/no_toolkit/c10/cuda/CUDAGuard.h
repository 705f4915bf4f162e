// In the place of torch's header where there is no toolkit.
#pragma once

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "../../by_name.h"

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(c10::Device device) : guard(device) {
    const impl::VirtualGuardImpl torch(DeviceType::CUDA);
    moe_kernels::cuda::use_context_of_torch(torch.getDevice().index());
  }
  // Restored last: `guard` leaves torch's context on the device that was current.
  moe_kernels::cuda::KeptContext context;
  c10::DeviceGuard guard;
};

}  // namespace c10::cuda

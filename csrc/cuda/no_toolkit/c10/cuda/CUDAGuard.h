// In the place of torch's header where there is no toolkit.
#pragma once

#include <c10/core/DeviceGuard.h>

#include "../../by_name.h"

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(c10::Device device) : guard(device) {
    moe_kernels::cuda::bind_context(device.index());
  }
  c10::DeviceGuard guard;
};

}  // namespace c10::cuda

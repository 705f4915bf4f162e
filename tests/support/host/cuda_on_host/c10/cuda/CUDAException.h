// In the place of torch's header, where the device is played on the host.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#define C10_CUDA_CHECK(call)                                                     \
  do {                                                                           \
    const cudaError_t error = (call);                                            \
    TORCH_CHECK(error == cudaSuccess, "cudaError_t ", static_cast<int>(error)); \
  } while (0)

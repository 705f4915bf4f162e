// In the place of torch's header where there is no toolkit. launch() throws what the driver says;
// the launch functions return an error for arguments that they do not take.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#define C10_CUDA_CHECK(call)                                                              \
  do {                                                                                    \
    const cudaError_t error = (call);                                                     \
    TORCH_CHECK(error == cudaSuccess, "CUDA error: invalid argument (",                   \
                "cudaErrorInvalidValue, ", static_cast<int>(error), ") from ", #call);        \
  } while (0)

// The ops of the backend "cuda" for tensors on the CPU: the same launchers and kernels, with the
// device played by cuda_on_host.h.
#include "../../../csrc/cuda/launchers.cpp"

#include <torch/library.h>

#include "cuda_on_host.h"

extern "C" int launches() { return host::launches; }
extern "C" void set_idle(bool idle) { host::idle = idle; }

TORCH_LIBRARY_IMPL(moe_kernels_native, CPU, m) {
  m.impl("dispatch", &moe_kernels::cuda::dispatch);
  m.impl("dispatch_with_maps", &moe_kernels::cuda::dispatch_with_maps);
  m.impl("tile_maps", &moe_kernels::cuda::tile_maps);
  m.impl("combine", &moe_kernels::cuda::combine);
  m.impl("shrink", &moe_kernels::cuda::shrink);
  m.impl("add_low_rank", &moe_kernels::cuda::add_low_rank);
  m.impl("wgrad", &moe_kernels::cuda::wgrad);
  m.impl("gate_up", &moe_kernels::cuda::gate_up);
  m.impl("grouped_gemm", &moe_kernels::cuda::grouped_gemm);
  m.impl("act_backward", &moe_kernels::cuda::act_backward);
  m.impl("moe_mlp_inference", &moe_kernels::cuda::moe_mlp_inference);
  m.impl("moe_mlp_forward", &moe_kernels::course::moe_mlp_forward);
  m.impl("moe_mlp_backward", &moe_kernels::course::moe_mlp_backward);
}

// The only definition of the op schemas, and the Python module moe_kernels._C: facts about this
// build and this CPU, and the switch that fills new memory with NaN, with a function to test it.
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu/alloc.h"
#include "cpu/gemm.h"
#include "cuda/decode_shapes.h"
#include "cuda/grouped_gemm_shapes.h"
#include "cuda/host_device.h"
#include "cuda/plan.h"
#include "cuda/tiles.h"
#include "ops.h"
#ifdef MOE_KERNELS_BY_NAME
#include "cuda/no_toolkit/by_name.h"
#endif

#ifndef MOE_KERNELS_CUDA_ARCH_LIST
#define MOE_KERNELS_CUDA_ARCH_LIST ""
#endif
#ifndef MOE_KERNELS_CXX_FLAGS
#define MOE_KERNELS_CXX_FLAGS ""
#endif

namespace py = pybind11;

TORCH_LIBRARY(moe_kernels_native, m) {
  m.def(
      "dispatch(Tensor topk_ids, int num_experts, Tensor? modality_ids, int num_modalities)"
      " -> (Tensor perm, Tensor inv_perm, Tensor tokens_per_expert, Tensor expert_offsets,"
      " Tensor segment_offsets)");
  m.def(
      "moe_mlp_forward(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights,"
      " Tensor gate_up_proj, Tensor down_proj, Tensor? modality_ids, Tensor? extra_gate_up_proj,"
      " Tensor? extra_down_proj, Tensor? gate_up_lora_A, Tensor? gate_up_lora_B,"
      " Tensor? gate_up_scaling, Tensor? down_lora_A, Tensor? down_lora_B, Tensor? down_scaling,"
      " Tensor? gate_up_bias, Tensor? gate_up_scales, Tensor? down_scales, str act, bool gated,"
      " float alpha, float limit, float shift, bool interleaved, bool save_for_backward)"
      " -> (Tensor out, Tensor pre_act, Tensor u1, Tensor u2, Tensor perm, Tensor inv_perm,"
      " Tensor segment_offsets)");
  m.def(
      "moe_mlp_inference(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights,"
      " Tensor gate_up_proj, Tensor down_proj, Tensor? modality_ids, Tensor? extra_gate_up_proj,"
      " Tensor? extra_down_proj, Tensor? gate_up_lora_A, Tensor? gate_up_lora_B,"
      " Tensor? gate_up_scaling, Tensor? down_lora_A, Tensor? down_lora_B, Tensor? down_scaling,"
      " Tensor? gate_up_bias, Tensor? gate_up_scales, Tensor? down_scales, str act, bool gated,"
      " float alpha, float limit, float shift, bool interleaved) -> Tensor out");
  m.def(
      "moe_mlp_backward(Tensor grad_out, Tensor hidden_states, Tensor topk_weights, Tensor perm,"
      " Tensor inv_perm, Tensor segment_offsets, Tensor gate_up_proj, Tensor down_proj,"
      " Tensor? extra_gate_up_proj, Tensor? extra_down_proj, Tensor? gate_up_lora_A,"
      " Tensor? gate_up_lora_B, Tensor? gate_up_scaling, Tensor? down_lora_A, Tensor? down_lora_B,"
      " Tensor? down_scaling, Tensor? gate_up_bias, Tensor? gate_up_scales, Tensor? down_scales,"
      " str act, bool gated, float alpha, float limit, float shift, bool interleaved,"
      " Tensor pre_act, Tensor u1, Tensor u2, int num_modalities, bool[] needs,"
      " int frozen_extra=0) -> Tensor[]");
  m.def(
      "dispatch_with_maps(Tensor topk_ids, int num_experts, Tensor? modality_ids,"
      " int num_modalities, int[] blocks, int[] groups)"
      " -> (Tensor perm, Tensor inv_perm, Tensor tokens_per_expert, Tensor expert_offsets,"
      " Tensor segment_offsets, Tensor[] maps)");
  m.def(
      "tile_maps(Tensor segment_offsets, int num_rows, int[] blocks, int[] groups) -> Tensor[]");
  m.def(
      "combine(Tensor rows, Tensor inv_perm, Tensor num_rows, Tensor? weights, int num_tokens)"
      " -> Tensor out");
  m.def(
      "shrink(Tensor(a!) out, Tensor left, Tensor matrix, Tensor perm, Tensor tiles,"
      " Tensor? segment_offsets, int num_pairs, int num_base, int experts, int top_k,"
      " bool by_token, bool rank_first) -> ()");
  m.def(
      "wgrad(Tensor[] left, Tensor[] right, Tensor[] tiles, Tensor[] groups, Tensor[] factors,"
      " Tensor?[] weights, Tensor? matrix, int[] chunks, bool[] transposed, bool[] left_by_token,"
      " bool[] right_by_token, Tensor? perm, Tensor? dots, ScalarType dots_dtype,"
      " int top_k, Tensor[] folded, Tensor? segment_offsets, int num_base, int num_modalities)"
      " -> (Tensor[] sums, Tensor du, Tensor sum_of_dots)");
  m.def(
      "add_low_rank(Tensor(a!) out, Tensor u, Tensor v, Tensor scaling, Tensor perm, Tensor tiles,"
      " bool rank_last) -> ()");
  m.def(
      "gate_up(Tensor left, Tensor stack, Tensor? extra, Tensor perm, Tensor tiles,"
      " Tensor segment_offsets, Tensor? u, Tensor? v, Tensor? scaling, int block_m, bool save,"
      " Tensor? down_lora_A) -> (Tensor pre_act, Tensor act, Tensor parts)");
  m.def(
      "grouped_gemm(Tensor left, Tensor stack, Tensor? extra, Tensor perm, Tensor tiles,"
      " Tensor segment_offsets, Tensor? u, Tensor? v, Tensor? scaling, int block_m,"
      " bool transposed, bool save) -> (Tensor out, Tensor sum)");
  m.def(
      "act_backward(Tensor left, Tensor stack, Tensor? extra, Tensor perm, Tensor tiles,"
      " Tensor segment_offsets, Tensor? u, Tensor? v, Tensor? scaling, int block_m, Tensor weights,"
      " Tensor pre_act, bool act_of_adapted, bool act_of_added, Tensor? u1,"
      " Tensor? gate_up_lora_B, Tensor? gate_up_scaling, bool[] wanted)"
      " -> (Tensor d_pre, Tensor act, Tensor dots, Tensor[] folded)");
  m.def(
      "lora_linear_forward(Tensor(a!) out, Tensor hidden_states, Tensor perm,"
      " Tensor segment_offsets, Tensor lora_A, Tensor lora_B, Tensor scaling,"
      " bool save_for_backward) -> Tensor u");
  m.def(
      "lora_linear_backward(Tensor grad_out, Tensor hidden_states, Tensor u, Tensor perm,"
      " Tensor segment_offsets, Tensor lora_A, Tensor lora_B, Tensor scaling,"
      " Tensor(a!)? grad_hidden, bool[] needs) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(moe_kernels_native, CPU, m) {
  m.impl("dispatch", &moe_kernels::cpu::dispatch);
  m.impl("moe_mlp_forward", &moe_kernels::cpu::moe_mlp_forward);
  m.impl("moe_mlp_inference", &moe_kernels::cpu::moe_mlp_inference);
  m.impl("moe_mlp_backward", &moe_kernels::cpu::moe_mlp_backward);
  m.impl("lora_linear_forward", &moe_kernels::cpu::lora_linear_forward);
  m.impl("lora_linear_backward", &moe_kernels::cpu::lora_linear_backward);
}

TORCH_LIBRARY_IMPL(moe_kernels_native, Meta, m) {
  m.impl("dispatch", &moe_kernels::outputs::dispatch);
  m.impl("dispatch_with_maps", &moe_kernels::outputs::dispatch_with_maps);
  m.impl("tile_maps", &moe_kernels::outputs::tile_maps);
  m.impl("combine", &moe_kernels::outputs::combine);
  m.impl("shrink", &moe_kernels::outputs::shrink);
  m.impl("wgrad", &moe_kernels::outputs::wgrad);
  m.impl("add_low_rank", &moe_kernels::outputs::add_low_rank);
  m.impl("gate_up", &moe_kernels::outputs::gate_up);
  m.impl("grouped_gemm", &moe_kernels::outputs::grouped_gemm);
  m.impl("act_backward", &moe_kernels::outputs::act_backward);
  m.impl("moe_mlp_inference", &moe_kernels::outputs::moe_mlp_inference);
  m.impl("moe_mlp_forward", &moe_kernels::course::moe_mlp_forward);
  m.impl("moe_mlp_backward", &moe_kernels::course::moe_mlp_backward);
}

#ifdef MOE_KERNELS_WITH_CUDA
TORCH_LIBRARY_IMPL(moe_kernels_native, CUDA, m) {
  m.impl("dispatch", &moe_kernels::cuda::dispatch);
  m.impl("dispatch_with_maps", &moe_kernels::cuda::dispatch_with_maps);
  m.impl("tile_maps", &moe_kernels::cuda::tile_maps);
  m.impl("combine", &moe_kernels::cuda::combine);
  m.impl("shrink", &moe_kernels::cuda::shrink);
  m.impl("wgrad", &moe_kernels::cuda::wgrad);
  m.impl("add_low_rank", &moe_kernels::cuda::add_low_rank);
  m.impl("gate_up", &moe_kernels::cuda::gate_up);
  m.impl("grouped_gemm", &moe_kernels::cuda::grouped_gemm);
  m.impl("act_backward", &moe_kernels::cuda::act_backward);
  m.impl("moe_mlp_inference", &moe_kernels::cuda::moe_mlp_inference);
  m.impl("moe_mlp_forward", &moe_kernels::course::moe_mlp_forward);
  m.impl("moe_mlp_backward", &moe_kernels::course::moe_mlp_backward);
}
#endif

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["torch_version"] = TORCH_VERSION;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda_arch_list"] = MOE_KERNELS_CUDA_ARCH_LIST;
  info["cxx_flags"] = MOE_KERNELS_CXX_FLAGS;
  info["gemm_level"] = moe_kernels::cpu::gemm_level();
  return info;
}

#ifdef MOE_KERNELS_BY_NAME

// Gives the function (file, name, major, minor) -> (image, symbol, error) that compiles a kernel.
void set_cuda_compiler(py::function function) {
  // Never destroyed: a launch may come as late as the end of Python.
  const auto* compile = new py::function(std::move(function));
  moe_kernels::cuda::set_compiler([compile](const auto& kernel, int major, int minor) {
    const py::gil_scoped_acquire gil;
    try {
      const py::tuple made = (*compile)(kernel.file, kernel.name, major, minor);
      return moe_kernels::cuda::Compiled{made[0].cast<std::string>(), made[1].cast<std::string>(),
                                         made[2].cast<std::string>()};
    } catch (const py::error_already_set& error) {
      return moe_kernels::cuda::Compiled{{}, {}, error.what()};
    }
  });
}

// Returns (file, name) of every kernel that may be compiled.
std::vector<std::pair<std::string, std::string>> cuda_kernels() {
  std::vector<std::pair<std::string, std::string>> kernels;
  for (const auto* kernel : moe_kernels::cuda::named_kernels()) {
    kernels.emplace_back(kernel->file, kernel->name);
  }
  return kernels;
}

#endif

// Returns an element of newly allocated memory: NaN where poison is on.
double fresh_value() { return moe_kernels::cpu::empty({1}, at::kFloat).item<double>(); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("MAX_DISPATCH_KEYS") = moe_kernels::cuda::kMaxKeys;
  m.attr("MAX_MAPS") = moe_kernels::cuda::kMaxMaps;
  m.attr("MAX_RANK_WITH_DU") = moe_kernels::cuda::kMaxRankWithDu;
  m.attr("COLUMNS_OF_PART") = moe_kernels::cuda::kColumnsOfPart;
  m.attr("ADAPTER_BLOCK") = moe_kernels::cuda::kAdapterBlock;
  m.doc() = "Native ops of moe_kernels; loading it registers torch.ops.moe_kernels_native.";
  m.def("grouped_gemm_block_m", &moe_kernels::cuda::grouped_gemm_block_m, py::arg("num_rows"),
        py::arg("num_experts"));
  m.def("chunk_rows", &moe_kernels::cuda::chunk_rows, py::arg("num_rows"), py::arg("size"));
  m.def("gives_du", &moe_kernels::cuda::gives_du, py::arg("rank"), py::arg("width"),
        py::arg("num_rows"));
  m.def("folds_gradients", &moe_kernels::cuda::folds_gradients, py::arg("num_rows"),
        py::arg("num_base"), py::arg("modalities"), py::arg("inter"), py::arg("rank1"),
        py::arg("rank2"));
  m.def("gives_u2", &moe_kernels::cuda::gives_u2, py::arg("num_rows"), py::arg("num_base"),
        py::arg("inter"), py::arg("rank1"), py::arg("rank2"));
  m.def("decode_takes", &moe_kernels::cuda::decode_takes, py::arg("tokens"), py::arg("top_k"),
        py::arg("hidden"), py::arg("inter"), py::arg("rank"));
  m.def("build_info", &build_info);
  m.def("cpu_features", &moe_kernels::cpu::cpu_features);
  m.def("prefer_brgemm", &moe_kernels::cpu::prefer_brgemm, py::arg("on"));
#ifdef MOE_KERNELS_BY_NAME
  m.def("set_cuda_compiler", &set_cuda_compiler, py::arg("function"));
  m.def("cuda_kernels", &cuda_kernels);
  m.attr("CUDA_SOURCES") = moe_kernels::cuda::sources();
#endif
  m.def("set_poison", &moe_kernels::cpu::set_poison, py::arg("on"));
  m.def("fresh_value", &fresh_value);
}

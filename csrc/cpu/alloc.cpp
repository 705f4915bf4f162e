#include "alloc.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/narrow.h>
#include <ATen/ops/zero.h>

#include <atomic>
#include <limits>

namespace moe_kernels::cpu {
namespace {

std::atomic<bool> poison_on{false};

}  // namespace

void set_poison(bool on) { poison_on = on; }

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  at::Tensor out = at::empty(sizes, at::TensorOptions().dtype(dtype).device(at::kCPU));
  if (!poison_on) return out;
  if (dtype == at::kByte) {
    out.fill_(0xFF);  // scratch read as floats: all ones is a NaN in every format
  } else if (at::isFloatingType(dtype)) {
    out.fill_(std::numeric_limits<double>::quiet_NaN());
  } else {
    out.fill_(-(int64_t(1) << 62));
  }
  return out;
}

void zero_rows(const at::Tensor& tensor, int64_t begin, int64_t end) {
  if (begin < end && end <= tensor.size(0)) tensor.narrow(0, begin, end - begin).zero_();
}

}  // namespace moe_kernels::cpu

// peak, op layer: dlkern::peak_fma_cpu(like, rounds) -> (flops, sums), timed by bench/machine.py.
#include "../cpu/peak.h"

#include "common.h"

namespace dlkern::ops {
namespace {

// Returns how many floating-point operations ran (int64), and a value of each thread (float64).
std::tuple<Tensor, Tensor> peak_fma_cpu(const Tensor& like, int64_t rounds) {
  check<std::invalid_argument>(rounds > 0 && rounds <= (int64_t{1} << 40), "peak_fma: rounds must be in [1, 2^40]");
  const bool wide = like.scalar_type() == ScalarType::Double;
  check(wide || like.scalar_type() == ScalarType::Float, "peak_fma: expected float32 or float64");
  Tensor flops = allocate({1}, ScalarType::Long, like);
  Tensor sums = allocate({cpu::kPeakThreads}, ScalarType::Double, like);
  torch::stable::zero_(sums);
  *mutable_data<int64_t>(flops) = DLKERN_CALL(peak_fma, rounds, wide, mutable_data<double>(sums));
  return {flops, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dlkern, m) { m.def("peak_fma_cpu(Tensor like, int rounds) -> (Tensor, Tensor)"); }
STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) { m.impl("peak_fma_cpu", TORCH_BOX(&peak_fma_cpu)); }

}  // namespace dlkern::ops

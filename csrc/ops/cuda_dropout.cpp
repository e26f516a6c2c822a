// Dropout, op layer of the CUDA column: dropout_cuda(input, p, seed), and feature_dropout_cuda, which drops whole
// channels. float32, bfloat16 and float16.
#include "../cuda/dropout.h"

#include "cuda_common.h"

namespace dlkern::ops {
namespace {

void check_arguments(const Tensor& input, double p, const Tensor& seed) {
  element_of("dropout", input);
  check<std::invalid_argument>(p >= 0.0 && p <= 1.0, "dropout probability has to be between 0 and 1, but got ", p);
  check(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "dropout: seed must be one int64");
  check_device("dropout", "seed", seed, input);
  check(input.numel() < int64_t{1} << 39, "dropout: more than 2^39 - 1 elements (cuda column)");
}

// Elements are counted in memory order; anything not dense is copied first.
Tensor dense(const Tensor& x) { return aligned(layout_of(x) == Layout::other ? torch::stable::contiguous(x) : x); }

Tensor dropout_cuda(const Tensor& input, double p, const Tensor& seed) {
  check_arguments(input, p, seed);
  const Tensor x = dense(input);
  Tensor output = allocate(x.sizes(), x.scalar_type(), x, layout_of(x) == Layout::channels_last);
  if (x.numel() == 0) return output;
  if (p == 1.0) return torch::stable::zero_(output);
  Call call(x);
  cuda::dropout(element_of("dropout", x), call.reads(x), call.writes(output), x.numel(), p,
                static_cast<const int64_t*>(call.reads(seed)), call.stream());
  return output;
}

Tensor feature_dropout_cuda(const Tensor& input, double p, const Tensor& seed) {
  check_arguments(input, p, seed);
  check(input.dim() >= 2, "Feature dropout requires at least 2 dimensions in the input");
  const Tensor x = dense(input);
  const bool channels_last = layout_of(x) == Layout::channels_last;
  Tensor output = allocate(x.sizes(), x.scalar_type(), x, channels_last);
  if (x.numel() == 0) return output;
  if (p == 1.0) return torch::stable::zero_(output);
  const int64_t n = x.size(0), c = x.size(1);
  Call call(x);
  cuda::feature_dropout(element_of("dropout", x), call.reads(x), call.writes(output), n, c, x.numel() / (n * c),
                        channels_last, p, static_cast<const int64_t*>(call.reads(seed)), call.stream());
  return output;
}

}  // namespace

DLKERN_REGISTER(DLKERN_CUDA_KEY, m) {
  m.impl("dropout_cuda", TORCH_BOX(&dropout_cuda));
  m.impl("feature_dropout_cuda", TORCH_BOX(&feature_dropout_cuda));
}

}  // namespace dlkern::ops

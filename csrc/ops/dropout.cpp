// Dropout, op layer: dlkern::dropout_cpu(input, p, seed), and feature_dropout_cpu, which drops whole channels.
#include "../cpu/dropout.h"

#include "common.h"

namespace dlkern::ops {
namespace {

void check_arguments(double p, const Tensor& seed) {
  check<std::invalid_argument>(p >= 0.0 && p <= 1.0, "dropout probability has to be between 0 and 1, but got ", p);
  check(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "dropout: seed must be one int64");
}

Tensor dropout_cpu(const Tensor& input, double p, const Tensor& seed) {
  check_arguments(p, seed);
  const bool channels_last = layout_of(input) == Layout::channels_last;
  // Elements are counted in memory order; anything not dense is copied first.
  const Tensor x = channels_last || input.is_contiguous() ? input : torch::stable::contiguous(input);
  Tensor output = allocate(x.sizes(), x.scalar_type(), x, channels_last);
  if (x.numel() == 0) return output;
  if (p == 1.0) return torch::stable::zero_(output);
  dispatch_floating(x.scalar_type(), "dropout", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::DropoutArgs<T> args{data<T>(x), mutable_data<T>(output), x.numel(), p,
                             static_cast<uint64_t>(*data<int64_t>(seed))};
    DLKERN_CALL(dropout, args);
  });
  return output;
}

// Features [n, c] are dropped as a tensor of them would be.
Tensor feature_dropout_cpu(const Tensor& input, double p, const Tensor& seed) {
  check_arguments(p, seed);
  check(input.dim() >= 2, "Feature dropout requires at least 2 dimensions in the input");
  const bool channels_last = layout_of(input) == Layout::channels_last;
  const Tensor x = channels_last || input.is_contiguous() ? input : torch::stable::contiguous(input);
  Tensor output = allocate(x.sizes(), x.scalar_type(), x, channels_last);
  if (x.numel() == 0) return output;
  if (p == 1.0) return torch::stable::zero_(output);
  const int64_t n = x.size(0), c = x.size(1), features = n * c;
  dispatch_floating(x.scalar_type(), "dropout", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    Tensor factors = allocate({features}, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float, x);
    A* factor = mutable_data<A>(factors);
    for (int64_t i = 0; i < features; ++i) factor[i] = 1;
    cpu::DropoutArgs<A> choice{factor, factor, features, p, static_cast<uint64_t>(*data<int64_t>(seed))};
    DLKERN_CALL(dropout, choice);
    cpu::FeatureDropoutArgs<T> args{data<T>(x), mutable_data<T>(output), factor,       n,
                                    c,          x.numel() / features,    channels_last};
    DLKERN_CALL(feature_dropout, args);
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) {
  m.impl("dropout_cpu", TORCH_BOX(&dropout_cpu));
  m.impl("feature_dropout_cpu", TORCH_BOX(&feature_dropout_cpu));
}

}  // namespace dlkern::ops

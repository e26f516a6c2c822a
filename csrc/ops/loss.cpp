// Softmax cross-entropy, op layer: cross_entropy_forward, cross_entropy_backward, and with a probability for each class as
// target cross_entropy_probabilities_forward, cross_entropy_probabilities_backward.
#include "../cpu/loss.h"

#include "loss_checks.h"

namespace dlkern::ops {
namespace {

void check_cpu(const char* op, const char*, const Tensor& x, const Tensor&) {
  check(x.is_cpu(), op, ": expected CPU tensors");
}

ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_cpu(const Tensor& input, const Tensor& target,
                                                             const std::optional<Tensor>& weight,
                                                             const std::optional<Tensor>& sample_weight,
                                                             int64_t reduction, int64_t ignore_index,
                                                             double label_smoothing) {
  const CheckedIndices c = checked_indices<check_cpu>("cross_entropy", input, target, weight, sample_weight, reduction,
                                                      ignore_index, label_smoothing);
  const Ints places = target.sizes();
  check(places.size() < kMostDims, "cross_entropy: more than ", kMostDims, " dimensions");
  Tensor loss = allocate(reduction == 0 ? places : Ints(), input.scalar_type(), input);
  int64_t halves_size[kMostDims] = {2};
  for (size_t d = 0; d < places.size(); ++d) halves_size[d + 1] = places[d];
  Tensor lse = allocate(Ints(halves_size, places.size() + 1), accumulate_type(input), input);
  Tensor total_weight = allocate({}, accumulate_type(input), input);
  dispatch_floating(input.scalar_type(), "cross_entropy", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto* halves = mutable_data<acc_t<T>>(lse);
    cpu::CrossEntropyArgs<T> args{c.shape,
                                  data<T>(c.input),
                                  data<int64_t>(c.target),
                                  data<T>(c.weight),
                                  data<T>(c.sample_weight),
                                  static_cast<int>(reduction),
                                  ignore_index,
                                  label_smoothing,
                                  mutable_data<T>(loss),
                                  halves,
                                  halves + target.numel(),
                                  mutable_data<acc_t<T>>(total_weight)};
    DLKERN_CALL(cross_entropy_forward, args);
  });
  return {loss, lse, total_weight};
}

Tensor cross_entropy_backward_cpu(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                                  const std::optional<Tensor>& weight, const std::optional<Tensor>& sample_weight,
                                  const Tensor& lse, const Tensor& total_weight, int64_t reduction,
                                  int64_t ignore_index, double label_smoothing) {
  const char* op = "cross_entropy_backward";
  const CheckedIndices c =
      checked_indices<check_cpu>(op, input, target, weight, sample_weight, reduction, ignore_index, label_smoothing);
  const ScalarType accumulate = accumulate_type(input);
  check_indices_backward<check_cpu>(op, grad_loss, c, lse, total_weight, accumulate, reduction);
  const Tensor grad = as_contiguous(grad_loss), halves_tensor = as_contiguous(lse);
  Tensor grad_input = allocate(input.sizes(), input.scalar_type(), input, c.channels_last);
  dispatch_floating(input.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* halves = data<acc_t<T>>(halves_tensor);
    cpu::CrossEntropyBackwardArgs<T> args{c.shape,
                                          data<T>(grad),
                                          data<T>(c.input),
                                          data<int64_t>(c.target),
                                          data<T>(c.weight),
                                          data<T>(c.sample_weight),
                                          halves,
                                          halves + target.numel(),
                                          data<acc_t<T>>(total_weight),
                                          static_cast<int>(reduction),
                                          ignore_index,
                                          label_smoothing,
                                          mutable_data<T>(grad_input)};
    DLKERN_CALL(cross_entropy_backward, args);
  });
  return grad_input;
}

std::tuple<Tensor, Tensor> cross_entropy_probabilities_forward_cpu(const Tensor& input, const Tensor& target,
                                                                   const std::optional<Tensor>& weight,
                                                                   int64_t reduction, double label_smoothing) {
  const char* op = "cross_entropy";
  const CheckedProbabilities c =
      checked_probabilities<check_cpu>(op, input, target, weight, reduction, label_smoothing);
  const Ints kept_size(c.kept.data(), c.kept.size());
  Tensor loss =
      allocate(reduction == 0 ? Ints(c.kept.data() + 1, c.kept.size() - 1) : Ints(), input.scalar_type(), input);
  Tensor kept = allocate(kept_size, ScalarType::Double, input);
  dispatch_floating(input.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t places = c.shape.outer * c.shape.inner;
    double* numbers = mutable_data<double>(kept);
    cpu::ProbabilitiesArgs<T> args{
        c.shape,         data<T>(c.input),      data<T>(c.target), data<T>(c.weight), static_cast<int>(reduction),
        label_smoothing, mutable_data<T>(loss), numbers,           numbers + places,  numbers + 2 * places};
    DLKERN_CALL(probabilities_forward, args);
  });
  return {loss, kept};
}

// Gradients that are not wanted are of size [0].
std::tuple<Tensor, Tensor> cross_entropy_probabilities_backward_cpu(
    const Tensor& grad_loss, const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
    const Tensor& kept, int64_t reduction, double label_smoothing, bool of_input, bool of_target) {
  const char* op = "cross_entropy_probabilities_backward";
  const CheckedProbabilities c =
      checked_probabilities<check_cpu>(op, input, target, weight, reduction, label_smoothing);
  const int64_t places = c.shape.outer * c.shape.inner;
  check_probabilities_backward<check_cpu>(op, grad_loss, c, kept, reduction);
  const Tensor grad = as_contiguous(grad_loss), numbers_tensor = as_contiguous(kept);
  const auto gradient = [&](bool wanted) {
    return allocate(wanted ? input.sizes() : Ints({0}), input.scalar_type(), input, wanted && c.channels_last);
  };
  Tensor grad_input = gradient(of_input), grad_target = gradient(of_target);
  dispatch_floating(input.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const double* numbers = data<double>(numbers_tensor);
    cpu::ProbabilitiesBackwardArgs<T> args{c.shape,
                                           data<T>(grad),
                                           data<T>(c.input),
                                           data<T>(c.target),
                                           data<T>(c.weight),
                                           numbers,
                                           numbers + places,
                                           numbers + 2 * places,
                                           static_cast<int>(reduction),
                                           label_smoothing,
                                           of_input ? mutable_data<T>(grad_input) : nullptr,
                                           of_target ? mutable_data<T>(grad_target) : nullptr};
    DLKERN_CALL(probabilities_backward, args);
  });
  return {grad_input, grad_target};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) {
  m.impl("cross_entropy_forward_cpu", TORCH_BOX(&cross_entropy_forward_cpu));
  m.impl("cross_entropy_backward_cpu", TORCH_BOX(&cross_entropy_backward_cpu));
  m.impl("cross_entropy_probabilities_forward_cpu", TORCH_BOX(&cross_entropy_probabilities_forward_cpu));
  m.impl("cross_entropy_probabilities_backward_cpu", TORCH_BOX(&cross_entropy_probabilities_backward_cpu));
}

}  // namespace dlkern::ops

// Softmax cross-entropy, op layer of the CUDA column: cross_entropy_forward, cross_entropy_backward, and of
// probabilities. float32, bfloat16 and float16. A target on the GPU that is no class gives NaN.
#include "../cuda/loss.h"

#include "cuda_common.h"
#include "loss_checks.h"

namespace dlkern::ops {
namespace {

void check_here(const char* op, const char* name, const Tensor& x, const Tensor& input) {
  if (&x == &input) check_element(op, x);
  check_device(op, name, x, input);
}

cuda::Logits logits_of(const CheckedLogits& c) {
  const cpu::CrossEntropyShape& s = c.shape;
  return {element_of(c.input), s.outer, s.inner, s.classes, s.class_stride, s.place_stride};
}

Tensor scratch_of(const cuda::Logits& shape, const Tensor& input) {
  return allocate({cuda::cross_entropy_scratch(shape)}, ScalarType::Double, input);
}

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Two = std::tuple<Tensor, Tensor>;

Three cross_entropy_forward_cuda(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                                 const std::optional<Tensor>& sample_weight, int64_t reduction, int64_t ignore_index,
                                 double label_smoothing) {
  const char* op = "cross_entropy";
  const CheckedIndices c =
      checked_indices<check_here>(op, input, target, weight, sample_weight, reduction, ignore_index, label_smoothing);
  const cuda::Logits shape = logits_of(c);
  std::vector<int64_t> halves = to_vector(target.sizes());
  halves.insert(halves.begin(), 2);
  Tensor loss = allocate(reduction == 0 ? target.sizes() : Ints(), input.scalar_type(), input);
  Tensor lse = allocate(Ints(halves.data(), halves.size()), ScalarType::Float, input);
  Tensor total_weight = allocate({}, ScalarType::Float, input);
  const Tensor scratch = scratch_of(shape, input);
  Call call(c.input);
  const cuda::LossArgs args{
      call.reads(c.input),         call.reads(c.target), call.reads(c.weight), call.reads(c.sample_weight),
      static_cast<int>(reduction), ignore_index,         label_smoothing};
  cuda::cross_entropy_forward(shape, args, static_cast<double*>(call.writes(scratch)), call.writes(loss),
                              static_cast<float*>(call.writes(lse)), static_cast<float*>(call.writes(total_weight)),
                              call.stream());
  return {loss, lse, total_weight};
}

Tensor cross_entropy_backward_cuda(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                                   const std::optional<Tensor>& weight, const std::optional<Tensor>& sample_weight,
                                   const Tensor& lse, const Tensor& total_weight, int64_t reduction,
                                   int64_t ignore_index, double label_smoothing) {
  const char* op = "cross_entropy_backward";
  const CheckedIndices c =
      checked_indices<check_here>(op, input, target, weight, sample_weight, reduction, ignore_index, label_smoothing);
  check_indices_backward<check_here>(op, grad_loss, c, lse, total_weight, ScalarType::Float, reduction);
  const cuda::Logits shape = logits_of(c);
  Tensor grad_input = allocate(input.sizes(), input.scalar_type(), input, c.channels_last);
  if (grad_input.numel() == 0) return grad_input;
  const Tensor grad = as_contiguous(grad_loss), halves = as_contiguous(lse), scratch = scratch_of(shape, input);
  Call call(c.input);
  const cuda::LossArgs args{
      call.reads(c.input),         call.reads(c.target), call.reads(c.weight), call.reads(c.sample_weight),
      static_cast<int>(reduction), ignore_index,         label_smoothing};
  cuda::cross_entropy_backward(shape, args, static_cast<double*>(call.writes(scratch)), call.reads(grad),
                               static_cast<const float*>(call.reads(halves)),
                               static_cast<const float*>(call.reads(total_weight)), call.writes(grad_input),
                               call.stream());
  return grad_input;
}

Two cross_entropy_probabilities_forward_cuda(const Tensor& input, const Tensor& target,
                                             const std::optional<Tensor>& weight, int64_t reduction,
                                             double label_smoothing) {
  const char* op = "cross_entropy";
  const CheckedProbabilities c =
      checked_probabilities<check_here>(op, input, target, weight, reduction, label_smoothing);
  const cuda::Logits shape = logits_of(c);
  const Ints kept_size(c.kept.data(), c.kept.size()), places(c.kept.data() + 1, c.kept.size() - 1);
  Tensor loss = allocate(reduction == 0 ? places : Ints(), input.scalar_type(), input);
  Tensor kept = allocate(kept_size, ScalarType::Double, input);
  const Tensor scratch = scratch_of(shape, input);
  Call call(c.input);
  const cuda::LossArgs args{
      call.reads(c.input), call.reads(c.target), call.reads(c.weight), nullptr, static_cast<int>(reduction), 0,
      label_smoothing};
  cuda::probabilities_forward(shape, args, static_cast<double*>(call.writes(scratch)), call.writes(loss),
                              static_cast<double*>(call.writes(kept)), call.stream());
  return {loss, kept};
}

// Gradients that are not wanted are of size [0].
Two cross_entropy_probabilities_backward_cuda(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                                              const std::optional<Tensor>& weight, const Tensor& kept,
                                              int64_t reduction, double label_smoothing, bool of_input,
                                              bool of_target) {
  const char* op = "cross_entropy_probabilities_backward";
  const CheckedProbabilities c =
      checked_probabilities<check_here>(op, input, target, weight, reduction, label_smoothing);
  check_probabilities_backward<check_here>(op, grad_loss, c, kept, reduction);
  const cuda::Logits shape = logits_of(c);
  const Tensor grad = as_contiguous(grad_loss), numbers = as_contiguous(kept);
  const auto gradient = [&](bool wanted) {
    return allocate(wanted ? input.sizes() : Ints({0}), input.scalar_type(), input, wanted && c.channels_last);
  };
  Tensor grad_input = gradient(of_input), grad_target = gradient(of_target);
  if (!of_input && !of_target) return {grad_input, grad_target};
  Call call(c.input);
  const cuda::LossArgs args{
      call.reads(c.input), call.reads(c.target), call.reads(c.weight), nullptr, static_cast<int>(reduction), 0,
      label_smoothing};
  cuda::probabilities_backward(shape, args, call.reads(grad), static_cast<const double*>(call.reads(numbers)),
                               of_input ? call.writes(grad_input) : nullptr,
                               of_target ? call.writes(grad_target) : nullptr, call.stream());
  return {grad_input, grad_target};
}

}  // namespace

DLKERN_REGISTER(DLKERN_CUDA_KEY, m) {
  m.impl("cross_entropy_forward_cuda", TORCH_BOX(&cross_entropy_forward_cuda));
  m.impl("cross_entropy_backward_cuda", TORCH_BOX(&cross_entropy_backward_cuda));
  m.impl("cross_entropy_probabilities_forward_cuda", TORCH_BOX(&cross_entropy_probabilities_forward_cuda));
  m.impl("cross_entropy_probabilities_backward_cuda", TORCH_BOX(&cross_entropy_probabilities_backward_cuda));
}

}  // namespace dlkern::ops

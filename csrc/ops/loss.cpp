// Softmax cross-entropy, op layer: cross_entropy_forward, cross_entropy_backward, and with a probability for each class as
// target cross_entropy_probabilities_forward, cross_entropy_probabilities_backward.
#include "../cpu/loss.h"

#include "common.h"

namespace dlkern::ops {
namespace {

// The layout logits are read in, and so are probabilities: contiguous or channels_last.
Tensor in_layout(const Tensor& x, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  if (layout_of(x) == (channels_last ? Layout::channels_last : Layout::contiguous)) return x;
  if (!channels_last) return torch::stable::contiguous(x);
  return torch::stable::contiguous(x, x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d);
}

struct Checked {
  cpu::CrossEntropyShape shape;
  Tensor input;
  std::optional<Tensor> weight;
  bool channels_last;
};

// What is the same for both kinds of targets; input comes back contiguous or channels_last.
Checked checked(const char* op, const Tensor& input, const std::optional<Tensor>& weight, int64_t reduction,
                double label_smoothing) {
  check(input.is_cpu(), op, ": expected CPU tensors");
  check(input.dim() >= 2, op, ": input has ", input.dim(), " dimensions, expected [N, C, ...]");
  check<std::invalid_argument>(reduction >= 0 && reduction <= 2, op, ": no reduction ", reduction);
  check(label_smoothing >= 0.0 && label_smoothing <= 1.0,
        "label_smoothing must be between 0.0 and 1.0. Got: ", label_smoothing);
  const int64_t classes = input.size(1);
  const bool channels_last = suggests_channels_last(input);
  Checked result{{}, in_layout(input, channels_last), std::nullopt, channels_last};
  if (weight) {
    check(weight->is_cpu() && weight->scalar_type() == input.scalar_type(), op, ": weight differs in dtype or device");
    check(weight->dim() == 1 && weight->size(0) == classes, "weight tensor should be defined either for all ", classes,
          " classes or no classes");
    result.weight = as_contiguous(*weight);
  }
  const int64_t outer = input.size(0);
  int64_t inner = 1;
  for (int64_t d = 2; d < input.dim(); ++d) inner *= input.size(d);
  if (channels_last || inner == 1)
    result.shape = {outer, inner, classes, inner * classes, 1, classes};
  else
    result.shape = {outer, inner, classes, inner * classes, inner, 1};
  return result;
}

struct CheckedIndices : Checked {
  Tensor target;
  std::optional<Tensor> sample_weight;
};

// All that both directions check of class indices.
CheckedIndices checked(const char* op, const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& sample_weight, int64_t reduction, int64_t ignore_index,
                       double label_smoothing) {
  check(target.is_cpu(), op, ": expected CPU tensors");
  check(target.scalar_type() == ScalarType::Long, op, ": target is not int64");
  check(target.dim() == input.dim() - 1, op, ": target has ", target.dim(), " dimensions, expected ", input.dim() - 1);
  for (int64_t d = 0; d < target.dim(); ++d)
    check(target.size(d) == input.size(d == 0 ? 0 : d + 1), op, ": size ", d, " of target does not fit input");
  CheckedIndices result{checked(op, input, weight, reduction, label_smoothing), as_contiguous(target), std::nullopt};
  if (sample_weight) {
    check(sample_weight->is_cpu() && sample_weight->scalar_type() == input.scalar_type(), op,
          ": sample_weight differs in dtype or device");
    check(same_sizes(sample_weight->sizes(), target.sizes()), op, ": sample_weight is not of target's sizes");
    result.sample_weight = as_contiguous(*sample_weight);
  }
  const int64_t classes = input.size(1), places = result.target.numel();
  const int64_t* t = data<int64_t>(result.target);
  for (int64_t i = 0; i < places; ++i)
    check<std::out_of_range>((t[i] >= 0 && t[i] < classes) || t[i] == ignore_index, "Target ", t[i],
                             " is out of bounds.");
  return result;
}

struct CheckedProbabilities : Checked {
  Tensor target;
  std::vector<int64_t> kept;  // sizes of what the forward keeps: three numbers a place
};

// All that both directions check of class probabilities, which come back as input is laid out.
CheckedProbabilities checked(const char* op, const Tensor& input, const Tensor& target,
                             const std::optional<Tensor>& weight, int64_t reduction, double label_smoothing) {
  check(target.is_cpu() && target.scalar_type() == input.scalar_type(), op, ": target differs in dtype or device");
  check(same_sizes(target.sizes(), input.sizes()), op, ": target is not of input's sizes");
  Checked both = checked(op, input, weight, reduction, label_smoothing);
  check(input.numel() > 0, op, ": input is empty");
  CheckedProbabilities result{both, in_layout(target, both.channels_last), {3}};
  for (int64_t d = 0; d < input.dim(); ++d)
    if (d != 1) result.kept.push_back(input.size(d));
  return result;
}

ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_cpu(const Tensor& input, const Tensor& target,
                                                             const std::optional<Tensor>& weight,
                                                             const std::optional<Tensor>& sample_weight,
                                                             int64_t reduction, int64_t ignore_index,
                                                             double label_smoothing) {
  const CheckedIndices c =
      checked("cross_entropy", input, target, weight, sample_weight, reduction, ignore_index, label_smoothing);
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
  const CheckedIndices c = checked(op, input, target, weight, sample_weight, reduction, ignore_index, label_smoothing);
  const ScalarType accumulate = accumulate_type(input);
  check(grad_loss.is_cpu() && grad_loss.scalar_type() == input.scalar_type(), op,
        ": grad_loss differs in dtype or device");
  check(grad_loss.numel() == (reduction == 0 ? target.numel() : 1), op, ": grad_loss has ", grad_loss.numel(),
        " elements");
  check(lse.is_cpu() && lse.scalar_type() == accumulate && lse.numel() == 2 * target.numel(), op,
        ": lse does not fit input");
  check(total_weight.is_cpu() && total_weight.scalar_type() == accumulate && total_weight.numel() == 1, op,
        ": total_weight does not fit input");
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
  const CheckedProbabilities c = checked(op, input, target, weight, reduction, label_smoothing);
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
  const CheckedProbabilities c = checked(op, input, target, weight, reduction, label_smoothing);
  const int64_t places = c.shape.outer * c.shape.inner;
  check(grad_loss.is_cpu() && grad_loss.scalar_type() == input.scalar_type(), op,
        ": grad_loss differs in dtype or device");
  check(grad_loss.numel() == (reduction == 0 ? places : 1), op, ": grad_loss has ", grad_loss.numel(), " elements");
  check(kept.is_cpu() && kept.scalar_type() == ScalarType::Double && kept.numel() == 3 * places, op,
        ": kept does not fit input");
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

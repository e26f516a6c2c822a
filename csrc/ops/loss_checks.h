// What the columns' op layers of cross-entropy share: checks of everything a kernel relies on, with torch's exception
// types.
#pragma once
#include "../cpu/loss.h"
#include "common.h"

namespace dlkern::ops {

// What a column checks of where a tensor is, beside input.
using CheckPlace = void(const char* op, const char* name, const Tensor& x, const Tensor& input);

// The layout logits are read in, and so are probabilities: contiguous or channels_last.
inline Tensor in_layout(const Tensor& x, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  if (layout_of(x) == (channels_last ? Layout::channels_last : Layout::contiguous)) return x;
  if (!channels_last) return torch::stable::contiguous(x);
  return torch::stable::contiguous(x, x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d);
}

struct CheckedLogits {
  cpu::CrossEntropyShape shape;
  Tensor input;
  std::optional<Tensor> weight;
  bool channels_last;
};

// What is the same for both kinds of targets; input comes back contiguous or channels_last.
template <CheckPlace check_place>
CheckedLogits checked_logits(const char* op, const Tensor& input, const std::optional<Tensor>& weight,
                             int64_t reduction, double label_smoothing) {
  check_place(op, "input", input, input);
  check(input.dim() >= 2, op, ": input has ", input.dim(), " dimensions, expected [N, C, ...]");
  check<std::invalid_argument>(reduction >= 0 && reduction <= 2, op, ": no reduction ", reduction);
  check(label_smoothing >= 0.0 && label_smoothing <= 1.0,
        "label_smoothing must be between 0.0 and 1.0. Got: ", label_smoothing);
  const int64_t classes = input.size(1);
  const bool channels_last = suggests_channels_last(input);
  CheckedLogits result{{}, in_layout(input, channels_last), std::nullopt, channels_last};
  if (weight) {
    check_place(op, "weight", *weight, input);
    check(weight->scalar_type() == input.scalar_type(), op, ": weight differs in dtype");
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

struct CheckedIndices : CheckedLogits {
  Tensor target;
  std::optional<Tensor> sample_weight;
};

// All that both directions check of class indices.
template <CheckPlace check_place>
CheckedIndices checked_indices(const char* op, const Tensor& input, const Tensor& target,
                               const std::optional<Tensor>& weight, const std::optional<Tensor>& sample_weight,
                               int64_t reduction, int64_t ignore_index, double label_smoothing) {
  check_place(op, "target", target, input);
  check(target.scalar_type() == ScalarType::Long, op, ": target is not int64");
  check(target.dim() == input.dim() - 1, op, ": target has ", target.dim(), " dimensions, expected ", input.dim() - 1);
  for (int64_t d = 0; d < target.dim(); ++d)
    check(target.size(d) == input.size(d == 0 ? 0 : d + 1), op, ": size ", d, " of target does not fit input");
  CheckedIndices result{checked_logits<check_place>(op, input, weight, reduction, label_smoothing),
                        as_contiguous(target), std::nullopt};
  if (sample_weight) {
    check_place(op, "sample_weight", *sample_weight, input);
    check(sample_weight->scalar_type() == input.scalar_type(), op, ": sample_weight differs in dtype");
    check(same_sizes(sample_weight->sizes(), target.sizes()), op, ": sample_weight is not of target's sizes");
    result.sample_weight = as_contiguous(*sample_weight);
  }
  if (!target.is_cpu()) return result;  // looking at them would wait for the device: its kernels give NaN
  const int64_t classes = input.size(1), places = result.target.numel();
  const int64_t* t = data<int64_t>(result.target);
  for (int64_t i = 0; i < places; ++i)
    check<std::out_of_range>((t[i] >= 0 && t[i] < classes) || t[i] == ignore_index, "Target ", t[i],
                             " is out of bounds.");
  return result;
}

struct CheckedProbabilities : CheckedLogits {
  Tensor target;
  std::vector<int64_t> kept;  // sizes of what the forward keeps: three numbers a place
};

// All that both directions check of class probabilities, which come back as input is laid out.
template <CheckPlace check_place>
CheckedProbabilities checked_probabilities(const char* op, const Tensor& input, const Tensor& target,
                                           const std::optional<Tensor>& weight, int64_t reduction,
                                           double label_smoothing) {
  check_place(op, "target", target, input);
  check(target.scalar_type() == input.scalar_type(), op, ": target differs in dtype");
  check(same_sizes(target.sizes(), input.sizes()), op, ": target is not of input's sizes");
  const CheckedLogits both = checked_logits<check_place>(op, input, weight, reduction, label_smoothing);
  check(input.numel() > 0, op, ": input is empty");
  CheckedProbabilities result{both, in_layout(target, both.channels_last), {3}};
  for (int64_t d = 0; d < input.dim(); ++d)
    if (d != 1) result.kept.push_back(input.size(d));
  return result;
}

inline int64_t places_of(const CheckedLogits& c) { return c.shape.outer * c.shape.inner; }

template <CheckPlace check_place>
void check_grad_loss(const char* op, const Tensor& grad_loss, const CheckedLogits& c, int64_t reduction) {
  check_place(op, "grad_loss", grad_loss, c.input);
  check(grad_loss.scalar_type() == c.input.scalar_type(), op, ": grad_loss differs in dtype");
  check(grad_loss.numel() == (reduction == 0 ? places_of(c) : 1), op, ": grad_loss has ", grad_loss.numel(),
        " elements");
}

template <CheckPlace check_place>
void check_indices_backward(const char* op, const Tensor& grad_loss, const CheckedIndices& c, const Tensor& lse,
                            const Tensor& total_weight, ScalarType accumulate, int64_t reduction) {
  check_grad_loss<check_place>(op, grad_loss, c, reduction);
  check_place(op, "lse", lse, c.input);
  check(lse.scalar_type() == accumulate && lse.numel() == 2 * c.target.numel(), op, ": lse does not fit input");
  check_place(op, "total_weight", total_weight, c.input);
  check(total_weight.scalar_type() == accumulate && total_weight.numel() == 1, op, ": total_weight does not fit input");
}

template <CheckPlace check_place>
void check_probabilities_backward(const char* op, const Tensor& grad_loss, const CheckedProbabilities& c,
                                  const Tensor& kept, int64_t reduction) {
  check_grad_loss<check_place>(op, grad_loss, c, reduction);
  check_place(op, "kept", kept, c.input);
  check(kept.scalar_type() == ScalarType::Double && kept.numel() == 3 * places_of(c), op, ": kept does not fit input");
}

}  // namespace dlkern::ops

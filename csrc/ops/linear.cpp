// linear, op layer: linear_forward, linear_backward_input, linear_backward_weight, activation_backward.
#include "../cpu/linear.h"

#include "common.h"

namespace dlkern::ops {
namespace {

// A tensor [..., columns] seen as a matrix [rows, columns] through two strides; what has no such view is copied.
struct Matrix {
  Tensor tensor;
  int64_t rows, columns, row, column;
};

Matrix as_matrix(const Tensor& x) {
  const auto size = x.sizes();
  const auto stride = x.strides();
  const int64_t last = x.dim() - 1;
  const int64_t columns = size[last];
  int64_t rows = 1, row = columns;
  bool first = true, viewable = true;
  for (int64_t d = last; d-- > 0;) {
    if (size[d] != 1) {
      if (first)
        row = stride[d];
      else if (stride[d] != row * rows)
        viewable = false;
      first = false;
    }
    rows *= size[d];
  }
  if (viewable) return {x, rows, columns, row, stride[last]};
  return {torch::stable::contiguous(x), rows, columns, columns, 1};
}

void check_operand(const char* op, const char* name, const Tensor& x, const Tensor& like, int64_t min_dim) {
  check(x.is_cpu(), op, ": ", name, " is not on the CPU");
  check(x.scalar_type() == like.scalar_type(), op, ": ", name, " differs in dtype");
  check(x.dim() >= min_dim, op, ": ", name, " has ", x.dim(), " dimensions, expected at least ", min_dim);
}

// An uninitialised tensor of x's sizes but the last.
Tensor allocate_with_last(const Tensor& x, int64_t last) {
  const Ints from = x.sizes();
  check(from.size() <= kMostDims, "linear: more than ", kMostDims, " dimensions");
  int64_t size[kMostDims];
  for (size_t d = 0; d < from.size(); ++d) size[d] = from[d];
  size[from.size() - 1] = last;
  return allocate(Ints(size, from.size()), x.scalar_type(), x);
}

Tensor linear_forward_cpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                          int64_t activation) {
  check_operand("linear", "input", input, input, 1);
  check_operand("linear", "weight", weight, input, 2);
  check(weight.dim() == 2, "linear: weight has ", weight.dim(), " dimensions, expected 2");
  check(activation >= 0 && activation <= 3, "linear: no activation ", activation);
  const int64_t k = weight.size(1), n = weight.size(0);
  check(input.size(input.dim() - 1) == k, "linear: input has ", input.size(input.dim() - 1), " features, weight takes ",
        k);
  std::optional<Tensor> b;
  if (bias) {
    check_operand("linear", "bias", *bias, input, 1);
    check(bias->dim() == 1 && bias->size(0) == n, "linear: bias is not [", n, "]");
    b = as_contiguous(*bias);
  }
  const Matrix x = as_matrix(input), w = as_matrix(weight);
  Tensor output = allocate_with_last(input, n);
  dispatch_floating(input.scalar_type(), "linear", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::LinearArgs<T> args{x.rows,
                            n,
                            k,
                            data<T>(x.tensor),
                            x.row,
                            x.column,
                            data<T>(w.tensor),
                            w.row,
                            w.column,
                            data<T>(b),
                            mutable_data<T>(output),
                            static_cast<int>(activation)};
    DLKERN_CALL(linear_forward, args);
  });
  return output;
}

Tensor linear_backward_input_cpu(const Tensor& grad_output, const Tensor& weight) {
  check_operand("linear_backward_input", "grad_output", grad_output, grad_output, 1);
  check_operand("linear_backward_input", "weight", weight, grad_output, 2);
  check(weight.dim() == 2, "linear_backward_input: weight has ", weight.dim(), " dimensions, expected 2");
  const int64_t k = weight.size(1), n = weight.size(0);
  check(grad_output.size(grad_output.dim() - 1) == n, "linear_backward_input: grad_output has ",
        grad_output.size(grad_output.dim() - 1), " features, weight makes ", n);
  const Matrix g = as_matrix(grad_output), w = as_matrix(weight);
  Tensor grad_input = allocate_with_last(grad_output, k);
  dispatch_floating(grad_output.scalar_type(), "linear_backward_input", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::LinearBackwardInputArgs<T> args{g.rows,
                                         n,
                                         k,
                                         data<T>(g.tensor),
                                         g.row,
                                         g.column,
                                         data<T>(w.tensor),
                                         w.row,
                                         w.column,
                                         mutable_data<T>(grad_input)};
    DLKERN_CALL(linear_backward_input, args);
  });
  return grad_input;
}

std::tuple<Tensor, Tensor> linear_backward_weight_cpu(const Tensor& grad_output, const Tensor& input, bool bias) {
  check_operand("linear_backward_weight", "grad_output", grad_output, grad_output, 1);
  check_operand("linear_backward_weight", "input", input, grad_output, 1);
  check(grad_output.dim() == input.dim(), "linear_backward_weight: grad_output and input differ in dimensions");
  for (int64_t d = 0; d + 1 < input.dim(); ++d)
    check(grad_output.size(d) == input.size(d), "linear_backward_weight: grad_output and input differ in size ", d);
  const int64_t n = grad_output.size(grad_output.dim() - 1), k = input.size(input.dim() - 1);
  const Matrix g = as_matrix(grad_output), x = as_matrix(input);
  Tensor grad_weight = allocate({n, k}, input.scalar_type(), input);
  Tensor grad_bias = allocate({bias ? n : 0}, input.scalar_type(), input);
  dispatch_floating(input.scalar_type(), "linear_backward_weight", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::LinearBackwardWeightArgs<T> args{g.rows,
                                          n,
                                          k,
                                          data<T>(g.tensor),
                                          g.row,
                                          g.column,
                                          data<T>(x.tensor),
                                          x.row,
                                          x.column,
                                          mutable_data<T>(grad_weight),
                                          bias ? mutable_data<T>(grad_bias) : nullptr};
    DLKERN_CALL(linear_backward_weight, args);
  });
  return {grad_weight, grad_bias};
}

Tensor activation_backward_cpu(const Tensor& grad_output, const Tensor& output, int64_t activation) {
  check_operand("activation_backward", "grad_output", grad_output, grad_output, 0);
  check_operand("activation_backward", "output", output, grad_output, 0);
  check(activation >= 0 && activation <= 3, "activation_backward: no activation ", activation);
  check(same_sizes(grad_output.sizes(), output.sizes()), "activation_backward: grad_output and output differ in size");
  const Tensor g = torch::stable::contiguous(grad_output), y = torch::stable::contiguous(output);
  Tensor grad_input = allocate(g.sizes(), g.scalar_type(), g);
  dispatch_floating(g.scalar_type(), "activation_backward", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::ActivationBackwardArgs<T> args{g.numel(), data<T>(g), data<T>(y), mutable_data<T>(grad_input),
                                        static_cast<int>(activation)};
    DLKERN_CALL(activation_backward, args);
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) {
  m.impl("linear_forward_cpu", TORCH_BOX(&linear_forward_cpu));
  m.impl("linear_backward_input_cpu", TORCH_BOX(&linear_backward_input_cpu));
  m.impl("linear_backward_weight_cpu", TORCH_BOX(&linear_backward_weight_cpu));
  m.impl("activation_backward_cpu", TORCH_BOX(&activation_backward_cpu));
}

}  // namespace dlkern::ops

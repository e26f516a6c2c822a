// layer_norm, op layer: layer_norm_forward, layer_norm_backward. Weight and bias are in the input's dtype, or float32
// beside bfloat16 and float16.
#include "../cpu/layer_norm.h"

#include "common.h"

namespace dlkern::ops {
namespace {

struct Rows {
  int64_t rows = 1, columns = 1;
};

// The last `dims` dimensions are normalized.
Rows check_rows(const char* op, const Tensor& input, int64_t dims) {
  check(input.is_cpu(), op, ": input is not on the CPU");
  check(dims >= 1 && dims <= input.dim(), op, ": cannot normalize ", dims, " of ", input.dim(), " dimensions");
  Rows result;
  for (int64_t d = 0; d < input.dim(); ++d) (d < input.dim() - dims ? result.rows : result.columns) *= input.size(d);
  return result;
}

void check_parameter(const char* op, const char* name, const std::optional<Tensor>& x, const Tensor& input,
                     int64_t dims) {
  if (!x) return;
  check(x->is_cpu(), op, ": ", name, " is not on the CPU");
  bool fits = x->dim() == dims;
  for (int64_t d = 0; fits && d < dims; ++d) fits = x->size(d) == input.size(input.dim() - dims + d);
  check(fits, op, ": ", name, " is not of the normalized shape");
  const bool wide = is_reduced(input.scalar_type()) && x->scalar_type() == ScalarType::Float;
  check(wide || x->scalar_type() == input.scalar_type(), op, ": ", name, " differs in dtype");
}

using Three = std::tuple<Tensor, Tensor, Tensor>;
Three layer_norm_forward_cpu(const Tensor& input, int64_t dims, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& bias, double eps) {
  const char* op = "layer_norm";
  const Rows r = check_rows(op, input, dims);
  check_parameter(op, "weight", weight, input, dims);
  check_parameter(op, "bias", bias, input, dims);
  Tensor output, mean, rstd;
  dispatch_floating(input.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const Tensor x = as_contiguous(input);
    const std::optional<Tensor> w = widened(weight, input), b = widened(bias, input);
    output = allocate(input.sizes(), input.scalar_type(), input);
    mean = allocate({r.rows}, sum_type(input), input);
    rstd = allocate({r.rows}, sum_type(input), input);
    if (r.rows == 0) return;
    if (r.columns == 0) {
      torch::stable::zero_(mean);
      torch::stable::zero_(rstd);
      return;
    }
    const cpu::LayerNormArgs<T> args{r.rows,
                                     r.columns,
                                     data<T>(x),
                                     data<A>(w),
                                     data<A>(b),
                                     eps,
                                     mutable_data<T>(output),
                                     mutable_data<A>(mean),
                                     mutable_data<A>(rstd)};
    DLKERN_CALL(layer_norm_forward, args);
  });
  return {output, mean, rstd};
}

// Gradients that are not wanted are of size [0]; weight is read for its dtype and shape where only its gradient is.
Three layer_norm_backward_cpu(const Tensor& grad_output, const Tensor& input, int64_t dims,
                              const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd,
                              bool of_input, bool of_weight, bool of_bias) {
  const char* op = "layer_norm_backward";
  const Rows r = check_rows(op, input, dims);
  check(grad_output.is_cpu() && grad_output.scalar_type() == input.scalar_type() &&
            same_sizes(grad_output.sizes(), input.sizes()),
        op, ": grad_output is not like input");
  check_parameter(op, "weight", weight, input, dims);
  for (const Tensor* x : {&mean, &rstd})
    check(x->is_cpu() && x->scalar_type() == sum_type(input) && x->dim() == 1 && x->size(0) == r.rows, op,
          ": mean or rstd is not what layer_norm_forward gave");
  Tensor grad_input, grad_weight, grad_bias;
  dispatch_floating(input.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const Tensor g = as_contiguous(grad_output), x = as_contiguous(input), m = as_contiguous(mean),
                 s = as_contiguous(rstd);
    const std::optional<Tensor> w = widened(weight, input);
    std::vector<int64_t> shape = to_vector(input.sizes());
    std::vector<int64_t> normalized(shape.end() - dims, shape.end()), none(1, 0);
    const auto sized = [&](bool wanted, const std::vector<int64_t>& size, ScalarType dtype) {
      const std::vector<int64_t>& chosen = wanted ? size : none;
      return allocate(Ints(chosen.data(), chosen.size()), dtype, input);
    };
    const ScalarType dtype = weight ? weight->scalar_type() : input.scalar_type();
    grad_input = sized(of_input, shape, input.scalar_type());
    grad_weight = sized(of_weight, normalized, sum_type(input));
    grad_bias = sized(of_bias, normalized, sum_type(input));
    if (r.rows == 0 || r.columns == 0) {
      torch::stable::zero_(grad_weight);
      torch::stable::zero_(grad_bias);
    } else {
      const cpu::LayerNormBackwardArgs<T> args{r.rows,
                                               r.columns,
                                               data<T>(g),
                                               data<T>(x),
                                               data<A>(w),
                                               data<A>(m),
                                               data<A>(s),
                                               of_input ? mutable_data<T>(grad_input) : nullptr,
                                               of_weight ? mutable_data<A>(grad_weight) : nullptr,
                                               of_bias ? mutable_data<A>(grad_bias) : nullptr};
      DLKERN_CALL(layer_norm_backward, args);
    }
    grad_weight = narrowed(grad_weight, dtype);
    grad_bias = narrowed(grad_bias, dtype);
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) {
  m.impl("layer_norm_forward_cpu", TORCH_BOX(&layer_norm_forward_cpu));
  m.impl("layer_norm_backward_cpu", TORCH_BOX(&layer_norm_backward_cpu));
}

}  // namespace dlkern::ops

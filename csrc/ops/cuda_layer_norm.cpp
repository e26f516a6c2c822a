// layer_norm, op layer of the CUDA column: layer_norm_forward, layer_norm_backward. float32, bfloat16 and float16;
// weight and bias are in the input's dtype or float32.
#include "../cuda/layer_norm.h"

#include "cuda_common.h"

namespace dlkern::ops {
namespace {

cuda::LayerNormRows check_rows(const char* op, const Tensor& input, int64_t dims) {
  const cuda::Element element = element_of(op, input);
  check(dims >= 1 && dims <= input.dim(), op, ": cannot normalize ", dims, " of ", input.dim(), " dimensions");
  cuda::LayerNormRows result{element, false, 1, 1};
  for (int64_t d = 0; d < input.dim(); ++d) (d < input.dim() - dims ? result.rows : result.columns) *= input.size(d);
  return result;
}

void check_parameter(const char* op, const char* name, const std::optional<Tensor>& x, const Tensor& input,
                     int64_t dims) {
  if (!x) return;
  check_device(op, name, *x, input);
  bool fits = x->dim() == dims;
  for (int64_t d = 0; fits && d < dims; ++d) fits = x->size(d) == input.size(input.dim() - dims + d);
  check(fits, op, ": ", name, " is not of the normalized shape");
  check(x->scalar_type() == ScalarType::Float || x->scalar_type() == input.scalar_type(), op, ": ", name,
        " differs in dtype");
}

using Three = std::tuple<Tensor, Tensor, Tensor>;
Three layer_norm_forward_cuda(const Tensor& input, int64_t dims, const std::optional<Tensor>& weight,
                              const std::optional<Tensor>& bias, double eps) {
  const char* op = "layer_norm";
  cuda::LayerNormRows shape = check_rows(op, input, dims);
  check_parameter(op, "weight", weight, input, dims);
  check_parameter(op, "bias", bias, input, dims);
  check(!weight || !bias || weight->scalar_type() == bias->scalar_type(), op, ": weight and bias differ in dtype");
  if (weight || bias) shape.wide_parameters = (weight ? weight : bias)->scalar_type() == ScalarType::Float;
  const Tensor x = as_contiguous(input);
  const std::optional<Tensor> w = as_contiguous(weight), b = as_contiguous(bias);
  Tensor output = allocate(x.sizes(), x.scalar_type(), x);
  Tensor mean = allocate({shape.rows}, ScalarType::Float, x), rstd = allocate({shape.rows}, ScalarType::Float, x);
  if (shape.rows == 0 || shape.columns == 0) return {output, torch::stable::zero_(mean), torch::stable::zero_(rstd)};
  Call call(x);
  cuda::layer_norm_forward(shape, call.reads(x), call.reads(w), call.reads(b), eps, call.writes(output),
                           static_cast<float*>(call.writes(mean)), static_cast<float*>(call.writes(rstd)),
                           call.stream());
  return {output, mean, rstd};
}

// Gradients that are not wanted are of size [0]; weight is read for its dtype where only a bias's gradient is wanted.
Three layer_norm_backward_cuda(const Tensor& grad_output, const Tensor& input, int64_t dims,
                               const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd,
                               bool of_input, bool of_weight, bool of_bias) {
  const char* op = "layer_norm_backward";
  cuda::LayerNormRows shape = check_rows(op, input, dims);
  check_device(op, "grad_output", grad_output, input);
  check(grad_output.scalar_type() == input.scalar_type() && same_sizes(grad_output.sizes(), input.sizes()), op,
        ": grad_output is not like input");
  check_parameter(op, "weight", weight, input, dims);
  for (const Tensor* x : {&mean, &rstd}) {
    check_device(op, "mean or rstd", *x, input);
    check(x->scalar_type() == ScalarType::Float && x->dim() == 1 && x->size(0) == shape.rows, op,
          ": mean or rstd is not what layer_norm_forward gave");
  }
  const ScalarType dtype = weight ? weight->scalar_type() : input.scalar_type();
  shape.wide_parameters = dtype == ScalarType::Float;
  const Tensor g = as_contiguous(grad_output), x = as_contiguous(input), m = as_contiguous(mean),
               s = as_contiguous(rstd);
  const std::optional<Tensor> w = as_contiguous(weight);
  const std::vector<int64_t> size = to_vector(input.sizes()), normalized(size.end() - dims, size.end()), none(1, 0);
  const auto sized = [&](bool wanted, const std::vector<int64_t>& full, ScalarType type) {
    const std::vector<int64_t>& chosen = wanted ? full : none;
    return allocate(Ints(chosen.data(), chosen.size()), type, x);
  };
  Tensor grad_input = sized(of_input, size, x.scalar_type());
  Tensor grad_weight = sized(of_weight, normalized, dtype), grad_bias = sized(of_bias, normalized, dtype);
  if (shape.rows == 0 || shape.columns == 0)
    return {grad_input, torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias)};
  if (!of_input && !of_weight && !of_bias) return {grad_input, grad_weight, grad_bias};
  const bool sums = of_weight || of_bias;
  const Tensor parts = allocate({sums ? cuda::layer_norm_parts(shape) : 0, 2 * shape.columns}, ScalarType::Float, x);
  Call call(x);
  cuda::layer_norm_backward(
      shape, call.reads(g), call.reads(x), call.reads(w), static_cast<const float*>(call.reads(m)),
      static_cast<const float*>(call.reads(s)), of_input ? call.writes(grad_input) : nullptr,
      sums ? static_cast<float*>(call.writes(parts)) : nullptr, of_weight ? call.writes(grad_weight) : nullptr,
      of_bias ? call.writes(grad_bias) : nullptr, call.stream());
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

DLKERN_REGISTER(DLKERN_CUDA_KEY, m) {
  m.impl("layer_norm_forward_cuda", TORCH_BOX(&layer_norm_forward_cuda));
  m.impl("layer_norm_backward_cuda", TORCH_BOX(&layer_norm_backward_cuda));
}

}  // namespace dlkern::ops

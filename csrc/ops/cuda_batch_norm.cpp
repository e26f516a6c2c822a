// Batch norm, op layer of the CUDA column: batch_norm_train_forward, batch_norm_eval_forward, batch_norm_backward.
// float32, bfloat16 and float16; parameters and running statistics in the input's dtype or float32.
#include "../cuda/batch_norm.h"

#include "cuda_common.h"

namespace dlkern::ops {
namespace {

using cuda::ChannelResults;
using cuda::ChannelValues;
using cuda::NormShape;
using cuda::NormType;

using OptionalTensor = std::optional<Tensor>;

NormType type_of(ScalarType dtype) {
  return dtype == ScalarType::Double     ? NormType::float64
         : dtype == ScalarType::BFloat16 ? NormType::bfloat16
         : dtype == ScalarType::Half     ? NormType::float16
                                         : NormType::float32;
}

void check_input(const char* op, const Tensor& input) {
  element_of(op, input);
  check<std::out_of_range>(input.dim() >= 2, op, ": expected [N, C, ...], got ", input.dim(), " dimensions");
}

void check_like(const char* op, const OptionalTensor& x, const Tensor& input, const char* name) {
  if (!x) return;
  check<std::invalid_argument>(same_sizes(x->sizes(), input.sizes()), op, ": ", name, " must have input's sizes");
  check(x->scalar_type() == input.scalar_type(), op, ": ", name, " must have input's dtype");
  check_device(op, name, *x, input);
}

void check_parameter(const char* op, const OptionalTensor& x, const Tensor& input, const char* name) {
  if (!x) return;
  check(x->numel() == input.size(1), op, ": ", name, " should contain ", input.size(1), " elements not ", x->numel());
  check(x->scalar_type() == input.scalar_type() || x->scalar_type() == ScalarType::Float, op, ": ", name,
        " must have input's dtype or float32");
  check_device(op, name, *x, input);
}

// Parameters and running statistics come in one dtype.
void check_one_dtype(const char* op, const OptionalTensor& a, const OptionalTensor& b) {
  check(!a || !b || a->scalar_type() == b->scalar_type(), op, ": parameters and running statistics differ in dtype");
}

void check_parameters(const char* op, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var) {
  check_parameter(op, weight, input, "weight");
  check_parameter(op, bias, input, "bias");
  check_parameter(op, running_mean, input, "running_mean");
  check_parameter(op, running_var, input, "running_var");
  check_one_dtype(op, weight, bias);
  check_one_dtype(op, running_mean, running_var);
  check_one_dtype(op, weight ? weight : bias, running_mean);
}

NormShape norm_shape(const char* op, const Tensor& input, bool channels_last) {
  constexpr int64_t kLargest = int64_t{1} << 31;
  NormShape shape{input.size(0), input.size(1), 1, channels_last};
  for (int64_t d = 2; d < input.dim(); ++d) shape.inner *= input.size(d);
  if (shape.inner == 1) shape.channels_last = true;  // [n, c] is rows of channels
  check(shape.channels < kLargest && shape.inner < kLargest, op,
        ": more than 2^31 - 1 channels, or elements of one image's channel (cuda column)");
  return shape;
}

// x in the given order of dimensions, 16-byte aligned.
Tensor ordered(const Tensor& x, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  const auto format = !channels_last ? MemoryFormat::Contiguous
                      : x.dim() == 4 ? MemoryFormat::ChannelsLast
                                     : MemoryFormat::ChannelsLast3d;
  return aligned(torch::stable::contiguous(x, format));
}
OptionalTensor ordered(const OptionalTensor& x, bool channels_last) {
  return x ? OptionalTensor(ordered(*x, channels_last)) : std::nullopt;
}

ChannelValues values(Call& call, const OptionalTensor& x) {
  return {call.reads(x), x ? type_of(x->scalar_type()) : NormType::float32};
}
ChannelResults results(Call& call, const Tensor& x) { return {call.writes(x), type_of(x.scalar_type())}; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> train_forward_cuda(const Tensor& input, OptionalTensor residual,
                                                                      OptionalTensor weight, OptionalTensor bias,
                                                                      OptionalTensor running_mean,
                                                                      OptionalTensor running_var, double momentum,
                                                                      double eps, int64_t activation) {
  const char* op = "batch_norm";
  check_input(op, input);
  check_like(op, residual, input, "residual");
  check_parameters(op, input, weight, bias, running_mean, running_var);
  check<std::invalid_argument>(running_mean.has_value() == running_var.has_value(),
                               "running_mean and running_var must either both be None or neither be None");
  check_activation(op, activation);
  check<std::invalid_argument>(eps > 0, "batch_norm eps must be positive during training, but got ", eps);
  const bool channels_last = suggests_channels_last(input);
  const NormShape shape = norm_shape(op, input, channels_last);
  check<std::invalid_argument>(shape.images * shape.inner != 1, "Expected more than 1 value per channel when training");
  const NormType type = type_of(input.scalar_type());
  const Tensor x = ordered(input, channels_last);
  const OptionalTensor r = ordered(residual, channels_last), w = as_contiguous(weight), b = as_contiguous(bias);
  const OptionalTensor old_mean = as_contiguous(running_mean), old_var = as_contiguous(running_var);

  Tensor output = allocate(x.sizes(), x.scalar_type(), x, channels_last);
  Tensor mean = allocate({shape.channels}, ScalarType::Float, x);
  Tensor invstd = allocate({shape.channels}, ScalarType::Float, x);
  const ScalarType tracked = old_mean ? old_mean->scalar_type() : ScalarType::Float;
  Tensor new_mean = allocate({old_mean ? shape.channels : 0}, tracked, x);
  Tensor new_var = allocate({old_mean ? shape.channels : 0}, tracked, x);
  Tensor partial = allocate({2, cuda::batch_norm_chunks(type, shape), shape.channels}, ScalarType::Double, x);
  if (shape.channels == 0) return {output, mean, invstd, new_mean, new_var};
  Call call(x);
  const void* in = call.reads(x);
  const cuda::NormStatistics statistics{values(call, old_mean),
                                        values(call, old_var),
                                        momentum,
                                        eps,
                                        static_cast<float*>(call.writes(mean)),
                                        static_cast<float*>(call.writes(invstd)),
                                        results(call, new_mean),
                                        results(call, new_var)};
  cuda::batch_norm_statistics(type, shape, in, static_cast<double*>(call.writes(partial)), statistics, call.stream());
  if (output.numel() > 0)
    cuda::batch_norm_apply(type, shape, in, call.reads(r), {statistics.mean, NormType::float32},
                           {statistics.invstd, NormType::float32}, values(call, w), values(call, b),
                           static_cast<int>(activation), call.writes(output), call.stream());
  return {output, mean, invstd, new_mean, new_var};
}

std::tuple<Tensor, Tensor, Tensor> eval_forward_cuda(const Tensor& input, OptionalTensor residual,
                                                     OptionalTensor weight, OptionalTensor bias,
                                                     const Tensor& running_mean, const Tensor& running_var, double eps,
                                                     int64_t activation) {
  const char* op = "batch_norm";
  check_input(op, input);
  check_like(op, residual, input, "residual");
  check_parameters(op, input, weight, bias, running_mean, running_var);
  check_activation(op, activation);
  check<std::invalid_argument>(eps >= 0, "batch_norm eps must be non-negative, but got ", eps);
  const bool channels_last = suggests_channels_last(input);
  const NormShape shape = norm_shape(op, input, channels_last);
  const Tensor x = ordered(input, channels_last);
  const OptionalTensor r = ordered(residual, channels_last), w = as_contiguous(weight), b = as_contiguous(bias);
  const Tensor old_mean = as_contiguous(running_mean), old_var = as_contiguous(running_var);
  Tensor output = allocate(x.sizes(), x.scalar_type(), x, channels_last);
  Tensor mean = allocate({shape.channels}, ScalarType::Double, x);
  Tensor invstd = allocate({shape.channels}, ScalarType::Double, x);
  if (shape.channels == 0) return {output, mean, invstd};
  Call call(x);
  auto* m = static_cast<double*>(call.writes(mean));
  auto* s = static_cast<double*>(call.writes(invstd));
  cuda::batch_norm_running(values(call, old_mean), values(call, old_var), eps, shape.channels, m, s, call.stream());
  if (output.numel() > 0)
    cuda::batch_norm_apply(type_of(x.scalar_type()), shape, call.reads(x), call.reads(r), {m, NormType::float64},
                           {s, NormType::float64}, values(call, w), values(call, b), static_cast<int>(activation),
                           call.writes(output), call.stream());
  return {output, mean, invstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cuda(const Tensor& grad_output, const Tensor& input,
                                                         OptionalTensor output, OptionalTensor weight,
                                                         const Tensor& mean, const Tensor& invstd, bool train,
                                                         int64_t activation, bool residual) {
  const char* op = "batch_norm_backward";
  check_input(op, input);
  check_like(op, grad_output, input, "grad_output");
  check_like(op, output, input, "output");
  check_parameter(op, weight, input, "weight");
  check_activation(op, activation);
  check<std::invalid_argument>(activation == 0 || output.has_value(), op,
                               ": an activation's backward needs its output");
  for (const Tensor& t : {mean, invstd}) {
    check(t.numel() == input.size(1), op, ": mean and invstd should contain ", input.size(1), " elements");
    check(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, op,
          ": mean and invstd must be float64 or float32");
    check_device(op, "mean or invstd", t, input);
  }
  const bool channels_last = suggests_channels_last(input);
  const NormShape shape = norm_shape(op, input, channels_last);
  const NormType type = type_of(input.scalar_type());
  const Tensor x = ordered(input, channels_last), g = ordered(grad_output, channels_last);
  const OptionalTensor y = activation == 0 ? std::nullopt : ordered(output, channels_last), w = as_contiguous(weight);
  const Tensor m = as_contiguous(mean), s = as_contiguous(invstd);
  const ScalarType parameter = weight ? weight->scalar_type() : ScalarType::Float;
  Tensor grad_input = allocate(x.sizes(), x.scalar_type(), x, channels_last);
  Tensor grad_residual =
      residual ? allocate(x.sizes(), x.scalar_type(), x, channels_last) : allocate({0}, x.scalar_type(), x);
  Tensor grad_weight = allocate({shape.channels}, parameter, x);
  Tensor grad_bias = allocate({shape.channels}, parameter, x);
  Tensor partial = allocate({2, cuda::batch_norm_chunks(type, shape), shape.channels}, ScalarType::Double, x);
  Tensor coefficients = allocate({2, shape.channels}, ScalarType::Float, x);
  if (shape.channels == 0) return {grad_input, grad_weight, grad_bias, grad_residual};
  Call call(x);
  const cuda::NormBackward args{call.reads(g),
                                call.reads(x),
                                call.reads(y),
                                values(call, m),
                                values(call, s),
                                values(call, w),
                                train,
                                static_cast<int>(activation),
                                static_cast<double*>(call.writes(partial)),
                                static_cast<float*>(call.writes(coefficients)),
                                call.writes(grad_input),
                                residual ? call.writes(grad_residual) : nullptr,
                                results(call, grad_weight),
                                results(call, grad_bias)};
  cuda::batch_norm_backward(type, shape, args, call.stream());
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

}  // namespace

DLKERN_REGISTER(DLKERN_CUDA_KEY, m) {
  m.impl("batch_norm_train_forward_cuda", TORCH_BOX(&train_forward_cuda));
  m.impl("batch_norm_eval_forward_cuda", TORCH_BOX(&eval_forward_cuda));
  m.impl("batch_norm_backward_cuda", TORCH_BOX(&backward_cuda));
}

}  // namespace dlkern::ops

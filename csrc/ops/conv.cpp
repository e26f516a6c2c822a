// conv2d and conv_transpose2d, op layer: dlkern::conv2d_{forward,act_forward,backward_*}_cpu,
// conv_transpose2d_forward_cpu, and conv2d_{pack,forward_packed}_cpu for weights that stay (dlkern.freeze).
// Everything a kernel relies on is checked here; what is dense in neither layout is copied.
#include "conv_checks.h"

namespace dlkern::ops {
namespace {

void check_tensor(const char* op, const char* name, const Tensor& x, const Tensor& like, int64_t dim) {
  check(x.is_cpu(), op, ": ", name, " is not on the CPU");
  check_dim_and_dtype(op, name, x, like, dim);
}

// The dtype packed weights are in: what sums are carried in.
ScalarType packed_dtype(ScalarType dtype) { return is_reduced(dtype) ? ScalarType::Float : dtype; }

template <class T> int64_t pack(const cpu::ConvShape& z, const Tensor& weight, acc_t<T>* packed) {
  const cpu::ConvPackArgs<T> args{z, data<T>(weight), is_channels_last(weight), packed};
  return DLKERN_CALL(conv2d_pack, args);
}

// The shape of a weight alone.
cpu::ConvShape weight_shape(const char* op, const Tensor& weight, int64_t groups) {
  check_tensor(op, "weight", weight, weight, 4);
  check<std::invalid_argument>(groups > 0 && groups < kLargest, op, ": non-positive groups is not supported");
  const Ints size = weight.sizes();
  for (int64_t n : size) check<std::invalid_argument>(n > 0 && n < kLargest, op, ": weight size out of range");
  const int64_t input[] = {0, size[1] * groups, size[2], size[3]}, ones[] = {1, 1}, zeros[] = {0, 0};
  return shape_of(op, input, size, ones, zeros, ones, groups);
}

Tensor conv2d_pack_cpu(const Tensor& weight, int64_t groups) {
  const char* op = "conv2d_pack";
  const cpu::ConvShape z = weight_shape(op, weight, groups);
  const Tensor w = dense(weight);
  std::optional<Tensor> packed;
  dispatch_floating(w.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    packed = allocate({pack<T>(z, w, nullptr)}, packed_dtype(w.scalar_type()), w);
    pack<T>(z, w, mutable_data<acc_t<T>>(*packed));
  });
  return *packed;
}

// activation(conv(input) + residual), all of it but the convolution optional.
Tensor forward(const Tensor& input, const Tensor& weight, const Tensor* packed, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
               int64_t activation) {
  const char* op = "conv2d_forward";
  check_tensor(op, "input", input, input, 4);
  check_tensor(op, "weight", weight, input, 4);
  const cpu::ConvShape z = shape_of(op, input.sizes(), weight.sizes(), stride, padding, dilation, groups);
  const std::optional<Tensor> b = checked_bias<check_tensor>(op, bias, input, z.k);
  const bool channels_last = suggests_channels_last(input) || suggests_channels_last(weight);
  const Tensor x = dense(input), w = dense(weight);
  check_activation(op, activation);
  if (residual) {
    check_tensor(op, "residual", *residual, input, 4);
    check_residual(op, *residual, z, channels_last);
  }
  dispatch_floating(x.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (packed)
      check(packed->is_cpu() && packed->scalar_type() == packed_dtype(x.scalar_type()) && packed->is_contiguous() &&
                packed->dim() == 1 && packed->size(0) == pack<T>(z, w, nullptr),
            op, ": packed is not what conv2d_pack makes of this weight");
  });
  Tensor output = allocate({z.n, z.k, z.p, z.q}, x.scalar_type(), x, channels_last);
  if (output.numel() == 0) return output;
  dispatch_floating(x.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::ConvForwardArgs<T> args{z,
                                 data<T>(x),
                                 data<T>(w),
                                 data<T>(b),
                                 mutable_data<T>(output),
                                 is_channels_last(x),
                                 is_channels_last(w),
                                 channels_last,
                                 packed ? data<acc_t<T>>(*packed) : nullptr,
                                 data<T>(residual),
                                 static_cast<int>(activation)};
    DLKERN_CALL(conv2d_forward, args);
  });
  return output;
}

Tensor conv2d_forward_cpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride,
                          Ints padding, Ints dilation, int64_t groups) {
  return forward(input, weight, nullptr, bias, std::nullopt, stride, padding, dilation, groups, 0);
}

Tensor conv2d_act_forward_cpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                              const std::optional<Tensor>& residual, Ints stride, Ints padding, Ints dilation,
                              int64_t groups, int64_t activation) {
  return forward(input, weight, nullptr, bias, residual, stride, padding, dilation, groups, activation);
}

Tensor conv2d_forward_packed_cpu(const Tensor& input, const Tensor& weight, const Tensor& packed,
                                 const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, Ints stride,
                                 Ints padding, Ints dilation, int64_t groups, int64_t activation) {
  return forward(input, weight, &packed, bias, residual, stride, padding, dilation, groups, activation);
}

// The gradient of a convolution's input; with a bias, a transposed convolution.
Tensor backward_input(const char* op, const cpu::ConvShape& z, const Tensor& grad_output, const Tensor& weight,
                      const std::optional<Tensor>& bias, bool channels_last) {
  const Tensor y = dense(grad_output), w = dense(weight);
  dispatch_floating(y.scalar_type(), op, [](auto*) {});
  Tensor grad_input = allocate({z.n, z.c, z.h, z.w}, y.scalar_type(), y, channels_last);
  if (grad_input.numel() == 0) return grad_input;
  dispatch_floating(y.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::ConvBackwardInputArgs<T> args{z,
                                       data<T>(y),
                                       data<T>(w),
                                       data<T>(bias),
                                       mutable_data<T>(grad_input),
                                       is_channels_last(y),
                                       is_channels_last(w),
                                       channels_last};
    DLKERN_CALL(conv2d_backward_input, args);
  });
  return grad_input;
}

Tensor conv2d_backward_bias_cpu(const Tensor& grad_output) {
  const char* op = "conv2d_backward_bias";
  check_tensor(op, "grad_output", grad_output, grad_output, 4);
  const Tensor y = dense(grad_output);
  dispatch_floating(y.scalar_type(), op, [](auto*) {});
  Tensor grad_bias = allocate({y.size(1)}, y.scalar_type(), y);
  if (y.numel() == 0) return torch::stable::zero_(grad_bias);
  dispatch_floating(y.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::ConvBackwardBiasArgs<T> args{
        y.size(0), y.size(1), y.size(2), y.size(3), data<T>(y), is_channels_last(y), mutable_data<T>(grad_bias)};
    DLKERN_CALL(conv2d_backward_bias, args);
  });
  return grad_bias;
}

std::tuple<Tensor, Tensor> conv2d_backward_weight_cpu(const Tensor& grad_output, const Tensor& input, Ints weight_size,
                                                      Ints stride, Ints padding, Ints dilation, int64_t groups,
                                                      bool bias, bool channels_last) {
  const char* op = "conv2d_backward_weight";
  check_tensor(op, "grad_output", grad_output, grad_output, 4);
  check_tensor(op, "input", input, grad_output, 4);
  const cpu::ConvShape z = shape_of(op, input.sizes(), weight_size, stride, padding, dilation, groups);
  check_grad_output(op, grad_output, z);
  const Tensor y = dense(grad_output), x = dense(input);
  dispatch_floating(y.scalar_type(), op, [](auto*) {});
  Tensor grad_weight = allocate(weight_size, y.scalar_type(), y, channels_last);
  Tensor grad_bias = allocate({bias ? z.k : 0}, y.scalar_type(), y);
  if (z.n == 0)  // nothing to sum over
    return {torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias)};
  dispatch_floating(y.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::ConvBackwardWeightArgs<T> args{z,
                                        data<T>(y),
                                        data<T>(x),
                                        mutable_data<T>(grad_weight),
                                        bias ? mutable_data<T>(grad_bias) : nullptr,
                                        is_channels_last(y),
                                        is_channels_last(x),
                                        channels_last};
    DLKERN_CALL(conv2d_backward_weight, args);
  });
  return {grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) {
  m.impl("conv2d_pack_cpu", TORCH_BOX(&conv2d_pack_cpu));
  m.impl("conv2d_forward_cpu", TORCH_BOX(&conv2d_forward_cpu));
  m.impl("conv2d_act_forward_cpu", TORCH_BOX(&conv2d_act_forward_cpu));
  m.impl("conv2d_forward_packed_cpu", TORCH_BOX(&conv2d_forward_packed_cpu));
  m.impl("conv_transpose2d_forward_cpu", TORCH_BOX((&conv_transpose2d_forward<check_tensor, backward_input>)));
  m.impl("conv2d_backward_bias_cpu", TORCH_BOX(&conv2d_backward_bias_cpu));
  m.impl("conv2d_backward_input_cpu", TORCH_BOX((&conv2d_backward_input<check_tensor, backward_input>)));
  m.impl("conv2d_backward_weight_cpu", TORCH_BOX(&conv2d_backward_weight_cpu));
}

}  // namespace dlkern::ops

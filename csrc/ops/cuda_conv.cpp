// conv2d and conv_transpose2d, op layer of the CUDA column: conv2d_{forward,act_forward,backward_*},
// conv_transpose2d_forward. float32, bfloat16 and float16.
#include "conv_checks.h"
#include "cuda_common.h"
#include "cuda_conv_parts.h"
#include "cuda_precision.h"

namespace dlkern::ops {
namespace {

using cuda::ConvGeometry;
using cuda::ConvResult;
using cuda::ConvTensor;
using cuda::Element;

void check_tensor(const char* op, const char* name, const Tensor& x, const Tensor& first, int64_t dim) {
  check_device(op, name, x, first);
  check_element(op, first);
  check_dim_and_dtype(op, name, x, first, dim);
}

// As kernels take it; what they count in 32 bits fits.
ConvGeometry geometry_of(const char* op, const cpu::ConvShape& z) {
  constexpr int64_t kExtent = int64_t{1} << 28, kIndex = int64_t{1} << 30;
  const int64_t padded_h = z.h + 2 * z.pad_h, padded_w = z.w + 2 * z.pad_w;
  check(padded_h < kExtent && padded_w < kExtent && z.p * z.q < kIndex, op, ": an image of more than 2^28 rows or ",
        "columns or 2^30 pixels (cuda column)");
  check(z.r * z.s < kIndex && z.r * z.s * (z.c / z.groups) < kIndex && z.r * z.s * (z.k / z.groups) < kIndex, op,
        ": a filter of more than 2^30 elements (cuda column)");
  const auto least = [](int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); };
  ConvGeometry g{};
  g.n = z.n, g.c = z.c, g.k = z.k, g.groups = z.groups;
  g.h = static_cast<int>(z.h), g.w = static_cast<int>(z.w), g.r = static_cast<int>(z.r), g.s = static_cast<int>(z.s);
  g.p = static_cast<int>(z.p), g.q = static_cast<int>(z.q);
  // Larger strides and dilations than the image meet the same pixels.
  g.stride_h = least(z.stride_h, padded_h), g.stride_w = least(z.stride_w, padded_w);
  g.dilation_h = least(z.dilation_h, padded_h), g.dilation_w = least(z.dilation_w, padded_w);
  g.pad_h = static_cast<int>(z.pad_h), g.pad_w = static_cast<int>(z.pad_w);
  return g;
}

// Whether the kernels are to take vectors of channels. In 16-bit types a copy is cheaper than elements one by one, as
// which floats can be copied asynchronously: these must have images that lie so.
bool wants_vectors(Element element, const ConvGeometry& g, std::initializer_list<const Tensor*> images) {
  bool lie = true;
  for (const Tensor* x : images) lie = lie && x->stride(1) == 1;
  return conv2d_takes_vectors(element, g) && (is_16_bit(element) || lie);
}

// An operand in one of the two formats, and how a kernel sees it.
struct Operand {
  Tensor x;
  bool channels_last;

  Operand(const Tensor& given, bool vectors)
      : x(vectors ? aligned(torch::stable::contiguous(given, torch::headeronly::MemoryFormat::ChannelsLast))
                  : dense(given)),
        channels_last(vectors || is_channels_last(x)) {}
};

template <class View, class Void>
View view(const Tensor& x, bool channels_last, Void* data) {
  int64_t stride[4];
  fill_strides(x.sizes(), channels_last, stride);
  return {data, stride[0], stride[1], stride[2], stride[3]};
}
ConvTensor read(Call& call, const Operand& operand) {
  return view<ConvTensor>(operand.x, operand.channels_last, call.reads(operand.x));
}
ConvResult write(Call& call, const Tensor& x, bool channels_last) {
  return view<ConvResult>(x, channels_last, call.writes(x));
}

// ---- Forward ----

// activation(conv(input) + residual), all of it but the convolution optional.
Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& residual, Ints stride, Ints padding, Ints dilation, int64_t groups,
               int64_t activation) {
  const char* op = "conv2d_forward";
  check_tensor(op, "input", input, input, 4);
  check_tensor(op, "weight", weight, input, 4);
  const cpu::ConvShape z = shape_of(op, input.sizes(), weight.sizes(), stride, padding, dilation, groups);
  const ConvGeometry g = geometry_of(op, z);
  const std::optional<Tensor> b = checked_bias<check_tensor>(op, bias, input, z.k);
  const bool channels_last = suggests_channels_last(input) || suggests_channels_last(weight);
  check_activation(op, activation);
  if (residual) {
    check_tensor(op, "residual", *residual, input, 4);
    check_residual(op, *residual, z, channels_last);
  }
  const Element element = product_element(input, Products::convolutions);
  const bool vectors = wants_vectors(element, g, {&input});
  const Operand x(input, vectors), w(weight, vectors);
  Tensor output = allocate({z.n, z.k, z.p, z.q}, input.scalar_type(), input, channels_last);
  if (output.numel() == 0) return output;
  Call call(input);
  cuda::conv2d_forward(element, g, read(call, x), read(call, w), call.reads(b), call.reads(residual),
                       static_cast<int>(activation), write(call, output, channels_last), call.stream());
  return output;
}

Tensor conv2d_forward_cuda(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride,
                           Ints padding, Ints dilation, int64_t groups) {
  return forward(input, weight, bias, std::nullopt, stride, padding, dilation, groups, 0);
}

Tensor conv2d_act_forward_cuda(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                               const std::optional<Tensor>& residual, Ints stride, Ints padding, Ints dilation,
                               int64_t groups, int64_t activation) {
  return forward(input, weight, bias, residual, stride, padding, dilation, groups, activation);
}

// ---- Input gradient ----

// With a bias, a transposed convolution.
Tensor backward_input(const char* op, const cpu::ConvShape& z, const Tensor& grad_output, const Tensor& weight,
                      const std::optional<Tensor>& bias, bool channels_last) {
  const ConvGeometry g = geometry_of(op, z);
  const Element element = product_element(grad_output, Products::convolutions);
  const bool vectors = wants_vectors(element, g, {&grad_output});
  const Operand y(grad_output, vectors), w(weight, vectors);
  Tensor grad_input = allocate({z.n, z.c, z.h, z.w}, grad_output.scalar_type(), grad_output, channels_last);
  if (grad_input.numel() == 0) return grad_input;
  Call call(grad_output);
  cuda::conv2d_backward_input(element, g, read(call, y), read(call, w), call.reads(bias),
                              write(call, grad_input, channels_last), call.stream());
  return grad_input;
}

// ---- Gradients of weight and bias ----

Tensor backward_bias(Call& call, const ConvGeometry& g, const Operand& y) {
  Tensor grad_bias = allocate({g.k}, y.x.scalar_type(), y.x);
  void* result = call.writes(grad_bias);
  in_parts(call, element_of(y.x), conv2d_bias_parts(g), g.k, y.x, result, [&](float* sums) {
    cuda::conv2d_backward_bias(element_of(y.x), g, read(call, y), sums, result, call.stream());
  });
  return grad_bias;
}

Tensor conv2d_backward_bias_cuda(const Tensor& grad_output) {
  const char* op = "conv2d_backward_bias";
  check_tensor(op, "grad_output", grad_output, grad_output, 4);
  if (grad_output.numel() == 0) {
    Tensor nothing = allocate({grad_output.size(1)}, grad_output.scalar_type(), grad_output);
    return torch::stable::zero_(nothing);
  }
  cpu::ConvShape z{};  // of a 1 x 1 convolution with this output
  z.n = grad_output.size(0), z.k = grad_output.size(1), z.h = z.p = grad_output.size(2);
  z.w = z.q = grad_output.size(3), z.c = z.r = z.s = z.groups = 1;
  z.stride_h = z.stride_w = z.dilation_h = z.dilation_w = 1;
  const ConvGeometry g = geometry_of(op, z);
  const Operand y(grad_output, false);
  Call call(grad_output);
  return backward_bias(call, g, y);
}

std::tuple<Tensor, Tensor> conv2d_backward_weight_cuda(const Tensor& grad_output, const Tensor& input, Ints weight_size,
                                                       Ints stride, Ints padding, Ints dilation, int64_t groups,
                                                       bool bias, bool channels_last) {
  const char* op = "conv2d_backward_weight";
  check_tensor(op, "grad_output", grad_output, grad_output, 4);
  check_tensor(op, "input", input, grad_output, 4);
  const cpu::ConvShape z = shape_of(op, input.sizes(), weight_size, stride, padding, dilation, groups);
  check_grad_output(op, grad_output, z);
  const ConvGeometry g = geometry_of(op, z);
  Tensor grad_weight = allocate(weight_size, input.scalar_type(), input, channels_last);
  Tensor grad_bias = allocate({bias && z.n == 0 ? z.k : 0}, input.scalar_type(), input);
  if (z.n == 0)  // nothing to sum over
    return {torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias)};
  const Element element = product_element(input, Products::convolutions);
  const bool vectors = wants_vectors(element, g, {&grad_output, &input});
  const Operand y(grad_output, vectors), x(input, vectors);
  Call call(input);
  const ConvResult result = write(call, grad_weight, channels_last);
  in_parts(call, element, conv2d_weight_parts(element, g), grad_weight.numel(), input, result.data, [&](float* sums) {
    cuda::conv2d_backward_weight(element, g, read(call, y), read(call, x), sums, result, call.stream());
  });
  if (bias) grad_bias = backward_bias(call, g, y);
  return {grad_weight, grad_bias};
}

}  // namespace

DLKERN_REGISTER(DLKERN_CUDA_KEY, m) {
  m.impl("conv2d_forward_cuda", TORCH_BOX(&conv2d_forward_cuda));
  m.impl("conv2d_act_forward_cuda", TORCH_BOX(&conv2d_act_forward_cuda));
  m.impl("conv_transpose2d_forward_cuda", TORCH_BOX((&conv_transpose2d_forward<check_tensor, backward_input>)));
  m.impl("conv2d_backward_bias_cuda", TORCH_BOX(&conv2d_backward_bias_cuda));
  m.impl("conv2d_backward_input_cuda", TORCH_BOX((&conv2d_backward_input<check_tensor, backward_input>)));
  m.impl("conv2d_backward_weight_cuda", TORCH_BOX(&conv2d_backward_weight_cuda));
}

}  // namespace dlkern::ops

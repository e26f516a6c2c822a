// linear, op layer of the CUDA column: linear_forward, linear_backward_input, linear_backward_weight,
// activation_backward. bfloat16 and float16 by linear.cu; float32 as the 1 x 1 convolution of images of one pixel
// (conv.cu).
#include "cuda_linear.h"

#include "../cuda/linear.h"
#include "cuda_common.h"
#include "cuda_conv_parts.h"
#include "cuda_precision.h"

namespace dlkern::ops {
namespace {

constexpr int64_t kLargest = int64_t{1} << 31;  // rows or columns of a matrix, exclusive

void check_operand(const char* op, const char* name, const Tensor& x, const Tensor& first, int64_t min_dim) {
  check_device(op, name, x, first);
  check_element(op, first);
  check(x.scalar_type() == first.scalar_type(), op, ": ", name, " has another dtype than the first argument");
  check(x.dim() >= min_dim, op, ": ", name, " has ", x.dim(), " dimensions, expected at least ", min_dim);
}

// Product of all sizes but the last.
int64_t rows_of(const char* op, const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); d++) rows *= x.size(d);
  check(rows < kLargest && x.size(x.dim() - 1) < kLargest, op, ": more than 2^31 - 1 rows or columns");
  return rows;
}

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  auto size = to_vector(x.sizes());
  size.back() = last;
  return size;
}

bool is_float(const Tensor& x) { return x.scalar_type() == ScalarType::Float; }

// ---- float32: rows are images of one pixel, features their channels ----

cuda::ConvGeometry pixels(int64_t rows, int64_t in_features, int64_t out_features) {
  cuda::ConvGeometry g{};
  g.n = rows, g.c = in_features, g.k = out_features, g.groups = 1;
  g.h = g.w = g.r = g.s = g.p = g.q = g.stride_h = g.stride_w = g.dilation_h = g.dilation_w = 1;
  return g;
}
cuda::ConvTensor read(Call& call, const Tensor& x) {
  const int64_t row = x.size(x.dim() - 1);
  return {call.reads(x), row, 1, row, row};
}
cuda::ConvResult write(Call& call, const Tensor& x) {
  const int64_t row = x.size(x.dim() - 1);
  return {call.writes(x), row, 1, row, row};
}

void backward_weight_float(const Tensor& grad_output, const Tensor& input, Tensor& grad_weight, Tensor& grad_bias,
                           int64_t rows) {
  const int64_t out_features = grad_weight.size(0), in_features = grad_weight.size(1);
  const cuda::ConvGeometry g = pixels(rows, in_features, out_features);
  const cuda::Element element = product_element(input, Products::matrices);
  Call call(input);
  if (in_features > 0) {
    const cuda::ConvResult result = write(call, grad_weight);
    in_parts(call, element, cuda::conv2d_weight_parts(element, g), grad_weight.numel(), input, result.data,
             [&](float* sums) {
               cuda::conv2d_backward_weight(element, g, read(call, grad_output), read(call, input), sums, result,
                                            call.stream());
             });
  }
  if (grad_bias.numel() == 0) return;
  void* result = call.writes(grad_bias);
  in_parts(call, element, cuda::conv2d_bias_parts(g), out_features, input, result, [&](float* sums) {
    cuda::conv2d_backward_bias(element, g, read(call, grad_output), sums, result, call.stream());
  });
}

}  // namespace

// ---- The ops ----

Tensor linear_forward_cuda(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                           int64_t activation) {
  const char* op = "linear";
  check_operand(op, "input", input, input, 1);
  check_operand(op, "weight", weight, input, 2);
  check(weight.dim() == 2, op, ": weight has ", weight.dim(), " dimensions, expected 2");
  check(activation >= 0 && activation <= 3, op, ": no activation ", activation);
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  check(input.size(input.dim() - 1) == in_features, op, ": input has ", input.size(input.dim() - 1),
        " features, weight takes ", in_features);
  if (bias) {
    check_operand(op, "bias", *bias, input, 1);
    check(bias->dim() == 1 && bias->size(0) == out_features, op, ": bias is not [", out_features, "]");
  }
  const int64_t rows = rows_of(op, input);
  const Tensor x = torch::stable::contiguous(input), w = torch::stable::contiguous(weight);
  const std::optional<Tensor> b = as_contiguous(bias);
  Tensor output = allocate(with_last(input, out_features), input.scalar_type(), input);
  if (output.numel() == 0) return output;
  Call call(x);
  if (is_float(x)) {
    cuda::conv2d_forward(product_element(x, Products::matrices), pixels(rows, in_features, out_features), read(call, x),
                         read(call, w), call.reads(b), nullptr, static_cast<int>(activation), write(call, output),
                         call.stream());
    return output;
  }
  cuda::linear_forward(element_of(x), call.reads(x), call.reads(w), call.reads(b), call.writes(output), rows,
                       in_features, out_features, static_cast<int>(activation), call.stream());
  return output;
}

Tensor linear_backward_input_cuda(const Tensor& grad_output, const Tensor& weight) {
  const char* op = "linear_backward_input";
  check_operand(op, "grad_output", grad_output, grad_output, 1);
  check_operand(op, "weight", weight, grad_output, 2);
  check(weight.dim() == 2, op, ": weight has ", weight.dim(), " dimensions, expected 2");
  const int64_t out_features = weight.size(0), in_features = weight.size(1);
  check(grad_output.size(grad_output.dim() - 1) == out_features, op, ": grad_output has ",
        grad_output.size(grad_output.dim() - 1), " features, weight makes ", out_features);
  const int64_t rows = rows_of(op, grad_output);
  const Tensor g = torch::stable::contiguous(grad_output), w = torch::stable::contiguous(weight);
  Tensor grad_input = allocate(with_last(grad_output, in_features), g.scalar_type(), grad_output);
  if (grad_input.numel() == 0) return grad_input;
  Call call(g);
  if (is_float(g)) {
    cuda::conv2d_backward_input(product_element(g, Products::matrices), pixels(rows, in_features, out_features),
                                read(call, g), read(call, w), nullptr, write(call, grad_input), call.stream());
    return grad_input;
  }
  cuda::linear_backward_input(element_of(g), call.reads(g), call.reads(w), call.writes(grad_input), rows, in_features,
                              out_features, call.stream());
  return grad_input;
}

std::tuple<Tensor, Tensor> linear_backward_weight_cuda(const Tensor& grad_output, const Tensor& input, bool bias) {
  const char* op = "linear_backward_weight";
  check_operand(op, "grad_output", grad_output, grad_output, 1);
  check_operand(op, "input", input, grad_output, 1);
  check(grad_output.dim() == input.dim(), op, ": grad_output and input differ in dimensions");
  for (int64_t d = 0; d + 1 < input.dim(); d++)
    check(grad_output.size(d) == input.size(d), op, ": grad_output and input differ in size ", d);
  const int64_t out_features = grad_output.size(grad_output.dim() - 1), in_features = input.size(input.dim() - 1);
  const int64_t rows = rows_of(op, input);
  const Tensor g = torch::stable::contiguous(grad_output), x = torch::stable::contiguous(input);
  Tensor grad_weight = allocate({out_features, in_features}, input.scalar_type(), input);
  Tensor grad_bias = allocate({bias ? out_features : 0}, input.scalar_type(), input);
  if (out_features == 0 || (in_features == 0 && !bias)) return {grad_weight, grad_bias};
  if (is_float(x) && rows == 0) return {torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias)};
  if (is_float(x)) {
    backward_weight_float(g, x, grad_weight, grad_bias, rows);
    return {grad_weight, grad_bias};
  }
  Call call(g);
  cuda::linear_backward_weight(element_of(g), call.reads(g), call.reads(x), call.writes(grad_weight),
                               bias ? call.writes(grad_bias) : nullptr, rows, in_features, out_features, call.stream());
  return {grad_weight, grad_bias};
}

namespace {

Tensor activation_backward_cuda(const Tensor& grad_output, const Tensor& output, int64_t activation) {
  const char* op = "activation_backward";
  check_operand(op, "grad_output", grad_output, grad_output, 0);
  check_operand(op, "output", output, grad_output, 0);
  check(activation >= 0 && activation <= 3, op, ": no activation ", activation);
  check(to_vector(grad_output.sizes()) == to_vector(output.sizes()), op, ": grad_output and output differ in size");
  const Tensor g = aligned(torch::stable::contiguous(grad_output)), y = aligned(torch::stable::contiguous(output));
  Tensor grad_input = allocate(to_vector(g.sizes()), g.scalar_type(), g);
  if (grad_input.numel() == 0) return grad_input;
  Call call(g);
  cuda::activation_backward(element_of(g), call.reads(g), call.reads(y), call.writes(grad_input), g.numel(),
                            static_cast<int>(activation), call.stream());
  return grad_input;
}

}  // namespace

DLKERN_REGISTER(DLKERN_CUDA_KEY, m) {
  m.impl("linear_forward_cuda", TORCH_BOX(&linear_forward_cuda));
  m.impl("linear_backward_input_cuda", TORCH_BOX(&linear_backward_input_cuda));
  m.impl("linear_backward_weight_cuda", TORCH_BOX(&linear_backward_weight_cuda));
  m.impl("activation_backward_cuda", TORCH_BOX(&activation_backward_cuda));
}

}  // namespace dlkern::ops

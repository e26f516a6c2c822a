// What the columns' op layers of conv share: checks of everything a kernel relies on, with torch's exception types.
#pragma once
#include <array>

#include "../cpu/conv.h"
#include "common.h"

namespace dlkern::ops {

inline void check_dim_and_dtype(const char* op, const char* name, const Tensor& x, const Tensor& like, int64_t dim) {
  check(x.dim() == dim, op, ": expected a ", dim, "-D ", name, ", but got ", x.dim(), " dimensions");
  check(x.scalar_type() == like.scalar_type(), op, ": ", name, " has another dtype than the first argument");
}

// Settings are bounded so that no product below can overflow.
inline constexpr int64_t kLargest = int64_t{1} << 31;

inline cpu::ConvShape shape_of(const char* op, Ints input, Ints weight, Ints stride, Ints padding, Ints dilation,
                               int64_t groups) {
  check<std::invalid_argument>(input.size() == 4 && weight.size() == 4, op, ": expected sizes of 4 dimensions");
  check<std::invalid_argument>(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                               ": stride, padding and dilation must have two elements each");
  for (int i : {0, 1}) {
    check<std::invalid_argument>(stride[i] > 0 && stride[i] < kLargest, op, ": non-positive stride is not supported");
    check<std::invalid_argument>(padding[i] >= 0 && padding[i] < kLargest, op, ": negative padding is not supported");
    check<std::invalid_argument>(dilation[i] > 0 && dilation[i] < kLargest, op,
                                 ": dilation should be greater than zero");
  }
  for (int64_t size : input) check<std::invalid_argument>(size >= 0 && size < kLargest, op, ": size out of range");
  for (int64_t size : weight)
    check<std::invalid_argument>(size > 0 && size < kLargest, op, ": weight size out of range");
  check<std::invalid_argument>(input[1] > 0 && input[2] > 0 && input[3] > 0, op,
                               ": only the batch may be empty, but got input of size ", Shown{input});
  check<std::invalid_argument>(groups > 0, op, ": non-positive groups is not supported");
  check<std::invalid_argument>(input[1] % groups == 0 && input[1] / groups == weight[1] && weight[0] % groups == 0, op,
                               ": Given groups=", groups, " and weight of size ", Shown{weight}, ", input of size ",
                               Shown{input}, " does not fit");
  cpu::ConvShape z{};
  z.n = input[0], z.c = input[1], z.h = input[2], z.w = input[3];
  z.k = weight[0], z.r = weight[2], z.s = weight[3];
  z.stride_h = stride[0], z.stride_w = stride[1];
  z.pad_h = padding[0], z.pad_w = padding[1];
  z.dilation_h = dilation[0], z.dilation_w = dilation[1];
  z.groups = groups;
  const int64_t reach_h = z.dilation_h * (z.r - 1) + 1, reach_w = z.dilation_w * (z.s - 1) + 1;
  check<std::invalid_argument>(z.h + 2 * z.pad_h >= reach_h && z.w + 2 * z.pad_w >= reach_w, op,
                               ": Calculated padded input size per channel: (", z.h + 2 * z.pad_h, " x ",
                               z.w + 2 * z.pad_w, "). Kernel size: (", reach_h, " x ", reach_w,
                               "). Kernel size can't be greater than actual input size");
  z.p = (z.h + 2 * z.pad_h - reach_h) / z.stride_h + 1;
  z.q = (z.w + 2 * z.pad_w - reach_w) / z.stride_w + 1;
  using Wide = __int128;
  const Wide limit = Wide{1} << 56;
  auto elements = [](int64_t a, int64_t b, int64_t c, int64_t d) { return Wide{a} * b * (Wide{c} * d); };
  check<std::invalid_argument>(Wide{z.p} * z.q < limit && Wide{z.h} * z.w < limit &&
                                   elements(z.n, z.c, z.h, z.w) < limit && elements(z.n, z.k, z.p, z.q) < limit &&
                                   elements(z.k, weight[1], z.r, z.s) < limit,
                               op, ": sizes too large");
  return z;
}

// x, or a contiguous copy of it where its elements are dense in neither layout.
inline Tensor dense(const Tensor& x) { return layout_of(x) == Layout::other ? torch::stable::contiguous(x) : x; }
inline bool is_channels_last(const Tensor& x) { return layout_of(x) == Layout::channels_last; }

// What a column checks of each tensor: its device, dtype and dimensions.
using CheckTensor = void(const char* op, const char* name, const Tensor& x, const Tensor& like, int64_t dim);

template <CheckTensor check_tensor>
std::optional<Tensor> checked_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& input,
                                   int64_t size) {
  if (!bias) return bias;
  check_tensor(op, "bias", *bias, input, 1);
  check<std::invalid_argument>(bias->size(0) == size, op, ": expected bias to have ", size, " elements, but got ",
                               bias->size(0));
  return as_contiguous(*bias);
}

// A residual is laid out as the output is.
inline void check_residual(const char* op, const Tensor& residual, const cpu::ConvShape& z, bool channels_last) {
  const int64_t expected[] = {z.n, z.k, z.p, z.q};
  check<std::invalid_argument>(same_sizes(residual.sizes(), expected), op, ": expected a residual of size ",
                               Shown{expected}, ", but got ", Shown{residual.sizes()});
  int64_t stride_expected[4];
  fill_strides(expected, channels_last, stride_expected);
  for (int d = 0; d < 4; ++d)
    check<std::invalid_argument>(expected[d] <= 1 || residual.strides()[d] == stride_expected[d], op,
                                 ": the residual is not laid out as the output");
}

inline void check_grad_output(const char* op, const Tensor& grad_output, const cpu::ConvShape& z) {
  const int64_t expected[] = {z.n, z.k, z.p, z.q};
  check<std::invalid_argument>(same_sizes(grad_output.sizes(), expected), op, ": expected grad_output of size ",
                               Shown{expected}, ", but got ", Shown{grad_output.sizes()});
}

// The size of a transposed convolution's output. Here output_padding is less than stride: then convolving the output
// gives back the input's size.
inline std::array<int64_t, 4> transposed_size(const char* op, Ints input, Ints weight, Ints stride, Ints padding,
                                              Ints output_padding, int64_t groups, Ints dilation) {
  check<std::invalid_argument>(groups > 0 && groups < kLargest, op, ": non-positive groups is not supported");
  check<std::invalid_argument>(
      stride.size() == 2 && padding.size() == 2 && output_padding.size() == 2 && dilation.size() == 2, op,
      ": stride, padding, output_padding and dilation must have two elements each");
  std::array<int64_t, 4> size = {input[0], weight[1] * groups, 0, 0};
  for (int i : {0, 1}) {
    for (int64_t setting : {stride[i], padding[i], output_padding[i], dilation[i]})
      check<std::invalid_argument>(setting >= 0 && setting < kLargest, op, ": a setting is out of range");
    check<std::invalid_argument>(output_padding[i] < stride[i], op, ": output padding must be smaller than stride");
    check<std::invalid_argument>(input[2 + i] > 0 && input[2 + i] < kLargest && weight[2 + i] < kLargest, op,
                                 ": size out of range");
    size[2 + i] =
        (input[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight[2 + i] - 1) + output_padding[i] + 1;
    check<std::invalid_argument>(size[2 + i] > 0, op, ": the output would have no pixels");
  }
  return size;
}

// The gradient of a convolution's input, of a column's kernels; with a bias, a transposed convolution.
using BackwardInput = Tensor(const char* op, const cpu::ConvShape& z, const Tensor& grad_output, const Tensor& weight,
                             const std::optional<Tensor>& bias, bool channels_last);

template <CheckTensor check_tensor, BackwardInput backward_input>
Tensor conv2d_backward_input(const Tensor& grad_output, const Tensor& weight, Ints input_size, Ints stride,
                             Ints padding, Ints dilation, int64_t groups, bool channels_last) {
  const char* op = "conv2d_backward_input";
  check_tensor(op, "grad_output", grad_output, grad_output, 4);
  check_tensor(op, "weight", weight, grad_output, 4);
  const cpu::ConvShape z = shape_of(op, input_size, weight.sizes(), stride, padding, dilation, groups);
  check_grad_output(op, grad_output, z);
  return backward_input(op, z, grad_output, weight, std::nullopt, channels_last);
}

template <CheckTensor check_tensor, BackwardInput backward_input>
Tensor conv_transpose2d_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                Ints stride, Ints padding, Ints output_padding, int64_t groups, Ints dilation) {
  const char* op = "conv_transpose2d_forward";
  check_tensor(op, "input", input, input, 4);
  check_tensor(op, "weight", weight, input, 4);
  const auto size =
      transposed_size(op, input.sizes(), weight.sizes(), stride, padding, output_padding, groups, dilation);
  const cpu::ConvShape z = shape_of(op, size, weight.sizes(), stride, padding, dilation, groups);
  check_grad_output(op, input, z);
  const bool channels_last = suggests_channels_last(input) || suggests_channels_last(weight);
  return backward_input(op, z, input, weight, checked_bias<check_tensor>(op, bias, input, z.c), channels_last);
}

}  // namespace dlkern::ops

// conv2d and conv_transpose2d, op layer: dlkern::conv2d_{forward,act_forward,backward_*}_cpu,
// conv_transpose2d_forward_cpu, and conv2d_{pack,forward_packed}_cpu for weights that stay (dlkern.freeze).
// Everything a kernel relies on is checked here; what is dense in neither layout is copied.
#include "../cpu/conv.h"

#include "common.h"

namespace dlkern::ops {
namespace {

std::string text(Ints sizes) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << "]";
  return out.str();
}

void check_tensor(const char* op, const char* name, const Tensor& x, const Tensor& like, int64_t dim) {
  check(x.is_cpu(), op, ": ", name, " is not on the CPU");
  check(x.dim() == dim, op, ": expected a ", dim, "-D ", name, ", but got ", x.dim(), " dimensions");
  check(x.scalar_type() == like.scalar_type(), op, ": ", name, " has another dtype than the first argument");
}

// Settings are bounded so that no product below can overflow.
constexpr int64_t kLargest = int64_t{1} << 31;

cpu::ConvShape shape_of(const char* op, Ints input, Ints weight, Ints stride, Ints padding, Ints dilation,
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
                               ": only the batch may be empty, but got input of size ", text(input));
  check<std::invalid_argument>(groups > 0, op, ": non-positive groups is not supported");
  check<std::invalid_argument>(input[1] % groups == 0 && input[1] / groups == weight[1] && weight[0] % groups == 0, op,
                               ": Given groups=", groups, " and weight of size ", text(weight), ", input of size ",
                               text(input), " does not fit");
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
Tensor dense(const Tensor& x) { return layout_of(x) == Layout::other ? torch::stable::contiguous(x) : x; }
bool is_channels_last(const Tensor& x) { return layout_of(x) == Layout::channels_last; }

std::optional<Tensor> checked_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& input,
                                   int64_t size) {
  if (!bias) return bias;
  check_tensor(op, "bias", *bias, input, 1);
  check<std::invalid_argument>(bias->size(0) == size, op, ": expected bias to have ", size, " elements, but got ",
                               bias->size(0));
  return as_contiguous(*bias);
}

// The dtype packed weights are in: what sums are carried in.
ScalarType packed_dtype(ScalarType dtype) { return dtype == ScalarType::BFloat16 ? ScalarType::Float : dtype; }

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
  const std::optional<Tensor> b = checked_bias(op, bias, input, z.k);
  const bool channels_last = suggests_channels_last(input) || suggests_channels_last(weight);
  const Tensor x = dense(input), w = dense(weight);
  check(activation >= 0 && activation <= 3, op, ": no activation ", activation);
  if (residual) {
    check_tensor(op, "residual", *residual, input, 4);
    const int64_t expected[] = {z.n, z.k, z.p, z.q};
    check<std::invalid_argument>(same_sizes(residual->sizes(), expected), op, ": expected a residual of size ",
                                 text(expected), ", but got ", text(residual->sizes()));
    int64_t stride_expected[4];
    fill_strides(expected, channels_last, stride_expected);
    for (int d = 0; d < 4; ++d)
      check<std::invalid_argument>(expected[d] <= 1 || residual->strides()[d] == stride_expected[d], op,
                                   ": the residual is not laid out as the output");
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

void check_grad_output(const char* op, const Tensor& grad_output, const cpu::ConvShape& z) {
  const int64_t expected[] = {z.n, z.k, z.p, z.q};
  check<std::invalid_argument>(same_sizes(grad_output.sizes(), expected), op, ": expected grad_output of size ",
                               text(expected), ", but got ", text(grad_output.sizes()));
}

// The gradient of a convolution's input; with a bias, a transposed convolution.
Tensor backward_input(const char* op, const cpu::ConvShape& z, const Tensor& grad_output, const Tensor& weight,
                      const std::optional<Tensor>& bias, bool channels_last) {
  check_grad_output(op, grad_output, z);
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

Tensor conv2d_backward_input_cpu(const Tensor& grad_output, const Tensor& weight, Ints input_size, Ints stride,
                                 Ints padding, Ints dilation, int64_t groups, bool channels_last) {
  const char* op = "conv2d_backward_input";
  check_tensor(op, "grad_output", grad_output, grad_output, 4);
  check_tensor(op, "weight", weight, grad_output, 4);
  const cpu::ConvShape z = shape_of(op, input_size, weight.sizes(), stride, padding, dilation, groups);
  return backward_input(op, z, grad_output, weight, std::nullopt, channels_last);
}

// Here output_padding is less than stride: then convolving the output gives back the input's size.
Tensor conv_transpose2d_forward_cpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                    Ints stride, Ints padding, Ints output_padding, int64_t groups, Ints dilation) {
  const char* op = "conv_transpose2d_forward";
  check_tensor(op, "input", input, input, 4);
  check_tensor(op, "weight", weight, input, 4);
  check<std::invalid_argument>(groups > 0 && groups < kLargest, op, ": non-positive groups is not supported");
  check<std::invalid_argument>(
      stride.size() == 2 && padding.size() == 2 && output_padding.size() == 2 && dilation.size() == 2, op,
      ": stride, padding, output_padding and dilation must have two elements each");
  int64_t size[4] = {input.size(0), weight.size(1) * groups, 0, 0};
  for (int i : {0, 1}) {
    for (int64_t setting : {stride[i], padding[i], output_padding[i], dilation[i]})
      check<std::invalid_argument>(setting >= 0 && setting < kLargest, op, ": a setting is out of range");
    check<std::invalid_argument>(output_padding[i] < stride[i], op, ": output padding must be smaller than stride");
    check<std::invalid_argument>(input.size(2 + i) > 0 && input.size(2 + i) < kLargest && weight.size(2 + i) < kLargest,
                                 op, ": size out of range");
    size[2 + i] = (input.size(2 + i) - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.size(2 + i) - 1) +
                  output_padding[i] + 1;
    check<std::invalid_argument>(size[2 + i] > 0, op, ": the output would have no pixels");
  }
  const cpu::ConvShape z = shape_of(op, size, weight.sizes(), stride, padding, dilation, groups);
  const bool channels_last = suggests_channels_last(input) || suggests_channels_last(weight);
  return backward_input(op, z, input, weight, checked_bias(op, bias, input, z.c), channels_last);
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
  m.impl("conv_transpose2d_forward_cpu", TORCH_BOX(&conv_transpose2d_forward_cpu));
  m.impl("conv2d_backward_bias_cpu", TORCH_BOX(&conv2d_backward_bias_cpu));
  m.impl("conv2d_backward_input_cpu", TORCH_BOX(&conv2d_backward_input_cpu));
  m.impl("conv2d_backward_weight_cpu", TORCH_BOX(&conv2d_backward_weight_cpu));
}

}  // namespace dlkern::ops

// Pooling, op layer: max_pool2d, avg_pool2d, lp_pool2d, adaptive_avg_pool2d, adaptive_max_pool2d and their backwards.
#include "../cpu/pooling.h"

#include <array>

#include "common.h"

namespace dlkern::ops {
namespace {

using cpu::IndexKind;
using cpu::PoolShape;

constexpr int64_t kLargest = int64_t{1} << 31;  // of a window's extents, so that no product overflows

void check_floating(const Tensor& x, const char* op) {
  const ScalarType dtype = x.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double || is_reduced(dtype), op,
        ": expected float32, float64, bfloat16 or float16");
}

// Windows along one dimension: rounded up in ceil_mode, but none starts beyond the input and the left padding.
int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, bool ceil_mode) {
  const int64_t last = size + 2 * pad - dilation * (kernel - 1) - 1;
  if (last < 0 && !(ceil_mode && last + stride - 1 >= 0)) return 0;
  int64_t count = (last + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  if (ceil_mode && (count - 1) * stride >= size + pad) --count;
  return count;
}

// Kernel size, stride, (not of lp_pool2d) padding and (of max_pool2d) dilation, in pairs. One list, because each list of ints that crosses
// from Python costs as much as a small pooling.
struct Window {
  Ints kernel, stride, pad, dilation;

  Window(const char* op, Ints ints, size_t pairs) {
    check<std::invalid_argument>(ints.size() == 2 * pairs, op, ": a window takes ", 2 * pairs, " ints, got ",
                                 ints.size());
    kernel = Ints(ints.data(), 2);
    stride = Ints(ints.data() + 2, 2);
    pad = Ints(pairs >= 3 ? ints.data() + 4 : kNoPadding, 2);
    dilation = Ints(pairs == 4 ? ints.data() + 6 : kNoDilation, 2);
  }

 private:
  static constexpr int64_t kNoPadding[2] = {0, 0}, kNoDilation[2] = {1, 1};
};

// Checks the window and the input's sizes and works out the output's.
PoolShape pool_shape(const char* op, Ints size, const Window& window, bool ceil_mode, bool channels_last) {
  check<std::invalid_argument>(size.size() == 4, op, ": expected a 4-D tensor, got ", size.size(), " dimensions");
  for (const Ints& ints : {window.kernel, window.stride, window.pad, window.dilation})
    for (int64_t i : ints) check<std::invalid_argument>(i < kLargest, op, ": ", i, " is too large for a window");
  const Ints k = window.kernel, s = window.stride, p = window.pad, d = window.dilation;
  check(k[0] > 0 && k[1] > 0, "kernel size should be greater than zero, but got kH: ", k[0], " kW: ", k[1]);
  check(s[0] > 0 && s[1] > 0, "stride should be greater than zero, but got dH: ", s[0], " dW: ", s[1]);
  check(d[0] > 0 && d[1] > 0, "dilation should be greater than zero, but got dilationH: ", d[0], " dilationW: ", d[1]);
  for (int i : {0, 1}) {
    check(p[i] >= 0, "pad must be non-negative, but got pad: ", p[i]);
    check(2 * p[i] <= k[i], "pad should be at most half of effective kernel size, but got pad=", p[i],
          ", kernel_size=", k[i], " and dilation=", d[i]);
    check(size[i + 2] > 0 && size[i + 2] < kLargest, op, ": expected rows and columns, got [", size[2], ", ", size[3],
          "]");
  }
  check(size[0] >= 0 && size[1] > 0, op, ": expected at least one channel, got [", size[0], ", ", size[1], ", ...]");
  PoolShape shape{size[0], size[1], size[2], size[3], 0,    0,    k[0],         k[1],
                  s[0],    s[1],    p[0],    p[1],    d[0], d[1], channels_last};
  shape.out_h = output_size(size[2], k[0], s[0], p[0], d[0], ceil_mode);
  shape.out_w = output_size(size[3], k[1], s[1], p[1], d[1], ceil_mode);
  check(shape.out_h > 0 && shape.out_w > 0, "Given input size: (", size[1], "x", size[2], "x", size[3],
        "). Calculated output size: (", size[1], "x", shape.out_h, "x", shape.out_w, "). Output size is too small");
  return shape;
}

std::array<int64_t, 4> input_size(const PoolShape& s) { return {s.n, s.c, s.h, s.w}; }
std::array<int64_t, 4> pooled_size(const PoolShape& s) { return {s.n, s.c, s.out_h, s.out_w}; }

void check_size(const Tensor& x, const std::array<int64_t, 4>& size, const char* op, const char* name) {
  check<std::invalid_argument>(same_sizes(x.sizes(), size), op, ": ", name, " has the wrong sizes for these windows");
}

// x with its elements in the order that `channels_last` says.
Tensor ordered(const Tensor& x, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  const Layout layout = layout_of(x);
  if (layout == (channels_last ? Layout::channels_last : Layout::contiguous)) return x;
  // Contiguous in both senses: one channel, or one pixel.
  if (channels_last && layout == Layout::contiguous && (x.size(1) == 1 || x.size(2) * x.size(3) == 1)) return x;
  return torch::stable::contiguous(x, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

std::tuple<Tensor, Tensor> max_pool2d_forward_cpu(const Tensor& input, Ints window, bool ceil_mode, int64_t indices) {
  const char* op = "max_pool2d";
  check_floating(input, op);
  const bool channels_last = suggests_channels_last(input);
  const PoolShape shape = pool_shape(op, input.sizes(), {op, window, 4}, ceil_mode, channels_last);
  check<std::invalid_argument>(indices >= 0 && indices <= 2, op, ": indices must be 0, 1 or 2, got ", indices);
  check<std::invalid_argument>(indices != 1 || shape.kernel_h * shape.kernel_w <= 256, op,
                               ": a window of more than 256 elements needs int64 indices");
  const Tensor x = ordered(input, channels_last);
  Tensor output = allocate(pooled_size(shape), x.scalar_type(), x, channels_last);
  Tensor winners =
      indices == 0 ? allocate({0}, ScalarType::Byte, x)
                   : allocate(pooled_size(shape), indices == 1 ? ScalarType::Byte : ScalarType::Long, x, channels_last);
  if (output.numel() == 0) return {output, winners};
  dispatch_floating(x.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::MaxPoolArgs<T> args{shape, data<T>(x), mutable_data<T>(output), static_cast<IndexKind>(indices),
                             winners.mutable_data_ptr()};
    DLKERN_CALL(max_pool2d_forward, args);
  });
  return {output, winners};
}

Tensor max_pool2d_backward_cpu(const Tensor& grad_output, const Tensor& indices, Ints size, Ints window,
                               bool channels_last) {
  const char* op = "max_pool2d_backward";
  check_floating(grad_output, op);
  check<std::invalid_argument>(grad_output.dim() == 4, op, ": expected a 4-D grad_output");
  // ceil_mode is not an argument: the gradient's own sizes say it.
  PoolShape shape = pool_shape(op, size, {op, window, 4}, true, channels_last);
  const int64_t floor_h = output_size(size[2], window[0], window[2], window[4], window[6], false);
  const int64_t floor_w = output_size(size[3], window[1], window[3], window[5], window[7], false);
  if (grad_output.size(2) == floor_h) shape.out_h = floor_h;
  if (grad_output.size(3) == floor_w) shape.out_w = floor_w;
  check_size(grad_output, pooled_size(shape), op, "grad_output");
  check_size(indices, pooled_size(shape), op, "indices");
  const bool offsets = indices.scalar_type() == ScalarType::Byte;
  check(offsets || indices.scalar_type() == ScalarType::Long, op, ": indices must be uint8 or int64");
  check<std::invalid_argument>(indices.is_cpu(), op, ": indices must be on the CPU");
  const Tensor g = ordered(grad_output, channels_last), winners = ordered(indices, channels_last);
  Tensor grad_input = allocate(input_size(shape), g.scalar_type(), g, channels_last);
  if (grad_input.numel() == 0) return grad_input;
  dispatch_floating(g.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::MaxPoolBackwardArgs<T> args{shape, data<T>(g), offsets ? IndexKind::offset8 : IndexKind::flat64,
                                     winners.const_data_ptr(), mutable_data<T>(grad_input)};
    DLKERN_CALL(max_pool2d_backward, args);
  });
  return grad_input;
}

Tensor avg_pool2d_forward_cpu(const Tensor& input, Ints window, bool ceil_mode, bool count_include_pad,
                              std::optional<int64_t> divisor_override) {
  const char* op = "avg_pool2d";
  check_floating(input, op);
  check(divisor_override.value_or(1) != 0, "divisor must be not zero");
  const bool channels_last = suggests_channels_last(input);
  const PoolShape shape = pool_shape(op, input.sizes(), {op, window, 3}, ceil_mode, channels_last);
  const Tensor x = ordered(input, channels_last);
  Tensor output = allocate(pooled_size(shape), x.scalar_type(), x, channels_last);
  if (output.numel() == 0) return output;
  dispatch_floating(x.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::AvgPoolArgs<T> args{shape, count_include_pad, divisor_override.value_or(0), data<T>(x),
                             mutable_data<T>(output)};
    DLKERN_CALL(avg_pool2d_forward, args);
  });
  return output;
}

Tensor avg_pool2d_backward_cpu(const Tensor& grad_output, Ints size, Ints window, bool ceil_mode,
                               bool count_include_pad, std::optional<int64_t> divisor_override, bool channels_last) {
  const char* op = "avg_pool2d_backward";
  check_floating(grad_output, op);
  check(divisor_override.value_or(1) != 0, "divisor must be not zero");
  const PoolShape shape = pool_shape(op, size, {op, window, 3}, ceil_mode, channels_last);
  check_size(grad_output, pooled_size(shape), op, "grad_output");
  const Tensor g = ordered(grad_output, channels_last);
  Tensor grad_input = allocate(input_size(shape), g.scalar_type(), g, channels_last);
  if (grad_input.numel() == 0) return grad_input;
  dispatch_floating(g.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::AvgPoolArgs<T> args{shape, count_include_pad, divisor_override.value_or(0), data<T>(g),
                             mutable_data<T>(grad_input)};
    DLKERN_CALL(avg_pool2d_backward, args);
  });
  return grad_input;
}

PoolShape adaptive_shape(const char* op, Ints size, Ints output, bool channels_last) {
  check<std::invalid_argument>(size.size() == 4, op, ": expected a 4-D tensor, got ", size.size(), " dimensions");
  check<std::invalid_argument>(output.size() == 2, op, ": output_size must be 2");
  for (int i : {0, 1}) {
    check(output[i] >= 0 && output[i] < kLargest, op,
          ": elements of output_size must be greater than or equal to 0 but received {", output[0], ", ", output[1],
          "}");
    check(size[i] >= 0 && size[i + 2] > 0 && size[i + 2] < kLargest, op,
          ": Expected input to have non-zero size for non-batch dimensions, got [", size[0], ", ", size[1], ", ",
          size[2], ", ", size[3], "]");
  }
  PoolShape shape{};
  shape.n = size[0];
  shape.c = size[1];
  shape.h = size[2];
  shape.w = size[3];
  shape.out_h = output[0];
  shape.out_w = output[1];
  shape.channels_last = channels_last;
  return shape;
}

Tensor adaptive_avg_pool2d_forward_cpu(const Tensor& input, Ints output_size) {
  const char* op = "adaptive_avg_pool2d";
  check_floating(input, op);
  const bool channels_last = suggests_channels_last(input);
  const PoolShape shape = adaptive_shape(op, input.sizes(), output_size, channels_last);
  const Tensor x = ordered(input, channels_last);
  Tensor output = allocate(pooled_size(shape), x.scalar_type(), x, channels_last);
  if (output.numel() == 0) return output;
  dispatch_floating(x.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::AdaptivePoolArgs<T> args{shape, data<T>(x), mutable_data<T>(output)};
    DLKERN_CALL(adaptive_avg_pool2d_forward, args);
  });
  return output;
}

Tensor adaptive_avg_pool2d_backward_cpu(const Tensor& grad_output, Ints size, bool channels_last) {
  const char* op = "adaptive_avg_pool2d_backward";
  check_floating(grad_output, op);
  check<std::invalid_argument>(grad_output.dim() == 4, op, ": expected a 4-D grad_output");
  const PoolShape shape = adaptive_shape(op, size, Ints(grad_output.sizes().data() + 2, 2), channels_last);
  check_size(grad_output, pooled_size(shape), op, "grad_output");
  const Tensor g = ordered(grad_output, channels_last);
  Tensor grad_input = allocate(input_size(shape), g.scalar_type(), g, channels_last);
  if (grad_input.numel() == 0) return grad_input;
  if (g.numel() == 0) return torch::stable::zero_(grad_input);
  dispatch_floating(g.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::AdaptivePoolArgs<T> args{shape, data<T>(g), mutable_data<T>(grad_input)};
    DLKERN_CALL(adaptive_avg_pool2d_backward, args);
  });
  return grad_input;
}

std::tuple<Tensor, Tensor> adaptive_max_pool2d_forward_cpu(const Tensor& input, Ints output_size) {
  const char* op = "adaptive_max_pool2d";
  check_floating(input, op);
  const bool channels_last = suggests_channels_last(input);
  const PoolShape shape = adaptive_shape(op, input.sizes(), output_size, channels_last);
  check(shape.c > 0, op, ": expected at least one channel");
  const Tensor x = ordered(input, channels_last);
  Tensor output = allocate(pooled_size(shape), x.scalar_type(), x, channels_last);
  Tensor indices = allocate(pooled_size(shape), ScalarType::Long, x, channels_last);
  if (output.numel() == 0) return {output, indices};
  dispatch_floating(x.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::AdaptiveMaxPoolArgs<T> args{shape, data<T>(x), mutable_data<T>(output), mutable_data<int64_t>(indices)};
    DLKERN_CALL(adaptive_max_pool2d_forward, args);
  });
  return {output, indices};
}

Tensor adaptive_max_pool2d_backward_cpu(const Tensor& grad_output, const Tensor& indices, Ints size,
                                        bool channels_last) {
  const char* op = "adaptive_max_pool2d_backward";
  check_floating(grad_output, op);
  check<std::invalid_argument>(grad_output.dim() == 4, op, ": expected a 4-D grad_output");
  const PoolShape shape = adaptive_shape(op, size, Ints(grad_output.sizes().data() + 2, 2), channels_last);
  check_size(grad_output, pooled_size(shape), op, "grad_output");
  check_size(indices, pooled_size(shape), op, "indices");
  check(indices.scalar_type() == ScalarType::Long, op, ": indices must be int64");
  check<std::invalid_argument>(indices.is_cpu(), op, ": indices must be on the CPU");
  const Tensor g = ordered(grad_output, channels_last), places = ordered(indices, channels_last);
  Tensor grad_input = allocate(input_size(shape), g.scalar_type(), g, channels_last);
  if (grad_input.numel() == 0) return grad_input;
  if (g.numel() == 0) return torch::stable::zero_(grad_input);
  dispatch_floating(g.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::AdaptiveMaxPoolBackwardArgs<T> args{shape, data<T>(g), data<int64_t>(places), mutable_data<T>(grad_input)};
    DLKERN_CALL(adaptive_max_pool2d_backward, args);
  });
  return grad_input;
}

void check_norm(double norm, const char* op) {
  check<std::invalid_argument>(norm - norm == 0.0 && norm != 0.0, op, ": the norm must be finite and not 0, got ",
                               norm);
}

Tensor lp_pool2d_forward_cpu(const Tensor& input, double norm, Ints window, bool ceil_mode) {
  const char* op = "lp_pool2d";
  check_floating(input, op);
  check_norm(norm, op);
  const bool channels_last = suggests_channels_last(input);
  const PoolShape shape = pool_shape(op, input.sizes(), {op, window, 2}, ceil_mode, channels_last);
  const Tensor x = ordered(input, channels_last);
  Tensor output = allocate(pooled_size(shape), x.scalar_type(), x, channels_last);
  if (output.numel() == 0) return output;
  dispatch_floating(x.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::LpPoolArgs<T> args{shape, norm, data<T>(x), mutable_data<T>(output)};
    DLKERN_CALL(lp_pool2d_forward, args);
  });
  return output;
}

Tensor lp_pool2d_backward_cpu(const Tensor& grad_output, const Tensor& input, double norm, Ints window,
                              bool ceil_mode) {
  const char* op = "lp_pool2d_backward";
  check_floating(input, op);
  check_norm(norm, op);
  check(grad_output.scalar_type() == input.scalar_type(), op, ": grad_output and input differ in dtype");
  check<std::invalid_argument>(grad_output.is_cpu(), op, ": grad_output must be on the CPU");
  const bool channels_last = suggests_channels_last(input);
  const PoolShape shape = pool_shape(op, input.sizes(), {op, window, 2}, ceil_mode, channels_last);
  check_size(grad_output, pooled_size(shape), op, "grad_output");
  const Tensor x = ordered(input, channels_last), g = ordered(grad_output, channels_last);
  Tensor grad_input = allocate(input_size(shape), x.scalar_type(), x, channels_last);
  if (grad_input.numel() == 0) return grad_input;
  Tensor slopes = allocate(pooled_size(shape), ScalarType::Double, x);
  dispatch_floating(x.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::LpPoolBackwardArgs<T> args{
        shape, norm, data<T>(g), data<T>(x), mutable_data<double>(slopes), mutable_data<T>(grad_input)};
    DLKERN_CALL(lp_pool2d_backward, args);
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) {
  m.impl("max_pool2d_forward_cpu", TORCH_BOX(&max_pool2d_forward_cpu));
  m.impl("max_pool2d_backward_cpu", TORCH_BOX(&max_pool2d_backward_cpu));
  m.impl("avg_pool2d_forward_cpu", TORCH_BOX(&avg_pool2d_forward_cpu));
  m.impl("avg_pool2d_backward_cpu", TORCH_BOX(&avg_pool2d_backward_cpu));
  m.impl("adaptive_avg_pool2d_forward_cpu", TORCH_BOX(&adaptive_avg_pool2d_forward_cpu));
  m.impl("adaptive_avg_pool2d_backward_cpu", TORCH_BOX(&adaptive_avg_pool2d_backward_cpu));
  m.impl("adaptive_max_pool2d_forward_cpu", TORCH_BOX(&adaptive_max_pool2d_forward_cpu));
  m.impl("adaptive_max_pool2d_backward_cpu", TORCH_BOX(&adaptive_max_pool2d_backward_cpu));
  m.impl("lp_pool2d_forward_cpu", TORCH_BOX(&lp_pool2d_forward_cpu));
  m.impl("lp_pool2d_backward_cpu", TORCH_BOX(&lp_pool2d_backward_cpu));
}

}  // namespace dlkern::ops

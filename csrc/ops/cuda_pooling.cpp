// Pooling, op layer of the CUDA column: max_pool2d, avg_pool2d, adaptive_avg_pool2d, adaptive_max_pool2d, lp_pool2d
// and their backwards. float32, bfloat16 and float16.
#include "../cuda/pooling.h"

#include <algorithm>

#include "cuda_common.h"

namespace dlkern::ops {
namespace {

using cuda::Element;
using cuda::PoolAxis;
using cuda::PoolGeometry;
using cuda::PoolIndices;

constexpr int64_t kLargest = int64_t{1} << 31;  // of extents, exclusive

// Windows along one axis: rounded up in ceil_mode, but none starts beyond the input and the left padding.
int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
  const int64_t last = size + 2 * padding - dilation * (kernel - 1) - 1 + (ceil_mode ? stride - 1 : 0);
  if (last < 0) return 0;
  const int64_t count = last / stride + 1;
  return ceil_mode && (count - 1) * stride >= size + padding ? count - 1 : count;
}

// Kernel size, stride, (not of lp_pool2d) padding and (of max_pool2d) dilation, in pairs.
struct Windows {
  Ints kernel, stride, padding, dilation;

  Windows(const char* op, Ints ints, size_t pairs) {
    check<std::invalid_argument>(ints.size() == 2 * pairs, op, ": a window takes ", 2 * pairs, " ints, got ",
                                 ints.size());
    kernel = Ints(ints.data(), 2);
    stride = Ints(ints.data() + 2, 2);
    padding = Ints(pairs >= 3 ? ints.data() + 4 : kNoPadding, 2);
    dilation = Ints(pairs == 4 ? ints.data() + 6 : kNoDilation, 2);
  }

 private:
  static constexpr int64_t kNoPadding[2] = {0, 0}, kNoDilation[2] = {1, 1};
};

// Sizes N, C, H, W of the input, and the two axes with their windows.
struct Pooling {
  int64_t n, c;
  PoolAxis height, width;
  bool channels_last;

  std::vector<int64_t> input_size() const { return {n, c, height.size, width.size}; }
  std::vector<int64_t> output_size() const { return {n, c, height.out_size, width.out_size}; }
  PoolGeometry geometry() const { return {channels_last ? n : n * c, channels_last ? c : 1, height, width}; }
};

void check_input_size(const char* op, Ints size) {
  check<std::invalid_argument>(size.size() == 4, op, ": expected a 4-D tensor, got ", size.size(), " dimensions");
  check(size[0] >= 0 && size[1] > 0 && size[2] > 0 && size[3] > 0 && size[2] < kLargest && size[3] < kLargest, op,
        ": expected non-zero channels, rows and columns, got [", size[0], ", ", size[1], ", ", size[2], ", ", size[3],
        "]");
}

Pooling pooling(const char* op, Ints size, const Windows& windows, bool ceil_mode, bool channels_last) {
  check_input_size(op, size);
  for (const Ints& ints : {windows.kernel, windows.stride, windows.padding, windows.dilation})
    for (int64_t i : ints) check<std::invalid_argument>(i < kLargest, op, ": ", i, " is too large for a window");
  PoolAxis axes[2];
  for (int i : {0, 1}) {
    const int64_t k = windows.kernel[i], s = windows.stride[i], p = windows.padding[i], d = windows.dilation[i];
    check(k > 0, "kernel size should be greater than zero, but got ", k);
    check(s > 0, "stride should be greater than zero, but got ", s);
    check(d > 0, "dilation should be greater than zero, but got ", d);
    check(p >= 0, "pad must be non-negative, but got pad: ", p);
    check(2 * p <= k, "pad should be at most half of effective kernel size, but got pad=", p, ", kernel_size=", k,
          " and dilation=", d);
    const int64_t out = output_size(size[i + 2], k, s, p, d, ceil_mode);
    check(out > 0, op, ": no window fits in the input: [", size[0], ", ", size[1], ", ", size[2], ", ", size[3], "]");
    // So that no product in a kernel exceeds an int.
    check(d * (k - 1) + size[i + 2] + 2 * p + s < kLargest, op, ": a window reaches over more than 2^31 - 1 positions");
    axes[i] = {static_cast<int>(size[i + 2]), static_cast<int>(out), static_cast<int>(k),
               static_cast<int>(s),           static_cast<int>(p),   static_cast<int>(d)};
  }
  return {size[0], size[1], axes[0], axes[1], channels_last};
}

Pooling adaptive_pooling(const char* op, Ints size, Ints output, bool channels_last) {
  check_input_size(op, size);
  check<std::invalid_argument>(output.size() == 2, op, ": output_size must be 2");
  PoolAxis axes[2];
  for (int i : {0, 1}) {
    check(output[i] >= 0 && output[i] < kLargest, op, ": elements of output_size must be greater than or equal to 0");
    axes[i] = {static_cast<int>(size[i + 2]), static_cast<int>(output[i]), 1, 1, 0, 1};
  }
  return {size[0], size[1], axes[0], axes[1], channels_last};
}

void check_size(const char* op, const char* name, const Tensor& x, const std::vector<int64_t>& size) {
  check<std::invalid_argument>(to_vector(x.sizes()) == size, op, ": ", name, " has the wrong sizes for these windows");
}

// x with its elements in the order that `channels_last` says.
Tensor ordered(const Tensor& x, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return aligned(torch::stable::contiguous(x, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous));
}

// ---- max_pool2d ----

std::tuple<Tensor, Tensor> max_pool2d_forward_cuda(const Tensor& input, Ints window, bool ceil_mode, int64_t indices) {
  const char* op = "max_pool2d";
  const Element element = element_of(op, input);
  const bool channels_last = suggests_channels_last(input);
  const Pooling pool = pooling(op, input.sizes(), {op, window, 4}, ceil_mode, channels_last);
  check<std::invalid_argument>(indices >= 0 && indices <= 2, op, ": indices must be 0, 1 or 2, got ", indices);
  check<std::invalid_argument>(indices != 1 || window[0] * window[1] <= 256, op,
                               ": a window of more than 256 elements needs int64 indices");
  // The kernel counts them from the window's first one on.
  const int64_t rows = std::min<int64_t>(pool.height.size, (window[0] - 1) * pool.height.dilation + 1);
  check(indices != 2 || rows * pool.width.size < int64_t{1} << 32, op,
        ": a window's rows of more than 2^32 - 1 pixels (cuda column)");
  const Tensor x = ordered(input, channels_last);
  Tensor output = allocate(pool.output_size(), x.scalar_type(), x, channels_last);
  Tensor winners =
      indices == 0 ? allocate({0}, ScalarType::Byte, x)
                   : allocate(pool.output_size(), indices == 1 ? ScalarType::Byte : ScalarType::Long, x, channels_last);
  if (output.numel() == 0) return {output, winners};
  Call call(x);
  cuda::max_pool2d_forward(element, pool.geometry(), call.reads(x), call.writes(output),
                           static_cast<PoolIndices>(indices), call.writes(winners), call.stream());
  return {output, winners};
}

Tensor max_pool2d_backward_cuda(const Tensor& grad_output, const Tensor& indices, Ints input_size, Ints window,
                                bool channels_last) {
  const char* op = "max_pool2d_backward";
  const Element element = element_of(op, grad_output);
  check<std::invalid_argument>(grad_output.dim() == 4, op, ": expected a 4-D grad_output");
  // ceil_mode is not an argument: the gradient's own sizes say it.
  Pooling pool = pooling(op, input_size, {op, window, 4}, true, channels_last);
  for (auto [axis, d] : {std::pair(&pool.height, 2), std::pair(&pool.width, 3)}) {
    const int64_t rounded_down =
        output_size(axis->size, axis->kernel, axis->stride, axis->padding, axis->dilation, false);
    if (grad_output.size(d) == rounded_down) axis->out_size = static_cast<int>(rounded_down);
  }
  check_size(op, "grad_output", grad_output, pool.output_size());
  check_size(op, "indices", indices, pool.output_size());
  check_device(op, "indices", indices, grad_output);
  const bool offsets = indices.scalar_type() == ScalarType::Byte;
  check(offsets || indices.scalar_type() == ScalarType::Long, op, ": indices must be uint8 or int64");
  const Tensor g = ordered(grad_output, channels_last), winners = ordered(indices, channels_last);
  Tensor grad_input = allocate(pool.input_size(), g.scalar_type(), g, channels_last);
  if (grad_input.numel() == 0) return grad_input;
  Call call(g);
  cuda::max_pool2d_backward(element, pool.geometry(), call.reads(g),
                            offsets ? PoolIndices::window_offset : PoolIndices::flat, call.reads(winners),
                            call.writes(grad_input), call.stream());
  return grad_input;
}

// ---- avg_pool2d and adaptive_avg_pool2d ----

Tensor average_forward(const char* op, const Tensor& input, const Pooling& pool, const cuda::AverageRule& rule) {
  const Tensor x = ordered(input, pool.channels_last);
  Tensor output = allocate(pool.output_size(), x.scalar_type(), x, pool.channels_last);
  if (output.numel() == 0) return output;
  Call call(x);
  cuda::avg_pool2d_forward(element_of(op, input), pool.geometry(), rule, call.reads(x), call.writes(output),
                           call.stream());
  return output;
}

Tensor average_backward(const char* op, const Tensor& grad_output, const Pooling& pool, const cuda::AverageRule& rule) {
  check_size(op, "grad_output", grad_output, pool.output_size());
  const Tensor g = ordered(grad_output, pool.channels_last);
  Tensor grad_input = allocate(pool.input_size(), g.scalar_type(), g, pool.channels_last);
  if (grad_input.numel() == 0) return grad_input;
  if (g.numel() == 0) return torch::stable::zero_(grad_input);
  Call call(g);
  cuda::avg_pool2d_backward(element_of(op, grad_output), pool.geometry(), rule, call.reads(g), call.writes(grad_input),
                            call.stream());
  return grad_input;
}

cuda::AverageRule average_rule(bool count_include_pad, std::optional<int64_t> divisor_override) {
  const int64_t divisor = divisor_override.value_or(0);
  check(!divisor_override || divisor != 0, "divisor must be not zero");
  check(divisor > -kLargest && divisor < kLargest, "divisor is too large");
  return {false, count_include_pad, static_cast<int>(divisor)};
}

Tensor avg_pool2d_forward_cuda(const Tensor& input, Ints window, bool ceil_mode, bool count_include_pad,
                               std::optional<int64_t> divisor_override) {
  const char* op = "avg_pool2d";
  element_of(op, input);
  return average_forward(op, input,
                         pooling(op, input.sizes(), {op, window, 3}, ceil_mode, suggests_channels_last(input)),
                         average_rule(count_include_pad, divisor_override));
}

Tensor avg_pool2d_backward_cuda(const Tensor& grad_output, Ints input_size, Ints window, bool ceil_mode,
                                bool count_include_pad, std::optional<int64_t> divisor_override, bool channels_last) {
  const char* op = "avg_pool2d_backward";
  element_of(op, grad_output);
  return average_backward(op, grad_output, pooling(op, input_size, {op, window, 3}, ceil_mode, channels_last),
                          average_rule(count_include_pad, divisor_override));
}

constexpr cuda::AverageRule kAdaptive{true, false, 0};

Tensor adaptive_avg_pool2d_forward_cuda(const Tensor& input, Ints output_size) {
  const char* op = "adaptive_avg_pool2d";
  element_of(op, input);
  return average_forward(op, input, adaptive_pooling(op, input.sizes(), output_size, suggests_channels_last(input)),
                         kAdaptive);
}

Tensor adaptive_avg_pool2d_backward_cuda(const Tensor& grad_output, Ints input_size, bool channels_last) {
  const char* op = "adaptive_avg_pool2d_backward";
  element_of(op, grad_output);
  check<std::invalid_argument>(grad_output.dim() == 4, op, ": expected a 4-D grad_output");
  const int64_t output_size[2] = {grad_output.size(2), grad_output.size(3)};
  return average_backward(op, grad_output, adaptive_pooling(op, input_size, Ints(output_size, 2), channels_last),
                          kAdaptive);
}

// ---- adaptive_max_pool2d ----

// Sizes of an adaptive maximum; the kernels number a plane's pixels by ints.
Pooling adaptive_max_pooling(const char* op, Ints size, Ints output, bool channels_last) {
  const Pooling pool = adaptive_pooling(op, size, output, channels_last);
  check(size[2] * size[3] < kLargest, op, ": more than 2^31 - 1 pixels (cuda column)");
  return pool;
}

std::tuple<Tensor, Tensor> adaptive_max_pool2d_forward_cuda(const Tensor& input, Ints output_size) {
  const char* op = "adaptive_max_pool2d";
  const Element element = element_of(op, input);
  const bool channels_last = suggests_channels_last(input);
  const Pooling pool = adaptive_max_pooling(op, input.sizes(), output_size, channels_last);
  const Tensor x = ordered(input, channels_last);
  Tensor output = allocate(pool.output_size(), x.scalar_type(), x, channels_last);
  Tensor indices = allocate(pool.output_size(), ScalarType::Long, x, channels_last);
  if (output.numel() == 0) return {output, indices};
  Call call(x);
  cuda::adaptive_max_pool2d_forward(element, pool.geometry(), call.reads(x), call.writes(output),
                                    static_cast<int64_t*>(call.writes(indices)), call.stream());
  return {output, indices};
}

Tensor adaptive_max_pool2d_backward_cuda(const Tensor& grad_output, const Tensor& indices, Ints input_size,
                                         bool channels_last) {
  const char* op = "adaptive_max_pool2d_backward";
  const Element element = element_of(op, grad_output);
  check<std::invalid_argument>(grad_output.dim() == 4, op, ": expected a 4-D grad_output");
  const int64_t output_size[2] = {grad_output.size(2), grad_output.size(3)};
  const Pooling pool = adaptive_max_pooling(op, input_size, Ints(output_size, 2), channels_last);
  check_size(op, "grad_output", grad_output, pool.output_size());
  check_size(op, "indices", indices, pool.output_size());
  check_device(op, "indices", indices, grad_output);
  check(indices.scalar_type() == ScalarType::Long, op, ": indices must be int64");
  const Tensor g = ordered(grad_output, channels_last), winners = ordered(indices, channels_last);
  Tensor grad_input = allocate(pool.input_size(), g.scalar_type(), g, channels_last);
  if (grad_input.numel() == 0) return grad_input;
  if (g.numel() == 0) return torch::stable::zero_(grad_input);
  Call call(g);
  cuda::adaptive_max_pool2d_backward(element, pool.geometry(), call.reads(g),
                                     static_cast<const int64_t*>(call.reads(winners)), call.writes(grad_input),
                                     call.stream());
  return grad_input;
}

// ---- lp_pool2d ----

void check_norm(const char* op, double norm) {
  check<std::invalid_argument>(norm - norm == 0.0 && norm != 0.0, op, ": the norm must be finite and not 0, got ",
                               norm);
}

Tensor lp_pool2d_forward_cuda(const Tensor& input, double norm, Ints window, bool ceil_mode) {
  const char* op = "lp_pool2d";
  const Element element = element_of(op, input);
  check_norm(op, norm);
  const bool channels_last = suggests_channels_last(input);
  const Pooling pool = pooling(op, input.sizes(), {op, window, 2}, ceil_mode, channels_last);
  const Tensor x = ordered(input, channels_last);
  Tensor output = allocate(pool.output_size(), x.scalar_type(), x, channels_last);
  if (output.numel() == 0) return output;
  Call call(x);
  cuda::lp_pool2d_forward(element, pool.geometry(), norm, call.reads(x), call.writes(output), call.stream());
  return output;
}

Tensor lp_pool2d_backward_cuda(const Tensor& grad_output, const Tensor& input, double norm, Ints window,
                               bool ceil_mode) {
  const char* op = "lp_pool2d_backward";
  const Element element = element_of(op, input);
  check_norm(op, norm);
  check(grad_output.scalar_type() == input.scalar_type(), op, ": grad_output and input differ in dtype");
  check_device(op, "grad_output", grad_output, input);
  const bool channels_last = suggests_channels_last(input);
  const Pooling pool = pooling(op, input.sizes(), {op, window, 2}, ceil_mode, channels_last);
  check_size(op, "grad_output", grad_output, pool.output_size());
  const Tensor x = ordered(input, channels_last), g = ordered(grad_output, channels_last);
  Tensor grad_input = allocate(pool.input_size(), x.scalar_type(), x, channels_last);
  if (grad_input.numel() == 0) return grad_input;
  const ScalarType sums = cuda::lp_pool2d_is_in_double(norm) ? ScalarType::Double : ScalarType::Float;
  Tensor slopes = allocate(pool.output_size(), sums, x);
  Call call(x);
  cuda::lp_pool2d_backward(element, pool.geometry(), norm, call.reads(g), call.reads(x), call.writes(slopes),
                           call.writes(grad_input), call.stream());
  return grad_input;
}

}  // namespace

DLKERN_REGISTER(DLKERN_CUDA_KEY, m) {
  m.impl("max_pool2d_forward_cuda", TORCH_BOX(&max_pool2d_forward_cuda));
  m.impl("max_pool2d_backward_cuda", TORCH_BOX(&max_pool2d_backward_cuda));
  m.impl("avg_pool2d_forward_cuda", TORCH_BOX(&avg_pool2d_forward_cuda));
  m.impl("avg_pool2d_backward_cuda", TORCH_BOX(&avg_pool2d_backward_cuda));
  m.impl("adaptive_avg_pool2d_forward_cuda", TORCH_BOX(&adaptive_avg_pool2d_forward_cuda));
  m.impl("adaptive_avg_pool2d_backward_cuda", TORCH_BOX(&adaptive_avg_pool2d_backward_cuda));
  m.impl("adaptive_max_pool2d_forward_cuda", TORCH_BOX(&adaptive_max_pool2d_forward_cuda));
  m.impl("adaptive_max_pool2d_backward_cuda", TORCH_BOX(&adaptive_max_pool2d_backward_cuda));
  m.impl("lp_pool2d_forward_cuda", TORCH_BOX(&lp_pool2d_forward_cuda));
  m.impl("lp_pool2d_backward_cuda", TORCH_BOX(&lp_pool2d_backward_cuda));
}

}  // namespace dlkern::ops

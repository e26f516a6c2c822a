// What the op layers of recurrent layers in the CUDA column share: the checks of a layer, and its shape on the device.
#pragma once
#include "../cuda/rnn.h"

#include "cuda_linear.h"
#include "rnn_checks.h"

namespace dlkern::ops {

struct RnnLayer {
  Sequence sequence;
  cuda::RnnShape shape;
  std::optional<Tensor> plan;  // what the shape's arrays point into, on the device

  // Makes the shape's arrays known to the call.
  cuda::RnnShape reads(Call& call) const {
    cuda::RnnShape s = shape;
    if (!plan) return s;
    s.offsets = static_cast<const int64_t*>(call.reads(*plan));
    s.sizes = s.offsets + s.steps;
    s.order = s.sizes + s.steps;
    s.first_rows = s.order + s.batch;
    return s;
  }
};

// Offsets and sizes of steps, places and first rows of sequences, copied to the device (which a CUDA graph cannot
// capture); equal steps need none.
inline std::optional<Tensor> plan_of(const cpu::RnnShape& s, const std::optional<Tensor>& numbers,
                                     const Tensor& input) {
  if (!numbers) return std::nullopt;
  const Tensor host = allocate({2 * (s.steps + s.batch)}, ScalarType::Long, *numbers);
  int64_t* to = mutable_data<int64_t>(host);
  for (int64_t t = 0; t < s.steps; ++t) *to++ = s.offsets[t];
  for (int64_t t = 0; t < s.steps; ++t) *to++ = s.batch_sizes[t];
  for (int64_t b = 0; b < s.batch; ++b) *to++ = s.place(b);
  for (int64_t b = 0, t = s.steps - 1; b < s.batch; ++b) {
    while (b >= s.batch_sizes[t]) --t;
    *to++ = s.row(s.reverse ? t : 0, b);
  }
  Tensor plan = allocate({host.size(0)}, ScalarType::Long, input);
  return torch::stable::copy_(plan, host);
}

inline RnnLayer check_layer(const char* op, const Tensor& input, const Tensor& weight_ih, const Tensor& weight_hh,
                            const std::optional<Tensor>& weight_hr, const Tensor& h0, const std::optional<Tensor>& c0,
                            const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths,
                            int64_t mode, bool reverse) {
  check_device(op, "input", input, input);
  check_element(op, input);
  RnnLayer layer{
      check_sequence(op, input, weight_ih, weight_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse),
      {},
      std::nullopt};
  const cpu::RnnShape& s = layer.sequence.shape;
  check(s.rows < int64_t{1} << 31, op, ": more than 2^31 - 1 rows (cuda column)");
  layer.plan = plan_of(s, batch_sizes ? batch_sizes : lengths, input);
  layer.shape = {element_of(input), s.mode, s.reverse, s.inputs, s.hidden, s.batch,
                 s.steps,           s.rows, nullptr,   nullptr,  nullptr,  nullptr};
  return layer;
}

inline Tensor input_product(const Tensor& input, const Tensor& weight, const cuda::RnnShape& s) {
  if (s.element == cuda::Element::float32) return linear_forward_cuda(input, weight, std::nullopt, 0);
  const int64_t width = weight.size(0);
  Tensor given = allocate({s.rows, width}, ScalarType::Float, input);
  Call call(input);
  cuda::rnn_input(s.element, call.reads(input), call.reads(weight), static_cast<float*>(call.writes(given)), s.rows,
                  s.inputs, width, call.stream());
  return given;
}

inline float* floats(void* data) { return static_cast<float*>(data); }
inline const float* floats(const void* data) { return static_cast<const float*>(data); }

}  // namespace dlkern::ops

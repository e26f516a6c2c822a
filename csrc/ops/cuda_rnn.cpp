// rnn, op layer of the CUDA column: rnn_forward, rnn_backward: one layer in one direction of RNN, LSTM or GRU, float32,
// bfloat16 or float16, without projection. Products over all steps are the linear family's.
#include "cuda_rnn.h"

namespace dlkern::ops {
namespace {

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
Five rnn_forward_cuda(const Tensor& input, const Tensor& weight_ih, const Tensor& weight_hh,
                      const std::optional<Tensor>& bias_ih, const std::optional<Tensor>& bias_hh,
                      const std::optional<Tensor>& weight_hr, const Tensor& h0, const std::optional<Tensor>& c0,
                      const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths, int64_t mode,
                      bool reverse, bool keep) {
  const char* op = "rnn_forward";
  check(!weight_hr, op, ": a projection is rnn_options' in the cuda column");
  const RnnLayer layer =
      check_layer(op, input, weight_ih, weight_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse);
  const cuda::RnnShape& s = layer.shape;
  const int64_t width = s.gates() * s.hidden;
  if (bias_ih) check_tensor(op, "bias_ih", *bias_ih, input, {width});
  if (bias_hh) check_tensor(op, "bias_hh", *bias_hh, input, {width});
  const Tensor x = as_contiguous(input), w_ih = as_contiguous(weight_ih), w_hh = as_contiguous(weight_hh),
               h = as_contiguous(h0);
  const std::optional<Tensor> b_ih = as_contiguous(bias_ih), b_hh = as_contiguous(bias_hh), c = as_contiguous(c0);
  const ScalarType dtype = input.scalar_type();
  const bool lstm = mode == cpu::kRnnLstm;
  const Tensor given = input_product(x, w_ih, s);
  std::vector<int64_t> size = to_vector(input.sizes());
  size.back() = s.hidden;
  Tensor output = allocate(Ints(size.data(), size.size()), dtype, input);
  Tensor h_n = allocate({s.batch, s.hidden}, dtype, input);
  Tensor c_n = allocate({lstm ? s.batch : 0, s.hidden}, dtype, input);
  Tensor gates = allocate({keep ? s.rows : 0, s.slots() * s.hidden}, ScalarType::Float, input);
  Tensor cells = allocate({keep && lstm ? s.rows : 0, s.hidden}, ScalarType::Float, input);
  const Tensor cell = allocate({lstm ? s.batch : 0, s.hidden}, ScalarType::Float, input);
  const Tensor counters = allocate({cuda::rnn_counters(s)}, ScalarType::Int, input);
  Call call(x);
  const cuda::RnnShape shape = layer.reads(call);
  const cuda::RnnForward tensors{floats(call.reads(given)),
                                 call.reads(w_hh),
                                 call.reads(b_ih),
                                 call.reads(b_hh),
                                 call.reads(h),
                                 call.reads(c),
                                 call.writes(output),
                                 call.writes(h_n),
                                 call.writes(c_n),
                                 floats(call.writes(cell)),
                                 keep ? floats(call.writes(gates)) : nullptr,
                                 floats(call.writes(cells)),
                                 static_cast<unsigned*>(call.writes(counters))};
  cuda::rnn_forward(shape, cuda::rnn_forward_route(shape), tensors, call.stream());
  if (lengths) cuda::rnn_clear_padding(shape, s.hidden, tensors.output, call.stream());
  return {output, h_n, c_n, gates, cells};
}

using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Eight rnn_backward_cuda(const Tensor& grad_output, const Tensor& grad_h_n, const std::optional<Tensor>& grad_c_n,
                        const Tensor& input, const Tensor& weight_ih, const Tensor& weight_hh,
                        const std::optional<Tensor>& weight_hr, const Tensor& h0, const std::optional<Tensor>& c0,
                        const Tensor& output, const Tensor& gates, const Tensor& cells,
                        const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths, int64_t mode,
                        bool reverse, bool of_input, bool of_weight, bool of_bias) {
  const char* op = "rnn_backward";
  check(!weight_hr, op, ": a projection is rnn_options' in the cuda column");
  const RnnLayer layer =
      check_layer(op, input, weight_ih, weight_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse);
  const cuda::RnnShape& s = layer.shape;
  const bool lstm = mode == cpu::kRnnLstm, gru = mode == cpu::kRnnGru;
  std::vector<int64_t> size = to_vector(input.sizes());
  size.back() = s.hidden;
  check_tensor(op, "grad_output", grad_output, input, size);
  check_tensor(op, "output", output, input, size);
  check_tensor(op, "grad_h_n", grad_h_n, input, {s.batch, s.hidden});
  check(grad_c_n.has_value() == lstm, op, ": grad_c_n is for LSTM, and LSTM wants one");
  if (lstm) check_tensor(op, "grad_c_n", *grad_c_n, input, {s.batch, s.hidden});
  check(gates.scalar_type() == ScalarType::Float && cells.scalar_type() == ScalarType::Float, op,
        ": gates or cells are not what rnn_forward gave");
  check_tensor(op, "gates", gates, cells, {s.rows, s.slots() * s.hidden});
  check_tensor(op, "cells", cells, gates, {lstm ? s.rows : 0, s.hidden});
  check_device(op, "gates", gates, input);
  check(of_weight || !of_bias, op, ": gradients of biases come with those of weights");
  const Tensor g = as_contiguous(grad_output), g_h = as_contiguous(grad_h_n), w_ih = as_contiguous(weight_ih),
               w_hh = as_contiguous(weight_hh), h = as_contiguous(h0), y = as_contiguous(output),
               saved = as_contiguous(gates), saved_cells = as_contiguous(cells);
  Tensor x = as_contiguous(input);
  const std::optional<Tensor> g_c = as_contiguous(grad_c_n), c = as_contiguous(c0);
  const ScalarType dtype = input.scalar_type();
  const int64_t width = s.gates() * s.hidden;
  std::vector<int64_t> wide = size, none = size;
  wide.back() = width;
  none[0] = 0;
  const auto sized = [&](const std::vector<int64_t>& sizes) {
    return allocate(Ints(sizes.data(), sizes.size()), dtype, input);
  };
  const Tensor grad_given = sized(wide), grad_recurrent = gru ? sized(wide) : grad_given;
  const Tensor previous = sized(of_weight ? size : none);
  Tensor grad_h0 = allocate({s.batch, s.hidden}, dtype, input);
  Tensor grad_c0 = allocate({lstm ? s.batch : 0, s.hidden}, dtype, input);
  {
    const Tensor carry = allocate({lstm || gru ? s.batch : 0, s.hidden}, ScalarType::Float, input);
    const Tensor counters = allocate({cuda::rnn_counters(s)}, ScalarType::Int, input);
    if (lengths && of_weight) x = torch::stable::clone(x);  // its padding, which may be anything, must become zero
    Call call(g);
    const cuda::RnnShape shape = layer.reads(call);
    void* const of_given = call.writes(grad_given);
    const cuda::RnnBackward tensors{call.reads(g),
                                    call.reads(g_h),
                                    call.reads(g_c),
                                    call.reads(w_hh),
                                    call.reads(h),
                                    call.reads(c),
                                    call.reads(y),
                                    floats(call.reads(saved)),
                                    floats(call.reads(saved_cells)),
                                    of_given,
                                    gru ? call.writes(grad_recurrent) : of_given,
                                    of_weight ? call.writes(previous) : nullptr,
                                    call.writes(grad_h0),
                                    call.writes(grad_c0),
                                    floats(call.writes(carry)),
                                    static_cast<unsigned*>(call.writes(counters))};
    cuda::rnn_backward(shape, cuda::rnn_backward_route(shape), tensors, call.stream());
    if (lengths) {
      cuda::rnn_clear_padding(shape, width, tensors.grad_given, call.stream());
      if (gru) cuda::rnn_clear_padding(shape, width, tensors.grad_recurrent, call.stream());
      if (of_weight) {
        cuda::rnn_clear_padding(shape, s.hidden, tensors.previous, call.stream());
        cuda::rnn_clear_padding(shape, s.inputs, call.updates(x), call.stream());
      }
    }
  }
  Tensor grad_input = of_input ? linear_backward_input_cuda(grad_given, w_ih) : allocate({0}, dtype, input);
  if (!of_weight)
    return {grad_input,
            allocate({0, s.inputs}, dtype, input),
            allocate({0, s.hidden}, dtype, input),
            allocate({0}, dtype, input),
            allocate({0}, dtype, input),
            allocate({0, s.hidden}, dtype, input),
            grad_h0,
            grad_c0};
  const auto [grad_weight_ih, grad_bias_ih] = linear_backward_weight_cuda(grad_given, x, of_bias);
  const auto [grad_weight_hh, grad_bias_hh] = linear_backward_weight_cuda(grad_recurrent, previous, of_bias);
  return {grad_input, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh, allocate({0, s.hidden}, dtype, input),
          grad_h0,    grad_c0};
}

// How a layer of these states would be run: a RnnRoute as a number.
int64_t rnn_route_cuda(const Tensor& h0, int64_t mode, int64_t steps, bool backward) {
  const char* op = "rnn_route";
  check_device(op, "h0", h0, h0);
  check_element(op, h0);
  check(h0.dim() == 2 && h0.size(0) > 0 && h0.size(1) > 0, op, ": h0 is not [batch, hidden]");
  check(mode >= 0 && mode <= 3, op, ": no mode ", mode);
  cuda::RnnShape s{};
  s.element = element_of(h0);
  s.mode = static_cast<int>(mode);
  s.batch = h0.size(0);
  s.hidden = h0.size(1);
  s.steps = steps;
  const Call call(h0);  // makes its device the one that is asked
  return static_cast<int64_t>(backward ? cuda::rnn_backward_route(s) : cuda::rnn_forward_route(s));
}

}  // namespace

DLKERN_REGISTER(DLKERN_CUDA_KEY, m) {
  m.impl("rnn_forward_cuda", TORCH_BOX(&rnn_forward_cuda));
  m.impl("rnn_backward_cuda", TORCH_BOX(&rnn_backward_cuda));
  m.impl("rnn_route_cuda", TORCH_BOX(&rnn_route_cuda));
}

}  // namespace dlkern::ops

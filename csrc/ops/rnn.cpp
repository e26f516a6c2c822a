// rnn, op layer: rnn_forward, rnn_backward: one layer in one direction of RNN, LSTM or GRU.
#include "rnn_checks.h"

namespace dlkern::ops {
namespace {

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
Five rnn_forward_cpu(const Tensor& input, const Tensor& weight_ih, const Tensor& weight_hh,
                     const std::optional<Tensor>& bias_ih, const std::optional<Tensor>& bias_hh,
                     const std::optional<Tensor>& weight_hr, const Tensor& h0, const std::optional<Tensor>& c0,
                     const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths, int64_t mode,
                     bool reverse, bool keep) {
  const char* op = "rnn_forward";
  check(input.is_cpu(), op, ": input is not on the CPU");
  const Sequence sequence =
      check_sequence(op, input, weight_ih, weight_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse);
  const cpu::RnnShape& s = sequence.shape;
  if (bias_ih) check_tensor(op, "bias_ih", *bias_ih, input, {s.gates() * s.hidden});
  if (bias_hh) check_tensor(op, "bias_hh", *bias_hh, input, {s.gates() * s.hidden});
  const Tensor x = as_contiguous(input), w_ih = as_contiguous(weight_ih), w_hh = as_contiguous(weight_hh),
               h = as_contiguous(h0);
  const std::optional<Tensor> b_ih = as_contiguous(bias_ih), b_hh = as_contiguous(bias_hh),
                              w_hr = as_contiguous(weight_hr), c = as_contiguous(c0);
  const ScalarType dtype = input.scalar_type(), sums = sum_type(input);
  const bool lstm = mode == cpu::kRnnLstm;
  Tensor output = batch_sizes ? allocate({s.rows, s.state}, dtype, input)
                              : allocate({input.size(0), s.batch, s.state}, dtype, input);
  Tensor h_n = allocate({s.batch, s.state}, dtype, input);
  Tensor c_n = allocate({lstm ? s.batch : 0, s.hidden}, dtype, input);
  Tensor gates = allocate({keep ? s.rows : 0, s.slots() * s.hidden}, sums, input);
  Tensor cells = allocate({keep && lstm ? s.rows : 0, s.hidden}, sums, input);
  dispatch_floating(dtype, op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const cpu::RnnForwardArgs<T> args{s,
                                      data<T>(x),
                                      data<T>(w_ih),
                                      data<T>(w_hh),
                                      data<T>(b_ih),
                                      data<T>(b_hh),
                                      data<T>(w_hr),
                                      data<T>(h),
                                      data<T>(c),
                                      mutable_data<T>(output),
                                      mutable_data<T>(h_n),
                                      lstm ? mutable_data<T>(c_n) : nullptr,
                                      keep ? mutable_data<A>(gates) : nullptr,
                                      keep && lstm ? mutable_data<A>(cells) : nullptr};
    DLKERN_CALL(rnn_forward, args);
  });
  return {output, h_n, c_n, gates, cells};
}

using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Eight rnn_backward_cpu(const Tensor& grad_output, const Tensor& grad_h_n, const std::optional<Tensor>& grad_c_n,
                       const Tensor& input, const Tensor& weight_ih, const Tensor& weight_hh,
                       const std::optional<Tensor>& weight_hr, const Tensor& h0, const std::optional<Tensor>& c0,
                       const Tensor& output, const Tensor& gates, const Tensor& cells,
                       const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths, int64_t mode,
                       bool reverse, bool of_input, bool of_weight, bool of_bias) {
  const char* op = "rnn_backward";
  check(input.is_cpu(), op, ": input is not on the CPU");
  const Sequence sequence =
      check_sequence(op, input, weight_ih, weight_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse);
  const cpu::RnnShape& s = sequence.shape;
  const bool lstm = mode == cpu::kRnnLstm;
  const std::vector<int64_t> size =
      batch_sizes ? std::vector<int64_t>{s.rows, s.state} : std::vector<int64_t>{input.size(0), s.batch, s.state};
  check_tensor(op, "grad_output", grad_output, input, size);
  check_tensor(op, "output", output, input, size);
  check_tensor(op, "grad_h_n", grad_h_n, input, {s.batch, s.state});
  check(grad_c_n.has_value() == lstm, op, ": grad_c_n is for LSTM, and LSTM wants one");
  if (lstm) check_tensor(op, "grad_c_n", *grad_c_n, input, {s.batch, s.hidden});
  const ScalarType dtype = input.scalar_type(), sums = sum_type(input);
  check(gates.is_cpu() && gates.scalar_type() == sums && cells.is_cpu() && cells.scalar_type() == sums, op,
        ": gates or cells are not what rnn_forward gave");
  check(gates.dim() == 2 && gates.size(0) == s.rows && gates.size(1) == s.slots() * s.hidden, op, ": gates is not [",
        s.rows, ", ", s.slots() * s.hidden, "]");
  check(cells.dim() == 2 && cells.size(0) == (lstm ? s.rows : 0) && cells.size(1) == s.hidden, op, ": cells is not [",
        lstm ? s.rows : 0, ", ", s.hidden, "]");
  check(of_weight || !of_bias, op, ": gradients of biases come with those of weights");
  const Tensor g = as_contiguous(grad_output), g_h = as_contiguous(grad_h_n), x = as_contiguous(input),
               w_ih = as_contiguous(weight_ih), w_hh = as_contiguous(weight_hh), h = as_contiguous(h0),
               y = as_contiguous(output), saved = as_contiguous(gates), saved_cells = as_contiguous(cells);
  const std::optional<Tensor> g_c = as_contiguous(grad_c_n), c = as_contiguous(c0), w_hr = as_contiguous(weight_hr);
  const int64_t width = s.gates() * s.hidden;
  std::vector<int64_t> input_size = to_vector(input.sizes());
  if (!of_input) input_size.assign(1, 0);
  Tensor grad_input = allocate(Ints(input_size.data(), input_size.size()), dtype, input);
  Tensor grad_weight_ih = allocate({of_weight ? width : 0, s.inputs}, dtype, input);
  Tensor grad_weight_hh = allocate({of_weight ? width : 0, s.state}, dtype, input);
  Tensor grad_weight_hr = allocate({of_weight && s.projects ? s.state : 0, s.hidden}, dtype, input);
  Tensor grad_bias_ih = allocate({of_bias ? width : 0}, dtype, input);
  Tensor grad_bias_hh = allocate({of_bias ? width : 0}, dtype, input);
  Tensor grad_h0 = allocate({s.batch, s.state}, dtype, input);
  Tensor grad_c0 = allocate({lstm ? s.batch : 0, s.hidden}, dtype, input);
  Tensor grad_gates = allocate({s.rows, s.slots() * s.hidden}, sums, input);
  Tensor previous = allocate({of_weight ? s.rows : 0, s.state}, sums, input);
  Tensor grad_states = allocate({s.projects ? s.rows : 0, s.state}, sums, input);
  Tensor unprojected = allocate({s.projects ? s.rows : 0, s.hidden}, sums, input);
  dispatch_floating(dtype, op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const cpu::RnnBackwardArgs<T> args{s,
                                       data<T>(g),
                                       data<T>(g_h),
                                       data<T>(g_c),
                                       data<T>(x),
                                       data<T>(w_ih),
                                       data<T>(w_hh),
                                       data<T>(w_hr),
                                       data<T>(h),
                                       data<T>(c),
                                       data<T>(y),
                                       data<A>(saved),
                                       lstm ? data<A>(saved_cells) : nullptr,
                                       mutable_data<A>(grad_gates),
                                       of_weight ? mutable_data<A>(previous) : nullptr,
                                       s.projects ? mutable_data<A>(grad_states) : nullptr,
                                       s.projects ? mutable_data<A>(unprojected) : nullptr,
                                       of_input ? mutable_data<T>(grad_input) : nullptr,
                                       of_weight ? mutable_data<T>(grad_weight_ih) : nullptr,
                                       of_weight ? mutable_data<T>(grad_weight_hh) : nullptr,
                                       of_bias ? mutable_data<T>(grad_bias_ih) : nullptr,
                                       of_bias ? mutable_data<T>(grad_bias_hh) : nullptr,
                                       of_weight && s.projects ? mutable_data<T>(grad_weight_hr) : nullptr,
                                       mutable_data<T>(grad_h0),
                                       lstm ? mutable_data<T>(grad_c0) : nullptr};
    DLKERN_CALL(rnn_backward, args);
  });
  return {grad_input, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh, grad_weight_hr, grad_h0, grad_c0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) {
  m.impl("rnn_forward_cpu", TORCH_BOX(&rnn_forward_cpu));
  m.impl("rnn_backward_cpu", TORCH_BOX(&rnn_backward_cpu));
}

}  // namespace dlkern::ops

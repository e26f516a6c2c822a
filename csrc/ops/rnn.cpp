// rnn, op layer: rnn_forward, rnn_backward: one layer in one direction of RNN, LSTM or GRU; rnn_options_forward and
// rnn_options_backward: one with options.
#include "../cpu/rnn_options.h"
#include "rnn_checks.h"

namespace dlkern::ops {
namespace {

template <class T> cpu::RnnOptions<T> pointers(const RnnOptions& o) {
  using A = acc_t<T>;
  return {data<T>(o.peephole), data<T>(o.norm_ih), data<T>(o.norm_hh), data<T>(o.norm_c), data<T>(o.norm_c_bias),
          data<A>(o.mask),     data<A>(o.fresh_h), data<A>(o.fresh_c), o.zoneout_h,       o.zoneout_c};
}

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// `options` may be null. The last result is what its normalisations leave.
Six forward(const char* op, const Tensor& input, const Tensor& weight_ih, const Tensor& weight_hh,
            const std::optional<Tensor>& bias_ih, const std::optional<Tensor>& bias_hh,
            const std::optional<Tensor>& weight_hr, const Tensor& h0, const std::optional<Tensor>& c0,
            const RnnOptions* options, const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths,
            int64_t mode, bool reverse, bool keep) {
  check(input.is_cpu(), op, ": input is not on the CPU");
  const Sequence sequence =
      check_sequence(op, input, weight_ih, weight_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse);
  const cpu::RnnShape& s = sequence.shape;
  if (bias_ih) check_tensor(op, "bias_ih", *bias_ih, input, {s.gates() * s.hidden});
  if (bias_hh) check_tensor(op, "bias_hh", *bias_hh, input, {s.gates() * s.hidden});
  if (options) check_options(op, *options, s, input);
  const RnnOptions o = options ? dense(*options) : RnnOptions{};
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
  const bool normed = o.norm_ih.has_value();
  Tensor gates = allocate({keep ? s.rows : 0, s.slots() * s.hidden}, sums, input);
  Tensor cells = allocate({keep && lstm ? s.rows : 0, s.hidden}, sums, input);
  Tensor norms;  // of no use without options
  if (options) norms = allocate({keep && normed ? s.rows : 0, normed ? cpu::rnn_norm_size(s) : 0}, sums, input);
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
    if (!options) {
      DLKERN_CALL(rnn_forward, args);
      return;
    }
    const cpu::RnnOptionsForwardArgs<T> with_options{args, pointers<T>(o),
                                                     keep && normed ? mutable_data<A>(norms) : nullptr};
    DLKERN_CALL(rnn_options_forward, with_options);
  });
  return {output, h_n, c_n, gates, cells, norms};
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
Five rnn_forward_cpu(const Tensor& input, const Tensor& weight_ih, const Tensor& weight_hh,
                     const std::optional<Tensor>& bias_ih, const std::optional<Tensor>& bias_hh,
                     const std::optional<Tensor>& weight_hr, const Tensor& h0, const std::optional<Tensor>& c0,
                     const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths, int64_t mode,
                     bool reverse, bool keep) {
  auto [output, h_n, c_n, gates, cells, norms] =
      forward("rnn_forward", input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, nullptr, batch_sizes,
              lengths, mode, reverse, keep);
  return {output, h_n, c_n, gates, cells};
}

Six rnn_options_forward_cpu(const Tensor& input, const Tensor& weight_ih, const Tensor& weight_hh,
                            const std::optional<Tensor>& bias_ih, const std::optional<Tensor>& bias_hh,
                            const std::optional<Tensor>& weight_hr, const Tensor& h0, const std::optional<Tensor>& c0,
                            const std::optional<Tensor>& peephole, const std::optional<Tensor>& norm_ih,
                            const std::optional<Tensor>& norm_hh, const std::optional<Tensor>& norm_c,
                            const std::optional<Tensor>& norm_c_bias, const std::optional<Tensor>& mask,
                            const std::optional<Tensor>& fresh_h, const std::optional<Tensor>& fresh_c,
                            const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths,
                            int64_t mode, bool reverse, double zoneout_h, double zoneout_c, bool keep) {
  const RnnOptions options{peephole, norm_ih, norm_hh, norm_c,    norm_c_bias,
                           mask,     fresh_h, fresh_c, zoneout_h, zoneout_c};
  return forward("rnn_options_forward", input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, &options,
                 batch_sizes, lengths, mode, reverse, keep);
}

using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Thirteen =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// `options` and `norms` may be null, and the last five results are theirs.
Thirteen backward(const char* op, const Tensor& grad_output, const Tensor& grad_h_n,
                  const std::optional<Tensor>& grad_c_n, const Tensor& input, const Tensor& weight_ih,
                  const Tensor& weight_hh, const std::optional<Tensor>& weight_hr, const Tensor& h0,
                  const std::optional<Tensor>& c0, const RnnOptions* options, const Tensor& output, const Tensor& gates,
                  const Tensor& cells, const Tensor* norms, const std::optional<Tensor>& batch_sizes,
                  const std::optional<Tensor>& lengths, int64_t mode, bool reverse, bool of_input, bool of_weight,
                  bool of_bias) {
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
  if (options) check_options(op, *options, s, input);
  const RnnOptions o = options ? dense(*options) : RnnOptions{};
  const bool normed = o.norm_ih.has_value();
  const int64_t norm_size = normed ? cpu::rnn_norm_size(s) : 0;
  check(!options || (norms->is_cpu() && norms->scalar_type() == sums && norms->dim() == 2 &&
                     norms->size(0) == (normed ? s.rows : 0) && norms->size(1) == norm_size),
        op, ": norms is not what rnn_options_forward gave");
  check(of_weight || !of_bias, op, ": gradients of biases come with those of weights");
  const Tensor g = as_contiguous(grad_output), g_h = as_contiguous(grad_h_n), x = as_contiguous(input),
               w_ih = as_contiguous(weight_ih), w_hh = as_contiguous(weight_hh), h = as_contiguous(h0),
               y = as_contiguous(output), saved = as_contiguous(gates), saved_cells = as_contiguous(cells);
  const std::optional<Tensor> g_c = as_contiguous(grad_c_n), c = as_contiguous(c0), w_hr = as_contiguous(weight_hr);
  const Tensor saved_norms = options ? as_contiguous(*norms) : saved;
  const int64_t width = s.gates() * s.hidden;
  const std::vector<int64_t> input_size = of_input ? to_vector(input.sizes()) : std::vector<int64_t>{0};
  Tensor grad_input = allocate(Ints(input_size.data(), input_size.size()), dtype, input);
  Tensor grad_weight_ih = allocate({of_weight ? width : 0, s.inputs}, dtype, input);
  Tensor grad_weight_hh = allocate({of_weight ? width : 0, s.state}, dtype, input);
  Tensor grad_weight_hr = allocate({of_weight && s.projects ? s.state : 0, s.hidden}, dtype, input);
  Tensor grad_bias_ih = allocate({of_bias ? width : 0}, dtype, input);
  Tensor grad_bias_hh = allocate({of_bias ? width : 0}, dtype, input);
  Tensor grad_h0 = allocate({s.batch, s.state}, dtype, input);
  Tensor grad_c0 = allocate({lstm ? s.batch : 0, s.hidden}, dtype, input);
  const auto gradient = [&](bool wanted, const std::optional<Tensor>& x) {
    return allocate(of_weight && wanted ? x->sizes() : Ints({0}), dtype, input);
  };
  Tensor grad_peephole, grad_norm_ih, grad_norm_hh, grad_norm_c, grad_norm_c_bias;  // of no use without options
  if (options) {
    grad_peephole = gradient(o.peephole.has_value(), o.peephole);
    grad_norm_ih = gradient(normed, o.norm_ih);
    grad_norm_hh = gradient(normed, o.norm_hh);
    grad_norm_c = gradient(o.norm_c.has_value(), o.norm_c);
    grad_norm_c_bias = gradient(o.norm_c_bias.has_value(), o.norm_c_bias);
  }
  const bool two_sides = options && mode == cpu::kRnnGru;
  Tensor grad_gates = allocate({s.rows, options ? width : s.slots() * s.hidden}, sums, input);
  Tensor grad_hidden, grad_product, grad_normed_cell, previous, grad_states, unprojected;
  if (two_sides) grad_hidden = allocate({s.rows, width}, sums, input);
  if (normed) grad_product = allocate({s.rows, width}, sums, input);
  if (o.norm_c) grad_normed_cell = allocate({s.rows, s.hidden}, sums, input);
  if (of_weight) previous = allocate({s.rows, s.state}, sums, input);
  if (s.projects) grad_states = allocate({s.rows, s.state}, sums, input);
  if (s.projects) unprojected = allocate({s.rows, s.hidden}, sums, input);
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
    if (!options) {
      DLKERN_CALL(rnn_backward, args);
      return;
    }
    const auto wanted = [&](const Tensor& grad) { return grad.numel() ? mutable_data<T>(grad) : nullptr; };
    A* hidden = two_sides ? mutable_data<A>(grad_hidden) : args.grad_gates;
    const cpu::RnnOptionsBackwardArgs<T> with_options{args,
                                                      pointers<T>(o),
                                                      normed ? data<A>(saved_norms) : nullptr,
                                                      hidden,
                                                      normed ? mutable_data<A>(grad_product) : hidden,
                                                      o.norm_c ? mutable_data<A>(grad_normed_cell) : nullptr,
                                                      wanted(grad_peephole),
                                                      wanted(grad_norm_ih),
                                                      wanted(grad_norm_hh),
                                                      wanted(grad_norm_c),
                                                      wanted(grad_norm_c_bias)};
    DLKERN_CALL(rnn_options_backward, with_options);
  });
  return {grad_input, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh, grad_weight_hr,  grad_h0,
          grad_c0,    grad_peephole,  grad_norm_ih,   grad_norm_hh, grad_norm_c,  grad_norm_c_bias};
}

Eight rnn_backward_cpu(const Tensor& grad_output, const Tensor& grad_h_n, const std::optional<Tensor>& grad_c_n,
                       const Tensor& input, const Tensor& weight_ih, const Tensor& weight_hh,
                       const std::optional<Tensor>& weight_hr, const Tensor& h0, const std::optional<Tensor>& c0,
                       const Tensor& output, const Tensor& gates, const Tensor& cells,
                       const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths, int64_t mode,
                       bool reverse, bool of_input, bool of_weight, bool of_bias) {
  auto [input_, ih, hh, b_ih, b_hh, hr, h0_, c0_, p, n_ih, n_hh, n_c, n_c_bias] =
      backward("rnn_backward", grad_output, grad_h_n, grad_c_n, input, weight_ih, weight_hh, weight_hr, h0, c0, nullptr,
               output, gates, cells, nullptr, batch_sizes, lengths, mode, reverse, of_input, of_weight, of_bias);
  return {input_, ih, hh, b_ih, b_hh, hr, h0_, c0_};
}

Thirteen rnn_options_backward_cpu(const Tensor& grad_output, const Tensor& grad_h_n,
                                  const std::optional<Tensor>& grad_c_n, const Tensor& input, const Tensor& weight_ih,
                                  const Tensor& weight_hh, const std::optional<Tensor>& weight_hr, const Tensor& h0,
                                  const std::optional<Tensor>& c0, const std::optional<Tensor>& peephole,
                                  const std::optional<Tensor>& norm_ih, const std::optional<Tensor>& norm_hh,
                                  const std::optional<Tensor>& norm_c, const std::optional<Tensor>& norm_c_bias,
                                  const std::optional<Tensor>& mask, const std::optional<Tensor>& fresh_h,
                                  const std::optional<Tensor>& fresh_c, const Tensor& output, const Tensor& gates,
                                  const Tensor& cells, const Tensor& norms, const std::optional<Tensor>& batch_sizes,
                                  const std::optional<Tensor>& lengths, int64_t mode, bool reverse, double zoneout_h,
                                  double zoneout_c, bool of_input, bool of_weight, bool of_bias) {
  const RnnOptions options{peephole, norm_ih, norm_hh, norm_c,    norm_c_bias,
                           mask,     fresh_h, fresh_c, zoneout_h, zoneout_c};
  return backward("rnn_options_backward", grad_output, grad_h_n, grad_c_n, input, weight_ih, weight_hh, weight_hr, h0,
                  c0, &options, output, gates, cells, &norms, batch_sizes, lengths, mode, reverse, of_input, of_weight,
                  of_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) {
  m.impl("rnn_forward_cpu", TORCH_BOX(&rnn_forward_cpu));
  m.impl("rnn_backward_cpu", TORCH_BOX(&rnn_backward_cpu));
  m.impl("rnn_options_forward_cpu", TORCH_BOX(&rnn_options_forward_cpu));
  m.impl("rnn_options_backward_cpu", TORCH_BOX(&rnn_options_backward_cpu));
}

}  // namespace dlkern::ops

// rnn, op layer of the CUDA column: rnn_options_forward, rnn_options_backward: one layer in one direction with options,
// or an LSTM's with a projection; float32, bfloat16 or float16. Products over all steps are the linear family's.
#include "../cuda/rnn_options.h"

#include "cuda_rnn.h"

namespace dlkern::ops {
namespace {

struct OptionsLayer {
  RnnLayer layer;
  RnnOptions options;  // contiguous
  int64_t state, width, norm_size, terms;
  bool lstm, normed, projects;

  OptionsLayer(const char* op, RnnLayer checked, const RnnOptions& o, const Tensor& input)
      : layer(std::move(checked)), options(dense(o)) {
    const cuda::RnnShape& s = layer.shape;
    check_options(op, o, layer.sequence.shape, input);
    state = layer.sequence.shape.state;
    projects = layer.sequence.shape.projects;
    width = s.gates() * s.hidden;
    lstm = s.mode == cpu::kRnnLstm;
    normed = o.norm_ih.has_value();
    const cuda::RnnOptions sizes =
        pointers([](const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; });
    norm_size = normed ? sizes.norm_size(s) : 0;
    terms = sizes.terms(s);
  }

  cuda::RnnOptions reads(Call& call) const {
    return pointers([&](const std::optional<Tensor>& x) { return call.reads(x); });
  }

 private:
  template <class F> cuda::RnnOptions pointers(F&& of) const {
    const RnnOptions& o = options;
    return {state,
            of(o.peephole),
            of(o.norm_ih),
            of(o.norm_hh),
            of(o.norm_c),
            of(o.norm_c_bias),
            floats(of(o.mask)),
            floats(of(o.fresh_h)),
            floats(of(o.fresh_c)),
            static_cast<float>(o.zoneout_h),
            static_cast<float>(o.zoneout_c)};
  }
};

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Six rnn_options_forward_cuda(const Tensor& input, const Tensor& weight_ih, const Tensor& weight_hh,
                             const std::optional<Tensor>& bias_ih, const std::optional<Tensor>& bias_hh,
                             const std::optional<Tensor>& weight_hr, const Tensor& h0, const std::optional<Tensor>& c0,
                             const std::optional<Tensor>& peephole, const std::optional<Tensor>& norm_ih,
                             const std::optional<Tensor>& norm_hh, const std::optional<Tensor>& norm_c,
                             const std::optional<Tensor>& norm_c_bias, const std::optional<Tensor>& mask,
                             const std::optional<Tensor>& fresh_h, const std::optional<Tensor>& fresh_c,
                             const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths,
                             int64_t mode, bool reverse, double zoneout_h, double zoneout_c, bool keep) {
  const char* op = "rnn_options_forward";
  const RnnOptions given_options{peephole, norm_ih, norm_hh, norm_c,    norm_c_bias,
                                 mask,     fresh_h, fresh_c, zoneout_h, zoneout_c};
  const OptionsLayer l(
      op, check_layer(op, input, weight_ih, weight_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse),
      given_options, input);
  const cuda::RnnShape& s = l.layer.shape;
  if (bias_ih) check_tensor(op, "bias_ih", *bias_ih, input, {l.width});
  if (bias_hh) check_tensor(op, "bias_hh", *bias_hh, input, {l.width});
  const Tensor x = as_contiguous(input), w_ih = as_contiguous(weight_ih), w_hh = as_contiguous(weight_hh),
               h = as_contiguous(h0);
  const std::optional<Tensor> b_ih = as_contiguous(bias_ih), b_hh = as_contiguous(bias_hh),
                              w_hr = as_contiguous(weight_hr), c = as_contiguous(c0);
  const ScalarType dtype = input.scalar_type(), sums = ScalarType::Float;
  const auto with_last = [&](int64_t last) {
    std::vector<int64_t> size = to_vector(input.sizes());
    size.back() = last;
    return size;
  };
  const Tensor given = input_product(x, w_ih, s);
  const std::vector<int64_t> size = with_last(l.state);
  Tensor output = allocate(Ints(size.data(), size.size()), dtype, input);
  Tensor h_n = allocate({s.batch, l.state}, dtype, input);
  Tensor c_n = allocate({l.lstm ? s.batch : 0, s.hidden}, dtype, input);
  Tensor gates = allocate({keep ? s.rows : 0, s.slots() * s.hidden}, sums, input);
  Tensor cells = allocate({keep && l.lstm ? s.rows : 0, s.hidden}, sums, input);
  Tensor norms = allocate({keep && l.normed ? s.rows : 0, l.norm_size}, sums, input);
  const Tensor state = allocate({s.batch, l.state}, sums, input), operand = allocate({s.batch, l.state}, dtype, input),
               normed = allocate({l.normed ? s.rows : 0, l.width}, sums, input),
               cell = allocate({l.lstm ? s.batch : 0, s.hidden}, sums, input),
               products = allocate({s.batch, l.width}, sums, input),
               units = allocate({l.lstm ? s.batch : 0, 2 * s.hidden}, sums, input),
               made = allocate({l.projects ? s.batch : 0, s.hidden}, dtype, input);
  Call call(x);
  const cuda::RnnShape shape = l.layer.reads(call);
  const cuda::RnnOptions options = l.reads(call);
  const cuda::RnnOptionsForward tensors{floats(call.reads(given)),
                                        floats(call.writes(normed)),
                                        call.reads(w_hh),
                                        call.reads(w_hr),
                                        call.reads(b_ih),
                                        call.reads(b_hh),
                                        call.reads(h),
                                        call.reads(c),
                                        call.writes(output),
                                        call.writes(h_n),
                                        call.writes(c_n),
                                        keep ? floats(call.writes(gates)) : nullptr,
                                        keep && l.lstm ? floats(call.writes(cells)) : nullptr,
                                        keep && l.normed ? floats(call.writes(norms)) : nullptr,
                                        floats(call.writes(state)),
                                        floats(call.writes(cell)),
                                        floats(call.writes(products)),
                                        floats(call.writes(units)),
                                        call.writes(operand),
                                        call.writes(made)};
  cuda::rnn_options_forward(shape, options, tensors, call.stream());
  if (lengths) cuda::rnn_clear_padding(shape, l.state, tensors.output, call.stream());
  return {output, h_n, c_n, gates, cells, norms};
}

using Thirteen =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Thirteen rnn_options_backward_cuda(const Tensor& grad_output, const Tensor& grad_h_n,
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
  const char* op = "rnn_options_backward";
  const RnnOptions given_options{peephole, norm_ih, norm_hh, norm_c,    norm_c_bias,
                                 mask,     fresh_h, fresh_c, zoneout_h, zoneout_c};
  const OptionsLayer l(
      op, check_layer(op, input, weight_ih, weight_hh, weight_hr, h0, c0, batch_sizes, lengths, mode, reverse),
      given_options, input);
  const cuda::RnnShape& s = l.layer.shape;
  const bool sides = mode == cpu::kRnnGru || l.normed;
  std::vector<int64_t> size = to_vector(input.sizes());
  const auto rows_of = [&](bool wanted, int64_t width, ScalarType dtype) {
    size.back() = width;
    std::vector<int64_t> sizes = size;
    if (!wanted) sizes[0] = 0;
    return allocate(Ints(sizes.data(), sizes.size()), dtype, input);
  };
  size.back() = l.state;
  check_tensor(op, "grad_output", grad_output, input, size);
  check_tensor(op, "output", output, input, size);
  check_tensor(op, "grad_h_n", grad_h_n, input, {s.batch, l.state});
  check(grad_c_n.has_value() == l.lstm, op, ": grad_c_n is for LSTM, and LSTM wants one");
  if (l.lstm) check_tensor(op, "grad_c_n", *grad_c_n, input, {s.batch, s.hidden});
  check(gates.scalar_type() == ScalarType::Float, op, ": gates are not what rnn_options_forward gave");
  check_device(op, "gates", gates, input);
  check_tensor(op, "gates", gates, gates, {s.rows, s.slots() * s.hidden});
  check_tensor(op, "cells", cells, gates, {l.lstm ? s.rows : 0, s.hidden});
  check_tensor(op, "norms", norms, gates, {l.normed ? s.rows : 0, l.norm_size});
  check(of_weight || !of_bias, op, ": gradients of biases come with those of weights");
  const Tensor g = as_contiguous(grad_output), g_h = as_contiguous(grad_h_n), w_ih = as_contiguous(weight_ih),
               w_hh = as_contiguous(weight_hh), h = as_contiguous(h0), y = as_contiguous(output),
               saved = as_contiguous(gates), saved_cells = as_contiguous(cells), saved_norms = as_contiguous(norms);
  Tensor x = as_contiguous(input);
  const std::optional<Tensor> g_c = as_contiguous(grad_c_n), c = as_contiguous(c0), w_hr = as_contiguous(weight_hr);
  const ScalarType dtype = input.scalar_type();
  const Tensor grad_given = rows_of(true, l.width, dtype),
               grad_product = sides ? rows_of(true, l.width, dtype) : grad_given;
  const Tensor previous = rows_of(of_weight, l.state, dtype), grad_states = rows_of(l.projects, l.state, dtype),
               projected = rows_of(of_weight && l.projects, s.hidden, dtype);
  Tensor grad_h0 = allocate({s.batch, l.state}, dtype, input);
  Tensor grad_c0 = allocate({l.lstm ? s.batch : 0, s.hidden}, dtype, input);
  const auto gradient = [&](bool wanted, const std::optional<Tensor>& of) {
    return allocate(of_weight && wanted ? of->sizes() : Ints({0}), dtype, input);
  };
  const RnnOptions& o = l.options;
  Tensor grad_peephole = gradient(o.peephole.has_value(), o.peephole), grad_norm_ih = gradient(l.normed, o.norm_ih),
         grad_norm_hh = gradient(l.normed, o.norm_hh), grad_norm_c = gradient(o.norm_c.has_value(), o.norm_c),
         grad_norm_c_bias = gradient(o.norm_c_bias.has_value(), o.norm_c_bias);
  Tensor grad_bias_ih = allocate({of_bias ? l.width : 0}, dtype, input),
         grad_bias_hh = allocate({of_bias ? l.width : 0}, dtype, input);
  {
    const auto scratch = [&](int64_t rows, int64_t width) { return allocate({rows, width}, ScalarType::Float, input); };
    const Tensor carry = scratch(s.batch, l.state), carry_cell = scratch(l.lstm ? s.batch : 0, s.hidden),
                 grads = scratch(s.batch, s.hidden), units = scratch(s.batch, s.hidden),
                 sums = scratch(s.batch, l.width), terms = scratch(of_weight ? s.rows : 0, l.terms);
    if (lengths && of_weight) x = torch::stable::clone(x);  // its padding, which may be anything, must become zero
    Call call(g);
    const cuda::RnnShape shape = l.layer.reads(call);
    const cuda::RnnOptions options = l.reads(call);
    void* const of_given = call.writes(grad_given);
    const cuda::RnnOptionsBackward tensors{call.reads(g),
                                           call.reads(g_h),
                                           call.reads(g_c),
                                           call.reads(w_hh),
                                           call.reads(w_hr),
                                           call.reads(h),
                                           call.reads(c),
                                           call.reads(y),
                                           floats(call.reads(saved)),
                                           floats(call.reads(saved_cells)),
                                           floats(call.reads(saved_norms)),
                                           of_given,
                                           sides ? call.writes(grad_product) : of_given,
                                           of_weight ? call.writes(previous) : nullptr,
                                           l.projects ? call.writes(grad_states) : nullptr,
                                           of_weight && l.projects ? call.writes(projected) : nullptr,
                                           call.writes(grad_h0),
                                           call.writes(grad_c0),
                                           of_weight && l.terms ? floats(call.writes(terms)) : nullptr,
                                           floats(call.writes(carry)),
                                           floats(call.writes(carry_cell)),
                                           floats(call.writes(grads)),
                                           floats(call.writes(units)),
                                           floats(call.writes(sums))};
    cuda::rnn_options_backward(shape, options, tensors, call.stream());
    if (lengths) {
      const auto clear = [&](void* rows, int64_t width, const cuda::RnnShape& of) {
        if (rows) cuda::rnn_clear_padding(of, width, rows, call.stream());
      };
      cuda::RnnShape float_shape = shape;
      float_shape.element = cuda::Element::float32;
      clear(tensors.grad_given, l.width, shape);
      if (sides) clear(tensors.grad_product, l.width, shape);
      clear(tensors.previous, l.state, shape);
      clear(tensors.grad_states, l.state, shape);
      clear(tensors.projected, s.hidden, shape);
      clear(tensors.terms, l.terms, float_shape);
      if (of_weight) clear(call.updates(x), s.inputs, shape);
    }
    int64_t first = 0;
    const auto sum = [&](bool there, int64_t count, const Tensor& to) {
      if (!there) return;
      if (to.numel()) cuda::rnn_sum_terms(shape, tensors.terms, l.terms, first, count, call.writes(to), call.stream());
      first += count;
    };
    if (tensors.terms) {
      sum(l.normed, l.width, grad_bias_ih);
      sum(l.normed, l.width, grad_bias_hh);
      sum(l.normed, l.width, grad_norm_ih);
      sum(l.normed, l.width, grad_norm_hh);
      sum(l.normed && l.lstm, s.hidden, grad_norm_c);
      sum(l.normed && l.lstm, s.hidden, grad_norm_c_bias);
      sum(o.peephole.has_value(), 3 * s.hidden, grad_peephole);
    }
  }
  Tensor grad_input = of_input ? linear_backward_input_cuda(grad_given, w_ih) : allocate({0}, dtype, input);
  Tensor grad_weight_ih = allocate({0, s.inputs}, dtype, input), grad_weight_hh = allocate({0, l.state}, dtype, input),
         grad_weight_hr = allocate({0, s.hidden}, dtype, input);
  if (of_weight) {
    const bool beside = of_bias && !l.normed;  // else they are sums of terms
    const auto of_given = linear_backward_weight_cuda(grad_given, x, beside),
               of_product = linear_backward_weight_cuda(grad_product, previous, beside);
    grad_weight_ih = std::get<0>(of_given);
    grad_weight_hh = std::get<0>(of_product);
    if (beside) grad_bias_ih = std::get<1>(of_given), grad_bias_hh = std::get<1>(of_product);
    if (l.projects) grad_weight_hr = std::get<0>(linear_backward_weight_cuda(grad_states, projected, false));
  }
  return {grad_input, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh, grad_weight_hr,  grad_h0,
          grad_c0,    grad_peephole,  grad_norm_ih,   grad_norm_hh, grad_norm_c,  grad_norm_c_bias};
}

}  // namespace

DLKERN_REGISTER(DLKERN_CUDA_KEY, m) {
  m.impl("rnn_options_forward_cuda", TORCH_BOX(&rnn_options_forward_cuda));
  m.impl("rnn_options_backward_cuda", TORCH_BOX(&rnn_options_backward_cuda));
}

}  // namespace dlkern::ops

// RNN, LSTM and GRU with options, one layer in one direction, backward: as rnn_backward.cpp, in phases of whole rows and
// of products, as rnn_options.cpp.
#include "column_sums.h"
#include "rnn_gradients.h"
#include "rnn_options_steps.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

template <class T, int mode> struct BackwardStep {
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int64_t lanes = kLanes<A>;
  const RnnOptionsBackwardArgs<T>& args;
  const RnnShape& s;
  const RnnOptions<T>& o;
  const A *h0, *c0;
  A *carry, *carry_cell;  // gradients that pass the gates, [batch, state] and [batch, hidden]
  const A* product;  // the gradient of the state before the mask, as the step after this gives it [batch, state]
  A *grads, *of_cell;  // of the output before the projection, and of the cell [batch, hidden]

  const A* cell_before(int64_t before, int64_t b) const {
    return before < 0 ? c0 + b * s.hidden : args.layer.cells + before * s.hidden;
  }

  // The gradient of the state to that of the new state, at `to`, and what passes it.
  void state(int64_t row, int64_t b, A* to) const {
    for (int64_t j = 0; j < s.state; j += lanes) {
      const int64_t count = smaller(lanes, s.state - j), at = b * s.state + j;
      V dh = load_some(product + at, count);
      if (o.mask) dh *= load_some(o.mask + at, count);
      dh += load_some(args.layer.grad_output + row * s.state + j, count) + load_some(carry + at, count);
      const A* chosen = o.fresh_h ? o.fresh_h + row * s.state + j : nullptr;
      store_some(carry + at, zone_out<A>(V{}, dh, chosen, o.zoneout_h, count), count);
      store_some(to + j, zone_out<A>(dh, V{}, chosen, o.zoneout_h, count), count);
    }
  }

  // From grads to the gradients of the gates and of their recurrent product.
  void operator()(int64_t row, int64_t before, int64_t b) const {
    const int64_t hidden = s.hidden, width = s.gates() * hidden;
    const A *gate = args.layer.gates + row * s.slots() * hidden, *dh_of_b = grads + b * hidden,
            *norm = o.norm_hh ? args.norms + row * rnn_norm_size(s) : nullptr,
            *scales = norm ? norm + rnn_norm_size(s) - 3 : nullptr;
    A *to = args.layer.grad_gates + row * width, *to_hidden = args.grad_hidden + row * width;
    if constexpr (mode == kRnnLstm) {
      lstm(row, before, b, gate, dh_of_b, norm, scales, to);
    } else {
      for (int64_t j = 0; j < hidden; j += lanes) {
        const int64_t count = smaller(lanes, hidden - j);
        const auto in = [count, j](const auto* p) { return load_some(p + j, count); };
        const auto out = [count, j](A* p, V v) { store_some(p + j, v, count); };
        const V dh = in(dh_of_b);
        if constexpr (mode == kRnnGru) {
          const V recurrent = in(gate), r = in(gate + hidden), z = in(gate + 2 * hidden), n = in(gate + 3 * hidden);
          const V previous = before < 0 ? in(h0 + b * hidden) : in(args.layer.output + before * hidden);
          const V dn = dh * (A(1) - z) * (A(1) - n * n), dr = dn * recurrent * r * (A(1) - r),
                  dz = dh * (previous - n) * z * (A(1) - z);
          out(to, dr);
          out(to + hidden, dz);
          out(to + 2 * hidden, dn);
          out(to_hidden, dr);
          out(to_hidden + hidden, dz);
          out(to_hidden + 2 * hidden, dn * r);
          out(carry + b * hidden, in(carry + b * hidden) + dh * z);
        } else {
          out(to, dh * in(gate));
        }
      }
    }
    if (norm) normalize_backward(to_hidden, o.norm_hh, norm + width, scales[1], width, args.grad_product + row * width);
  }

  void lstm(int64_t row, int64_t before, int64_t b, const A* gate, const A* dh_of_b, const A* norm, const A* scales,
            A* to) const {
    const int64_t hidden = s.hidden;
    const A *c_of_b = cell_before(before, b), *normed = norm ? norm + 2 * s.gates() * hidden : nullptr;
    A *dc_of_b = of_cell + b * hidden, *dc_normed = norm ? args.grad_normed_cell + row * hidden : dc_of_b,
      *passed = carry_cell + b * hidden;
    for (int64_t j = 0; j < hidden; j += lanes) {
      const int64_t count = smaller(lanes, hidden - j);
      const auto in = [count, j](const auto* p) { return load_some(p + j, count); };
      const V x = in(gate + 3 * hidden), dh = in(dh_of_b);
      V c = norm ? in(normed) * in(o.norm_c) : in(gate + hidden) * in(c_of_b) + in(gate) * in(gate + 2 * hidden);
      if (o.norm_c_bias) c += in(o.norm_c_bias);
      c = tanh(c);
      store_some(to + 3 * hidden + j, dh * c * x * (A(1) - x), count);
      store_some(dc_normed + j, dh * x * (A(1) - c * c), count);
      if (s.projects) store_some(args.layer.unprojected + row * hidden + j, x * c, count);
    }
    if (norm) normalize_backward(dc_normed, o.norm_c, normed, scales[2], hidden, dc_of_b);
    for (int64_t j = 0; j < hidden; j += lanes) {
      const int64_t count = smaller(lanes, hidden - j);
      const auto in = [count, j](const auto* p) { return load_some(p + j, count); };
      const auto out = [count, j](A* p, V v) { store_some(p + j, v, count); };
      const V i = in(gate), f = in(gate + hidden), g = in(gate + 2 * hidden), after = in(passed);
      const A* chosen = o.fresh_c ? o.fresh_c + row * hidden + j : nullptr;
      V dc = in(dc_of_b) + zone_out<A>(after, V{}, chosen, o.zoneout_c, count),
        pass = zone_out<A>(V{}, after, chosen, o.zoneout_c, count);
      if (o.peephole) dc += in(o.peephole + 2 * hidden) * in(to + 3 * hidden);
      const V di = dc * g * i * (A(1) - i), df = dc * in(c_of_b) * f * (A(1) - f);
      pass += dc * f;
      if (o.peephole) pass += in(o.peephole) * di + in(o.peephole + hidden) * df;
      out(to, di);
      out(to + hidden, df);
      out(to + 2 * hidden, dc * i * (A(1) - g * g));
      out(passed, pass);
    }
  }
};

// to[j] = the sum over all rows of value(row, before, b, j, lanes used), in double.
template <class A, class D, class F> void sum_rows(const Layer<A>& layer, int64_t count, D* to, const F& value) {
  constexpr int64_t lanes = kLanes<A>;
  const RnnShape& s = layer.s;
  parallel_for(ceil_div(count, lanes), 1 + 16384 / (s.rows + 1), [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      const int64_t j = v * lanes, some = smaller(lanes, count - j);
      Wide<A> sum{};
      for (int64_t t = 0; t < s.steps; ++t)
        for (int64_t b = 0; b < s.batch_sizes[t]; ++b)
          sum += __builtin_convertvector(value(s.row(t, b), layer.before(t, b), s.place(b), j, some), Wide<A>);
      store_some(to + j, __builtin_convertvector(sum, Vec<A>), some);
    }
  });
}

template <class T, int mode> void sum_weights(const BackwardStep<T, mode>& step, const Layer<acc_t<T>>& layer) {
  using A = acc_t<T>;
  const RnnOptionsBackwardArgs<T>& args = step.args;
  const RnnShape& s = step.s;
  const int64_t hidden = s.hidden, width = s.gates() * hidden, norm_size = rnn_norm_size(s);
  const A* grad_gates = args.layer.grad_gates;
  if (args.layer.grad_bias_ih) {
    sum_columns(grad_gates, width, 1, s.rows, width, args.layer.grad_bias_ih);
    sum_columns(args.grad_hidden, width, 1, s.rows, width, args.layer.grad_bias_hh);
  }
  if (args.grad_norm_ih) {
    const auto along = [&](const A* grads, int64_t from) {
      return [=, &args](int64_t row, int64_t, int64_t, int64_t j, int64_t count) {
        return load_some(grads + row * width + j, count) * load_some(args.norms + row * norm_size + from + j, count);
      };
    };
    sum_rows(layer, width, args.grad_norm_ih, along(grad_gates, 0));
    sum_rows(layer, width, args.grad_norm_hh, along(args.grad_hidden, width));
  }
  if (args.grad_norm_c) {
    const auto of_normed = [&](int64_t row, int64_t j, int64_t count) {
      return load_some(args.grad_normed_cell + row * hidden + j, count);
    };
    sum_rows(layer, hidden, args.grad_norm_c, [&](int64_t row, int64_t, int64_t, int64_t j, int64_t count) {
      return of_normed(row, j, count) * load_some(args.norms + row * norm_size + 2 * width + j, count);
    });
    if (args.grad_norm_c_bias)
      sum_rows(layer, hidden, args.grad_norm_c_bias,
               [&](int64_t row, int64_t, int64_t, int64_t j, int64_t count) { return of_normed(row, j, count); });
  }
  for (int64_t gate = 0; args.grad_peephole && gate < 3; ++gate)
    sum_rows(layer, hidden, args.grad_peephole + gate * hidden,
             [&](int64_t row, int64_t before, int64_t b, int64_t j, int64_t count) {
               Vec<A> c = load_some(step.cell_before(before, b) + j, count);
               const A* gates = args.layer.gates + row * width + j;
               if (gate == 2)  // o's sees the cell that this step made
                 c = load_some(gates + hidden, count) * c +
                     load_some(gates, count) * load_some(gates + 2 * hidden, count);
               const int64_t slot = gate == 2 ? 3 : gate;
               return c * load_some(grad_gates + row * width + slot * hidden + j, count);
             });
}

template <class T, int mode> void backward(const RnnOptionsBackwardArgs<T>& all) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const RnnBackwardArgs<T>& args = all.layer;
  const RnnOptions<T>& o = all.options;
  const RnnShape& s = args.shape;
  const int64_t hidden = s.hidden, state = s.state, width = s.gates() * hidden;
  const Layer<A> layer(s);
  A* memory = scratch<A>(Slot::family_0, s.batch * (3 * state + 4 * hidden));
  A *carry = memory, *product = carry + s.batch * state, *h0_room = product + s.batch * state,
    *carry_cell = h0_room + s.batch * state, *grads = carry_cell + s.batch * hidden,
    *of_cell = grads + s.batch * hidden;
  const A* c0 = mode == kRnnLstm ? widened(args.c0, s.batch * hidden, of_cell + s.batch * hidden) : nullptr;
  const A* h0 = widened(args.h0, s.batch * state, h0_room);
  copy(args.grad_h_n, carry, s.batch * state);
  if (mode == kRnnLstm) copy(args.grad_c_n, carry_cell, s.batch * hidden);
  for (int64_t i = 0; i < s.batch * state; ++i) product[i] = A(0);

  const int64_t parts = layer.by_panels ? layer.threads : 1, vectors = panel_vectors<A>(state, parts),
                hr_vectors = panel_vectors<A>(hidden, parts);
  const int64_t hr_size = s.projects ? ceil_div(hidden, hr_vectors * lanes) * hr_vectors * lanes * state : 0;
  A* weights = scratch<A>(Slot::family_1, hr_size + ceil_div(state, vectors * lanes) * vectors * lanes * width);
  Packed<A> projection{};
  if (s.projects) projection = pack_columns(args.weight_hr, state, hidden, 0, hr_vectors, weights);
  const Packed<A> recurrent = pack_columns(args.weight_hh, width, state, 0, vectors, weights + hr_size);
  const int64_t block = block_of(recurrent, s.batch, state),
                hr_block = s.projects ? block_of(projection, s.batch, hidden) : 0;
  const auto put_product = [&](int64_t b, int64_t j, const A* sum, int64_t count) {
    copy(sum, product + s.place(b) * state + j, count);
  };

  clear_padding(s, args.grad_gates, width);
  clear_padding(s, all.grad_hidden, width);
  clear_padding(s, all.grad_product, width);
  const BackwardStep<T, mode> step{all, s, o, h0, c0, carry, carry_cell, product, grads, of_cell};
  layer.run(0, s.steps, s.projects ? 4 : 2, true,
            [&](int phase, int64_t n, int64_t begin, int64_t end, int64_t part, int64_t last_part) {
              const int64_t t = layer.step(n);
              const auto share = [&](const Packed<A>& w, int64_t p) { return p * w.panels / layer.threads; };
              const Rows rows(layer, begin, end, part, last_part);
              if (phase == 0) {
                int64_t going_on = begin;  // rows whose sequence goes on: the first ones
                while (going_on < end && layer.after(t, going_on) >= 0) ++going_on;
                multiply_rows(
                    recurrent, state, block, begin, going_on, share(recurrent, part), share(recurrent, last_part),
                    [&](int64_t b) { return all.grad_product + layer.after(t, b) * width; }, put_product);
              } else if (phase == 2) {
                multiply_rows(
                    projection, hidden, hr_block, begin, end, share(projection, part), share(projection, last_part),
                    [&](int64_t b) { return args.grad_states + s.row(t, b) * state; },
                    [&](int64_t b, int64_t j, const A* sum, int64_t count) {
                      copy(sum, grads + s.place(b) * hidden + j, count);
                    });
              }
              for (int64_t b = rows.begin; phase == 1 && b < rows.end; ++b)
                step.state(s.row(t, b), s.place(b),
                           s.projects ? args.grad_states + s.row(t, b) * state : grads + s.place(b) * hidden);
              for (int64_t b = rows.begin; phase == (s.projects ? 3 : 1) && b < rows.end; ++b)
                step(s.row(t, b), layer.before(t, b), s.place(b));
            });

  // The initial states', from the first step of each sequence.
  parallel_for(recurrent.panels, 1 + 32768 / (s.batch * recurrent.panel_size()), [&](int64_t first, int64_t last) {
    multiply_rows(
        recurrent, state, block, 0, s.batch, first, last,
        [&](int64_t b) { return all.grad_product + layer.first_row(b) * width; }, put_product);
  });
  for (int64_t i = 0; i < s.batch * state; ++i) product[i] = product[i] * (o.mask ? o.mask[i] : A(1)) + carry[i];
  copy(product, args.grad_h0, s.batch * state);
  if (mode == kRnnLstm) copy(carry_cell, args.grad_c0, s.batch * hidden);

  if (args.grad_weight_ih) {
    sum_weights(step, layer);
    gather_previous(args, layer, h0, args.previous);
    for (int64_t t = 0; o.mask && t < s.steps; ++t)
      for (int64_t b = 0; b < s.batch_sizes[t]; ++b)
        for (int64_t j = 0; j < state; ++j) args.previous[s.row(t, b) * state + j] *= o.mask[s.place(b) * state + j];
    gemm(Gemm<A, T>{width, state, s.rows, all.grad_product, 1, width, args.previous, state, 1, args.grad_weight_hh,
                    state});
    if (s.projects) projection_gradient(args);
  }
  // The input part's before its normalisation takes the place of that after it.
  if (o.norm_ih)
    for (int64_t t = 0; t < s.steps; ++t)
      parallel_for(s.batch_sizes[t], 1 + 16384 / width, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          A* grad = args.grad_gates + s.row(t, b) * width;
          const A* norm = all.norms + s.row(t, b) * rnn_norm_size(s);
          normalize_backward(grad, o.norm_ih, norm, norm[rnn_norm_size(s) - 3], width, grad);
        }
      });
  input_gradients(args, args.grad_gates, width);
}

template <class T> void dispatch(const RnnOptionsBackwardArgs<T>& args) {
  with_mode(args.layer.shape.mode, [&]<int mode>() { backward<T, mode>(args); });
}

void backward_in_double(const RnnOptionsBackwardArgs<float>& a) {
  const RnnShape& s = a.layer.shape;
  const int64_t width = s.gates() * s.hidden;
  Doubles d(s, rooms_of_options(s));
  const RnnBackwardArgs<double> layer = in_double(d, a.layer);
  const RnnOptions<double> options = in_double(d, a.options, s);
  const double* norms = d.of(a.norms, s.rows * rnn_norm_size(s));
  double* hidden = a.grad_hidden == a.layer.grad_gates ? layer.grad_gates : d.room(a.grad_hidden, s.rows * width);
  double* product = a.grad_product == a.grad_hidden ? hidden : d.room(a.grad_product, s.rows * width);
  const RnnOptionsBackwardArgs<double> args{layer,
                                            options,
                                            norms,
                                            hidden,
                                            product,
                                            d.room(a.grad_normed_cell, s.rows * s.hidden),
                                            d.room(a.grad_peephole, 3 * s.hidden),
                                            d.room(a.grad_norm_ih, width),
                                            d.room(a.grad_norm_hh, width),
                                            d.room(a.grad_norm_c, s.hidden),
                                            d.room(a.grad_norm_c_bias, s.hidden)};
  dispatch(args);
  back(layer, a.layer);
  Doubles::back(args.grad_peephole, a.grad_peephole, 3 * s.hidden);
  Doubles::back(args.grad_norm_ih, a.grad_norm_ih, width);
  Doubles::back(args.grad_norm_hh, a.grad_norm_hh, width);
  Doubles::back(args.grad_norm_c, a.grad_norm_c, s.hidden);
  Doubles::back(args.grad_norm_c_bias, a.grad_norm_c_bias, s.hidden);
}

}  // namespace

void rnn_options_backward(const RnnOptionsBackwardArgs<float>& args) {
  few_products(args.layer.shape) ? backward_in_double(args) : dispatch(args);
}
void rnn_options_backward(const RnnOptionsBackwardArgs<double>& args) { dispatch(args); }
void rnn_options_backward(const RnnOptionsBackwardArgs<bfloat16>& args) { dispatch(args); }
void rnn_options_backward(const RnnOptionsBackwardArgs<float16>& args) { dispatch(args); }

}  // namespace dlkern::cpu::DLKERN_ISA

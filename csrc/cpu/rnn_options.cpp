// RNN, LSTM and GRU with options (layer normalisation, a mask on the recurrent product, zoneout, peepholes), one layer in
// one direction, forward.
//
// As rnn.cpp, but a step has two phases, since normalisation needs all units of a row: the recurrent product of all
// rows into memory, by panels of the weight; then gates, cell and state, by whole rows. A projection is a third.
#include "rnn_options.h"

#include "gemm.h"
#include "rnn_options_steps.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

template <class T, int mode> struct Step {
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int64_t lanes = kLanes<A>;
  const RnnOptionsForwardArgs<T>& args;
  const RnnShape& s;
  const RnnOptions<T>& o;
  const A* hidden_bias;  // of GRU's n, [hidden]
  A *state, *masked, *cell;  // [batch, state] twice, the same memory where there is no mask; [batch, hidden]
  A *sums, *made;  // the recurrent product [batch, gates * hidden]; the cell, then the output [batch, hidden]

  // The state of some units of a row, from the new one.
  void finish(int64_t row, int64_t b, int64_t j, int64_t count, V h) const {
    const int64_t at = b * s.state + j, out = row * s.state + j;
    h = zone_out<A>(h, load_some(state + at, count), o.fresh_h ? o.fresh_h + out : nullptr, o.zoneout_h, count);
    store_some(state + at, h, count);
    if (o.mask) store_some(masked + at, h * load_some(o.mask + at, count), count);
    store_some(args.layer.output + out, h, count);
  }

  void operator()(int64_t row, int64_t b) const {
    const int64_t hidden = s.hidden, width = s.gates() * hidden;
    A *gate = args.layer.gates + row * s.slots() * hidden, *sum = sums + b * width;
    A* norm = o.norm_hh ? args.norms + row * rnn_norm_size(s) : nullptr;
    A* scales = norm ? norm + rnn_norm_size(s) - 3 : nullptr;
    if (norm) {
      scales[1] = normalize(sum, width, norm + width);
      for (int64_t j = 0; j < width; j += lanes) {
        const int64_t count = smaller(lanes, width - j);
        store_some(sum + j, load_some(norm + width + j, count) * load_some(o.norm_hh + j, count), count);
      }
    }
    if constexpr (mode == kRnnLstm) {
      lstm(row, b, gate, sum, norm, scales);
      return;
    }
    for (int64_t j = 0; j < hidden; j += lanes) {
      const int64_t count = smaller(lanes, hidden - j);
      const auto in = [count, j](const A* p) { return load_some(p + j, count); };
      const auto out = [count, j](A* p, V v) { store_some(p + j, v, count); };
      if constexpr (mode == kRnnGru) {
        V recurrent = in(sum + 2 * hidden);
        if (hidden_bias) recurrent += in(hidden_bias);
        const V r = sigmoid(in(gate + hidden) + in(sum)), z = sigmoid(in(gate + 2 * hidden) + in(sum + hidden)),
                n = tanh(in(gate + 3 * hidden) + r * recurrent);
        out(gate, recurrent);
        out(gate + hidden, r);
        out(gate + 2 * hidden, z);
        out(gate + 3 * hidden, n);
        finish(row, b, j, count, n + z * (in(state + b * s.state) - n));
      } else {
        const V x = in(gate) + in(sum), nan = x != x ? x : V{};
        const V h = mode == kRnnTanh ? tanh(x) : (x > A(0) ? x : nan);
        out(gate, mode == kRnnTanh ? A(1) - h * h : (x > A(0) ? broadcast<A>(1) : nan));
        finish(row, b, j, count, h);
      }
    }
  }

  void lstm(int64_t row, int64_t b, A* gate, const A* sum, A* norm, A* scales) const {
    const int64_t hidden = s.hidden;
    A *c_of_b = cell + b * hidden, *c_made = made + b * hidden;
    for (int64_t j = 0; j < hidden; j += lanes) {
      const int64_t count = smaller(lanes, hidden - j);
      const auto in = [count, j](const auto* p) { return load_some(p + j, count); };
      const auto out = [count, j](A* p, V v) { store_some(p + j, v, count); };
      const V before = in(c_of_b);
      V i = in(gate) + in(sum), f = in(gate + hidden) + in(sum + hidden),
        x = in(gate + 3 * hidden) + in(sum + 3 * hidden);
      if (o.peephole) {
        i += in(o.peephole) * before;
        f += in(o.peephole + hidden) * before;
      }
      i = sigmoid(i);
      f = sigmoid(f);
      const V g = tanh(in(gate + 2 * hidden) + in(sum + 2 * hidden)), c = f * before + i * g;
      if (o.peephole) x += in(o.peephole + 2 * hidden) * c;
      out(gate, i);
      out(gate + hidden, f);
      out(gate + 2 * hidden, g);
      out(gate + 3 * hidden, sigmoid(x));
      out(c_made, c);
      const V kept = zone_out<A>(c, before, o.fresh_c ? o.fresh_c + row * hidden + j : nullptr, o.zoneout_c, count);
      out(c_of_b, kept);
      if (args.layer.cells) out(args.layer.cells + row * hidden, kept);
    }
    A* normed = norm ? norm + 2 * s.gates() * hidden : c_made;
    if (norm) scales[2] = normalize(c_made, hidden, normed);
    for (int64_t j = 0; j < hidden; j += lanes) {
      const int64_t count = smaller(lanes, hidden - j);
      V c = load_some(normed + j, count);
      if (norm) c *= load_some(o.norm_c + j, count);
      if (o.norm_c_bias) c += load_some(o.norm_c_bias + j, count);
      const V h = load_some(gate + 3 * hidden + j, count) * tanh(c);
      if (s.projects)
        store_some(c_made + j, h, count);
      else
        finish(row, b, j, count, h);
    }
  }
};

template <class T, int mode> void forward(const RnnOptionsForwardArgs<T>& all) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const RnnForwardArgs<T>& args = all.layer;
  const RnnOptions<T>& o = all.options;
  const RnnShape& s = args.shape;
  const int64_t hidden = s.hidden, state = s.state, width = s.gates() * hidden, row_size = s.slots() * hidden;
  const Layer<A> layer(s);
  A* memory = scratch<A>(Slot::family_0, width + hidden + s.batch * ((o.mask ? 2 : 1) * state + 2 * hidden + width));
  A *bias = memory, *hidden_bias = bias + width, *cell = hidden_bias + hidden, *made = cell + s.batch * hidden,
    *sums = made + s.batch * hidden, *states = sums + s.batch * width,
    *masked = o.mask ? states + s.batch * state : states;
  copy(args.h0, states, s.batch * state);
  for (int64_t i = 0; o.mask && i < s.batch * state; ++i) masked[i] = states[i] * o.mask[i];
  if (mode == kRnnLstm) copy(args.c0, cell, s.batch * hidden);
  const bool biased = combine_biases<mode>(args, bias, hidden_bias);

  A* inputs = args.gates + row_size - width;
  gemm(Gemm<T, A>{s.rows, width, s.inputs, args.input, s.inputs, 1, args.weight_ih, 1, s.inputs, inputs, row_size},
       AddBias<A>{biased && !o.norm_ih ? bias : nullptr});
  if (o.norm_ih)
    parallel_for(s.rows, 1 + 16384 / width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        A *x = inputs + row * row_size, *norm = all.norms + row * rnn_norm_size(s);
        norm[rnn_norm_size(s) - 3] = normalize(x, width, norm);
        for (int64_t j = 0; j < width; j += lanes) {
          const int64_t count = smaller(lanes, width - j);
          Vec<A> value = load_some(norm + j, count) * load_some(o.norm_ih + j, count);
          if (biased) value += load_some(bias + j, count);
          store_some(x + j, value, count);
        }
      }
    });

  const int64_t parts = layer.by_panels ? layer.threads : 1, vectors = panel_vectors<A>(width, parts),
                hr_vectors = panel_vectors<A>(state, parts);
  const int64_t hr_size = s.projects ? ceil_div(state, hr_vectors * lanes) * hr_vectors * lanes * hidden : 0;
  A* weights = scratch<A>(Slot::family_1, hr_size + ceil_div(width, vectors * lanes) * vectors * lanes * state);
  Packed<A> projection{};
  if (s.projects) projection = pack_rows(args.weight_hr, 1, state, hidden, hr_vectors, weights);
  const Packed<A> recurrent = pack_rows(args.weight_hh, 1, width, state, vectors, weights + hr_size);
  const int64_t block = block_of(recurrent, s.batch, width),
                hr_block = s.projects ? block_of(projection, s.batch, state) : 0;

  const Step<T, mode> step{all, s, o, biased ? hidden_bias : nullptr, states, masked, cell, sums, made};
  layer.run(0, s.steps, s.projects ? 3 : 2, false,
            [&](int phase, int64_t n, int64_t begin, int64_t end, int64_t part, int64_t last_part) {
              const int64_t t = layer.step(n);
              const auto share = [&](const Packed<A>& w, int64_t p) { return p * w.panels / layer.threads; };
              if (phase == 0) {
                multiply_rows(
                    recurrent, width, block, begin, end, share(recurrent, part), share(recurrent, last_part),
                    [&](int64_t b) { return masked + s.place(b) * state; },
                    [&](int64_t b, int64_t j, const A* sum, int64_t count) {
                      copy(sum, sums + s.place(b) * width + j, count);
                    });
              } else if (phase == 1) {
                const Rows rows(layer, begin, end, part, last_part);
                for (int64_t b = rows.begin; b < rows.end; ++b) step(s.row(t, b), s.place(b));
              } else {
                multiply_rows(
                    projection, state, hr_block, begin, end, share(projection, part), share(projection, last_part),
                    [&](int64_t b) { return made + s.place(b) * hidden; },
                    [&](int64_t b, int64_t j, const A* sum, int64_t count) {
                      for (int64_t v = 0; v < count; v += lanes)
                        step.finish(s.row(t, b), s.place(b), j + v, smaller(lanes, count - v), load(sum + v));
                    });
              }
            });
  clear_padding(s, args.output, state);
  copy(states, args.h_n, s.batch * state);
  if (mode == kRnnLstm) copy(cell, args.c_n, s.batch * hidden);
}

template <class T> void dispatch(const RnnOptionsForwardArgs<T>& args) {
  with_mode(args.layer.shape.mode, [&]<int mode>() { forward<T, mode>(args); });
}

void forward_in_double(const RnnOptionsForwardArgs<float>& a) {
  const RnnShape& s = a.layer.shape;
  Doubles d(s, rooms_of_options(s));
  const RnnForwardArgs<double> layer = in_double(d, a.layer);
  const RnnOptionsForwardArgs<double> args{layer, in_double(d, a.options, s),
                                           d.room(a.norms, s.rows * rnn_norm_size(s))};
  dispatch(args);
  back(layer, a.layer);
  Doubles::back(args.norms, a.norms, s.rows * rnn_norm_size(s));
}

}  // namespace

void rnn_options_forward(const RnnOptionsForwardArgs<float>& args) {
  few_products(args.layer.shape) ? forward_in_double(args) : dispatch(args);
}
void rnn_options_forward(const RnnOptionsForwardArgs<double>& args) { dispatch(args); }
void rnn_options_forward(const RnnOptionsForwardArgs<bfloat16>& args) { dispatch(args); }
void rnn_options_forward(const RnnOptionsForwardArgs<float16>& args) { dispatch(args); }

}  // namespace dlkern::cpu::DLKERN_ISA

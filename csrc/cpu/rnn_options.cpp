// RNN, LSTM and GRU with options (layer normalisation, a mask on the recurrent product, zoneout, peepholes), one layer in
// one direction, forward.
//
// As rnn.cpp: gates are applied to a tile right after its product. But normalisation needs all units of a row, so with it
// (and where kByRows) a step has two phases: the recurrent product of all rows into memory, then gates, cell and state by whole rows. A projection
// is one more.
#include "rnn_gates.h"
#include "rnn_inputs.h"
#include "rnn_options_steps.h"
#include "rnn_product.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

// Some steps of the layer.
template <class T, int mode> struct Steps {
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int64_t lanes = kLanes<A>;
  const RnnOptionsForwardArgs<T>& args;
  const RnnShape& s;
  const RnnOptions<T>& o;
  const A* hidden_bias;  // of GRU's n, [hidden]
  A *states, *masked;  // of two steps [2, batch, state], the same memory where there is no mask
  A *cell, *made;  // [batch, hidden]: the cell; the new one before its normalisation, then the output to be projected
  A* sums;  // the recurrent product, where it is normalised, [batch, gates * hidden]
  int64_t first_row, norm_size;
  A *gates, *norms;  // of rows from the first one on

  // A sequence b, whose row is `row`, in the n-th step.
  struct Place {
    int64_t row, b;
    A *gate, *norm;
    const A* old;
    A *next, *masked;
  };
  const A* met(int64_t n, int64_t b) const { return masked + (n % 2 * s.batch + b) * s.state; }
  Place place(int64_t n, int64_t row, int64_t b) const {
    const int64_t next = ((n + 1) % 2 * s.batch + b) * s.state;
    return {row,
            b,
            gates + (row - first_row) * s.slots() * s.hidden,
            norms + (row - first_row) * norm_size,
            states + (n % 2 * s.batch + b) * s.state,
            states + next,
            masked + next};
  }

  // The state of some units of a row, from the new one.
  void finish(const Place& at, int64_t j, V h) const {
    const int64_t count = smaller(lanes, s.state - j), out = at.row * s.state + j;
    h = zone_out<A>(h, load_some(at.old + j, count), o.fresh_h ? o.fresh_h + out : nullptr, o.zoneout_h, count);
    store_some(at.next + j, h, count);
    if (o.mask) store_some(at.masked + j, h * load_some(o.mask + at.b * s.state + j, count), count);
    store_some(args.layer.output + out, h, count);
  }

  // U vectors of units of a row from j on, from their recurrent sums, as new_state() has them.
  template <int U> void units(const Place& at, int64_t j, const A* sum, int64_t gate_step, int64_t unit_step) const {
    if constexpr (mode == kRnnLstm) {
      lstm<U>(at, j, sum, gate_step, unit_step);
    } else {
      V h[U];
      new_state<T, mode>(at.gate, at.old, s.hidden, j, sum, gate_step, unit_step, hidden_bias, args.layer.gates, h);
      for (int u = 0; u < U; ++u) finish(at, j + u * lanes, h[u]);
    }
  }

  template <int U> void lstm(const Place& at, int64_t j, const A* sum, int64_t gate_step, int64_t unit_step) const {
    const int64_t hidden = s.hidden;
    const auto in = [&](const auto* p, int u) { return load_some(p + j + u * lanes, hidden - j - u * lanes); };
    const auto out = [&](A* p, int u, V v) { store_some(p + j + u * lanes, v, hidden - j - u * lanes); };
    const auto input = [&](int gate, int u) {
      return in(at.gate + gate * hidden, u) + load(sum + gate * gate_step + u * unit_step);
    };
    A* const c_of_b = cell + at.b * hidden;
    V x[3 * U], y[2 * U];  // i, f, g; o, the cell
    for (int u = 0; u < U; ++u) {
      for (int gate = 0; gate < 3; ++gate) x[gate * U + u] = input(gate, u);
      for (int gate = 0; o.peephole && gate < 2; ++gate)
        x[gate * U + u] += in(o.peephole + gate * hidden, u) * in(c_of_b, u);
    }
    activate_gates<T, 2 * U>(x);
    for (int u = 0; u < U; ++u) {
      const V before = in(c_of_b, u), c = x[U + u] * before + x[u] * x[2 * U + u];
      y[u] = input(3, u);
      y[U + u] = c;
      if (o.peephole) y[u] += in(o.peephole + 2 * hidden, u) * c;
      const int64_t from = at.row * hidden + j + u * lanes;
      const V kept =
          zone_out<A>(c, before, o.fresh_c ? o.fresh_c + from : nullptr, o.zoneout_c, hidden - j - u * lanes);
      out(c_of_b, u, kept);
      if (!args.layer.gates) continue;
      for (int gate = 0; gate < 3; ++gate) out(at.gate + gate * hidden, u, x[gate * U + u]);
      out(args.layer.cells + at.row * hidden, u, kept);
    }
    if (!o.norm_c) return lstm_output<U>(at, j, y);
    for (int u = 0; u < U; ++u) {
      out(at.gate + 3 * hidden, u, y[u]);
      out(made + at.b * hidden, u, y[U + u]);
    }
  }

  // y: o before its activation, and the cell, normalised where that is.
  template <int U> void lstm_output(const Place& at, int64_t j, V (&y)[2 * U]) const {
    activate_gates<T, U>(y);
    for (int u = 0; u < U; ++u) {
      const int64_t unit = j + u * lanes, count = s.hidden - unit;
      if (args.layer.gates) store_some(at.gate + 3 * s.hidden + unit, y[u], count);
      const V h = y[u] * y[U + u];
      if (s.projects)
        store_some(made + at.b * s.hidden + unit, h, count);
      else
        finish(at, unit, h);
    }
  }

  // Calls visit.operator()<U>(j) for all units of a row.
  template <class Visit> void each(const Visit& visit) const {
    int64_t j = 0;
    for (; j + lanes < s.hidden; j += 2 * lanes) visit.template operator()<2>(j);
    if (j < s.hidden) visit.template operator()<1>(j);
  }

  // A whole row, whose sums are in memory.
  void whole_row(const Place& at) const {
    const int64_t hidden = s.hidden, width = s.gates() * hidden;
    A* const sum = sums + at.b * width;
    if (norm_size == 0) return each([&]<int U>(int64_t j) { units<U>(at, j, sum + j, hidden, lanes); });
    A* const scales = at.norm + norm_size - 3;
    scales[1] = normalize(sum, width, at.norm + width);
    for (int64_t j = 0; j < width; j += lanes) {
      const int64_t count = smaller(lanes, width - j);
      store_some(sum + j, load_some(at.norm + width + j, count) * load_some(o.norm_hh + j, count), count);
    }
    each([&]<int U>(int64_t j) { units<U>(at, j, sum + j, hidden, lanes); });
    if constexpr (mode == kRnnLstm) {
      A* c = at.norm + 2 * width;
      scales[2] = normalize(made + at.b * hidden, hidden, c);
      each([&]<int U>(int64_t j) {
        const auto in = [&](const auto* p, int u) { return load_some(p + j + u * lanes, hidden - j - u * lanes); };
        V y[2 * U];
        for (int u = 0; u < U; ++u) {
          y[u] = in(at.gate + 3 * hidden, u);
          y[U + u] = in(c, u) * in(o.norm_c, u);
          if (o.norm_c_bias) y[U + u] += in(o.norm_c_bias, u);
        }
        lstm_output<U>(at, j, y);
      });
    }
  }
};

// The inputs' part of some rows, normalised; it begins at the end of each of `gates`.
template <class T>
void normalize_inputs(const RnnShape& s, const RnnOptions<T>& o, const acc_t<T>* bias, int64_t rows, acc_t<T>* gates,
                      acc_t<T>* norms) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t width = s.gates() * s.hidden, row_size = s.slots() * s.hidden, norm_size = rnn_norm_size(s);
  parallel_for(rows, 1 + 16384 / width, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      A *x = gates + (row + 1) * row_size - width, *norm = norms + row * norm_size;
      norm[norm_size - 3] = normalize(x, width, norm);
      for (int64_t j = 0; j < width; j += lanes) {
        const int64_t count = smaller(lanes, width - j);
        Vec<A> value = load_some(norm + j, count) * load_some(o.norm_ih + j, count);
        if (bias) value += load_some(bias + j, count);
        store_some(x + j, value, count);
      }
    }
  });
}

template <class T, int mode> void forward(const RnnOptionsForwardArgs<T>& all) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const RnnForwardArgs<T>& args = all.layer;
  const RnnOptions<T>& o = all.options;
  const RnnShape& s = args.shape;
  const int64_t hidden = s.hidden, state = s.state, width = s.gates() * hidden;
  const bool normed = o.norm_hh, by_rows = normed || kByRows<mode>;
  const int64_t norm_size = normed ? rnn_norm_size(s) : 0;
  const Layer<A> layer(s);
  const int64_t sums_size = by_rows ? s.batch * width + lanes : 0;  // a row's last vectors may reach beyond it
  A* memory =
      scratch<A>(Slot::family_0, width + hidden + s.batch * ((o.mask ? 4 : 2) * state + 2 * hidden) + sums_size);
  A *bias = memory, *hidden_bias = bias + width, *cell = hidden_bias + hidden, *made = cell + s.batch * hidden,
    *states = made + s.batch * hidden, *masked = o.mask ? states + 2 * s.batch * state : states,
    *sums = masked + 2 * s.batch * state;
  // In both halves: a sequence begins in either.
  copy(args.h0, states, s.batch * state);
  copy(args.h0, states + s.batch * state, s.batch * state);
  for (int64_t i = 0; o.mask && i < s.batch * state; ++i)
    masked[i] = masked[s.batch * state + i] = states[i] * o.mask[i];
  if (mode == kRnnLstm) copy(args.c0, cell, s.batch * hidden);
  const bool biased = combine_biases<mode>(args, bias, hidden_bias);

  const int64_t parts = layer.by_panels ? layer.threads : 1;
  const bool tiled = by_tiles<T>(s);
  StepWeight<T> recurrent(tiled, s.gates(), hidden, state, s.gates() == 1 ? panel_vectors<A>(hidden, parts) : 1),
      projection(tiled, 1, state, hidden, panel_vectors<A>(state, parts));
  const int64_t hr_size = s.projects ? projection.size() : 0;
  A* weights = scratch<A>(Slot::family_1, hr_size + recurrent.size());
  if (s.projects) projection.pack_weight_rows(args.weight_hr, s.batch, weights);
  recurrent.pack_weight_rows(args.weight_hh, s.batch, weights + hr_size);

  const auto visit = [&](int64_t n0, int64_t n1, int64_t first_row, int64_t rows, A* gates) {
    A* norms = args.gates ? all.norms : gates + rows * s.slots() * hidden;
    if (normed) normalize_inputs(s, o, biased ? bias : nullptr, rows, gates, norms);
    const Steps<T, mode> steps{
        all,       s,     o,    biased ? hidden_bias : nullptr, states, masked, cell, made, sums, first_row,
        norm_size, gates, norms};
    layer.run(n0, n1, 1 + by_rows + s.projects, false,
              [&](int phase, int64_t n, int64_t begin, int64_t end, int64_t part, int64_t last_part) {
                const int64_t t = layer.step(n);
                const auto place = [&](int64_t b) { return steps.place(n, s.row(t, b), s.place(b)); };
                const auto multiply = [&](const StepWeight<T>& w, const auto& row, const auto& put) {
                  multiply_rows(w, begin, end, part * w.panels / layer.threads, last_part * w.panels / layer.threads,
                                row, put);
                };
                if (phase == 0) {
                  multiply(
                      recurrent, [&](int64_t b) { return steps.met(n, s.place(b)); },
                      [&](int64_t b, int64_t panel, const A* sum) {
                        if (by_rows) {
                          each_vector(recurrent, panel, sum, [&](int64_t j, const A* from) {
                            A* to = sums + s.place(b) * width + j;
                            for (int64_t gate = 0; gate < s.gates(); ++gate)
                              store_some(to + gate * hidden, load(from + gate * recurrent.gate_step), hidden - j);
                          });
                          return;
                        }
                        const auto at = place(b);
                        const int64_t gate_step = recurrent.gate_step, unit_step = recurrent.unit_step,
                                      first = panel * recurrent.unit_vectors,
                                      some = smaller(recurrent.unit_vectors, ceil_div(hidden, lanes) - first);
                        int64_t u = 0;
                        for (; u + 1 < some; u += 2)
                          steps.template units<2>(at, (first + u) * lanes, sum + u * unit_step, gate_step, unit_step);
                        if (u < some)
                          steps.template units<1>(at, (first + u) * lanes, sum + u * unit_step, gate_step, unit_step);
                      });
                } else if (by_rows && phase == 1) {
                  const Rows rows_of_thread(layer, begin, end, part, last_part);
                  for (int64_t b = rows_of_thread.begin; b < rows_of_thread.end; ++b) steps.whole_row(place(b));
                } else {
                  multiply(
                      projection, [&](int64_t b) { return made + s.place(b) * hidden; },
                      [&](int64_t b, int64_t panel, const A* sum) {
                        each_vector(projection, panel, sum,
                                    [&](int64_t j, const A* from) { steps.finish(place(b), j, load(from)); });
                      });
                }
              });
  };
  in_chunks(args, layer, biased && !normed ? bias : nullptr, norm_size, visit);
  clear_padding(s, args.output, state);
  for (int64_t b = 0; b < s.batch; ++b)
    copy(args.output + layer.last_row(b) * state, args.h_n + s.place(b) * state, state);
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

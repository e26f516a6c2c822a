// RNN, LSTM and GRU, one layer in one direction, forward.
//
// The product of all inputs with their weight is one matrix product (gemm.h) into the gates' memory (some steps at a
// time where nothing is kept for the backward); then, step by step, the recurrent product is added and the gates are
// applied while a tile is in the first-level cache. Recurrent weights are packed once a call, as panels that hold all
// gates of a few hidden units, so that a tile's sums are what its units need. An LSTM's projection is a second phase of
// each step. Floor: 2 rows gates hidden (inputs + state) flops, or reading the recurrent weights once a step.
#include "rnn.h"

#include "rnn_gates.h"
#include "rnn_inputs.h"
#include "rnn_product.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

// What one row of a step reads and writes.
template <class T> struct Place {
  acc_t<T>* gate;  // what the input gives, [slots * hidden]
  const acc_t<T>* previous;  // state
  acc_t<T>*cell, *saved_cell;  // [hidden], the second or null
  acc_t<T>* next;  // state
  T* output;  // where that is rounded to, or null
};

// U vectors of hidden units of one row, from j on: gates from what they hold of the input and the recurrent sums of the
// panel, of the first vector at `sums`, a vector a gate; `steps` are between gates and between vectors of units.
template <class T, int mode, int U>
void apply_gates(const Place<T>& at, int64_t hidden, int64_t j, const acc_t<T>* sums, int64_t gate_step,
                 int64_t unit_step, const acc_t<T>* hidden_bias, bool keep) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<A>;
  const auto in = [&](const A* p, int u) { return load_some(p + j + u * lanes, hidden - j - u * lanes); };
  const auto out = [&](A* p, int u, V v) { store_some(p + j + u * lanes, v, hidden - j - u * lanes); };
  const auto sum = [&](int gate, int u) { return load(sums + gate * gate_step + u * unit_step); };
  A* const gate = at.gate;
  V h[U];
  if constexpr (mode == kRnnLstm) {
    V c[U], o[U];
    for (int u = 0; u < U; ++u) {
      V x[4] = {in(gate, u) + sum(0, u), in(gate + hidden, u) + sum(1, u), in(gate + 3 * hidden, u) + sum(3, u),
                in(gate + 2 * hidden, u) + sum(2, u)};
      activate_gates<T, 3>(x);
      c[u] = x[1] * in(at.cell, u) + x[0] * x[3];
      o[u] = x[2];
      h[u] = c[u];
      out(at.cell, u, c[u]);
      if (keep) {
        out(gate, u, x[0]);
        out(gate + hidden, u, x[1]);
        out(gate + 2 * hidden, u, x[3]);
        out(gate + 3 * hidden, u, x[2]);
        out(at.saved_cell, u, c[u]);
      }
    }
    activate_gates<T, 0>(h);
    for (int u = 0; u < U; ++u) h[u] *= o[u];
  } else {
    new_state<T, mode>(gate, at.previous, hidden, j, sums, gate_step, unit_step, hidden_bias, keep, h);
  }
  for (int u = 0; u < U; ++u) {
    out(at.next, u, h[u]);
    if (at.output) store_some(at.output + j + u * lanes, h[u], hidden - j - u * lanes);
  }
}

template <class T, int mode> void forward(const RnnForwardArgs<T>& args) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  constexpr bool same = sizeof(T) == sizeof(A);
  const RnnShape& s = args.shape;
  const int64_t gates = s.gates(), hidden = s.hidden, state = s.state, width = gates * hidden,
                row_size = s.slots() * hidden;
  const Layer<A> layer(s);
  A* memory = scratch<A>(Slot::family_0, width + hidden + s.batch * (3 * state + 2 * hidden));
  A *bias = memory, *hidden_bias = bias + width, *cell = hidden_bias + hidden, *unprojected = cell + s.batch * hidden,
    *first = unprojected + s.batch * hidden,
    *states = first + s.batch * state;  // the last two steps', where the output rounds them
  const A* h0 = widened(args.h0, s.batch * state, first);
  if (mode == kRnnLstm) copy(args.c0, cell, s.batch * hidden);
  const bool biased = combine_biases<mode>(args, bias, hidden_bias);

  const int64_t parts = layer.by_panels ? layer.threads : 1;
  const bool tiled = by_tiles<T>(s);
  StepWeight<T> recurrent(tiled, gates, hidden, state, gates == 1 ? panel_vectors<A>(hidden, parts) : 1),
      projection(tiled, 1, state, hidden, panel_vectors<A>(state, parts));
  const int64_t hr_size = s.projects ? projection.size() : 0;
  A* weights = scratch<A>(Slot::family_1, hr_size + recurrent.size());
  if (s.projects) projection.pack_weight_rows(args.weight_hr, s.batch, weights);
  recurrent.pack_weight_rows(args.weight_hh, s.batch, weights + hr_size);

  const bool keep = args.gates;
  in_chunks(args, layer, biased ? bias : nullptr, 0, [&](int64_t n0, int64_t n1, int64_t first_row, int64_t, A* chunk) {
    layer.run(n0, n1, s.projects ? 2 : 1, false,
              [&](int phase, int64_t n, int64_t begin, int64_t end, int64_t part, int64_t last_part) {
                const StepWeight<T>& w = phase ? projection : recurrent;
                const int64_t panel0 = part * w.panels / layer.threads, panel1 = last_part * w.panels / layer.threads;
                const int64_t t = layer.step(n);
                A* sums = scratch<A>(Slot::family_2, kMostRows * w.width());
                A* next = states + (n + 1) % 2 * s.batch * state;
                const A* rows_of[kMostRows];
                Place<T> places[kMostRows];
                for (int64_t b0 = begin; b0 < end; b0 += w.block_rows) {
                  const int64_t count = smaller(w.block_rows, end - b0);
                  for (int64_t i = 0; i < count; ++i) {
                    const int64_t b = s.place(b0 + i), row = s.row(t, b0 + i), before = layer.before(t, b0 + i);
                    Place<T>& at = places[i];
                    at.previous = h0 + b * state;
                    T* output = args.output + row * state;
                    if constexpr (same) {
                      if (before >= 0) at.previous = args.output + before * state;
                      at.next = output;
                      at.output = nullptr;
                    } else {
                      if (before >= 0) at.previous = states + n % 2 * s.batch * state + b * state;
                      at.next = next + b * state;
                      at.output = output;
                    }
                    rows_of[i] = phase ? unprojected + b * hidden : at.previous;
                    if (s.projects && !phase) {
                      at.next = unprojected + b * hidden;
                      at.output = nullptr;
                    }
                    at.gate = chunk + (row - first_row) * row_size;
                    at.cell = cell + b * hidden;
                    at.saved_cell = keep && mode == kRnnLstm ? args.cells + row * hidden : nullptr;
                  }
                  const StepRows<T> rows(w, rows_of, count);
                  for (int64_t panel = panel0; panel < panel1; ++panel) {
                    rows.multiply(panel, sums);
                    for (int64_t i = 0; i < count; ++i) {
                      const A* sum = sums + i * w.width();
                      if (phase) {
                        const int64_t j = panel * w.width(), some = smaller(w.width(), state - j);
                        copy(sum, places[i].next + j, some);
                        if (places[i].output) copy(sum, places[i].output + j, some);
                        continue;
                      }
                      const auto apply = [&]<int U>(int64_t u) {
                        apply_gates<T, mode, U>(places[i], hidden, (panel * w.unit_vectors + u) * lanes,
                                                sum + u * w.unit_step, w.gate_step, w.unit_step,
                                                biased ? hidden_bias : nullptr, keep);
                      };
                      const int64_t some = smaller(w.unit_vectors, ceil_div(hidden, lanes) - panel * w.unit_vectors);
                      int64_t u = 0;
                      for (; u + 1 < some; u += 2) apply.template operator()<2>(u);
                      if (u < some) apply.template operator()<1>(u);
                    }
                  }
                }
              });
  });
  clear_padding(s, args.output, state);
  for (int64_t b = 0; b < s.batch; ++b)
    copy(args.output + layer.last_row(b) * state, args.h_n + s.place(b) * state, state);
  if (mode == kRnnLstm) copy(cell, args.c_n, s.batch * hidden);
}

void forward_in_double(const RnnForwardArgs<float>& a) {
  Doubles d(a.shape);
  const RnnForwardArgs<double> args = in_double(d, a);
  rnn_forward(args);
  back(args, a);
}

template <class T> void dispatch(const RnnForwardArgs<T>& args) {
  with_mode(args.shape.mode, [&]<int mode>() { forward<T, mode>(args); });
}

}  // namespace

void rnn_forward(const RnnForwardArgs<float>& args) {
  few_products(args.shape) ? forward_in_double(args) : dispatch(args);
}
void rnn_forward(const RnnForwardArgs<double>& args) { dispatch(args); }
void rnn_forward(const RnnForwardArgs<bfloat16>& args) { dispatch(args); }
void rnn_forward(const RnnForwardArgs<float16>& args) { dispatch(args); }

}  // namespace dlkern::cpu::DLKERN_ISA

// RNN, LSTM and GRU, one layer in one direction, backward: from the gradient of a step's gates to that of the step
// before, step by step, then one matrix product each for the gradients of input and weights.
#include "column_sums.h"
#include "gemm.h"
#include "rnn.h"
#include "rnn_gradients.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

// One vector of hidden units of one row: the gradient of its gates from that of its output; what goes on to the step
// before past the gates is left in `direct` (GRU) and `cell` (LSTM).
template <class T, int mode> struct BackwardCell {
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int64_t lanes = kLanes<A>;
  const RnnBackwardArgs<T>& args;
  const A *h0, *c0;
  A *direct, *cell;  // [batch, hidden]

  // dh: the gradient of the output; goes_on: the sequence has a step after this.
  void operator()(int64_t row, int64_t before, int64_t b, int64_t j, int count, V dh, bool goes_on) const {
    const int64_t hidden = args.shape.hidden, slots = args.shape.slots();
    const auto in = [count](auto* p) { return load_some(p, count); };
    const auto out = [count](A* p, V v) { store_some(p, v, count); };
    const int64_t at = b * hidden + j;
    const A* gate = args.gates + row * slots * hidden + j;
    A* to = args.grad_gates + row * slots * hidden + j;
    if constexpr (mode == kRnnLstm) {
      const V i = in(gate), f = in(gate + hidden), g = in(gate + 2 * hidden), o = in(gate + 3 * hidden);
      const V c = tanh(in(args.cells + row * hidden + j)),
              c_before = in(before < 0 ? c0 + at : args.cells + before * hidden + j);
      const V dc = (goes_on ? in(cell + at) : in(args.grad_c_n + at)) + dh * o * (A(1) - c * c);
      out(to, dc * g * i * (A(1) - i));
      out(to + hidden, dc * c_before * f * (A(1) - f));
      out(to + 2 * hidden, dc * i * (A(1) - g * g));
      out(to + 3 * hidden, dh * c * o * (A(1) - o));
      out(cell + at, dc * f);
      if (args.unprojected) out(args.unprojected + row * hidden + j, o * c);
    } else if constexpr (mode == kRnnGru) {
      const V recurrent = in(gate), r = in(gate + hidden), z = in(gate + 2 * hidden), n = in(gate + 3 * hidden);
      const V previous = before < 0 ? in(h0 + at) : in(args.output + before * hidden + j);
      const V dn = dh * (A(1) - z) * (A(1) - n * n);
      out(to, dn * r);
      out(to + hidden, dn * recurrent * r * (A(1) - r));
      out(to + 2 * hidden, dh * (previous - n) * z * (A(1) - z));
      out(to + 3 * hidden, dn);
      out(direct + at, dh * z);
    } else {
      out(to, dh * in(gate));
    }
  }
};

// The gradients of input, weight_ih and weight_hh from those of the gates, `grads`; previous: room for states.
template <class T, int mode, class G>
void weight_gradients(const RnnBackwardArgs<T>& args, const Layer<acc_t<T>>& layer, const acc_t<T>* h0, const G* grads,
                      G* previous) {
  const RnnShape& s = args.shape;
  const int64_t hidden = s.hidden, state = s.state, row_size = s.slots() * hidden;
  input_gradients(args, grads + row_size - s.gates() * hidden, row_size);
  if (!args.grad_weight_hh) return;
  gather_previous<T, acc_t<T>>(args, layer, h0, nullptr, previous);
  const auto of_recurrent = [&](int64_t slot, int64_t gate, int64_t some) {
    gemm(Gemm<G, T>{some * hidden, state, s.rows, grads + slot * hidden, 1, row_size, previous, state, 1,
                    args.grad_weight_hh + gate * hidden * state, state});
  };
  if (mode == kRnnGru) {
    of_recurrent(1, 0, 2);
    of_recurrent(0, 2, 1);
  } else {
    of_recurrent(0, 0, s.gates());
  }
}

template <class T, int mode> void backward(const RnnBackwardArgs<T>& args) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const RnnShape& s = args.shape;
  const int64_t hidden = s.hidden, state = s.state, width = s.gates() * hidden, row_size = s.slots() * hidden;
  const Layer<A> layer(s);
  A* memory = scratch<A>(Slot::family_0, s.batch * (3 * hidden + state));
  A *direct = memory, *cells = direct + s.batch * hidden, *c0_room = cells + s.batch * hidden;
  const A* c0 = mode == kRnnLstm ? widened(args.c0, s.batch * hidden, c0_room) : nullptr;
  const A* h0 = widened(args.h0, s.batch * state, c0_room + s.batch * hidden);

  // The recurrent weight as rows of the gradient of gates see it (GRU's: n, r, z).
  const int64_t parts = layer.by_panels ? layer.threads : 1;
  const bool tiled = by_tiles<T>(s);
  StepWeight<T> recurrent(tiled, 1, state, width, panel_vectors<A>(state, parts)),
      projection(tiled, 1, hidden, state, panel_vectors<A>(hidden, parts));
  const int64_t hr_size = s.projects ? projection.size() : 0;
  A* weights = scratch<A>(Slot::family_1, hr_size + recurrent.size());
  if (s.projects) projection.pack_weight_columns(args.weight_hr, 0, s.batch, weights);
  recurrent.pack_weight_columns(args.weight_hh, mode == kRnnGru ? 2 * hidden : 0, s.batch, weights + hr_size);

  clear_padding(s, args.grad_gates, row_size);
  const BackwardCell<T, mode> cell{args, h0, c0, direct, cells};
  layer.run(0, s.steps, s.projects ? 2 : 1, true,
            [&](int phase, int64_t n, int64_t begin, int64_t end, int64_t part, int64_t last_part) {
              const StepWeight<T>& w = phase ? projection : recurrent;
              const int64_t panel0 = part * w.panels / layer.threads, panel1 = last_part * w.panels / layer.threads;
              const int64_t t = layer.step(n), units = phase ? hidden : state;
              A* sums = scratch<A>(Slot::family_2, kMostRows * w.width());
              const A* rows[kMostRows];
              for (int64_t b0 = begin; b0 < end; b0 += w.block_rows) {
                const int64_t count = smaller(w.block_rows, end - b0);
                int64_t going_on = 0;  // rows whose sequence goes on: the first ones
                while (going_on < count && layer.after(t, b0 + going_on) >= 0) {
                  rows[going_on] = args.grad_gates + layer.after(t, b0 + going_on) * row_size;
                  ++going_on;
                }
                for (int64_t i = 0; phase && i < count; ++i) rows[i] = args.grad_states + s.row(t, b0 + i) * state;
                const StepRows<T> laid(w, rows, phase ? count : going_on);
                for (int64_t panel = panel0; panel < panel1; ++panel) {
                  laid.multiply(panel, sums);
                  for (int64_t i = 0; i < count; ++i) {
                    const int64_t b = s.place(b0 + i), row = s.row(t, b0 + i), before = layer.before(t, b0 + i);
                    for (int64_t v = 0; v < w.unit_vectors; ++v) {
                      const int64_t j = (panel * w.unit_vectors + v) * lanes;
                      if (j >= units) break;
                      const int some = static_cast<int>(smaller(lanes, units - j));
                      Vec<A> dh = load(sums + (i * w.unit_vectors + v) * lanes);
                      if (!phase) {
                        const Vec<A> of_output = load_some(args.grad_output + row * state + j, some);
                        dh = i < going_on ? of_output + dh : of_output + load_some(args.grad_h_n + b * state + j, some);
                        if (mode == kRnnGru && i < going_on) dh += load_some(direct + b * hidden + j, some);
                      }
                      if (s.projects && !phase)
                        store_some(args.grad_states + row * state + j, dh, some);
                      else
                        cell(row, before, b, j, some, dh, i < going_on);
                    }
                  }
                }
              }
            });

  // The initial states', from the first step of each sequence.
  for (int64_t b0 = 0; b0 < s.batch; b0 += recurrent.block_rows) {
    const int64_t count = smaller(recurrent.block_rows, s.batch - b0);
    const A* rows[kMostRows];
    for (int64_t i = 0; i < count; ++i) rows[i] = args.grad_gates + layer.first_row(b0 + i) * row_size;
    parallel_for(recurrent.panels, 1 + 32768 / (count * recurrent.width() * width), [&](int64_t first, int64_t last) {
      A* sums = scratch<A>(Slot::family_2, kMostRows * recurrent.width());
      const StepRows<T> laid(recurrent, rows, count);
      for (int64_t panel = first; panel < last; ++panel) {
        laid.multiply(panel, sums);
        const int64_t j = panel * recurrent.width(), some = smaller(recurrent.width(), state - j);
        for (int64_t i = 0; i < count; ++i) {
          A* sum = sums + i * recurrent.width();
          const int64_t at = s.place(b0 + i) * state + j;
          for (int64_t e = 0; mode == kRnnGru && e < some; ++e) sum[e] += direct[at + e];
          copy(sum, args.grad_h0 + at, some);
        }
      }
    });
  }
  if (mode == kRnnLstm) copy(cells, args.grad_c0, s.batch * hidden);

  const int64_t to_input = row_size - width;  // GRU's recurrent side has n in the first block
  as_operands<T>(tiled, args.grad_gates, s.rows, row_size, [&]<class G>(const G* grads) {
    weight_gradients<T, mode>(args, layer, h0, grads, reinterpret_cast<G*>(args.previous));
  });
  if (!args.grad_weight_ih) return;
  if (s.projects) projection_gradient(args);
  if (!args.grad_bias_ih) return;
  sum_columns(args.grad_gates + to_input, row_size, 1, s.rows, width, args.grad_bias_ih);
  const int64_t shared = mode == kRnnGru ? 2 * hidden : width;
  std::memcpy(static_cast<void*>(args.grad_bias_hh), args.grad_bias_ih, sizeof(T) * static_cast<size_t>(shared));
  if (mode == kRnnGru) sum_columns(args.grad_gates, row_size, 1, s.rows, hidden, args.grad_bias_hh + shared);
}

void backward_in_double(const RnnBackwardArgs<float>& a) {
  Doubles d(a.shape);
  const RnnBackwardArgs<double> args = in_double(d, a);
  rnn_backward(args);
  back(args, a);
}

template <class T> void dispatch(const RnnBackwardArgs<T>& args) {
  with_mode(args.shape.mode, [&]<int mode>() { backward<T, mode>(args); });
}

}  // namespace

void rnn_backward(const RnnBackwardArgs<float>& args) {
  few_products(args.shape) ? backward_in_double(args) : dispatch(args);
}
void rnn_backward(const RnnBackwardArgs<double>& args) { dispatch(args); }
void rnn_backward(const RnnBackwardArgs<bfloat16>& args) { dispatch(args); }
void rnn_backward(const RnnBackwardArgs<float16>& args) { dispatch(args); }

}  // namespace dlkern::cpu::DLKERN_ISA

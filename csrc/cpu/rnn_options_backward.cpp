// RNN, LSTM and GRU with options, one layer in one direction, backward: as rnn_backward.cpp; with normalisation, a step has
// one more phase, which works on whole rows.
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
  A *grads, *of_cell;  // with normalisation: of the output before the projection, and of the cell [batch, hidden]

  // A sequence b and its row in a step.
  struct Place {
    int64_t row, b;
    const A *gate, *c_before;
    A *to, *to_hidden;  // gradients of the gates and of their recurrent product after its normalisation
    const T* before;  // the output of the step before, or null
  };
  Place place(int64_t row, int64_t before, int64_t b) const {
    const int64_t width = s.gates() * s.hidden;
    return {row,
            b,
            args.layer.gates + row * s.slots() * s.hidden,
            cell_before(before, b),
            args.layer.grad_gates + row * width,
            args.grad_hidden + row * width,
            before < 0 ? nullptr : args.layer.output + before * s.state};
  }
  const A* cell_before(int64_t before, int64_t b) const {
    if (mode != kRnnLstm) return nullptr;
    return before < 0 ? c0 + b * s.hidden : args.layer.cells + before * s.hidden;
  }

  // The gradient of some units' new state from `product`, what the step after gives that of the state before the mask.
  V state(const Place& at, int64_t j, V product) const {
    const int64_t count = smaller(lanes, s.state - j), of_b = at.b * s.state + j, of_row = at.row * s.state + j;
    V dh = product;
    if (o.mask) dh *= load_some(o.mask + of_b, count);
    dh += load_some(args.layer.grad_output + of_row, count) + load_some(carry + of_b, count);
    const A* chosen = o.fresh_h ? o.fresh_h + of_row : nullptr;
    store_some(carry + of_b, zone_out<A>(V{}, dh, chosen, o.zoneout_h, count), count);
    return zone_out<A>(dh, V{}, chosen, o.zoneout_h, count);
  }

  // From that of some units' output before the projection to those of the gates and of their recurrent product.
  void units(const Place& at, int64_t j, V dh) const {
    const int64_t hidden = s.hidden, count = smaller(lanes, hidden - j);
    const auto in = [count, j](const auto* p) { return load_some(p + j, count); };
    const auto out = [count, j](A* p, V v) { store_some(p + j, v, count); };
    if constexpr (mode == kRnnLstm) {
      cell(at, j, output(at, j, in(at.gate + hidden) * in(at.c_before) + in(at.gate) * in(at.gate + 2 * hidden), dh));
    } else if constexpr (mode == kRnnGru) {
      const V recurrent = in(at.gate), r = in(at.gate + hidden), z = in(at.gate + 2 * hidden),
              n = in(at.gate + 3 * hidden);
      const V previous = at.before ? in(at.before) : in(h0 + at.b * hidden);
      const V dn = dh * (A(1) - z) * (A(1) - n * n), dr = dn * recurrent * r * (A(1) - r),
              dz = dh * (previous - n) * z * (A(1) - z);
      out(at.to, dr);
      out(at.to + hidden, dz);
      out(at.to + 2 * hidden, dn);
      out(at.to_hidden, dr);
      out(at.to_hidden + hidden, dz);
      out(at.to_hidden + 2 * hidden, dn * r);
      out(carry + at.b * hidden, in(carry + at.b * hidden) + dh * z);
    } else {
      out(at.to, dh * in(at.gate));
    }
  }

  // LSTM's o, from the cell (normalised, where that is); returns the gradient of that cell.
  V output(const Place& at, int64_t j, V c, V dh) const {
    const int64_t count = smaller(lanes, s.hidden - j);
    const V x = load_some(at.gate + 3 * s.hidden + j, count);
    c = tanh(c);
    store_some(at.to + 3 * s.hidden + j, dh * c * x * (A(1) - x), count);
    if (s.projects) store_some(args.layer.unprojected + at.row * s.hidden + j, x * c, count);
    return dh * x * (A(1) - c * c);
  }

  // LSTM's other gates and what passes them, from the gradient of the cell.
  void cell(const Place& at, int64_t j, V dc) const {
    const int64_t hidden = s.hidden, count = smaller(lanes, hidden - j);
    const auto in = [count, j](const auto* p) { return load_some(p + j, count); };
    const auto out = [count, j](A* p, V v) { store_some(p + j, v, count); };
    A* passed = carry_cell + at.b * hidden;
    const V i = in(at.gate), f = in(at.gate + hidden), g = in(at.gate + 2 * hidden), after = in(passed);
    const A* chosen = o.fresh_c ? o.fresh_c + at.row * hidden + j : nullptr;
    V pass = zone_out<A>(V{}, after, chosen, o.zoneout_c, count);
    dc += zone_out<A>(after, V{}, chosen, o.zoneout_c, count);
    if (o.peephole) dc += in(o.peephole + 2 * hidden) * in(at.to + 3 * hidden);
    const V di = dc * g * i * (A(1) - i), df = dc * in(at.c_before) * f * (A(1) - f);
    pass += dc * f;
    if (o.peephole) pass += in(o.peephole) * di + in(o.peephole + hidden) * df;
    out(at.to, di);
    out(at.to + hidden, df);
    out(at.to + 2 * hidden, dc * i * (A(1) - g * g));
    out(passed, pass);
  }

  // A whole row, from `grads`.
  void whole_row(const Place& at) const {
    if (o.norm_hh) return normed(at);
    for (int64_t j = 0; j < s.hidden; j += lanes)
      units(at, j, load_some(grads + at.b * s.hidden + j, smaller(lanes, s.hidden - j)));
  }
  void normed(const Place& at) const {
    const int64_t hidden = s.hidden, width = s.gates() * hidden;
    const A *dh = grads + at.b * hidden, *norm = args.norms + at.row * rnn_norm_size(s),
            *scales = norm + rnn_norm_size(s) - 3;
    if constexpr (mode == kRnnLstm) {
      const A* normed_cell = norm + 2 * width;
      A *dc_normed = args.grad_normed_cell + at.row * hidden, *dc = of_cell + at.b * hidden;
      for (int64_t j = 0; j < hidden; j += lanes) {
        const int64_t count = smaller(lanes, hidden - j);
        V c = load_some(normed_cell + j, count) * load_some(o.norm_c + j, count);
        if (o.norm_c_bias) c += load_some(o.norm_c_bias + j, count);
        store_some(dc_normed + j, output(at, j, c, load_some(dh + j, count)), count);
      }
      normalize_backward(dc_normed, o.norm_c, normed_cell, scales[2], hidden, dc);
      for (int64_t j = 0; j < hidden; j += lanes) cell(at, j, load_some(dc + j, smaller(lanes, hidden - j)));
    } else {
      for (int64_t j = 0; j < hidden; j += lanes) units(at, j, load_some(dh + j, smaller(lanes, hidden - j)));
    }
    normalize_backward(at.to_hidden, o.norm_hh, norm + width, scales[1], width, args.grad_product + at.row * width);
  }
};

// to[j] = the sum over all rows of value(row, before, b, j, lanes used), in double. Some neighbouring vectors at a time: a
// row's cache lines are read once.
template <class A, class D, class F> void sum_rows(const Layer<A>& layer, int64_t count, D* to, const F& value) {
  constexpr int64_t lanes = kLanes<A>, block = 4;
  const RnnShape& s = layer.s;
  parallel_for(ceil_div(count, block * lanes), 1 + 4096 / (s.rows + 1), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * block * lanes; first < smaller(count, end * block * lanes); first += block * lanes) {
      Wide<A> sums[block]{};
      const auto each = [&](const auto& visit) {
#pragma GCC unroll 4
        for (int64_t v = 0; v < block; ++v)
          if (const int64_t j = first + v * lanes; j < count) visit(sums[v], j, smaller(lanes, count - j));
      };
      for (int64_t t = 0; t < s.steps; ++t)
        for (int64_t b = 0; b < s.batch_sizes[t]; ++b)
          each([&](Wide<A>& sum, int64_t j, int64_t some) {
            sum += wide(value(s.row(t, b), layer.before(t, b), s.place(b), j, some));
          });
      each([&](const Wide<A>& sum, int64_t j, int64_t some) { store_some(to + j, narrow(sum), some); });
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
  const bool normed = o.norm_hh, by_rows = normed || kByRows<mode>;
  A* memory = scratch<A>(Slot::family_0, s.batch * (2 * state + 4 * hidden));
  A *carry = memory, *h0_room = carry + s.batch * state, *carry_cell = h0_room + s.batch * state,
    *grads = carry_cell + s.batch * hidden, *of_cell = grads + s.batch * hidden;
  const A* c0 = mode == kRnnLstm ? widened(args.c0, s.batch * hidden, of_cell + s.batch * hidden) : nullptr;
  const A* h0 = widened(args.h0, s.batch * state, h0_room);
  copy(args.grad_h_n, carry, s.batch * state);
  if (mode == kRnnLstm) copy(args.grad_c_n, carry_cell, s.batch * hidden);

  const int64_t parts = layer.by_panels ? layer.threads : 1;
  const bool tiled = by_tiles<T>(s);
  StepWeight<T> recurrent(tiled, 1, state, width, panel_vectors<A>(state, parts)),
      projection(tiled, 1, hidden, state, panel_vectors<A>(hidden, parts));
  const int64_t hr_size = s.projects ? projection.size() : 0;
  A* weights = scratch<A>(Slot::family_1, hr_size + recurrent.size());
  if (s.projects) projection.pack_weight_columns(args.weight_hr, 0, s.batch, weights);
  recurrent.pack_weight_columns(args.weight_hh, 0, s.batch, weights + hr_size);

  clear_padding(s, args.grad_gates, width);
  clear_padding(s, all.grad_hidden, width);
  clear_padding(s, all.grad_product, width);
  const BackwardStep<T, mode> step{all, s, o, h0, c0, carry, carry_cell, grads, of_cell};
  layer.run(0, s.steps, 1 + s.projects + by_rows, true,
            [&](int phase, int64_t n, int64_t begin, int64_t end, int64_t part, int64_t last_part) {
              const int64_t t = layer.step(n);
              const auto place = [&](int64_t b) { return step.place(s.row(t, b), layer.before(t, b), s.place(b)); };
              const auto multiply = [&](const StepWeight<T>& w, int64_t first, int64_t last, const auto& row,
                                        const auto& put) {
                multiply_rows(w, first, last, part * w.panels / layer.threads, last_part * w.panels / layer.threads,
                              row, put);
              };
              // Gradients of some units' output before the projection.
              const auto go_on = [&](const auto& at, int64_t j, Vec<A> dh) {
                by_rows ? store_some(grads + at.b * hidden + j, dh, hidden - j) : step.units(at, j, dh);
              };
              const auto of_state = [&](const auto& at, int64_t j, Vec<A> product) {
                const Vec<A> dh = step.state(at, j, product);
                s.projects ? store_some(args.grad_states + at.row * state + j, dh, state - j) : go_on(at, j, dh);
              };
              if (phase == 0) {
                int64_t going_on = begin;  // rows whose sequence goes on: the first ones
                while (going_on < end && layer.after(t, going_on) >= 0) ++going_on;
                multiply(
                    recurrent, begin, going_on, [&](int64_t b) { return all.grad_product + layer.after(t, b) * width; },
                    [&](int64_t b, int64_t panel, const A* sums) {
                      const auto at = place(b);
                      each_vector(recurrent, panel, sums, [&](int64_t j, const A* sum) { of_state(at, j, load(sum)); });
                    });
                const int64_t units = recurrent.unit_vectors * lanes,
                              last = smaller(state, last_part * recurrent.panels / layer.threads * units);
                for (int64_t b = going_on; b < end; ++b)
                  for (int64_t j = part * recurrent.panels / layer.threads * units; j < last; j += lanes)
                    of_state(place(b), j, Vec<A>{});
              } else if (s.projects && phase == 1) {
                multiply(
                    projection, begin, end, [&](int64_t b) { return args.grad_states + s.row(t, b) * state; },
                    [&](int64_t b, int64_t panel, const A* sums) {
                      const auto at = place(b);
                      each_vector(projection, panel, sums, [&](int64_t j, const A* sum) { go_on(at, j, load(sum)); });
                    });
              } else {
                const Rows rows(layer, begin, end, part, last_part);
                for (int64_t b = rows.begin; b < rows.end; ++b) step.whole_row(place(b));
              }
            });

  // The initial states', from the first step of each sequence.
  parallel_for(recurrent.panels, 1 + 32768 / (s.batch * recurrent.width() * width), [&](int64_t first, int64_t last) {
    multiply_rows(
        recurrent, 0, s.batch, first, last, [&](int64_t b) { return all.grad_product + layer.first_row(b) * width; },
        [&](int64_t b, int64_t panel, const A* sums) {
          each_vector(recurrent, panel, sums, [&](int64_t j, const A* sum) {
            const int64_t at = s.place(b) * state + j, count = state - j;
            const Vec<A> product = load(sum), factor = o.mask ? load_some(o.mask + at, count) : broadcast<A>(1);
            store_some(args.grad_h0 + at, product * factor + load_some(carry + at, count), count);
          });
        });
  });
  if (mode == kRnnLstm) copy(carry_cell, args.grad_c0, s.batch * hidden);

  if (args.grad_weight_ih) {
    sum_weights(step, layer);
    as_operands<T>(tiled, all.grad_product, s.rows, width, [&]<class G>(const G* product) {
      G* previous = reinterpret_cast<G*>(args.previous);
      gather_previous(args, layer, h0, o.mask, previous);
      gemm(Gemm<G, T>{width, state, s.rows, product, 1, width, previous, state, 1, args.grad_weight_hh, state});
    });
    if (s.projects) projection_gradient(args);
  }
  // The input part's before its normalisation takes the place of that after it.
  if (normed)
    for (int64_t t = 0; t < s.steps; ++t)
      parallel_for(s.batch_sizes[t], 1 + 16384 / width, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          A* grad = args.grad_gates + s.row(t, b) * width;
          const A* norm = all.norms + s.row(t, b) * rnn_norm_size(s);
          normalize_backward(grad, o.norm_ih, norm, norm[rnn_norm_size(s) - 3], width, grad);
        }
      });
  as_operands<T>(tiled, args.grad_gates, s.rows, width,
                 [&](const auto* gates) { input_gradients(args, gates, width); });
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

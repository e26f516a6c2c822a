// RNN, LSTM and GRU, one layer in one direction.
//
// Forward: the product of all inputs with their weight is one matrix product (gemm.h) into the gates' memory; then, step
// by step, the recurrent product is added and the gates are applied while a tile is in the first-level cache. Recurrent
// weights are packed once a call, as panels that hold all gates of a few hidden units, so that a tile's sums are what
// its units need.
// Backward: the same the other way round, from the gradient of a step's gates to that of the step before, then one
// matrix product each for the gradients of input and weights.
// Threads: each has rows of the batch, and never waits; or, where the batch is small or the weights do not fit the
// second-level caches, hidden units, and waits for the others after each step.
// Floor: 2 rows gates hidden (inputs + hidden) flops, or reading the recurrent weights once a step.
#include "rnn.h"

#include "column_sums.h"
#include "conv_kernel.h"
#include "gemm.h"
#include "parallel.h"
#include "scratch.h"
#include "transpose.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

constexpr int64_t kBlockRows = 8 * kTilePixels;  // rows of the batch whose sums stay in the first-level cache
constexpr int64_t kPrivateBytes = 1 << 20;  // weights of this size are cheap for every thread to read whole

// All threads, once each a step. They spin: a step can be a few microseconds.
struct Barrier {
  int64_t threads, arrived = 0;
  void wait(int64_t some, int64_t step) {
    __atomic_add_fetch(&arrived, some, __ATOMIC_ACQ_REL);
    for (int64_t spins = 0; __atomic_load_n(&arrived, __ATOMIC_ACQUIRE) < threads * (step + 1); ++spins)
      if (spins > 4096) __builtin_ia32_pause();
  }
};

// A weight packed for products with few rows: panels of `vectors` vectors, each in chunks of at most kTileVectors, a chunk
// [depth][its vectors].
template <class A> struct Packed {
  int64_t vectors, panels, depth;
  const A* data;
  int64_t panel_size() const { return depth * vectors * kLanes<A>; }
};

// sums[i][panel's columns] = rows[i] times a panel, for `count` rows.
template <class A>
void multiply_panel(const Packed<A>& w, int64_t panel, const A* const* rows, int64_t count, int64_t block, A* sums) {
  constexpr int64_t lanes = kLanes<A>;
  A* outs[kBlockRows];
  for (int64_t i = 0; i < count; ++i) outs[i] = sums + i * w.vectors * lanes;
  const A* chunk = w.data + panel * w.panel_size();
  for (int64_t v = 0; v < w.vectors; v += kTileVectors) {
    const int64_t width = smaller(kTileVectors, w.vectors - v);
    for (int64_t k = 0; k < w.depth; k += block) {
      const Piece piece{k, smaller(block, w.depth - k), k};
      for (int64_t i = 0; i < count; i += kTilePixels)
        correlate_tile_for<A>(smaller(kTilePixels, count - i), width)(&piece, 1, rows + i, chunk, outs + i, v * lanes,
                                                                      k > 0, nullptr);
    }
    chunk += w.depth * width * lanes;
  }
}

// from, or a copy in the type sums are carried in, in memory that `room()` gives.
template <class T, class Room> const acc_t<T>* widened(const T* from, int64_t count, Room&& room) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    return from;
  } else {
    acc_t<T>* to = room();
    copy(from, to, count);
    return to;
  }
}
// The same in a slot of its own.
template <class T> const acc_t<T>* widened(const T* from, int64_t count, Slot slot) {
  return widened(from, count, [&] { return scratch<acc_t<T>>(slot, count); });
}

template <class T> struct Layer {
  using A = acc_t<T>;
  static constexpr int64_t lanes = kLanes<A>;
  const RnnShape& s;
  int64_t threads = num_threads();
  bool by_units;  // threads have hidden units, not rows of the batch

  explicit Layer(const RnnShape& shape) : s(shape) {
    const int64_t bytes = s.gates() * s.hidden * s.hidden * static_cast<int64_t>(sizeof(A));
    by_units = s.batch < 4 * threads || bytes > kPrivateBytes;
    const double step = static_cast<double>(s.gates() * s.hidden * s.hidden * s.batch);
    if (by_units ? step < 32768 : step * static_cast<double>(s.steps) < kWorthWaking) threads = 1;
  }

  // The row of (step, b) before it in the recurrence, -1 where that is the initial state.
  int64_t before(int64_t step, int64_t b) const {
    const int64_t t = s.reverse ? step + 1 : step - 1;
    return t < 0 || t >= s.steps || b >= s.batch_sizes[t] ? -1 : s.offsets[t] + b;
  }
  // The row after it, -1 where it is the last of its sequence.
  int64_t after(int64_t step, int64_t b) const {
    const int64_t t = s.reverse ? step - 1 : step + 1;
    return t < 0 || t >= s.steps || b >= s.batch_sizes[t] ? -1 : s.offsets[t] + b;
  }
  int64_t last_step(int64_t b) const {  // of b's sequence, in time
    int64_t t = s.steps - 1;
    while (b >= s.batch_sizes[t]) --t;
    return t;
  }

  // Runs visit(step, first row of the batch, end, first panel, end) for all steps in order (backwards: from the last).
  template <class Visit> void run(int64_t panels, bool backwards, const Visit& visit) const {
    Barrier barrier{threads};
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < s.steps; ++i) {
        const int64_t step = backwards != s.reverse ? s.steps - 1 - i : i;
        if (by_units) {
          visit(step, int64_t{0}, s.batch_sizes[step], begin * panels / threads, end * panels / threads);
          if (threads > 1) barrier.wait(end - begin, i);
        } else {
          visit(step, smaller(begin * s.batch / threads, s.batch_sizes[step]),
                smaller(end * s.batch / threads, s.batch_sizes[step]), int64_t{0}, panels);
        }
      }
    });
  }
};

// ---- forward ----

// The recurrent weight: a panel has, for each of `vectors_of_units` vectors of units, a vector a gate.
template <class T> Packed<acc_t<T>> pack_forward(const RnnShape& s, const T* weight, Slot slot) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t gates = s.gates(), unit_vectors = gates == 1 ? kTileVectors : 1, vectors = unit_vectors * gates;
  const int64_t units = unit_vectors * lanes, panels = ceil_div(s.hidden, units), depth = s.hidden;
  Packed<A> packed{vectors, panels, depth, nullptr};
  A* data = scratch<A>(slot, panels * packed.panel_size());
  packed.data = data;
  parallel_for(panels, larger(1, 65536 / packed.panel_size()), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t chunk = v / kTileVectors * kTileVectors, width = smaller(kTileVectors, vectors - chunk) * lanes;
        A* to = data + panel * packed.panel_size() + chunk * depth * lanes + (v - chunk) * lanes;
        const int64_t unit = panel * units + v / gates * lanes, count = larger(0, smaller(lanes, s.hidden - unit));
        if (count < lanes)
          for (int64_t k = 0; k < depth; ++k) store(to + k * width, Vec<A>{});
        transpose(weight + (v % gates * s.hidden + unit) * depth, depth, count, depth, to, width);
      }
  });
  return packed;
}

template <class A> struct AddBias {
  const A* bias;  // or null
  template <class V> V operator()(V value, int64_t, int64_t j, int count) const {
    return bias ? value + (count == kLanes<A> ? load(bias + j) : load_partial<A>(bias + j, count)) : value;
  }
};

// One vector of hidden units of one row: gates from what they hold of the input and the recurrent sums of the panel, the
// vector's at `sums`, a vector a gate.
template <class T, int mode> struct ForwardCell {
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int64_t lanes = kLanes<A>;
  const RnnForwardArgs<T>& args;
  const A *h0, *c0, *hidden_bias;  // of GRU's n

  void operator()(int64_t row, int64_t before, int64_t b, int64_t j, const A* sums) const {
    const int64_t hidden = args.shape.hidden;
    const int count = static_cast<int>(smaller(lanes, hidden - j));
    const auto in = [count](const A* p) { return count == lanes ? load(p) : load_partial<A>(p, count); };
    const auto out = [count](auto* p, V v) {
      using E = std::remove_pointer_t<decltype(p)>;
      count == lanes ? store(p, v) : store_partial<E>(p, v, count);
    };
    A* gate = args.gates + row * args.shape.slots() * hidden + j;
    const V previous = in(before < 0 ? h0 + b * hidden + j : args.states + before * hidden + j);
    V h;
    if constexpr (mode == kRnnLstm) {
      const V i = sigmoid(in(gate) + load(sums)), f = sigmoid(in(gate + hidden) + load(sums + lanes)),
              g = tanh(in(gate + 2 * hidden) + load(sums + 2 * lanes)),
              o = sigmoid(in(gate + 3 * hidden) + load(sums + 3 * lanes));
      const V c = f * in(before < 0 ? c0 + b * hidden + j : args.cells + before * hidden + j) + i * g;
      out(gate, i);
      out(gate + hidden, f);
      out(gate + 2 * hidden, g);
      out(gate + 3 * hidden, o);
      out(args.cells + row * hidden + j, c);
      h = o * tanh(c);
    } else if constexpr (mode == kRnnGru) {
      V recurrent = load(sums + 2 * lanes);
      if (hidden_bias) recurrent += in(hidden_bias + j);
      const V r = sigmoid(in(gate + hidden) + load(sums)), z = sigmoid(in(gate + 2 * hidden) + load(sums + lanes)),
              n = tanh(in(gate + 3 * hidden) + r * recurrent);
      out(gate, recurrent);
      out(gate + hidden, r);
      out(gate + 2 * hidden, z);
      out(gate + 3 * hidden, n);
      h = n + z * (previous - n);
    } else {
      const V x = in(gate) + load(sums);
      h = mode == kRnnTanh ? tanh(x) : (x > A(0) ? x : V{} + (x != x ? x : V{}));
    }
    out(args.states + row * hidden + j, h);
    if constexpr (sizeof(T) != sizeof(A)) out(args.output + row * hidden + j, h);
  }
};

template <class T, int mode> void forward(const RnnForwardArgs<T>& args) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const RnnShape& s = args.shape;
  const int64_t gates = s.gates(), hidden = s.hidden, slots = s.slots(), state = s.batch * hidden;
  const Layer<T> layer(s);
  A* memory = scratch<A>(Slot::family_0, (gates + 1) * hidden + 2 * state);
  A *bias = memory, *hidden_bias = bias + gates * hidden;
  const A* h0 = widened(args.h0, state, [&] { return hidden_bias + hidden; });
  const A* c0 = mode == kRnnLstm ? widened(args.c0, state, [&] { return hidden_bias + hidden + state; }) : nullptr;
  const bool biased = args.bias_ih || args.bias_hh;
  for (int64_t i = 0; biased && i < gates * hidden; ++i) {
    const A of_input = args.bias_ih ? static_cast<A>(args.bias_ih[i]) : A(0),
            of_hidden = args.bias_hh ? static_cast<A>(args.bias_hh[i]) : A(0);
    const bool apart = mode == kRnnGru && i >= 2 * hidden;  // r multiplies this one
    bias[i] = apart ? of_input : of_input + of_hidden;
    if (apart) hidden_bias[i - 2 * hidden] = of_hidden;
  }
  gemm(Gemm<T, A>{s.rows, gates * hidden, s.inputs, args.input, s.inputs, 1, args.weight_ih, 1, s.inputs,
                  args.gates + (slots - gates) * hidden, slots * hidden},
       AddBias<A>{biased ? bias : nullptr});

  const Packed<A> packed = pack_forward(s, args.weight_hh, Slot::family_1);
  const ForwardCell<T, mode> cell{args, h0, c0, biased ? hidden_bias : nullptr};
  const int64_t unit_vectors = packed.vectors / gates;
  const int64_t block = sum_depth(hidden, static_cast<double>(s.batch * gates * hidden) * static_cast<double>(hidden));
  layer.run(packed.panels, false, [&](int64_t step, int64_t begin, int64_t end, int64_t first, int64_t last) {
    A* sums = scratch<A>(Slot::family_2, kBlockRows * packed.vectors * lanes);
    const A* rows[kBlockRows];
    int64_t before[kBlockRows];
    for (int64_t b0 = begin; b0 < end; b0 += kBlockRows) {
      const int64_t count = smaller(kBlockRows, end - b0);
      for (int64_t i = 0; i < count; ++i) {
        before[i] = layer.before(step, b0 + i);
        rows[i] = before[i] < 0 ? h0 + (b0 + i) * hidden : args.states + before[i] * hidden;
      }
      for (int64_t panel = first; panel < last; ++panel) {
        multiply_panel(packed, panel, rows, count, block, sums);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t u = 0; u < unit_vectors; ++u) {
            const int64_t j = (panel * unit_vectors + u) * lanes;
            if (j < hidden)
              cell(s.offsets[step] + b0 + i, before[i], b0 + i, j, sums + (i * packed.vectors + u * gates) * lanes);
          }
      }
    }
  });
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t row = s.reverse ? b : s.offsets[layer.last_step(b)] + b;
    copy(args.output + row * hidden, args.h_n + b * hidden, hidden);
    if (mode == kRnnLstm) copy(args.cells + row * hidden, args.c_n + b * hidden, hidden);
  }
}

// ---- backward ----

// The recurrent weight as rows of the gradient of gates see it (GRU's: n, r, z), panels of hidden units.
template <class T> Packed<acc_t<T>> pack_backward(const RnnShape& s, const T* weight, Slot slot) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t width = kTileVectors * lanes, panels = ceil_div(s.hidden, width), depth = s.gates() * s.hidden;
  Packed<A> packed{kTileVectors, panels, depth, nullptr};
  A* data = scratch<A>(slot, panels * packed.panel_size());
  packed.data = data;
  parallel_for(panels, larger(1, 65536 / packed.panel_size()), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t count = smaller(width, s.hidden - panel * width);
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t row = s.mode != kRnnGru ? k : k < s.hidden ? k + 2 * s.hidden : k - s.hidden;
        A* to = data + panel * packed.panel_size() + k * width;
        copy(weight + row * s.hidden + panel * width, to, count);
        for (int64_t j = count; j < width; ++j) to[j] = A(0);
      }
    }
  });
  return packed;
}

// One vector of hidden units of one row: the gradient of its gates from that of its output; what goes on to the step
// before past the gates is left in `direct` (GRU) and `cell` (LSTM).
template <class T, int mode> struct BackwardCell {
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int64_t lanes = kLanes<A>;
  const RnnBackwardArgs<T>& args;
  const A *h0, *c0;
  A *direct, *cell;  // [batch, hidden]

  // sums: the recurrent part, or null for the last step of a sequence.
  void operator()(int64_t row, int64_t before, int64_t b, int64_t j, const A* sums) const {
    const int64_t hidden = args.shape.hidden, slots = args.shape.slots();
    const int count = static_cast<int>(smaller(lanes, hidden - j));
    const auto in = [count](auto* p) {
      using E = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
      return count == lanes ? load(p) : load_partial<E>(p, count);
    };
    const auto out = [count](A* p, V v) { count == lanes ? store(p, v) : store_partial<A>(p, v, count); };
    const int64_t at = b * hidden + j;
    V dh = in(args.grad_output + row * hidden + j);
    if (sums) {
      dh += load(sums);
      if (mode == kRnnGru) dh += in(direct + at);
    } else {
      dh += in(args.grad_h_n + at);
    }
    const A* gate = args.gates + row * slots * hidden + j;
    A* to = args.grad_gates + row * slots * hidden + j;
    if constexpr (mode == kRnnLstm) {
      const V i = in(gate), f = in(gate + hidden), g = in(gate + 2 * hidden), o = in(gate + 3 * hidden);
      const V c = tanh(in(args.cells + row * hidden + j)),
              c_before = in(before < 0 ? c0 + at : args.cells + before * hidden + j);
      const V dc = (sums ? in(cell + at) : in(args.grad_c_n + at)) + dh * o * (A(1) - c * c);
      out(to, dc * g * i * (A(1) - i));
      out(to + hidden, dc * c_before * f * (A(1) - f));
      out(to + 2 * hidden, dc * i * (A(1) - g * g));
      out(to + 3 * hidden, dh * c * o * (A(1) - o));
      out(cell + at, dc * f);
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
      const V h = in(args.output + row * hidden + j);
      out(to, mode == kRnnTanh ? dh * (A(1) - h * h) : (h > A(0) ? dh : V{}));
    }
  }
};

template <class T, int mode> void backward(const RnnBackwardArgs<T>& args) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const RnnShape& s = args.shape;
  const int64_t gates = s.gates(), hidden = s.hidden, row_size = s.slots() * hidden, state = s.batch * hidden;
  const Layer<T> layer(s);
  A* memory = scratch<A>(Slot::family_0, 4 * state);
  A *direct = memory, *cells = direct + state;
  const A* h0 = widened(args.h0, state, [&] { return cells + state; });
  const A* c0 = mode == kRnnLstm ? widened(args.c0, state, [&] { return cells + 2 * state; }) : nullptr;
  const Packed<A> packed = pack_backward(s, args.weight_hh, Slot::family_1);
  const BackwardCell<T, mode> cell{args, h0, c0, direct, cells};
  const int64_t block =
      sum_depth(packed.depth, static_cast<double>(s.batch * gates * hidden) * static_cast<double>(hidden));
  layer.run(packed.panels, true, [&](int64_t step, int64_t begin, int64_t end, int64_t first, int64_t last) {
    A* sums = scratch<A>(Slot::family_2, kBlockRows * packed.vectors * lanes);
    const A* rows[kBlockRows];
    for (int64_t b0 = begin; b0 < end; b0 += kBlockRows) {
      const int64_t count = smaller(kBlockRows, end - b0);
      int64_t going_on = 0;  // rows whose sequence goes on: the first ones
      while (going_on < count && layer.after(step, b0 + going_on) >= 0) {
        rows[going_on] = args.grad_gates + layer.after(step, b0 + going_on) * row_size;
        ++going_on;
      }
      for (int64_t panel = first; panel < last; ++panel) {
        multiply_panel(packed, panel, rows, going_on, block, sums);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t u = 0; u < packed.vectors; ++u) {
            const int64_t j = (panel * packed.vectors + u) * lanes;
            if (j < hidden)
              cell(s.offsets[step] + b0 + i, layer.before(step, b0 + i), b0 + i, j,
                   i < going_on ? sums + (i * packed.vectors + u) * lanes : nullptr);
          }
      }
    }
  });

  // The initial states', from the first step of each sequence.
  for (int64_t b0 = 0; b0 < s.batch; b0 += kBlockRows) {
    const int64_t count = smaller(kBlockRows, s.batch - b0);
    const A* rows[kBlockRows];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = b0 + i, row = s.reverse ? s.offsets[layer.last_step(b)] + b : b;
      rows[i] = args.grad_gates + row * row_size;
    }
    parallel_for(packed.panels, 1 + 32768 / (count * packed.panel_size()), [&](int64_t first, int64_t last) {
      A* sums = scratch<A>(Slot::family_2, kBlockRows * packed.vectors * lanes);
      for (int64_t panel = first; panel < last; ++panel) {
        multiply_panel(packed, panel, rows, count, block, sums);
        const int64_t j = panel * packed.vectors * lanes, width = smaller(packed.vectors * lanes, hidden - j);
        for (int64_t i = 0; i < count; ++i) {
          A* sum = sums + i * packed.vectors * lanes;
          const int64_t at = (b0 + i) * hidden + j;
          for (int64_t e = 0; mode == kRnnGru && e < width; ++e) sum[e] += direct[at + e];
          copy(sum, args.grad_h0 + at, width);
          if (mode == kRnnLstm) copy(cells + at, args.grad_c0 + at, width);
        }
      }
    });
  }

  const A* of_input = args.grad_gates + row_size - gates * hidden;  // GRU's recurrent side has n in the first block
  if (args.grad_input)
    gemm(Gemm<A, T>{s.rows, s.inputs, gates * hidden, of_input, row_size, 1,
                    widened(args.weight_ih, gates * hidden * s.inputs, Slot::family_3), s.inputs, 1, args.grad_input,
                    s.inputs});
  if (!args.grad_weight_ih) return;
  gemm(Gemm<A, T>{gates * hidden, s.inputs, s.rows, of_input, 1, row_size,
                  widened(args.input, s.rows * s.inputs, Slot::family_3), s.inputs, 1, args.grad_weight_ih, s.inputs});
  for (int64_t step = 0; step < s.steps; ++step)
    for (int64_t b = 0; b < s.batch_sizes[step]; ++b) {
      const int64_t before = layer.before(step, b);
      A* to = args.previous + (s.offsets[step] + b) * hidden;
      if (before < 0)
        copy(h0 + b * hidden, to, hidden);
      else
        copy(args.output + before * hidden, to, hidden);
    }
  const auto recurrent = [&](int64_t slot, int64_t gate, int64_t some) {
    gemm(Gemm<A, T>{some * hidden, hidden, s.rows, args.grad_gates + slot * hidden, 1, row_size, args.previous, hidden,
                    1, args.grad_weight_hh + gate * hidden * hidden, hidden});
  };
  if (mode == kRnnGru) {
    recurrent(1, 0, 2);
    recurrent(0, 2, 1);
  } else {
    recurrent(0, 0, gates);
  }
  if (!args.grad_bias_ih) return;
  sum_columns(of_input, row_size, 1, s.rows, gates * hidden, args.grad_bias_ih);
  const int64_t shared = (mode == kRnnGru ? 2 : gates) * hidden;
  std::memcpy(static_cast<void*>(args.grad_bias_hh), args.grad_bias_ih, sizeof(T) * static_cast<size_t>(shared));
  if (mode == kRnnGru) sum_columns(args.grad_gates, row_size, 1, s.rows, hidden, args.grad_bias_hh + shared);
}

template <class F> void with_mode(int mode, F&& f) {
  switch (mode) {
    case kRnnTanh: return f.template operator()<kRnnTanh>();
    case kRnnRelu: return f.template operator()<kRnnRelu>();
    case kRnnLstm: return f.template operator()<kRnnLstm>();
    default: return f.template operator()<kRnnGru>();
  }
}

}  // namespace

#define DLKERN_DEFINE_RNN(T)                                                  \
  void rnn_forward(const RnnForwardArgs<T>& args) {                           \
    with_mode(args.shape.mode, [&]<int mode>() { forward<T, mode>(args); });  \
  }                                                                           \
  void rnn_backward(const RnnBackwardArgs<T>& args) {                         \
    with_mode(args.shape.mode, [&]<int mode>() { backward<T, mode>(args); }); \
  }
DLKERN_DEFINE_RNN(float)
DLKERN_DEFINE_RNN(double)
DLKERN_DEFINE_RNN(bfloat16)

}  // namespace dlkern::cpu::DLKERN_ISA

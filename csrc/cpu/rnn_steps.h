// What the forward and the backward of recurrent layers share: weights packed into panels, their product with a few rows,
// and the loop over time.
//
// Threads: each has rows of the batch, and never waits; or, where the batch is small or the weights do not fit the
// second-level caches, panels, and waits for the others after each phase of a step.
#pragma once
#include "conv_kernel.h"
#include "parallel.h"
#include "rnn.h"
#include "scratch.h"
#include "transpose.h"

namespace dlkern::cpu::DLKERN_ISA {

constexpr int64_t kBlockRows = 8 * kTilePixels;  // rows of the batch whose sums stay in the first-level cache
constexpr int64_t kPrivateBytes = 1 << 19;  // weights of this size are cheap for every thread to read whole
// A layer of as many products or fewer is computed in double: among few roundings chance decides who errs more.
constexpr double kFewProducts = 65536;

inline bool few_products(const RnnShape& s) {
  return static_cast<double>(s.rows) * static_cast<double>(s.gates() * s.hidden * (s.inputs + s.state)) <= kFewProducts;
}

// All threads, once each a phase. They spin: a step can be a few microseconds. After some tenths of a millisecond the
// thread waited for has probably lost its core to another process, and gets one back.
struct Barrier {
  int64_t threads, arrived = 0;
  void wait(int64_t some, int64_t phase) {
    __atomic_add_fetch(&arrived, some, __ATOMIC_ACQ_REL);
    for (int64_t spins = 0; __atomic_load_n(&arrived, __ATOMIC_ACQUIRE) < threads * (phase + 1); ++spins) {
      if (spins > 4096) relax();
      if (spins > 16384) give_way();
    }
  }
};

// A weight packed for products with few rows: panels of `vectors` vectors, each in chunks of at most kTileVectors, a chunk
// [depth][its vectors].
template <class A> struct Packed {
  int64_t vectors, panels, depth;
  const A* data;
  int64_t panel_size() const { return depth * vectors * kLanes<A>; }
  int64_t size() const { return panels * panel_size(); }
};

// Vectors of units a panel has, so that `threads` threads have the fewest to multiply.
template <class A> int64_t panel_vectors(int64_t units, int64_t threads) {
  int64_t best = 1, least = 0;
  for (int64_t v = 1; v <= kTileVectors; ++v) {
    const int64_t cost = ceil_div(ceil_div(units, v * kLanes<A>), threads) * (2 * v + 1);  // 1: broadcasts
    if (v == 1 || cost <= least) {
      least = cost;
      best = v;
    }
  }
  return best;
}

// The rows of `weight` [units, depth] of each gate (gates * units rows): a panel has, for each of its vectors of units, a
// vector a gate.
template <class T>
Packed<acc_t<T>> pack_rows(const T* weight, int64_t gates, int64_t units, int64_t depth, int64_t unit_vectors,
                           acc_t<T>* to) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t vectors = unit_vectors * gates, panels = ceil_div(units, unit_vectors * lanes);
  const Packed<A> packed{vectors, panels, depth, to};
  parallel_for(panels, larger(1, 65536 / packed.panel_size()), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t chunk = v / kTileVectors * kTileVectors, width = smaller(kTileVectors, vectors - chunk) * lanes;
        A* at = to + panel * packed.panel_size() + chunk * depth * lanes + (v - chunk) * lanes;
        const int64_t unit = (panel * unit_vectors + v / gates) * lanes,
                      count = larger(0, smaller(lanes, units - unit));
        if (count < lanes)
          for (int64_t k = 0; k < depth; ++k) store(at + k * width, Vec<A>{});
        transpose(weight + (v % gates * units + unit) * depth, depth, count, depth, at, width);
      }
  });
  return packed;
}

// The columns of `weight` [depth, units], whose rows are read from row `first` on, the earlier ones after the last.
template <class T>
Packed<acc_t<T>> pack_columns(const T* weight, int64_t depth, int64_t units, int64_t first, int64_t vectors,
                              acc_t<T>* to) {
  using A = acc_t<T>;
  const int64_t width = vectors * kLanes<A>, panels = ceil_div(units, width);
  const Packed<A> packed{vectors, panels, depth, to};
  parallel_for(panels, larger(1, 65536 / packed.panel_size()), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t count = smaller(width, units - panel * width);
      for (int64_t k = 0; k < depth; ++k) {
        A* at = to + panel * packed.panel_size() + k * width;
        copy(weight + (k + first) % depth * units + panel * width, at, count);
        for (int64_t j = count; j < width; ++j) at[j] = A(0);
      }
    }
  });
  return packed;
}

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

template <class A> int64_t block_of(const Packed<A>& w, int64_t batch, int64_t columns) {
  return sum_depth(w.depth, static_cast<double>(batch * columns) * static_cast<double>(w.depth));
}

// Rows of padding, set to zero.
template <class T> void clear_padding(const RnnShape& s, T* rows, int64_t width) {
  for (int64_t t = 0; s.order && t < s.rows / s.batch; ++t)
    for (int64_t b = t < s.steps ? s.batch_sizes[t] : 0; b < s.batch; ++b)
      std::memset(static_cast<void*>(rows + (t * s.batch + s.order[b]) * width), 0,
                  sizeof(T) * static_cast<size_t>(width));
}

// What is added to the input part, [gates * hidden], and what GRU adds to n's hidden part, [hidden]; false where there
// are no biases.
template <int mode, class T> bool combine_biases(const RnnForwardArgs<T>& args, acc_t<T>* bias, acc_t<T>* hidden_bias) {
  using A = acc_t<T>;
  const int64_t hidden = args.shape.hidden, width = args.shape.gates() * hidden;
  const bool biased = args.bias_ih || args.bias_hh;
  for (int64_t i = 0; biased && i < width; ++i) {
    const A of_input = args.bias_ih ? static_cast<A>(args.bias_ih[i]) : A(0),
            of_hidden = args.bias_hh ? static_cast<A>(args.bias_hh[i]) : A(0);
    const bool apart = mode == kRnnGru && i >= 2 * hidden;  // r multiplies this one
    bias[i] = apart ? of_input : of_input + of_hidden;
    if (apart) hidden_bias[i - 2 * hidden] = of_hidden;
  }
  return biased;
}

// Which threads do what, and when.
template <class A> struct Layer {
  const RnnShape& s;
  int64_t threads = num_threads();
  bool by_panels;  // threads have panels, not rows of the batch

  explicit Layer(const RnnShape& shape) : s(shape) {
    const int64_t bytes = s.gates() * s.hidden * s.state * static_cast<int64_t>(sizeof(A));
    by_panels = s.batch < 4 * threads || bytes > kPrivateBytes;
    const double step = static_cast<double>(s.gates() * s.hidden * s.state * s.batch);
    if (by_panels ? step < 32768 : step * static_cast<double>(s.steps) < kWorthWaking) threads = 1;
  }

  // The row before (t, b) in the recurrence, -1 where that is the initial state.
  int64_t before(int64_t t, int64_t b) const { return neighbour(s.reverse ? t + 1 : t - 1, b); }
  // The row after it, -1 where it is the last of its sequence.
  int64_t after(int64_t t, int64_t b) const { return neighbour(s.reverse ? t - 1 : t + 1, b); }
  int64_t neighbour(int64_t t, int64_t b) const {
    return t < 0 || t >= s.steps || b >= s.batch_sizes[t] ? -1 : s.row(t, b);
  }
  // The rows of b's sequence that the recurrence meets first and last.
  int64_t first_row(int64_t b) const { return s.row(s.reverse ? end_of(b) : 0, b); }
  int64_t last_row(int64_t b) const { return s.row(s.reverse ? 0 : end_of(b), b); }
  int64_t end_of(int64_t b) const {
    int64_t t = s.steps - 1;
    while (b >= s.batch_sizes[t]) --t;
    return t;
  }
  // The step that is the n-th in the recurrence.
  int64_t step(int64_t n) const { return s.reverse ? s.steps - 1 - n : n; }

  // Calls visit(phase, n, first row of the batch, end, first part of the panels, end) for all phases of the n-th to the
  // last step of [n0, n1) in order (backwards: from the last), parts being threads.
  template <class Visit> void run(int64_t n0, int64_t n1, int phases, bool backwards, const Visit& visit) const {
    Barrier barrier{threads};
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      int64_t met = 0;
      for (int64_t i = n0; i < n1; ++i) {
        const int64_t n = backwards ? n1 - 1 - (i - n0) : i, size = s.batch_sizes[step(n)];
        for (int phase = 0; phase < phases; ++phase) {
          if (by_panels) {
            visit(phase, n, int64_t{0}, size, begin, end);
            if (threads > 1) barrier.wait(end - begin, met++);
          } else {
            visit(phase, n, smaller(begin * s.batch / threads, size), smaller(end * s.batch / threads, size),
                  int64_t{0}, threads);
          }
        }
      }
    });
  }
};

// A layer of floats with few products, computed in double.
struct Doubles {
  double* next;
  explicit Doubles(const RnnShape& s, int64_t more = 0) {
    const int64_t width = s.gates() * s.hidden;
    next = scratch<double>(Slot::family_4, s.rows * (2 * s.inputs + 4 * s.state + (2 * s.slots() + 3) * s.hidden) +
                                               2 * (width * (s.inputs + s.state + 2) + s.state * s.hidden) +
                                               4 * s.batch * (s.state + s.hidden) + more);
  }
  double* room(const void* wanted, int64_t count) {
    double* at = next;
    next += wanted ? count : 0;
    return wanted ? at : nullptr;
  }
  const double* of(const float* from, int64_t count) {
    double* to = room(from, count);
    for (int64_t i = 0; to && i < count; ++i) to[i] = static_cast<double>(from[i]);
    return to;
  }
  static void back(const double* from, float* to, int64_t count) {
    for (int64_t i = 0; to && i < count; ++i) to[i] = static_cast<float>(from[i]);
  }
};

inline RnnForwardArgs<double> in_double(Doubles& d, const RnnForwardArgs<float>& a) {
  const RnnShape& s = a.shape;
  const int64_t width = s.gates() * s.hidden;
  return {s,
          d.of(a.input, s.rows * s.inputs),
          d.of(a.weight_ih, width * s.inputs),
          d.of(a.weight_hh, width * s.state),
          d.of(a.bias_ih, width),
          d.of(a.bias_hh, width),
          d.of(a.weight_hr, s.state * s.hidden),
          d.of(a.h0, s.batch * s.state),
          d.of(a.c0, s.batch * s.hidden),
          d.room(a.output, s.rows * s.state),
          d.room(a.h_n, s.batch * s.state),
          d.room(a.c_n, s.batch * s.hidden),
          d.room(a.gates, s.rows * s.slots() * s.hidden),
          d.room(a.cells, s.rows * s.hidden)};
}

inline void back(const RnnForwardArgs<double>& args, const RnnForwardArgs<float>& a) {
  const RnnShape& s = a.shape;
  Doubles::back(args.output, a.output, s.rows * s.state);
  Doubles::back(args.h_n, a.h_n, s.batch * s.state);
  Doubles::back(args.c_n, a.c_n, s.batch * s.hidden);
  Doubles::back(args.gates, a.gates, s.rows * s.slots() * s.hidden);
  Doubles::back(args.cells, a.cells, s.rows * s.hidden);
}

inline RnnBackwardArgs<double> in_double(Doubles& d, const RnnBackwardArgs<float>& a) {
  const RnnShape& s = a.shape;
  const int64_t width = s.gates() * s.hidden, row_size = s.slots() * s.hidden;
  return {s,
          d.of(a.grad_output, s.rows * s.state),
          d.of(a.grad_h_n, s.batch * s.state),
          d.of(a.grad_c_n, s.batch * s.hidden),
          d.of(a.input, s.rows * s.inputs),
          d.of(a.weight_ih, width * s.inputs),
          d.of(a.weight_hh, width * s.state),
          d.of(a.weight_hr, s.state * s.hidden),
          d.of(a.h0, s.batch * s.state),
          d.of(a.c0, s.batch * s.hidden),
          d.of(a.output, s.rows * s.state),
          d.of(a.gates, s.rows * row_size),
          d.of(a.cells, s.rows * s.hidden),
          d.room(a.grad_gates, s.rows * row_size),
          d.room(a.previous, s.rows * s.state),
          d.room(a.grad_states, s.rows * s.state),
          d.room(a.unprojected, s.rows * s.hidden),
          d.room(a.grad_input, s.rows * s.inputs),
          d.room(a.grad_weight_ih, width * s.inputs),
          d.room(a.grad_weight_hh, width * s.state),
          d.room(a.grad_bias_ih, width),
          d.room(a.grad_bias_hh, width),
          d.room(a.grad_weight_hr, s.state * s.hidden),
          d.room(a.grad_h0, s.batch * s.state),
          d.room(a.grad_c0, s.batch * s.hidden)};
}

inline void back(const RnnBackwardArgs<double>& args, const RnnBackwardArgs<float>& a) {
  const RnnShape& s = a.shape;
  const int64_t width = s.gates() * s.hidden;
  Doubles::back(args.grad_input, a.grad_input, s.rows * s.inputs);
  Doubles::back(args.grad_weight_ih, a.grad_weight_ih, width * s.inputs);
  Doubles::back(args.grad_weight_hh, a.grad_weight_hh, width * s.state);
  Doubles::back(args.grad_bias_ih, a.grad_bias_ih, width);
  Doubles::back(args.grad_bias_hh, a.grad_bias_hh, width);
  Doubles::back(args.grad_weight_hr, a.grad_weight_hr, s.state * s.hidden);
  Doubles::back(args.grad_h0, a.grad_h0, s.batch * s.state);
  Doubles::back(args.grad_c0, a.grad_c0, s.batch * s.hidden);
}

template <class F> void with_mode(int mode, F&& f) {
  switch (mode) {
    case kRnnTanh: return f.template operator()<kRnnTanh>();
    case kRnnRelu: return f.template operator()<kRnnRelu>();
    case kRnnLstm: return f.template operator()<kRnnLstm>();
    default: return f.template operator()<kRnnGru>();
  }
}

}  // namespace dlkern::cpu::DLKERN_ISA

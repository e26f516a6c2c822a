// What the forward and the backward of recurrent layers with options share: layer normalisation of a row, and what a unit
// becomes.
#pragma once
#include "rnn_options.h"
#include "rnn_steps.h"
#include "wide.h"

namespace dlkern::cpu::DLKERN_ISA {

// Whether a step's gates wait for the products of all units and then go through whole rows, though no norm asks for it. LSTM's
// reads and writes eight places a unit, and vectors of half a cache line find each line twice where units come panel by panel.
template <int mode> constexpr bool kByRows = mode == kRnnLstm && kVectorBytes < 64;

// The rows that a visit of Layer::run has in a phase that works on whole rows.
struct Rows {
  int64_t begin, end;
  template <class A> Rows(const Layer<A>& layer, int64_t b0, int64_t b1, int64_t part, int64_t last_part) {
    begin = b0 + (b1 - b0) * part / layer.threads;
    end = b0 + (b1 - b0) * last_part / layer.threads;
  }
};

// The mean of value(j, lanes used) over vectors of `count` values, in double; four sums, which do not wait for each other.
template <class A, class F> double mean_of(int64_t count, const F& value) {
  constexpr int64_t lanes = kLanes<A>;
  Wide<A> sums[4]{};
  const auto add = [&](int which, int64_t j, int64_t some) { sums[which] += wide(value(j, some)); };
  int64_t j = 0;
  for (; j + 4 * lanes <= count; j += 4 * lanes)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) add(i, j + i * lanes, lanes);
  for (; j < count; j += lanes) add(0, j, smaller(lanes, count - j));
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<double>(count);
}

// to = (from - mean) / deviation of one row; returns the reciprocal of the deviation. In place, too.
template <class A> A normalize(const A* from, int64_t count, A* to) {
  constexpr int64_t lanes = kLanes<A>;
  const double mean = mean_of<A>(count, [&](int64_t j, int64_t some) { return load_some(from + j, some); });
  const auto square = [&](int64_t j, int64_t some) {
    const Vec<A> distance = first_lanes<A>(load_some(from + j, some) - static_cast<A>(mean), some);
    return distance * distance;
  };
  const A scale = static_cast<A>(1.0 / __builtin_sqrt(mean_of<A>(count, square) + kRnnNormEps));
  for (int64_t j = 0; j < count; j += lanes) {
    const int64_t some = smaller(lanes, count - j);
    store_some(to + j, (load_some(from + j, some) - static_cast<A>(mean)) * scale, some);
  }
  return scale;
}

// The gradient of a row before normalize(), from that of normed * weight. In place, too.
template <class A, class T>
void normalize_backward(const A* grad, const T* weight, const A* normed, A scale, int64_t count, A* to) {
  constexpr int64_t lanes = kLanes<A>;
  const auto weighted = [&](int64_t j, int64_t some) {
    return load_some(grad + j, some) * load_some(weight + j, some);
  };
  const auto along = [&](int64_t j, int64_t some) { return weighted(j, some) * load_some(normed + j, some); };
  const A mean = static_cast<A>(mean_of<A>(count, weighted)), slope = static_cast<A>(mean_of<A>(count, along));
  for (int64_t j = 0; j < count; j += lanes) {
    const int64_t some = smaller(lanes, count - j);
    const Vec<A> g = weighted(j, some);
    store_some(to + j, scale * (g - mean - load_some(normed + j, some) * slope), some);
  }
}

// What a unit becomes: `fresh`, or what it was, or the expectation of the two.
template <class A>
Vec<A> zone_out(Vec<A> fresh, Vec<A> old, const A* chosen, double share, int64_t count) {
  if (chosen) return load_some(chosen, count) != Vec<A>{} ? fresh : old;
  return share == 0 ? fresh : static_cast<A>(share) * old + static_cast<A>(1 - share) * fresh;
}

// Rooms for the options of a layer of floats that is computed in double.
inline int64_t rooms_of_options(const RnnShape& s) {
  const int64_t width = s.gates() * s.hidden;
  return s.rows * (rnn_norm_size(s) + 2 * width + s.state + 2 * s.hidden) + 4 * width + 16 * s.hidden +
         s.batch * s.state;
}

inline RnnOptions<double> in_double(Doubles& d, const RnnOptions<float>& o, const RnnShape& s) {
  const int64_t width = s.gates() * s.hidden;
  return {d.of(o.peephole, 3 * s.hidden),
          d.of(o.norm_ih, width),
          d.of(o.norm_hh, width),
          d.of(o.norm_c, s.hidden),
          d.of(o.norm_c_bias, s.hidden),
          d.of(o.mask, s.batch * s.state),
          d.of(o.fresh_h, s.rows * s.state),
          d.of(o.fresh_c, s.rows * s.hidden),
          o.zoneout_h,
          o.zoneout_c};
}

}  // namespace dlkern::cpu::DLKERN_ISA

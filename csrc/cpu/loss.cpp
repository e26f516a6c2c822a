// Softmax cross-entropy: for each place -(1 - e) w[t] log p[t] - e / C sum_c w[c] log p[c], p = softmax(logits), times the
// place's own weight where there is one.
//
// The forward reads the logits once, a block at a time, keeping the largest so far and the sum of exponentials
// relative to it (online softmax, Milakov and Gimelshein 2018), and stores just these two numbers a place; the
// backward makes the gradient from them in one pass. Sums over classes and places are carried in double, in chunks
// of fixed size, so that a scalar loss is as exact as its dtype and the same for any number of threads.
// Classes are the vectors' direction where they lie side by side ([N, C], channels_last), places where those do
// ([N, C, H, W]). Floor: one read of the logits; backward one read and one write.
#include "loss.h"

#include "parallel.h"
#include "scratch.h"
#include "wide.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // logits looked at together

// Places summed together: few enough that there is work for every thread, and from the shape alone, so that sums are
// the same for any number of threads.
inline int64_t chunk_of(const CrossEntropyShape& s) {
  const int64_t places = 16384 / (s.classes + 1);
  return places < 1 ? 1 : places > 256 ? 256 : places;
}

// Where place i begins.
inline int64_t offset_of(const CrossEntropyShape& s, int64_t i) {
  return i / s.inner * s.outer_stride + i % s.inner * s.place_stride;
}

template <class T> using A = acc_t<T>;

// What the reduction of one chunk needs.
struct Sums {
  double loss, weight;
};

// One place: its largest logit, sum(exp(x - largest)), and sum(w (largest - x)) where labels are smoothed.
template <class T> struct Row {
  A<T> largest = -__builtin_inf();
  double sum = 0, smooth = 0;
};

// Sum of exp(x - largest) over `count` logits. Four sums, because each addition waits for the one before.
template <class T> inline double sum_of_exponentials(const T* x, int64_t count, A<T> largest) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> sum[4] = {};
  int64_t c = 0;
  for (; c + 4 * lanes <= count; c += 4 * lanes)
    for (int i = 0; i < 4; ++i) sum[i] += exp_nonpositive(load(x + c + i * lanes) - largest);
  for (; c + lanes <= count; c += lanes) sum[0] += exp_nonpositive(load(x + c) - largest);
  if (c < count) sum[1] += first_lanes<T>(exp_nonpositive(load_some(x + c, count - c) - largest), count - c);
  return static_cast<double>(reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])));
}

// The largest of `count` logits, NaN left aside: sums of exponentials are NaN where a logit is.
template <class T> inline A<T> largest_of(const T* x, int64_t count) {
  constexpr int64_t lanes = kLanes<T>;
  const A<T> infinity = __builtin_inf();
  Vec<T> top[4];
  for (auto& t : top) t = broadcast<T>(-infinity);
  auto larger = [](Vec<T> a, Vec<T> b) { return a > b ? a : b; };
  int64_t c = 0;
  for (; c + 4 * lanes <= count; c += 4 * lanes)
    for (int i = 0; i < 4; ++i) top[i] = larger(load(x + c + i * lanes), top[i]);
  for (; c + lanes <= count; c += lanes) top[0] = larger(load(x + c), top[0]);
  if (c < count)
    top[1] = larger(first_lanes<T>(load_some(x + c, count - c), count - c, broadcast<T>(-infinity)), top[1]);
  const Vec<T> all = larger(larger(top[0], top[1]), larger(top[2], top[3]));
  A<T> largest = all[0];
  for (int i = 1; i < lanes; ++i) largest = all[i] > largest ? all[i] : largest;
  return largest;
}

template <class T> inline Row<T> read_row(const T* x, int64_t classes, const T* weight, bool smooth) {
  constexpr int64_t lanes = kLanes<T>;
  const A<T> infinity = __builtin_inf();
  Row<T> row;
  double weight_sum = 0;
  for (int64_t c0 = 0; c0 < classes; c0 += kBlock) {
    const int64_t end = c0 + kBlock < classes ? c0 + kBlock : classes;
    const A<T> top = largest_of(x + c0, end - c0);
    const A<T> largest = top > row.largest ? top : row.largest;
    if (largest == -infinity) {  // -inf adds nothing, NaN does
      for (int64_t c = c0; c < end; ++c) {
        const A<T> logit = static_cast<A<T>>(x[c]);
        if (logit != logit) row.sum = static_cast<double>(logit);
      }
      continue;
    }
    if (largest != row.largest) {
      row.sum *= row.sum == 0 ? 1.0 : static_cast<double>(exp_nonpositive(broadcast<T>(row.largest - largest))[0]);
      row.smooth += weight_sum == 0 ? 0.0 : weight_sum * (static_cast<double>(largest) - row.largest);
      row.largest = largest;
    }
    row.sum += sum_of_exponentials(x + c0, end - c0, largest);
    if (smooth) {
      Vec<T> apart{}, weights{};
      for (int64_t c = c0; c < end; c += lanes) {
        const Vec<T> w = weight ? load_some(weight + c, end - c) : broadcast<T>(1);
        apart += first_lanes<T>(w * (largest - load_some(x + c, end - c)), end - c);
        weights += first_lanes<T>(w, end - c);
      }
      row.smooth += static_cast<double>(reduce_add(apart));
      weight_sum += static_cast<double>(reduce_add(weights));
    }
  }
  return row;
}

template <class T> double sum_of_weights(const T* weight, int64_t classes) {
  if (!weight) return static_cast<double>(classes);
  double sum = 0;
  for (int64_t c = 0; c < classes; ++c) sum += static_cast<double>(static_cast<A<T>>(weight[c]));
  return sum;
}

// Loss of place i from what was read of it.
template <class T>
inline double loss_of(const CrossEntropyArgs<T>& args, A<T> largest, double log_sum, double smooth, double weights,
                      const T* x, int64_t stride, int64_t i, Sums& sums) {
  const int64_t target = args.target[i];
  if (target == args.ignore_index) return 0.0;
  const double w = args.weight ? static_cast<double>(static_cast<A<T>>(args.weight[target])) : 1.0;
  const double logit = static_cast<double>(static_cast<A<T>>(x[target * stride]));
  double loss = w * (static_cast<double>(largest) - logit + log_sum);
  if (args.label_smoothing > 0)
    loss = (1 - args.label_smoothing) * loss +
           args.label_smoothing / static_cast<double>(args.shape.classes) * (smooth + weights * log_sum);
  const double own = args.sample_weight ? static_cast<double>(static_cast<A<T>>(args.sample_weight[i])) : 1.0;
  loss *= own;
  sums.loss += loss;
  sums.weight += w * own;
  return loss;
}

// Places [begin, end) whose classes lie side by side.
template <class T>
void read_rows(const CrossEntropyArgs<T>& args, double weights, int64_t begin, int64_t end, Sums& sums) {
  const CrossEntropyShape& s = args.shape;
  for (int64_t i = begin; i < end; ++i) {
    const T* x = args.input + offset_of(s, i);
    const Row<T> row = read_row(x, s.classes, args.weight, args.label_smoothing > 0);
    const double log_sum = std::log(row.sum);
    args.largest[i] = row.largest;
    args.log_sum[i] = static_cast<A<T>>(log_sum);
    const double loss = loss_of(args, row.largest, log_sum, row.smooth, weights, x, 1, i, sums);
    if (args.reduction == 0) args.loss[i] = static_cast<T>(static_cast<A<T>>(loss));
  }
}

// Places [begin, end) of one sample, side by side; each class is a stride away.
template <class T>
void read_columns(const CrossEntropyArgs<T>& args, double weights, int64_t begin, int64_t end, Sums& sums) {
  constexpr int64_t lanes = kLanes<T>;
  const CrossEntropyShape& s = args.shape;
  for (int64_t i = begin; i < end;) {
    const int64_t d = i % s.inner;
    int64_t count = end - i < lanes ? end - i : lanes;
    if (s.inner - d < count) count = s.inner - d;
    const T* x = args.input + i / s.inner * s.outer_stride + d;
    Vec<T> top = broadcast<T>(-__builtin_inf());
    for (int64_t c = 0; c < s.classes; ++c) top = maximum(load_some(x + c * s.class_stride, count), top);
    Vec<T> sum{}, smooth{};
    for (int64_t c = 0; c < s.classes; ++c) {
      const Vec<T> below = load_some(x + c * s.class_stride, count) - top;
      sum += exp_nonpositive(below);
      if (args.label_smoothing > 0) smooth -= args.weight ? static_cast<A<T>>(args.weight[c]) * below : below;
    }
    for (int64_t l = 0; l < count; ++l) {
      const double log_sum = std::log(static_cast<double>(sum[l]));
      args.largest[i + l] = top[l];
      args.log_sum[i + l] = static_cast<A<T>>(log_sum);
      const double loss =
          loss_of(args, top[l], log_sum, static_cast<double>(smooth[l]), weights, x + l, s.class_stride, i + l, sums);
      if (args.reduction == 0) args.loss[i + l] = static_cast<T>(static_cast<A<T>>(loss));
    }
    i += count;
  }
}

template <class T> void forward(const CrossEntropyArgs<T>& args) {
  const CrossEntropyShape& s = args.shape;
  const int64_t positions = s.outer * s.inner, chunk_places = chunk_of(s);
  const int64_t chunks = (positions + chunk_places - 1) / chunk_places;
  const double weights = sum_of_weights(args.weight, s.classes);
  Sums* partial = scratch<Sums>(Slot::family_0, chunks);
  parallel_for(chunks, 1 + 8192 / (chunk_places * (s.classes + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * chunk_places;
      const int64_t last = first + chunk_places < positions ? first + chunk_places : positions;
      Sums sums{0, 0};
      if (s.class_stride == 1)
        read_rows(args, weights, first, last, sums);
      else
        read_columns(args, weights, first, last, sums);
      partial[chunk] = sums;
    }
  });
  Sums total{0, 0};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    total.loss += partial[chunk].loss;
    total.weight += partial[chunk].weight;
  }
  *args.total_weight = static_cast<A<T>>(total.weight);
  if (args.reduction == 1) *args.loss = static_cast<T>(static_cast<A<T>>(total.loss / total.weight));
  if (args.reduction == 2) *args.loss = static_cast<T>(static_cast<A<T>>(total.loss));
}

// grad[c] = p[c] * all - w[c] * each away from the target; there along (p - 1) + each (sum(w) p - w), in this form
// and in double, because it cancels.
template <class T> struct Factors {
  A<T> all, each;
  double along;
};

template <class T>
inline Factors<T> factors(const CrossEntropyBackwardArgs<T>& args, double weights, int64_t i, int64_t target) {
  double g = static_cast<double>(static_cast<A<T>>(args.grad_loss[args.reduction == 0 ? i : 0]));
  if (args.reduction == 1) g /= static_cast<double>(*args.total_weight);
  if (args.sample_weight) g *= static_cast<double>(static_cast<A<T>>(args.sample_weight[i]));
  const double w = args.weight ? static_cast<double>(static_cast<A<T>>(args.weight[target])) : 1.0;
  const double along = g * (1 - args.label_smoothing) * w,
               spread = g * args.label_smoothing / static_cast<double>(args.shape.classes);
  return {static_cast<A<T>>(along + spread * weights), static_cast<A<T>>(spread), along};
}

template <class T>
inline A<T> at_target(const CrossEntropyBackwardArgs<T>& args, const Factors<T>& f, double weights, int64_t i,
                      T logit) {
  const double p = std::exp(static_cast<double>(static_cast<A<T>>(logit)) - static_cast<double>(args.largest[i]) -
                            static_cast<double>(args.log_sum[i]));
  const double w = args.weight ? static_cast<double>(static_cast<A<T>>(args.weight[args.target[i]])) : 1.0;
  return static_cast<A<T>>(f.along * (p - 1) + static_cast<double>(f.each) * (weights * p - w));
}

template <class T>
void write_row(const CrossEntropyBackwardArgs<T>& args, double weights, int64_t i, const T* x, T* out) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t classes = args.shape.classes, target = args.target[i];
  if (target == args.ignore_index) {
    for (int64_t c = 0; c < classes; ++c) out[c] = T(A<T>(0));
    return;
  }
  const Factors<T> f = factors(args, weights, i, target);
  const A<T> largest = args.largest[i], log_sum = args.log_sum[i];
  auto at = [&](int64_t c, int64_t count) {
    Vec<T> value = exp_nonpositive(load_some(x + c, count) - largest - log_sum) * f.all;
    if (f.each != 0) value -= args.weight ? load_some(args.weight + c, count) * f.each : broadcast<T>(f.each);
    return value;
  };
  int64_t c = 0;
  for (; c + lanes <= classes; c += lanes) {
    prefetch_ahead_to_store(out + c);
    store(out + c, at(c, lanes));
  }
  if (c < classes) store_some(out + c, at(c, classes - c), classes - c);
  out[target] = static_cast<T>(at_target(args, f, weights, i, x[target]));
}

template <class T>
void write_columns(const CrossEntropyBackwardArgs<T>& args, double weights, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<T>;
  const CrossEntropyShape& s = args.shape;
  for (int64_t i = begin; i < end;) {
    const int64_t d = i % s.inner;
    int64_t count = end - i < lanes ? end - i : lanes;
    if (s.inner - d < count) count = s.inner - d;
    const int64_t offset = i / s.inner * s.outer_stride + d;
    const T* x = args.input + offset;
    T* out = args.grad_input + offset;
    Vec<T> all{}, each{}, chosen{}, largest{}, log_sum{};
    auto target = all > all, ignored = all > all;  // integers of the same width, zero
    for (int64_t l = 0; l < count; ++l) {
      largest[l] = args.largest[i + l];
      log_sum[l] = args.log_sum[i + l];
      target[l] = static_cast<decltype(+target[0])>(args.target[i + l]);
      ignored[l] = args.target[i + l] == args.ignore_index ? -1 : 0;
      if (ignored[l]) continue;
      const Factors<T> f = factors(args, weights, i + l, args.target[i + l]);
      all[l] = f.all;
      each[l] = f.each;
      chosen[l] = at_target(args, f, weights, i + l, x[l + args.target[i + l] * s.class_stride]);
    }
    for (int64_t c = 0; c < s.classes; ++c) {
      Vec<T> value = exp_nonpositive(load_some(x + c * s.class_stride, count) - largest - log_sum) * all;
      value -= (args.weight ? static_cast<A<T>>(args.weight[c]) : A<T>(1)) * each;
      value = target == static_cast<decltype(+target[0])>(c) ? chosen : value;
      value = ignored ? Vec<T>{} : value;  // even where the logits are not finite
      store_some(out + c * s.class_stride, value, count);
    }
    i += count;
  }
}

template <class T> void backward(const CrossEntropyBackwardArgs<T>& args) {
  const CrossEntropyShape& s = args.shape;
  const int64_t positions = s.outer * s.inner, chunk_places = chunk_of(s);
  const int64_t chunks = (positions + chunk_places - 1) / chunk_places;
  const double weights = sum_of_weights(args.weight, s.classes);
  parallel_for(chunks, 1 + 8192 / (chunk_places * (s.classes + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * chunk_places;
      const int64_t last = first + chunk_places < positions ? first + chunk_places : positions;
      if (s.class_stride != 1) {
        write_columns(args, weights, first, last);
        continue;
      }
      for (int64_t i = first; i < last; ++i) {
        const int64_t offset = offset_of(s, i);
        write_row(args, weights, i, args.input + offset, args.grad_input + offset);
      }
    }
  });
}

// --- targets that are a probability for each class ------------------------------------------------------------------
// With v[c] = ((1 - e) t[c] + e / C) w[c], a place's loss is sum_c v[c] (largest - x[c] + log_sum), and its gradients are
// p[c] sum(v) - v[c] for the logits, -(1 - e) w[c] log p[c] for the targets. All but the exponentials is double: p and v
// cancel in what has been learned.

template <class T> inline Wide<T> wide_broadcast(double value) { return Wide<T>{} + value; }

// A product rounded before a difference is taken: fused with that, v would not be the number it is in sum(v), and beside
// one class alone something would be left.
template <class V> inline V rounded(V product) {
#if __has_builtin(__builtin_assoc_barrier)
  return __builtin_assoc_barrier(product);
#else
  return product;
#endif
}
inline vdouble_pair rounded(vdouble_pair product) { return {rounded(product.low), rounded(product.high)}; }

// v of some classes, or of some places of one class.
struct Smoothed {
  double keep, share;
  Smoothed(double smoothing, int64_t classes) : keep(1 - smoothing), share(smoothing / static_cast<double>(classes)) {}
  template <class V> V operator()(V target, V weight) const { return rounded((target * keep + share) * weight); }
};

// Weights of `count` classes from c on, or where places lie side by side the weight of class c.
template <class T> inline Wide<T> weights_at(const T* weight, int64_t c, int64_t count, bool rows) {
  if (!weight) return wide_broadcast<T>(1);
  return rows ? wide(load_some(weight + c, count))
              : wide_broadcast<T>(static_cast<double>(static_cast<A<T>>(weight[c])));
}

// Places [begin, end), as many at a time as lie side by side: one with all its classes, or some of each class in turn.
// The sum of their losses.
template <class T> double read_probable(const ProbabilitiesArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<T>;
  const CrossEntropyShape& s = args.shape;
  const Smoothed smoothed(args.label_smoothing, s.classes);
  const bool rows = s.class_stride == 1;
  double total = 0;
  for (int64_t i = begin; i < end;) {
    const int64_t offset = offset_of(s, i);
    const int64_t places = rows ? 1 : smaller(smaller(end - i, lanes), s.inner - i % s.inner);
    Vec<T> top = broadcast<T>(rows ? largest_of(args.input + offset, s.classes) : -__builtin_inf());
    if (!rows)
      for (int64_t c = 0; c < s.classes; ++c)
        top = maximum(load_some(args.input + offset + c * s.class_stride, places), top);
    Wide<T> sum{}, mass{}, apart{};
    for (int64_t c = 0; c < s.classes; c += rows ? lanes : 1) {
      const int64_t at = offset + c * s.class_stride, count = rows ? smaller(s.classes - c, lanes) : places;
      const Vec<T> below = load_some(args.input + at, count) - top;
      Wide<T> v = smoothed(wide(load_some(args.target + at, count)), weights_at(args.weight, c, count, rows));
      Wide<T> term = v * wide(below);
      Vec<T> exponential = exp_nonpositive(below);
      if (rows && count < lanes) {
        exponential = first_lanes<T>(exponential, count);
        v = first_wide(v, count);
        term = first_wide(term, count);
      }
      sum += wide(exponential);
      mass += v;
      apart -= term;
    }
    double sums[lanes], masses[lanes], aparts[lanes];  // of the places
    if (rows) {
      sums[0] = reduce_add(sum), masses[0] = reduce_add(mass), aparts[0] = reduce_add(apart);
    } else {
      store_lanes(sums, sum), store_lanes(masses, mass), store_lanes(aparts, apart);
    }
    for (int64_t l = 0; l < places; ++l) {
      const double loss = aparts[l] + masses[l] * std::log(sums[l]);
      args.largest[i + l] = static_cast<double>(top[l]);
      args.sum[i + l] = sums[l];
      args.mass[i + l] = masses[l];
      if (args.reduction == 0) args.loss[i + l] = static_cast<T>(static_cast<A<T>>(loss));
      total += loss;
    }
    i += places;
  }
  return total;
}

template <class T> void forward(const ProbabilitiesArgs<T>& args) {
  const CrossEntropyShape& s = args.shape;
  const int64_t positions = s.outer * s.inner, chunk_places = chunk_of(s);
  const int64_t chunks = (positions + chunk_places - 1) / chunk_places;
  double* partial = scratch<double>(Slot::family_0, chunks);
  parallel_for(chunks, 1 + 8192 / (chunk_places * (s.classes + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      partial[chunk] = read_probable(args, chunk * chunk_places, smaller((chunk + 1) * chunk_places, positions));
  });
  double total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk];
  if (args.reduction == 1) total /= static_cast<double>(positions);
  if (args.reduction != 0) *args.loss = static_cast<T>(static_cast<A<T>>(total));
}

// The gradients of places [begin, end), taken as above.
template <class T> void write_probable(const ProbabilitiesBackwardArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<T>;
  const CrossEntropyShape& s = args.shape;
  const Smoothed smoothed(args.label_smoothing, s.classes);
  const bool rows = s.class_stride == 1;
  const double share = args.reduction == 1 ? 1.0 / static_cast<double>(s.outer * s.inner) : 1.0;
  for (int64_t i = begin; i < end;) {
    const int64_t offset = offset_of(s, i);
    const int64_t places = rows ? 1 : smaller(smaller(end - i, lanes), s.inner - i % s.inner);
    Vec<T> top{};
    double grads[lanes] = {}, log_sums[lanes] = {}, factors[lanes] = {};
    for (int64_t l = 0; l < (rows ? lanes : places); ++l) {
      const int64_t place = rows ? i : i + l;
      const double sum = args.sum[place];
      top[l] = static_cast<A<T>>(args.largest[place]);
      grads[l] = static_cast<double>(static_cast<A<T>>(args.grad_loss[args.reduction == 0 ? place : 0])) * share;
      factors[l] = args.mass[place] / sum;
      if (args.grad_target) log_sums[l] = std::log(sum);
    }
    // p[c] sum(v) is factor times exp(x[c] - largest).
    const Wide<T> grad = load_lanes<T>(grads), log_sum = load_lanes<T>(log_sums), factor = load_lanes<T>(factors);
    for (int64_t c = 0; c < s.classes; c += rows ? lanes : 1) {
      const int64_t at = offset + c * s.class_stride, count = rows ? smaller(s.classes - c, lanes) : places;
      const Vec<T> below = load_some(args.input + at, count) - top;
      const Wide<T> weight = weights_at(args.weight, c, count, rows);
      if (args.grad_input) {
        const Wide<T> v = smoothed(wide(load_some(args.target + at, count)), weight);
        const Wide<T> of_input = grad * (wide(exp_nonpositive(below)) * factor - v);
        store_some(args.grad_input + at, narrow(of_input), count);
      }
      if (args.grad_target) {
        const Wide<T> of_target = grad * smoothed.keep * weight * (log_sum - wide(below));
        store_some(args.grad_target + at, narrow(of_target), count);
      }
    }
    i += places;
  }
}

template <class T> void backward(const ProbabilitiesBackwardArgs<T>& args) {
  const CrossEntropyShape& s = args.shape;
  const int64_t positions = s.outer * s.inner, chunk_places = chunk_of(s);
  const int64_t chunks = (positions + chunk_places - 1) / chunk_places;
  parallel_for(chunks, 1 + 8192 / (chunk_places * (s.classes + 1)), [&](int64_t begin, int64_t end) {
    const int64_t last = end * chunk_places;
    write_probable(args, begin * chunk_places, last < positions ? last : positions);
  });
}

}  // namespace

#define DLKERN_LOSS(T)                                                                     \
  void cross_entropy_forward(const CrossEntropyArgs<T>& args) { forward(args); }           \
  void cross_entropy_backward(const CrossEntropyBackwardArgs<T>& args) { backward(args); } \
  void probabilities_forward(const ProbabilitiesArgs<T>& args) { forward(args); }          \
  void probabilities_backward(const ProbabilitiesBackwardArgs<T>& args) { backward(args); }
DLKERN_LOSS(float)
DLKERN_LOSS(double)
DLKERN_LOSS(bfloat16)
DLKERN_LOSS(float16)

}  // namespace dlkern::cpu::DLKERN_ISA

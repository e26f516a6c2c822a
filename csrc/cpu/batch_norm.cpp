// Batch norm over the channels of [n, c, inner] ("planes") or [rows, c] (channels_last), with activation and residual
// in the same pass. Two passes: sums, then apply. Sums are of x - s and (x - s)^2 in double, s the mean of
// a few elements: one pass that neither cancels nor overflows, in vectors of double that keep up with memory.
// Planes: each thread does both passes of a channel while it is in cache; where channels are few, and for rows, all
// threads sum their share of the rows, the shares are added in a fixed order, and all threads apply.
// Floors (S = bytes of the input): train forward 3 S, 2 S where a channel stays in cache; eval 2 S; backward 5 S or 3 S.
#include "batch_norm.h"

#include "activation.h"
#include "parallel.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

constexpr int kWide = kLanes<double>;
constexpr double kLaneNumbers[8] = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr int64_t kBlockBytes = 16384;  // rows taken at a time, so that they stay in L1 from channel to channel

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline double finite_or_zero(double x) { return x - x == 0.0 ? x : 0.0; }

// A vector of sums. For float64 inputs, whose sums have no wider type, the rounding errors are carried along (Knuth's
// two-sum); for the others that part is compiled away.
template <bool exact> struct Lanes {
  static constexpr bool kExact = exact;
  vdouble value{}, lost{};
  void operator+=(vdouble x) {
    if constexpr (exact) {
      const vdouble next = value + x, added = next - value;
      lost += (value - (next - added)) + (x - added);
      value = next;
    } else {
      value += x;
    }
  }
  vdouble total() const {
    const vdouble all = value + lost;
    return exact ? (lost - lost == 0.0 ? all : value) : value;
  }
};
template <class T> constexpr bool kExact = sizeof(T) == sizeof(double);

// Two sums of a channel: of x - s and its square, or of g and g (x - mean).
struct Sums {
  double first, second;
};

// Loads element i and the next ones, widened, of every stream a sum needs.
template <class T, int streams> struct Wide {
  const T* p[streams];
  void load_full(int64_t i, vdouble (&v)[streams]) const {
    for (int k = 0; k < streams; ++k) v[k] = load_wide(p[k] + i);
  }
  void load_some(int64_t i, int count, vdouble (&v)[streams]) const {
    for (int k = 0; k < streams; ++k) v[k] = load_wide_partial(p[k] + i, count);
  }
};

// d = x - shift gives (d, d^2).
struct Forward {
  static constexpr int kStreams = 1;
  template <class Sum> static void add(const vdouble (&v)[1], vdouble shift, Sum& first, Sum& second) {
    const vdouble d = v[0] - shift;
    first += d;
    second += d * d;
  }
};
// g = gradient before the activation gives (g, g (x - mean)); the streams are grad_output, input, output.
template <int activation> struct Backward {
  static constexpr int kStreams = activation == kNone ? 2 : 3;
  template <class Sum> static void add(const vdouble (&v)[kStreams], vdouble mean, Sum& first, Sum& second) {
    const vdouble g = activation_backward(v[0], v[kStreams - 1], activation), d = v[1] - mean, product = g * d;
    first += g;
    second += product;
    if constexpr (Sum::kExact) {  // what the difference and the product lost
      const vdouble back = d - v[1], lost = (v[1] - (d - back)) - (mean + back);
      for (int i = 0; i < kWide; ++i) second.lost[i] += std::fma(g[i], d[i], -product[i]) + g[i] * lost[i];
    }
  }
};

// Sums over `count` consecutive elements of one channel from element i on, added to lanes of first and second.
template <class Rule, class T>
inline void sum_segment(const Wide<T, Rule::kStreams>& streams, int64_t i, int64_t count, double centre, Lanes<kExact<T>> (&first)[4],
                        Lanes<kExact<T>> (&second)[4]) {
  const vdouble c = vdouble{} + centre;
  const int64_t end = i + count;
  for (; i + 4 * kWide <= end; i += 4 * kWide)
    for (int u = 0; u < 4; ++u) {
      vdouble v[Rule::kStreams];
      streams.load_full(i + u * kWide, v);
      Rule::add(v, c, first[u], second[u]);
    }
  for (int u = 0; u < 3; ++u) {
    if (i + kWide > end) break;
    vdouble v[Rule::kStreams];
    streams.load_full(i, v);
    Rule::add(v, c, first[u], second[u]);
    i += kWide;
  }
  if (i < end) {  // the lanes beyond the end are taken out again
    vdouble v[Rule::kStreams];
    const int lanes = static_cast<int>(end - i);
    streams.load_some(i, lanes, v);
    Lanes<false> a, b;
    Rule::add(v, c, a, b);
    const auto inside = load(kLaneNumbers) < static_cast<double>(lanes);
    first[3] += inside ? a.value : vdouble{};
    second[3] += inside ? b.value : vdouble{};
  }
}
template <bool exact> inline double total(const Lanes<exact> (&sum)[4]) {
  return reduce_add((sum[0].total() + sum[1].total()) + (sum[2].total() + sum[3].total()));
}

// Sums over `rows` rows of c channels from `begin` on, for `vectors` vectors of channels, added to sums[0..], [c..].
template <class Rule, int vectors, bool full, class T>
inline void sum_channels(const Wide<T, Rule::kStreams>& streams, int64_t begin, int64_t rows, int64_t c, int lanes, const double* centre, double* first,
                         double* second) {
  Lanes<kExact<T>> a[vectors], b[vectors];
  vdouble m[vectors];
  for (int k = 0; k < vectors; ++k) m[k] = full ? load(centre + k * kWide) : load_partial<double>(centre, lanes);
  for (int64_t r = 0; r < rows; ++r)
    for (int k = 0; k < vectors; ++k) {
      vdouble v[Rule::kStreams];
      if constexpr (full)
        streams.load_full(begin + r * c + k * kWide, v);
      else
        streams.load_some(begin + r * c + k * kWide, lanes, v);
      Rule::add(v, m[k], a[k], b[k]);
    }
  for (int k = 0; k < vectors; ++k) {
    double *p = first + k * kWide, *q = second + k * kWide;
    if constexpr (full) {
      store(p, load(p) + a[k].total());
      store(q, load(q) + b[k].total());
    } else {
      store_partial<double>(p, load_partial<double>(p, lanes) + a[k].total(), lanes);
      store_partial<double>(q, load_partial<double>(q, lanes) + b[k].total(), lanes);
    }
  }
}
template <class Rule, class T>
inline void sum_rows(const Wide<T, Rule::kStreams>& streams, int64_t begin, int64_t end, int64_t c, const double* centre, double* first,
                     double* second) {
  for (int64_t i = 0; i < c; ++i) first[i] = second[i] = 0;
  const int64_t block = larger(1, kBlockBytes / (c * static_cast<int64_t>(sizeof(T)) * Rule::kStreams));
  for (int64_t row = begin; row < end; row += block) {
    const int64_t rows = smaller(block, end - row);
    int64_t j = 0;
    for (; j + 4 * kWide <= c; j += 4 * kWide)
      sum_channels<Rule, 4, true, T>(streams, row * c + j, rows, c, kWide, centre + j, first + j, second + j);
    for (; j + kWide <= c; j += kWide)
      sum_channels<Rule, 1, true, T>(streams, row * c + j, rows, c, kWide, centre + j, first + j, second + j);
    if (j < c) sum_channels<Rule, 1, false, T>(streams, row * c + j, rows, c, static_cast<int>(c - j), centre + j, first + j, second + j);
  }
}

// What the apply pass does to one vector, given the channel's constants a, b, c, d; `at` is the element's position.
template <class T, int activation> struct ApplyForward {
  const T* input;
  const T* residual;
  T* output;
  static constexpr int kConstants = 4;  // mean, scale, bias, what rounding scale lost
  template <class V, class L, class S> void operator()(int64_t at, const V (&k)[4], L&& load_at, S&& store_at) const {
    const V centred = load_at(input + at) - k[0];
    V y = centred * k[1] + (centred * k[3] + k[2]);
    if (residual) y += load_at(residual + at);
    store_at(output + at, activate(y, activation));
  }
};
template <class T, int activation> struct ApplyBackward {
  const T* grad_output;
  const T* input;
  const T* output;
  T* grad_input;
  T* grad_residual;
  bool train;
  static constexpr int kConstants = 4;  // mean, scale, mean of g, slope; on frozen statistics what rounding scale lost is third
  template <class V, class L, class S> void operator()(int64_t at, const V (&k)[4], L&& load_at, S&& store_at) const {
    V g = load_at(grad_output + at);
    if constexpr (activation != kNone) g = activation_backward(g, load_at(output + at), activation);
    if (grad_residual) store_at(grad_residual + at, g);
    if (train)
      g = (g - k[2] - (load_at(input + at) - k[0]) * k[3]) * k[1];
    else
      g = g * k[1] + g * k[2];  // torch multiplies in double here
    store_at(grad_input + at, g);
  }
};

template <class T, class Apply> inline void apply_segment(const Apply& apply, int64_t i, int64_t count, const acc_t<T>* constants) {
  Vec<T> k[4];
  for (int j = 0; j < 4; ++j) k[j] = broadcast<T>(constants[j]);
  const int64_t end = i + count;
  for (; i + kLanes<T> <= end; i += kLanes<T>)
    apply(i, k, [](const T* p) { return load(p); }, [](T* p, Vec<T> v) { store(p, v); });
  if (i < end) {
    const int lanes = static_cast<int>(end - i);
    apply(i, k, [lanes](const T* p) { return load_partial<T>(p, lanes); }, [lanes](T* p, Vec<T> v) { store_partial<T>(p, v, lanes); });
  }
}

// constants: kConstants arrays of c.
template <int vectors, bool full, class T, class Apply>
inline void apply_channels(const Apply& apply, int64_t begin, int64_t rows, int64_t c, int lanes, const acc_t<T>* constants) {
  Vec<T> k[vectors][4] = {};
  for (int v = 0; v < vectors; ++v)
    for (int j = 0; j < Apply::kConstants; ++j)
      k[v][j] = full ? load(constants + j * c + v * kLanes<T>) : load_partial<acc_t<T>>(constants + j * c, lanes);
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = begin + r * c + v * kLanes<T>;
      if constexpr (full)
        apply(at, k[v], [](const T* p) { return load(p); }, [](T* p, Vec<T> x) { store(p, x); });
      else
        apply(at, k[v], [lanes](const T* p) { return load_partial<T>(p, lanes); },
              [lanes](T* p, Vec<T> x) { store_partial<T>(p, x, lanes); });
    }
}
template <class T, class Apply>
inline void apply_rows(const Apply& apply, int64_t begin, int64_t end, int64_t c, const acc_t<T>* constants) {
  constexpr int kVectors = kVectorBytes == 64 ? 4 : 2;  // times four constants in registers
  const int64_t block = larger(1, kBlockBytes / (c * static_cast<int64_t>(sizeof(T))));
  for (int64_t row = begin; row < end; row += block) {
    const int64_t rows = smaller(block, end - row);
    int64_t j = 0;
    for (; j + kVectors * kLanes<T> <= c; j += kVectors * kLanes<T>)
      apply_channels<kVectors, true, T>(apply, row * c + j, rows, c, kLanes<T>, constants + j);
    for (; j + kLanes<T> <= c; j += kLanes<T>) apply_channels<1, true, T>(apply, row * c + j, rows, c, kLanes<T>, constants + j);
    if (j < c) apply_channels<1, false, T>(apply, row * c + j, rows, c, static_cast<int>(c - j), constants + j);
  }
}

// The two passes over either layout.
//   centre(channel): what is subtracted before summing.
//   finish(channel, sums, constants): writes the channel's results and the apply pass's constants.
template <class T, class Rule, class Apply, class Centre, class Finish>
inline void two_passes(const NormShape& s, bool sums_wanted, double* scratch, const Wide<T, Rule::kStreams>& streams, const Apply& apply,
                       Centre&& centre, Finish&& finish) {
  using A = acc_t<T>;
  const int64_t threads = num_threads(), parts = batch_norm_parts(s, threads), positions = s.n * s.inner;
  double* first = scratch;                  // [parts][2][c]
  A* constants = reinterpret_cast<A*>(scratch + 2 * parts * s.c);  // [4][c], or [c][4] for planes
  if (!s.channels_last && (s.c >= 4 * threads || s.c % threads == 0 || parts == 1)) {
    parallel_for(s.c, larger(1, 16384 / positions), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        Sums sums{};
        if (sums_wanted) {
          Lanes<kExact<T>> a[4], b[4];
          const double middle = centre(c);
          for (int64_t n = 0; n < s.n; ++n) sum_segment<Rule, T>(streams, (n * s.c + c) * s.inner, s.inner, middle, a, b);
          sums = {total(a), total(b)};
        }
        A k[4] = {};
        finish(c, sums, k);
        for (int64_t n = s.n - 1; n >= 0; --n) apply_segment<T>(apply, (n * s.c + c) * s.inner, s.inner, k);  // warm end first
      }
    });
    return;
  }
  auto share = [&](int64_t part) { return positions * part / parts; };
  // Positions [begin, end) of n * inner, as segments of planes: f(image, first position in the plane, how many).
  auto each_segment = [&](int64_t begin, int64_t end, auto&& f) {
    while (begin < end) {
      const int64_t n = begin / s.inner, offset = begin % s.inner, count = smaller(end - begin, s.inner - offset);
      f(n, offset, count);
      begin += count;
    }
  };
  double* centres = scratch + 2 * parts * s.c;  // until finish() writes the constants over them
  if (sums_wanted) {
    for (int64_t c = 0; c < s.c; ++c) centres[c] = centre(c);
    parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        double* mine = first + 2 * part * s.c;
        if (s.channels_last) {
          sum_rows<Rule, T>(streams, share(part), share(part + 1), s.c, centres, mine, mine + s.c);
          continue;
        }
        for (int64_t c = 0; c < s.c; ++c) {
          Lanes<kExact<T>> a[4], b[4];
          each_segment(share(part), share(part + 1), [&](int64_t n, int64_t offset, int64_t count) {
            sum_segment<Rule, T>(streams, (n * s.c + c) * s.inner + offset, count, centres[c], a, b);
          });
          mine[c] = total(a);
          mine[s.c + c] = total(b);
        }
      }
    });
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < 2 * s.c; ++i) first[i] += first[2 * part * s.c + i];
  }
  for (int64_t c = 0; c < s.c; ++c) {
    const Sums sums = sums_wanted ? Sums{first[c], first[s.c + c]} : Sums{};
    A k[4] = {};
    finish(c, sums, k);
    for (int j = 0; j < 4; ++j) constants[s.channels_last ? j * s.c + c : 4 * c + j] = k[j];
  }
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      if (s.channels_last) {
        apply_rows<T>(apply, share(part), share(part + 1), s.c, constants);
        continue;
      }
      for (int64_t c = 0; c < s.c; ++c)
        each_segment(share(part), share(part + 1), [&](int64_t n, int64_t offset, int64_t count) {
          apply_segment<T>(apply, (n * s.c + c) * s.inner + offset, count, constants + 4 * c);
        });
    }
  });
}

template <class T, int activation> void forward(const BatchNormArgs<T>& args) {
  using A = acc_t<T>;
  const double count = static_cast<double>(args.shape.n * args.shape.inner);
  // The mean of eight elements far apart, in an order exact for a constant channel.
  auto centre = [&](int64_t c) {
    const NormShape& shape = args.shape;
    const int64_t positions = shape.n * shape.inner;
    double v[8];
    for (int64_t i = 0; i < 8; ++i) {
      const int64_t p = i * positions / 8;
      v[i] = static_cast<double>(args.input[shape.channels_last ? p * shape.c + c : (p / shape.inner * shape.c + c) * shape.inner + p % shape.inner]);
    }
    return finite_or_zero((((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))) / 8);
  };
  auto finish = [&](int64_t c, const Sums& sums, A (&k)[4]) {
    if (args.train) {
      const double mean = sums.first / count, var = (sums.second - sums.first * mean) / count;
      args.var[c] = var < 0 ? 0 : var;
      args.mean[c] = centre(c) + mean;
      args.invstd[c] = 1.0 / std::sqrt(args.var[c] + args.eps);
    }
    // What rounding the mean lost goes into the bias.
    const double scale = args.weight ? args.invstd[c] * static_cast<double>(args.weight[c]) : args.invstd[c];
    k[0] = static_cast<A>(args.mean[c]);
    k[1] = static_cast<A>(scale);
    k[2] = static_cast<A>((args.bias ? static_cast<double>(args.bias[c]) : 0.0) -
                          finite_or_zero((args.mean[c] - static_cast<double>(k[0])) * scale));
    k[3] = static_cast<A>(finite_or_zero(scale - static_cast<double>(k[1])));
  };
  two_passes<T, Forward>(args.shape, args.train, args.scratch, Wide<T, 1>{{args.input}},
                         ApplyForward<T, activation>{args.input, args.residual, args.output}, centre, finish);
}

template <class T, int activation> void backward(const BatchNormBackwardArgs<T>& args) {
  using A = acc_t<T>;
  using Rule = Backward<activation>;
  const double count = static_cast<double>(args.shape.n * args.shape.inner);
  auto centre = [&](int64_t c) { return static_cast<double>(args.mean[c]); };
  auto finish = [&](int64_t c, const Sums& sums, A (&k)[4]) {
    const double invstd = args.invstd[c];
    args.grad_bias[c] = static_cast<A>(sums.first);
    args.grad_weight[c] = static_cast<A>(sums.second * invstd);
    k[0] = args.mean[c];
    const double scale = args.weight ? invstd * static_cast<double>(args.weight[c]) : invstd;
    k[1] = static_cast<A>(scale);
    k[2] = static_cast<A>(args.train ? sums.first / count : finite_or_zero(scale - static_cast<double>(k[1])));
    k[3] = static_cast<A>(sums.second / count * invstd * invstd);
  };
  Wide<T, Rule::kStreams> streams;
  streams.p[0] = args.grad_output;
  streams.p[1] = args.input;
  if constexpr (activation != kNone) streams.p[2] = args.output;
  two_passes<T, Rule>(
      args.shape, true, args.scratch, streams,
      ApplyBackward<T, activation>{args.grad_output, args.input, args.output, args.grad_input, args.grad_residual, args.train}, centre,
      finish);
}

template <class F> inline void with_activation(int activation, F&& f) {
  switch (activation) {
    case kRelu: return f.template operator()<kRelu>();
    case kTanh: return f.template operator()<kTanh>();
    case kSigmoid: return f.template operator()<kSigmoid>();
    default: return f.template operator()<kNone>();
  }
}

}  // namespace

#define DLKERN_DEFINE_BATCH_NORM(T)                                              \
  void batch_norm_forward(const BatchNormArgs<T>& args) {                        \
    with_activation(args.activation, [&]<int a>() { forward<T, a>(args); });     \
  }                                                                              \
  void batch_norm_backward(const BatchNormBackwardArgs<T>& args) {               \
    with_activation(args.activation, [&]<int a>() { backward<T, a>(args); });    \
  }
DLKERN_DEFINE_BATCH_NORM(float)
DLKERN_DEFINE_BATCH_NORM(double)
DLKERN_DEFINE_BATCH_NORM(bfloat16)

}  // namespace dlkern::cpu::DLKERN_ISA

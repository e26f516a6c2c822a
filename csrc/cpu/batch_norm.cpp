// Batch norm over the channels of [n, c, inner] ("planes") or [positions, c] (channels_last), with activation and
// residual in the same pass. Two passes: sums (batch_norm_sums.h), then apply (batch_norm_apply.h), which goes backwards
// over memory, so that it starts where the caches are warm.
// Planes: each thread does both passes of a channel while it is in cache. Rows, and planes of few channels: all threads
// sum their share of the positions, the shares are added in a fixed order, and all threads apply.
// Sums are of x - s, s the mean of eight elements, in doubles; for 16-bit types in floats, and where those turn out not
// to do (an overflow, a variance that is small beside s) again in doubles.
// Floors (S = bytes of the input): train forward 3 S, 2 S where a channel stays in cache; eval 2 S; backward 5 S or 3 S.
#include "batch_norm.h"

#include <type_traits>

#include "activation.h"
#include "batch_norm_apply.h"
#include "batch_norm_sums.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // fewer elements a thread cost more than they give
constexpr int64_t kLargePlane = 512;  // elements beside which a channel's sums and constants cost nothing
constexpr int64_t kTile = 1024;  // columns whose sums stay in L1
constexpr int64_t kChunkBytes = 65536;  // what the apply pass takes forwards, while it goes backwards over chunks
// The last pass's tensors in bytes, from which on its results are stored past the caches: of 32 MB what leaves room for
// what is read twice, or nearly all where nothing is.
constexpr int64_t kCaches = 20'000'000, kCachesOnce = 30'000'000;

inline double finite_or_zero(double x) { return x - x == 0.0 ? x : 0.0; }

// Sums of a channel: of p and p q (batch_norm_sums.h), about `centre`.
struct Total {
  double centre = 0, first = 0, second = 0;
};

template <class T> constexpr bool kShortSums = sizeof(T) < sizeof(float);
template <class T, int unroll> using SumsOf =
    std::conditional_t<kShortSums<T>, ShortSums<unroll>,
                       std::conditional_t<sizeof(T) == sizeof(float), WideSums<unroll>, ExactSums<unroll>>>;

template <class F> inline void with_activation(int activation, F&& f) {
  switch (activation) {
    case kRelu: return f.template operator()<kRelu>();
    case kTanh: return f.template operator()<kTanh>();
    case kSigmoid: return f.template operator()<kSigmoid>();
    default: return f.template operator()<kNone>();
  }
}

// One direction's arithmetic. Sums and Again (the sums where few() or !good(total)) say how to sum; `summed` whether to,
// `apply_waits` whether the second pass needs the totals; centre(channel) is subtracted before summing; results() writes
// what a channel returns, constants() what its apply pass needs. sum(), sum_rows() and with_apply() see pieces of channels
// and rows, and there alone an activation has code of its own: what cuts the work is compiled once for all.
template <class T> struct ForwardJob {
  template <int unroll> using Sums = SumsOf<T, unroll>;
  template <int unroll> using Again = std::conditional_t<kShortSums<T>, WideSums<unroll>, Sums<unroll>>;
  const BatchNormArgs<T>& args;
  bool summed = args.train, apply_waits = args.train;
  double count = static_cast<double>(args.shape.n * args.shape.inner);

  int streams() const { return args.residual ? 3 : 2; }  // of the apply pass
  template <class S> void sum(int64_t begin, int64_t segments, int64_t apart, int64_t length, typename S::Centre centre,
                              S& sums) const {
    sum_segments<Deviation>(Streams<T, 1>{{args.input}}, begin, segments, apart, length, centre, sums);
  }
  template <template <int> class S> void sum_rows(int64_t begin, int64_t rows, int64_t stride, int64_t width,
                                                  const typename S<1>::Centre* centres, double* memory,
                                                  int64_t apart) const {
    sum_row_block<Deviation, S, T>(Streams<T, 1>{{args.input}}, begin, rows, stride, width, centres, memory, apart);
  }
  // f(what one element takes).
  template <class F> void with_apply(F&& f) const {
    with_activation(args.activation,
                    [&]<int activation>() { f(ApplyForward<T, activation>{args.input, args.residual, args.output}); });
  }
  // The mean of eight elements far apart, in an order exact for a constant channel.
  double centre(int64_t c) const {
    const NormShape& s = args.shape;
    const int64_t positions = s.n * s.inner;
    double v[8];
    for (int64_t i = 0; i < 8; ++i) {
      const int64_t p = i * positions / 8;
      v[i] = static_cast<double>(
          args.input[s.channels_last ? p * s.c + c : (p / s.inner * s.c + c) * s.inner + p % s.inner]);
    }
    return finite_or_zero((((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))) / 8);
  }
  // Of few elements the rounding errors of floats do not average out.
  bool few() const { return kShortSums<T> && count < 512; }
  // Sums of floats do where nothing overflowed, underflowed or cancelled. A sum of exactly zero is a constant channel,
  // or one whose variance is nothing beside eps.
  bool good(const Total& t) const {
    if (!kShortSums<T> || (t.second == 0 && args.eps > 0x1p-64)) return true;
    return t.second - t.second == 0 && t.second >= count * 0x1p-80 &&
           t.second - t.first * (t.first / count) >= t.second / 16;
  }
  void results(int64_t c, const Total& t) const {
    if (!args.train) return;
    const double mean = t.first / count, var = (t.second - t.first * mean) / count;
    args.var[c] = var < 0 ? 0 : var;
    args.mean[c] = t.centre + mean;
    args.invstd[c] = 1.0 / std::sqrt(args.var[c] + args.eps);
  }
  void constants(int64_t c, const Total&, acc_t<T> (&k)[kConstants]) const {
    using A = acc_t<T>;
    const double scale = args.weight ? args.invstd[c] * static_cast<double>(args.weight[c]) : args.invstd[c];
    k[0] = static_cast<A>(args.mean[c]);
    k[1] = static_cast<A>(scale);
    k[2] = static_cast<A>(
        (args.bias ? static_cast<double>(args.bias[c]) : 0.0) -
        finite_or_zero((args.mean[c] - static_cast<double>(k[0])) * scale));  // what rounding the mean lost
    k[3] = static_cast<A>(finite_or_zero(scale - static_cast<double>(k[1])));
  }
};

template <class T, bool train> struct BackwardJob {
  template <int unroll> using Sums = SumsOf<T, unroll>;
  template <int unroll> using Again = Sums<unroll>;
  const BatchNormBackwardArgs<T>& args;
  bool summed = true, apply_waits = train;
  double count = static_cast<double>(args.shape.n * args.shape.inner);

  int streams() const { return 2 + (args.activation != kNone) + train + (args.grad_residual != nullptr); }
  // f(Rule(), the streams it reads).
  template <class F> void with_rule(F&& f) const {
    with_activation(args.activation, [&]<int activation>() {
      if constexpr (activation == kNone)
        f(Gradient<activation>(), Streams<T, 2>{{args.grad_output, args.input}});
      else
        f(Gradient<activation>(), Streams<T, 3>{{args.grad_output, args.input, args.output}});
    });
  }
  template <class S> void sum(int64_t begin, int64_t segments, int64_t apart, int64_t length, typename S::Centre centre,
                              S& sums) const {
    with_rule([&](auto rule, const auto& from) {
      sum_segments<decltype(rule)>(from, begin, segments, apart, length, centre, sums);
    });
  }
  template <template <int> class S> void sum_rows(int64_t begin, int64_t rows, int64_t stride, int64_t width,
                                                  const typename S<1>::Centre* centres, double* memory,
                                                  int64_t apart) const {
    with_rule([&](auto rule, const auto& from) {
      sum_row_block<decltype(rule), S, T>(from, begin, rows, stride, width, centres, memory, apart);
    });
  }
  template <class F> void with_apply(F&& f) const {
    with_activation(args.activation, [&]<int activation>() {
      f(ApplyBackward<T, activation, train>{args.grad_output, args.input, args.output, args.grad_input,
                                            args.grad_residual});
    });
  }
  double centre(int64_t c) const { return static_cast<double>(args.mean[c]); }
  bool few() const { return false; }
  bool good(const Total&) const { return true; }
  void results(int64_t c, const Total& t) const {
    args.grad_bias[c] = static_cast<acc_t<T>>(t.first);
    args.grad_weight[c] = static_cast<acc_t<T>>(t.second * args.invstd[c]);
  }
  void constants(int64_t c, const Total& t, acc_t<T> (&k)[kConstants]) const {
    using A = acc_t<T>;
    const double invstd = args.invstd[c];
    const double scale = args.weight ? invstd * static_cast<double>(args.weight[c]) : invstd;
    k[0] = args.mean[c];
    k[1] = static_cast<A>(scale);
    k[2] = static_cast<A>(t.first / count);
    k[3] = static_cast<A>(t.second / count * invstd * invstd);
    k[4] = static_cast<A>(finite_or_zero(scale - static_cast<double>(k[1])));
  }
};

template <class T, class Job> uintptr_t past_for(const NormShape& s, const Job& job) {
  return past_caches<T>(s.n * s.c * s.inner * static_cast<int64_t>(sizeof(T)) * job.streams() >=
                        (job.summed ? kCaches : kCachesOnce));
}

// Consecutive elements of a channel; `next` as apply_segment has it.
template <class T, class Job>
void apply_piece(const Job& job, int64_t at, int64_t count, int64_t next, const acc_t<T>* constants, uintptr_t past) {
  job.with_apply([&](const auto& apply) { apply_segment<T>(apply, at, count, next, constants, past); });
}

// A channel at a time, for planes.
template <class T, class Job> void whole_channels(const NormShape& s, const Job& job) {
  const uintptr_t past = past_for<T>(s, job);
  parallel_for(s.c, larger(1, kGrain / (s.n * s.inner)), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * s.inner, apart = s.c * s.inner;
      auto total = [&]<class Sums>(Sums sums, double wanted, int64_t images, auto&& sum) {
        const auto centre = static_cast<typename Sums::Centre>(wanted);
        for (int64_t n = 0; n < s.n; n += images) sum(n, centre, sums);
        return Total{static_cast<double>(centre), sums.first(), sums.second()};
      };
      auto sum_all = [&](auto sums) {
        return total(sums, job.centre(c), s.n,
                     [&](int64_t, auto centre, auto& to) { job.sum(first, s.n, apart, s.inner, centre, to); });
      };
      acc_t<T> k[kConstants] = {};
      const bool is_short = s.inner * static_cast<int64_t>(sizeof(T)) <= kShortPiece;
      auto apply = [&](int64_t n, int64_t step) {
        apply_piece<T>(job, first + n * apart, s.inner, is_short ? step * apart : 0, k, past);
      };
      if (!job.summed) {
        job.constants(c, Total{}, k);
        for (int64_t n = 0; n < s.n; ++n) apply(n, 1);
      } else if (job.apply_waits) {
        Total found;
        if (!job.few()) found = sum_all(typename Job::template Sums<4>{});
        if (job.few() || !job.good(found)) found = sum_all(typename Job::template Again<4>{});
        job.results(c, found);
        job.constants(c, found, k);
        for (int64_t n = s.n - 1; n >= 0; --n) apply(n, -1);
      } else {
        job.constants(c, Total{}, k);
        job.results(c, total(typename Job::template Sums<4>{}, job.centre(c), 1, [&](int64_t n, auto centre, auto& to) {
                      job.sum(first + n * apart, 1, 0, s.inner, centre, to);
                      apply(n, 1);
                    }));
      }
    }
    fence();
  });
}

// Planes as they lie in memory, each summed and applied at once, where applying need not wait for the sums.
template <class T, class Job> void planes_in_order(const NormShape& s, const Job& job) {
  using Sums = typename Job::template Sums<4>;
  using Constants = acc_t<T>[kConstants];
  const uintptr_t past = past_for<T>(s, job);
  double* sums = job.summed ? scratch<double>(Slot::family_0, 2 * s.n * s.c) : nullptr;  // [n * c][2]
  Constants* constants = scratch<Constants>(Slot::family_1, s.c);
  for (int64_t c = 0; c < s.c; ++c) job.constants(c, Total{}, constants[c]);
  parallel_for(s.n * s.c, larger(1, kGrain / s.inner), [&](int64_t begin, int64_t end) {
    if (sums) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t c = plane % s.c;
        Sums found;
        const auto centre = static_cast<typename Sums::Centre>(job.centre(c));
        job.sum(plane * s.inner, 1, 0, s.inner, centre, found);
        sums[2 * plane] = found.first();
        sums[2 * plane + 1] = found.second();
        apply_piece<T>(job, plane * s.inner, s.inner, 0, constants[c], past);
      }
    } else {
      job.with_apply([&](const auto& apply) {
        int64_t c = begin % s.c;
        for (int64_t plane = begin; plane < end; ++plane) {
          apply_segment<T>(apply, plane * s.inner, s.inner, 0, constants[c], past);
          if (++c == s.c) c = 0;
        }
      });
    }
    fence();
  });
  for (int64_t c = 0; sums && c < s.c; ++c) {
    CompensatedSum<double> first, second;
    for (int64_t plane = c; plane < s.n * s.c; plane += s.c) {
      first += sums[2 * plane];
      second += sums[2 * plane + 1];
    }
    job.results(c, {job.centre(c), first.total(), second.total()});
  }
}

// [positions, c] as rows of `width` columns: one position, or where channels are few several side by side, so that
// vectors are full. Only the last row may be short. Column j belongs to channel j % c.
struct Rows {
  const NormShape& shape;
  int64_t width, elements, units, full;
  explicit Rows(const NormShape& s) : shape(s) {
    width = s.c;
    for (int64_t columns = 64; columns >= 16; columns /= 4) {
      const int64_t fold = columns / smaller(columns, s.c & -s.c);
      if (s.c * fold <= kTile) {
        width = s.c * fold;
        break;
      }
    }
    elements = s.n * s.inner * s.c;
    units = (elements + width - 1) / width;
    full = elements / width;
  }
  template <template <int> class Sums, class T, class Job>
  void sum(const Job& job, int64_t begin, int64_t end, const typename Sums<1>::Centre* centres, double* memory,
           int64_t apart) const {
    auto tiles = [&](int64_t first, int64_t last, int64_t columns) {
      for (int64_t j = 0; j < columns; j += kTile)
        for (int64_t r = first; r < last; r += kSumRows)
          job.template sum_rows<Sums>(r * width + j, smaller(kSumRows, last - r), width, smaller(kTile, columns - j),
                                      centres + j, memory + j, apart);
    };
    tiles(begin, smaller(end, full), width);
    if (end > full) tiles(full, full + 1, elements - full * width);
  }
  template <class T, class Job> void apply(const Job& job, int64_t begin, int64_t end, const acc_t<T>* constants,
                                           int64_t apart, uintptr_t past) const {
    job.with_apply([&](const auto& apply) {
      if (begin < full)
        apply_row_block<T>(apply, begin * width, smaller(end, full) - begin, width, width, constants, apart, past);
      if (end > full)
        apply_row_block<T>(apply, full * width, 1, width, elements - full * width, constants, apart, past);
    });
  }
};

// Planes cut by positions of n * inner. A column is a channel.
struct CutPlanes {
  const NormShape& shape;
  int64_t width, units;
  explicit CutPlanes(const NormShape& s) : shape(s), width(s.c), units(s.n * s.inner) {}
  // f(first element, how many) of a channel's pieces of planes.
  template <class F> void each_segment(int64_t begin, int64_t end, int64_t c, F&& f) const {
    while (begin < end) {
      const int64_t n = begin / shape.inner, offset = begin % shape.inner,
                    count = smaller(end - begin, shape.inner - offset);
      f((n * shape.c + c) * shape.inner + offset, count);
      begin += count;
    }
  }
  template <template <int> class Sums, class T, class Job>
  void sum(const Job& job, int64_t begin, int64_t end, const typename Sums<1>::Centre* centres, double* memory,
           int64_t apart) const {
    for (int64_t c = 0; c < width; ++c) {
      Sums<4> sums;
      each_segment(begin, end, c, [&](int64_t at, int64_t count) { job.sum(at, 1, 0, count, centres[c], sums); });
      const double found[2] = {sums.first(), sums.second()};
      for (int i = 0; i < 2; ++i) {
        CompensatedSum<double> all{memory[i * apart + c], memory[(i + 2) * apart + c]};
        all += found[i];
        memory[i * apart + c] = all.value;
        memory[(i + 2) * apart + c] = all.lost;
      }
    }
  }
  template <class T, class Job> void apply(const Job& job, int64_t begin, int64_t end, const acc_t<T>* constants,
                                           int64_t apart, uintptr_t past) const {
    for (int64_t c = 0; c < width; ++c) {
      acc_t<T> k[kConstants];
      for (int m = 0; m < kConstants; ++m) k[m] = constants[m * apart + c];
      each_segment(begin, end, c, [&](int64_t at, int64_t count) { apply_piece<T>(job, at, count, 0, k, past); });
    }
  }
};

// Rows or planes cut into parts, each summed and applied by one thread, chunk by chunk.
template <class T, class Layout, class Job> struct Parts {
  const Layout& layout;
  const Job& job;
  int64_t parts;
  uintptr_t past = past_for<T>(layout.shape, job);
  int64_t c = layout.shape.c, columns = layout.width, apart = (columns + 15) / 16 * 16;
  double* memory =
      scratch<double>(Slot::family_0, (4 * parts + 1 + kConstants) * apart + 3 * c);  // sums: [parts][4][apart]
  double* centres = memory + 4 * parts * apart;  // [apart], double or float
  acc_t<T>* constants = reinterpret_cast<acc_t<T>*>(centres + apart);  // [kConstants][apart]
  Total* totals = reinterpret_cast<Total*>(centres + (1 + kConstants) * apart);  // [c]

  // f(part, first unit, end).
  template <class F> void each_chunk(bool backwards, F&& f) const {
    const int64_t bytes = columns * static_cast<int64_t>(sizeof(T)) * kSumRows,
                  chunk = larger(1, kChunkBytes / bytes) * kSumRows;
    parallel_for(parts, 1, [&](int64_t from, int64_t to) {
      for (int64_t part = from; part < to; ++part) {
        const int64_t begin = layout.units * part / parts, end = layout.units * (part + 1) / parts;
        const int64_t chunks = (end - begin + chunk - 1) / chunk;
        for (int64_t i = 0; i < chunks; ++i) {
          const int64_t first = begin + (backwards ? chunks - 1 - i : i) * chunk;
          f(part, first, smaller(first + chunk, end));
        }
      }
      fence();
    });
  }
  template <template <int> class Sums> void start_sums() {
    using Centre = typename Sums<1>::Centre;
    Centre* to = reinterpret_cast<Centre*>(centres);
    for (int64_t j = 0; j < columns; ++j) to[j] = j < c ? static_cast<Centre>(job.centre(j)) : to[j - c];
    for (int64_t j = columns; j < apart; ++j) to[j] = 0;
    std::memset(memory, 0, sizeof(double) * static_cast<size_t>(4 * parts * apart));
  }
  template <template <int> class Sums> void sum(int64_t part, int64_t begin, int64_t end) const {
    using Centre = typename Sums<1>::Centre;
    layout.template sum<Sums, T>(job, begin, end, reinterpret_cast<const Centre*>(centres), memory + 4 * part * apart,
                                 apart);
  }
  template <template <int> class Sums> Total total(int64_t channel) const {
    CompensatedSum<double> sums[2];
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t j = channel; j < columns; j += c)
        for (int i = 0; i < 2; ++i) {
          const double* p = memory + (4 * part + i) * apart + j;
          sums[i] += p[0];
          sums[i].lost += p[2 * apart];
        }
    const auto centre = reinterpret_cast<const typename Sums<1>::Centre*>(centres)[channel];
    return {static_cast<double>(centre), sums[0].total(), sums[1].total()};
  }
  void set_constants() {
    for (int64_t j = 0; j < columns; ++j) {
      acc_t<T> k[kConstants] = {};
      if (j < c) job.constants(j, totals[j], k);
      for (int m = 0; m < kConstants; ++m) constants[m * apart + j] = j < c ? k[m] : constants[m * apart + j - c];
    }
  }
  template <template <int> class Sums> void sum_all() {
    start_sums<Sums>();
    each_chunk(false, [&](int64_t part, int64_t begin, int64_t end) { sum<Sums>(part, begin, end); });
  }
  void apply(int64_t begin, int64_t end) const { layout.template apply<T>(job, begin, end, constants, apart, past); }

  template <template <int> class Sums, template <int> class Again> void run() {
    for (int64_t i = 0; i < c; ++i) totals[i] = Total{};
    if (!job.summed) {
      set_constants();
      each_chunk(false, [&](int64_t, int64_t begin, int64_t end) { apply(begin, end); });
    } else if (job.apply_waits) {
      sum_all<Sums>();
      bool good = true;
      for (int64_t i = 0; i < c; ++i) {
        totals[i] = total<Sums>(i);
        good = good && job.good(totals[i]);
      }
      if (!good) {
        sum_all<Again>();
        for (int64_t i = 0; i < c; ++i)
          if (!job.good(totals[i])) totals[i] = total<Again>(i);
      }
      for (int64_t i = 0; i < c; ++i) job.results(i, totals[i]);
      set_constants();
      each_chunk(true, [&](int64_t, int64_t begin, int64_t end) { apply(begin, end); });
    } else {
      start_sums<Sums>();
      set_constants();
      each_chunk(false, [&](int64_t part, int64_t begin, int64_t end) {
        sum<Sums>(part, begin, end);
        apply(begin, end);
      });
      for (int64_t i = 0; i < c; ++i) job.results(i, total<Sums>(i));
    }
  }
};
template <class T, class Layout, class Job> void in_parts(const Layout& layout, const Job& job, int64_t parts) {
  Parts<T, Layout, Job> cut{layout, job, smaller(parts, layout.units)};
  if (job.few())
    cut.template run<Job::template Again, Job::template Again>();
  else
    cut.template run<Job::template Sums, Job::template Again>();
}

template <class T, class Job> void run(const NormShape& s, const Job& job) {
  const int64_t threads = num_threads(), parts = smaller(threads, s.n * s.c * s.inner / kGrain + 1);
  if (s.channels_last)
    in_parts<T>(Rows(s), job, parts);
  else if (!job.apply_waits && (s.inner >= kLargePlane || !job.summed) && s.n * s.c >= 4 * threads)
    planes_in_order<T>(s, job);
  else if (s.c >= 4 * threads || s.c % threads == 0 || parts == 1)
    whole_channels<T>(s, job);
  else
    in_parts<T>(CutPlanes(s), job, parts);
}

}  // namespace

#define DLKERN_DEFINE_BATCH_NORM(T)                                                                  \
  void batch_norm_forward(const BatchNormArgs<T>& args) { run<T>(args.shape, ForwardJob<T>{args}); } \
  void batch_norm_backward(const BatchNormBackwardArgs<T>& args) {                                   \
    if (args.train)                                                                                  \
      run<T>(args.shape, BackwardJob<T, true>{args});                                                \
    else                                                                                             \
      run<T>(args.shape, BackwardJob<T, false>{args});                                               \
  }
DLKERN_DEFINE_BATCH_NORM(float)
DLKERN_DEFINE_BATCH_NORM(double)
DLKERN_DEFINE_BATCH_NORM(bfloat16)
DLKERN_DEFINE_BATCH_NORM(float16)

}  // namespace dlkern::cpu::DLKERN_ISA

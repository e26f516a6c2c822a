// The two sums of a channel that batch norm needs, over memory: of p and of p q, where forward p = q = x - s, s near the
// channel's mean, and backward p = g, the gradient before the activation, and q = x - mean.
// Three kinds: WideSums adds doubles; ShortSums, for 16-bit types, adds at most kShort floats a lane before it widens them,
// which costs a third of that (float32 inputs need doubles from the first difference on: all elements of a binade lie
// on one grid, so x - s rounds to the same side for all of them); ExactSums carries the rounding errors of doubles along
// (CompensatedSum), for float64.
#pragma once
#include "activation.h"
#include "simd.h"

// Sums must live in registers, so what touches them is never a call.
#define DLKERN_INLINE __attribute__((always_inline))

namespace dlkern::cpu::DLKERN_ISA {

constexpr int kShort = 8;
constexpr int kSumRows = 8;  // rows of channels read side by side
constexpr int64_t kShortPiece = 4096;  // bytes

template <class V> inline V load_as(const void* at) {
  V v;
  std::memcpy(&v, at, sizeof v);
  return v;
}

// What each kind has: `unroll` pairs of sums, which need not wait for one another. read() takes kStep elements of T;
// add() their p and q; flush() ends a block of at most kBlock additions a pair; first() and second() are the totals.
// In rows of channels a lane is a column, and open() and close() move the sums of unroll * kStep columns from and to
// [4][stride] doubles.
template <int unroll> struct ShortSums {
  using Vector = vfloat;
  using Centre = float;
  static constexpr int kStep = kLanes<float>, kBlock = kShort;
  static constexpr bool kExact = false;
  vfloat p[unroll]{}, pq[unroll]{};
  vdouble wide[4]{};  // low and high half of the sums of p, and of p q
  template <class T> DLKERN_INLINE static Vector read(const T* at) { return load(at); }
  template <class T> DLKERN_INLINE static Vector read(const T* at, int lanes) { return load_partial<T>(at, lanes); }
  DLKERN_INLINE void add(int u, Vector a, Vector b) {
    p[u] += a;
    pq[u] += a * b;
  }
  DLKERN_INLINE void flush() {
#pragma GCC unroll 8
    for (int half = unroll / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) {
        p[i] += p[i + half];
        pq[i] += pq[i + half];
      }
    wide[0] += widen(low_half(p[0]));
    wide[1] += widen(high_half(p[0]));
    wide[2] += widen(low_half(pq[0]));
    wide[3] += widen(high_half(pq[0]));
#pragma GCC unroll 8
    for (int u = 0; u < unroll; ++u) p[u] = pq[u] = Vector{};
  }
  double first() const { return reduce_add(wide[0] + wide[1]); }
  double second() const { return reduce_add(wide[2] + wide[3]); }
  DLKERN_INLINE void open(const double*, int64_t) {}
  DLKERN_INLINE void close(double* at, int64_t stride) {
#pragma GCC unroll 8
    for (int u = 0; u < unroll; ++u)
#pragma GCC unroll 8
      for (int i = 0; i < 4; ++i) {
        double* to = at + i / 2 * stride + u * kStep + i % 2 * kLanes<double>;
        const Vector v = i / 2 ? pq[u] : p[u];
        store(to, load(to) + widen(i % 2 ? high_half(v) : low_half(v)));
      }
  }
};

template <int unroll> struct WideSums {
  using Vector = vdouble;
  using Centre = double;
  static constexpr int kStep = kLanes<double>, kBlock = 1 << 30;
  static constexpr bool kExact = false;
  vdouble p[unroll]{}, pq[unroll]{};
  template <class T> DLKERN_INLINE static Vector read(const T* at) { return load_wide(at); }
  template <class T> DLKERN_INLINE static Vector read(const T* at, int lanes) {
    return load_wide_partial<T>(at, lanes);
  }
  DLKERN_INLINE void add(int u, Vector a, Vector b) {
    p[u] += a;
    pq[u] += a * b;
  }
  DLKERN_INLINE void flush() {}
  static vdouble total(const vdouble (&sums)[unroll]) {
    vdouble all = sums[0];
#pragma GCC unroll 8
    for (int u = 1; u < unroll; ++u) all += sums[u];
    return all;
  }
  double first() const { return reduce_add(total(p)); }
  double second() const { return reduce_add(total(pq)); }
  DLKERN_INLINE void open(const double*, int64_t) {}
  DLKERN_INLINE void close(double* at, int64_t stride) {
#pragma GCC unroll 8
    for (int u = 0; u < unroll; ++u) {
      double *first = at + u * kStep, *second = first + stride;
      store(first, load(first) + p[u]);
      store(second, load(second) + pq[u]);
    }
  }
};

template <int unroll> struct ExactSums {
  using Vector = vdouble;
  using Centre = double;
  static constexpr int kStep = kLanes<double>, kBlock = 1 << 30;
  static constexpr bool kExact = true;
  CompensatedSum<vdouble> p[unroll], pq[unroll];
  DLKERN_INLINE static Vector read(const double* at) { return load(at); }
  DLKERN_INLINE static Vector read(const double* at, int lanes) { return load_partial<double>(at, lanes); }
  DLKERN_INLINE void add(int u, Vector a, Vector b) {
    p[u] += a;
    pq[u] += a * b;
  }
  // q = x - centre rounded: what product and difference lost is added too.
  DLKERN_INLINE void add_difference(int u, Vector a, Vector x, Vector centre) {
    const vdouble q = x - centre, product = a * q, back = q - x, lost = (x - (q - back)) - (centre + back);
    add(u, a, q);
    for (int i = 0; i < kStep; ++i) pq[u].lost[i] += std::fma(a[i], q[i], -product[i]) + a[i] * lost[i];
  }
  DLKERN_INLINE void flush() {}
  static double total(const CompensatedSum<vdouble> (&sums)[unroll]) {
    vdouble all = sums[0].total();
#pragma GCC unroll 8
    for (int u = 1; u < unroll; ++u) all += sums[u].total();
    return reduce_add(all);
  }
  double first() const { return total(p); }
  double second() const { return total(pq); }
  DLKERN_INLINE void open(const double* at, int64_t stride) {
    for (int u = 0; u < unroll; ++u, at += kStep) {
      p[u] = {load(at), load(at + 2 * stride)};
      pq[u] = {load(at + stride), load(at + 3 * stride)};
    }
  }
  DLKERN_INLINE void close(double* at, int64_t stride) {
    for (int u = 0; u < unroll; ++u, at += kStep) {
      store(at, p[u].value);
      store(at + stride, pq[u].value);
      store(at + 2 * stride, p[u].lost);
      store(at + 3 * stride, pq[u].lost);
    }
  }
};

template <class T, int count> struct Streams {
  const T* at[count];
};

// p = q = x - centre.
struct Deviation {
  static constexpr int kStreams = 1;
  template <class Sums, class V> DLKERN_INLINE static void add(Sums& sums, int u, const V (&v)[1], V centre) {
    const V d = v[0] - centre;
    sums.add(u, d, d);
  }
  template <class V> static void leave_out(V (&v)[1], V centre, int lanes) {
    V number;
#pragma GCC unroll 8
    for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(centre[0])); ++i) number[i] = i;
    v[0] = number < static_cast<decltype(V{}[0] + 0)>(lanes) ? v[0] : centre;
  }
};
// p = g, q = x - mean; the streams are grad_output, input, output.
template <int activation> struct Gradient {
  static constexpr int kStreams = activation == kNone ? 2 : 3;
  template <class Sums, class V> DLKERN_INLINE static void add(Sums& sums, int u, const V (&v)[kStreams], V mean) {
    const V g = activation_backward(v[0], v[kStreams - 1], activation);
    if constexpr (Sums::kExact)
      sums.add_difference(u, g, v[1], mean);
    else
      sums.add(u, g, v[1] - mean);
  }
  template <class V> static void leave_out(V (&)[kStreams], V, int) {}  // a gradient of zero adds nothing
};

// Adds `segments` pieces of one channel, `length` elements each, the first at element `begin`, `apart` elements apart.
template <class Rule, class Sums, class T>
inline void sum_segments(const Streams<T, Rule::kStreams>& shared, int64_t begin, int64_t segments, int64_t apart,
                         int64_t length, typename Sums::Centre centre, Sums& out) {
  using V = typename Sums::Vector;
  constexpr int step = Sums::kStep;
  const Streams<T, Rule::kStreams> streams = shared;
  const V c = V{} + centre;
  Sums sums = out;
  int64_t left = Sums::kBlock;  // additions until the sums must be flushed
  // Of short pieces far apart the next one is fetched: no prefetcher follows them.
  const int64_t ahead = segments > 1 && length * static_cast<int64_t>(sizeof(T)) <= kShortPiece ? apart : 0;
  auto add = [&](int64_t i, int u, auto&& read) DLKERN_INLINE {
    V v[Rule::kStreams];
#pragma GCC unroll 8
    for (int k = 0; k < Rule::kStreams; ++k) v[k] = read(streams.at[k] + i);
    Rule::add(sums, u, v, c);
  };
  const auto read = [](const T* at) DLKERN_INLINE { return Sums::read(at); };
  for (int64_t s = 0; s < segments; ++s, begin += apart) {
    int64_t i = begin;
    const int64_t end = begin + length;
    for (;;) {
      int64_t groups = smaller((end - i) / (4 * step), left);
      left -= groups;
      for (; groups > 0; --groups, i += 4 * step) {
        if (ahead)
#pragma GCC unroll 8
          for (int k = 0; k < Rule::kStreams; ++k) __builtin_prefetch(streams.at[k] + i + ahead);
#pragma GCC unroll 8
        for (int u = 0; u < 4; ++u)
          if constexpr (kEvenOdd<T> && std::is_same_v<V, vfloat>)
            add(i + u / 2 * 2 * step, u,
                [u](const T* at) DLKERN_INLINE { return u % 2 ? load_odd(at) : load_even(at); });
          else
            add(i + u * step, u, read);
      }
      if (left == 0) {
        sums.flush();
        left = Sums::kBlock;
      }
      if (end - i < 4 * step) break;
    }
    if (i == end) continue;
    --left;
    for (int u = 0; u < 3 && i + step <= end; ++u, i += step) add(i, u, read);
    if (i < end) {
      V v[Rule::kStreams];
      const int lanes = static_cast<int>(end - i);
#pragma GCC unroll 8
      for (int k = 0; k < Rule::kStreams; ++k) v[k] = Sums::read(streams.at[k] + i, lanes);
      Rule::leave_out(v, c, lanes);
      Rule::add(sums, 3, v, c);
    }
    if (left == 0) {
      sums.flush();
      left = Sums::kBlock;
    }
  }
  sums.flush();
  out = sums;
}

// Adds `rows` rows of `width` columns that start at element `begin`, `stride` elements apart, to the columns' sums.
// At most kSumRows.
template <class Rule, template <int> class Sums, class T>
inline void sum_row_block(const Streams<T, Rule::kStreams>& shared, int64_t begin, int64_t rows, int64_t stride,
                          int64_t width, const typename Sums<1>::Centre* centre, double* memory, int64_t arrays_apart) {
  using V = typename Sums<1>::Vector;
  constexpr int step = Sums<1>::kStep, tile = kVectorBytes == 64 ? 64 / step : 4;
  const Streams<T, Rule::kStreams> streams = shared;
  auto columns = [&]<int vectors>(int64_t j, auto&& read, int lanes) DLKERN_INLINE {
    Sums<vectors> sums;
    sums.open(memory + j, arrays_apart);
    V c[vectors];
#pragma GCC unroll 8
    for (int u = 0; u < vectors; ++u) c[u] = load_as<V>(centre + j + u * step);
    for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int k = 0; k < Rule::kStreams; ++k) __builtin_prefetch(streams.at[k] + begin + (r + rows) * stride + j);
#pragma GCC unroll 8
      for (int u = 0; u < vectors; ++u) {
        V v[Rule::kStreams];
#pragma GCC unroll 8
        for (int k = 0; k < Rule::kStreams; ++k) v[k] = read(streams.at[k] + begin + r * stride + j + u * step);
        if (lanes < step) Rule::leave_out(v, c[u], lanes);
        Rule::add(sums, u, v, c[u]);
      }
    }
    sums.close(memory + j, arrays_apart);
  };
  auto whole = [](const T* at) { return Sums<1>::read(at); };
  int64_t j = 0;
  for (; j + tile * step <= width; j += tile * step) columns.template operator()<tile>(j, whole, step);
  for (; j + step <= width; j += step) columns.template operator()<1>(j, whole, step);
  if (j < width) {
    const int lanes = static_cast<int>(width - j);
    columns.template operator()<1>(j, [lanes](const T* at) { return Sums<1>::read(at, lanes); }, lanes);
  }
}

}  // namespace dlkern::cpu::DLKERN_ISA

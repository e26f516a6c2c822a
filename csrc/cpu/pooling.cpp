// Max, average and adaptive average pooling over [n, c, h, w], forward and backward.
// Forwards take a vector of windows at a time: neighbours in a row of a plane, or the channels of a pixel.
// Backwards of float and double add the windows of a plane one after the other, a plane a thread; those of bfloat16
// gather, each element of grad_input summing in float the windows it lies in. Both orders are fixed.
// Floors: forward one read and one write; backward the gradient, the indices (a byte a window) and one write.
#include "pooling.h"

#include "parallel.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Steps between neighbours along each dimension.
struct Steps {
  int64_t n, c, y, x;
  Steps(int64_t channels, int64_t h, int64_t w, bool channels_last)
      : n(channels * h * w), c(channels_last ? 1 : h * w), y(channels_last ? w * channels : w), x(channels_last ? channels : 1) {}
};

// Runs f(image, channel, y) over all planes' rows.
template <class F> inline void for_each_row(const PoolShape& s, int64_t rows, int64_t work, F&& f) {
  parallel_for(s.n * s.c * rows, larger(1, 8192 / larger(work, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / rows / s.c, i / rows % s.c, i % rows);
  });
}

// First and last + 1 of the kernel's taps that fall inside [0, size) for a window that starts at `start`.
struct Taps {
  int64_t begin, end;
  Taps(int64_t start, int64_t size, int64_t kernel, int64_t dilation)
      : begin(start >= 0 ? 0 : ceil_div(-start, dilation)),
        end(start >= size ? 0 : smaller(kernel, ceil_div(size - start, dilation))) {}
  bool empty() const { return begin >= end; }  // a dilated window in ceil_mode can miss a small input
};

// Which lanes of `value` win over `best`: larger, or NaN (so that the last NaN of a window is kept).
template <class V> inline auto wins(V value, V best) { return (value > best) | (value != value); }

// The integer vector beside Vec<T> that carries which tap won.
template <class T> struct tag_of { using type = vint32; };
template <> struct tag_of<double> { using type = vint64; };
template <class T> using Tag = typename tag_of<T>::type;

// One window in plain code: any stride, dilation and border. Returns the tap that won, r * kernel_w + s.
template <class T> inline int64_t max_window(const PoolShape& s, const T* x, const Steps& in, int64_t y0, int64_t x0, acc_t<T>& best) {
  const Taps rows(y0, s.h, s.kernel_h, s.dilation_h), columns(x0, s.w, s.kernel_w, s.dilation_w);
  int64_t winner = rows.begin * s.kernel_w + columns.begin;
  best = -static_cast<acc_t<T>>(__builtin_inf());
  if (rows.empty() || columns.empty()) return winner;
  best = static_cast<acc_t<T>>(x[(y0 + rows.begin * s.dilation_h) * in.y + (x0 + columns.begin * s.dilation_w) * in.x]);
  for (int64_t r = rows.begin; r < rows.end; ++r)
    for (int64_t t = columns.begin; t < columns.end; ++t) {
      const acc_t<T> value = static_cast<acc_t<T>>(x[(y0 + r * s.dilation_h) * in.y + (x0 + t * s.dilation_w) * in.x]);
      if (value > best || value != value) {
        best = value;
        winner = r * s.kernel_w + t;
      }
    }
  return winner;
}

template <class T> inline void put_index(const MaxPoolArgs<T>& args, int64_t at, int64_t winner, int64_t y0, int64_t x0) {
  const PoolShape& s = args.shape;
  if (args.kind == IndexKind::offset8)
    static_cast<uint8_t*>(args.indices)[at] = static_cast<uint8_t>(winner);
  else if (args.kind == IndexKind::flat64)
    static_cast<int64_t*>(args.indices)[at] =
        (y0 + winner / s.kernel_w * s.dilation_h) * s.w + x0 + winner % s.kernel_w * s.dilation_w;
}

// Every `stride`-th of the elements from p on, in a vector; stride is 1 or 2, and 2 reads one element further.
template <class T, int stride> inline Vec<T> load_strided(const T* p) {
  if constexpr (stride == 1) return load(p);
  const Vec<T> a = load(p), b = load(p + kLanes<T>);
  Tag<T> even;
  for (int i = 0; i < kLanes<T>; ++i) even[i] = 2 * i;
  return __builtin_shuffle(a, b, even);
}
// Windows [begin, end) of a row whose taps, `stride` apart from window to window, all lie inside the row, cut so that
// whole vectors can be loaded.
struct Interior {
  int64_t begin, end;
  Interior(const PoolShape& s, int64_t lanes) {
    begin = smaller(s.out_w, ceil_div(s.pad_w, s.stride_w));
    // The last element read for the vector that starts at window q: q stride - pad + reach.
    const int64_t reach = (s.kernel_w - 1) * s.dilation_w + s.stride_w * lanes - 1;
    const int64_t room = s.w - 1 + s.pad_w - reach;
    const int64_t starts = room < 0 ? 0 : room / s.stride_w + 1;  // q may be below this
    end = begin;
    while (end < starts && end + lanes <= s.out_w) end += lanes;
  }
};

// One vector of windows of a row of planes; `taps` are the rows inside the input.
template <class T, int stride>
inline void max_vector(const MaxPoolArgs<T>& args, const T* x, const Taps& rows, int64_t y0, int64_t x0, int64_t at) {
  const PoolShape& s = args.shape;
  Vec<T> best = load_strided<T, stride>(x + (y0 + rows.begin * s.dilation_h) * s.w + x0);
  Tag<T> winner = Tag<T>{} + static_cast<int>(rows.begin * s.kernel_w);
  for (int64_t r = rows.begin; r < rows.end; ++r)
    for (int64_t t = 0; t < s.kernel_w; ++t) {
      const Vec<T> value = load_strided<T, stride>(x + (y0 + r * s.dilation_h) * s.w + x0 + t * s.dilation_w);
      const auto won = wins(value, best);
      best = won ? value : best;
      winner = won ? Tag<T>{} + static_cast<int>(r * s.kernel_w + t) : winner;
    }
  store(args.output + at, best);
  if (args.kind == IndexKind::none) return;
  if (args.kind == IndexKind::offset8) {
    for (int i = 0; i < kLanes<T>; ++i) static_cast<uint8_t*>(args.indices)[at + i] = static_cast<uint8_t>(winner[i]);
    return;
  }
  for (int i = 0; i < kLanes<T>; ++i) put_index(args, at + i, winner[i], y0, x0 + i * stride);
}

template <class T> void max_forward_planes(const MaxPoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, false);
  const Interior interior(s, kLanes<T>);
  const bool vectors = s.stride_w <= 2;
  for_each_row(s, s.out_h, s.out_w * s.kernel_h * s.kernel_w / 4, [&](int64_t n, int64_t c, int64_t p) {
    const T* x = args.input + n * in.n + c * in.c;
    const int64_t row = ((n * s.c + c) * s.out_h + p) * s.out_w, y0 = p * s.stride_h - s.pad_h;
    const Taps rows(y0, s.h, s.kernel_h, s.dilation_h);
    for (int64_t q = 0; q < s.out_w;) {
      const int64_t x0 = q * s.stride_w - s.pad_w;
      if (vectors && !rows.empty() && q >= interior.begin && q < interior.end) {
        s.stride_w == 1 ? max_vector<T, 1>(args, x, rows, y0, x0, row + q) : max_vector<T, 2>(args, x, rows, y0, x0, row + q);
        q += kLanes<T>;
        continue;
      }
      acc_t<T> best;
      const int64_t winner = max_window(s, x, in, y0, x0, best);
      args.output[row + q] = static_cast<T>(best);
      put_index(args, row + q, winner, y0, x0);
      ++q;
    }
  });
}

template <class T> void max_forward_rows(const MaxPoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, true);
  parallel_for(s.n * s.out_h, larger(1, 8192 / (s.out_w * s.c)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / s.out_h, p = i % s.out_h, y0 = p * s.stride_h - s.pad_h;
      const T* x = args.input + n * in.n;
      const Taps rows(y0, s.h, s.kernel_h, s.dilation_h);
      for (int64_t q = 0; q < s.out_w; ++q) {
        const int64_t x0 = q * s.stride_w - s.pad_w, at = (i * s.out_w + q) * s.c;
        const Taps columns(x0, s.w, s.kernel_w, s.dilation_w);
        int64_t c = 0;
        for (; c + kLanes<T> <= s.c && !rows.empty() && !columns.empty(); c += kLanes<T>) {
          const T* first = x + y0 * in.y + x0 * in.x + c;
          Vec<T> best = load(first + rows.begin * s.dilation_h * in.y + columns.begin * s.dilation_w * in.x);
          Tag<T> winner = Tag<T>{} + static_cast<int>(rows.begin * s.kernel_w + columns.begin);
          for (int64_t r = rows.begin; r < rows.end; ++r)
            for (int64_t t = columns.begin; t < columns.end; ++t) {
              const Vec<T> value = load(first + r * s.dilation_h * in.y + t * s.dilation_w * in.x);
              const auto won = wins(value, best);
              best = won ? value : best;
              winner = won ? Tag<T>{} + static_cast<int>(r * s.kernel_w + t) : winner;
            }
          store(args.output + at + c, best);
          if (args.kind != IndexKind::none)
            for (int l = 0; l < kLanes<T>; ++l) put_index(args, at + c + l, winner[l], y0, x0);
        }
        for (; c < s.c; ++c) {
          acc_t<T> best;
          const int64_t winner = max_window(s, x + c, in, y0, x0, best);
          args.output[at + c] = static_cast<T>(best);
          put_index(args, at + c, winner, y0, x0);
        }
      }
    }
  });
}

// float and double: a thread zeroes its planes and adds each window's gradient where the winner was, windows in order.
template <class T, class Index> void max_backward_scatter(const MaxPoolBackwardArgs<T>& args) {
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, s.channels_last), out(s.c, s.out_h, s.out_w, s.channels_last);
  const Index* indices = static_cast<const Index*>(args.indices);
  const bool offsets = args.kind == IndexKind::offset8;
  const int64_t group = s.channels_last ? smaller(s.c, 64) : 1, groups = ceil_div(s.c, group);
  int64_t where[256];  // of each tap, relative to the window's first
  if (offsets)
    for (int64_t k = 0; k < 256; ++k)
      where[k] = k / s.kernel_w * s.dilation_h * in.y + k % s.kernel_w * s.dilation_w * in.x;
  const int64_t plane = s.h * s.w;
  parallel_for(s.n * groups, larger(1, 8192 / (group * plane)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / groups, c0 = i % groups * group, channels = smaller(group, s.c - c0);
      T* dx = args.grad_input + n * in.n + c0 * in.c;
      for (int64_t k = 0; k < plane; ++k) std::memset(static_cast<void*>(dx + k * in.x), 0, sizeof(T) * static_cast<size_t>(channels));
      for (int64_t p = 0; p < s.out_h; ++p)
        for (int64_t q = 0; q < s.out_w; ++q) {
          const int64_t o = n * out.n + c0 * out.c + p * out.y + q * out.x, y0 = p * s.stride_h - s.pad_h, x0 = q * s.stride_w - s.pad_w;
          const int64_t base = y0 * in.y + x0 * in.x;
          // A window inside the input needs no more than that its index is one of its taps.
          const bool inside = offsets && y0 >= 0 && x0 >= 0 && y0 + (s.kernel_h - 1) * s.dilation_h < s.h && x0 + (s.kernel_w - 1) * s.dilation_w < s.w;
          if (inside) {
            for (int64_t c = 0; c < channels; ++c)
              if (static_cast<int64_t>(indices[o + c]) < s.kernel_h * s.kernel_w)
                dx[base + where[static_cast<int64_t>(indices[o + c]) & 255] + c] += args.grad_output[o + c];
            continue;
          }
          for (int64_t c = 0; c < channels; ++c) {
            const int64_t index = static_cast<int64_t>(indices[o + c]);
            const int64_t y = offsets ? y0 + index / s.kernel_w * s.dilation_h : index / s.w;
            const int64_t x = offsets ? x0 + index % s.kernel_w * s.dilation_w : index % s.w;
            if (offsets ? index >= s.kernel_h * s.kernel_w : index < 0 || index >= plane) continue;
            if (y < 0 || y >= s.h || x < 0 || x >= s.w) continue;  // not an index this op made
            dx[(offsets ? base + where[index] : y * in.y + x * in.x) + c] += args.grad_output[o + c];
          }
        }
    }
  });
}

template <class T, class Index> void max_backward(const MaxPoolBackwardArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, s.channels_last), out(s.c, s.out_h, s.out_w, s.channels_last);
  const Index* indices = static_cast<const Index*>(args.indices);
  const bool offsets = args.kind == IndexKind::offset8;
  for_each_row(s, s.h, s.w * s.kernel_h * s.kernel_w, [&](int64_t n, int64_t c, int64_t y) {
    for (int64_t x = 0; x < s.w; ++x) {
      A sum = 0;
      const int64_t last_r = smaller(s.kernel_h - 1, (y + s.pad_h) / s.dilation_h);
      const int64_t last_t = smaller(s.kernel_w - 1, (x + s.pad_w) / s.dilation_w);
      for (int64_t r = last_r; r >= 0; --r) {
        const int64_t py = y + s.pad_h - r * s.dilation_h;
        if (py % s.stride_h || py / s.stride_h >= s.out_h) continue;
        for (int64_t t = last_t; t >= 0; --t) {
          const int64_t px = x + s.pad_w - t * s.dilation_w;
          if (px % s.stride_w || px / s.stride_w >= s.out_w) continue;
          const int64_t o = n * out.n + c * out.c + py / s.stride_h * out.y + px / s.stride_w * out.x;
          if (static_cast<int64_t>(indices[o]) == (offsets ? r * s.kernel_w + t : y * s.w + x))
            sum += static_cast<A>(args.grad_output[o]);
        }
      }
      args.grad_input[n * in.n + c * in.c + y * in.y + x * in.x] = static_cast<T>(sum);
    }
  });
}

// First and last + 1 element of window p inside the input along one dimension, and what it counts for with padding.
struct Span {
  int64_t begin, end, padded;
  Span(int64_t p, int64_t size, int64_t kernel, int64_t stride, int64_t pad) {
    const int64_t start = p * stride - pad, stop = smaller(start + kernel, size + pad);
    padded = stop - start;
    begin = larger(start, 0);
    end = smaller(stop, size);
  }
};

template <class T> inline acc_t<T> divisor_of(const AvgPoolArgs<T>& args, const Span& y, const Span& x) {
  if (args.divisor != 0) return static_cast<acc_t<T>>(args.divisor);
  if (args.count_include_pad) return static_cast<acc_t<T>>(y.padded * x.padded);
  return static_cast<acc_t<T>>((y.end - y.begin) * (x.end - x.begin));
}

template <class T, int stride>
inline void avg_vector(const AvgPoolArgs<T>& args, const T* x, const Span& rows, int64_t x0, acc_t<T> divisor, int64_t at) {
  Vec<T> sum{};
  for (int64_t y = rows.begin; y < rows.end; ++y)
    for (int64_t t = 0; t < args.shape.kernel_w; ++t) sum += load_strided<T, stride>(x + y * args.shape.w + x0 + t);
  store(args.output + at, sum / divisor);
}

template <class T> void avg_forward(const AvgPoolArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, s.channels_last), out(s.c, s.out_h, s.out_w, s.channels_last);
  const Interior interior(s, kLanes<T>);
  const int64_t planes = s.channels_last ? 1 : s.c;  // a row of windows is one channel's, or all channels'
  parallel_for(s.n * planes * s.out_h, larger(1, 8192 / (s.out_w * s.kernel_h * s.kernel_w * (s.c / planes))),
               [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i % s.out_h, c0 = i / s.out_h % planes, n = i / s.out_h / planes;
      const T* x = args.input + n * in.n + c0 * in.c;
      const Span rows(p, s.h, s.kernel_h, s.stride_h, s.pad_h);
      for (int64_t q = 0; q < s.out_w;) {
        const Span columns(q, s.w, s.kernel_w, s.stride_w, s.pad_w);
        const bool empty = rows.begin >= rows.end || columns.begin >= columns.end;
        const A divisor = empty ? A(1) : divisor_of(args, rows, columns);
        const int64_t o = n * out.n + c0 * out.c + p * out.y + q * out.x;
        if (!s.channels_last && s.stride_w <= 2 && q >= interior.begin && q < interior.end) {
          const int64_t x0 = q * s.stride_w - s.pad_w;
          s.stride_w == 1 ? avg_vector<T, 1>(args, x, rows, x0, divisor, o) : avg_vector<T, 2>(args, x, rows, x0, divisor, o);
          q += kLanes<T>;
          continue;
        }
        int64_t c = 0;
        const int64_t channels = s.channels_last ? s.c : 1;
        for (; c + kLanes<T> <= channels; c += kLanes<T>) {
          Vec<T> sum{};
          for (int64_t iy = rows.begin; iy < rows.end; ++iy)
            for (int64_t ix = columns.begin; ix < columns.end; ++ix) sum += load(x + iy * in.y + ix * in.x + c);
          store(args.output + o + c, sum / divisor);
        }
        for (; c < channels; ++c) {
          A sum = 0;
          for (int64_t iy = rows.begin; iy < rows.end; ++iy)
            for (int64_t ix = columns.begin; ix < columns.end; ++ix) sum += static_cast<A>(x[iy * in.y + ix * in.x + c]);
          args.output[o + c] = static_cast<T>(sum / divisor);
        }
        ++q;
      }
    }
  });
}

// float and double: a thread zeroes its planes and adds each window's share to its elements, windows in order.
template <class T> void avg_backward_scatter(const AvgPoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, s.channels_last), out(s.c, s.out_h, s.out_w, s.channels_last);
  const int64_t group = s.channels_last ? smaller(s.c, 64) : 1, groups = ceil_div(s.c, group), plane = s.h * s.w;
  parallel_for(s.n * groups, larger(1, 8192 / (group * plane)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / groups, c0 = i % groups * group, channels = smaller(group, s.c - c0);
      const T* grad = args.input + n * out.n + c0 * out.c;
      T* dx = args.output + n * in.n + c0 * in.c;
      for (int64_t k = 0; k < plane; ++k) std::memset(static_cast<void*>(dx + k * in.x), 0, sizeof(T) * static_cast<size_t>(channels));
      for (int64_t p = 0; p < s.out_h; ++p) {
        const Span rows(p, s.h, s.kernel_h, s.stride_h, s.pad_h);
        for (int64_t q = 0; q < s.out_w; ++q) {
          const Span columns(q, s.w, s.kernel_w, s.stride_w, s.pad_w);
          if (rows.begin >= rows.end || columns.begin >= columns.end) continue;
          const T divisor = divisor_of(args, rows, columns);
          const T* g = grad + p * out.y + q * out.x;
          for (int64_t y = rows.begin; y < rows.end; ++y)
            for (int64_t x = columns.begin; x < columns.end; ++x) {
              T* to = dx + y * in.y + x * in.x;
              for (int64_t c = 0; c < channels; ++c) to[c] += g[c] / divisor;
            }
        }
      }
    }
  });
}

template <class T> void avg_backward(const AvgPoolArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, s.channels_last), out(s.c, s.out_h, s.out_w, s.channels_last);
  for_each_row(s, s.h, s.w * 4, [&](int64_t n, int64_t c, int64_t y) {
    const T* grad = args.input + n * out.n + c * out.c;
    const int64_t first_p = larger(0, y + s.pad_h < s.kernel_h ? 0 : (y + s.pad_h - s.kernel_h) / s.stride_h + 1);
    const int64_t last_p = smaller(s.out_h - 1, (y + s.pad_h) / s.stride_h);
    for (int64_t x = 0; x < s.w; ++x) {
      const int64_t first_q = larger(0, x + s.pad_w < s.kernel_w ? 0 : (x + s.pad_w - s.kernel_w) / s.stride_w + 1);
      const int64_t last_q = smaller(s.out_w - 1, (x + s.pad_w) / s.stride_w);
      A sum = 0;
      for (int64_t p = first_p; p <= last_p; ++p) {
        const Span rows(p, s.h, s.kernel_h, s.stride_h, s.pad_h);
        for (int64_t q = first_q; q <= last_q; ++q) {
          const Span columns(q, s.w, s.kernel_w, s.stride_w, s.pad_w);
          sum += static_cast<A>(grad[p * out.y + q * out.x]) / divisor_of(args, rows, columns);
        }
      }
      args.output[n * in.n + c * in.c + y * in.y + x * in.x] = static_cast<T>(sum);
    }
  });
}

inline int64_t adaptive_begin(int64_t i, int64_t size, int64_t out_size) { return i * size / out_size; }
inline int64_t adaptive_end(int64_t i, int64_t size, int64_t out_size) { return ceil_div((i + 1) * size, out_size); }

// Sum of `count` consecutive elements, in double; those of float64 inputs carry their rounding errors along (Knuth's
// two-sum), since there is no wider type.
struct CarefulSum {
  double value = 0, lost = 0;
  void operator+=(double x) {
    const double next = value + x, added = next - value;
    lost += (value - (next - added)) + (x - added);
    value = next;
  }
  double total() const { return lost - lost == 0.0 ? value + lost : value; }
};
template <class T> inline double sum_run(const T* p, int64_t count) {
  if constexpr (sizeof(T) == sizeof(double)) {
    CarefulSum sum;
    for (int64_t i = 0; i < count; ++i) sum += p[i];
    return sum.total();
  }
  vdouble sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes<double> <= count; i += 2 * kLanes<double>) {
    sum[0] += load_wide(p + i);
    sum[1] += load_wide(p + i + kLanes<double>);
  }
  if (i + kLanes<double> <= count) {
    sum[0] += load_wide(p + i);
    i += kLanes<double>;
  }
  double rest = 0;
  for (; i < count; ++i) rest += static_cast<double>(p[i]);
  return reduce_add(sum[0] + sum[1]) + rest;
}
template <class T> inline T narrow(double x) { return static_cast<T>(static_cast<acc_t<T>>(x)); }

// Windows can be whole planes, so sums are in double; a window as wide as the plane is one run of elements.
template <class T> void adaptive_forward(const AdaptivePoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, s.channels_last), out(s.c, s.out_h, s.out_w, s.channels_last);
  constexpr int64_t kGroup = 4 * kLanes<double>;
  const int64_t group = s.channels_last ? kGroup : 1, groups = ceil_div(s.c, group);
  parallel_for(s.n * groups * s.out_h, larger(1, 16384 / larger(1, group * s.h * s.w / s.out_h)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i % s.out_h, c0 = i / s.out_h % groups * group, n = i / s.out_h / groups;
      const T* x = args.input + n * in.n + c0 * in.c;
      T* y = args.output + n * out.n + c0 * out.c + p * out.y;
      const int64_t y0 = adaptive_begin(p, s.h, s.out_h), y1 = adaptive_end(p, s.h, s.out_h);
      for (int64_t q = 0; q < s.out_w; ++q) {
        const int64_t x0 = adaptive_begin(q, s.w, s.out_w), x1 = adaptive_end(q, s.w, s.out_w);
        const double count = static_cast<double>((y1 - y0) * (x1 - x0));
        if (!s.channels_last) {
          double sum = 0;
          if (s.out_w == 1)
            sum = sum_run(x + y0 * s.w, (y1 - y0) * s.w);
          else
            for (int64_t iy = y0; iy < y1; ++iy) sum += sum_run(x + iy * s.w + x0, x1 - x0);
          y[q] = narrow<T>(sum / count);
        } else if (sizeof(T) < sizeof(double) && c0 + kGroup <= s.c) {
          vdouble sum[4] = {};
          for (int64_t iy = y0; iy < y1; ++iy)
            for (int64_t ix = x0; ix < x1; ++ix)
              for (int v = 0; v < 4; ++v) sum[v] += load_wide(x + iy * in.y + ix * in.x + v * kLanes<double>);
          for (int v = 0; v < 4; ++v)
            for (int l = 0; l < kLanes<double>; ++l) y[q * out.x + v * kLanes<double> + l] = narrow<T>(sum[v][l] / count);
        } else {
          for (int64_t c = 0; c < smaller(kGroup, s.c - c0); ++c) {
            CarefulSum sum;
            for (int64_t iy = y0; iy < y1; ++iy)
              for (int64_t ix = x0; ix < x1; ++ix) sum += static_cast<double>(x[iy * in.y + ix * in.x + c]);
            y[q * out.x + c] = narrow<T>(sum.total() / count);
          }
        }
      }
    }
  });
}

template <class T> void adaptive_backward(const AdaptivePoolArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, s.channels_last), out(s.c, s.out_h, s.out_w, s.channels_last);
  for_each_row(s, s.h, s.w * 4, [&](int64_t n, int64_t c, int64_t y) {
    const T* grad = args.input + n * out.n + c * out.c;
    // The windows that hold y, by the inverse of adaptive_begin and adaptive_end.
    const int64_t first_p = y * s.out_h / s.h, last_p = ceil_div((y + 1) * s.out_h, s.h) - 1;
    for (int64_t x = 0; x < s.w; ++x) {
      const int64_t first_q = x * s.out_w / s.w, last_q = ceil_div((x + 1) * s.out_w, s.w) - 1;
      A sum = 0;
      for (int64_t p = first_p; p <= last_p; ++p)
        for (int64_t q = first_q; q <= last_q; ++q) {
          const int64_t rows = adaptive_end(p, s.h, s.out_h) - adaptive_begin(p, s.h, s.out_h);
          const int64_t columns = adaptive_end(q, s.w, s.out_w) - adaptive_begin(q, s.w, s.out_w);
          sum += static_cast<A>(grad[p * out.y + q * out.x]) / static_cast<A>(rows * columns);
        }
      args.output[n * in.n + c * in.c + y * in.y + x * in.x] = static_cast<T>(sum);
    }
  });
}

}  // namespace

#define DLKERN_DEFINE_POOLING(T)                                                          \
  void max_pool2d_forward(const MaxPoolArgs<T>& args) {                                   \
    args.shape.channels_last ? max_forward_rows(args) : max_forward_planes(args);         \
  }                                                                                       \
  void max_pool2d_backward(const MaxPoolBackwardArgs<T>& args) {                          \
    if constexpr (sizeof(T) >= 4)                                                         \
      args.kind == IndexKind::flat64 ? max_backward_scatter<T, int64_t>(args) : max_backward_scatter<T, uint8_t>(args); \
    else                                                                                  \
      args.kind == IndexKind::flat64 ? max_backward<T, int64_t>(args) : max_backward<T, uint8_t>(args); \
  }                                                                                       \
  void avg_pool2d_forward(const AvgPoolArgs<T>& args) { avg_forward(args); }              \
  void avg_pool2d_backward(const AvgPoolArgs<T>& args) {                                \
    if constexpr (sizeof(T) >= 4)                                                         \
      avg_backward_scatter(args);                                                         \
    else                                                                                  \
      avg_backward(args);                                                                 \
  }                                                                                       \
  void adaptive_avg_pool2d_forward(const AdaptivePoolArgs<T>& args) { adaptive_forward(args); } \
  void adaptive_avg_pool2d_backward(const AdaptivePoolArgs<T>& args) { adaptive_backward(args); }
DLKERN_DEFINE_POOLING(float)
DLKERN_DEFINE_POOLING(double)
DLKERN_DEFINE_POOLING(bfloat16)

}  // namespace dlkern::cpu::DLKERN_ISA

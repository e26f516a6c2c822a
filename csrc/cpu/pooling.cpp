// Max, average and adaptive average pooling over [n, c, h, w], forward and backward.
// Backwards gather: each element of grad_input sums the windows it lies in, in a fixed order, and is written once.
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

template <class T, class Index> void max_forward(const MaxPoolArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, s.channels_last), out(s.c, s.out_h, s.out_w, s.channels_last);
  Index* indices = static_cast<Index*>(args.indices);
  for_each_row(s, s.out_h, s.out_w * s.kernel_h * s.kernel_w, [&](int64_t n, int64_t c, int64_t p) {
    const T* x = args.input + n * in.n + c * in.c;
    for (int64_t q = 0; q < s.out_w; ++q) {
      const int64_t y0 = p * s.stride_h - s.pad_h, x0 = q * s.stride_w - s.pad_w;
      A best = 0;
      int64_t best_r = -1, best_s = -1;
      for (int64_t r = 0; r < s.kernel_h; ++r) {
        const int64_t iy = y0 + r * s.dilation_h;
        if (iy < 0 || iy >= s.h) continue;
        for (int64_t t = 0; t < s.kernel_w; ++t) {
          const int64_t ix = x0 + t * s.dilation_w;
          if (ix < 0 || ix >= s.w) continue;
          const A value = static_cast<A>(x[iy * in.y + ix * in.x]);
          if (best_r < 0 || value > best || value != value) {
            best = value;
            best_r = r;
            best_s = t;
          }
        }
      }
      const int64_t o = n * out.n + c * out.c + p * out.y + q * out.x;
      args.output[o] = static_cast<T>(best);
      if (args.kind == IndexKind::offset8)
        indices[o] = static_cast<Index>(best_r * s.kernel_w + best_s);
      else if (args.kind == IndexKind::flat64)
        indices[o] = static_cast<Index>((y0 + best_r * s.dilation_h) * s.w + x0 + best_s * s.dilation_w);
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
      for (int64_t r = s.kernel_h - 1; r >= 0; --r) {
        const int64_t py = y + s.pad_h - r * s.dilation_h;
        if (py < 0 || py % s.stride_h || py / s.stride_h >= s.out_h) continue;
        for (int64_t t = s.kernel_w - 1; t >= 0; --t) {
          const int64_t px = x + s.pad_w - t * s.dilation_w;
          if (px < 0 || px % s.stride_w || px / s.stride_w >= s.out_w) continue;
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

template <class T> void avg_forward(const AvgPoolArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, s.channels_last), out(s.c, s.out_h, s.out_w, s.channels_last);
  for_each_row(s, s.out_h, s.out_w * s.kernel_h * s.kernel_w, [&](int64_t n, int64_t c, int64_t p) {
    const T* x = args.input + n * in.n + c * in.c;
    const Span rows(p, s.h, s.kernel_h, s.stride_h, s.pad_h);
    for (int64_t q = 0; q < s.out_w; ++q) {
      const Span columns(q, s.w, s.kernel_w, s.stride_w, s.pad_w);
      A sum = 0;
      for (int64_t iy = rows.begin; iy < rows.end; ++iy)
        for (int64_t ix = columns.begin; ix < columns.end; ++ix) sum += static_cast<A>(x[iy * in.y + ix * in.x]);
      const bool empty = rows.begin >= rows.end || columns.begin >= columns.end;
      args.output[n * out.n + c * out.c + p * out.y + q * out.x] =
          static_cast<T>(empty ? A(0) : sum / divisor_of(args, rows, columns));
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

template <class T> void adaptive_forward(const AdaptivePoolArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, s.channels_last), out(s.c, s.out_h, s.out_w, s.channels_last);
  for_each_row(s, s.out_h, s.h * s.w / s.out_h, [&](int64_t n, int64_t c, int64_t p) {
    const T* x = args.input + n * in.n + c * in.c;
    const int64_t y0 = adaptive_begin(p, s.h, s.out_h), y1 = adaptive_end(p, s.h, s.out_h);
    for (int64_t q = 0; q < s.out_w; ++q) {
      const int64_t x0 = adaptive_begin(q, s.w, s.out_w), x1 = adaptive_end(q, s.w, s.out_w);
      A sum = 0;
      for (int64_t iy = y0; iy < y1; ++iy) {
        A row = 0;
        for (int64_t ix = x0; ix < x1; ++ix) row += static_cast<A>(x[iy * in.y + ix * in.x]);
        sum += row;
      }
      args.output[n * out.n + c * out.c + p * out.y + q * out.x] =
          static_cast<T>(sum / static_cast<A>((y1 - y0) * (x1 - x0)));
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
    args.kind == IndexKind::flat64 ? max_forward<T, int64_t>(args) : max_forward<T, uint8_t>(args); \
  }                                                                                       \
  void max_pool2d_backward(const MaxPoolBackwardArgs<T>& args) {                          \
    args.kind == IndexKind::flat64 ? max_backward<T, int64_t>(args) : max_backward<T, uint8_t>(args); \
  }                                                                                       \
  void avg_pool2d_forward(const AvgPoolArgs<T>& args) { avg_forward(args); }              \
  void avg_pool2d_backward(const AvgPoolArgs<T>& args) { avg_backward(args); }            \
  void adaptive_avg_pool2d_forward(const AdaptivePoolArgs<T>& args) { adaptive_forward(args); } \
  void adaptive_avg_pool2d_backward(const AdaptivePoolArgs<T>& args) { adaptive_backward(args); }
DLKERN_DEFINE_POOLING(float)
DLKERN_DEFINE_POOLING(double)
DLKERN_DEFINE_POOLING(bfloat16)

}  // namespace dlkern::cpu::DLKERN_ISA

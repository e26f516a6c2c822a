// Adaptive average pooling over [n, c, h, w], forward and backward. Window i of a dimension covers
// [floor(i size / out), ceil((i + 1) size / out)). Windows can be whole planes, so sums are in double; those of float64
// carry their rounding errors along (Knuth's two-sum), since there is no wider type.
// Forward: a column of windows one element wide is one run of memory, summed in vectors, several runs at a time; else
// rows are added first, in vectors, and then elements along the row. channels_last: vectors of channels throughout.
// Backward: each gradient is divided once; rows that the same windows cover are copies.
// Floor: one read, one write.
#include "pooling_window.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

// V: double or vdouble. Only elements of float64 are summed with what each addition loses.
template <class T, class V> struct Sum : CompensatedSum<V> {
  void operator+=(V x) {
    if constexpr (sizeof(T) == sizeof(double))
      CompensatedSum<V>::operator+=(x);
    else
      this->value += x;
  }
};

// Both halves of v, widened and added.
inline vdouble fold(vfloat v) {
  vfloat_half half[2];
  std::memcpy(half, &v, sizeof v);
  return widen(half[0]) + widen(half[1]);
}
// Elements of 32 or 16 bits that are added as floats, by halves, before a double takes the sum.
constexpr int kShortSum = 8;
// Sum of kShortSum vectors, `apart` elements from one to the next.
template <class T> [[gnu::always_inline]] inline vfloat short_sum(const T* p, int64_t apart) {
  static_assert(kShortSum == 8);
  const T* q = p + 4 * apart;
  return ((load(p) + load(p + apart)) + (load(p + 2 * apart) + load(p + 3 * apart))) +
         ((load(q) + load(q + apart)) + (load(q + 2 * apart) + load(q + 3 * apart)));
}
// Lanes of the sum of `count` consecutive elements of 32 or 16 bits.
template <class T> inline vdouble sum_run(const T* p, int64_t count, const T* limit) {
  constexpr int64_t kStep = kLanes<float>;
  vdouble sum{};
  int64_t i = 0;
  for (; i + kShortSum * kStep <= count; i += kShortSum * kStep) sum += fold(short_sum(p + i, kStep));
  vfloat rest{};
  for (; i + kStep <= count; i += kStep) rest += load(p + i);
  if (i < count) rest += first_lanes<float>(load_before(p + i, limit), count - i, vfloat{});
  return sum + fold(rest);
}

// Windows as wide as the plane: each is one run of memory.
template <class T> void forward_runs(const AdaptivePoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  const T* input_end = args.input + s.n * s.c * s.h * s.w;
  parallel_for(s.n * s.c * s.out_h, grain_of(ceil_div(s.h, s.out_h) * s.w), [&](int64_t begin, int64_t end) {
    int64_t* start = scratch<int64_t>(Slot::family_3, 2 * s.out_h);  // of each run of a plane
    int64_t* length = start + s.out_h;
    for (int64_t p = 0; p < s.out_h; ++p) {
      start[p] = begin_of(p, s.h, s.out_h) * s.w;
      length[p] = end_of(p, s.h, s.out_h) * s.w - start[p];
    }
    const T* x = args.input + begin / s.out_h * s.h * s.w;
    int64_t p = begin % s.out_h;
    for (int64_t i = begin; i < end; i += kWide) {
      const int64_t outputs = smaller(kWide, end - i);
      vdouble sum[kWide] = {}, count = vdouble{} + 1.0;
      for (int64_t j = 0; j < outputs; ++j) {
        count[j] = static_cast<double>(length[p]);
        if constexpr (sizeof(T) == sizeof(double)) {
          Sum<T, double> careful;
          for (int64_t k = 0; k < length[p]; ++k) careful += x[start[p] + k];
          sum[j][0] = careful.total();
        } else {
          sum[j] = sum_run(x + start[p], length[p], input_end);
        }
        if (++p == s.out_h) p = 0, x += s.h * s.w;
      }
      transpose(sum);
      for (int half = kWide / 2; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
      store_narrow(args.output + i, sum[0] / count, outputs);
    }
  });
}

// The same where each window is a whole plane of a few vectors, as before a classifier: a vector of sums a plane, as
// many planes at a time as a vector has lanes, so that one transpose adds up the lanes of all.
constexpr int64_t kSmallPlane = 64;  // elements: few enough to be added as floats
template <class T> void forward_small_planes(const AdaptivePoolArgs<T>& args) {
  constexpr int lanes = kLanes<float>;
  const int64_t planes = args.shape.n * args.shape.c, plane = args.shape.h * args.shape.w,
                whole = plane / lanes * lanes;
  const T* input_end = args.input + planes * plane;
  const vdouble count = vdouble{} + static_cast<double>(plane);
  parallel_for(ceil_div(planes, lanes), grain_of(plane * lanes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * lanes; i < end * lanes; i += lanes) {
      vfloat sum[lanes];
      for (int j = 0; j < lanes; ++j) {
        const T* x = args.input + smaller(i + j, planes - 1) * plane;
        vfloat even = first_lanes<float>(load_before(x + whole, input_end), plane - whole, vfloat{}), odd{};
        int64_t k = 0;
        for (; k + lanes < whole; k += 2 * lanes) {
          even += load(x + k);
          odd += load(x + k + lanes);
        }
        if (k < whole) even += load(x + k);
        sum[j] = even + odd;
      }
      transpose(sum);
      for (int half = lanes / 2; half >= 2; half /= 2)
        for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
      vfloat_half half[2][2];
      std::memcpy(half, sum, sizeof half);
      for (int h = 0; h < 2; ++h)
        store_narrow(args.output + i + h * kWide, (widen(half[0][h]) + widen(half[1][h])) / count,
                     planes - i - h * kWide);
    }
  });
}

template <class T> void forward_planes(const AdaptivePoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  const int64_t width = round_up(s.w, kWide);
  const T* input_end = args.input + s.n * s.c * s.h * s.w;
  parallel_for(s.n * s.c * s.out_h, grain_of(ceil_div(s.h, s.out_h) * s.w + s.w + s.out_w),
               [&](int64_t begin, int64_t end) {
                 double* line = scratch<double>(Slot::family_0, 2 * width);
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t p = i % s.out_h, y0 = begin_of(p, s.h, s.out_h), y1 = end_of(p, s.h, s.out_h);
                   const T* x = args.input + i / s.out_h * s.h * s.w;
                   for (int64_t ix = 0; ix < s.w; ix += kWide) {
                     Sum<T, vdouble> sum;
                     for (int64_t y = y0; y < y1; ++y) sum += load_wide_before(x + y * s.w + ix, input_end);
                     store(line + ix, sum.value);
                     store(line + width + ix, sum.lost);
                   }
                   for (int64_t q = 0; q < s.out_w; ++q) {
                     const int64_t x0 = begin_of(q, s.w, s.out_w), x1 = end_of(q, s.w, s.out_w);
                     Sum<T, double> sum;
                     for (int64_t ix = x0; ix < x1; ++ix) {
                       sum += line[ix];
                       if constexpr (sizeof(T) == sizeof(double)) sum.lost += line[width + ix];
                     }
                     args.output[i * s.out_w + q] = narrow<T>(sum.total() / static_cast<double>((y1 - y0) * (x1 - x0)));
                   }
                 }
               });
}

// channels_last. A group of channels at a time: long enough to stream, its sums short enough to stay in L1.
template <class T> void forward_pixels(const AdaptivePoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, true), out(s.c, s.out_h, s.out_w, true);
  constexpr int64_t kGroup = 512;
  const int64_t groups = ceil_div(s.c, kGroup);
  const T* input_end = args.input + s.n * in.n;
  parallel_for(s.n * groups * s.out_h, grain_of(smaller(s.c, kGroup) * ceil_div(s.h, s.out_h) * s.w),
               [&](int64_t begin, int64_t end) {
                 double* value = scratch<double>(Slot::family_0, 2 * (kGroup + kWide));
                 double* lost = value + kGroup + kWide;
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t p = i % s.out_h, c0 = i / s.out_h % groups * kGroup, n = i / s.out_h / groups;
                   const int64_t channels = smaller(kGroup, s.c - c0);
                   const int64_t y0 = begin_of(p, s.h, s.out_h), y1 = end_of(p, s.h, s.out_h);
                   const T* x = args.input + n * in.n + c0;
                   for (int64_t q = 0; q < s.out_w; ++q) {
                     const int64_t x0 = begin_of(q, s.w, s.out_w), x1 = end_of(q, s.w, s.out_w);
                     std::memset(value, 0, sizeof(double) * static_cast<size_t>(channels + kWide));
                     std::memset(lost, 0, sizeof(double) * static_cast<size_t>(channels + kWide));
                     // Whole rows are one run of pixels.
                     const bool whole = x0 == 0 && x1 == s.w;
                     const int64_t lines = whole ? 1 : y1 - y0, run = (whole ? y1 - y0 : 1) * (x1 - x0);
                     for (int64_t line = 0; line < lines; ++line) {
                       const T* from = x + (y0 + line) * in.y + x0 * in.x;
                       int64_t ix = 0;
                       if constexpr (sizeof(T) < sizeof(double))
                         for (; ix + kShortSum <= run; ix += kShortSum, from += kShortSum * in.x) {
                           int64_t c = 0;
                           for (; c + 2 * kWide <= channels; c += 2 * kWide) {
                             const vfloat sum = short_sum(from + c, in.x);
                             store(value + c, load(value + c) + widen(low_half(sum)));
                             store(value + c + kWide, load(value + c + kWide) + widen(high_half(sum)));
                           }
                           for (; c < channels; c += kWide) {
                             vdouble sum{};
                             for (int64_t k = 0; k < kShortSum; ++k)
                               sum += load_wide_before(from + k * in.x + c, input_end);
                             store(value + c, load(value + c) + sum);
                           }
                         }
                       for (; ix < run; ++ix, from += in.x)
                         for (int64_t c = 0; c < channels; c += kWide) {
                           Sum<T, vdouble> sum{load(value + c), load(lost + c)};
                           sum += load_wide_before(from + c, input_end);
                           store(value + c, sum.value);
                           if constexpr (sizeof(T) == sizeof(double)) store(lost + c, sum.lost);
                         }
                     }
                     T* to = args.output + n * out.n + p * out.y + q * out.x + c0;
                     const double count = static_cast<double>((y1 - y0) * (x1 - x0));
                     for (int64_t c = 0; c < channels; c += kWide) {
                       const vdouble sum = load(value + c), error = load(lost + c);
                       store_narrow(to + c, (sum + finite_part(error)) / count, channels - c);
                     }
                   }
                 }
               });
}

// The share of each window, along one row of them: its gradient over its extent.
template <class T> inline Vec<T> share(Vec<T> gradient, acc_t<T> rows, Vec<T> columns) {
  return gradient / (rows * columns);
}

// One window a plane: its share everywhere.
template <class T> void backward_runs(const AdaptivePoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  const int64_t plane = s.h * s.w;
  parallel_for(s.n * s.c, grain_of(plane), [&](int64_t begin, int64_t end) {
    const T* limit = args.output + end * plane;
    for (int64_t i = begin; i < end; ++i) {
      const Vec<T> value = broadcast<T>(static_cast<acc_t<T>>(args.input[i]) / static_cast<acc_t<T>>(plane));
      for (int64_t k = 0; k < plane; k += kLanes<T>) store_before(args.output + i * plane + k, value, limit);
    }
  });
}

template <class T> void backward_planes(const AdaptivePoolArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const int64_t width = round_up(s.out_w, kLanes<T>), most_rows = ceil_div(s.out_h, s.h) + 1;
  const T* gradient_end = args.input + s.n * s.c * s.out_h * s.out_w;
  parallel_for(s.n * s.c * s.h, grain_of(2 * s.w), [&](int64_t begin, int64_t end) {
    A *columns = scratch<A>(Slot::family_0, (1 + most_rows) * width), *shares = columns + width;
    int64_t* first = scratch<int64_t>(Slot::family_3, 2 * s.w);
    int64_t* last = first + s.w;
    for (int64_t q = 0; q < width; ++q)
      columns[q] = q < s.out_w ? static_cast<A>(end_of(q, s.w, s.out_w) - begin_of(q, s.w, s.out_w)) : A(1);
    for (int64_t x = 0; x < s.w; ++x) {
      first[x] = first_with(x, s.w, s.out_w);
      last[x] = last_with(x, s.w, s.out_w);
    }
    int64_t before_p0 = -1, before_p1 = -1;  // the windows of the row above
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = i % s.h, p0 = first_with(y, s.h, s.out_h), p1 = last_with(y, s.h, s.out_h);
      const T* gradient = args.input + i / s.h * s.out_h * s.out_w;
      T* dx = args.output + i * s.w;
      if (i > begin && y > 0 && p0 == before_p0 && p1 == before_p1) {
        std::memcpy(static_cast<void*>(dx), dx - s.w, sizeof(T) * static_cast<size_t>(s.w));
        continue;
      }
      before_p0 = p0;
      before_p1 = p1;
      for (int64_t p = p0; p <= p1; ++p) {
        const A rows = static_cast<A>(end_of(p, s.h, s.out_h) - begin_of(p, s.h, s.out_h));
        for (int64_t q = 0; q < s.out_w; q += kLanes<T>)
          store(shares + (p - p0) * width + q,
                share<T>(load_before(gradient + p * s.out_w + q, gradient_end), rows, load(columns + q)));
      }
      for (int64_t x = 0; x < s.w; ++x) {
        A sum = 0;
        for (int64_t p = 0; p <= p1 - p0; ++p)
          for (int64_t q = first[x]; q <= last[x]; ++q) sum += shares[p * width + q];
        dx[x] = static_cast<T>(sum);
      }
    }
  });
}

template <class T> void backward_pixels(const AdaptivePoolArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const int64_t row_length = s.out_w * s.c, slots = RowRing::size_for(ceil_div(s.out_h, s.h) + 1),
                length = row_length + kLanes<T>;
  const T* gradient_end = args.input + s.n * s.out_h * row_length;
  parallel_for(s.n * s.h, grain_of(s.w * ceil_div(4 * s.c, kLanes<T>)), [&](int64_t begin, int64_t end) {
    A* shares = scratch<A>(Slot::family_0, slots * length);
    int64_t* row_at = scratch<int64_t>(Slot::family_3, 2 * slots + 2 * s.w);
    int64_t *first = row_at + slots, *last = first + s.w;
    RowRing ring(slots, last + s.w);
    for (int64_t x = 0; x < s.w; ++x) {
      first[x] = first_with(x, s.w, s.out_w);
      last[x] = last_with(x, s.w, s.out_w);
    }
    const T* limit = args.output + end * s.w * s.c;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / s.h, y = i % s.h;
      int64_t rows = 0;
      for (int64_t p = first_with(y, s.h, s.out_h); p <= last_with(y, s.h, s.out_h); ++p) {
        const int64_t row = image * s.out_h + p;
        row_at[rows++] = length * ring.slot(row, [&](int64_t slot) {
          const A extent = static_cast<A>(end_of(p, s.h, s.out_h) - begin_of(p, s.h, s.out_h));
          for (int64_t q = 0; q < s.out_w; ++q) {
            const Vec<T> columns = broadcast<T>(static_cast<A>(end_of(q, s.w, s.out_w) - begin_of(q, s.w, s.out_w)));
            for (int64_t c = q * s.c; c < (q + 1) * s.c; c += kLanes<T>)
              store(shares + slot * length + c,
                    share<T>(load_before(args.input + row * row_length + c, gradient_end), extent, columns));
          }
        });
      }
      for (int64_t x = 0; x < s.w; ++x) {
        T* dx = args.output + (i * s.w + x) * s.c;
        for (int64_t c = 0; c < s.c; c += kLanes<T>) {
          Vec<T> sum{};
          for (int64_t k = 0; k < rows; ++k)
            for (int64_t q = first[x]; q <= last[x]; ++q) sum += load(shares + row_at[k] + q * s.c + c);
          store_before(dx + c, sum, limit);
        }
      }
    }
  });
}

template <class T> void forward(const AdaptivePoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  if constexpr (sizeof(T) < sizeof(double))
    if (!s.channels_last && s.out_h == 1 && s.out_w == 1 && s.h * s.w < kSmallPlane) {
      forward_small_planes(args);
      return;
    }
  if (args.shape.channels_last)
    forward_pixels(args);
  else if (args.shape.out_w == 1)
    forward_runs(args);
  else
    forward_planes(args);
}

template <class T> void backward(const AdaptivePoolArgs<T>& args) {
  if (args.shape.channels_last)
    backward_pixels(args);
  else if (args.shape.out_h == 1 && args.shape.out_w == 1)
    backward_runs(args);
  else
    backward_planes(args);
}

}  // namespace

void adaptive_avg_pool2d_forward(const AdaptivePoolArgs<float>& args) { forward(args); }
void adaptive_avg_pool2d_forward(const AdaptivePoolArgs<double>& args) { forward(args); }
void adaptive_avg_pool2d_forward(const AdaptivePoolArgs<bfloat16>& args) { forward(args); }
void adaptive_avg_pool2d_forward(const AdaptivePoolArgs<float16>& args) { forward(args); }
void adaptive_avg_pool2d_backward(const AdaptivePoolArgs<float>& args) { backward(args); }
void adaptive_avg_pool2d_backward(const AdaptivePoolArgs<double>& args) { backward(args); }
void adaptive_avg_pool2d_backward(const AdaptivePoolArgs<bfloat16>& args) { backward(args); }
void adaptive_avg_pool2d_backward(const AdaptivePoolArgs<float16>& args) { backward(args); }

}  // namespace dlkern::cpu::DLKERN_ISA

// Average pooling over [n, c, h, w], forward and backward. Sums are in float (double for float64), in torch's order:
// a window's elements row by row, an element's windows row by row. (Sums along rows first would be as exact, but not
// the same bits.)
// Contiguous planes: a vector holds neighbouring windows of a row, or neighbouring elements; rows are laid out for that
// once and kept while windows need them. Backward, each gradient is divided once.
// channels_last: a vector holds the channels of a pixel, and every element of a window is a load.
// Floor: one read, one write.
#include "pooling_window.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

// A window's divisor is a part of its row times a part of its column: extents, or the override times one. Where all are
// powers of two, multiplying by their reciprocals gives the same bits.
template <class T> struct Divisors {
  using A = acc_t<T>;
  A *row, *column;
  bool reciprocal;

  static int64_t size(const PoolShape& s) { return s.out_h + round_up(s.out_w, kLanes<T>); }
  static int64_t covered(const AvgPoolArgs<T>& args, int64_t p, int64_t extent, int64_t kernel, int64_t stride,
                         int64_t pad) {
    const int64_t start = p * stride - pad, stop = smaller(start + kernel, extent + pad);
    return args.count_include_pad ? stop - start : smaller(stop, extent) - larger(start, 0);
  }
  static bool power_of_two(int64_t i) { return i > 0 && (i & (i - 1)) == 0; }
  Divisors(const AvgPoolArgs<T>& args, A* memory) : row(memory), column(memory + args.shape.out_h), reciprocal(true) {
    const PoolShape& s = args.shape;
    for (int64_t p = 0; p < s.out_h; ++p) {
      const int64_t part = args.divisor != 0 ? args.divisor : covered(args, p, s.h, s.kernel_h, s.stride_h, s.pad_h);
      reciprocal = reciprocal && power_of_two(part);
      row[p] = static_cast<A>(part);
    }
    for (int64_t q = 0; q < s.out_w; ++q) {
      const int64_t part = args.divisor != 0 ? 1 : covered(args, q, s.w, s.kernel_w, s.stride_w, s.pad_w);
      reciprocal = reciprocal && power_of_two(part);
      column[q] = static_cast<A>(part);
    }
    for (int64_t q = s.out_w; q < round_up(s.out_w, kLanes<T>); ++q) column[q] = A(1);
    if (reciprocal)
      for (int64_t i = 0; i < size(s); ++i) memory[i] = A(1) / memory[i];
  }
  Vec<T> divide(Vec<T> sum, int64_t p, Vec<T> columns) const {
    const Vec<T> divisor = row[p] * columns;
    return reciprocal ? sum * divisor : sum / divisor;
  }
};

// `vectors` of neighbouring windows from column q on: the sums of rows x columns elements, each over its divisor.
// KNOWN: columns, where it is known.
template <int vectors, int KNOWN, class T>
[[gnu::always_inline]] inline void windows(const acc_t<T>* lines, const int64_t* row_at, int64_t rows,
                                           const int64_t* taps, int64_t columns, const Divisors<T>& divisors, int64_t p,
                                           int64_t q, T* y, const T* limit) {
  Vec<T> sum[vectors] = {};
  for (int64_t k = 0; k < rows; ++k)
#pragma GCC unroll 3
    for (int64_t t = 0; t < (KNOWN ? KNOWN : columns); ++t)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[v] += load(lines + row_at[k] + taps[t] + q + v * kLanes<T>);
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const int64_t at = q + v * kLanes<T>;
    store_before(y + at, divisors.divide(sum[v], p, load(divisors.column + at)), limit);
  }
}

// KNOWN: kernel_w where it is 3, else 0.
template <class T, int KNOWN> void forward_planes(const AvgPoolArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const int64_t slots = RowRing::size_for(reach_of_input(s)), size = PhasedRows<T>::size(s);
  const T* input_end = args.input + s.n * s.c * s.h * s.w;
  parallel_for(s.n * s.c * s.out_h, grain_of(s.out_w * s.kernel_h * s.kernel_w / 4), [&](int64_t begin, int64_t end) {
    PhasedRows<T> lines(s, slots, scratch<A>(Slot::family_0, slots * size), A(0));
    const Divisors<T> divisors(args, scratch<A>(Slot::family_2, Divisors<T>::size(s)));
    int64_t* taps = scratch<int64_t>(Slot::family_3, slots + s.kernel_w + s.kernel_h);
    int64_t* row_at = taps + s.kernel_w;
    RowRing ring(slots, row_at + s.kernel_h);
    for (int64_t t = 0; t < s.kernel_w; ++t) taps[t] = lines.tap(t, 1);
    auto lay = [&](int64_t row) {
      return ring.slot(row, [&](int64_t slot) { lines.put(slot, args.input + row * s.w, input_end); });
    };
    const T* limit = args.output + end * s.out_w;
    for (int64_t i = begin, plane = begin / s.out_h, p = begin % s.out_h; i < end; ++i) {
      const int64_t y0 = p * s.stride_h - s.pad_h, first = larger(y0, 0), last = smaller(y0 + s.kernel_h, s.h);
      int64_t count = 0;
      for (int64_t y = first; y < last; ++y) row_at[count++] = size * lay(plane * s.h + y);
      if (s.stride_h <= kStepAhead)
        for (int64_t y = larger(last, first + s.stride_h); y < smaller(last + s.stride_h, s.h); ++y)
          lay(plane * s.h + y);
      T* y = args.output + i * s.out_w;
      int64_t q = 0;
      for (; q + kLanes<T> < s.out_w; q += 2 * kLanes<T>)
        windows<2, KNOWN>(lines.data, row_at, count, taps, s.kernel_w, divisors, p, q, y, limit);
      if (q < s.out_w) windows<1, KNOWN>(lines.data, row_at, count, taps, s.kernel_w, divisors, p, q, y, limit);
      if (++p == s.out_h) p = 0, ++plane;
    }
  });
}

template <class T> void forward_pairs(const AvgPoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  const T* input_end = args.input + s.n * s.c * s.h * s.w;
  parallel_for(s.n * s.c * s.out_h, grain_of(s.out_w * s.kernel_h / 2), [&](int64_t begin, int64_t end) {
    const Divisors<T> divisors(args, scratch<acc_t<T>>(Slot::family_2, Divisors<T>::size(s)));
    const T* limit = args.output + end * s.out_w;
    for (int64_t i = begin, plane = begin / s.out_h, p = begin % s.out_h; i < end; ++i) {
      const int64_t y0 = p * s.stride_h - s.pad_h, first = larger(y0, 0), last = smaller(y0 + s.kernel_h, s.h);
      for (int64_t q = 0; q < s.out_w; q += kLanes<T>) {
        Vec<T> sum{}, even, odd;
        for (int64_t y = first; y < last; ++y) {
          load_pairs(args.input + (plane * s.h + y) * s.w + 2 * q, input_end, even, odd);
          sum = (sum + even) + odd;
        }
        store_before(args.output + i * s.out_w + q, divisors.divide(sum, p, load(divisors.column + q)), limit);
      }
      if (++p == s.out_h) p = 0, ++plane;
    }
  });
}

// `vectors` of channels of the window whose elements inside the input are rows x columns from x on.
template <class T, int vectors>
inline void pixel(const T* x, const T* input_end, const Steps& in, int64_t rows, int64_t columns,
                  const Divisors<T>& divisors, int64_t p, Vec<T> column, T* y, const T* limit) {
  Vec<T> sum[vectors] = {};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t t = 0; t < columns; ++t) {
      const T* from = x + r * in.y + t * in.x;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v)
        sum[v] += vectors > 1 ? load(from + v * kLanes<T>) : load_before(from, input_end);
    }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const Vec<T> mean = divisors.divide(sum[v], p, column);
    vectors > 1 ? store(y + v * kLanes<T>, mean) : store_before(y, mean, limit);
  }
}

template <class T> void forward_pixels(const AvgPoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, true);
  const T* input_end = args.input + s.n * in.n;
  parallel_for(s.n * s.out_h, grain_of(s.out_w * ceil_div(s.c, kLanes<T>) * s.kernel_h * s.kernel_w / 2),
               [&](int64_t begin, int64_t end) {
                 const Divisors<T> divisors(args, scratch<acc_t<T>>(Slot::family_2, Divisors<T>::size(s)));
                 const T* limit = args.output + end * s.out_w * s.c;
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t p = i % s.out_h, y0 = p * s.stride_h - s.pad_h, top = larger(y0, 0),
                                 rows = smaller(y0 + s.kernel_h, s.h) - top;
                   for (int64_t q = 0; q < s.out_w; ++q) {
                     const int64_t x0 = q * s.stride_w - s.pad_w, left = larger(x0, 0),
                                   columns = smaller(x0 + s.kernel_w, s.w) - left;
                     const T* x = args.input + i / s.out_h * in.n + top * in.y + left * in.x;
                     T* y = args.output + (i * s.out_w + q) * s.c;
                     const Vec<T> column = broadcast<T>(divisors.column[q]);
                     int64_t c = 0;
                     for (; c + 4 * kLanes<T> <= s.c; c += 4 * kLanes<T>)
                       pixel<T, 4>(x + c, input_end, in, rows, columns, divisors, p, column, y + c, limit);
                     for (; c < s.c; c += kLanes<T>)
                       pixel<T, 1>(x + c, input_end, in, rows, columns, divisors, p, column, y + c, limit);
                   }
                 }
               });
}

template <class T> void backward_tiles(const AvgPoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  const T* gradient_end = args.input + s.n * s.c * s.out_h * s.out_w;
  parallel_for(s.n * s.c * s.out_h, grain_of(s.out_w * s.kernel_h / 2), [&](int64_t begin, int64_t end) {
    const Divisors<T> divisors(args, scratch<acc_t<T>>(Slot::family_2, Divisors<T>::size(s)));
    const T* limit = args.output + end * s.kernel_h * s.w;
    for (int64_t i = begin, p = begin % s.out_h; i < end; ++i) {
      for (int64_t r = 0; r < s.kernel_h; ++r)
        for (int64_t q = 0; q < s.out_w; q += kLanes<T>) {
          const Vec<T> share =
              divisors.divide(load_before(args.input + i * s.out_w + q, gradient_end), p, load(divisors.column + q));
          store_pairs(args.output + (i * s.kernel_h + r) * s.w + 2 * q, share, share, limit);
        }
      if (++p == s.out_h) p = 0;
    }
  });
}

// stride: stride_w where it is 1 or 2, else 0.
template <class T, int stride> void backward_planes(const AvgPoolArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const int64_t slots = RowRing::size_for(reach_of_output(s)), columns = ceil_div(s.w, s.stride_w);
  const int64_t left = ColumnTaps::left(s), phase_length = round_up(columns, kLanes<T>);
  const int64_t length = round_up(left + larger(s.out_w, columns + ColumnTaps::right(s)), kLanes<T>) + 2 * kLanes<T>;
  const T* gradient_end = args.input + s.n * s.c * s.out_h * s.out_w;
  parallel_for(
      s.n * s.c * s.h, grain_of(s.w * larger(1, s.kernel_h * s.kernel_w / 8)), [&](int64_t begin, int64_t end) {
        A* shares = scratch<A>(Slot::family_0, slots * length);  // of the last output rows, with zeros around each row
        std::memset(static_cast<void*>(shares), 0, sizeof(A) * static_cast<size_t>(slots * length));
        A* phases = stride == 0 ? scratch<A>(Slot::family_1, s.stride_w * phase_length) : nullptr;
        const Divisors<T> divisors(args, scratch<A>(Slot::family_2, Divisors<T>::size(s)));
        const int64_t for_columns = ColumnTaps::memory(s), for_rows = RowTaps::memory(s);
        int64_t* memory = scratch<int64_t>(Slot::family_3, for_columns + for_rows + s.kernel_h + slots);
        const ColumnTaps taps(s, memory);
        const RowTaps row_taps(s, memory + for_columns);
        int64_t* row_at = memory + for_columns + for_rows;
        RowRing ring(slots, row_at + s.kernel_h);
        const T* limit = args.output + end * s.w;
        auto lay = [&](int64_t plane, int64_t p) {
          const int64_t row = plane * s.out_h + p;
          return ring.slot(row, [&](int64_t slot) {
            A* to = shares + slot * length + left;
            for (int64_t q = 0; q < s.out_w; q += kLanes<T>)
              store(to + q,
                    divisors.divide(load_row(args.input + row * s.out_w + q, s.out_w - q, gradient_end, Vec<T>{}), p,
                                    load(divisors.column + q)));
          });
        };
        Walk row(begin % s.h, s.stride_h);
        for (int64_t i = begin, plane = begin / s.h, y = begin % s.h; i < end; ++i) {
          int64_t count = 0;
          row_taps.each(row.m, row.e, s.out_h,
                        [&](int64_t, int64_t p) { row_at[count++] = left + length * lay(plane, p); });
          if (++y == s.h) {
            row = Walk(0, s.stride_h);
            y = 0, ++plane;
          } else {
            row.next();
            row_taps.each(row.m, row.e, s.out_h, [&](int64_t, int64_t p) { lay(plane, p); });
          }
          // The sums of columns e, stride + e, … from number m on.
          auto gather = [&](int64_t e, int64_t m) {
            Vec<T> sum{};
            for (int64_t k = 0; k < count; ++k)
              for (int64_t j = taps.start[e]; j < taps.start[e + 1]; ++j)
                sum += load(shares + row_at[k] + m + taps.shift[j]);
            return sum;
          };
          T* dx = args.output + i * s.w;
          if constexpr (stride == 1) {
            for (int64_t m = 0; m < columns; m += kLanes<T>) store_before(dx + m, gather(0, m), limit);
          } else if constexpr (stride == 2) {
            for (int64_t m = 0; m < columns; m += kLanes<T>)
              store_pairs<T>(dx + 2 * m, gather(0, m), gather(1, m), limit);
          } else {
            for (int64_t e = 0; e < taps.classes; ++e)
              for (int64_t m = 0; m < columns; m += kLanes<T>) store(phases + e * phase_length + m, gather(e, m));
            for (int64_t x = 0, m = 0, e = 0; x < s.w; ++x) {
              dx[x] = static_cast<T>(phases[e * phase_length + m]);
              if (++e == s.stride_w) e = 0, ++m;
            }
          }
        }
      });
}

template <class T> void backward_pixels(const AvgPoolArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const int64_t slots = RowRing::size_for(reach_of_output(s)), row_length = s.out_w * s.c,
                length = row_length + kLanes<T>;
  const T* gradient_end = args.input + s.n * s.out_h * row_length;
  parallel_for(
      s.n * s.h, grain_of(s.w * ceil_div(s.c, kLanes<T>) * larger(1, s.kernel_h * s.kernel_w / 4)),
      [&](int64_t begin, int64_t end) {
        A* shares = scratch<A>(Slot::family_0, slots * length);
        const Divisors<T> divisors(args, scratch<A>(Slot::family_2, Divisors<T>::size(s)));
        const int64_t for_columns = ColumnTaps::memory(s), for_rows = RowTaps::memory(s);
        int64_t* memory =
            scratch<int64_t>(Slot::family_3, for_columns + for_rows + s.kernel_h + s.kernel_h * s.kernel_w + slots);
        const ColumnTaps taps(s, memory);
        const RowTaps row_taps(s, memory + for_columns);
        int64_t *row_at = memory + for_columns + for_rows,
                *at = row_at + s.kernel_h;  // at: shares of the windows that hold a pixel
        RowRing ring(slots, at + s.kernel_h * s.kernel_w);
        const T* limit = args.output + end * s.w * s.c;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t image = i / s.h, y = i % s.h;
          int64_t rows = 0;
          row_taps.each(y / s.stride_h, y % s.stride_h, s.out_h, [&](int64_t, int64_t p) {
            const int64_t row = image * s.out_h + p;
            row_at[rows++] = length * ring.slot(row, [&](int64_t slot) {
              for (int64_t q = 0; q < s.out_w; ++q) {
                const Vec<T> column = broadcast<T>(divisors.column[q]);
                for (int64_t c = q * s.c; c < (q + 1) * s.c; c += kLanes<T>)
                  store(shares + slot * length + c,
                        divisors.divide(load_before(args.input + row * row_length + c, gradient_end), p, column));
              }
            });
          });
          Walk column(0, s.stride_w);
          for (int64_t x = 0; x < s.w; ++x, column.next()) {
            int64_t count = 0;
            for (int64_t k = 0; k < rows; ++k)
              taps.each(column.m, column.e, s.out_w, [&](int64_t, int64_t q) { at[count++] = row_at[k] + q * s.c; });
            T* dx = args.output + (i * s.w + x) * s.c;
            int64_t c = 0;
            for (; c + 4 * kLanes<T> <= s.c; c += 4 * kLanes<T>) {
              Vec<T> sum[4] = {};
              for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 4
                for (int v = 0; v < 4; ++v) sum[v] += load(shares + at[k] + c + v * kLanes<T>);
#pragma GCC unroll 4
              for (int v = 0; v < 4; ++v) store(dx + c + v * kLanes<T>, sum[v]);
            }
            for (; c < s.c; c += kLanes<T>) {
              Vec<T> sum{};
              for (int64_t k = 0; k < count; ++k) sum += load(shares + at[k] + c);
              store_before(dx + c, sum, limit);
            }
          }
        }
      });
}

// One element after the other, in plain code: where scratch rows would be too large.
template <class T> void forward_plain(const AvgPoolArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, s.channels_last), out(s.c, s.out_h, s.out_w, s.channels_last);
  parallel_for(s.n * s.c, 1, [&](int64_t begin, int64_t end) {
    const Divisors<T> divisors(args, scratch<A>(Slot::family_2, Divisors<T>::size(s)));
    for (int64_t i = begin; i < end; ++i) {
      const T* x = args.input + i / s.c * in.n + i % s.c * in.c;
      T* y = args.output + i / s.c * out.n + i % s.c * out.c;
      for (int64_t p = 0; p < s.out_h; ++p)
        for (int64_t q = 0; q < s.out_w; ++q) {
          const int64_t y0 = p * s.stride_h - s.pad_h, x0 = q * s.stride_w - s.pad_w;
          A sum = 0;
          for (int64_t iy = larger(y0, 0); iy < smaller(y0 + s.kernel_h, s.h); ++iy)
            for (int64_t ix = larger(x0, 0); ix < smaller(x0 + s.kernel_w, s.w); ++ix)
              sum += static_cast<A>(x[iy * in.y + ix * in.x]);
          y[p * out.y + q * out.x] =
              static_cast<T>(divisors.divide(broadcast<T>(sum), p, broadcast<T>(divisors.column[q]))[0]);
        }
    }
  });
}
template <class T> void backward_plain(const AvgPoolArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, s.channels_last), out(s.c, s.out_h, s.out_w, s.channels_last);
  parallel_for(s.n * s.c, 1, [&](int64_t begin, int64_t end) {
    const Divisors<T> divisors(args, scratch<A>(Slot::family_2, Divisors<T>::size(s)));
    for (int64_t i = begin; i < end; ++i) {
      const T* grad = args.input + i / s.c * out.n + i % s.c * out.c;
      T* dx = args.output + i / s.c * in.n + i % s.c * in.c;
      for (int64_t y = 0; y < s.h; ++y) {
        const int64_t first_p = larger(0, floor_div(y + s.pad_h - s.kernel_h, s.stride_h) + 1);
        const int64_t last_p = smaller(s.out_h - 1, (y + s.pad_h) / s.stride_h);
        for (int64_t x = 0; x < s.w; ++x) {
          const int64_t first_q = larger(0, floor_div(x + s.pad_w - s.kernel_w, s.stride_w) + 1);
          const int64_t last_q = smaller(s.out_w - 1, (x + s.pad_w) / s.stride_w);
          A sum = 0;
          for (int64_t p = first_p; p <= last_p; ++p)
            for (int64_t q = first_q; q <= last_q; ++q)
              sum += divisors.divide(broadcast<T>(static_cast<A>(grad[p * out.y + q * out.x])), p,
                                     broadcast<T>(divisors.column[q]))[0];
          dx[y * in.y + x * in.x] = static_cast<T>(sum);
        }
      }
    }
  });
}

template <class T> void forward(const AvgPoolArgs<T>& args) {
  if (args.shape.channels_last)
    forward_pixels(args);
  else if (column_pairs(args.shape))
    forward_pairs(args);
  else if (rows_fit<T>(args.shape))
    args.shape.kernel_w == 3 ? forward_planes<T, 3>(args) : forward_planes<T, 0>(args);
  else
    forward_plain(args);
}

template <class T> void backward(const AvgPoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  if (!rows_fit<T>(s) || s.kernel_h * s.kernel_w > (int64_t{1} << 21))
    backward_plain(args);
  else if (s.channels_last)
    s.out_w* s.c <= (int64_t{1} << 24) / RowRing::size_for(reach_of_output(s)) ? backward_pixels(args)
                                                                               : backward_plain(args);
  else if (tiles(s))
    backward_tiles(args);
  else if (s.stride_w == 1)
    backward_planes<T, 1>(args);
  else if (s.stride_w == 2)
    backward_planes<T, 2>(args);
  else
    backward_planes<T, 0>(args);
}

}  // namespace

void avg_pool2d_forward(const AvgPoolArgs<float>& args) { forward(args); }
void avg_pool2d_forward(const AvgPoolArgs<double>& args) { forward(args); }
void avg_pool2d_forward(const AvgPoolArgs<bfloat16>& args) { forward(args); }
void avg_pool2d_forward(const AvgPoolArgs<float16>& args) { forward(args); }
void avg_pool2d_backward(const AvgPoolArgs<float>& args) { backward(args); }
void avg_pool2d_backward(const AvgPoolArgs<double>& args) { backward(args); }
void avg_pool2d_backward(const AvgPoolArgs<bfloat16>& args) { backward(args); }
void avg_pool2d_backward(const AvgPoolArgs<float16>& args) { backward(args); }

}  // namespace dlkern::cpu::DLKERN_ISA

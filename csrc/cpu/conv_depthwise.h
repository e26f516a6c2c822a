// Depthwise convolution: one filter a channel, so no sum over channels and nothing for the matrix kernels. channels_last:
// vectors of channels, four output columns at a time, each tap's weights loaded once for all four; taps that fall
// outside the image are skipped. NCHW: vectors of columns over a zero-padded copy of the plane, whose columns are
// parted by their residue modulo the stride so that every tap reads consecutive elements. Floor: memory.
#pragma once
#include "conv_pack.h"
#include "parallel.h"
#include "scratch.h"

namespace dlkern::cpu::DLKERN_ISA {

template <class T> inline bool is_depthwise(const Correlation<T>& z) {
  return z.source.channels == z.groups && z.out_channels == z.groups &&
         z.source.channels_last == z.output_channels_last;
}

namespace depthwise {

// A part [0, end - begin) of the taps lies inside [0, size) for output position i.
struct Range {
  int64_t begin, end;
};
inline Range inside(const int64_t* tap, int64_t taps, int64_t position, int64_t size) {
  Range r{0, taps};
  while (r.begin < r.end && position + tap[r.begin] < 0) ++r.begin;
  while (r.end > r.begin && position + tap[r.end - 1] >= size) --r.end;
  return r;
}

template <class T> inline Vec<T> load_lanes(const T* p, int count) {
  return count == kLanes<T> ? load(p) : load_partial<T>(p, count);
}
template <class T> inline void store_lanes(T* p, Vec<T> v, int count) {
  if (count == kLanes<T>)
    store(p, v);
  else
    store_partial<T>(p, v, count);
}

// ---- channels_last ----------------------------------------------------------------------------------------------

// COLUMNS output pixels, step apart, of one vector of channels; source points at the first one's tap 0 position.
template <int COLUMNS, class T, class A>
inline void columns_last(const Correlation<T>& z, const T* source, Range rows, Range columns, int64_t h, int64_t w,
                         int64_t source_step, const A* weights, int64_t weight_step, Vec<A> bias, T* out,
                         int64_t out_step, int count) {
  Vec<A> sum[COLUMNS] = {};
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    Vec<A> part[COLUMNS] = {};  // of a row of taps: shorter sums, smaller errors
    for (int64_t s = columns.begin; s < columns.end; ++s) {
      const T* from = source + ((h + z.tap_h[r]) * z.source.w + w + z.tap_w[s]) * z.source.channels;
      const Vec<A> weight = load(weights + (r * z.taps_w + s) * weight_step);
#pragma GCC unroll 4
      for (int i = 0; i < COLUMNS; ++i) part[i] += weight * load_lanes(from + i * source_step, count);
    }
    for (int i = 0; i < COLUMNS; ++i) sum[i] += part[i];
  }
  for (int i = 0; i < COLUMNS; ++i) store_lanes(out + i * out_step, sum[i] + bias, count);
}

template <class T> void correlate_last(const Correlation<T>& z) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t channels = z.groups, padded = ceil_div(channels, lanes) * lanes, taps = z.taps_h * z.taps_w;
  A* weights = scratch<A>(Slot::family_0, (taps + 1) * padded);  // [tap][channel], then the bias
  for (int64_t t = 0; t <= taps; ++t)
    for (int64_t c = 0; c < padded; ++c) {
      A value = 0;
      if (c < channels && t == taps) value = z.bias ? static_cast<A>(z.bias[c]) : A(0);
      if (c < channels && t < taps)
        value = static_cast<A>(z.weight[c * z.weight_group + z.kernel_h[t / z.taps_w] * z.weight_h +
                                        z.kernel_w[t % z.taps_w] * z.weight_w]);
      weights[t * padded + c] = value;
    }
  parallel_for(z.source.n * z.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / z.rows, i = row % z.rows, h = i * z.stride_h;
      const Range rows = inside(z.tap_h, z.taps_h, h, z.source.h);
      const T* source = z.source.data + image * z.source.h * z.source.w * channels;
      const int64_t step = z.step_w * channels, source_step = z.stride_w * channels;
      T* out = z.output + ((image * z.out_h + z.start_h + i * z.step_h) * z.out_w + z.start_w) * channels;
      for (int64_t q = 0; q < z.columns;) {
        const int64_t w = q * z.stride_w;
        const Range columns = inside(z.tap_w, z.taps_w, w, z.source.w);
        const bool four = q + 4 <= z.columns && columns.begin == 0 && columns.end == z.taps_w &&
                          w + 3 * z.stride_w + z.tap_w[z.taps_w - 1] < z.source.w;
        for (int64_t c = 0; c < channels; c += lanes) {
          const int count = static_cast<int>(smaller(lanes, channels - c));
          const Vec<A> bias = load(weights + taps * padded + c);
          if (four)
            columns_last<4>(z, source + c, rows, columns, h, w, source_step, weights + c, padded, bias,
                            out + q * step + c, step, count);
          else
            columns_last<1>(z, source + c, rows, columns, h, w, source_step, weights + c, padded, bias,
                            out + q * step + c, step, count);
        }
        q += four ? 4 : 1;
      }
    }
  });
}

// ---- NCHW -------------------------------------------------------------------------------------------------------

// Where a plane's rows, from first_row on, lie in a copy [row][residue of column][width]; column first_column + j is
// element j / stride of residue j % stride. Whole vectors may be read from any output column on.
struct Plane {
  int64_t first_row, rows, first_column, stride, width;
};

inline Plane plane_of(int64_t rows, int64_t columns, int64_t stride_h, int64_t stride_w, int64_t first_row,
                      int64_t last_row, int64_t first_column, int64_t last_column) {
  return Plane{first_row, (rows - 1) * stride_h + last_row - first_row + 1, first_column, stride_w,
               columns + (last_column - first_column) / stride_w + 5 * kVectorBytes / 4};
}

template <class T, class A> inline void copy_plane(const Plane& plane, const T* source, int64_t h, int64_t w, A* to) {
  for (int64_t i = 0; i < plane.rows; ++i) {
    const int64_t row = plane.first_row + i;
    for (int64_t residue = 0; residue < plane.stride; ++residue, to += plane.width) {
      if (row < 0 || row >= h) {
        for (int64_t j = 0; j < plane.width; ++j) to[j] = A(0);
        continue;
      }
      // Elements [begin, end) lie inside the image.
      const int64_t first = plane.first_column + residue;
      const int64_t begin = smaller(plane.width, first >= 0 ? 0 : ceil_div(-first, plane.stride));
      const int64_t end = first >= w ? begin : larger(begin, smaller(plane.width, (w - 1 - first) / plane.stride + 1));
      const T* from = source + row * w + first;
      for (int64_t j = 0; j < begin; ++j) to[j] = A(0);
      if (plane.stride == 1) {
        copy(from + begin, to + begin, end - begin);
      } else {
        for (int64_t j = begin; j < end; ++j) to[j] = static_cast<A>(from[j * plane.stride]);
      }
      for (int64_t j = end; j < plane.width; ++j) to[j] = A(0);
    }
  }
}

// Offset in the copy of a tap, relative to the output position's.
inline int64_t tap_offset(const Plane& plane, int64_t tap_h, int64_t tap_w) {
  const int64_t column = tap_w - plane.first_column;
  return ((tap_h - plane.first_row) * plane.stride + column % plane.stride) * plane.width + column / plane.stride;
}

template <int VECTORS, class T, class A>
inline void row_planar(const A* from, const int64_t* offsets, const A* weights, int64_t taps_h, int64_t taps_w,
                       A bias, T* out, int64_t count, int64_t step) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> sum[VECTORS] = {};
  for (int64_t r = 0; r < taps_h; ++r) {
    Vec<A> part[VECTORS] = {};  // of a row of taps: shorter sums, smaller errors
    for (int64_t s = 0; s < taps_w; ++s) {
      const Vec<A> weight = broadcast<A>(*weights++);
      const A* at = from + *offsets++;
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) part[v] += weight * load(at + v * lanes);
    }
    for (int v = 0; v < VECTORS; ++v) sum[v] += part[v];
  }
  for (int v = 0; v < VECTORS; ++v) sum[v] += bias;
  for (int64_t v = 0; v * lanes < count; ++v) {
    const int64_t part = smaller(lanes, count - v * lanes);
    if (step == 1) {
      store_lanes(out + v * lanes, sum[v], static_cast<int>(part));
    } else {
      for (int64_t j = 0; j < part; ++j) out[(v * lanes + j) * step] = static_cast<T>(sum[v][j]);
    }
  }
}

template <class T> void correlate_planar(const Correlation<T>& z) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t taps = z.taps_h * z.taps_w;
  const Plane plane = plane_of(z.rows, z.columns, z.stride_h, z.stride_w, z.tap_h[0], z.tap_h[z.taps_h - 1],
                               z.tap_w[0], z.tap_w[z.taps_w - 1]);
  int64_t* offsets = scratch<int64_t>(Slot::family_0, taps);
  for (int64_t t = 0; t < taps; ++t) offsets[t] = tap_offset(plane, z.tap_h[t / z.taps_w], z.tap_w[t % z.taps_w]);
  parallel_for(z.source.n * z.groups, 1, [&](int64_t begin, int64_t end) {
    A* weights = scratch<A>(Slot::family_2, taps);
    A* copied = scratch<A>(Slot::family_1, plane.rows * plane.stride * plane.width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i % z.groups;
      for (int64_t t = 0; t < taps; ++t)
        weights[t] = static_cast<A>(z.weight[c * z.weight_group + z.kernel_h[t / z.taps_w] * z.weight_h +
                                             z.kernel_w[t % z.taps_w] * z.weight_w]);
      const A bias = z.bias ? static_cast<A>(z.bias[c]) : A(0);
      copy_plane(plane, z.source.data + i * z.source.h * z.source.w, z.source.h, z.source.w, copied);
      for (int64_t row = 0; row < z.rows; ++row) {
        const A* from = copied + row * z.stride_h * plane.stride * plane.width;
        T* out = z.output + (i * z.out_h + z.start_h + row * z.step_h) * z.out_w + z.start_w;
        for (int64_t q = 0; q < z.columns; q += 4 * lanes) {
          const int64_t count = smaller(4 * lanes, z.columns - q);
          if (count > 2 * lanes)
            row_planar<4>(from + q, offsets, weights, z.taps_h, z.taps_w, bias, out + q * z.step_w, count, z.step_w);
          else if (count > lanes)
            row_planar<2>(from + q, offsets, weights, z.taps_h, z.taps_w, bias, out + q * z.step_w, count, z.step_w);
          else
            row_planar<1>(from + q, offsets, weights, z.taps_h, z.taps_w, bias, out + q * z.step_w, count, z.step_w);
        }
      }
    }
  });
}

// ---- Gradient of the weight -------------------------------------------------------------------------------------

// sums[t] = sum over rows and columns of y[row][column] x[row][column + offsets[t]], for TAPS taps; rows of y are
// zero beyond their columns. A row's sum is added to a whole image's in double precision.
template <int TAPS, class A>
void planar_taps(const A* y, int64_t y_row, const A* x, int64_t x_row, int64_t rows, int64_t vectors,
                 const int64_t* offsets, double* sums) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t row = 0; row < rows;) {
    Vec<A> sum[TAPS] = {};
    const int64_t stop = smaller(rows, row + larger(1, 32 / vectors));
    for (; row < stop; ++row)
      for (int64_t v = 0; v < vectors; ++v) {
        const Vec<A> value = load(y + row * y_row + v * lanes);
        const A* from = x + row * x_row + v * lanes;
#pragma GCC unroll 9
        for (int t = 0; t < TAPS; ++t) sum[t] += value * load(from + offsets[t]);
      }
    for (int t = 0; t < TAPS; ++t) sums[t] += static_cast<double>(reduce_add(sum[t]));
  }
}

template <class T> void weight_planar(const ConvBackwardWeightArgs<T>& args) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const ConvShape& z = args.shape;
  const int64_t taps = z.r * z.s, vectors = ceil_div(z.q, lanes), y_row = vectors * lanes;
  const Plane plane = plane_of(z.p, z.q, z.stride_h, z.stride_w, -z.pad_h, (z.r - 1) * z.dilation_h - z.pad_h,
                               -z.pad_w, (z.s - 1) * z.dilation_w - z.pad_w);
  const int64_t x_row = z.stride_h * plane.stride * plane.width;
  int64_t* offsets = scratch<int64_t>(Slot::family_0, taps);
  for (int64_t t = 0; t < taps; ++t)
    offsets[t] = tap_offset(plane, t / z.s * z.dilation_h - z.pad_h, t % z.s * z.dilation_w - z.pad_w);
  parallel_for(z.c, 1, [&](int64_t begin, int64_t end) {
    A* x = scratch<A>(Slot::family_1, plane.rows * plane.stride * plane.width);
    A* y = scratch<A>(Slot::family_2, z.p * y_row);
    double* sums = scratch<double>(Slot::family_3, taps);
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t t = 0; t < taps; ++t) sums[t] = 0;
      for (int64_t n = 0; n < z.n; ++n) {
        copy_plane(plane, args.input + (n * z.c + c) * z.h * z.w, z.h, z.w, x);
        const T* grad = args.grad_output + (n * z.c + c) * z.p * z.q;
        for (int64_t p = 0; p < z.p; ++p) {
          copy(grad + p * z.q, y + p * y_row, z.q);
          for (int64_t q = z.q; q < y_row; ++q) y[p * y_row + q] = A(0);
        }
        int64_t t = 0;
        for (; t + 9 <= taps; t += 9) planar_taps<9>(y, y_row, x, x_row, z.p, vectors, offsets + t, sums + t);
        for (; t + 4 <= taps; t += 4) planar_taps<4>(y, y_row, x, x_row, z.p, vectors, offsets + t, sums + t);
        for (; t < taps; ++t) planar_taps<1>(y, y_row, x, x_row, z.p, vectors, offsets + t, sums + t);
      }
      for (int64_t t = 0; t < taps; ++t) args.grad_weight[c * taps + t] = static_cast<T>(sums[t]);
    }
  });
}

// One row of grad_output times one row of the input, a vector of channels: four independent sums.
template <class T>
inline Vec<acc_t<T>> row_product(const T* y, int64_t y_step, const T* x, int64_t x_step, int64_t columns, int count) {
  using V = Vec<acc_t<T>>;
  V sum[4] = {};
  int64_t q = 0;
  for (; q + 4 <= columns; q += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      sum[i] += load_lanes(y + (q + i) * y_step, count) * load_lanes(x + (q + i) * x_step, count);
  for (; q < columns; ++q) sum[0] += load_lanes(y + q * y_step, count) * load_lanes(x + q * x_step, count);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class T> void weight_last(const ConvBackwardWeightArgs<T>& args) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const ConvShape& z = args.shape;
  const int64_t taps = z.r * z.s;
  parallel_for(ceil_div(z.c, lanes), 1, [&](int64_t begin, int64_t end) {
    A* sums = scratch<A>(Slot::family_1, 2 * taps * lanes);  // of this image; of those before
    for (int64_t v = begin; v < end; ++v) {
      const int64_t c = v * lanes;
      const int count = static_cast<int>(smaller(lanes, z.c - c));
      A* total = sums + taps * lanes;
      for (int64_t i = 0; i < taps * lanes; ++i) total[i] = A(0);
      for (int64_t n = 0; n < z.n; ++n) {
        for (int64_t i = 0; i < taps * lanes; ++i) sums[i] = A(0);
        for (int64_t p = 0; p < z.p; ++p)
          for (int64_t r = 0; r < z.r; ++r) {
            const int64_t h = p * z.stride_h - z.pad_h + r * z.dilation_h;
            if (h < 0 || h >= z.h) continue;
            for (int64_t s = 0; s < z.s; ++s) {
              const int64_t w = s * z.dilation_w - z.pad_w;  // of output column 0
              const int64_t first = w >= 0 ? 0 : ceil_div(-w, z.stride_w);
              const int64_t stop = w >= z.w ? 0 : smaller(z.q, (z.w - 1 - w) / z.stride_w + 1);
              if (first >= stop) continue;
              const T* y = args.grad_output + ((n * z.p + p) * z.q + first) * z.c + c;
              const T* x = args.input + ((n * z.h + h) * z.w + w + first * z.stride_w) * z.c + c;
              A* sum = sums + (r * z.s + s) * lanes;
              store(sum, load(sum) + row_product(y, z.c, x, z.stride_w * z.c, stop - first, count));
            }
          }
        for (int64_t i = 0; i < taps * lanes; i += lanes) store(total + i, load(total + i) + load(sums + i));
      }
      for (int64_t t = 0; t < taps; ++t)
        for (int j = 0; j < count; ++j) args.grad_weight[(c + j) * taps + t] = static_cast<T>(total[t * lanes + j]);
    }
  });
}

}  // namespace depthwise

template <class T> inline void correlate_depthwise(const Correlation<T>& z) {
  if (z.source.channels_last)
    depthwise::correlate_last(z);
  else
    depthwise::correlate_planar(z);
}

template <class T> inline bool is_depthwise(const ConvBackwardWeightArgs<T>& args) {
  return args.shape.c == args.shape.groups && args.shape.k == args.shape.groups &&
         args.input_channels_last == args.grad_output_channels_last;
}
template <class T> inline void depthwise_weight(const ConvBackwardWeightArgs<T>& args) {
  if (args.input_channels_last)
    depthwise::weight_last(args);
  else
    depthwise::weight_planar(args);
}

}  // namespace dlkern::cpu::DLKERN_ISA

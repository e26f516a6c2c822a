// What convolution's kernels read, laid out for them: windows of an image, zero-padded, as [row][column][channel]; and
// weights as [panel of output channels][tap][input channel][the panel's width]. Both are made anew in every call, but for
// weights that a caller had packed for good (conv2d_pack).
#pragma once
#include "conv_kernel.h"
#include "transpose.h"

namespace dlkern::cpu::DLKERN_ISA {

// A batch of images, dense in either layout.
template <class T> struct Images {
  const T* data;
  bool channels_last;
  int64_t n, channels, h, w;
};

// output[n, j, start + i * step] = bias[j] + sum over taps t and channels c of
//   source[n, c, i * stride + tap[t]] weight[j, c, kernel[t]], in both dimensions; tap ascending; source 0 outside.
template <class T> struct Correlation {
  Images<T> source;
  T* output;
  bool output_channels_last;
  int64_t out_channels, out_h, out_w;
  int64_t rows, columns;  // i < rows, columns
  int64_t start_h, start_w, step_h, step_w, stride_h, stride_w;
  int64_t taps_h, taps_w;
  const int64_t *tap_h, *tap_w, *kernel_h, *kernel_w;
  const T* weight;
  int64_t weight_out, weight_in, weight_h, weight_w, weight_group;  // strides
  int64_t kernel_size;  // elements of one channel's filter
  const T* bias;
  int64_t groups;
  const acc_t<T>* packed;  // the whole packed weight, or null
  const T* residual;  // as in ConvForwardArgs
  int activation;
};

// What a direct computation multiplies in one dimension: pairs of a tap and an output that sees it, where tap t of output i
// sees input first + t * dilation + i * stride, of `size`.
inline int64_t count_seen(int64_t taps, int64_t first, int64_t dilation, int64_t outputs, int64_t stride,
                          int64_t size) {
  int64_t count = 0;
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t i = 0; i < outputs; ++i) {
      const int64_t at = first + t * dilation + i * stride;
      count += at >= 0 && at < size;
    }
  return count;
}

// Rows first_row + i * step_h and columns first_column + j * step_w of an image; zero where there is none.
struct Window {
  int64_t image, first_row, rows, step_h, first_column, columns, step_w;
};

// Channels [c0, c0 + channels) of a window to dst[i * dst_row + j * dst_pixel + c]; dst_pixel >= channels.
template <class T, class A>
inline void copy_window(const Images<T>& x, const Window& v, int64_t c0, int64_t channels, A* dst, int64_t dst_row,
                        int64_t dst_pixel) {
  // Columns [begin, end) of the window lie inside the image.
  const int64_t begin = smaller(v.columns, v.first_column >= 0 ? 0 : ceil_div(-v.first_column, v.step_w));
  const int64_t end =
      v.first_column >= x.w ? begin : larger(begin, smaller(v.columns, (x.w - 1 - v.first_column) / v.step_w + 1));
  const int64_t plane = x.h * x.w;
  const auto zero = [&](A* row, int64_t from, int64_t to) {
    if (dst_pixel == channels) {
      std::memset(static_cast<void*>(row + from * dst_pixel), 0,
                  sizeof(A) * static_cast<size_t>((to - from) * channels));
    } else {
      for (int64_t j = from; j < to; ++j)
        for (int64_t c = 0; c < channels; ++c) row[j * dst_pixel + c] = A(0);
    }
  };
  for (int64_t i = 0; i < v.rows; ++i) {
    A* row = dst + i * dst_row;
    const int64_t h = v.first_row + i * v.step_h;
    if (h < 0 || h >= x.h || begin == end) {
      zero(row, 0, v.columns);
      continue;
    }
    zero(row, 0, begin);
    zero(row, end, v.columns);
    const int64_t w = v.first_column + begin * v.step_w;
    A* to = row + begin * dst_pixel;
    if (x.channels_last) {
      const T* from = x.data + ((v.image * x.h + h) * x.w + w) * x.channels + c0;
      const int64_t step = v.step_w * x.channels;
      if (step == channels && dst_pixel == channels) {
        copy(from, to, (end - begin) * channels);
      } else {
        for (int64_t j = 0; j < end - begin; ++j) copy(from + j * step, to + j * dst_pixel, channels);
      }
    } else {
      const T* from = x.data + (v.image * x.channels + c0) * plane + h * x.w + w;
      if (v.step_w == 1) {
        transpose(from, plane, channels, end - begin, to, dst_pixel);
      } else {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t j = 0; j < end - begin; ++j)
            to[j * dst_pixel + c] = static_cast<A>(static_cast<acc_t<T>>(from[c * plane + j * v.step_w]));
      }
    }
  }
}

// Where element (out, in, tap) of a group's weight lies: data + out * out_stride + in * in_stride + the tap's offset.
template <class T> struct Filter {
  const T* data;
  int64_t out_stride, in_stride;
  int64_t in_channels;
  const int64_t* taps;  // offset of each tap
  int64_t tap_count;
  // For transposing: element e < run of a filter's consecutive memory (of one input channel's, where by_channel)
  // belongs in row destination[e] (plus the input channel), or nowhere where that is negative.
  const int64_t* destination;
  int64_t run;
  bool by_channel;
};

// The filter of a correlation with `channels` channels of each group: taps in its order. taps and table are memory, of
// taps_h * taps_w and kernel_size * channels elements.
template <class T>
inline Filter<T> describe_filter(const Correlation<T>& z, int64_t channels, int64_t* taps, int64_t* table) {
  Filter<T> f{};
  f.out_stride = z.weight_out;
  f.in_stride = z.weight_in;
  f.in_channels = channels;
  f.tap_count = z.taps_h * z.taps_w;
  f.by_channel = z.weight_in > z.weight_out;
  f.run = z.kernel_size * (f.by_channel ? 1 : channels);
  for (int64_t e = 0; e < f.run; ++e) table[e] = -1;
  for (int64_t r = 0; r < z.taps_h; ++r)
    for (int64_t s = 0; s < z.taps_w; ++s) {
      const int64_t t = r * z.taps_w + s, at = z.kernel_h[r] * z.weight_h + z.kernel_w[s] * z.weight_w;
      taps[t] = at;
      if (f.out_stride == 1) continue;
      for (int64_t c = 0; c < (f.by_channel ? 1 : channels); ++c) table[at + c * z.weight_in] = t * channels + c;
    }
  f.taps = taps;
  f.destination = table;
  return f;
}

// Output channels [first, first + count) as packed[tap * in_channels + in][width], zero beyond count.
template <class T, class A>
inline void pack_filter(const Filter<T>& f, int64_t first, int64_t count, int64_t width, A* packed) {
  const T* data = f.data + first * f.out_stride;
  if (f.out_stride == 1) {
    for (int64_t t = 0; t < f.tap_count; ++t)
      for (int64_t c = 0; c < f.in_channels; ++c, packed += width) {
        copy(data + f.taps[t] + c * f.in_stride, packed, count);
        for (int64_t j = count; j < width; ++j) packed[j] = A(0);
      }
    return;
  }
  const int64_t outer = f.by_channel ? f.in_channels : 1;
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    for (int64_t c = 0; c < outer; ++c)
      for (int64_t j = 0; j < width; j += 8) {
        const int64_t rows = larger(0, smaller(8, count - j));
        transpose_columns(data + c * f.in_stride + j * f.out_stride, f.out_stride, rows, f.run,
                          [&](int64_t e, __m256 v) {
                            if (f.destination[e] >= 0)
                              transpose_detail::store8(packed + (f.destination[e] + c) * width + j, v);
                          });
      }
    return;
  }
#endif
  for (int64_t c = 0; c < outer; ++c)
    for (int64_t e = 0; e < f.run; ++e) {
      if (f.destination[e] < 0) continue;
      A* row = packed + (f.destination[e] + c) * width;
      for (int64_t j = 0; j < width; ++j)
        row[j] = j < count ? static_cast<A>(static_cast<acc_t<T>>(data[c * f.in_stride + e + j * f.out_stride])) : A(0);
    }
}

}  // namespace dlkern::cpu::DLKERN_ISA

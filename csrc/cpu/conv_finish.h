// The last steps of a convolution, block by block while they are in the cache: sums to the output in its own layout, and
// activation(output + residual).
#pragma once
#include "activation.h"
#include "conv.h"
#include "conv_pack.h"

namespace dlkern::cpu::DLKERN_ISA {

// out[i] = activation(out[i] + residual[i]) for `count` neighbouring elements; residual may be null.
template <class T> inline void finish_run(T* out, const T* residual, int64_t count, int activation) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t i = 0; i < count; i += lanes) {
    const int some = static_cast<int>(count - i < lanes ? count - i : lanes);
    Vec<T> value = some == lanes ? load(out + i) : load_partial<T>(out + i, some);
    if (residual) value += some == lanes ? load(residual + i) : load_partial<T>(residual + i, some);
    value = activate(value, activation);
    if (some == lanes)
      store(out + i, value);
    else
      store_partial<T>(out + i, value, some);
  }
}

// A finished panel of a block's pixels, sums[pixel][width], to channels [first, first + count) of the output.
template <class T, class A>
inline void write_out(const Correlation<T>& z, const A* sums, int64_t width, int64_t first, int64_t count,
                      int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t columns) {
  const int64_t plane = z.out_h * z.out_w;
  for (int64_t row = row_begin; row < row_end;) {
    const int64_t image = row / z.rows, i = row % z.rows;
    const int64_t h = z.start_h + i * z.step_h, w = z.start_w + column_begin * z.step_w;
    int64_t together = 1;  // rows that follow each other in memory
    if (columns == z.out_w && z.step_h == 1 && z.step_w == 1) together = smaller(row_end - row, z.rows - i);
    const int64_t pixels = together * columns;
    if (z.output_channels_last) {
      T* to = z.output + ((image * z.out_h + h) * z.out_w + w) * z.out_channels + first;
      for (int64_t p = 0; p < pixels; ++p) copy(sums + p * width, to + p * z.step_w * z.out_channels, count);
    } else {
      T* to = z.output + (image * z.out_channels + first) * plane + h * z.out_w + w;
      if (z.step_w == 1) {
        transpose(sums, width, pixels, count, to, plane);
      } else {
        for (int64_t j = 0; j < count; ++j)
          for (int64_t p = 0; p < pixels; ++p) to[j * plane + p * z.step_w] = static_cast<T>(sums[p * width + j]);
      }
    }
    sums += pixels * width;
    row += together;
  }
}

// Residual and activation for channels [first, first + count) of a block's pixels. Only of outputs without steps.
template <class T>
inline void finish_block(const Correlation<T>& z, int64_t first, int64_t count, int64_t row_begin, int64_t row_end,
                         int64_t column_begin, int64_t columns) {
  const auto finish = [&](int64_t at, int64_t length) {
    finish_run(z.output + at, z.residual ? z.residual + at : nullptr, length, z.activation);
  };
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t image = row / z.rows, h = row % z.rows;
    if (!z.output_channels_last) {
      for (int64_t k = first; k < first + count; ++k)
        finish(((image * z.out_channels + k) * z.out_h + h) * z.out_w + column_begin, columns);
    } else {
      const int64_t at = ((image * z.out_h + h) * z.out_w + column_begin) * z.out_channels;
      if (count == z.out_channels)
        finish(at, columns * count);
      else
        for (int64_t q = 0; q < columns; ++q) finish(at + q * z.out_channels + first, count);
    }
  }
}

}  // namespace dlkern::cpu::DLKERN_ISA

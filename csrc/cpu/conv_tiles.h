// Convolution on AMX's tiles (tiles.h): how images are laid out for them.
//
// A cell is 64 bytes: 32 channels of one pixel, one bfloat16 part of each. A word of it holds channels c and c + 16 or,
// of bfloat16 itself, c and c + 1: a cell is then what lies in memory anyway (kHasPairs). Cells of a window lie in
// planes, one for each step of 32 channels, part, and phase: phase (a, b) holds the source's rows a and columns b
// modulo the strides, so that neighbouring output pixels read neighbouring cells, whatever the stride. A tile's left
// side is then 16 cells as they lie, moved by the tap, and nothing is copied for each tap. Output pixels are numbered
// as the cells are: rows follow each other at the planes' pitch, images at theirs, with as many columns and rows of
// zeros between them as the taps reach beyond (a row's right border is the next one's left border). Sums at the places
// between are made in vain.
//
// Where pixels have few channels (first layers), a cell holds all that a row of taps reads instead: `merged`.
#pragma once
#include "conv.h"
#include "conv_pack.h"
#include "scratch.h"
#include "tiles.h"

namespace dlkern::cpu::DLKERN_ISA {

constexpr int64_t kCell = 64;
constexpr int64_t kMostTaps = 32;  // of one dimension
constexpr int64_t kCellBytes = 640 * 1024;  // of the second-level cache, for cells
constexpr int64_t kStripBytes = 384 * 1024;  // of it, for weights that all meet a few pixels
constexpr int64_t kMostPositions = 1536;  // of a block
constexpr int64_t kMergedChannels = 16;  // fewer are merged
constexpr int64_t kConvTileWork = 1 << 19;

// Whether words of cells and of weights' strips hold neighbouring channels.
template <class T> constexpr bool kHasPairs = kParts<T> == 1;

// Whether to multiply by tiles: multiplications, output channels of a group, values of a cell (or channels of a row of
// taps). Small sums of float are as exact as a library's by vectors only, and narrow ones as fast.
template <class T> inline bool tiles_pay(int64_t work, int64_t outputs, int64_t depth) {
  const bool wide = sizeof(T) == 4;
  return work >= (wide ? 8 * kConvTileWork : kConvTileWork) && outputs >= (wide ? kTile : 3) &&
         depth >= (wide ? kTile : kTile / 2) && uses_tiles<T>();
}
// Groups that both tiles and conv_grouped.cpp can do.
template <class T> inline bool tiles_over_groups(const ConvShape& z) {
  return sizeof(T) == 2 && z.c / z.groups >= kTile && uses_tiles<T>();
}

// One dimension's taps: tap t reads the source at stride * (position + step[t]) + residue[phase[t]].
struct Axis {
  int64_t stride, low, high, phases;  // low, high: of step
  int64_t residue[kMostTaps], phase[kMostTaps], step[kMostTaps];
};
inline Axis find_axis(const int64_t* tap, int64_t taps, int64_t stride) {
  Axis axis{};
  axis.stride = stride;
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t residue = (tap[t] % stride + stride) % stride, step = (tap[t] - residue) / stride;
    int64_t p = 0;
    while (p < axis.phases && axis.residue[p] != residue) ++p;
    if (p == axis.phases) axis.residue[axis.phases++] = residue;
    axis.phase[t] = p;
    axis.step[t] = step;
    axis.low = t == 0 ? step : smaller(axis.low, step);
    axis.high = t == 0 ? step : larger(axis.high, step);
  }
  return axis;
}

// Output pixels [row, row + rows) x [column, column + columns) of images [image, image + images): of one image, or all
// rows of some.
struct Block {
  int64_t image, images, row, rows, column, columns;
};

struct Field {
  Axis h, w;
  bool merged, only_block;  // only_block: what lies in no block's columns is zero
  int64_t first_column, column_stride, taps_w;  // merged: what the first tap of a row reads
  int64_t channels;  // of a pixel, in a group
  int64_t depth, steps;  // values of a cell's pixel (channels, or those of a row of taps), in steps of 32
  int64_t taps;  // a cell each
  int64_t rows, columns;  // output pixels of an image
  int64_t image_pitch, pitch;  // rows from one image to the next, cells from one row to the next
  int64_t block_images, block_rows, block_columns;
  int64_t image_blocks, row_blocks, column_blocks;
  int64_t plane;  // bytes

  int64_t blocks() const { return image_blocks * row_blocks * column_blocks; }
  int64_t phases() const { return h.phases * w.phases; }
  Block block(int64_t i, int64_t all_images) const {
    const int64_t column = i % column_blocks * block_columns, row = i / column_blocks % row_blocks * block_rows,
                  image = i / (column_blocks * row_blocks) * block_images;
    return {image,  smaller(block_images, all_images - image), row, smaller(block_rows, rows - row),
            column, smaller(block_columns, columns - column)};
  }
  int64_t positions(const Block& b) const { return ((b.images - 1) * image_pitch + b.rows - 1) * pitch + b.columns; }
  // Bytes from a step's first plane to where tap t (in order of rows) of position 0 lies.
  int64_t tap_offset(int64_t t) const {
    const int64_t r = merged ? t : t / taps_w, s = merged ? 0 : t % taps_w;
    return (h.phase[r] * w.phases + w.phase[s]) * plane + ((h.step[r] - h.low) * pitch + w.step[s] - w.low) * kCell;
  }
};

// Correlation's geometry, as in Correlation<T>. Where `outputs` is not 0, of the weight's gradient: a block then takes one
// step of cells at a time, in three copies, and strips of so many output channels.
inline Field plan_field(int64_t images, int64_t rows, int64_t columns, int64_t channels, int64_t source_h,
                        int64_t source_w, const int64_t* tap_h, int64_t taps_h, int64_t stride_h, const int64_t* tap_w,
                        int64_t taps_w, int64_t stride_w, int64_t parts, int64_t outputs) {
  Field f{};
  f.rows = rows, f.columns = columns, f.channels = channels, f.taps_w = taps_w;
  f.h = find_axis(tap_h, taps_h, stride_h);
  f.merged = channels < kMergedChannels && taps_w > 1;
  for (int64_t s = 1; s < taps_w; ++s) f.merged = f.merged && tap_w[s] == tap_w[s - 1] + 1;
  const int64_t zero = 0;
  f.w = f.merged ? find_axis(&zero, 1, 1) : find_axis(tap_w, taps_w, stride_w);
  f.first_column = tap_w[0], f.column_stride = stride_w;
  f.taps = f.merged ? taps_h : taps_h * taps_w;
  f.depth = f.merged ? taps_w * channels : channels;
  f.steps = ceil_div(f.depth, kTileStep);

  // Rows (columns) of a phase that exist and are read, and how many apart images (rows) then lie.
  const auto apart = [](const Axis& axis, int64_t positions, int64_t size) {
    const int64_t read = positions + larger(axis.high, 0);
    return larger(read, smaller(read, ceil_div(size, axis.stride)) - smaller(axis.low, 0));
  };
  f.image_pitch = apart(f.h, rows, source_h);
  f.pitch = f.merged ? columns : apart(f.w, columns, source_w);
  const int64_t span_h = f.h.high - f.h.low, span_w = f.w.high - f.w.low;
  const int64_t bytes = parts * (outputs ? 3 * f.phases() * kCell + 2 * ceil_div(outputs, kStrip) * kStrip
                                         : f.steps * f.phases() * kCell);
  const int64_t most = larger(kCellBytes / bytes, 4 * kStrip);
  f.block_columns = columns;
  f.column_blocks = 1;
  if (f.pitch * (span_h + 1) > most || f.pitch > kMostPositions) {
    f.column_blocks = ceil_div(columns, smaller(kMostPositions, larger(kStrip, most / (span_h + 1) - span_w)));
    f.block_columns = ceil_div(columns, f.column_blocks);
    f.column_blocks = ceil_div(columns, f.block_columns);
    if (f.column_blocks > 1) f.pitch = f.block_columns + span_w;
  }
  const int64_t fit = larger(1, smaller(most / f.pitch - span_h, kMostPositions / f.pitch));
  f.row_blocks = ceil_div(rows, fit);
  f.block_rows = ceil_div(rows, f.row_blocks);
  f.row_blocks = ceil_div(rows, f.block_rows);
  f.block_images = f.row_blocks > 1 || f.column_blocks > 1 ? 1 : smaller(images, (fit - rows) / f.image_pitch + 1);
  f.image_blocks = ceil_div(images, f.block_images);
  f.block_images = ceil_div(images, f.image_blocks);
  f.image_blocks = ceil_div(images, f.block_images);
  const Block whole{0, f.block_images, 0, f.block_rows, 0, f.block_columns};
  f.plane = (ceil_div(f.positions(whole), kStrip) * kStrip + kStrip + (span_h + 1) * f.pitch + span_w) * kCell;
  return f;
}

#if DLKERN_TILE_CODE

// The first `count` (32 at most) of two vectors, rounded, to neighbouring elements.
template <class T> [[gnu::always_inline]] inline void store_pair(T* to, vfloat low, vfloat high, int64_t count) {
#if defined(__AVX512F__) && !defined(DLKERN_VECTOR_BYTES)
  if constexpr (sizeof(T) == 2) {
    __m512i both;
    if constexpr (kParts<T> == 1)  // every CPU with tiles has this instruction
      asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(low), "v"(high));
    else
      both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph((__m512)low, _MM_FROUND_TO_NEAREST_INT)),
                                _mm512_cvtps_ph((__m512)high, _MM_FROUND_TO_NEAREST_INT), 1);
    _mm512_mask_storeu_epi16(to, count >= kStrip ? ~0u : (1u << count) - 1, both);
    return;
  }
#endif
  store_some(to, low, count);
  if (count > kTile) store_some(to + kTile, high, count - kTile);
}

inline void zero_cells(char* to, int64_t count) {
  if (count > 0) std::memset(to, 0, static_cast<size_t>(count * kCell));
}

// `pixels` cells of up to 32 channels, a part `apart` bytes from the next, of pixels that lie as [pixel][channel],
// `pixel` elements apart.
template <class T>
inline void cells_of_pixels(const T* from, int64_t pixel, int64_t pixels, int64_t channels, char* to, int64_t apart) {
  using namespace tiles_detail;
  for (int64_t i = 0; i < pixels; ++i, from += pixel, to += kCell) {
    if constexpr (kHasPairs<T>) {
      const vuint32 cell = load_pairs(from, channels);
      std::memcpy(to, &cell, sizeof cell);
    } else if (channels >= kTileStep) {
      store_words<kParts<T>>(load(from), load(from + kTile), to, apart);
    } else {
      store_words<kParts<T>>(load_some(from, channels),
                             channels > kTile ? load_some(from + kTile, channels - kTile) : vfloat{}, to, apart);
    }
  }
}

// The same, of pixels that lie as [channel][pixel], channels `plane` elements apart.
template <class T>
inline void cells_of_planes(const T* from, int64_t plane, int64_t pixels, int64_t channels, char* to, int64_t apart) {
  using namespace tiles_detail;
  for (int64_t j = 0; j < pixels; j += kTile, from += kTile, to += kTile * kCell) {
    const int64_t some = smaller(kTile, pixels - j);
    const bool whole = some == kTile && channels >= kTileStep;
    // a and b: the channels of words' halves.
    constexpr int64_t every = kHasPairs<T> ? 2 : 1, from_a_to_b = kHasPairs<T> ? 1 : kTile;
    const T* high = from + from_a_to_b * plane;
    vfloat a[kTile], b[kTile];
    if (whole) {
#pragma GCC unroll 16
      for (int64_t r = 0; r < kTile; ++r) a[r] = load(from + every * r * plane), b[r] = load(high + every * r * plane);
    } else {
      for (int64_t r = 0; r < kTile; ++r)
        a[r] = load_row(from, plane, every * r, channels, some),
        b[r] = load_row(high, plane, every * r, channels - from_a_to_b, some);
    }
    if constexpr (kHasPairs<T>) {  // words are turned, not their halves
#pragma GCC unroll 16
      for (int64_t r = 0; r < kTile; ++r) a[r] = (vfloat)(((vuint32)a[r] >> 16) | ((vuint32)b[r] & 0xffff0000u));
      transpose(a);
      for (int64_t r = 0; r < some; ++r) store(reinterpret_cast<float*>(to + r * kCell), a[r]);
    } else {
      transpose(a);
      transpose(b);
      for (int64_t r = 0; r < some; ++r) store_words<kParts<T>>(a[r], b[r], to + r * kCell, apart);
    }
  }
}

// One row of cells (of all columns' phases) of source row h; `to` is its first cell of the first step, part and column
// phase, `line` room for a row of cells of all parts, or of floats.
template <class T>
inline void copy_cell_row(const Images<T>& x, const Field& f, const Block& b, int64_t image, int64_t h, int64_t c0,
                          int64_t step_begin, int64_t step_end, char* to, char* line) {
  constexpr int64_t parts = kParts<T>;
  const int64_t apart = f.phases() * f.plane, step_bytes = parts * apart;
  if (f.merged) {
    float* row = reinterpret_cast<float*>(line);
    const Window window{
        image, h, 1, 1, b.column * f.column_stride + f.first_column, (b.columns - 1) * f.column_stride + f.taps_w, 1};
    copy_window(x, window, c0, f.channels, row, 0, f.channels);
    for (int64_t s = step_begin; s < step_end; ++s, to += step_bytes) {
      const int64_t count = f.depth - s * kTileStep;
      for (int64_t j = 0; j < b.columns; ++j) {
        const float* from = row + j * f.column_stride * f.channels + s * kTileStep;
        const vfloat low = load_some(from, count),
                     high = count > kTile ? load_some(from + kTile, count - kTile) : vfloat{};
        if constexpr (kHasPairs<T>)
          store_pair(reinterpret_cast<T*>(to + j * kCell), low, high, kStrip);
        else
          tiles_detail::store_words<parts>(low, high, to + j * kCell, apart);
      }
      for (int64_t part = 0; part < parts; ++part)
        zero_cells(to + part * apart + b.columns * kCell, f.pitch - b.columns);
    }
    return;
  }
  const int64_t stride = f.w.stride, plane = x.h * x.w, most = f.only_block ? b.columns : f.pitch;
  for (int64_t s = step_begin; s < step_end; ++s, to += step_bytes) {
    const int64_t count = smaller(kTileStep, f.channels - s * kTileStep), c = c0 + s * kTileStep;
    // With one phase of planes, cells are made where they go; otherwise in `line`, of the columns from `from` on.
    const T* image_row = x.data + (x.channels_last ? ((image * x.h + h) * x.w) * x.channels + c
                                                   : (image * x.channels + c) * plane + h * x.w);
    int64_t from = 0, line_apart = 0;
    if (!x.channels_last && stride > 1) {
      from = larger(0, (b.column + f.w.low) * stride);
      const int64_t end = smaller(x.w, (b.column + f.pitch + f.w.low) * stride);
      line_apart = larger(0, end - from) * kCell;
      cells_of_planes(image_row + from, plane, end - from, count, line, line_apart);
    }
    for (int64_t p = 0; p < f.w.phases; ++p) {
      char* cells = to + p * f.plane;
      // Cell i holds column first + i * stride.
      const int64_t first = (b.column + f.w.low) * stride + f.w.residue[p];
      const int64_t begin = smaller(f.pitch, first >= 0 ? 0 : ceil_div(-first, stride));
      const int64_t end = first >= x.w ? begin : larger(begin, smaller(most, (x.w - 1 - first) / stride + 1));
      for (int64_t part = 0; part < parts; ++part) {
        zero_cells(cells + part * apart, begin);
        zero_cells(cells + part * apart + end * kCell, f.pitch - end);
      }
      const int64_t w = first + begin * stride;
      if (x.channels_last) {
        cells_of_pixels(image_row + w * x.channels, stride * x.channels, end - begin, count, cells + begin * kCell,
                        apart);
      } else if (stride == 1) {
        cells_of_planes(image_row + w, plane, end - begin, count, cells + begin * kCell, apart);
      } else {
        for (int64_t part = 0; part < parts; ++part)
          for (int64_t i = begin; i < end; ++i)
            std::memcpy(cells + part * apart + i * kCell,
                        line + part * line_apart + (w - from + (i - begin) * stride) * kCell, kCell);
      }
    }
  }
}

// A block's cells, steps [step_begin, step_end) of channels from c0 on; what lies outside the images is zero.
template <class T>
inline void copy_cells(const Images<T>& x, const Field& f, const Block& b, int64_t c0, int64_t step_begin,
                       int64_t step_end, char* cells, char* line) {
  constexpr int64_t parts = kParts<T>;
  const int64_t apart = f.phases() * f.plane, row_bytes = f.pitch * kCell;
  const auto zero = [&](int64_t phase_h, int64_t first, int64_t count) {
    for (int64_t s = 0; s < (step_end - step_begin) * parts; ++s)
      for (int64_t p = 0; p < f.w.phases; ++p)
        zero_cells(cells + s * apart + (phase_h * f.w.phases + p) * f.plane + first * kCell, count);
  };
  const int64_t last_rows = b.rows + f.h.high - f.h.low;
  for (int64_t a = 0; a < f.h.phases; ++a) {
    for (int64_t i = 0; i < b.images; ++i)
      for (int64_t r = 0; r < (i + 1 < b.images ? f.image_pitch : last_rows); ++r) {
        const int64_t at = i * f.image_pitch + r, h = (b.row + r + f.h.low) * f.h.stride + f.h.residue[a];
        if (h < 0 || h >= x.h)
          zero(a, at * f.pitch, f.pitch);
        else
          copy_cell_row(x, f, b, b.image + i, h, c0, step_begin, step_end,
                        cells + a * f.w.phases * f.plane + at * row_bytes, line);
      }
    const int64_t end = ((b.images - 1) * f.image_pitch + last_rows) * f.pitch;
    zero(a, end, f.plane / kCell - end);
  }
}
template <class T> inline int64_t line_bytes(const Images<T>& x, const Field& f) {
  return f.merged ? (((f.block_columns - 1) * f.column_stride + f.taps_w) * f.channels + kTileStep) * 4
         : x.channels_last || f.w.stride == 1 ? 0
                                              : x.w * kCell * kParts<T>;
}
// Of one step's cells.
template <class T> inline int64_t step_cells_bytes(const Field& f) { return kParts<T> * f.phases() * f.plane; }

// A step of a right strip of rows[value][pitch] of output channels, `values` x `count` of them there.
template <class T>
inline void pack_filter_step(const float* rows, int64_t pitch, int64_t values, int64_t count, char* to) {
  using namespace tiles_detail;
  constexpr int64_t every = kHasPairs<T> ? 2 : 1, apart = kHasPairs<T> ? 1 : kTile;
  for (int64_t half = 0; half < 2; ++half, rows += kTile, count -= kTile)
    for (int64_t r = 0; r < kTile; ++r)
      store_words<kParts<T>>(load_row(rows, pitch, every * r, values, count),
                             load_row(rows + apart * pitch, pitch, every * r, values - apart, count),
                             to + half * kTileBytes + r * kCell);
}

// Steps of a sum in the tiles' registers; then it is added to others in memory, since rounding errors grow with its length.
template <class T> constexpr int64_t kConvSteps = 24 / (kParts<T> ? kParts<T> : 1);

// sums[32][32] = cells of 32 positions x a strip, over `steps` pairs of a step of channels and a tap, whose cells are at
// offsets[step]. `spare` has room for as many sums. meanwhile() runs beside the first products and may read what `sums`
// held before: loads behind the stores of sums would wait for them, which share the low bits of addresses.
template <int ROWS, int COLUMNS, class T, class F>
inline void multiply_cells(const char* cells, int64_t apart, const int64_t* offsets, int64_t steps, const char* strip,
                           float* sums, float* spare, F&& meanwhile) {
  const int64_t blocks = ceil_div(steps, kConvSteps<T>);
  for (int64_t b = 0; b < blocks; ++b) {
    zero_sums<ROWS, COLUMNS>();
    for (int64_t s = b * steps / blocks; s < (b + 1) * steps / blocks; ++s)
      multiply_step<ROWS, COLUMNS, kParts<T>>(cells + offsets[s], strip + s * kStepBytes<T>, {kTileBytes, apart});
    if (b == 0) meanwhile();
    if (b > 1) add_strip(spare, sums);
    store_sums<ROWS, COLUMNS>(b == 0 ? sums : spare, kStrip);
  }
  if (blocks > 1) add_strip(spare, sums);
}

#endif

}  // namespace dlkern::cpu::DLKERN_ISA

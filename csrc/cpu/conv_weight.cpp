// The gradients of conv2d's weight and bias.
//
// Matrix product with the output pixels as the summed dimension: output channels x (tap, input channels). For a band
// of output rows, the input's zero-padded window is copied as [block of channels][row][column][channel] and
// grad_output as [panel of output channels][pixel][channel], so that the micro-kernel reads both consecutively, out of
// the first-level cache, for every tap. Where a pixel has few channels (first layers), neighbouring taps of a row are
// one run of columns; and where output channels fill vectors better, tiles are turned: vectors hold those. Threads
// share out the pixels, each summing into a gradient of its own, which are then added in order of the threads, or, where
// the gradient is large, the output channels. Floor: 2 N P Q K C R S / groups over the FMA peak.
//
// Where the CPU has AMX, tiles do it (conv_weight_tiles.h), unless their sums are not exact.
#include "conv.h"

#include "column_sums.h"
#include "conv_depthwise.h"
#include "conv_grouped.h"
#include "conv_pack.h"
#include "conv_weight_tiles.h"
#include "conv_weight_winograd.h"
#include "parallel.h"
#include "scratch.h"
#include "wide.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

constexpr int64_t kBandPixels = 384;
constexpr int64_t kMostLists = 49;  // taps that have lists of pixels

// Columns [column, column + vectors * lanes) of the gradient: `count` elements from `first` on in the run of tap
// (r, s) of a block of input channels.
struct Tile {
  int64_t block, offset, column, vectors, count, first, r, s;
};

template <class T> struct Plan {
  using A = acc_t<T>;
  static constexpr int64_t kWidth = kOuterVectors * kLanes<A>;
  int64_t channels, outputs;  // of a group
  int64_t pitch, blocks;  // channels of a block, blocks
  bool merged;  // a run is (s, c), not c alone
  int64_t span_h, span_w, copy_h, copy_w, local_h, local_w;  // as in conv.cpp
  int64_t block_columns, column_blocks, block_rows, row_blocks, all_rows, most_rows, row;
  const Tile* tiles;
  int64_t tile_count, columns;  // columns: of the gradient as summed, padded
  int64_t panels;  // of output channels, in a group
  int64_t pixel_tasks, channel_tasks;
  bool once;  // one band, whose sums are finished a panel at a time
  bool cut;  // then: each tap is summed over the pixels that see it
};

template <class T> void plan_bands(const ConvShape& z, Plan<T>& plan) {
  using A = acc_t<T>;
  plan.channels = z.c / z.groups;
  plan.outputs = z.k / z.groups;
  plan.pitch = smaller(plan.channels, Plan<T>::kWidth);
  plan.blocks = ceil_div(plan.channels, plan.pitch);
  plan.merged = plan.channels < Plan<T>::kWidth && z.dilation_w == 1 && z.s > 1;
  plan.span_h = (z.r - 1) * z.dilation_h;
  plan.span_w = (z.s - 1) * z.dilation_w;
  plan.copy_h = z.r == 1 ? z.stride_h : 1;
  plan.local_h = z.r == 1 ? 1 : z.stride_h;
  plan.copy_w = z.s == 1 ? z.stride_w : 1;
  plan.local_w = z.s == 1 ? 1 : z.stride_w;
  plan.column_blocks = ceil_div(z.q, kBandPixels);
  plan.block_columns = ceil_div(z.q, plan.column_blocks);
  plan.column_blocks = ceil_div(z.q, plan.block_columns);
  plan.all_rows = z.n * z.p;
  plan.block_rows = smaller(plan.all_rows, larger(1, kBandPixels / plan.block_columns));
  plan.row_blocks = ceil_div(plan.all_rows, plan.block_rows);
  plan.row = ((plan.block_columns - 1) * plan.local_w + plan.span_w + 1) * plan.pitch;
  plan.most_rows = plan.block_rows * plan.local_h + ((plan.block_rows - 1) / z.p + 2) * (plan.span_h + 1);
  plan.panels = ceil_div(plan.outputs, kOuterRows);

  const int64_t threads = num_threads(), bands = plan.row_blocks * plan.column_blocks;
  const int64_t bytes = z.k * plan.channels * z.r * z.s * static_cast<int64_t>(sizeof(A));
  const bool many_pixels = bands >= 2 * threads && bytes <= (z.r * z.s == 1 ? 4 : 1) * (1 << 20);
  plan.pixel_tasks = many_pixels || z.groups * plan.panels < 2 * threads ? smaller(threads, bands) : 1;
  plan.channel_tasks = plan.pixel_tasks > 1 ? 1 : smaller(threads, z.groups * plan.panels);
  plan.once = bands == 1;
  plan.cut = plan.once && !plan.merged && z.r * z.s <= kMostLists &&
             4 * count_seen(z.r, -z.pad_h, z.dilation_h, z.p, z.stride_h, z.h) *
                     count_seen(z.s, -z.pad_w, z.dilation_w, z.q, z.stride_w, z.w) <=
                 3 * z.p * z.r * z.q * z.s;
}

template <class T> int64_t most_tiles(const ConvShape& z, const Plan<T>& plan) {
  return plan.blocks * z.r * (plan.merged ? ceil_div(z.s * plan.channels, Plan<T>::kWidth) : z.s);
}

template <class T> void plan_tiles(const ConvShape& z, Plan<T>& plan, Tile* tiles) {
  constexpr int64_t lanes = kLanes<T>, width = Plan<T>::kWidth;
  plan.tiles = tiles;
  plan.tile_count = plan.columns = 0;
  for (int64_t b = 0; b < plan.blocks; ++b)
    for (int64_t r = 0; r < z.r; ++r)
      for (int64_t s = 0; s < (plan.merged ? 1 : z.s); ++s) {
        const int64_t run = plan.merged ? z.s * plan.channels : smaller(plan.pitch, plan.channels - b * plan.pitch);
        for (int64_t first = 0; first < run; first += width) {
          const int64_t count = smaller(width, run - first), vectors = ceil_div(count, lanes);
          const int64_t offset = r * z.dilation_h * plan.row + s * z.dilation_w * plan.pitch + first;
          tiles[plan.tile_count++] = Tile{b, offset, plan.columns, vectors, count, first, r, s};
          plan.columns += vectors * lanes;
        }
      }
}

// A band of output rows and columns.
struct Band {
  int64_t row_begin, row_end, column_begin, columns;
};

// The input's windows to copy[block][row][column][pitch], and where each output pixel's begins in a block.
template <class T>
void copy_input(const ConvShape& z, const Plan<T>& plan, const Images<T>& x, const Band& band, int64_t group,
                acc_t<T>* copy, int32_t* offsets) {
  int64_t at = 0, pixel = 0;
  for (int64_t row = band.row_begin; row < band.row_end;) {
    const int64_t i = row % z.p, count = smaller(band.row_end - row, z.p - i);
    const Window window{row / z.p,
                        i * z.stride_h - z.pad_h,
                        (count - 1) * plan.local_h + plan.span_h + 1,
                        plan.copy_h,
                        band.column_begin * z.stride_w - z.pad_w,
                        (band.columns - 1) * plan.local_w + plan.span_w + 1,
                        plan.copy_w};
    for (int64_t b = 0; b < plan.blocks; ++b)
      copy_window(x, window, group * plan.channels + b * plan.pitch,
                  smaller(plan.pitch, plan.channels - b * plan.pitch), copy + b * plan.most_rows * plan.row + at,
                  plan.row, plan.pitch);
    for (int64_t k = 0; k < count; ++k)
      for (int64_t q = 0; q < band.columns; ++q)
        offsets[pixel++] = static_cast<int32_t>(at + k * plan.local_h * plan.row + q * plan.local_w * plan.pitch);
    at += window.rows * plan.row;
    row += count;
  }
}

// `count` output channels from k on of a band of grad_output, to packed[pixel][pitch]; what is beyond count is not used.
template <class T, class A>
void pack_pixels(const ConvShape& z, const T* y, bool channels_last, const Band& band, int64_t k, int64_t count,
                 int64_t pitch, A* packed) {
  for (int64_t row = band.row_begin; row < band.row_end;) {
    const int64_t image = row / z.p, i = row % z.p;
    const int64_t together = band.columns == z.q ? smaller(band.row_end - row, z.p - i) : 1;
    const int64_t pixels = together * band.columns;
    if (channels_last) {
      const T* from = y + ((image * z.p + i) * z.q + band.column_begin) * z.k + k;
      if (k + pitch <= z.k) {  // whole vectors
        for (int64_t p = 0; p < pixels; ++p)
          for (int64_t j = 0; j < pitch; j += kLanes<A>) store(packed + p * pitch + j, load(from + p * z.k + j));
      } else {
        for (int64_t p = 0; p < pixels; ++p)
          for (int64_t j = 0; j < count; ++j) packed[p * pitch + j] = static_cast<A>(from[p * z.k + j]);
      }
    } else {
      const T* from = y + (image * z.k + k) * z.p * z.q + i * z.q + band.column_begin;
      transpose(from, z.p * z.q, count, pixels, packed, pitch);
    }
    packed += pixels * pitch;
    row += together;
  }
}

// Sums over bands [band_begin, band_end) for units (group, panel of output channels) [unit_begin, unit_end), into
// gradient[output channel][columns].
template <class T>
void sum_bands(const ConvBackwardWeightArgs<T>& args, const Plan<T>& plan, int64_t band_begin, int64_t band_end,
               int64_t unit_begin, int64_t unit_end, acc_t<T>* gradient) {
  using A = acc_t<T>;
  const ConvShape& z = args.shape;
  const Images<T> x{args.input, args.input_channels_last, z.n, z.c, z.h, z.w};
  int32_t offsets[kBandPixels];
  // The micro-kernel reads whole vectors, past the last pixel's channels.
  const int64_t copy_elements = plan.blocks * plan.most_rows * plan.row;
  A* copy = scratch<A>(Slot::family_1, copy_elements + Plan<T>::kWidth);
  A* packed = scratch<A>(Slot::family_2, kBandPixels * kOuterPitch * plan.panels);
  for (int64_t i = 0; i < Plan<T>::kWidth; ++i) copy[copy_elements + i] = A(0);
  for (int64_t group = unit_begin / plan.panels; group * plan.panels < unit_end; ++group) {
    const int64_t panel_begin = larger(unit_begin - group * plan.panels, 0),
                  panel_end = smaller(unit_end - group * plan.panels, plan.panels);
    for (int64_t i = band_begin; i < band_end; ++i) {
      const int64_t row = i / plan.column_blocks * plan.block_rows,
                    column = i % plan.column_blocks * plan.block_columns;
      const Band band{row, smaller(row + plan.block_rows, plan.all_rows), column,
                      smaller(plan.block_columns, z.q - column)};
      const int64_t pixels = (band.row_end - band.row_begin) * band.columns;
      copy_input(z, plan, x, band, group, copy, offsets);
      for (int64_t panel = panel_begin; panel < panel_end; ++panel)
        pack_pixels(z, args.grad_output, args.grad_output_channels_last, band,
                    group * plan.outputs + panel * kOuterRows, smaller(kOuterRows, plan.outputs - panel * kOuterRows),
                    kOuterPitch, packed + panel * kBandPixels * kOuterPitch);
      const int64_t tiles_a_block = plan.tile_count / plan.blocks;
      for (int64_t b = 0; b < plan.blocks; ++b)
        for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
          const int64_t k = panel * kOuterRows, rows = smaller(kOuterRows, plan.outputs - k);
          const A* left = packed + panel * kBandPixels * kOuterPitch;
          A* out = gradient + (group * plan.outputs + k) * plan.columns;
          const int64_t depth = sum_depth(
              pixels, static_cast<double>(plan.all_rows * z.q) * static_cast<double>(z.k * plan.channels * z.r * z.s));
          for (int64_t p = 0; p < pixels; p += depth)
            for (int64_t t = 0; t < tiles_a_block; ++t) {
              const Tile& tile = plan.tiles[b * tiles_a_block + t];
              outer_tile_for<false, A>(rows, tile.vectors)(smaller(depth, pixels - p), left + p * kOuterPitch,
                                                           copy + b * plan.most_rows * plan.row + tile.offset,
                                                           kOuterPitch, offsets + p, out + tile.column, plan.columns,
                                                           i > band_begin || p > 0);
            }
        }
    }
  }
}

// The finished sums of output channel k to the weight's gradient in its own layout.
template <class T>
void write_row(const ConvBackwardWeightArgs<T>& args, const Plan<T>& plan, int64_t k, const acc_t<T>* row) {
  const ConvShape& z = args.shape;
  const bool last = args.grad_weight_channels_last;
  const int64_t taps = z.r * z.s, stride_c = last ? 1 : taps, stride_r = last ? z.s * plan.channels : z.s,
                stride_s = last ? plan.channels : 1;
  T* weight = args.grad_weight + k * plan.channels * taps;
  if (!plan.merged && !last && taps > 1) {  // each block's taps are rows of its channels
    for (int64_t t = 0; t < plan.tile_count; t += taps) {
      const Tile& tile = plan.tiles[t];
      transpose(row + tile.column, tile.vectors * kLanes<acc_t<T>>, taps, tile.count,
                weight + tile.block * plan.pitch * taps, taps);
    }
    return;
  }
  for (int64_t t = 0; t < plan.tile_count; ++t) {
    const Tile& tile = plan.tiles[t];
    const acc_t<T>* from = row + tile.column;
    T* to = weight + tile.r * stride_r + tile.s * stride_s;
    if (plan.merged) {
      for (int64_t e = 0; e < tile.count; ++e) {
        const int64_t s = (tile.first + e) / plan.channels, c = (tile.first + e) % plan.channels;
        to[s * stride_s + c * stride_c] = static_cast<T>(from[e]);
      }
    } else {
      ::dlkern::cpu::DLKERN_ISA::copy(from, to + tile.block * plan.pitch, tile.count);
    }
  }
}

// The tasks' sums, added in order, to the weight's gradient.
template <class T>
void write_gradient(const ConvBackwardWeightArgs<T>& args, const Plan<T>& plan, acc_t<T>* gradients) {
  using A = acc_t<T>;
  const int64_t k_count = args.shape.k;
  parallel_for(k_count, 1 + 4096 / plan.columns, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      A* row = gradients + k * plan.columns;
      for (int64_t task = 1; task < plan.pixel_tasks; ++task) {
        const A* other = row + task * k_count * plan.columns;
        for (int64_t j = 0; j < plan.columns; j += kLanes<A>) store(row + j, load(row + j) + load(other + j));
      }
      write_row(args, plan, k, row);
    }
  });
}

// What one tap sees of a band: how many pixels, and for each where its window begins and grad_output's channels.
template <class A> struct Seen {
  int64_t count;
  const int32_t* pixels;
  int32_t* offsets;
  A* left;
};

// Few pixels: one band has all. A panel's sums are finished, and written, while they are in the cache. Where padding is a
// quarter of what windows see, or more, each tap is summed over the pixels that see it.
template <class T>
void sum_once(const ConvBackwardWeightArgs<T>& args, const Plan<T>& plan, int64_t unit_begin, int64_t unit_end) {
  using A = acc_t<T>;
  const ConvShape& z = args.shape;
  const Images<T> x{args.input, args.input_channels_last, z.n, z.c, z.h, z.w};
  const Band band{0, plan.all_rows, 0, z.q};
  const int64_t pixels = plan.all_rows * z.q, copy_elements = plan.blocks * plan.most_rows * plan.row;
  const int64_t tiles_a_block = plan.tile_count / plan.blocks, lists = plan.cut ? tiles_a_block : 0;
  const double work = static_cast<double>(pixels) * static_cast<double>(z.k * plan.channels * z.r * z.s);
  int32_t offsets[kBandPixels];
  A* copy = scratch<A>(Slot::family_1, copy_elements + Plan<T>::kWidth);
  A* packed = scratch<A>(Slot::family_2, (1 + lists) * pixels * kOuterPitch);
  A* sums = scratch<A>(Slot::family_3, kOuterRows * plan.columns);
  char* memory = scratch<char>(Slot::family_4, larger(1, lists) * static_cast<int64_t>(sizeof(Seen<A>)) +
                                                   lists * 2 * pixels * static_cast<int64_t>(sizeof(int32_t)));
  Seen<A>* seen = reinterpret_cast<Seen<A>*>(memory);
  int32_t* numbers = reinterpret_cast<int32_t*>(seen + larger(1, lists));
  if (!plan.cut) seen[0] = {pixels, nullptr, offsets, packed};
  for (int64_t tap = 0; tap < lists; ++tap) {
    int32_t *list = numbers + 2 * tap * pixels, count = 0, pixel = 0;
    for (int64_t row = 0; row < plan.all_rows; ++row)
      for (int64_t q = 0; q < z.q; ++q, ++pixel) {
        const int64_t h = row % z.p * z.stride_h + tap / z.s * z.dilation_h - z.pad_h,
                      w = q * z.stride_w + tap % z.s * z.dilation_w - z.pad_w;
        if (h >= 0 && h < z.h && w >= 0 && w < z.w) list[count++] = pixel;
      }
    seen[tap] = {count, list, list + pixels, packed + (1 + tap) * pixels * kOuterPitch};
  }
  // The micro-kernel reads whole vectors, past the last pixel's channels.
  for (int64_t i = 0; i < Plan<T>::kWidth; ++i) copy[copy_elements + i] = A(0);
  for (int64_t unit = unit_begin, copied = -1; unit < unit_end; ++unit) {
    const int64_t group = unit / plan.panels, panel = unit % plan.panels, first = group * plan.outputs,
                  k = first + panel * kOuterRows, rows = smaller(kOuterRows, first + plan.outputs - k);
    if (group != copied) {
      copied = group;
      copy_input(z, plan, x, band, group, copy, offsets);
      for (int64_t tap = 0; tap < lists; ++tap)
        for (int64_t i = 0; i < seen[tap].count; ++i) seen[tap].offsets[i] = offsets[seen[tap].pixels[i]];
    }
    pack_pixels(z, args.grad_output, args.grad_output_channels_last, band, k, rows, kOuterPitch, packed);
    for (int64_t tap = 0; tap < lists; ++tap)
      for (int64_t i = 0; i < seen[tap].count; ++i)
        for (int64_t j = 0; j < kOuterPitch; j += kLanes<A>)
          store(seen[tap].left + i * kOuterPitch + j, load(packed + seen[tap].pixels[i] * kOuterPitch + j));
    for (int64_t t = 0; t < plan.tile_count; ++t) {
      const Tile& tile = plan.tiles[t];
      const Seen<A>& some = seen[plan.cut ? t % tiles_a_block : 0];
      const A* right = copy + tile.block * plan.most_rows * plan.row + tile.offset;
      A* out = sums + tile.column;
      if (some.count == 0)
        for (int64_t i = 0; i < rows; ++i)
          std::memset(out + i * plan.columns, 0, sizeof(A) * static_cast<size_t>(tile.vectors * kLanes<A>));
      // With padding left out a chain of 32 has twice the numbers, and gradients of 5 x 5 taps in 7 x 8 pixels erred too much.
      const int64_t depth = smaller(sum_depth(larger(1, some.count), work), plan.cut ? kOuterChain / 2 : pixels);
      for (int64_t p = 0; p < some.count; p += depth)
        outer_tile_for<false, A>(rows, tile.vectors)(smaller(depth, some.count - p), some.left + p * kOuterPitch, right,
                                                     kOuterPitch, some.offsets + p, out, plan.columns, p > 0);
    }
    for (int64_t i = 0; i < rows; ++i) write_row(args, plan, k + i, sums + i * plan.columns);
  }
}

// Sums of lanes, in double; of double, which has no wider type, with its rounding errors.
template <class T> struct LaneSums {
  Wide<T> sum{};
  void add(Vec<T> x) { sum += wide(x); }
  acc_t<T> total() const {
    double lane[kLanes<T>], all = 0;
    store_lanes(lane, sum);
    for (int l = 0; l < kLanes<T>; ++l) all += lane[l];
    return static_cast<acc_t<T>>(all);
  }
};
template <> struct LaneSums<double> {
  CompensatedSum<vdouble> sums;
  void add(Vec<double> x) { sums += x; }
  double total() const {
    CompensatedSum<double> sum;
    for (int l = 0; l < kLanes<double>; ++l) sum += sums.value[l];
    for (int l = 0; l < kLanes<double>; ++l) sum += finite_part(sums.lost[l]);
    return sum.total();
  }
};

// Sums of grad_output over pixels.
template <class T> void sum_bias(const ConvBackwardBiasArgs<T>& args) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t pixels = args.p * args.q;
  if (args.channels_last) {
    const int64_t all = args.n * pixels;
    if constexpr (!std::is_same_v<T, double>) {
      sum_columns(args.grad_output, args.k, 1, all, args.k, args.grad_bias);
    } else {
      parallel_for(ceil_div(args.k, lanes), 1 + 16384 / all, [&](int64_t begin, int64_t end) {
        for (int64_t v = begin; v < end; ++v) {
          const int64_t k = v * lanes, count = smaller(lanes, args.k - k);
          CompensatedSum<vdouble> sums;
          for (int64_t p = 0; p < all; ++p) sums += load_some(args.grad_output + p * args.k + k, count);
          store_some(args.grad_bias + k, sums.total(), count);
        }
      });
    }
    return;
  }
  parallel_for(args.k, 1 + 16384 / (args.n * pixels), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      LaneSums<T> sums;
      for (int64_t n = 0; n < args.n; ++n) {
        const T* from = args.grad_output + (n * args.k + k) * pixels;
        for (int64_t p = 0; p < pixels; p += lanes)
          sums.add(p + lanes <= pixels ? load(from + p) : load_partial<T>(from + p, static_cast<int>(pixels - p)));
      }
      args.grad_bias[k] = static_cast<T>(sums.total());
    }
  });
}

// Turned tiles: few input channels, enough output channels. The gradient is summed as [r][s, c][output channel].
template <class T> bool is_turned(const ConvShape& z, const Plan<T>& plan) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t run = z.s * z.c, straight = ceil_div(run, lanes) * lanes * z.k,
                turned = ceil_div(z.k, lanes) * lanes * run;
  return z.groups == 1 && plan.merged && plan.blocks == 1 && 8 * straight > 9 * turned;
}

constexpr int64_t kTurnedPanel = 128;  // output channels of a band packed at a time

template <class T>
void sum_bands_turned(const ConvBackwardWeightArgs<T>& args, const Plan<T>& plan, int64_t band_begin, int64_t band_end,
                      acc_t<T>* gradient) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const ConvShape& z = args.shape;
  const Images<T> x{args.input, args.input_channels_last, z.n, z.c, z.h, z.w};
  const int64_t run = z.s * z.c, gradient_row = ceil_div(z.k, lanes) * lanes;
  int32_t offsets[kBandPixels];
  A* copy = scratch<A>(Slot::family_1, plan.most_rows * plan.row);
  A* packed = scratch<A>(Slot::family_2, kBandPixels * kTurnedPanel);
  for (int64_t i = band_begin; i < band_end; ++i) {
    const int64_t row = i / plan.column_blocks * plan.block_rows, column = i % plan.column_blocks * plan.block_columns;
    const Band band{row, smaller(row + plan.block_rows, plan.all_rows), column,
                    smaller(plan.block_columns, z.q - column)};
    const int64_t pixels = (band.row_end - band.row_begin) * band.columns;
    copy_input(z, plan, x, band, 0, copy, offsets);
    const int64_t depth = sum_depth(
        pixels, static_cast<double>(plan.all_rows * z.q) * static_cast<double>(z.k * plan.channels * z.r * z.s));
    for (int64_t k = 0; k < z.k; k += kTurnedPanel) {
      const int64_t count = smaller(kTurnedPanel, z.k - k), width = ceil_div(count, lanes) * lanes;
      pack_pixels(z, args.grad_output, args.grad_output_channels_last, band, k, count, width, packed);
      for (int64_t p = 0; p < pixels; p += depth)
        for (int64_t r = 0; r < z.r; ++r)
          for (int64_t e = 0; e < run; e += kOuterRows)
            for (int64_t j = 0; j < width; j += kOuterVectors * lanes)
              outer_tile_for<true, A>(smaller(kOuterRows, run - e), (width - j) / lanes)(
                  smaller(depth, pixels - p), copy + r * z.dilation_h * plan.row + e, packed + p * width + j, width,
                  offsets + p, gradient + (r * run + e) * gradient_row + k + j, gradient_row, i > band_begin || p > 0);
    }
  }
}

template <class T> void backward_weight_turned(const ConvBackwardWeightArgs<T>& args, const Plan<T>& plan) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const ConvShape& z = args.shape;
  const int64_t bands = plan.row_blocks * plan.column_blocks, tasks = smaller(num_threads(), bands);
  const int64_t row = ceil_div(z.k, lanes) * lanes, size = z.r * z.s * z.c * row;
  A* gradients = scratch<A>(Slot::family_0, tasks * size);
  parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      sum_bands_turned(args, plan, task * bands / tasks, (task + 1) * bands / tasks, gradients + task * size);
  });
  const bool last = args.grad_weight_channels_last;
  for (int64_t task = 1; task < tasks; ++task)
    for (int64_t i = 0; i < size; i += lanes)
      store(gradients + i, load(gradients + i) + load(gradients + task * size + i));
  for (int64_t k = 0; k < z.k; ++k)
    for (int64_t r = 0; r < z.r; ++r)
      for (int64_t s = 0; s < z.s; ++s)
        for (int64_t c = 0; c < z.c; ++c)
          args.grad_weight[last ? ((k * z.r + r) * z.s + s) * z.c + c : ((k * z.c + c) * z.r + r) * z.s + s] =
              static_cast<T>(gradients[((r * z.s + s) * z.c + c) * row + k]);
}

// A handful of products: less work than a plan. In double, since among few roundings chance decides who errs more.
constexpr int64_t kFewProducts = 1024;

template <class T> void backward_weight_plain(const ConvBackwardWeightArgs<T>& args) {
  const ConvShape& z = args.shape;
  const int64_t channels = z.c / z.groups, outputs = z.k / z.groups;
  const auto at = [](bool last, int64_t c_count, int64_t h, int64_t w, int64_t n, int64_t c, int64_t y, int64_t x) {
    return last ? ((n * h + y) * w + x) * c_count + c : ((n * c_count + c) * h + y) * w + x;
  };
  for (int64_t k = 0; k < z.k; ++k)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t r = 0; r < z.r; ++r)
        for (int64_t s = 0; s < z.s; ++s) {
          double sum = 0;
          for (int64_t n = 0; n < z.n; ++n)
            for (int64_t p = 0; p < z.p; ++p)
              for (int64_t q = 0; q < z.q; ++q) {
                const int64_t y = p * z.stride_h + r * z.dilation_h - z.pad_h,
                              x = q * z.stride_w + s * z.dilation_w - z.pad_w;
                if (y < 0 || y >= z.h || x < 0 || x >= z.w) continue;
                const T g = args.grad_output[at(args.grad_output_channels_last, z.k, z.p, z.q, n, k, p, q)];
                const int64_t channel = k / outputs * channels + c;
                sum += static_cast<double>(g) *
                       static_cast<double>(args.input[at(args.input_channels_last, z.c, z.h, z.w, n, channel, y, x)]);
              }
          args.grad_weight[at(args.grad_weight_channels_last, channels, z.r, z.s, k, c, r, s)] =
              static_cast<T>(static_cast<acc_t<T>>(sum));
        }
}

template <class T> void backward_weight(const ConvBackwardWeightArgs<T>& args) {
  using A = acc_t<T>;
  const ConvShape& z = args.shape;
  if (args.grad_bias)
    sum_bias(
        ConvBackwardBiasArgs<T>{z.n, z.k, z.p, z.q, args.grad_output, args.grad_output_channels_last, args.grad_bias});
  const double products =
      static_cast<double>(z.n * z.p * z.q) * static_cast<double>(z.k * (z.c / z.groups) * z.r * z.s);
  if (products <= kFewProducts) return backward_weight_plain(args);
  if (depthwise_backward_weight(args) || (!tiles_over_groups<T>(z) && grouped_backward_weight(args))) return;
  if constexpr (kHasTileCode<T>) {
    if (weight_is_tiled<T>(z) && backward_weight_tiles(args)) return;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (winograd::pays(args) && winograd::backward_weight(args)) return;
  }
  Plan<T> plan;
  plan_bands(z, plan);
  if (is_turned(z, plan)) return backward_weight_turned(args, plan);
  const int64_t tiles = most_tiles(z, plan), most_columns = tiles * Plan<T>::kWidth;
  char* memory = scratch<char>(
      Slot::family_0, tiles * static_cast<int64_t>(sizeof(Tile)) + 64 +
                          (plan.once ? 0 : plan.pixel_tasks) * z.k * most_columns * static_cast<int64_t>(sizeof(A)));
  plan_tiles(z, plan, reinterpret_cast<Tile*>(memory));
  A* gradients = reinterpret_cast<A*>(memory + ceil_div(tiles * static_cast<int64_t>(sizeof(Tile)), 64) * 64);

  const int64_t bands = plan.row_blocks * plan.column_blocks, units = z.groups * plan.panels;
  const int64_t tasks = plan.pixel_tasks * plan.channel_tasks;
  const double work = static_cast<double>(plan.all_rows * z.q) * static_cast<double>(z.k * plan.channels * z.r * z.s);
  parallel_for(tasks, work < kWorthWaking ? tasks : 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task % plan.pixel_tasks, c = task / plan.pixel_tasks,
                    unit_begin = c * units / plan.channel_tasks, unit_end = (c + 1) * units / plan.channel_tasks;
      if (plan.once)
        sum_once(args, plan, unit_begin, unit_end);
      else
        sum_bands(args, plan, p * bands / plan.pixel_tasks, (p + 1) * bands / plan.pixel_tasks, unit_begin, unit_end,
                  gradients + p * z.k * plan.columns);
    }
  });
  if (!plan.once) write_gradient(args, plan, gradients);
}

}  // namespace

#define DLKERN_DEFINE_CONV(T)                                                                   \
  void conv2d_backward_weight(const ConvBackwardWeightArgs<T>& args) { backward_weight(args); } \
  void conv2d_backward_bias(const ConvBackwardBiasArgs<T>& args) { sum_bias(args); }
DLKERN_DEFINE_CONV(float)
DLKERN_DEFINE_CONV(double)
DLKERN_DEFINE_CONV(bfloat16)
DLKERN_DEFINE_CONV(float16)
#undef DLKERN_DEFINE_CONV

}  // namespace dlkern::cpu::DLKERN_ISA

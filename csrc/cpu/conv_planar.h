// Correlations with fewer output channels than a vector has lanes: the input gradient of a network's first layer (3),
// LeNet's layers (6). Vectors hold neighbouring output pixels of a row instead of channels, so that all lanes work.
//
// The source lies as planes [channel][row][column], zero-padded at the sides, in a band of rows that fits the
// second-level cache. A tile is OUT output channels x NV vectors of pixels, of any rows that see the same taps; a step
// loads NV vectors, shifted by the tap, and broadcasts OUT weights. Floor: 2 N P Q K C R S over the FMA peak.
#pragma once
#include "conv_borders.h"
#include "conv_pack.h"
#include "parallel.h"
#include "scratch.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace planar {

constexpr int kMostOutputs = 8;
constexpr int kSums = kVectorBytes == 64 ? 24 : 12;  // of a tile, in registers
constexpr int64_t kMostVectors = 256;                // of a band
constexpr int64_t kBandBytes = 256 * 1024;
constexpr int vectors_of(int outputs) { return kSums / outputs > 8 ? 8 : kSums / outputs; }

// Steps [begin, end) of a sum over (channel, tap row, tap column), as whole channels, and the taps that are seen.
struct Steps {
  int64_t channel_begin, channel_end, plane;  // plane: elements from one channel to the next
  const int64_t *row_offset, *column_offset;  // of the taps
  TapRange rows;
  int64_t taps_h, taps_w;
};

// sums[o][j] (+)= sum over steps of weights[step][o] * source[j][offset of the step ..].
template <class A> using Tile = void (*)(const Steps&, const A* const* source, const A* weights, A* const* sums,
                                         int64_t sums_row, bool add);

template <int OUT, int NV, class A>
void tile(const Steps& steps, const A* const* source, const A* weights, A* const* sums, int64_t sums_row, bool add) {
  using V = Vec<A>;
  V sum[OUT][NV] = {};
  for (int64_t c = steps.channel_begin; c < steps.channel_end; ++c)
    for (int64_t r = steps.rows.begin; r < steps.rows.end; ++r) {
      const A* w = weights + (c * steps.taps_h + r) * steps.taps_w * OUT;
      const A* from[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) from[j] = source[j] + c * steps.plane + steps.row_offset[r];
      for (int64_t s = 0; s < steps.taps_w; ++s, w += OUT) {
        V x[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) x[j] = load(from[j] + steps.column_offset[s]);
#pragma GCC unroll 8
        for (int o = 0; o < OUT; ++o) {
          const V value = broadcast<A>(w[o]);
#pragma GCC unroll 8
          for (int j = 0; j < NV; ++j) sum[o][j] += value * x[j];
        }
      }
    }
#pragma GCC unroll 8
  for (int o = 0; o < OUT; ++o)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      A* out = sums[j] + o * sums_row;
      store(out, add ? load(out) + sum[o][j] : sum[o][j]);
    }
}

template <int OUT, class A> inline Tile<A> tile_of(int vectors) {
  constexpr int most = vectors_of(OUT);
  static constexpr Tile<A> table[8] = {
      tile<OUT, 1, A>,
      tile < OUT,
      most < 2 ? 1 : 2,
      A >,
      tile < OUT,
      most < 3 ? 1 : 3,
      A >,
      tile < OUT,
      most < 4 ? 1 : 4,
      A >,
      tile < OUT,
      most < 5 ? 1 : 5,
      A >
      , tile < OUT, most < 6 ? 1 : 6, A >, tile < OUT, most < 7 ? 1 : 7, A >, tile < OUT, most < 8 ? 1 : 8, A > };
  return table[vectors - 1];
}
template <class A> inline Tile<A> tile_for(int outputs, int vectors) {
  switch (outputs) {
    case 1: return tile_of<1, A>(vectors);
    case 2: return tile_of<2, A>(vectors);
    case 3: return tile_of<3, A>(vectors);
    case 4: return tile_of<4, A>(vectors);
    case 5: return tile_of<5, A>(vectors);
    case 6: return tile_of<6, A>(vectors);
    case 7: return tile_of<7, A>(vectors);
    default: return tile_of<8, A>(vectors);
  }
}

struct Plan {
  int64_t outputs;                  // of a pass; the last pass may have fewer
  int64_t row_vectors, row_length;  // vectors of an output row, and their elements
  int64_t min_h, min_w, span_h, span_w;
  int64_t pitch, band, bands;       // elements of a row of a plane; output rows of a band
  int64_t channel_block;            // channels between two additions to memory
  Borders borders;
  const int64_t *row_offset, *column_offset;
};

// Output rows [row_begin, row_end) of an image.
template <class T>
void run_band(const Correlation<T>& z, const Plan& plan, const acc_t<T>* weights, int64_t image, int64_t row_begin,
              int64_t row_end) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t channels = z.source.channels, rows = row_end - row_begin, first = row_begin * z.stride_h + plan.min_h;
  const int64_t source_rows = (rows - 1) * z.stride_h + plan.span_h + 1, plane = source_rows * plan.pitch;
  A* copy = scratch<A>(Slot::family_1, channels * plane);
  A* sums = scratch<A>(Slot::family_2, plan.outputs * rows * plan.row_length);
  // The band's source: columns [min_w, min_w + pitch), zero outside the image. Rows outside it are seen by no tap, where
  // borders are cut.
  const int64_t left = smaller(larger(-plan.min_w, 0), plan.pitch), skipped = larger(plan.min_w, 0);
  const int64_t width = larger(0, smaller(z.source.w - skipped, plan.pitch - left));
  for (int64_t i = 0; i < source_rows; ++i) {
    const int64_t h = first + i;
    A* to = copy + i * plan.pitch;
    const bool inside = h >= 0 && h < z.source.h;
    const auto zero = [&](int64_t from, int64_t count) {
      for (int64_t c = 0; c < channels; ++c)
        std::memset(static_cast<void*>(to + c * plane + from), 0, sizeof(A) * static_cast<size_t>(count));
    };
    if (!inside) {
      zero(0, plan.pitch);
      continue;
    }
    zero(0, left);
    zero(left + width, plan.pitch - left - width);
    if (z.source.channels_last) {
      transpose(z.source.data + ((image * z.source.h + h) * z.source.w + skipped) * channels, channels, width, channels,
                to + left, plane);
    } else {
      for (int64_t c = 0; c < channels; ++c)
        ::dlkern::cpu::DLKERN_ISA::copy(
            z.source.data + ((image * channels + c) * z.source.h + h) * z.source.w + skipped, to + c * plane + left,
            width);
    }
  }

  const int64_t sums_row = rows * plan.row_length;  // from one output channel's sums to the next's
  for (int64_t o = 0; o < z.out_channels; o += plan.outputs) {
    const int outputs = static_cast<int>(smaller(plan.outputs, z.out_channels - o));
    const A* w = weights + o * channels * z.taps_h * z.taps_w;
    const int most = vectors_of(outputs);
    for (int64_t range = 0; range < plan.borders.count; ++range) {
      const A* source[kMostVectors];
      A* out[kMostVectors];
      int64_t count = 0;
      for (int64_t i = 0; i < rows; ++i) {
        if (plan.borders.of[row_begin + i] != range) continue;
        for (int64_t v = 0; v < plan.row_vectors; ++v) {
          source[count] = copy + i * z.stride_h * plan.pitch + v * lanes;
          out[count++] = sums + i * plan.row_length + v * lanes;
        }
      }
      Steps steps{0, 0, plane, plan.row_offset, plan.column_offset, plan.borders.ranges[range], z.taps_h, z.taps_w};
      for (int64_t v = 0, tiles = ceil_div(count, most); tiles > 0; --tiles) {
        const int together = static_cast<int>(ceil_div(count - v, tiles));  // even, so that no tile is small
        const auto run = tile_for<A>(outputs, together);
        for (int64_t c = 0; c < channels; c += plan.channel_block) {
          steps.channel_begin = c;
          steps.channel_end = smaller(channels, c + plan.channel_block);
          run(steps, source + v, w, out + v, sums_row, c > 0);
        }
        v += together;
      }
    }
    for (int k = 0; k < outputs; ++k) {
      const A bias = z.bias ? static_cast<A>(static_cast<acc_t<T>>(z.bias[o + k])) : A(0);
      for (int64_t i = 0; i < rows; ++i) {
        const A* from = sums + k * sums_row + i * plan.row_length;
        const int64_t h = z.start_h + (row_begin + i) * z.step_h;
        const int64_t step = z.output_channels_last ? z.step_w * z.out_channels : z.step_w;
        T* to = z.output_channels_last
                    ? z.output + ((image * z.out_h + h) * z.out_w + z.start_w) * z.out_channels + o + k
                    : z.output + ((image * z.out_channels + o + k) * z.out_h + h) * z.out_w + z.start_w;
        if (z.bias)
          for (int64_t q = 0; q < z.columns; ++q) to[q * step] = static_cast<T>(from[q] + bias);
        else
          for (int64_t q = 0; q < z.columns; ++q) to[q * step] = static_cast<T>(from[q]);
      }
    }
  }
}

}  // namespace planar

// Whether lanes of pixels are better filled than lanes of output channels.
template <class T> inline bool is_planar(const Correlation<T>& z) {
  constexpr int64_t lanes = kLanes<acc_t<T>>;
  if (z.groups != 1 || z.stride_w != 1 || z.out_channels >= lanes) return false;
  const int64_t row = ceil_div(z.columns, lanes);
  // columns / (row * lanes) against out_channels / lanes, with a fifth for loads that cross cache lines
  return row <= planar::kMostVectors && 5 * z.columns > 6 * z.out_channels * row;
}

template <class T> void correlate_planar(const Correlation<T>& z) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t channels = z.source.channels, taps = z.taps_h * z.taps_w;
  planar::Plan plan;
  // Bytes, offsets and weights of a call in one buffer.
  const int64_t numbers = z.taps_h + z.taps_w + ceil_div(z.rows, 8);
  int64_t* offsets = scratch<int64_t>(Slot::family_4, numbers + channels * taps * z.out_channels);
  uint8_t* ranges = reinterpret_cast<uint8_t*>(offsets + z.taps_h + z.taps_w);
  A* weights = reinterpret_cast<A*>(offsets + numbers);
  plan.borders = find_borders(z.rows, z.stride_h, z.source.h, z.tap_h, z.taps_h, ranges);
  const int64_t passes = ceil_div(z.out_channels, planar::kMostOutputs);
  plan.outputs = ceil_div(z.out_channels, passes);
  plan.row_vectors = ceil_div(z.columns, lanes);
  plan.row_length = plan.row_vectors * lanes;
  plan.min_h = z.tap_h[0], plan.span_h = z.tap_h[z.taps_h - 1] - plan.min_h;
  plan.min_w = z.tap_w[0], plan.span_w = z.tap_w[z.taps_w - 1] - plan.min_w;
  plan.pitch = plan.row_length + ceil_div(plan.span_w, lanes) * lanes;
  const int64_t row_bytes = channels * plan.pitch * static_cast<int64_t>(sizeof(A));
  plan.band = larger(1, (planar::kBandBytes / row_bytes - plan.span_h) / z.stride_h);
  plan.band = smaller(plan.band, planar::kMostVectors / plan.row_vectors);
  plan.band = smaller(plan.band, z.rows);
  plan.bands = ceil_div(z.rows, plan.band);
  plan.band = ceil_div(z.rows, plan.bands);
  plan.bands = ceil_div(z.rows, plan.band);
  const double work =
      static_cast<double>(z.source.n * z.rows * z.columns) * static_cast<double>(z.out_channels * channels * taps);
  plan.channel_block = larger(1, sum_depth(channels * taps, work) / taps);
  for (int64_t r = 0; r < z.taps_h; ++r) offsets[r] = (z.tap_h[r] - plan.min_h) * plan.pitch;
  for (int64_t s = 0; s < z.taps_w; ++s) offsets[z.taps_h + s] = z.tap_w[s] - plan.min_w;
  plan.row_offset = offsets;
  plan.column_offset = offsets + z.taps_h;

  A* to = weights;
  for (int64_t o = 0; o < z.out_channels; o += plan.outputs)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t r = 0; r < z.taps_h; ++r)
        for (int64_t s = 0; s < z.taps_w; ++s)
          for (int64_t k = o; k < smaller(z.out_channels, o + plan.outputs); ++k)
            *to++ = static_cast<A>(
                static_cast<acc_t<T>>(z.weight[k * z.weight_out + c * z.weight_in + z.kernel_h[r] * z.weight_h +
                                               z.kernel_w[s] * z.weight_w]));

  const int64_t grain = larger(1, static_cast<int64_t>(131072.0 * static_cast<double>(z.source.n * plan.bands) / work));
  parallel_for(z.source.n * plan.bands, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % plan.bands * plan.band;
      planar::run_band(z, plan, weights, i / plan.bands, row, smaller(row + plan.band, z.rows));
    }
  });
}

}  // namespace dlkern::cpu::DLKERN_ISA

// Convolutions of 3 x 3 and 5 x 5 taps in float, without stride, and the gradients of their input by Winograd's transforms
// (winograd.h): 2.25 and 2.04 times fewer multiplications. Blocks of tiles are transformed to
// [place][tile][channel], which stays in the second-level cache; for each panel of output channels the products of all
// places are made and transformed back.
//
// Sums over channels go in chains of kChain, added up in a second sum: in one chain of 256 the error was 2.3 times that
// of a library's direct convolution, so it is 0.3 to 1.1 times. An infinity or NaN would spread over its whole tile: where
// an output is not finite the call is computed again, directly.
// Floor: multiplications over the FMA peak; to them come the transforms, about 10 additions a place and channel.
#pragma once
#include "conv_borders.h"
#include "conv_finish.h"
#include "winograd.h"

namespace dlkern::cpu::DLKERN_ISA::winograd {

constexpr int64_t kWidth = kVectors * kLanes<float>;  // of a panel of output channels
template <class S> constexpr int64_t kFilterChannels = S::kTaps == 3 ? 48 : 16;  // transformed at a time
// Channels of a panel's filters that are used as soon as they are transformed.
template <class S> constexpr int64_t kPanelDepth = S::kTaps == 3 ? 144 : 48;
constexpr double kLeastDensity = 1.0 / 16;  // of inputs: there the error is up to 1.8 times oneDNN's
constexpr int64_t kMostBlockBytes = 16 * 1024 * 1024;  // a line is not cut

// One call.
template <class S> struct Call {
  const Correlation<float>& z;
  Lines lines;
  int64_t channels, outputs, panels;  // of a group
  int64_t pitch;  // of transformed tiles
  Filter<float> filter;
  bool failed = false;

  explicit Call(const Correlation<float>& z)
      : z(z),
        lines(z.source.n, z.rows, z.columns, z.tap_h[1] - z.tap_h[0], z.tap_w[1] - z.tap_w[0]),
        channels(z.source.channels / z.groups),
        outputs(z.out_channels / z.groups),
        panels(ceil_div(outputs, kWidth)),
        pitch(pitch_of(channels)) {}

  int64_t count_of(int64_t panel) const { return smaller(kWidth, outputs - panel * kWidth); }
  int64_t vectors_of(int64_t panel) const { return ceil_div(count_of(panel), kLanes<float>); }
  static int64_t filter_plane(int64_t depth) { return depth * kWidth + 48; }
  int64_t block_bytes() const {  // half where the filters stay in the cache, too
    return z.groups * panels * panel_size() * 4 <= kBlockBytes ? kBlockBytes / 2 : kBlockBytes;
  }
  int64_t panel_size() const { return kPlaces<S> * filter_plane(channels); }

  // A panel's filters for channels [begin, begin + depth), as [place][channel][width].
  void transform_filters(int64_t group, int64_t panel, int64_t begin, int64_t depth, float* to) const {
    const int64_t width = vectors_of(panel) * kLanes<float>;
    float* taps = scratch<float>(Slot::tiles_b, kTaps<S> * kFilterChannels<S> * width);
    // Where a filter's input channels are neighbours in memory, each tap is a filter of one tap.
    const bool by_tap = z.weight_in == 1;
    for (int64_t c = 0; c < depth; c += kFilterChannels<S>) {
      const int64_t some = smaller(kFilterChannels<S>, depth - c),
                    rows = filter.out_stride == 1 || by_tap ? some : smaller(kFilterChannels<S>, channels);
      Filter<float> f = filter;
      f.data = z.weight + group * z.weight_group + (begin + c) * z.weight_in;
      f.in_channels = some;
      f.tap_count = by_tap ? 1 : kTaps<S>;
      if (!f.by_channel) f.run = by_tap ? some : z.kernel_size * some;
      for (int64_t tap = 0; tap < kTaps<S>; tap += f.tap_count) {
        Filter<float> part = f;
        if (by_tap) part.data += f.taps[tap];
        pack_filter(part, panel * kWidth, count_of(panel), width, taps + tap * rows * width);
      }
      transform_filter<S>(taps, rows * width, some * width, to + c * width, filter_plane(depth));
    }
  }

  void transform_lines(int64_t group, int64_t begin, int64_t end, float* tiles, int64_t plane) const {
    read_tiles<S::kInputs>(
        z.source, lines, z.tap_h[0], z.tap_w[0], group * channels, channels, begin, end,
        [&](int64_t tile, const float* const(&pixels)[S::kInputs][S::kInputs])
            __attribute__((always_inline)) { transform_input<S>(pixels, channels, tiles + tile * pitch, plane); });
  }

  // sums[place][tile][width] (+)= products of `count` tiles and a panel's filters over `depth` channels.
  void multiply_panel(int64_t count, int64_t depth, const float* tiles, int64_t plane, const float* filters,
                      int64_t vectors, float* sums, int64_t sums_plane, bool add) const {
    const int64_t width = vectors * kLanes<float>, calls = ceil_div(count, kRows);
    for (int64_t place = 0; place < kPlaces<S>; ++place) {
      const float* here = filters + place * filter_plane(depth);
      // The next place's filters come while this one's products are made: lines a chain, and elements a call.
      const int64_t fetch = place + 1 < kPlaces<S> ? ceil_div(kChain * width / 16, calls) : 0,
                    step = ceil_div(depth, kChain) * fetch * 16;
      const float* ahead = here + filter_plane(depth);
      for (int64_t tile = 0; tile < count; tile += kRows, ahead += step)
        multiply_for<false>(smaller(kRows, count - tile), vectors)(
            depth, tiles + place * plane + tile * pitch, pitch, here, width, sums + place * sums_plane + tile * width,
            width, add, ahead, fetch);
    }
  }

  // Rows of outputs, of all images: a line's first, and how many it has: none where a phase is shorter than the first.
  int64_t row_of(int64_t line) const { return lines.image(line) * z.rows + lines.row(line); }
  int64_t high(int64_t line) const {
    const int64_t row = lines.row(line);
    return row >= z.rows ? 0 : row + lines.dilation_h < z.rows ? 2 : 1;
  }

  // Calls f(row, end) for the rows of lines [begin, end): those of all lines are neighbours, but for dilation.
  template <class F> void for_each_run(int64_t begin, int64_t end, F&& f) const {
    if (lines.dilation_h == 1) return f(row_of(begin), row_of(end - 1) + high(end - 1));
    for (int64_t line = begin; line < end; ++line)
      for (int64_t y = 0; y < high(line); ++y) {
        const int64_t row = row_of(line) + y * lines.dilation_h;
        f(row, row + 1);
      }
  }

  // The outputs of one tile's channels: to[y] points to row y of the image.
  void write_tile(const float* m, int64_t sums_plane, const vfloat* bias, int64_t vectors, int64_t count, int64_t high,
                  int64_t column, float* const (&to)[2], int64_t step, Largest& largest) const {
    const int64_t dw = lines.dilation_w, wide = column >= z.columns ? 0 : column + dw < z.columns ? 2 : 1;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t lane = v * kLanes<float>;
      vfloat out[2][2];
      transform_output<S>(m + lane, sums_plane, out);
      for (int64_t y = 0; y < high; ++y)
        for (int64_t x = 0; x < wide; ++x) {
          largest.add(out[y][x]);
          store_some(to[y] + (column + x * dw) * step + lane, out[y][x] + bias[v], count - lane);
        }
    }
  }

  void write_panel(int64_t group, int64_t panel, int64_t begin, int64_t end, const float* sums, int64_t sums_plane) {
    const int64_t vectors = vectors_of(panel), width = vectors * kLanes<float>, count = count_of(panel),
                  first = group * outputs + panel * kWidth;
    const bool planar = !z.output_channels_last;
    vfloat bias[kVectors] = {};
    for (int64_t v = 0; z.bias && v < vectors; ++v)
      bias[v] = load_some(z.bias + first + v * kLanes<float>, count - v * kLanes<float>);
    // Planar outputs are transposed from [row][column][width].
    float* pixels = planar ? scratch<float>(Slot::tiles_c, 2 * (end - begin) * z.columns * width) : nullptr;
    float* row = pixels;
    const float* m = sums;
    Largest largest;
    for (int64_t line = begin; line < end; row += high(line) * z.columns * width, ++line) {
      float* to[2];
      for (int y = 0; y < 2; ++y) {
        const int64_t h = z.start_h + lines.row(line) + y * lines.dilation_h;
        to[y] = planar ? row + y * z.columns * width
                       : z.output + ((lines.image(line) * z.out_h + h) * z.out_w + z.start_w) * z.out_channels + first;
      }
      for (int64_t t = 0; t < lines.tiles(); ++t, m += width)
        write_tile(m, sums_plane, bias, vectors, planar ? width : count, high(line), lines.column(t), to,
                   planar ? width : z.out_channels, largest);
    }
    if (planar)
      for_each_run(begin, end, [&](int64_t from, int64_t last) {
        write_out(z, pixels, width, first, count, from, last, 0, z.columns);
        pixels += (last - from) * z.columns * width;
      });
    if (!largest.is_finite()) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    if (z.residual || z.activation)
      for_each_run(begin, end,
                   [&](int64_t from, int64_t last) { finish_block(z, first, count, from, last, 0, z.columns); });
  }

  // Many tiles: filters are transformed first, then a task is a block of lines.
  void run_blocks() {
    const int64_t threads = num_threads(), line_bytes = kPlaces<S> * lines.tiles() * pitch * 4, size = panel_size();
    int64_t most = larger(1, block_bytes() / line_bytes), blocks = ceil_div(lines.count(), most) * z.groups;
    if (blocks < 8 * threads)  // the same number for each
      most = ceil_div(lines.count(), smaller(lines.count(), ceil_div(ceil_div(blocks, threads) * threads, z.groups)));
    blocks = ceil_div(lines.count(), most);
    float* filters = scratch<float>(Slot::family_0, z.groups * panels * size);
    parallel_for(z.groups * panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) transform_filters(i / panels, i % panels, 0, channels, filters + i * size);
    });
    const int64_t most_tiles = most * lines.tiles(), plane = plane_of(most_tiles, pitch);
    parallel_for(blocks * z.groups, 1, [&](int64_t begin, int64_t end) {
      float* tiles = scratch<float>(Slot::family_1, kPlaces<S> * plane);
      float* sums = scratch<float>(Slot::family_2, kPlaces<S> * (most_tiles * kWidth + 16));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i % z.groups, line = i / z.groups * most, last = smaller(line + most, lines.count()),
                      count = (last - line) * lines.tiles();
        transform_lines(group, line, last, tiles, plane);
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t sums_plane = count * vectors_of(panel) * kLanes<float> + 16;
          multiply_panel(count, channels, tiles, plane, filters + (group * panels + panel) * size, vectors_of(panel),
                         sums, sums_plane, false);
          write_panel(group, panel, line, last, sums, sums_plane);
        }
      }
    });
  }

  // Few tiles: they are transformed first, then a task is a panel, whose filters are transformed and used in the cache.
  void run_panels() {
    const int64_t count = lines.count() * lines.tiles(), plane = plane_of(count, pitch);
    float* tiles = scratch<float>(Slot::family_1, z.groups * kPlaces<S> * plane);
    parallel_for(z.groups * lines.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const int64_t group = i / lines.count(), line = i % lines.count(),
                      last = smaller(line + end - i, lines.count());
        transform_lines(group, line, last, tiles + group * kPlaces<S> * plane + line * lines.tiles() * pitch, plane);
        i += last - line;
      }
    });
    parallel_for(z.groups * panels, 1, [&](int64_t begin, int64_t end) {
      float* filters = scratch<float>(Slot::family_0, kPlaces<S> * filter_plane(kPanelDepth<S>));
      float* sums = scratch<float>(Slot::family_2, kPlaces<S> * (count * kWidth + 16));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / panels, panel = i % panels, vectors = vectors_of(panel),
                      sums_plane = count * vectors * kLanes<float> + 16;
        for (int64_t c = 0; c < channels; c += kPanelDepth<S>) {
          const int64_t depth = smaller(kPanelDepth<S>, channels - c);
          transform_filters(group, panel, c, depth, filters);
          multiply_panel(count, depth, tiles + group * kPlaces<S> * plane + c, plane, filters, vectors, sums,
                         sums_plane, c > 0);
        }
        write_panel(group, panel, 0, lines.count(), sums, sums_plane);
      }
    });
  }
};

// Whether every output sees taps that weigh what the filter's others do. By transforms, taps that an output does not see, or
// that are zero, cancel only but for rounding: it would be off by what a large one rounds to, and a masked filter would
// not keep inputs apart. Told from 16 outputs' filters, 16 input channels each.
template <class S> inline bool has_even_taps(const Correlation<float>& z, const Borders& rows, const Borders& columns) {
  constexpr int64_t some = 16;
  const int64_t channels = z.source.channels / z.groups, outputs = z.out_channels / z.groups;
  float most[S::kTaps][S::kTaps] = {};
  for (int64_t r = 0; r < S::kTaps; ++r)
    for (int64_t s = 0; s < S::kTaps; ++s) {
      int64_t zeros = 0;
      for (int64_t i = 0; i < some; ++i) {
        const int64_t k = i * (z.out_channels - 1) / (some - 1), c = i * (channels - some) / (some - 1);
        const float* from = z.weight + k / outputs * z.weight_group + k % outputs * z.weight_out + c * z.weight_in +
                            z.kernel_h[r] * z.weight_h + z.kernel_w[s] * z.weight_w;
        for (int64_t j = 0; j < some; ++j) {
          const float weight = from[j * z.weight_in], size = weight < 0 ? -weight : weight;
          zeros += weight == 0;
          most[r][s] = size > most[r][s] ? size : most[r][s];
        }
      }
      if (8 * zeros > some * some) return false;
    }
  const auto most_of = [&](const TapRange& of_rows, const TapRange& of_columns) {
    float result = 0;
    for (int64_t r = of_rows.begin; r < of_rows.end; ++r)
      for (int64_t s = of_columns.begin; s < of_columns.end; ++s) result = most[r][s] > result ? most[r][s] : result;
    return result;
  };
  const float all = most_of({0, S::kTaps}, {0, S::kTaps});
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t j = 0; j < columns.count; ++j)
      if (!(all <= 4 * most_of(rows.ranges[i], columns.ranges[j]))) return false;
  return rows.cut && columns.cut;
}

template <class S> inline bool pays(const Correlation<float>& z) {
  const auto fits = [](const int64_t* tap, int64_t taps) {
    if (taps != S::kTaps) return false;
    for (int t = 2; t < S::kTaps; ++t)
      if (tap[t] - tap[t - 1] != tap[1] - tap[0]) return false;
    return true;
  };
  if (!has_winograd() || !fits(z.tap_h, z.taps_h) || !fits(z.tap_w, z.taps_w) || z.stride_h != 1 || z.stride_w != 1 ||
      z.step_h != 1 || z.step_w != 1)
    return false;
  const Call<S> call(z);
  // The transforms' roundings outweigh short sums'; of many channels a block would have few tiles of 49 places.
  if (call.channels < 32 || (S::kTaps == 5 && call.channels > 96) || call.outputs < 16) return false;
  if (kPlaces<S> * call.lines.tiles() * call.pitch * 4 > kMostBlockBytes) return false;
  const double tiles = static_cast<double>(call.lines.count() * call.lines.tiles()),
               channels = static_cast<double>(call.channels), outputs = static_cast<double>(call.outputs),
               seen_h =
                   static_cast<double>(count_seen(S::kTaps, z.tap_h[0], call.lines.dilation_h, z.rows, 1, z.source.h)),
               seen_w = static_cast<double>(
                   count_seen(S::kTaps, z.tap_w[0], call.lines.dilation_w, z.columns, 1, z.source.w)),
               direct = static_cast<double>(z.source.n) * seen_h * seen_w * channels * outputs;
  // Filters cost what so many tiles' products do; a direct computation has to pack its own, but for kept ones.
  const double filters = z.packed ? 32 : 6;
  return direct > 1.1 * (products_of<S>(tiles, channels, outputs) + filters * kPlaces<S> * channels * outputs);
}

// Whether the outputs are written, and finite.
template <class S> inline bool correlate(const Correlation<float>& z, const Borders& rows, const Borders& columns) {
  if (!pays<S>(z) || !has_even_taps<S>(z, rows, columns) || density_of(z.source) < kLeastDensity) return false;
  Call<S> call(z);
  const int64_t channels = smaller(kFilterChannels<S>, call.channels);
  int64_t* taps = scratch<int64_t>(Slot::tiles_a, kTaps<S> + z.kernel_size * channels);
  if (z.weight_in == 1) {
    call.filter = Filter<float>{nullptr, z.weight_out, 1, channels, taps, kTaps<S>, taps + kTaps<S>, channels, false};
    for (int64_t t = 0; t < kTaps<S>; ++t)
      taps[t] = z.kernel_h[t / S::kTaps] * z.weight_h + z.kernel_w[t % S::kTaps] * z.weight_w;
    for (int64_t c = 0; c < channels; ++c) taps[kTaps<S> + c] = c;
  } else {
    call.filter = describe_filter(z, channels, taps, taps + kTaps<S>);
  }
  const int64_t bytes = kPlaces<S> * call.lines.count() * call.lines.tiles() * call.pitch * 4;
  if (bytes <= 2 * kBlockBytes && z.groups * call.panels >= 2 * num_threads())
    call.run_panels();
  else
    call.run_blocks();
  return !call.failed;
}

inline bool correlate(const Correlation<float>& z, const Borders& rows, const Borders& columns) {
  return correlate<Taps3>(z, rows, columns) || correlate<Taps5>(z, rows, columns);
}

}  // namespace dlkern::cpu::DLKERN_ISA::winograd

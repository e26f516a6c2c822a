// Convolution in small groups, and its gradients: a lane is an output channel, and a vector holds whole groups.
//
// For each channel i of a group, one permutation of a pixel's vector puts every group's channel i into all lanes of its
// group; multiplied by weights packed a vector for each (tap, i), all groups of the vector advance together, with no
// lane idle. Source windows are copied, zero-padded, as [row][column][lane] from either layout. A tile is kPixels
// pixels of one row; where taps are neighbours, a permuted pixel serves all of a row's taps that use it.
// The input's gradient is the same with the weights of each group transposed, once for each residue of the position
// modulo the stride. The weight's gradient holds vectors for some (tap, i) and runs over the pixels of a band with them.
// Floor: 2 N P Q K C R S / groups over the FMA peak.
#include "conv_grouped.h"

#include <type_traits>

#include "conv_taps.h"
#include "parallel.h"
#include "scratch.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

constexpr int kPixels = 7;  // divides the usual widths
constexpr int64_t kWindowBytes = 48 * 1024;

// Whether groups of a shape fill vectors, and vectors can be permuted.
template <class T> bool fits(const ConvShape& z) {
#if defined(__AVX2__)
  const int64_t group = z.c / z.groups;
  return sizeof(T) < 8 && z.c == z.k && group > 1 && group <= kLanes<T> && kLanes<T> % group == 0;
#else
  return static_cast<void>(z), false;
#endif
}

// Lane l: the first channel of its group.
inline vint32 group_start(int64_t group) {
  vint32 start;
  for (int l = 0; l < kLanes<float>; ++l) start[l] = static_cast<int>(l / group * group);
  return start;
}

// Channel i of each group, in all lanes of the group, of a pixel's vector; WHOLE where a group fills the vector.
template <bool WHOLE> [[gnu::always_inline]] inline vfloat spread(const float* pixel, const vint32& at, int64_t i) {
  vfloat value = WHOLE ? broadcast<float>(pixel[i]) : __builtin_shuffle(load(pixel), at);
  keep(value);
  return value;
}

struct Tile {
  const float* source;  // what tap (0, 0) of the first pixel reads
  int64_t taps_h, taps_w, row_step, column_step, pixel;
  const float* weights;  // of tap (0, 0), channel 0
  int64_t weight_h, weight_w, weight_i, group;
  const float* bias;  // or null
  int64_t out_step;
  int lanes;
};

// S neighbouring taps a row; or any number anywhere, one at a time, where S is 0.
template <int PIXELS, int S, int STRIDE, bool WHOLE, class T> [[gnu::noinline]] void run_tile(const Tile& tile,
                                                                                              T* output) {
  constexpr int kLane = kLanes<float>, kTaps = S ? S : 1;
  const int64_t taps_h = tile.taps_h, columns = S ? 1 : tile.taps_w, group = tile.group, weight_w = tile.weight_w,
                weight_i = tile.weight_i, pixel = S ? kLane : tile.pixel;
  const vint32 start = group_start(group);
  vfloat sum[PIXELS] = {};
  for (int64_t r = 0; r < taps_h; ++r) {
    vfloat part[PIXELS] = {};  // a sum for each row of taps: shorter sums, smaller errors
    for (int64_t c = 0; c < columns; ++c) {
      const float* source = tile.source + r * tile.row_step + c * tile.column_step;
      const float* weights = tile.weights + r * tile.weight_h + c * weight_w;
      vint32 at = start;
      for (int64_t i = 0; i < group; ++i, at += 1, weights += weight_i) {
        vfloat weight[kTaps];
#pragma GCC unroll 8
        for (int s = 0; s < kTaps; ++s) weight[s] = load(weights + s * weight_w);
#pragma GCC unroll 32
        for (int j = 0; j < (PIXELS - 1) * STRIDE + kTaps; ++j) {
          const vfloat value = spread<WHOLE>(source + j * pixel, at, i);
#pragma GCC unroll 8
          for (int s = 0; s < kTaps; ++s)
            if (j >= s && (j - s) % STRIDE == 0 && (j - s) / STRIDE < PIXELS)
              part[(j - s) / STRIDE] += weight[s] * value;
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i) sum[i] += part[i];
  }
  if (tile.bias) {
    const vfloat bias = load(tile.bias);
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i) sum[i] += bias;
  }
#pragma GCC unroll 8
  for (int i = 0; i < PIXELS; ++i, output += tile.out_step) {
    prefetch_ahead_to_store(output);
    store_lanes(output, sum[i], tile.lanes);
  }
}

template <class T> using RunTile = void (*)(const Tile&, T*);

template <int PIXELS, bool WHOLE, class T> RunTile<T> tile_of(const Taps& taps, int64_t stride) {
  if (taps.step == 1) {
    if (taps.count == 3 && stride == 1) return run_tile<PIXELS, 3, 1, WHOLE, T>;
    if (taps.count == 3 && stride == 2) return run_tile<PIXELS, 3, 2, WHOLE, T>;
    if (taps.count == 2 && stride == 1) return run_tile<PIXELS, 2, 1, WHOLE, T>;
    if (taps.count == 5 && stride == 1) return run_tile<PIXELS, 5, 1, WHOLE, T>;
  }
  return run_tile<PIXELS, 0, 1, WHOLE, T>;
}
template <int PIXELS, class T> RunTile<T> tile_for(const Taps& taps, int64_t stride, int64_t group) {
  return group == kLanes<float> ? tile_of<PIXELS, true, T>(taps, stride) : tile_of<PIXELS, false, T>(taps, stride);
}

template <class T> struct Pass {
  Images<T> source;
  T* output;
  bool output_channels_last;
  int64_t out_h, out_w, rows, columns, start_h, start_w, step_h, step_w, stride_h, stride_w;
  Taps taps_h, taps_w;
  const float* weights;  // [block of channels][element of a filter][lane]
  int64_t elements, weight_h, weight_w, weight_i, group;
  const float* bias;  // [block of channels][lane], or null
};

// Output rows [begin, end) of one image, one block of channels.
template <class T> void run_band(const Pass<T>& z, int64_t image, int64_t block, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<float>;
  const int64_t c = block * lanes, channels = smaller(lanes, z.source.channels - c);
  const int64_t span_h = (z.taps_h.count - 1) * z.taps_h.step, span_w = (z.taps_w.count - 1) * z.taps_w.step;
  const int64_t width = (z.columns - 1) * z.stride_w + span_w + 1, row = width * lanes;
  const int64_t height = (end - begin - 1) * z.stride_h + span_h + 1;
  float* window = scratch<float>(Slot::family_1, height * row);
  copy_window(z.source, Window{image, begin * z.stride_h + z.taps_h.first, height, 1, z.taps_w.first, width, 1}, c,
              channels, window, row, lanes);
  Tile tile{};
  tile.taps_h = z.taps_h.count;
  tile.taps_w = z.taps_w.count;
  tile.row_step = z.taps_h.step * row;
  tile.column_step = z.taps_w.step * lanes;
  tile.pixel = z.stride_w * lanes;
  tile.weights = z.weights + block * z.elements * lanes + z.taps_h.kernel * z.weight_h + z.taps_w.kernel * z.weight_w;
  tile.weight_h = z.taps_h.kernel_step * z.weight_h;
  tile.weight_w = z.taps_w.kernel_step * z.weight_w;
  tile.weight_i = z.weight_i;
  tile.group = z.group;
  tile.bias = z.bias ? z.bias + c : nullptr;
  const int64_t pixels = z.columns >= kPixels ? kPixels : 1;
  const auto run = [&](auto* output, int64_t out_step, int64_t out_row) {
    using E = std::remove_pointer_t<decltype(output)>;
    const RunTile<E> function = pixels == kPixels ? tile_for<kPixels, E>(z.taps_w, z.stride_w, z.group)
                                                  : tile_for<1, E>(z.taps_w, z.stride_w, z.group);
    tile.out_step = out_step;
    for (int64_t i = 0; i < end - begin; ++i)
      for (int64_t next = 0; next < z.columns; next += pixels) {
        const int64_t q = smaller(next, z.columns - pixels);  // the last tile overlaps the one before
        tile.source = window + i * z.stride_h * row + q * tile.pixel;
        function(tile, output + i * out_row + q * out_step);
      }
  };
  const int64_t h = z.start_h + begin * z.step_h, all = z.source.channels;
  if (z.output_channels_last) {
    tile.lanes = static_cast<int>(channels);
    run(z.output + ((image * z.out_h + h) * z.out_w + z.start_w) * all + c, z.step_w * all, z.step_h * z.out_w * all);
    return;
  }
  tile.lanes = lanes;
  float* sums = scratch<float>(Slot::family_2, (end - begin) * z.columns * lanes);
  run(sums, lanes, z.columns * lanes);
  const int64_t plane = z.out_h * z.out_w;
  T* to = z.output + (image * all + c) * plane + h * z.out_w + z.start_w;
  if (z.step_w == 1 && z.step_h == 1) {
    transpose(sums, lanes, (end - begin) * z.columns, channels, to, plane);
    return;
  }
  for (int64_t i = 0; i < end - begin; ++i)
    for (int64_t k = 0; k < channels; ++k)
      for (int64_t q = 0; q < z.columns; ++q)
        to[k * plane + i * z.step_h * z.out_w + q * z.step_w] = static_cast<T>(sums[(i * z.columns + q) * lanes + k]);
}

template <class T> void correlate(const Pass<T>& z) {
  constexpr int64_t lanes = kLanes<float>;
  const int64_t blocks = ceil_div(z.source.channels, lanes), span_h = (z.taps_h.count - 1) * z.taps_h.step;
  const int64_t row_bytes = ((z.columns - 1) * z.stride_w + (z.taps_w.count - 1) * z.taps_w.step + 1) * kVectorBytes;
  const int64_t rows = smaller(z.rows, larger(1, (kWindowBytes / row_bytes - span_h) / z.stride_h));
  const int64_t bands = ceil_div(z.rows, rows), even = ceil_div(z.rows, bands);
  const int64_t work = even * z.columns * z.taps_h.count * z.taps_w.count * z.group;
  parallel_for(z.source.n * bands * blocks, larger(1, 16384 / (work + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks, place = task / blocks, row = place % bands * even;
      if (row < z.rows) run_band(z, place / bands, block, row, smaller(row + even, z.rows));
    }
  });
}

// Filters as [block][element of a filter][lane]. Transposed: lane c holds the weights that input channel c has in the
// filters of its group, in the place of the filter's channel.
template <class T>
float* pack(const ConvShape& z, const T* weight, bool channels_last, bool transposed, const T* bias,
            const float** bias_at) {
  constexpr int64_t lanes = kLanes<float>;
  const int64_t group = z.c / z.groups, taps = z.r * z.s, elements = group * taps, blocks = ceil_div(z.c, lanes);
  const int64_t tap = channels_last ? group : 1, channel = channels_last ? 1 : taps;
  float* packed = scratch<float>(Slot::family_0, blocks * lanes * (elements + 1));
  float* biases = packed + blocks * elements * lanes;
  parallel_for(blocks, larger(1, 16384 / (elements * lanes)), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t c = block * lanes, count = smaller(lanes, z.c - c);
      float* to = packed + block * elements * lanes;
      if (count < lanes)
        for (int64_t i = 0; i < elements * lanes; ++i) to[i] = 0.0f;
      if (!transposed) {
        transpose(weight + c * elements, elements, count, elements, to, lanes);
      } else {
        for (int64_t t = 0; t < taps; ++t)
          for (int64_t o = 0; o < group; ++o)
            for (int64_t l = 0; l < count; ++l)
              to[(t * tap + o * channel) * lanes + l] = static_cast<float>(static_cast<acc_t<T>>(
                  weight[(c + l / group * group + o) * elements + t * tap + l % group * channel]));
      }
      if (bias) {
        for (int64_t l = count; l < lanes; ++l) biases[c + l] = 0.0f;
        copy(bias + c, biases + c, count);
      }
    }
  });
  if (bias_at) *bias_at = bias ? biases : nullptr;
  return packed;
}

template <class T> void describe_weights(const ConvShape& z, bool channels_last, Pass<T>& pass) {
  constexpr int64_t lanes = kLanes<float>;
  pass.group = z.c / z.groups;
  pass.elements = pass.group * z.r * z.s;
  pass.weight_w = lanes * (channels_last ? pass.group : 1);
  pass.weight_h = z.s * pass.weight_w;
  pass.weight_i = lanes * (channels_last ? 1 : z.r * z.s);
}

template <class T> bool forward(const ConvForwardArgs<T>& args) {
  const ConvShape& z = args.shape;
  if (!fits<T>(z)) return false;
  if constexpr (sizeof(T) < 8) {
    Pass<T> pass{};
    pass.source = {args.input, args.input_channels_last, z.n, z.c, z.h, z.w};
    pass.output = args.output;
    pass.output_channels_last = args.output_channels_last;
    pass.out_h = pass.rows = z.p, pass.out_w = pass.columns = z.q;
    pass.step_h = pass.step_w = 1;
    pass.stride_h = z.stride_h, pass.stride_w = z.stride_w;
    pass.taps_h = forward_taps(z.r, z.pad_h, z.dilation_h);
    pass.taps_w = forward_taps(z.s, z.pad_w, z.dilation_w);
    describe_weights(z, args.weight_channels_last, pass);
    pass.weights = pack(z, args.weight, args.weight_channels_last, false, args.bias, &pass.bias);
    correlate(pass);
  }
  return true;
}

template <class T> bool backward_input(const ConvBackwardInputArgs<T>& args) {
  const ConvShape& z = args.shape;
  if (!fits<T>(z)) return false;
  if constexpr (sizeof(T) < 8) {
    Pass<T> pass{};
    pass.source = {args.grad_output, args.grad_output_channels_last, z.n, z.k, z.p, z.q};
    pass.output = args.grad_input;
    pass.output_channels_last = args.grad_input_channels_last;
    pass.out_h = z.h, pass.out_w = z.w;
    pass.step_h = z.stride_h, pass.step_w = z.stride_w;
    pass.stride_h = pass.stride_w = 1;
    describe_weights(z, args.weight_channels_last, pass);
    pass.weights = pack<T>(z, args.weight, args.weight_channels_last, true, nullptr, nullptr);
    for (int64_t a = 0; a < smaller(z.stride_h, z.h); ++a)
      for (int64_t b = 0; b < smaller(z.stride_w, z.w); ++b) {
        pass.taps_h = residue_taps(a, z.r, z.stride_h, z.pad_h, z.dilation_h);
        pass.taps_w = residue_taps(b, z.s, z.stride_w, z.pad_w, z.dilation_w);
        if (pass.taps_h.count == 0 || pass.taps_w.count == 0) {  // zeros are written: one tap, outside the image
          pass.taps_h = Taps{1, -z.h, 1, 0, 1};
          pass.taps_w = Taps{1, -z.w, 1, 0, 1};
        }
        pass.start_h = a, pass.start_w = b;
        pass.rows = ceil_div(z.h - a, z.stride_h), pass.columns = ceil_div(z.w - b, z.stride_w);
        correlate(pass);
      }
  }
  return true;
}

// ---- Gradient of the weight -------------------------------------------------------------------------------------

constexpr int kColumns = 4;  // pixels of grad_output, held in registers
constexpr int kChannels = kVectorBytes == 64 ? 4 : 2;  // channels of a group taken together

struct Rows {
  const float *y, *x;  // [row][column][lane], x: what the first tap sees
  int64_t count, columns, y_row, x_row;
  int64_t pixel;  // of x, elements
  int64_t group;
  float* sums;
  int64_t sum_w, sum_i;
};

// S neighbouring taps (or one, at any stride) and CHANNELS channels of each group, from `first` on.
template <int S, int STRIDE, int CHANNELS, bool WHOLE> [[gnu::noinline]] void add_rows(const Rows& z, int64_t first) {
  constexpr int64_t lanes = kLanes<float>;
  vfloat sum[S][CHANNELS] = {};
  vint32 at[CHANNELS];
  for (int i = 0; i < CHANNELS; ++i) at[i] = group_start(z.group) + static_cast<int>(first + i);
  const int64_t pixel = S > 1 ? lanes : z.pixel, columns = z.columns;
  const auto add = [&]<int COLUMNS>(const float* y, const float* x) __attribute__((always_inline)) {
    vfloat value[COLUMNS];
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) value[j] = load(y + j * lanes);
#pragma GCC unroll 32
    for (int j = 0; j < (COLUMNS - 1) * STRIDE + S; ++j) {
#pragma GCC unroll 8
      for (int i = 0; i < CHANNELS; ++i) {
        const vfloat other = spread<WHOLE>(x + j * pixel, at[i], first + i);
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s)
          if (j >= s && (j - s) % STRIDE == 0 && (j - s) / STRIDE < COLUMNS)
            sum[s][i] += value[(j - s) / STRIDE] * other;
      }
    }
  };
  for (int64_t row = 0; row < z.count; ++row) {
    const float *y = z.y + row * z.y_row, *x = z.x + row * z.x_row;
    int64_t q = 0;
    for (; q + kColumns <= columns; q += kColumns, y += kColumns * lanes, x += kColumns * STRIDE * pixel)
      add.template operator()<kColumns>(y, x);
    for (; q < columns; ++q, y += lanes, x += STRIDE * pixel) add.template operator()<1>(y, x);
  }
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 8
    for (int i = 0; i < CHANNELS; ++i) {
      float* to = z.sums + s * z.sum_w + (first + i) * z.sum_i;
      store(to, load(to) + sum[s][i]);
    }
}

template <int S, int STRIDE> void add_group(const Rows& z) {
  int64_t i = 0;
  if (z.group == kLanes<float>)
    for (; i < z.group; i += kChannels) add_rows<S, STRIDE, kChannels, true>(z, i);
  for (; i + kChannels <= z.group; i += kChannels) add_rows<S, STRIDE, kChannels, false>(z, i);
  for (; i < z.group; i += 2) add_rows<S, STRIDE, 2, false>(z, i);
}

// The products of a band with all taps.
inline void add_taps(const ConvShape& z, const Rows& band, int64_t sum_h) {
  constexpr int64_t lanes = kLanes<float>;
  for (int64_t r = 0; r < z.r; ++r) {
    Rows rows = band;
    rows.x = band.x + r * z.dilation_h * (band.x_row / z.stride_h);
    rows.sums = band.sums + r * sum_h;
    if (z.s == 3 && z.dilation_w == 1 && z.stride_w == 1) {
      add_group<3, 1>(rows);
    } else if (z.s == 3 && z.dilation_w == 1 && z.stride_w == 2) {
      add_group<3, 2>(rows);
    } else {
      for (int64_t s = 0; s < z.s; ++s, rows.sums += rows.sum_w, rows.x += z.dilation_w * lanes) add_group<1, 1>(rows);
    }
  }
}

template <class T> bool backward_weight(const ConvBackwardWeightArgs<T>& args) {
  const ConvShape& z = args.shape;
  if (!fits<T>(z)) return false;
  if constexpr (sizeof(T) < 8) {
    constexpr int64_t lanes = kLanes<float>;
    const int64_t group = z.c / z.groups, taps = z.r * z.s, elements = group * taps, blocks = ceil_div(z.c, lanes);
    const int64_t span_h = (z.r - 1) * z.dilation_h, span_w = (z.s - 1) * z.dilation_w;
    const int64_t width = (z.q - 1) * z.stride_w + span_w + 1, row = width * lanes;
    const int64_t depth =
        sum_depth(z.n * z.p * z.q, static_cast<double>(z.n * z.p * z.q) * static_cast<double>(z.c * elements));
    const int64_t summed = larger(1, depth / z.q);  // rows between two additions to memory
    const int64_t across = ceil_div(z.q, ceil_div(z.q, depth));  // columns of them
    const int64_t fitting = (kWindowBytes / (width * kVectorBytes) - span_h) / z.stride_h;
    const int64_t band_rows = smaller(z.p, larger(1, fitting / summed) * summed);
    const Images<T> x{args.input, args.input_channels_last, z.n, z.c, z.h, z.w};
    const Images<T> y{args.grad_output, args.grad_output_channels_last, z.n, z.k, z.p, z.q};
    parallel_for(blocks, larger(1, 16384 / (elements * z.n * z.p * z.q)), [&](int64_t begin, int64_t end) {
      float* window = scratch<float>(Slot::family_1, ((band_rows - 1) * z.stride_h + span_h + 1) * row);
      float* packed = scratch<float>(Slot::family_2, band_rows * z.q * lanes);
      float* sums = scratch<float>(Slot::family_3, 2 * elements * lanes);  // of an image; of those before
      float* total = sums + elements * lanes;
      for (int64_t block = begin; block < end; ++block) {
        const int64_t c = block * lanes, channels = smaller(lanes, z.c - c);
        for (int64_t i = 0; i < elements * lanes; ++i) total[i] = 0.0f;
        for (int64_t n = 0; n < z.n; ++n) {
          for (int64_t i = 0; i < elements * lanes; ++i) sums[i] = 0.0f;
          for (int64_t p = 0; p < z.p; p += band_rows) {
            const int64_t count = smaller(band_rows, z.p - p);
            const Window seen{n, p * z.stride_h - z.pad_h, (count - 1) * z.stride_h + span_h + 1, 1, -z.pad_w, width,
                              1};
            copy_window(x, seen, c, channels, window, row, lanes);
            copy_window(y, Window{n, p, count, 1, 0, z.q, 1}, c, channels, packed, z.q * lanes, lanes);
            for (int64_t i = 0; i < count; i += summed)
              for (int64_t q = 0; q < z.q; q += across) {
                Rows rows{};
                rows.y = packed + (i * z.q + q) * lanes;
                rows.x = window + i * z.stride_h * row + q * z.stride_w * lanes;
                rows.count = smaller(summed, count - i);
                rows.columns = smaller(across, z.q - q);
                rows.y_row = z.q * lanes;
                rows.x_row = z.stride_h * row;
                rows.pixel = z.stride_w * lanes;
                rows.group = group;
                rows.sums = sums;
                rows.sum_w = lanes * (args.grad_weight_channels_last ? group : 1);
                rows.sum_i = lanes * (args.grad_weight_channels_last ? 1 : taps);
                add_taps(z, rows, z.s * rows.sum_w);
              }
          }
          for (int64_t i = 0; i < elements * lanes; ++i) total[i] += sums[i];
        }
        transpose(total, lanes, elements, channels, args.grad_weight + c * elements, elements);
      }
    });
  }
  return true;
}

}  // namespace

#define DLKERN_GROUPED(T)                                                                            \
  bool grouped_forward(const ConvForwardArgs<T>& args) { return forward(args); }                     \
  bool grouped_backward_input(const ConvBackwardInputArgs<T>& args) { return backward_input(args); } \
  bool grouped_backward_weight(const ConvBackwardWeightArgs<T>& args) { return backward_weight(args); }
DLKERN_GROUPED(float)
DLKERN_GROUPED(double)
DLKERN_GROUPED(bfloat16)
DLKERN_GROUPED(float16)
#undef DLKERN_GROUPED

}  // namespace dlkern::cpu::DLKERN_ISA

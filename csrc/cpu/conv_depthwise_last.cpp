// Depthwise convolution of channels_last images, and its gradients: a lane is a channel.
//
// Forward and the gradient of the input are correlations. A tile is kPixels neighbouring output pixels of one row and
// one vector of channels (of bfloat16 two, even and odd apart); for each row of taps every input pixel is loaded once and multiplied into all the sums that
// use it. Taps outside the image are left out, so nothing is copied or padded. The last vector of channels overlaps
// the one before. The input's gradient runs once for each residue of the position modulo the stride.
// The weight's gradient holds a vector for each tap and walks along the rows of both images with them; they are added
// to memory every few rows, so that rounding errors do not grow with the number of pixels. Floor: memory.
#include "conv_depthwise.h"
#include "parallel.h"
#include "scratch.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

constexpr int kPixels = 7;  // divides the usual widths 7, 14, 28, 56, 112

// output[n, start + i * step] = bias + sum over taps of weights[kernel element] * source[n, i * stride + tap].
template <class T> struct Pass {
  const T* source;
  int64_t n, channels, h, w;
  T* output;
  int64_t out_h, out_w, rows, columns, start_h, start_w, step_h, step_w, stride_h, stride_w;
  Taps taps_h, taps_w;
  int64_t kernel_w;  // elements of a kernel's row
  const acc_t<T>* weights;  // [kernel element][padded]
  const acc_t<T>* bias;  // [padded], or null
  int64_t padded;
};

// What a tile of output pixels needs: of one row, from one column on.
template <class T> struct Tile {
  const T* source;  // tap (first in range, 0) of its first pixel; may lie left of the image
  int64_t rows, row_step;  // taps that lie inside, elements from one's source row to the next's
  const acc_t<T>* weights;  // of tap (first in range, 0)
  int64_t weight_row, weight_step, weight_count;
  const acc_t<T>* bias;
  int64_t channels, begin, end;  // source columns inside the image, relative to `source`
  int64_t step, stride;  // of taps and pixels, in columns
  T* output;
  int64_t out_step;
};

// Sums of a tile, without bias, over channels from c on; load_source() and load_constants() read a vector of them.
template <int PIXELS, int S, int STRIDE, bool EDGE, class T, class LoadSource, class LoadConstants>
[[gnu::always_inline]] inline void sum_tile(const Tile<T>& tile, int64_t c, Vec<acc_t<T>> (&sum)[PIXELS],
                                            LoadSource&& load_source, LoadConstants&& load_constants) {
  using A = acc_t<T>;
  const int64_t channels = tile.channels, rows = tile.rows, begin = tile.begin, end = tile.end,
                row_step = tile.row_step, weight_row = tile.weight_row, weight_step = tile.weight_step;
  const T* source = tile.source + c;
  const A* weights = tile.weights + c;
#pragma GCC unroll 8
  for (int i = 0; i < PIXELS; ++i) sum[i] = Vec<A>{};
  for (int64_t r = 0; r < rows; ++r, source += row_step, weights += weight_row) {
    Vec<A> weight[S], part[PIXELS] = {};  // a sum for each row of taps: shorter sums, smaller errors
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) weight[s] = load_constants(weights + s * weight_step);
#pragma GCC unroll 32
    for (int j = 0; j < (PIXELS - 1) * STRIDE + S; ++j) {
      if (EDGE && (j < begin || j >= end)) continue;
      Vec<A> value = load_source(source + j * channels);
      keep(value);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s)
        if (j >= s && (j - s) % STRIDE == 0 && (j - s) / STRIDE < PIXELS) part[(j - s) / STRIDE] += weight[s] * value;
    }
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i) sum[i] += part[i];
  }
  // What the next row of tiles reads first: pixels lie too far apart for a prefetcher of the machine's.
#pragma GCC unroll 32
  for (int j = 0; j < (PIXELS - 1) * STRIDE + S; ++j)
    if (!EDGE || (j >= begin && j < end))
#pragma GCC unroll 2
      for (int below = 0; below < STRIDE; ++below) __builtin_prefetch(source + below * row_step + j * channels, 0, 2);
  if (tile.bias) {
    const Vec<A> bias = load_constants(tile.bias + c);
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i) sum[i] += bias;
  }
}

// S taps a row, next to each other; at least one whole vector of channels.
template <int PIXELS, int S, int STRIDE, bool EDGE, class T> void run_tile(const Tile<T>& tile) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  if constexpr (kEvenOdd<T>) {
    if (tile.channels >= 2 * lanes) {  // even and odd channels apart, without shuffles
      for (int64_t next = 0; next < tile.channels; next += 2 * lanes) {
        const int64_t c = smaller(next, tile.channels - 2 * lanes);
        vfloat even[PIXELS], odd[PIXELS];
        sum_tile<PIXELS, S, STRIDE, EDGE>(
            tile, c, even, [](const T* p) { return load_even(p); },
            [](const A* p) { return take_even(load(p), load(p + lanes)); });
        sum_tile<PIXELS, S, STRIDE, EDGE>(
            tile, c, odd, [](const T* p) { return load_odd(p); },
            [](const A* p) { return take_odd(load(p), load(p + lanes)); });
        T* output = tile.output + c;
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; ++i, output += tile.out_step) {
          const vuint32 words = merge_even_odd(even[i], odd[i]);
          std::memcpy(static_cast<void*>(output), &words, sizeof words);
        }
      }
      return;
    }
  }
  for (int64_t next = 0; next < tile.channels; next += lanes) {
    const int64_t c = smaller(next, tile.channels - lanes);
    Vec<A> sum[PIXELS];
    const auto load_whole = [](const auto* p) { return load(p); };
    sum_tile<PIXELS, S, STRIDE, EDGE>(tile, c, sum, load_whole, load_whole);
    T* output = tile.output + c;
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; ++i, output += tile.out_step) {
      prefetch_ahead_to_store(output);
      store(output, sum[i]);
    }
  }
}

// Any taps, any number of channels.
template <int PIXELS, class T> void run_any_tile(const Tile<T>& tile) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t c = 0; c < tile.channels; c += lanes) {
    const int count = static_cast<int>(smaller(lanes, tile.channels - c));
    Vec<A> sum[PIXELS];
    const Vec<A> bias = tile.bias ? load(tile.bias + c) : Vec<A>{};
    for (int i = 0; i < PIXELS; ++i) sum[i] = bias;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const T* source = tile.source + r * tile.row_step + c;
      const A* weights = tile.weights + r * tile.weight_row + c;
      Vec<A> part[PIXELS] = {};
      for (int64_t s = 0; s < tile.weight_count; ++s) {
        const Vec<A> weight = load(weights + s * tile.weight_step);
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; ++i) {
          const int64_t j = i * tile.stride + s * tile.step;
          if (j >= tile.begin && j < tile.end) part[i] += weight * load_lanes(source + j * tile.channels, count);
        }
      }
      for (int i = 0; i < PIXELS; ++i) sum[i] += part[i];
    }
    for (int i = 0; i < PIXELS; ++i) store_lanes(tile.output + i * tile.out_step + c, sum[i], count);
  }
}

template <class T> using RunTile = void (*)(const Tile<T>&);

template <int S, int STRIDE, class T> RunTile<T> tile_of(int64_t pixels, bool edge) {
  if (pixels == kPixels) return edge ? run_tile<kPixels, S, STRIDE, true, T> : run_tile<kPixels, S, STRIDE, false, T>;
  return run_tile<1, S, STRIDE, true, T>;
}

// The kernel for tiles of `pixels` (kPixels or 1), at the image's edge or inside.
template <class T> RunTile<T> tile_for(const Pass<T>& z, int64_t pixels, bool edge) {
  if constexpr (sizeof(T) < 8) {
    if (z.taps_w.step == 1 && z.channels >= kLanes<T>) {
      if (z.stride_w == 1) {
        if (z.taps_w.count == 1) return tile_of<1, 1, T>(pixels, edge);
        if (z.taps_w.count == 2) return tile_of<2, 1, T>(pixels, edge);
        if (z.taps_w.count == 3) return tile_of<3, 1, T>(pixels, edge);
        if (z.taps_w.count == 4) return tile_of<4, 1, T>(pixels, edge);
        if (z.taps_w.count == 5) return tile_of<5, 1, T>(pixels, edge);
        if (z.taps_w.count == 7) return tile_of<7, 1, T>(pixels, edge);
      }
      if (z.stride_w == 2) {
        if (z.taps_w.count == 3) return tile_of<3, 2, T>(pixels, edge);
        if (z.taps_w.count == 5) return tile_of<5, 2, T>(pixels, edge);
        if (z.taps_w.count == 7) return tile_of<7, 2, T>(pixels, edge);
      }
    }
  }
  return pixels == kPixels ? run_any_tile<kPixels, T> : run_any_tile<1, T>;
}

// Row i of a pass over one image.
template <class T> void run_row(const Pass<T>& z, int64_t image, int64_t i) {
  const int64_t pixels = z.columns >= kPixels ? kPixels : 1;
  const RunTile<T> edge = tile_for(z, pixels, true), inner = tile_for(z, pixels, false);
  const int64_t reach = (pixels - 1) * z.stride_w + (z.taps_w.count - 1) * z.taps_w.step + 1, h = i * z.stride_h;
  const Taps::Range rows = z.taps_h.inside(h, z.h);
  const int64_t kernel_row = z.taps_h.kernel + rows.begin * z.taps_h.kernel_step;
  Tile<T> tile;
  tile.rows = rows.end - rows.begin;
  tile.row_step = z.taps_h.step * z.w * z.channels;
  tile.weights = z.weights + (kernel_row * z.kernel_w + z.taps_w.kernel) * z.padded;
  tile.weight_row = z.taps_h.kernel_step * z.kernel_w * z.padded;
  tile.weight_step = z.taps_w.kernel_step * z.padded;
  tile.weight_count = z.taps_w.count;
  tile.bias = z.bias;
  tile.channels = z.channels;
  tile.step = z.taps_w.step;
  tile.stride = z.stride_w;
  tile.out_step = z.step_w * z.channels;
  const int64_t source_row = image * z.h + h + z.taps_h.first + rows.begin * z.taps_h.step;
  for (int64_t next = 0; next < z.columns; next += pixels) {
    const int64_t q = smaller(next, z.columns - pixels);  // the last tile overlaps the one before
    const int64_t w = q * z.stride_w + z.taps_w.first;
    tile.begin = -w;
    tile.end = z.w - w;
    tile.source = z.source + (source_row * z.w + w) * z.channels;
    tile.output =
        z.output + ((image * z.out_h + z.start_h + i * z.step_h) * z.out_w + z.start_w + q * z.step_w) * z.channels;
    (tile.begin <= 0 && tile.end >= reach ? inner : edge)(tile);
  }
}

// Passes whose outputs lie between each other, row by row so that each part of memory is touched once.
template <class T> void correlate(const Pass<T>* passes, int64_t count) {
  const int64_t rows = passes[0].rows, work = passes[0].columns * passes[0].channels * count;
  parallel_for(passes[0].n * rows, larger(1, 16384 / work), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < count; ++i)
        if (row % rows < passes[i].rows) run_row(passes[i], row / rows, row % rows);
  });
}

// The filters as [kernel element][padded], and where the bias follows them.
template <class T> acc_t<T>* pack(const T* weight, const T* bias, int64_t channels, int64_t elements, int64_t padded) {
  using A = acc_t<T>;
  A* packed = scratch<A>(Slot::family_0, (elements + 1) * padded);
  for (int64_t t = 0; t <= elements; ++t)
    for (int64_t c = channels; c < padded; ++c) packed[t * padded + c] = A(0);
  transpose(weight, elements, channels, elements, packed, padded);
  if (bias) copy(bias, packed + elements * padded, channels);
  return packed;
}

template <class T> int64_t padded_channels(const ConvShape& z) { return ceil_div(z.c, kLanes<T>) * kLanes<T>; }

template <class T> bool forward(const ConvForwardArgs<T>& args) {
  const ConvShape& z = args.shape;
  if (!args.input_channels_last || !args.output_channels_last || z.c != z.groups || z.k != z.groups) return false;
  Pass<T> pass{};
  pass.source = args.input;
  pass.n = z.n, pass.channels = z.c, pass.h = z.h, pass.w = z.w;
  pass.output = args.output;
  pass.out_h = pass.rows = z.p, pass.out_w = pass.columns = z.q;
  pass.step_h = pass.step_w = 1;
  pass.stride_h = z.stride_h, pass.stride_w = z.stride_w;
  pass.taps_h = forward_taps(z.r, z.pad_h, z.dilation_h);
  pass.taps_w = forward_taps(z.s, z.pad_w, z.dilation_w);
  pass.kernel_w = z.s;
  pass.padded = padded_channels<T>(z);
  const acc_t<T>* packed = pack(args.weight, args.bias, z.c, z.r * z.s, pass.padded);
  pass.weights = packed;
  pass.bias = args.bias ? packed + z.r * z.s * pass.padded : nullptr;
  correlate(&pass, 1);
  return true;
}

template <class T> bool backward_input(const ConvBackwardInputArgs<T>& args) {
  const ConvShape& z = args.shape;
  if (!args.grad_output_channels_last || !args.grad_input_channels_last || z.c != z.groups || z.k != z.groups)
    return false;
  Pass<T> pass{};
  pass.source = args.grad_output;
  pass.n = z.n, pass.channels = z.c, pass.h = z.p, pass.w = z.q;
  pass.output = args.grad_input;
  pass.out_h = z.h, pass.out_w = z.w;
  pass.step_h = z.stride_h, pass.step_w = z.stride_w;
  pass.stride_h = pass.stride_w = 1;
  pass.kernel_w = z.s;
  pass.padded = padded_channels<T>(z);
  pass.weights = pack<T>(args.weight, nullptr, z.c, z.r * z.s, pass.padded);
  Pass<T>* passes = scratch<Pass<T>>(Slot::family_3, smaller(z.stride_h, z.h) * smaller(z.stride_w, z.w));
  int64_t count = 0;
  for (int64_t a = 0; a < smaller(z.stride_h, z.h); ++a)
    for (int64_t b = 0; b < smaller(z.stride_w, z.w); ++b) {
      pass.taps_h = residue_taps(a, z.r, z.stride_h, z.pad_h, z.dilation_h);
      pass.taps_w = residue_taps(b, z.s, z.stride_w, z.pad_w, z.dilation_w);
      if (pass.taps_w.count == 0) pass.taps_h.count = 0;  // zeros are written
      pass.start_h = a, pass.start_w = b;
      pass.rows = ceil_div(z.h - a, z.stride_h), pass.columns = ceil_div(z.w - b, z.stride_w);
      passes[count++] = pass;
    }
  correlate(passes, count);
  return true;
}

// ---- Gradient of the weight -------------------------------------------------------------------------------------

constexpr int kColumns = 4;  // of grad_output, held in registers
constexpr int kMostTaps = kVectorBytes == 64 ? 25 : 9;

// Rows of grad_output and of the input, whose products are summed for ROWS x S taps of one vector of channels.
template <class T> struct Rows {
  const T *y, *x;  // x: what tap (0, 0) sees from output column 0; may lie left of the image
  int64_t count, y_row, x_row;  // elements from one output row to the next
  int64_t columns, channels, tap_row, tap_step, stride;
  int64_t begin, end;  // columns of x inside the image
  int lanes;
  acc_t<T>* sums;
  int64_t sum_row, sum_step;
};

template <bool VALUE> struct Flag {
  static constexpr bool value = VALUE;
};

template <int ROWS, int S, int STRIDE, class T> void add_rows(const Rows<T>& z) {
  using A = acc_t<T>;
  Vec<A> sum[ROWS][S] = {};
  const T *y_row = z.y, *x_row = z.x;
  for (int64_t i = 0; i < z.count; ++i, y_row += z.y_row, x_row += z.x_row)
    for (int64_t q = 0; q < z.columns; q += kColumns) {
      const T *y = y_row + q * z.channels, *x = x_row + q * STRIDE * z.channels;
      const int64_t begin = z.begin - q * STRIDE, end = z.end - q * STRIDE, left = z.columns - q;
      const auto step = [&](auto inner) __attribute__((always_inline)) {
        constexpr bool kInner = decltype(inner)::value;
        Vec<A> value[kColumns];
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) value[j] = kInner || j < left ? load(y + j * z.channels) : Vec<A>{};
#pragma GCC unroll 32
        for (int j = 0; j < (kColumns - 1) * STRIDE + S; ++j) {
          if (!kInner && (j < begin || j >= end)) continue;
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r) {
            Vec<A> other = load(x + r * z.tap_row + j * z.channels);
            keep(other);
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s)
              if (j >= s && (j - s) % STRIDE == 0 && (j - s) / STRIDE < kColumns)
                sum[r][s] += value[(j - s) / STRIDE] * other;
          }
        }
      };
      if (begin <= 0 && end >= (kColumns - 1) * STRIDE + S && left >= kColumns)
        step(Flag<true>{});
      else
        step(Flag<false>{});
    }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      A* to = z.sums + r * z.sum_row + s * z.sum_step;
      store(to, load(to) + sum[r][s]);
    }
}

// One tap, any stride, any number of channels.
template <class T> void add_any_rows(const Rows<T>& z) {
  using A = acc_t<T>;
  Vec<A> sum[4] = {};
  const int64_t first = z.begin <= 0 ? 0 : ceil_div(z.begin, z.stride);
  const int64_t stop = z.end <= 0 ? 0 : smaller(z.columns, (z.end - 1) / z.stride + 1);
  for (int64_t i = 0; i < z.count; ++i) {
    const T *y = z.y + i * z.y_row, *x = z.x + i * z.x_row;
    int64_t q = first;
    for (; q + 4 <= stop; q += 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        sum[j] +=
            load_lanes(y + (q + j) * z.channels, z.lanes) * load_lanes(x + (q + j) * z.stride * z.channels, z.lanes);
    for (; q < stop; ++q)
      sum[0] += load_lanes(y + q * z.channels, z.lanes) * load_lanes(x + q * z.stride * z.channels, z.lanes);
  }
  store(z.sums, load(z.sums) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
}

template <class T> using AddRows = void (*)(const Rows<T>&);

template <int S, int STRIDE, class T> AddRows<T> add_rows_of(int64_t rows) {
  if constexpr (5 * S <= kMostTaps)
    if (rows == 5) return add_rows<5, S, STRIDE, T>;
  if constexpr (3 * S <= kMostTaps)
    if (rows == 3) return add_rows<3, S, STRIDE, T>;
  if constexpr (2 * S <= kMostTaps)
    if (rows == 2) return add_rows<2, S, STRIDE, T>;
  return rows == 1 ? add_rows<1, S, STRIDE, T> : nullptr;
}

// The kernel for `rows` rows of taps together, or null.
template <class T> AddRows<T> add_rows_for(const ConvShape& z, int64_t rows) {
  if constexpr (sizeof(T) < 8) {
    if (z.dilation_w == 1 && z.c >= kLanes<T>) {
      if (z.stride_w == 1 && z.s == 3) return add_rows_of<3, 1, T>(rows);
      if (z.stride_w == 1 && z.s == 5) return add_rows_of<5, 1, T>(rows);
      if (z.stride_w == 1 && z.s == 7) return add_rows_of<7, 1, T>(rows);
      if (z.stride_w == 2 && z.s == 3) return add_rows_of<3, 2, T>(rows);
      if (z.stride_w == 2 && z.s == 5) return add_rows_of<5, 2, T>(rows);
      if (z.stride_w == 2 && z.s == 7) return add_rows_of<7, 2, T>(rows);
    }
  }
  return nullptr;
}

// Output rows [begin, end) of one image, all channels, added to sums[kernel element][padded]; behind them, room for a
// vector each kernel element.
template <class T>
void add_image(const ConvBackwardWeightArgs<T>& args, int64_t image, int64_t begin, int64_t end, int64_t depth,
               int64_t padded, acc_t<T>* sums) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const ConvShape& z = args.shape;
  const Taps taps = forward_taps(z.r, z.pad_h, z.dilation_h);
  const bool fast = add_rows_for<T>(z, 1) != nullptr;
  for (int64_t p = begin; p < end;) {
    const Taps::Range range = taps.inside(p * z.stride_h, z.h);
    int64_t count = 1;  // of rows that see the same taps
    while (p + count < end && (count + 1) * z.q <= depth) {
      const Taps::Range next = taps.inside((p + count) * z.stride_h, z.h);
      if (next.begin != range.begin || next.end != range.end) break;
      ++count;
    }
    for (int64_t next = 0; next < z.c; next += lanes) {
      const int held = static_cast<int>(smaller(lanes, z.c - next));
      // The last vector overlaps the one before, and is summed apart so that those channels are not added twice.
      const bool apart = fast && held < lanes;
      const int64_t c = apart ? z.c - lanes : next;
      A* last = sums + z.r * z.s * padded;
      if (apart)
        for (int64_t i = 0; i < z.r * z.s * lanes; ++i) last[i] = A(0);
      for (int64_t r = range.begin; r < range.end;) {
        Rows<T> rows;
        const int64_t h = p * z.stride_h - z.pad_h + r * z.dilation_h;
        rows.y = args.grad_output + ((image * z.p + p) * z.q) * z.c + c;
        rows.x = args.input + ((image * z.h + h) * z.w - z.pad_w) * z.c + c;
        rows.count = count;
        rows.y_row = z.q * z.c;
        rows.x_row = z.stride_h * z.w * z.c;
        rows.columns = z.q;
        rows.channels = z.c;
        rows.tap_row = z.dilation_h * z.w * z.c;
        rows.stride = z.stride_w;
        rows.begin = z.pad_w;
        rows.end = z.w + z.pad_w;
        rows.lanes = held;
        rows.sum_step = apart ? lanes : padded;
        rows.sum_row = z.s * rows.sum_step;
        rows.sums = (apart ? last : sums + c) + r * rows.sum_row;
        if (fast) {
          int64_t together = smaller(range.end - r, 5);
          AddRows<T> add = add_rows_for<T>(z, together);
          while (!add) add = add_rows_for<T>(z, --together);
          add(rows);
          r += together;
        } else {
          for (int64_t s = 0; s < z.s; ++s) {
            Rows<T> one = rows;
            one.x += s * z.dilation_w * z.c;
            one.begin -= s * z.dilation_w;
            one.end -= s * z.dilation_w;
            one.sums += s * padded;
            add_any_rows(one);
          }
          ++r;
        }
      }
      if (apart)
        for (int64_t t = 0; t < z.r * z.s; ++t)
          for (int64_t j = lanes - held; j < lanes; ++j) sums[t * padded + c + j] += last[t * lanes + j];
    }
    p += count;
  }
}

template <class T> bool backward_weight(const ConvBackwardWeightArgs<T>& args) {
  using A = acc_t<T>;
  const ConvShape& z = args.shape;
  if (!args.input_channels_last || !args.grad_output_channels_last || z.c != z.groups || z.k != z.groups) return false;
  const int64_t padded = padded_channels<T>(z), elements = z.r * z.s, size = elements * padded;
  const int64_t all_rows = z.n * z.p, tasks = smaller(all_rows, num_threads());
  const int64_t depth =
      sum_depth(all_rows * z.q, static_cast<double>(all_rows * z.q) * static_cast<double>(z.c * elements));
  A* totals = scratch<A>(Slot::family_0, tasks * size);
  parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
    A* sums = scratch<A>(Slot::family_1, size + elements * kLanes<A>);  // of one image; of its last channels
    for (int64_t task = begin; task < end; ++task) {
      A* total = totals + task * size;
      for (int64_t i = 0; i < size; ++i) total[i] = A(0);
      const int64_t stop = (task + 1) * all_rows / tasks;
      for (int64_t row = task * all_rows / tasks; row < stop;) {
        const int64_t image = row / z.p, p = row % z.p, count = smaller(stop - row, z.p - p);
        for (int64_t i = 0; i < size; ++i) sums[i] = A(0);
        add_image(args, image, p, p + count, depth, padded, sums);
        for (int64_t i = 0; i < size; ++i) total[i] += sums[i];
        row += count;
      }
    }
  });
  for (int64_t task = 1; task < tasks; ++task)
    for (int64_t i = 0; i < size; ++i) totals[i] += totals[task * size + i];
  transpose(totals, padded, elements, z.c, args.grad_weight, elements);
  return true;
}

}  // namespace

#define DLKERN_DEPTHWISE(T)                                                                                 \
  bool depthwise_last_forward(const ConvForwardArgs<T>& args) { return forward(args); }                     \
  bool depthwise_last_backward_input(const ConvBackwardInputArgs<T>& args) { return backward_input(args); } \
  bool depthwise_last_backward_weight(const ConvBackwardWeightArgs<T>& args) { return backward_weight(args); }
DLKERN_DEPTHWISE(float)
DLKERN_DEPTHWISE(double)
DLKERN_DEPTHWISE(bfloat16)
DLKERN_DEPTHWISE(float16)
#undef DLKERN_DEPTHWISE

}  // namespace dlkern::cpu::DLKERN_ISA

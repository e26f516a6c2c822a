// Depthwise convolution of NCHW images, and its gradients: a lane is a column.
//
// A plane's rows are copied, a band at a time, to where they lie on vector boundaries with zeros between them, parted by
// the residue of the column modulo the stride; so every tap of every output column is a plain load, whatever the
// padding and stride, and small planes lose nothing to borders. A tile is kRows rows of one vector of output columns:
// each loaded vector is multiplied into all the output rows that use it. The gradient of the input is the same
// correlation of grad_output; with strides, row by row, neighbouring columns' sums interleaved in registers.
// The weight's gradient holds a vector of partial sums for each tap over all images of a channel. There may be more
// output channels than input channels (a multiple). Floor: memory.
#include "conv_depthwise.h"
#include "parallel.h"
#include "scratch.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

constexpr int kRows = 7;  // of a tile: divides the usual heights 7, 14, 28, 56, 112
constexpr int64_t kBandBytes = 20 * 1024;  // of the first-level cache, for a band of the copied plane

// A band of a plane as copied: [row][residue of the column][width]. Column c of the plane is element floor(c / stride)
// of residue c mod stride; every element that an output column reads outside the plane is zero.
template <class A> struct Band {
  int64_t stride, width, before;  // before: zeros in front of the first row
  A* rows;

  int64_t row() const { return stride * width; }
  int64_t offset(int64_t column) const {
    const int64_t residue = ((column % stride) + stride) % stride;
    return residue * width + (column - residue) / stride;
  }
};

// For planes of w columns of which output columns [0, columns) read column * stride + tap, whole vectors at a time.
template <class A> Band<A> band_for(int64_t w, int64_t columns, int64_t stride, const Taps& taps) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t first = taps.first, last = taps.first + (taps.count - 1) * taps.step;
  const int64_t left = first >= 0 ? 0 : ceil_div(-first, stride);
  const int64_t right = larger(0, ceil_div(last, stride));
  const int64_t used = larger(ceil_div(w, stride), ceil_div(columns, lanes) * lanes + right);
  Band<A> band;
  band.stride = stride;
  band.width = ceil_div(used + left, lanes) * lanes;
  band.before = ceil_div(left, lanes) * lanes;
  band.rows = nullptr;
  return band;
}

// Memory for `rows` rows, all zero.
template <class A> void make_band(Band<A>& band, int64_t rows) {
  const int64_t size = band.before + rows * band.row() + 2 * kLanes<A>;
  A* memory = scratch<A>(Slot::family_1, size);
  std::memset(static_cast<void*>(memory), 0, sizeof(A) * static_cast<size_t>(size));
  band.rows = memory + band.before;
}

// Even and odd elements of two vectors.
template <class V> [[gnu::always_inline]] inline void part(V& a, V& b) {
  using I = decltype(a > a);
  constexpr int lanes = sizeof(I) / sizeof(a[0]);
  I even, odd;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  const V first = __builtin_shuffle(a, b, even), second = __builtin_shuffle(a, b, odd);
  a = first;
  b = second;
}
// The inverse of part.
template <class V> [[gnu::always_inline]] inline void join(V& a, V& b) {
  using I = decltype(a > a);
  constexpr int lanes = sizeof(I) / sizeof(a[0]);
  I low, high;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    low[i] = i / 2 + (i % 2) * lanes;
    high[i] = low[i] + lanes / 2;
  }
  const V first = __builtin_shuffle(a, b, low), second = __builtin_shuffle(a, b, high);
  a = first;
  b = second;
}

// Rows [first, first + count) of a plane of h x w; zero where there is none. The zeros between rows stay.
template <class T, class A> void copy_rows(const T* plane, int64_t h, int64_t w, int64_t first, int64_t count,
                                           const Band<A>& band) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t i = 0; i < count; ++i) {
    A* to = band.rows + i * band.row();
    const T* from = plane + (first + i) * w;
    if (first + i < 0 || first + i >= h) {
      for (int64_t residue = 0; residue < band.stride; ++residue)
        std::memset(static_cast<void*>(to + residue * band.width), 0,
                    sizeof(A) * static_cast<size_t>(ceil_div(w, band.stride)));
    } else if (band.stride == 1) {
      int64_t j = 0;
      for (; j + lanes <= w; j += lanes) store(to + j, load(from + j));
      if (j < w) store(to + j, load_partial<T>(from + j, static_cast<int>(w - j)));
    } else if (band.stride == 2) {
      int64_t j = 0;
      for (; j + 2 * lanes <= w; j += 2 * lanes) {
        Vec<A> even = load(from + j), odd = load(from + j + lanes);
        part(even, odd);
        store(to + j / 2, even);
        store(to + band.width + j / 2, odd);
      }
      if (j < w) {
        Vec<A> even = load_lanes(from + j, static_cast<int>(smaller(lanes, w - j))), odd{};
        if (j + lanes < w) odd = load_partial<T>(from + j + lanes, static_cast<int>(w - j - lanes));
        part(even, odd);
        store(to + j / 2, even);
        store(to + band.width + j / 2, odd);
      }
    } else {
      for (int64_t residue = 0; residue < band.stride; ++residue)
        for (int64_t j = residue; j < w; j += band.stride)
          to[residue * band.width + j / band.stride] = static_cast<A>(static_cast<acc_t<T>>(from[j]));
    }
  }
}

// ---- Forward, and the gradient of the input with stride 1 ---------------------------------------------------------

// output[plane, row, column] (+)= bias + sum over taps of weight[kernel element] source[...], for planes of a batch.
template <class T> struct Pass {
  const T* source;
  int64_t n, sources, outputs, h, w;  // channels of source and output
  T* output;
  int64_t rows, columns, stride_h, stride_w;
  Taps taps_h, taps_w;
  int64_t kernel_w, kernel_size;
  const T *weight, *bias;
};

// One vector of columns of ROWS rows.
template <class A> struct Tile {
  const A* source;  // what tap row 0 of the first output row reads
  int64_t row, row_stride;  // elements to the next tap's row, and to the next output row's
  const int64_t* offsets;  // of each tap of a row
  int64_t taps_h, taps_w;
  const A* weights;  // [tap][a vector, all lanes alike]
  A bias;
};

// R x S taps, their rows next to each other.
template <int ROWS, int R, int S, int STRIDE, class T, class A>
[[gnu::noinline]] void run_tile(const Tile<A>& tile, T* output, int64_t out_row, int count) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> sum[ROWS] = {};
  const A* source = tile.source;
  const int64_t row = tile.row;
  const A* const weights = tile.weights;
  const A* column[S];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) column[s] = source + tile.offsets[s];
#pragma GCC unroll 24
  for (int j = 0; j < (ROWS - 1) * STRIDE + R; ++j) {
    Vec<A> value[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      value[s] = load(column[s]);
      column[s] += row;
      keep(value[s]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      if (j >= r && (j - r) % STRIDE == 0 && (j - r) / STRIDE < ROWS) {
        Vec<A> part = load(weights + r * S * lanes) * value[0];  // a sum for each row of taps: smaller errors
#pragma GCC unroll 8
        for (int s = 1; s < S; ++s) part += load(weights + (r * S + s) * lanes) * value[s];
        sum[(j - r) / STRIDE] += part;
      }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i, output += out_row) {
    prefetch_ahead_to_store(output);
    store_lanes(output, sum[i] + tile.bias, count);
  }
}

// Any taps.
template <int ROWS, class T, class A>
[[gnu::noinline]] void run_any_tile(const Tile<A>& tile, T* output, int64_t out_row, int count) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> sum[ROWS] = {};
  const A* weights = tile.weights;
  for (int64_t r = 0; r < tile.taps_h; ++r) {
    Vec<A> part[ROWS] = {};
    for (int64_t s = 0; s < tile.taps_w; ++s, weights += lanes) {
      const Vec<A> weight = load(weights);
      const A* from = tile.source + r * tile.row + tile.offsets[s];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) part[i] += weight * load(from + i * tile.row_stride);
    }
    for (int i = 0; i < ROWS; ++i) sum[i] += part[i];
  }
  for (int i = 0; i < ROWS; ++i, output += out_row) {
    prefetch_ahead_to_store(output);
    store_lanes(output, sum[i] + tile.bias, count);
  }
}

template <class T> using RunTile = void (*)(const Tile<acc_t<T>>&, T*, int64_t, int);

template <int ROWS, class T> RunTile<T> tile_for(const Pass<T>& z) {
  using A = acc_t<T>;
  if constexpr (sizeof(T) < 8) {
    if (z.taps_h.step == 1 && z.taps_h.count == z.taps_w.count) {
      if (z.stride_h == 1 && z.taps_h.count == 3) return run_tile<ROWS, 3, 3, 1, T, A>;
      if (z.stride_h == 1 && z.taps_h.count == 5) return run_tile<ROWS, 5, 5, 1, T, A>;
      if (z.stride_h == 1 && z.taps_h.count == 7) return run_tile<ROWS, 7, 7, 1, T, A>;
      if (z.stride_h == 2 && z.taps_h.count == 3) return run_tile<ROWS, 3, 3, 2, T, A>;
      if (z.stride_h == 2 && z.taps_h.count == 5) return run_tile<ROWS, 5, 5, 2, T, A>;
    }
  }
  return run_any_tile<ROWS, T, A>;
}

// The taps' weights of one filter, each filling a vector, in the order of the taps.
template <class T, class A>
void spread_weights(const T* filter, const Taps& taps_h, const Taps& taps_w, int64_t kernel_w, A* to) {
  for (int64_t r = 0; r < taps_h.count; ++r)
    for (int64_t s = 0; s < taps_w.count; ++s, to += kLanes<A>)
      store(
          to,
          broadcast<A>(static_cast<A>(static_cast<acc_t<T>>(
              filter[(taps_h.kernel + r * taps_h.kernel_step) * kernel_w + taps_w.kernel + s * taps_w.kernel_step]))));
}

template <class T> void correlate(const Pass<T>& z) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const int64_t tile_rows = z.rows >= kRows ? kRows : 1;
  const RunTile<T> run = tile_rows == kRows ? tile_for<kRows>(z) : tile_for<1>(z);
  const int64_t taps = z.taps_h.count * z.taps_w.count, times = z.outputs / z.sources;
  const int64_t span = (z.taps_h.count - 1) * z.taps_h.step + 1;
  Band<A> shape = band_for<A>(z.w, z.columns, z.stride_w, z.taps_w);
  // Output rows of a band: whole tiles.
  const int64_t fitting = (kBandBytes / (shape.row() * static_cast<int64_t>(sizeof(A))) - span) / z.stride_h + 1;
  const int64_t band_rows = smaller(z.rows, larger(1, fitting / tile_rows) * tile_rows);
  const int64_t most = (band_rows - 1) * z.stride_h + span;
  const int64_t work = z.rows * z.columns * (taps + 8);
  parallel_for(z.n * z.outputs, larger(1, 65536 / work), [&](int64_t begin, int64_t end) {
    A* weights = scratch<A>(Slot::family_2, taps * lanes);
    int64_t* offsets = scratch<int64_t>(Slot::family_3, z.taps_w.count);
    for (int64_t s = 0; s < z.taps_w.count; ++s) offsets[s] = shape.offset(z.taps_w.first + s * z.taps_w.step);
    Band<A> band = shape;
    make_band(band, most);
    Tile<A> tile{
        nullptr, z.taps_h.step * band.row(), z.stride_h * band.row(), offsets, z.taps_h.count, z.taps_w.count, weights,
        A(0)};
    int64_t copied = -1;  // the plane that the band holds, where it is whole
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i % z.outputs, plane = i / z.outputs * z.sources + k / times;
      spread_weights(z.weight + k * z.kernel_size, z.taps_h, z.taps_w, z.kernel_w, weights);
      tile.bias = z.bias ? static_cast<A>(z.bias[k]) : A(0);
      for (int64_t next_band = 0; next_band < z.rows; next_band += band_rows) {
        // The last band and the last tile overlap the ones before where they would be too short.
        const int64_t p = smaller(next_band, z.rows - tile_rows), count = smaller(band_rows, z.rows - p);
        if (plane != copied)
          copy_rows(z.source + plane * z.h * z.w, z.h, z.w, p * z.stride_h + z.taps_h.first,
                    (count - 1) * z.stride_h + span, band);
        for (int64_t next = 0; next < count; next += tile_rows) {
          const int64_t row = smaller(next, count - tile_rows);
          for (int64_t q = 0; q < z.columns; q += lanes) {
            tile.source = band.rows + row * z.stride_h * band.row() + q;
            run(tile, z.output + (i * z.rows + p + row) * z.columns + q, z.columns,
                static_cast<int>(smaller(lanes, z.columns - q)));
          }
        }
      }
      copied = band_rows == z.rows ? plane : -1;
    }
  });
}

template <class T> bool forward(const ConvForwardArgs<T>& args) {
  const ConvShape& z = args.shape;
  if (args.input_channels_last || args.output_channels_last || z.c != z.groups) return false;
  Pass<T> pass{};
  pass.source = args.input;
  pass.n = z.n, pass.sources = z.c, pass.outputs = z.k, pass.h = z.h, pass.w = z.w;
  pass.output = args.output;
  pass.rows = z.p, pass.columns = z.q;
  pass.stride_h = z.stride_h, pass.stride_w = z.stride_w;
  pass.taps_h = forward_taps(z.r, z.pad_h, z.dilation_h);
  pass.taps_w = forward_taps(z.s, z.pad_w, z.dilation_w);
  pass.kernel_w = z.s, pass.kernel_size = z.r * z.s;
  pass.weight = args.weight, pass.bias = args.bias;
  correlate(pass);
  return true;
}

// ---- Gradient of the input with strides ---------------------------------------------------------------------------

// ROWS rows of one vector of positions, of both residues of the column modulo 2: columns 2 q and 2 q + 1 of the output.
template <int ROWS, class T, class A>
[[gnu::noinline]] void run_joined_tile(const Tile<A> (&tiles)[2], T* output, int64_t out_row, int64_t count) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> sum[2][ROWS] = {};
#pragma GCC unroll 2
  for (int b = 0; b < 2; ++b) {
    const Tile<A>& tile = tiles[b];
    const A* weights = tile.weights;
    for (int64_t r = 0; r < tile.taps_h; ++r)
      for (int64_t s = 0; s < tile.taps_w; ++s, weights += lanes) {
        const Vec<A> weight = load(weights);
        const A* from = tile.source + r * tile.row + tile.offsets[s];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) sum[b][i] += weight * load(from + i * tile.row_stride);
      }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i, output += out_row) {
    join(sum[0][i], sum[1][i]);
    store_lanes(output, sum[0][i], static_cast<int>(smaller(lanes, count)));
    if (count > lanes) store_lanes(output + lanes, sum[1][i], static_cast<int>(count - lanes));
  }
}

// Rows start, start + stride_h, ... of one plane, `tiles` one for each residue of the column.
template <int ROWS, class T, class A>
void write_residue(const ConvShape& z, const Band<A>& band, Tile<A>* tiles, const A* source, int64_t start,
                   int64_t rows, T* plane) {
  constexpr int64_t lanes = kLanes<A>;
  const int64_t out_row = z.stride_h * z.w, positions = ceil_div(z.w, z.stride_w);
  for (int64_t next = 0; next < rows; next += ROWS) {
    const int64_t row = smaller(next, rows - ROWS);
    T* out = plane + (start + row * z.stride_h) * z.w;
    for (int64_t q = 0; q < positions; q += lanes) {
      for (int64_t b = 0; b < z.stride_w; ++b) tiles[b].source = source + row * band.row() + q;
      if (z.stride_w == 1) {
        run_any_tile<ROWS>(tiles[0], out + q, out_row, static_cast<int>(smaller(lanes, z.w - q)));
      } else if (z.stride_w == 2) {
        const Tile<A> pair[2] = {tiles[0], tiles[1]};
        run_joined_tile<ROWS>(pair, out + 2 * q, out_row, smaller(2 * lanes, z.w - 2 * q));
      } else {
        for (int64_t b = 0; b < z.stride_w; ++b) {
          A sums[ROWS * lanes];
          run_any_tile<ROWS>(tiles[b], sums, lanes, static_cast<int>(lanes));
          for (int64_t i = 0; i < ROWS; ++i)
            for (int64_t j = 0; j < lanes && (q + j) * z.stride_w + b < z.w; ++j)
              out[i * out_row + (q + j) * z.stride_w + b] = static_cast<T>(sums[i * lanes + j]);
        }
      }
    }
  }
}

template <class T> void scatter(const ConvBackwardInputArgs<T>& args) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  constexpr int kResidueRows = 4;
  const ConvShape& z = args.shape;
  const int64_t taps = z.r * z.s, positions = ceil_div(z.w, z.stride_w);
  // What all residues read of grad_output.
  Taps reach{1, 0, 1, 0, 1};
  int64_t last_w = 0, first_h = 0, last_h = 0;
  for (int64_t b = 0; b < z.stride_w; ++b) {
    const Taps t = residue_taps(b, z.s, z.stride_w, z.pad_w, z.dilation_w);
    reach.first = smaller(reach.first, t.first);
    last_w = larger(last_w, t.first + (t.count - 1) * t.step);
  }
  reach.step = last_w - reach.first, reach.count = 2;
  for (int64_t a = 0; a < z.stride_h; ++a) {
    const Taps t = residue_taps(a, z.r, z.stride_h, z.pad_h, z.dilation_h);
    first_h = smaller(first_h, t.first);
    last_h = larger(last_h, t.first + (t.count - 1) * t.step);
  }
  const int64_t rows = ceil_div(z.h, z.stride_h) + last_h - first_h;
  const Band<A> shape = band_for<A>(z.q, positions, 1, reach);
  parallel_for(z.n * z.c, larger(1, 65536 / (z.h * z.w * 8)), [&](int64_t begin, int64_t end) {
    A* weights = scratch<A>(Slot::family_2, taps * lanes);
    char* memory =
        scratch<char>(Slot::family_3, z.stride_w * static_cast<int64_t>(sizeof(Tile<A>)) + 8 * z.s * z.stride_w);
    Tile<A>* tiles = reinterpret_cast<Tile<A>*>(memory);
    int64_t* offsets = reinterpret_cast<int64_t*>(tiles + z.stride_w);
    Band<A> band = shape;
    make_band(band, rows);
    for (int64_t i = begin; i < end; ++i) {
      copy_rows(args.grad_output + i * z.p * z.q, z.p, z.q, first_h, rows, band);
      for (int64_t a = 0; a < smaller(z.stride_h, z.h); ++a) {
        const Taps taps_h = residue_taps(a, z.r, z.stride_h, z.pad_h, z.dilation_h);
        A* next = weights;
        for (int64_t b = 0; b < z.stride_w; ++b) {
          const Taps taps_w = residue_taps(b, z.s, z.stride_w, z.pad_w, z.dilation_w);
          for (int64_t s = 0; s < taps_w.count; ++s) offsets[b * z.s + s] = taps_w.first + s * taps_w.step;
          spread_weights(args.weight + i % z.c * taps, taps_h, taps_w, z.s, next);
          tiles[b] = Tile<A>{
              nullptr, taps_h.step * band.row(), band.row(), offsets + b * z.s, taps_h.count, taps_w.count, next, A(0)};
          next += taps_h.count * taps_w.count * lanes;
        }
        const int64_t count = ceil_div(z.h - a, z.stride_h);
        const A* source = band.rows + (taps_h.first - first_h) * band.row();
        T* plane = args.grad_input + i * z.h * z.w;
        if (count >= kResidueRows)
          write_residue<kResidueRows>(z, band, tiles, source, a, count, plane);
        else
          write_residue<1>(z, band, tiles, source, a, count, plane);
      }
    }
  });
}

template <class T> bool backward_input(const ConvBackwardInputArgs<T>& args) {
  const ConvShape& z = args.shape;
  if (args.grad_output_channels_last || args.grad_input_channels_last || z.c != z.groups || z.k != z.c) return false;
  if (z.stride_h != 1 || z.stride_w != 1) {
    scatter(args);
    return true;
  }
  Pass<T> pass{};
  pass.source = args.grad_output;
  pass.n = z.n, pass.sources = pass.outputs = z.c, pass.h = z.p, pass.w = z.q;
  pass.output = args.grad_input;
  pass.rows = z.h, pass.columns = z.w;
  pass.stride_h = pass.stride_w = 1;
  pass.taps_h = residue_taps(0, z.r, 1, z.pad_h, z.dilation_h);
  pass.taps_w = residue_taps(0, z.s, 1, z.pad_w, z.dilation_w);
  pass.kernel_w = z.s, pass.kernel_size = z.r * z.s;
  pass.weight = args.weight;
  correlate(pass);
  return true;
}

// ---- Gradient of the weight -------------------------------------------------------------------------------------

constexpr int kSummedRows = 4;
constexpr int kMostTaps = kVectorBytes == 64 ? 25 : 9;

// Rows of grad_output (of a plane), and of the copied input where tap (first, 0) of the first one reads.
template <class T> struct Rows {
  const T* y;
  int64_t count, columns;
  const acc_t<T>* x;
  int64_t row, row_stride;
  const int64_t* offsets;
  acc_t<T>* sums;  // [tap][a vector]
};

// R x S taps, their rows next to each other.
template <int R, int S, int STRIDE, class T> [[gnu::noinline]] void add_rows(const Rows<T>& z) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> sum[R][S] = {};
  const int64_t columns = z.columns, row = z.row;
  const auto add = [&]<int ROWS>(const T* y, const A* x, int64_t q) __attribute__((always_inline)) {
    const int count = static_cast<int>(smaller(lanes, columns - q));
    Vec<A> value[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) value[i] = load_lanes(y + i * columns + q, count);
    const A* column[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) column[s] = x + z.offsets[s] + q;
#pragma GCC unroll 16
    for (int j = 0; j < (ROWS - 1) * STRIDE + R; ++j)
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) {
        Vec<A> other = load(column[s]);
        column[s] += row;
        keep(other);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          if (j >= r && (j - r) % STRIDE == 0 && (j - r) / STRIDE < ROWS) sum[r][s] += value[(j - r) / STRIDE] * other;
      }
  };
  int64_t i = 0;
  for (; i + kSummedRows <= z.count; i += kSummedRows)
    for (int64_t q = 0; q < columns; q += lanes)
      add.template operator()<kSummedRows>(z.y + i * columns, z.x + i * z.row_stride, q);
  for (; i < z.count; ++i)
    for (int64_t q = 0; q < columns; q += lanes)
      add.template operator()<1>(z.y + i * columns, z.x + i * z.row_stride, q);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      A* to = z.sums + (r * S + s) * lanes;
      store(to, load(to) + sum[r][s]);
    }
}

// TAPS taps, anywhere: z.offsets holds the whole distance of each.
template <int TAPS, class T> [[gnu::noinline]] void add_any_rows(const Rows<T>& z) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> sum[TAPS] = {};
  for (int64_t i = 0; i < z.count; ++i)
    for (int64_t q = 0; q < z.columns; q += lanes) {
      const Vec<A> value = load_lanes(z.y + i * z.columns + q, static_cast<int>(smaller(lanes, z.columns - q)));
      const A* x = z.x + i * z.row_stride + q;
#pragma GCC unroll 8
      for (int t = 0; t < TAPS; ++t) sum[t] += value * load(x + z.offsets[t]);
    }
  for (int t = 0; t < TAPS; ++t) store(z.sums + t * lanes, load(z.sums + t * lanes) + sum[t]);
}

template <class T> using AddRows = void (*)(const Rows<T>&);

template <int S, int STRIDE, class T> AddRows<T> add_rows_of(int64_t rows) {
  if constexpr (5 * S <= kMostTaps)
    if (rows == 5) return add_rows<5, S, STRIDE, T>;
  if constexpr (3 * S <= kMostTaps)
    if (rows == 3) return add_rows<3, S, STRIDE, T>;
  return rows == 1 ? add_rows<1, S, STRIDE, T> : nullptr;
}

// The kernel for `rows` rows of taps together, or null.
template <class T> AddRows<T> add_rows_for(const ConvShape& z, int64_t rows) {
  if constexpr (sizeof(T) < 8) {
    if (z.dilation_h == 1) {
      if (z.stride_h == 1 && z.s == 3) return add_rows_of<3, 1, T>(rows);
      if (z.stride_h == 1 && z.s == 5) return add_rows_of<5, 1, T>(rows);
      if (z.stride_h == 1 && z.s == 7) return add_rows_of<7, 1, T>(rows);
      if (z.stride_h == 2 && z.s == 3) return add_rows_of<3, 2, T>(rows);
      if (z.stride_h == 2 && z.s == 5) return add_rows_of<5, 2, T>(rows);
    }
  }
  return nullptr;
}

// The products of `count` rows, at y and in a band, with all taps.
template <class T>
void add_all_taps(const ConvShape& z, Rows<T> rows, const Band<acc_t<T>>& band, const int64_t* offsets) {
  constexpr int64_t lanes = kLanes<T>;
  const acc_t<T>* x = rows.x;
  acc_t<T>* sums = rows.sums;
  if (add_rows_for<T>(z, 1)) {
    rows.offsets = offsets;
    for (int64_t r = 0; r < z.r;) {
      int64_t together = smaller(z.r - r, 5);
      AddRows<T> add = add_rows_for<T>(z, together);
      while (!add) add = add_rows_for<T>(z, --together);
      rows.x = x + r * band.row();
      rows.sums = sums + r * z.s * lanes;
      add(rows);
      r += together;
    }
    return;
  }
  int64_t together[4];
  for (int64_t t = 0; t < z.r * z.s;) {
    const int64_t count = z.r * z.s - t >= 4 ? 4 : 1;
    for (int64_t i = 0; i < count; ++i)
      together[i] = (t + i) / z.s * z.dilation_h * band.row() + offsets[(t + i) % z.s];
    rows.offsets = together;
    rows.sums = sums + t * lanes;
    (count == 4 ? add_any_rows<4, T> : add_any_rows<1, T>)(rows);
    t += count;
  }
}

template <class V> [[gnu::always_inline]] inline auto sum_lanes(V v) {
  using I = decltype(v > v);
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
#pragma GCC unroll 5
  for (int half = lanes / 2; half > 0; half /= 2) {
    I other;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) other[i] = i ^ half;
    v += __builtin_shuffle(v, other);
  }
  return v[0];
}

template <class T> bool backward_weight(const ConvBackwardWeightArgs<T>& args) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<A>;
  const ConvShape& z = args.shape;
  if (args.input_channels_last || args.grad_output_channels_last || z.c != z.groups) return false;
  const int64_t taps = z.r * z.s, times = z.k / z.c, vectors = ceil_div(z.q, lanes);
  const int64_t span = (z.r - 1) * z.dilation_h + 1;
  const Taps taps_w = forward_taps(z.s, z.pad_w, z.dilation_w);
  const Band<A> shape = band_for<A>(z.w, z.q, z.stride_w, taps_w);
  const int64_t fitting = (kBandBytes / (shape.row() * static_cast<int64_t>(sizeof(A))) - span) / z.stride_h + 1;
  // Rows summed in registers: short sums, whole groups of rows.
  const int64_t depth = larger(1, 64 / vectors / kSummedRows) * kSummedRows;
  const int64_t band_rows = smaller(z.p, larger(1, fitting / depth) * depth);
  parallel_for(z.k, larger(1, 65536 / (z.n * z.p * z.q * (taps + 4))), [&](int64_t begin, int64_t end) {
    A* sums = scratch<A>(Slot::family_2, taps * lanes);
    int64_t* offsets = scratch<int64_t>(Slot::family_3, z.s);
    for (int64_t s = 0; s < z.s; ++s) offsets[s] = shape.offset(taps_w.first + s * taps_w.step);
    Band<A> band = shape;
    make_band(band, (band_rows - 1) * z.stride_h + span);
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t i = 0; i < taps * lanes; i += lanes) store(sums + i, Vec<A>{});
      for (int64_t n = 0; n < z.n; ++n)
        for (int64_t p = 0; p < z.p; p += band_rows) {
          const int64_t count = smaller(band_rows, z.p - p);
          copy_rows(args.input + (n * z.c + k / times) * z.h * z.w, z.h, z.w, p * z.stride_h - z.pad_h,
                    (count - 1) * z.stride_h + span, band);
          for (int64_t i = 0; i < count; i += depth) {
            Rows<T> rows;
            rows.y = args.grad_output + ((n * z.k + k) * z.p + p + i) * z.q;
            rows.count = smaller(depth, count - i);
            rows.columns = z.q;
            rows.x = band.rows + i * z.stride_h * band.row();
            rows.row = band.row();
            rows.row_stride = z.stride_h * band.row();
            rows.offsets = nullptr;
            rows.sums = sums;
            add_all_taps(z, rows, band, offsets);
          }
        }
      for (int64_t t = 0; t < taps; ++t)
        args.grad_weight[k * taps + t] = static_cast<T>(sum_lanes(load(sums + t * lanes)));
    }
  });
  return true;
}

}  // namespace

#define DLKERN_DEPTHWISE(T)                                                                                   \
  bool depthwise_planar_forward(const ConvForwardArgs<T>& args) { return forward(args); }                     \
  bool depthwise_planar_backward_input(const ConvBackwardInputArgs<T>& args) { return backward_input(args); } \
  bool depthwise_planar_backward_weight(const ConvBackwardWeightArgs<T>& args) { return backward_weight(args); }
DLKERN_DEPTHWISE(float)
DLKERN_DEPTHWISE(double)
DLKERN_DEPTHWISE(bfloat16)
DLKERN_DEPTHWISE(float16)
#undef DLKERN_DEPTHWISE

}  // namespace dlkern::cpu::DLKERN_ISA

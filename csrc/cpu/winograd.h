// Winograd's transforms (Winograd 1980; Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016): two
// neighbouring outputs of a correlation in one dimension, y = A' ((G g) * (B' d)), where g is the filter, d the inputs that
// they see and * is element by element, for fewer products than outputs x taps:
//   3 taps: 4 products for 6;  5 taps, as 3 and 2: 7 for 10.
// All numbers in A, B and G are 0, 1, -1 and 1/2, so that rounding stays near a direct computation's. Used on rows and
// columns, a tile of 2 x 2 outputs takes 16 multiplications a channel for 36, 49 for 100; over channels each of these
// places is a matrix product. The filter's gradient is G' ((A y) * (B' d) summed over tiles) G in either dimension,
// where y are the tile's gradients.
//
// Here: the schemes, how an image is cut in tiles, and the products; lanes hold channels. Only of float: in 16 bits tiles of
// the CPU's own are faster, and rounding what is transformed would cost bits.
#pragma once
#include "conv_pack.h"
#include "isa.h"
#include "parallel.h"
#include "scratch.h"

namespace dlkern::cpu::DLKERN_ISA::winograd {

// One dimension of a tile: what its two outputs see, and the places of their products.
struct Taps3 {
  static constexpr int kTaps = 3, kInputs = 4, kPlaces = 4;
  [[gnu::always_inline]] static void input(const vfloat (&d)[4], vfloat (&t)[4]) {
    t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[1] - d[3];
  }
  [[gnu::always_inline]] static void filter(const vfloat (&g)[3], vfloat (&t)[4]) {
    const vfloat outer = g[0] + g[2];
    t[0] = g[0], t[1] = (outer + g[1]) * 0.5f, t[2] = (outer - g[1]) * 0.5f, t[3] = g[2];
  }
  [[gnu::always_inline]] static void output(const vfloat (&m)[4], vfloat (&y)[2]) {
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
  }
  [[gnu::always_inline]] static void gradient(const vfloat (&y)[2], vfloat (&t)[4]) {
    t[0] = y[0], t[1] = y[0] + y[1], t[2] = y[0] - y[1], t[3] = -y[1];
  }
  [[gnu::always_inline]] static void filter_gradient(const vfloat (&s)[4], vfloat (&g)[3]) {
    const vfloat half = (s[1] + s[2]) * 0.5f;
    g[0] = s[0] + half, g[1] = (s[1] - s[2]) * 0.5f, g[2] = half + s[3];
  }
};

// The first three taps as above, two more: (d3 - d4) g3, d4 (g3 + g4), (d4 - d5) g4.
struct Taps5 {
  static constexpr int kTaps = 5, kInputs = 6, kPlaces = 7;
  [[gnu::always_inline]] static void input(const vfloat (&d)[6], vfloat (&t)[7]) {
    t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[1] - d[3];
    t[4] = d[3] - d[4], t[5] = d[4], t[6] = d[4] - d[5];
  }
  [[gnu::always_inline]] static void filter(const vfloat (&g)[5], vfloat (&t)[7]) {
    const vfloat outer = g[0] + g[2];
    t[0] = g[0], t[1] = (outer + g[1]) * 0.5f, t[2] = (outer - g[1]) * 0.5f, t[3] = g[2];
    t[4] = g[3], t[5] = g[3] + g[4], t[6] = g[4];
  }
  [[gnu::always_inline]] static void output(const vfloat (&m)[7], vfloat (&y)[2]) {
    y[0] = (m[0] + m[1] + m[2]) + (m[4] + m[5]), y[1] = (m[1] - m[2] - m[3]) + (m[5] - m[6]);
  }
};

// In two dimensions.
template <class S> constexpr int kPlaces = S::kPlaces * S::kPlaces;
template <class S> constexpr int kTaps = S::kTaps * S::kTaps;

// Outputs cut in tiles of 2 x 2. Dilation splits them in phases, each of which is a convolution without dilation. A line
// is two rows of one phase of the rows, with all phases of the columns: its tiles follow each other, phase after phase.
struct Lines {
  int64_t n, rows, columns, dilation_h, dilation_w;
  int64_t down, across;  // tiles of a phase

  Lines(int64_t n, int64_t rows, int64_t columns, int64_t dilation_h, int64_t dilation_w)
      : n(n),
        rows(rows),
        columns(columns),
        dilation_h(dilation_h),
        dilation_w(dilation_w),
        down(ceil_div(ceil_div(rows, dilation_h), 2)),
        across(ceil_div(ceil_div(columns, dilation_w), 2)) {}
  int64_t count() const { return n * dilation_h * down; }
  int64_t tiles() const { return dilation_w * across; }  // of a line
  int64_t image(int64_t line) const { return line / (dilation_h * down); }
  int64_t phase_end(int64_t line) const { return (line / down + 1) * down; }  // lines of one image and phase
  int64_t row(int64_t line) const { return line / down % dilation_h + line % down * 2 * dilation_h; }
  int64_t column(int64_t tile) const { return tile / across + tile % across * 2 * dilation_w; }
};

// What tiles cost, in multiplications of a direct computation: to those of the places come the transforms.
template <class S> inline double products_of(double tiles, double channels, double outputs) {
  return tiles * kPlaces<S> * (channels * outputs + 10 * channels + 8 * outputs);
}

// The share of numbers that are not zero, told from 64 runs of 16. A direct sum of few numbers rounds a few times, the
// transforms as often as ever: of the gradient of a maximum over whole images the error would be three times as large.
inline double density_of(const Images<float>& x) {
  constexpr int64_t runs = 64, length = 16;
  const int64_t size = x.n * x.channels * x.h * x.w, step = larger(length, (size - length) / (runs - 1));
  int64_t all = 0, some = 0;
  for (int64_t at = 0; at + length <= size; at += step, all += length)
    for (int64_t i = 0; i < length; ++i) some += x.data[at + i] != 0;
  return static_cast<double>(some) / static_cast<double>(larger(1, all));
}

// Elements of one channel after the other in [place][tile][pitch]: a pitch that is no power of two spreads the tiles over
// the cache's sets, and more between planes does so with places.
inline int64_t pitch_of(int64_t channels) { return ceil_div(channels, 16) * 16 + 16; }
inline int64_t plane_of(int64_t tiles, int64_t pitch) { return tiles * pitch + 48; }

// Calls put(tile, pixels) for each tile of lines [begin, end), numbered from 0: pixels[y][x] points to the channels
// [c0, c0 + channels) of the source at the tile's first row + first_h + y * dilation_h, and so for columns; to
// zeros outside of the image.
template <int SIZE, class Put>
inline void read_tiles(const Images<float>& x, const Lines& lines, int64_t first_h, int64_t first_w, int64_t c0,
                       int64_t channels, int64_t begin, int64_t end, Put&& put) {
  const float* pixels[SIZE][SIZE];
  const int64_t tiles = lines.tiles(), dh = lines.dilation_h, dw = lines.dilation_w;
  int64_t tile = 0;
  if (x.channels_last) {
    float* zeros = scratch<float>(Slot::tiles_c, channels);
    std::memset(zeros, 0, sizeof(float) * static_cast<size_t>(channels));
    for (int64_t line = begin; line < end; ++line) {
      const float* row[SIZE];
      for (int y = 0; y < SIZE; ++y) {
        const int64_t h = lines.row(line) + first_h + y * dh;
        row[y] = h < 0 || h >= x.h ? nullptr : x.data + (lines.image(line) * x.h + h) * x.w * x.channels + c0;
      }
      for (int64_t t = 0; t < tiles; ++t, ++tile) {
        for (int i = 0; i < SIZE; ++i) {
          const int64_t w = lines.column(t) + first_w + i * dw;
          const bool inside = w >= 0 && w < x.w;
          for (int y = 0; y < SIZE; ++y) pixels[y][i] = inside && row[y] ? row[y] + w * x.channels : zeros;
        }
        put(tile, pixels);
      }
    }
    return;
  }
  const int64_t width = (2 * (lines.across - 1) + SIZE) * dw, copy_row = width * channels;
  for (int64_t line = begin; line < end;) {
    const int64_t last = smaller(end, lines.phase_end(line)), rows = 2 * (last - line - 1) + SIZE;
    float* copy = scratch<float>(Slot::tiles_c, rows * copy_row);
    copy_window(x, Window{lines.image(line), lines.row(line) + first_h, rows, dh, first_w, width, 1}, c0, channels,
                copy, copy_row, channels);
    for (; line < last; ++line, copy += 2 * copy_row)
      for (int64_t t = 0; t < tiles; ++t, ++tile) {
        for (int y = 0; y < SIZE; ++y)
          for (int i = 0; i < SIZE; ++i) pixels[y][i] = copy + y * copy_row + (lines.column(t) + i * dw) * channels;
        put(tile, pixels);
      }
  }
}

// f of a tile's columns, then of the rows of that, to to[place * plane + channel].
template <int SIZE, int PLACES, class F>
[[gnu::always_inline]] inline void transform_tile(const float* const (&d)[SIZE][SIZE], int64_t channels, float* to,
                                                  int64_t plane, F&& f) {
  for (int64_t c = 0; c < channels; c += kLanes<float>, to += kLanes<float>) {
    const int64_t some = channels - c;
    vfloat rows[PLACES][SIZE], in[SIZE], out[PLACES];
#pragma GCC unroll 8
    for (int j = 0; j < SIZE; ++j) {
#pragma GCC unroll 8
      for (int i = 0; i < SIZE; ++i) in[i] = load_some(d[i][j] + c, some);
      f(in, out);
#pragma GCC unroll 8
      for (int i = 0; i < PLACES; ++i) rows[i][j] = out[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < PLACES; ++i) {
      f(rows[i], out);
#pragma GCC unroll 8
      for (int j = 0; j < PLACES; ++j) store(to + (PLACES * i + j) * plane, out[j]);
    }
  }
}

// B' d B of one tile.
template <class S>
inline void transform_input(const float* const (&d)[S::kInputs][S::kInputs], int64_t channels, float* to,
                            int64_t plane) {
  transform_tile<S::kInputs, S::kPlaces>(d, channels, to, plane, S::input);
}

// A y A' of one tile of gradients.
template <class S>
inline void transform_gradient(const float* const (&y)[2][2], int64_t channels, float* to, int64_t plane) {
  transform_tile<2, S::kPlaces>(y, channels, to, plane, S::gradient);
}

// G g G' of `count` neighbouring elements: from[tap * from_plane], to[place * to_plane]; whole vectors.
template <class S>
inline void transform_filter(const float* from, int64_t from_plane, int64_t count, float* to, int64_t to_plane) {
  for (int64_t e = 0; e < count; e += kLanes<float>) {
    vfloat columns[S::kPlaces][S::kTaps], in[S::kTaps], out[S::kPlaces];
#pragma GCC unroll 8
    for (int r = 0; r < S::kTaps; ++r) {
#pragma GCC unroll 8
      for (int s = 0; s < S::kTaps; ++s) in[s] = load(from + (S::kTaps * r + s) * from_plane + e);
      S::filter(in, out);
#pragma GCC unroll 8
      for (int j = 0; j < S::kPlaces; ++j) columns[j][r] = out[j];
    }
#pragma GCC unroll 8
    for (int j = 0; j < S::kPlaces; ++j) {
      S::filter(columns[j], out);
#pragma GCC unroll 8
      for (int i = 0; i < S::kPlaces; ++i) store(to + (S::kPlaces * i + j) * to_plane + e, out[i]);
    }
  }
}

// A' m A of one vector of a tile: out[y][x].
template <class S> inline void transform_output(const float* m, int64_t plane, vfloat (&out)[2][2]) {
  vfloat rows[2][S::kPlaces], in[S::kPlaces], pair[2];
#pragma GCC unroll 8
  for (int j = 0; j < S::kPlaces; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < S::kPlaces; ++i) in[i] = load(m + (S::kPlaces * i + j) * plane);
    S::output(in, pair);
    rows[0][j] = pair[0], rows[1][j] = pair[1];
  }
  S::output(rows[0], out[0]);
  S::output(rows[1], out[1]);
}

// G' s G of one vector: out[r][s].
template <class S>
inline void transform_filter_gradient(const float* sums, int64_t plane, vfloat (&out)[S::kTaps][S::kTaps]) {
  vfloat rows[S::kTaps][S::kPlaces], in[S::kPlaces], taps[S::kTaps];
#pragma GCC unroll 8
  for (int j = 0; j < S::kPlaces; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < S::kPlaces; ++i) in[i] = load(sums + (S::kPlaces * i + j) * plane);
    S::filter_gradient(in, taps);
#pragma GCC unroll 8
    for (int r = 0; r < S::kTaps; ++r) rows[r][j] = taps[r];
  }
#pragma GCC unroll 8
  for (int r = 0; r < S::kTaps; ++r) S::filter_gradient(rows[r], out[r]);
}

// Bytes of a block's transformed tiles: half a second-level cache of 2 MB (AVX-512) or 512 KB.
constexpr int64_t kBlockBytes = kVectorBytes == 64 ? 1024 * 1024 : 320 * 1024;
constexpr int kVectors = kTileVectors;  // columns of a product at a time, in vectors
constexpr int kRows = 6;  // and rows
constexpr int64_t kChain = 16;  // steps

// out[i][0, NV vectors) = sum over k < depth of a(i, k) b[k * b_step][0, NV vectors), in chains of kChain whose sums are
// added up in memory: the loop has no registers left, and that costs a thirtieth. They are added to out where that has
// sums already. a(i, k) is a[i * a_step + k], or where OUTER a[k * a_step + i]; then the sum of all chains is made first.
// `fetch` cache lines a chain are fetched from `ahead`: of what the next products read.
template <bool OUTER, int ROWS, int NV>
void multiply(int64_t depth, const float* a, int64_t a_step, const float* b, int64_t b_step, float* out,
              int64_t out_row, bool add, const float* ahead, int64_t fetch) {
  constexpr int lanes = kLanes<float>;
  alignas(64) float own[OUTER ? ROWS * NV * lanes : 1];
  float* const total = OUTER ? own : out;
  const int64_t row = OUTER ? NV * lanes : out_row;
  if constexpr (OUTER)
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < NV; ++j) __builtin_prefetch(out + i * out_row + j * lanes, 1);
  for (int64_t begin = 0; begin < depth; begin += kChain) {
    for (int64_t l = 0; l < fetch; ++l, ahead += 16) __builtin_prefetch(ahead, 0, 2);
    vfloat sum[ROWS][NV] = {};
    for (int64_t k = begin, end = smaller(begin + kChain, depth); k < end; ++k, b += b_step) {
      vfloat right[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) right[j] = load(b + j * lanes);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const vfloat left = broadcast<float>(OUTER ? a[i] : a[i * a_step + k]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) sum[i][j] += left * right[j];
      }
      if (OUTER) a += a_step;
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        float* to = total + i * row + j * lanes;
        store(to, begin > 0 || (!OUTER && add) ? load(to) + sum[i][j] : sum[i][j]);
      }
  }
  if constexpr (OUTER)
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < NV; ++j) {
        const vfloat sum = load(own + (i * NV + j) * lanes);
        float* to = out + i * out_row + j * lanes;
        store(to, add ? load(to) + sum : sum);
      }
}

using Multiply = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, bool, const float*,
                          int64_t);
template <bool OUTER> inline Multiply multiply_for(int64_t rows, int64_t vectors) {
#define DLKERN_ROW(r)                                                                       \
  {                                                                                         \
    multiply<OUTER, r, 1>, multiply<OUTER, r, 2>, multiply < OUTER, r, kVectors<3 ? 2 : 3>, \
        multiply<OUTER, r, kVectors>                                                        \
  }
  static constexpr Multiply table[kRows][4] = {DLKERN_ROW(1), DLKERN_ROW(2), DLKERN_ROW(3),
                                               DLKERN_ROW(4), DLKERN_ROW(5), DLKERN_ROW(6)};
#undef DLKERN_ROW
  return table[rows - 1][vectors - 1];
}

// The largest magnitude of many vectors, as bits.
struct Largest {
  vint32 bits{};
  void add(vfloat v) {
    const vint32 magnitude = (vint32)v & 0x7fffffff;
    bits = magnitude > bits ? magnitude : bits;
  }
  bool is_finite() const {
    for (int l = 0; l < kLanes<float>; ++l)
      if (bits[l] >= 0x7f800000) return false;
    return true;
  }
};

}  // namespace dlkern::cpu::DLKERN_ISA::winograd

// Winograd's F(2 x 2, 3 x 3) (Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016): 2 x 2 outputs of
// a 3 x 3 correlation take 16 multiplications a channel instead of 36. With
//   B' = 1  0 -1  0    G =  1   0   0    A' = 1  1  1  0
//        0  1  1  0        1/2 1/2 1/2        0  1 -1 -1
//        0 -1  1  0        1/2 -1/2 1/2
//        0  1  0 -1         0   0   1
// a tile of outputs is A' ((G g G') * (B' d B)) A, where g is the filter, d the 4 x 4 inputs that the tile sees and * is
// element by element, so that over channels each of the 16 places is a matrix product. The filter's gradient is
// G' (sum over tiles of (B' d B) * (A y A')) G, where y are the tile's 2 x 2 gradients.
//
// Here: how an image is cut in tiles, and the transforms; lanes hold channels. Only of float: in 16 bits tiles of the
// CPU's own are faster, and rounding what is transformed would cost half of the bits.
#pragma once
#include "conv_pack.h"
#include "isa.h"
#include "parallel.h"
#include "scratch.h"

namespace dlkern::cpu::DLKERN_ISA::winograd {

constexpr int kPlaces = 16;

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

// What tiles cost, in multiplications of a direct computation: to the 16 a tile and pair of channels come the transforms.
inline double products_of(double tiles, double channels, double outputs) {
  return tiles * (kPlaces * channels * outputs + 160 * channels + 128 * outputs);
}

// Elements of one channel after the other in [place][tile][pitch]: a pitch that is no power of two spreads the tiles over
// the cache's sets, and more between planes does so with places.
inline int64_t pitch_of(int64_t channels) { return ceil_div(channels, 16) * 16 + 16; }
inline int64_t plane_of(int64_t tiles, int64_t pitch) { return tiles * pitch + 48; }

// Calls put(tile, pixels) for each tile of lines [begin, end), numbered from 0: pixels[y][x] points to the channels
// [c0, c0 + channels) of the source at the tile's first row + first_h + y * dilation_h, and so for columns; to zeros
// outside of the image.
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
  const int64_t width = (2 * lines.across + SIZE - 2) * dw, copy_row = width * channels;
  for (int64_t line = begin; line < end;) {
    const int64_t last = smaller(end, lines.phase_end(line)), rows = 2 * (last - line) + SIZE - 2;
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

// B' d B of one tile, to to[place * plane + channel].
inline void transform_input(const float* const (&d)[4][4], int64_t channels, float* to, int64_t plane) {
  for (int64_t c = 0; c < channels; c += kLanes<float>, to += kLanes<float>) {
    const int64_t some = channels - c;
    vfloat t[4][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vfloat d0 = load_some(d[0][j] + c, some), d1 = load_some(d[1][j] + c, some),
                   d2 = load_some(d[2][j] + c, some), d3 = load_some(d[3][j] + c, some);
      t[0][j] = d0 - d2, t[1][j] = d1 + d2, t[2][j] = d2 - d1, t[3][j] = d1 - d3;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store(to + (4 * i) * plane, t[i][0] - t[i][2]);
      store(to + (4 * i + 1) * plane, t[i][1] + t[i][2]);
      store(to + (4 * i + 2) * plane, t[i][2] - t[i][1]);
      store(to + (4 * i + 3) * plane, t[i][1] - t[i][3]);
    }
  }
}

// A y A' of one tile of gradients.
inline void transform_gradient(const float* const (&y)[2][2], int64_t channels, float* to, int64_t plane) {
  for (int64_t c = 0; c < channels; c += kLanes<float>, to += kLanes<float>) {
    const int64_t some = channels - c;
    vfloat t[4][2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const vfloat y0 = load_some(y[0][j] + c, some), y1 = load_some(y[1][j] + c, some);
      t[0][j] = y0, t[1][j] = y0 + y1, t[2][j] = y0 - y1, t[3][j] = -y1;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store(to + (4 * i) * plane, t[i][0]);
      store(to + (4 * i + 1) * plane, t[i][0] + t[i][1]);
      store(to + (4 * i + 2) * plane, t[i][0] - t[i][1]);
      store(to + (4 * i + 3) * plane, -t[i][1]);
    }
  }
}

// G g G' of `count` neighbouring elements: from[tap * from_plane], to[place * to_plane]; whole vectors.
inline void transform_filter(const float* from, int64_t from_plane, int64_t count, float* to, int64_t to_plane) {
  const auto half = [](vfloat a, vfloat b, vfloat c, vfloat(&g)[4]) __attribute__((always_inline)) {
    const vfloat outer = a + c;
    g[0] = a, g[1] = (outer + b) * 0.5f, g[2] = (outer - b) * 0.5f, g[3] = c;
  };
  for (int64_t e = 0; e < count; e += kLanes<float>) {
    vfloat t[3][4], g[4];
#pragma GCC unroll 4
    for (int r = 0; r < 3; ++r)
      half(load(from + (3 * r) * from_plane + e), load(from + (3 * r + 1) * from_plane + e),
           load(from + (3 * r + 2) * from_plane + e), t[r]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      half(t[0][j], t[1][j], t[2][j], g);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store(to + (4 * i + j) * to_plane + e, g[i]);
    }
  }
}

// A' m A of one vector of a tile: out[y][x].
inline void transform_output(const float* m, int64_t plane, vfloat (&out)[2][2]) {
  vfloat t[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const vfloat m0 = load(m + j * plane), m1 = load(m + (4 + j) * plane), m2 = load(m + (8 + j) * plane),
                 m3 = load(m + (12 + j) * plane);
    t[0][j] = m0 + m1 + m2, t[1][j] = m1 - m2 - m3;
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    out[i][0] = t[i][0] + t[i][1] + t[i][2];
    out[i][1] = t[i][1] - t[i][2] - t[i][3];
  }
}

// G' s G of one vector: out[tap].
inline void transform_filter_gradient(const float* s, int64_t plane, vfloat (&out)[9]) {
  const auto thirds = [](vfloat a, vfloat b, vfloat c, vfloat d, vfloat* g, int step) __attribute__((always_inline)) {
    const vfloat sum = (b + c) * 0.5f;
    g[0] = a + sum, g[step] = (b - c) * 0.5f, g[2 * step] = sum + d;
  };
  vfloat t[12];  // [r][j]
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
    thirds(load(s + j * plane), load(s + (4 + j) * plane), load(s + (8 + j) * plane), load(s + (12 + j) * plane), t + j,
           4);
#pragma GCC unroll 4
  for (int r = 0; r < 3; ++r) thirds(t[4 * r], t[4 * r + 1], t[4 * r + 2], t[4 * r + 3], out + 3 * r, 1);
}

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

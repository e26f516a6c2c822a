// The micro-kernels of convolution. All hold a ROWS x NV-vector tile of sums in registers and take one broadcast
// and NV vectors a step, so that a step is ROWS * NV multiply-adds for ROWS + NV loads.
//
// correlate_tile: ROWS output pixels x NV vectors of output channels. The pixels' windows are read where they lie: one
//   pointer a pixel, and a list of pieces (offset, length) that a window consists of, the same for every pixel.
// outer_tile: ROWS output channels x NV vectors of input channels (of one tap), summed over output pixels; turned, ROWS
//   neighbouring elements of a window x NV vectors of output channels.
#pragma once
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {

constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;  // output channels of correlate_tile, in vectors
constexpr int kTilePixels = 6;
constexpr int kOuterVectors = 2;  // input channels of outer_tile, in vectors
constexpr int kOuterRows = kVectorBytes == 64 ? 12 : 6;
constexpr int64_t kOuterChain = 32;  // pixels that outer_tile sums in one go
constexpr int kOuterPitch = kVectorBytes == 64 ? 16 : 8;  // elements from one pixel's kOuterRows channels to the next's
// Most steps between two additions of the sums to memory: so that a panel of weights stays in the first-level cache,
// and because rounding errors grow with the length of an unbroken sum.
constexpr int64_t kDepth = 128;

// Steps between two additions of a sum of `steps` terms to memory, cut evenly. In a small problem the square root,
// which gives the smallest error and is what a library's short inner products come near; kDepth where speed counts.
inline int64_t sum_depth(int64_t steps, double multiplications) {
  int64_t most = kDepth;
  if (multiplications < 4e6)
    for (most = 4; most < kDepth && most * most < steps;) ++most;
  return ceil_div(steps, ceil_div(steps, most));
}

// A run of consecutive elements in every pixel's window, and the step of its first in the weights.
struct Piece {
  int64_t offset, length, step;
};

// outs[i][0, NV vectors) (+)= sum over pieces and their elements e of rows[i][offset + e] * weights[step + e], where
// weights holds NV vectors a step; then bias, where that is not null, is added.
template <class A>
using CorrelateTile = void (*)(const Piece* pieces, int64_t count, const A* const* rows, const A* weights,
                               A* const* outs, int64_t out_offset, bool add, const A* bias);

template <int ROWS, int NV, class A>
void correlate_tile(const Piece* pieces, int64_t count, const A* const* rows, const A* weights, A* const* outs,
                    int64_t out_offset, bool add, const A* bias) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>;
  V sum[ROWS][NV] = {};
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) __builtin_prefetch(outs[i] + out_offset + j * lanes, 1);
  for (int64_t t = 0; t < count; ++t) {
    const A* a[ROWS];
    const A* w = weights + pieces[t].step * (NV * lanes);
    const int64_t length = pieces[t].length;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) a[i] = rows[i] + pieces[t].offset;
    for (int64_t e = 0; e < length; ++e) {
      V b[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) b[j] = load(w + j * lanes);
      w += NV * lanes;
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const V value = broadcast<A>(a[i][e]);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) sum[i][j] += value * b[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    A* out = outs[i] + out_offset;
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      V value = add ? load(out + j * lanes) + sum[i][j] : sum[i][j];
      if (bias) value += load(bias + j * lanes);
      store(out + j * lanes, value);
    }
  }
}

// tile[i][0, NV vectors) (+)= sum over pixels p, at most kDepth of them, of left[p][i] * right[p][0, NV vectors). One
// operand's pixels are `step` elements apart, the other's begin at offsets[p]: right's, or left's where TURNED.
template <class A>
using OuterTile = void (*)(int64_t pixels, const A* left, const A* right, int64_t step, const int32_t* offsets, A* tile,
                           int64_t tile_row, bool add);

template <bool TURNED, int ROWS, int NV, class A>
void outer_tile(int64_t pixels, const A* left, const A* right, int64_t step, const int32_t* offsets, A* tile,
                int64_t tile_row, bool add) {
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>;
  V sum[ROWS][NV];
  const auto add_pixels = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int64_t p = begin; p < end; ++p) {
      const A* l = TURNED ? left + offsets[p] : left;
      const A* r = TURNED ? right : right + offsets[p];
      V b[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) b[j] = load(r + j * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const V value = broadcast<A>(l[i]);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) sum[i][j] += value * b[j];
      }
      (TURNED ? right : left) += step;
    }
  };
  // Several short sums round less than a long one. They are added up in memory, which costs a fiftieth.
  V total[ROWS][NV];
  for (int64_t p = 0; p < pixels; p += kOuterChain) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sum[i][j] = V{};
    add_pixels(p, smaller(p + kOuterChain, pixels));
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) total[i][j] = p > 0 ? total[i][j] + sum[i][j] : sum[i][j];
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    A* out = tile + i * tile_row;
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(out + j * lanes, add ? load(out + j * lanes) + total[i][j] : total[i][j]);
  }
}

// The instance for a tile of rows x vectors.
template <class A> CorrelateTile<A> correlate_tile_for(int64_t rows, int64_t vectors) {
#define DLKERN_ROW(r)                                                                                 \
  {                                                                                                   \
    correlate_tile<r, 1, A>, correlate_tile<r, 2, A>, correlate_tile < r, kTileVectors<3 ? 2 : 3, A>, \
        correlate_tile<r, kTileVectors, A>                                                            \
  }
  static constexpr CorrelateTile<A> table[kTilePixels][4] = {DLKERN_ROW(1), DLKERN_ROW(2), DLKERN_ROW(3),
                                                             DLKERN_ROW(4), DLKERN_ROW(5), DLKERN_ROW(6)};
#undef DLKERN_ROW
  return table[rows - 1][vectors == kTileVectors ? 3 : vectors - 1];
}
// Compiled in conv.cpp; recurrent layers multiply with them too.
extern template CorrelateTile<float> correlate_tile_for(int64_t, int64_t);
extern template CorrelateTile<double> correlate_tile_for(int64_t, int64_t);

template <bool TURNED, class A, int ROWS = kOuterRows> inline OuterTile<A> outer_tile_for(int64_t rows,
                                                                                          int64_t vectors) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return outer_tile_for<TURNED, A, ROWS - 1>(rows, vectors);
  }
  return vectors == 1 ? outer_tile<TURNED, ROWS, 1, A> : outer_tile<TURNED, ROWS, kOuterVectors, A>;
}

}  // namespace dlkern::cpu::DLKERN_ISA

// Tiles of attention, 64 rows x N columns a block and 16 rows a warp: what the forward and backward kernels share.
//
// Rows are queries and columns keys, or the other way round. In 16-bit types a warp multiplies on the tensor cores,
// in float32 exactly on the ordinary ones; both keep a tile of scores in registers, whose places Layout tells, so that all
// else is written once. Depths beyond SIZE pass through shared memory in blocks of it. Which keys a query sees by
// position is one interval a query: tiles outside are skipped, only those on a border look at single keys.
#pragma once
#include <type_traits>

#include "../philox.h"
#include "attention.h"
#include "block_reduce.cuh"
#include "limits.cuh"
#include "pack.cuh"
#include "positions_turn.cuh"
#include "ptx.cuh"

namespace dlkern::cuda {
namespace attention {

constexpr int kThreads = 128, kWarps = 4, kTileRows = kAttentionTileRows;
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kFewKeys = kAttentionFewKeys;
constexpr int kMostColumns = 128;  // of a block

DLKERN_DEVICE int lane() { return static_cast<int>(threadIdx.x) % 32; }
DLKERN_DEVICE int warp() { return static_cast<int>(threadIdx.x) / 32; }
DLKERN_DEVICE float minus_infinity() { return -INFINITY; }

struct Operand {
  const void* data;
  int64_t stride[4];
  bool aligned;  // whole rows may be read 16 bytes at a time
};

// What kernels are told of a call.
struct Args {
  int score, mask;
  int heads, key_heads, group, queries, keys, depth, value_depth, left, right;
  float scale, softcap, kept;
  bool plain;  // nothing but the scale is done to scores, before masks by position
  bool dropout;
  uint32_t threshold;
  int64_t all_heads;  // batch * heads
  Operand query, key, value, mask_at;
  const int64_t* lengths;
  int64_t lengths_stride[2];
  const void *slopes, *weight;
  bool wide_slopes, wide_weight;
  const int64_t* seed;
  float *query_unit, *key_unit, *largest, *inverse;
};

// The same of one of several sequences that lie one after another: its number, and by how much its windows are moved to be
// aligned at the last query and the last key.
struct SequenceArgs : Args {
  int sequence, shift;
};

// The same where queries and keys have rotary positions: they are turned as they are loaded, and their gradients turned
// back before they are stored. Of heads that need no more than one block of columns, and dot scores alone.
struct RotaryArgs : Args {
  const void *cos, *sin;  // [1 or batch, positions, half], floats where wide_angles, else of the operands' type
  int64_t angles_stride;  // of a batch
  int half;
  bool wide_angles, neighbours;  // pairs are (2d, 2d + 1), else (d, d + half)
  bool packed;  // pairs may be turned, and angles read, 16 bytes at a time

  // turn_pairs of a position's pairs from d on.
  template <int VEC, class T, class E>
  DLKERN_DEVICE void turn(int64_t b, int position, int d, bool inverse, const E* first, const E* second, E* to_first,
                          E* to_second) const {
    const int64_t at = b * angles_stride + static_cast<int64_t>(position) * half + d;
    const auto with = [&](const auto* c, const auto* s) {
      turn_pairs<VEC>(first, second, c + at, s + at, neighbours, inverse, to_first, to_second);
    };
    if (wide_angles)
      with(static_cast<const float*>(cos), static_cast<const float*>(sin));
    else
      with(static_cast<const T*>(cos), static_cast<const T*>(sin));
  }
};

template <class A>
constexpr bool kTurned = std::is_same_v<A, RotaryArgs>;

DLKERN_DEVICE int shift_of(const Args&) { return 0; }
DLKERN_DEVICE int shift_of(const SequenceArgs& x) { return x.shift; }
DLKERN_DEVICE uint64_t seed_of(const Args& x) { return static_cast<uint64_t>(*x.seed); }
DLKERN_DEVICE uint64_t seed_of(const SequenceArgs& x) {
  return static_cast<uint64_t>(*x.seed) + static_cast<uint64_t>(x.sequence);
}

template <class T>
DLKERN_DEVICE float number_at(const void* numbers, bool wide, int64_t index) {
  return wide ? static_cast<const float*>(numbers)[index] : to_float(static_cast<const T*>(numbers)[index]);
}

// ---- One head ----

template <class T>
DLKERN_DEVICE const T* head_of(const Operand& x, int64_t b, int64_t h) {
  return static_cast<const T*>(x.data) + b * x.stride[0] + h * x.stride[1];
}

// The keys begin .. end - 1 that a query sees by position.
struct Span {
  int begin, end;
};
template <class A>
DLKERN_DEVICE Span span_of(const A& x, int64_t b, int i) {
  if (i >= x.queries) return {0, 0};
  const int at = i + shift_of(x);
  Span span{x.left < 0 ? 0 : max(0, at - x.left), x.right < 0 ? x.keys : min(x.keys, at + x.right + 1)};
  if (x.lengths) {
    const int64_t length = x.lengths[b * x.lengths_stride[0] + i * x.lengths_stride[1]];
    if (length < span.end) span.end = static_cast<int>(length);
  }
  return span.end > span.begin ? span : Span{0, 0};
}

// Of ROWS queries: some see a key of first .. last - 1; all of them see all keys of all_first .. all_last - 1.
struct Range {
  int first, last, all_first, all_last;
  DLKERN_DEVICE bool meets(int begin, int end) const { return first < end && last > begin; }
  DLKERN_DEVICE bool covers(int begin, int end) const { return all_first <= begin && all_last >= end; }
};
template <int ROWS, class A>
DLKERN_DEVICE Range range_of(const A& x, int64_t b, int i0) {
  Range range{x.keys, 0, 0, x.keys};
#pragma unroll
  for (int row = 0; row < ROWS; row += 32) {
    const int i = i0 + row + lane();
    if (row + lane() >= ROWS || i >= x.queries) continue;
    const Span span = span_of(x, b, i);
    if (span.end > span.begin) range.first = min(range.first, span.begin), range.last = max(range.last, span.end);
    range.all_first = max(range.all_first, span.begin), range.all_last = min(range.all_last, span.end);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    range.first = min(range.first, __shfl_xor_sync(0xffffffffu, range.first, distance));
    range.last = max(range.last, __shfl_xor_sync(0xffffffffu, range.last, distance));
    range.all_first = max(range.all_first, __shfl_xor_sync(0xffffffffu, range.all_first, distance));
    range.all_last = min(range.all_last, __shfl_xor_sync(0xffffffffu, range.all_last, distance));
  }
  return range;
}

// ---- Tiles in shared memory ----

// Rows are 16 bytes longer than SIZE, so that rows that are read at once lie in different banks.
template <class T, int SIZE>
struct TileOf {
  static constexpr int kPiece = 16 / sizeof(T);
  static constexpr int kStride = SIZE + kPiece;
  static constexpr int kStep = sizeof(T) == 4 ? 32 : 16;  // columns that are read at once
};

// Starts loading rows first .. first + ROWS - 1 of one head, columns from `column` on, of which there are `depth` in all;
// zeros outside, up to a multiple of kStep columns. With BEHIND the tile's columns before `begin` are left as they are.
template <class T, int ROWS, int SIZE, bool BEHIND = false>
DLKERN_DEVICE void load_rows(T* tile, const T* from, const Operand& x, int first, int rows, int column, int depth,
                             int begin = 0) {
  using Tile = TileOf<T, SIZE>;
  constexpr int kAcross = SIZE / Tile::kPiece, kPieces = ROWS * kAcross / kThreads;
  static_assert(ROWS * kAcross % kThreads == 0);
  const int left = depth - column, width = min(SIZE, (left + Tile::kStep - 1) / Tile::kStep * Tile::kStep);
#pragma unroll 4
  for (int i = 0; i < kPieces; i++) {
    const int piece = static_cast<int>(threadIdx.x) + i * kThreads;
    const int r = piece / kAcross, c = piece % kAcross * Tile::kPiece;
    if (c >= width || (BEHIND && c + Tile::kPiece <= begin)) continue;
    T* to = tile + r * Tile::kStride + c;
    const bool inside = first + r < rows && c < left;
    const T* at = from + (first + r) * x.stride[2] + (column + c) * x.stride[3];
    if (x.aligned && (!BEHIND || c >= begin)) {
      cp_async16(to, inside ? at : from, inside ? 16 : 0);
    } else {
#pragma unroll
      for (int e = 0; e < Tile::kPiece; e++) {
        if (!BEHIND || c + e >= begin) to[e] = inside && c + e < left ? at[e * x.stride[3]] : from_float<T>(0.0f);
      }
    }
  }
}

// ---- A warp's 16 rows ----

// Which elements of 16 rows a lane holds: kRows rows, and of each every kAcross-th column, or a run of columns.
template <class T>
struct Layout {  // mma.sync's
  static constexpr int kRows = 2, kAcross = 4, kRun = 2, kEvery16 = 4;
  static DLKERN_DEVICE int row(int r) { return lane() / 4 + 8 * r; }
  static DLKERN_DEVICE int column(int c) { return c / 2 * 8 + lane() % 4 * 2 + c % 2; }
  static DLKERN_DEVICE int result_column(int c) { return column(c); }
};
template <>
struct Layout<float> {
  static constexpr int kRows = 4, kAcross = 8, kRun = 4, kEvery16 = 2;
  static DLKERN_DEVICE int row(int r) { return lane() / 8 + 4 * r; }
  static DLKERN_DEVICE int column(int c) { return lane() % 8 + 8 * c; }
  static DLKERN_DEVICE int result_column(int c) { return c / 4 * 32 + lane() % 8 * 4 + c % 4; }
};

// 16 x N: scores, whose places are row(r), column(c), or sums of results: row(r), result_column(c).
template <class T, int N>
struct Fragment {
  static constexpr int kRows = Layout<T>::kRows, kColumns = N / Layout<T>::kAcross;
  float at[kRows][kColumns] = {};

  template <class F>
  DLKERN_DEVICE void each(F&& f) {
#pragma unroll
    for (int r = 0; r < kRows; r++) {
#pragma unroll
      for (int c = 0; c < kColumns; c++) f(r, c, at[r][c]);
    }
  }
};

// Over the lanes that share a row.
template <class T>
DLKERN_DEVICE float row_sum(float value) {
#pragma unroll
  for (int distance = Layout<T>::kAcross / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}
template <class T>
DLKERN_DEVICE float row_max(float value) {
#pragma unroll
  for (int distance = Layout<T>::kAcross / 2; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// A warp's own floats, through which float32 turns scores into an operand.
template <class T, int N>
struct Scratch {
  static constexpr int kStride = N + 4, kFloats = sizeof(T) == 4 ? kWarps * 16 * kStride : 0;
};

template <class T>
concept Short = sizeof(T) == 2;

template <Short T>
DLKERN_DEVICE uint32_t packed(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t word;
  memcpy(&word, pair, sizeof word);
  return word;
}
template <Short T, int N>
DLKERN_DEVICE void mma_at(Fragment<T, N>& sum, int piece, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float c[4] = {sum.at[0][2 * piece], sum.at[0][2 * piece + 1], sum.at[1][2 * piece], sum.at[1][2 * piece + 1]};
  mma_16x8x16<T>(c, a, b0, b1);
  sum.at[0][2 * piece] = c[0], sum.at[0][2 * piece + 1] = c[1];
  sum.at[1][2 * piece] = c[2], sum.at[1][2 * piece + 1] = c[3];
}

// s += a b^T over `depth` columns of both tiles; `a` begins at the warp's first row.
template <int SIZE, int N, Short T>
DLKERN_DEVICE void add_row_products(Fragment<T, N>& s, const T* a, const T* b, int depth) {
  constexpr int kStride = TileOf<T, SIZE>::kStride;
  const T* a_at = a + lane() % 16 * kStride + lane() / 16 * 8;
  const T* b_at = b + (lane() / 16 * 8 + lane() % 8) * kStride + lane() / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < SIZE; k += 16) {
    if (k >= depth) break;
    uint32_t a_part[4];
    ldmatrix_x4(a_part, a_at + k);
#pragma unroll
    for (int j = 0; j < N / 16; j++) {
      uint32_t b_part[4];
      ldmatrix_x4(b_part, b_at + 16 * j * kStride + k);
      mma_at(s, 2 * j, a_part, b_part[0], b_part[1]);
      mma_at(s, 2 * j + 1, a_part, b_part[2], b_part[3]);
    }
  }
}
// Products are summed eight at a time, and these sums four at a time: one chain over all would lose digits.
template <int SIZE, int N>
DLKERN_DEVICE void add_row_products(Fragment<float, N>& s, const float* a, const float* b, int depth) {
  using Mine = Layout<float>;
  constexpr int kStride = TileOf<float, SIZE>::kStride;
#pragma unroll 1
  for (int start = 0; start < depth; start += 32) {
    Fragment<float, N> some;
#pragma unroll 1
    for (int k = start; k < min(start + 32, depth); k += 8) {
      Fragment<float, N> chain;
#pragma unroll(N > 16 ? 2 : 1)  // narrow tiles are for kernels that are short of registers
      for (int half = 0; half < 8; half += 4) {
        Pack<float, 4> a_part[Mine::kRows];
#pragma unroll
        for (int r = 0; r < Mine::kRows; r++) a_part[r] = load_pack<float, 4>(a + Mine::row(r) * kStride + k + half);
#pragma unroll
        for (int c = 0; c < chain.kColumns; c++) {
          const auto b_part = load_pack<float, 4>(b + Mine::column(c) * kStride + k + half);
#pragma unroll
          for (int r = 0; r < Mine::kRows; r++) {
#pragma unroll
            for (int v = 0; v < 4; v++) chain.at[r][c] = fmaf(a_part[r].at[v], b_part.at[v], chain.at[r][c]);
          }
        }
      }
      chain.each([&](int r, int c, float value) { some.at[r][c] += value; });
    }
    some.each([&](int r, int c, float value) { s.at[r][c] += value; });
  }
}

// sum += p b, of which `width` columns are wanted; p is rounded to 16 bits, or with `split` is the sum of two such.
template <int SIZE, int N, Short T>
DLKERN_DEVICE void add_product(Fragment<T, SIZE>& sum, const Fragment<T, N>& p, const T* b, int width, bool split,
                               float*) {
  constexpr int kStride = TileOf<T, SIZE>::kStride;
  const T* b_at = b + lane() % 16 * kStride + lane() / 16 * 8;
#pragma unroll
  for (int k = 0; k < N / 16; k++) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float first = p.at[i % 2][4 * k + i / 2 * 2], second = p.at[i % 2][4 * k + i / 2 * 2 + 1];
      high[i] = packed<T>(first, second);
      low[i] = packed<T>(first - to_float(from_float<T>(first)), second - to_float(from_float<T>(second)));
    }
#pragma unroll
    for (int j = 0; j < SIZE / 16; j++) {
      if (16 * j >= width) break;
      uint32_t b_part[4];
      ldmatrix_x4_transposed(b_part, b_at + 16 * k * kStride + 16 * j);
      mma_at(sum, 2 * j, high, b_part[0], b_part[1]);
      mma_at(sum, 2 * j + 1, high, b_part[2], b_part[3]);
      if (split) {
        mma_at(sum, 2 * j, low, b_part[0], b_part[1]);
        mma_at(sum, 2 * j + 1, low, b_part[2], b_part[3]);
      }
    }
  }
}
template <int SIZE, int N>
DLKERN_DEVICE void add_product(Fragment<float, SIZE>& sum, const Fragment<float, N>& p, const float* b, int width, bool,
                               float* scratch) {
  using Mine = Layout<float>;
  constexpr int kStride = TileOf<float, SIZE>::kStride, kScratch = Scratch<float, N>::kStride;
  float* const mine = scratch + warp() * 16 * kScratch;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < p.kRows; r++) {
#pragma unroll
    for (int c = 0; c < p.kColumns; c++) mine[Mine::row(r) * kScratch + Mine::column(c)] = p.at[r][c];
  }
  __syncwarp();
#pragma unroll
  for (int run = 0; run < SIZE / 32; run++) {
    if (32 * run >= width) break;
#pragma unroll 1
    for (int k = 0; k < N; k += 8) {
      float chain[Mine::kRows][4] = {};
#pragma unroll
      for (int half = 0; half < 8; half += 4) {
        Pack<float, 4> p_part[Mine::kRows];
#pragma unroll
        for (int r = 0; r < Mine::kRows; r++)
          p_part[r] = load_pack<float, 4>(mine + Mine::row(r) * kScratch + k + half);
#pragma unroll
        for (int v = 0; v < 4; v++) {
          const auto b_part = load_pack<float, 4>(b + (k + half + v) * kStride + Mine::result_column(4 * run));
#pragma unroll
          for (int r = 0; r < Mine::kRows; r++) {
#pragma unroll
            for (int e = 0; e < 4; e++) chain[r][e] = fmaf(p_part[r].at[v], b_part.at[e], chain[r][e]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < Mine::kRows; r++) {
#pragma unroll
        for (int e = 0; e < 4; e++) sum.at[r][4 * run + e] += chain[r][e];
      }
    }
  }
}

// The scale becomes the power of two that `highest` is, without its fraction; returns the reciprocal.
DLKERN_DEVICE float set_scale(float& scale, float highest) {
  highest = fminf(highest, 0x1p100f);
  uint32_t exponent;
  memcpy(&exponent, &highest, 4);
  exponent &= 0x7f800000u;
  const uint32_t opposite = 0x7f000000u - exponent;
  float inverse;
  memcpy(&inverse, &opposite, 4);
  memcpy(&scale, &exponent, 4);
  return inverse;
}

// A scale for each row of results, by which gradients of probabilities become a float16 operand: of a scaled loss they
// may be beyond 65504, of a mean over many below its smallest number. Powers of two, so that nothing is rounded; the
// other types need none.
template <class T>
struct RowScale {
  static constexpr int kRows = Layout<T>::kRows;
  float size[kRows];

  DLKERN_DEVICE RowScale() {
#pragma unroll
    for (int r = 0; r < kRows; r++) size[r] = 0x1p-100f;
  }

  // Divides p by its rows' scales, after which no element exceeds 2, and brings the sums of what was before along.
  template <int N, int SIZE>
  DLKERN_DEVICE void fit(Fragment<T, N>& p, Fragment<T, SIZE>& sum) {
    if constexpr (std::is_same_v<T, fp16>) {
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        float highest = size[r];
#pragma unroll
        for (int c = 0; c < p.kColumns; c++) highest = fmaxf(highest, fabsf(p.at[r][c]));
        const float before = size[r], inverse = set_scale(size[r], row_max<T>(highest)), shrink = before * inverse;
#pragma unroll
        for (int c = 0; c < p.kColumns; c++) p.at[r][c] *= inverse;
#pragma unroll
        for (int c = 0; c < sum.kColumns; c++) sum.at[r][c] *= shrink;
      }
    }
  }
  template <int SIZE>
  DLKERN_DEVICE void undo(Fragment<T, SIZE>& sum) const {
    if constexpr (std::is_same_v<T, fp16>) sum.each([&](int r, int, float& value) { value *= size[r]; });
  }
};

// Stores a warp's rows from `first` on of a matrix of `rows` rows, its `columns` columns from `column` on.
template <class OUT, int SIZE, class T>
DLKERN_DEVICE void store_rows(OUT* to, int64_t row_stride, Fragment<T, SIZE>& sum, int first, int rows, int column,
                              int columns) {
  using Mine = Layout<T>;
  constexpr int kRun = Mine::kRun;
#pragma unroll
  for (int r = 0; r < sum.kRows; r++) {
    const int row = first + Mine::row(r);
    if (row >= rows) continue;
#pragma unroll
    for (int c = 0; c < sum.kColumns; c += kRun) {
      const int at = column + Mine::result_column(c);
      if (at >= columns) continue;
      Pack<OUT, kRun> run;
#pragma unroll
      for (int e = 0; e < kRun; e++) run.at[e] = from_float<OUT>(sum.at[r][c + e]);
      if (columns % kRun == 0) {
        store_pack(to + row * row_stride + at, run);
      } else {
#pragma unroll
        for (int e = 0; e < kRun; e++) {
          if (at + e < columns) to[row * row_stride + at + e] = run.at[e];
        }
      }
    }
  }
}

// ---- Scores ----

// s += the sum over `depth` columns of a function of an element of `a` and one of `b`: -(a - b)^2 / 2, or
// weight tanh(a + b), weight from `column` on.
template <int SIZE, class T, int N>
DLKERN_DEVICE void add_pairwise(Fragment<T, N>& s, const Args& x, const T* a, const T* b, int column, int depth) {
  using Mine = Layout<T>;
  constexpr int kStride = TileOf<T, SIZE>::kStride;
  Fragment<T, N> lost;  // what rounding took from the sums, which are exponents (Kahan 1965)
#pragma unroll 1
  for (int d = 0; d < depth; d += 4) {
    float weight[4];
    Pack<T, 4> a_part[Mine::kRows];
#pragma unroll
    for (int v = 0; v < 4; v++)
      weight[v] =
          x.score == kAdditiveScore && d + v < depth ? number_at<T>(x.weight, x.wide_weight, column + d + v) : 0;
#pragma unroll
    for (int r = 0; r < Mine::kRows; r++) a_part[r] = load_pack<T, 4>(a + Mine::row(r) * kStride + d);
#pragma unroll
    for (int c = 0; c < s.kColumns; c++) {
      const auto b_part = load_pack<T, 4>(b + Mine::column(c) * kStride + d);
#pragma unroll
      for (int r = 0; r < Mine::kRows; r++) {
        float sum = 0.0f;
#pragma unroll
        for (int v = 0; v < 4; v++) {
          const float p = to_float(a_part[r].at[v]), q = to_float(b_part.at[v]);
          if (x.score == kAdditiveScore)
            sum = fmaf(weight[v], tanhf(p + q), sum);
          else
            sum = fmaf(-0.5f * (p - q), p - q, sum);
        }
        sum -= lost.at[r][c];
        const float next = s.at[r][c] + sum;
        lost.at[r][c] = (next - s.at[r][c]) - sum;
        s.at[r][c] = next;
      }
    }
  }
}

template <bool PAIRWISE, int SIZE, class T, int N>
DLKERN_DEVICE void add_scores(Fragment<T, N>& s, const Args& x, const T* a, const T* b, int column, int depth) {
  if constexpr (PAIRWISE)
    add_pairwise<SIZE>(s, x, a, b, column, depth);
  else
    add_row_products<SIZE>(s, a, b, depth);
}

// A side of a product: rows of one head that pass through a tile.
template <class T>
struct Side {
  const T* head;
  const Operand& operand;
  T* tile;
  int first, rows;

  template <int ROWS, int SIZE>
  DLKERN_DEVICE void load(int column, int depth) const {
    load_rows<T, ROWS, SIZE>(tile, head, operand, first, rows, column, depth);
  }
};

// Starts loading the first block of a side that is queries or keys, which have rotary positions or not.
template <int ROWS, int SIZE, class T>
DLKERN_DEVICE void load_side(const Args& x, int64_t, const Side<T>& side) {
  side.template load<ROWS, SIZE>(0, x.depth);
}

// The pairs pass through registers, VEC of them at a time; what is behind them is copied as ever.
template <int VEC, int ROWS, int SIZE, class T>
DLKERN_DEVICE void turn_side(const RotaryArgs& x, int64_t b, const Side<T>& side) {
  constexpr int kStride = TileOf<T, SIZE>::kStride, kAcross = SIZE / 2 / VEC;
  static_assert(ROWS * kAcross % kThreads == 0);
#pragma unroll 2
  for (int i = 0; i < ROWS * kAcross / kThreads; i++) {
    const int chunk = static_cast<int>(threadIdx.x) + i * kThreads;
    const int r = chunk / kAcross, d = chunk % kAcross * VEC, row = side.first + r;
    if (d >= x.half) continue;
    const int first = x.neighbours ? 2 * d : d, second = x.neighbours ? first + VEC : x.half + d;
    T* const to = side.tile + r * kStride;
    if (row < side.rows) {
      const T* at = side.head + row * side.operand.stride[2];
      const int64_t step = side.operand.stride[3];
      x.turn<VEC, T>(b, row, d, false, at + first * step, at + second * step, to + first, to + second);
    } else {
      const float zeros[VEC] = {};
      store_floats<VEC>(to + first, zeros);
      store_floats<VEC>(to + second, zeros);
    }
  }
}
template <int ROWS, int SIZE, class T>
DLKERN_DEVICE void load_side(const RotaryArgs& x, int64_t b, const Side<T>& side) {
  load_rows<T, ROWS, SIZE, true>(side.tile, side.head, side.operand, side.first, side.rows, 0, x.depth, 2 * x.half);
  if (x.packed && side.operand.aligned)
    turn_side<TileOf<T, SIZE>::kPiece, ROWS, SIZE>(x, b, side);
  else
    turn_side<1, ROWS, SIZE>(x, b, side);
}

// The gradient of a warp's rows, queries or keys from position `first` on, becomes that of what was loaded. It passes
// through `memory`, kTileRows rows of SIZE + 4 floats, which nobody else uses by now.
template <int SIZE, class T>
DLKERN_DEVICE void turn_back(Fragment<T, SIZE>& sum, const RotaryArgs& x, int64_t b, int first, int rows,
                             float* memory) {
  using Mine = Layout<T>;
  constexpr int kStride = SIZE + 4;
  float* const mine = memory + warp() * 16 * kStride;
  const auto place = [&](int r, int c) { return mine + Mine::row(r) * kStride + Mine::result_column(c); };
  sum.each([&](int r, int c, float value) { *place(r, c) = value; });
  __syncwarp();
#pragma unroll 1
  for (int d = lane(); d < x.half; d += 32) {
    float* const p = mine + (x.neighbours ? 2 * d : d);
    float* const q = mine + (x.neighbours ? 2 * d + 1 : x.half + d);
#pragma unroll 4
    for (int r = 0; r < 16; r++) {
      const int at = r * kStride;
      if (first + r < rows) x.turn<1, T>(b, first + r, d, true, p + at, q + at, p + at, q + at);
    }
  }
  __syncwarp();
  sum.each([&](int r, int c, float& value) { value = *place(r, c); });
}

// s += the scores of `a` (64 rows, 16 a warp) and `b` (N rows) over the whole depth. Where it is more than SIZE, its
// blocks pass through both tiles, and block `own` is left there; else the caller has loaded them. Always in the same
// order: probabilities that are made again must be those that were summed up. WHOLE: the depth is known not to be more.
template <bool PAIRWISE, int SIZE, bool WHOLE = false, class T, int N>
DLKERN_DEVICE void multiply(Fragment<T, N>& s, const Args& x, const Side<T>& a, const Side<T>& b, int depth, int own) {
  const T* const rows = a.tile + warp() * 16 * TileOf<T, SIZE>::kStride;
  if (WHOLE || depth <= SIZE) return add_scores<PAIRWISE, SIZE>(s, x, rows, b.tile, 0, depth);
  const int blocks = static_cast<int>(ceil_div(depth, SIZE));
#pragma unroll 1
  for (int n = 0; n < blocks + (own + 1 < blocks); n++) {
    const int column = (n < blocks ? n : own) * SIZE;
    __syncthreads();  // everybody is done with what is loaded over
    a.template load<kTileRows, SIZE>(column, depth);
    b.template load<N, SIZE>(column, depth);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (n < blocks) add_scores<PAIRWISE, SIZE>(s, x, rows, b.tile, column, min(SIZE, depth - column));
  }
}

// Where the elements of a tile are: queries down and keys across, or keys down and queries across.
template <class T, bool KEYS_DOWN>
struct Places {
  int row, column;  // of the warp's first row, of the tile's first column
  DLKERN_DEVICE int query(int r, int c) const {
    return KEYS_DOWN ? column + Layout<T>::column(c) : row + Layout<T>::row(r);
  }
  DLKERN_DEVICE int key(int r, int c) const {
    return KEYS_DOWN ? row + Layout<T>::row(r) : column + Layout<T>::column(c);
  }
};

// Scale, cap, slopes and masks; of tiles that are not `whole` also what position hides. `cap` becomes the derivative of
// the cap, where there is one.
template <bool KEYS_DOWN, class T, int N, class A>
DLKERN_DEVICE void finish_scores(Fragment<T, N>& s, float (*cap)[Fragment<T, N>::kColumns], const A& x, int64_t b,
                                 int h, const Places<T, KEYS_DOWN>& at, bool whole) {
  if (x.plain) {
    s.each([&](int, int, float& value) { value *= x.scale; });
  } else {
    const int64_t head = b * x.heads + h, key_head = b * x.key_heads + h / x.group;
    const float slope = x.slopes ? number_at<T>(x.slopes, x.wide_slopes, h) : 0.0f;
    const int64_t mask_head = b * x.mask_at.stride[0] + h * x.mask_at.stride[1];
    s.each([&](int r, int c, float& value) {
      const int i = at.query(r, c), j = at.key(r, c);
      const bool inside = i < x.queries && j < x.keys;
      if (x.score == kCosineScore)
        value *= inside ? x.query_unit[head * x.queries + i] * x.key_unit[key_head * x.keys + j] : 0.0f;
      value *= x.scale;
      if (x.softcap != 0.0f) {
        const float t = tanhf(value / x.softcap);
        value = t * x.softcap;
        if (cap) cap[r][c] = 1.0f - t * t;
      }
      if (x.slopes) value -= slope * fabsf(static_cast<float>(i - j));
      if (x.mask != kNoMask && inside) {
        const int64_t place = mask_head + i * x.mask_at.stride[2] + j * x.mask_at.stride[3];
        if (x.mask == kBoolMask) {
          if (!static_cast<const uint8_t*>(x.mask_at.data)[place]) value = minus_infinity();
        } else {
          value += number_at<T>(x.mask_at.data, x.mask == kFloatMask, place);
        }
      }
    });
  }
  if (whole) return;
  if constexpr (KEYS_DOWN) {
#pragma unroll
    for (int c = 0; c < s.kColumns; c++) {
      const Span span = span_of(x, b, at.query(0, c));
#pragma unroll
      for (int r = 0; r < s.kRows; r++) {
        if (at.key(r, c) < span.begin || at.key(r, c) >= span.end) s.at[r][c] = minus_infinity();
      }
    }
  } else {
#pragma unroll
    for (int r = 0; r < s.kRows; r++) {
      const Span span = span_of(x, b, at.query(r, 0));
#pragma unroll
      for (int c = 0; c < s.kColumns; c++) {
        if (at.key(r, c) < span.begin || at.key(r, c) >= span.end) s.at[r][c] = minus_infinity();
      }
    }
  }
}

// e^(score - largest).
DLKERN_DEVICE float exponential(float score, float largest) { return exp2f((score - largest) * kLog2E); }

DLKERN_DEVICE uint32_t word_of(const philox::Block& block, int which) {
  const uint32_t low = which % 2 ? block.word[1] : block.word[0], high = which % 2 ? block.word[3] : block.word[2];
  return which / 2 ? high : low;
}

// A bit an element of a tile, r * kColumns + c: whether dropout keeps it. Key j of row n of all [batch, heads, queries]
// has word j % 64 / 16 of the block of counter (n * ceil(keys / 64) + j / 64) * 16 + j % 16.
template <class T, int N, bool KEYS_DOWN, class A>
DLKERN_DEVICE uint32_t kept_bits(const A& x, int64_t head, const Places<T, KEYS_DOWN>& at) {
  using Mine = Layout<T>;
  constexpr int kColumns = Fragment<T, N>::kColumns;
  static_assert(Mine::kRows * kColumns <= 32);
  const uint64_t seed = seed_of(x);
  const int64_t groups = ceil_div(x.keys, 64);
  const auto block_of = [&](int i, int j) {
    return philox::block(seed, static_cast<uint64_t>(((head * x.queries + i) * groups + j / 64) * 16 + j % 16));
  };
  uint32_t bits = 0;
#pragma unroll 1  // few blocks at once: they would take registers from the sums
  for (int r = 0; r < Mine::kRows; r++) {
    if constexpr (KEYS_DOWN) {
#pragma unroll 1
      for (int c = 0; c < kColumns; c++) {
        const int j = at.key(r, c);
        if (word_of(block_of(at.query(r, c), j), j % 64 / 16) >= x.threshold) bits |= 1u << (r * kColumns + c);
      }
    } else {  // a block serves four keys, 16 apart
#pragma unroll 1
      for (int c = 0; c < Mine::kEvery16; c++) {
        const int j = at.key(r, c);
        const philox::Block block = block_of(at.query(r, c), j);
#pragma unroll
        for (int further = 0; further < N / 16; further++) {
          const uint32_t word = word_of(block, (N == 64 ? 0 : j % 64 / 16) + further);
          if (word >= x.threshold) bits |= 1u << (r * kColumns + c + further * Mine::kEvery16);
        }
      }
    }
  }
  return bits;
}

// ---- Sequences that lie one after another ----

template <class T>
DLKERN_DEVICE Operand from_row(Operand x, int64_t row) {
  x.data = static_cast<const T*>(x.data) + row * x.stride[2];
  return x;
}

// The arguments of a call, as those of one sequence alone.
template <class T>
DLKERN_DEVICE SequenceArgs of_sequence(const Args& all, const AttentionTile& tile) {
  SequenceArgs x{all, tile.sequence, tile.keys - tile.queries};
  // Constants here, so that the compiler leaves out what nobody asks for.
  x.score = kDotScore, x.mask = kNoMask, x.plain = x.softcap == 0.0f;
  x.lengths = nullptr, x.slopes = nullptr;
  x.queries = tile.queries, x.keys = tile.keys;
  x.query = from_row<T>(x.query, tile.first_query);
  x.key = from_row<T>(x.key, tile.first_key), x.value = from_row<T>(x.value, tile.first_key);
  const int64_t before = static_cast<int64_t>(x.heads) * tile.first_query;
  x.largest += before, x.inverse += before;
  return x;
}

// ---- Launching ----

Args arguments_of(const Attention& attention);
RotaryArgs rotary_arguments_of(const Attention& attention);
Operand operand_of(const AttentionOperand& x, int64_t depth, Element element);
void make_units(const Attention& attention, const Args& x, void* stream);  // of the cosine score alone

// Of a block's columns. The backward of float32 with the most wants so much shared memory, which not all GPUs give a
// block; the forward goes with it, so that both make scores of the same blocks.
constexpr int kWideFloatBytes = 123 * 1024;
inline int most_columns(Element element) {
  return is_16_bit(element) || most_shared_bytes() >= kWideFloatBytes ? kMostColumns : 64;
}

// Calls f(type, size) with T and SIZE as values that carry them in their types; dispatch also has PAIRWISE.
template <class F>
void dispatch_dot(const Attention& a, F&& f) {
  with_type(a.element, [&](auto* type) {
    if ((a.depth <= 64 && a.value_depth <= 64) || most_columns(a.element) == 64)
      f(type, std::integral_constant<int, 64>{});
    else
      f(type, std::integral_constant<int, kMostColumns>{});
  });
}
template <class F>
void dispatch(const Attention& a, F&& f) {
  dispatch_dot(a, [&](auto* type, auto size) {
    if (a.score == kGaussianScore || a.score == kAdditiveScore)
      f(type, size, std::true_type{});
    else
      f(type, size, std::false_type{});
  });
}

inline unsigned blocks_of(int64_t depth, int size) {
  return depth <= size ? 1u : static_cast<unsigned>(ceil_div(depth, size));
}

}  // namespace attention
}  // namespace dlkern::cuda

// General matrix product, C = A B or C += A B, with a function applied to C's elements on their way out. Everything
// that multiplies matrices in the CPU column stands on it.
//
// BLIS's plan: blocks of KC along k and NC along n; B is packed into panels of NR columns, zero-padded, each just before
// it is first used, and one micro-kernel holds an MR x NR tile of C in registers, one broadcast of A and NV vectors of B
// a step. While a panel is multiplied, the memory of the next is fetched. Short A, where packing B would not pay, has
// ways of its own: where rows of A and columns of B lie along k, dot products or, from some rows on, the product turned
// round, so that A is what is packed; B in place where its rows lie along n. Which way is taken, and the cuts of k,
// depend on the whole problem, and threads split C, never k: the bits do not depend on the number of threads. Floor:
// 2 M N K over the FMA peak.
//
// gemm() uses all threads; gemm_block() only the calling one, for use inside a parallel region.
#pragma once
#include "parallel.h"
#include "scratch.h"
#include "simd.h"
#include "tiles.h"

namespace dlkern::cpu::DLKERN_ISA {

// A[i, p] = a[i * a_row + p * a_column], B[p, j] = b[p * b_row + j * b_column], C[i, j] = c[i * c_row + j]; bias[j], if
// there is one, is added to column j after the last k.
template <class T, class C = T> struct Gemm {
  int64_t m, n, k;
  const T* a;
  int64_t a_row, a_column;
  const T* b;
  int64_t b_row, b_column;
  C* c;
  int64_t c_row;
  bool accumulate = false;
  const C* bias = nullptr;
};

// An epilogue maps a vector of C, row i, columns j .. j + lanes - 1 (`count` of them valid), after the last k and the bias.
struct NoEpilogue {
  template <class V> V operator()(V value, int64_t, int64_t, int) const { return value; }
};

namespace gemm_detail {

constexpr int kMR = 6;
constexpr int kNV = kVectorBytes == 64 ? 4 : 2;  // 32 vector registers, or 16
template <class T> constexpr int kNR = kNV * kLanes<T>;
constexpr int64_t kKC = 256;
// More products than this are summed in two halves, which bounds the rounding error.
constexpr int64_t kSum = 64;
// Up to kOnceM rows of A are packed at once, and a panel of B, which no other block of rows needs, does not stay; of more,
// kMC at a time: packed rows, a panel and the columns of B that wait for the next rows share the second-level cache. CPUs
// without AVX-512 have ones of 256 or 512 KB.
template <class T> constexpr int64_t kOnceM =
    (kVectorBytes == 64 ? 48 : 16) * kMR * 4 / static_cast<int64_t>(sizeof(T));
template <class T> constexpr int64_t kMC = (kVectorBytes == 64 ? 24 : 16) * kMR * 4 / static_cast<int64_t>(sizeof(T));
// Columns of B at a time, for each of which rows of A are packed anew; fewer where the sums of all rows are kept.
template <class T> constexpr int64_t kNC = 1024 * 4 / static_cast<int64_t>(sizeof(T));
template <class T> constexpr int64_t kSummedNC = 384 * 4 / static_cast<int64_t>(sizeof(T));
constexpr int64_t kAheadSteps = 16;  // of k between two groups of prefetches
constexpr int64_t kLine = 64;
constexpr int64_t kCaches = 30'000'000;  // bytes of C that leave the caches anyway
// B is read where it is, a few rows at a time, when A has so few rows that packing would cost more than it saves.
constexpr int64_t kInPlaceM = 24, kInPlaceKC = 32;
// Blocks of k where the product is small or narrow: libraries take inner products there, whose sums are short.
constexpr int64_t kShortKC = 8, kSmallWork = 262144, kNarrowN = 12;

// Most rows of A that are packed instead of a wider B, and sums of C kept while they are.
constexpr int64_t kTurnedM = 128;
template <class P> constexpr int64_t kTurnedSums = 393216 / static_cast<int64_t>(sizeof(P));

// What the multiplications of one panel ask memory for meanwhile: the panel that is packed next, as it lies in B. Every
// kAheadSteps steps a group of `lines` cache lines is due, 2^shift of them side by side in rows `row` bytes apart; the
// tiles of the panel take shares, first .. last, of each group.
struct Ahead {
  const char* at = nullptr;
  int64_t group = 0, row = 0, lines = 0, first = 0, last = 0;
  int shift = 0;
  Ahead() = default;
  template <class T> Ahead(const T* b, int64_t b_row, int64_t b_column, int64_t width) {
    const int64_t size = sizeof(T);
    if (b_row != 1 && b_column != 1) return;
    at = reinterpret_cast<const char*>(b);
    if (b_row == 1) {
      group = kAheadSteps * size;
      row = b_column * size;
      lines = width;
    } else {
      while ((kLine << (shift + 1)) <= width * size) ++shift;
      row = b_row * size;
      group = kAheadSteps * row;
      lines = kAheadSteps << shift;
    }
  }
  void share(int64_t tile, int64_t tiles) {
    first = lines * tile / tiles;
    last = lines * (tile + 1) / tiles;
  }
  [[gnu::always_inline]] void fetch(int64_t step) const {
    const char* from = at + step / kAheadSteps * group;
    for (int64_t i = first; i < last; ++i)
      __builtin_prefetch(from + (i >> shift) * row + (i & ((int64_t{1} << shift) - 1)) * kLine);
  }
};

// How a tile's sums reach C: added, stored, or stored past the caches.
enum class Out { add, set, past };

// tile[ROWS, NV vectors] (+)= A[ROWS, k] B[k, NV vectors] (+ bias); rows of B are b_row apart, rows of the tile tile_row.
template <int ROWS, int NV, class T>
[[gnu::always_inline]] inline void micro_kernel(int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b,
                                                int64_t b_row, T* tile, int64_t tile_row, const T* bias, Out out,
                                                const Ahead& ahead) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  V sum[ROWS][NV] = {};
  if (out != Out::past)
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) __builtin_prefetch(tile + i * tile_row + j * lanes, 1);
  const auto add_steps = [&](int64_t begin, int64_t stop) __attribute__((always_inline)) {
    for (int64_t start = begin; start < stop; start += kAheadSteps) {
      ahead.fetch(start);
      const int64_t end = smaller(start + kAheadSteps, stop);
      for (int64_t p = start; p < end; ++p) {
        V bv[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) bv[j] = load(b + j * lanes);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
          const V av = broadcast<T>(a[i * a_row]);
#pragma GCC unroll 8
          for (int j = 0; j < NV; ++j) sum[i][j] += av * bv[j];
        }
        a += a_column;
        b += b_row;
      }
    }
  };
  const int64_t half = k > kSum ? ceil_div(k, 2) : k;
  add_steps(0, half);
  if (half < k) {
    V before[ROWS][NV];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) before[i][j] = sum[i][j], sum[i][j] = V{};
    add_steps(half, k);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sum[i][j] += before[i][j];
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      T* to = tile + i * tile_row + j * lanes;
      V value = out == Out::add ? load(to) + sum[i][j] : sum[i][j];
      if (bias) value += load(bias + j * lanes);
      if (out == Out::past)
        stream(to, value);
      else
        store(to, value);
    }
}

template <class T>
using Kernel = void (*)(int64_t, const T*, int64_t, int64_t, const T*, int64_t, T*, int64_t, const T*, Out,
                        const Ahead&);

template <int ROWS, int NV, class T>
void kernel(int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_row, T* tile,
            int64_t tile_row, const T* bias, Out out, const Ahead& ahead) {
  micro_kernel<ROWS, NV, T>(k, a, a_row, a_column, b, b_row, tile, tile_row, bias, out, ahead);
}

// The kernel for a tile of rows x vectors.
template <class T> Kernel<T> kernel_for(int rows, int vectors) {
#define DLKERN_ROW(r) \
  { kernel<r, 1, T>, kernel<r, 2, T>, kernel < r, kNV<3 ? 2 : 3, T>, kernel<r, kNV, T> }
  static constexpr Kernel<T> table[kMR][4] = {DLKERN_ROW(1), DLKERN_ROW(2), DLKERN_ROW(3),
                                              DLKERN_ROW(4), DLKERN_ROW(5), DLKERN_ROW(6)};
#undef DLKERN_ROW
  return table[rows - 1][vectors == kNV ? 3 : vectors - 1];
}

// B[k, n] into panels of NR columns: panel j holds rows p at panel + p * NR, zero beyond column n.
template <class T, class P>
void pack_b(int64_t k, int64_t n, const T* b, int64_t b_row, int64_t b_column, P* packed) {
  constexpr int64_t width = kNR<P>, lanes = kLanes<P>;
  for (int64_t j = 0; j < n; j += width, packed += k * width) {
    const int64_t columns = smaller(width, n - j);
    const T* from = b + j * b_column;
    if (b_column == 1) {
      for (int64_t p = 0; p < k; ++p)
        for (int64_t v = 0; v < width; v += lanes) {
          const T* row = from + p * b_row + v;
          Vec<P> value{};
          if (v + lanes <= columns)
            value = load(row);
          else if (v < columns)
            value = load_partial<T>(row, static_cast<int>(columns - v));
          store(packed + p * width + v, value);
        }
    } else if (b_row == 1) {
      // lanes x lanes squares, transposed in registers.
      for (int64_t v = 0; v < width; v += lanes)
        for (int64_t p = 0; p < k; p += lanes) {
          Vec<P> square[lanes];
          const int64_t steps = smaller(lanes, k - p);
          for (int64_t c = 0; c < lanes; ++c) {
            const T* column = from + (v + c) * b_column + p;
            square[c] = v + c >= columns ? Vec<P>{}
                        : steps == lanes ? load(column)
                                         : load_partial<T>(column, static_cast<int>(steps));
          }
          transpose(square);
          for (int64_t step = 0; step < steps; ++step) store(packed + (p + step) * width + v, square[step]);
        }
    } else {
      for (int64_t p = 0; p < k; ++p) {
        for (int64_t c = 0; c < columns; ++c) packed[p * width + c] = static_cast<P>(from[p * b_row + c * b_column]);
        for (int64_t c = columns; c < width; ++c) packed[p * width + c] = P(0);
      }
    }
  }
}

// rows x columns values, side by side along columns, into a dense block. Rows are too short for the
// processor to foresee the next one.
template <class T, class P>
inline void copy_rows(int64_t rows, int64_t columns, const T* from, int64_t row_stride, P* to) {
  constexpr int64_t lanes = kLanes<P>;
  for (int64_t i = 0; i < rows; ++i, from += row_stride, to += columns) {
    int64_t j = 0;
    const T* next = from + (i + 2 < rows ? 2 * row_stride : 0);
    for (; j + lanes <= columns; j += lanes) {
      __builtin_prefetch(next + j);
      store(to + j, load(from + j));
    }
    for (; j < columns; ++j) to[j] = static_cast<P>(from[j]);
  }
}

// A block of A made dense in the type sums are carried in. Rows a power of two apart, as weights' and activations' often
// are, fight for the same few sets of a cache; a dense block does not. Where rows lie along k they stay rows; where columns
// do not, the steps of kMR rows lie side by side. `tile` is from a row to the next one's tile.
template <class P> struct Block {
  const P* a;
  int64_t row, column, tile;
};
template <class T, class P>
inline Block<P> pack_a(int64_t m, int64_t k, const T* a, int64_t a_row, int64_t a_column, P* packed) {
  if (a_column == 1) {
    copy_rows(m, k, a, a_row, packed);
    return {packed, k, 1, k};
  }
  // Whole vectors, of which the next step's cover what is too much, but for the last ones'. A few steps at a time: their
  // lines, of which a tile takes a part, may all belong to one set of the cache.
  constexpr int64_t lanes = kLanes<P>, whole = ceil_div(kMR, lanes) * lanes, steps = 8;
  const int64_t covered = k + 1 - ceil_div(whole, kMR);
  for (int64_t p0 = 0; p0 < k; p0 += steps)
    for (int64_t i = 0; i < m; i += kMR) {
      const T* from = a + i * a_row;
      P* to = packed + i * k;
      const int64_t rows = smaller(kMR, m - i), end = smaller(p0 + steps, k);
      int64_t p = p0;
      if (a_row == 1 && i + whole <= m)
        for (; p < smaller(end, covered); ++p)
          for (int64_t v = 0; v < kMR; v += lanes) store(to + p * kMR + v, load(from + p * a_column + v));
      for (; p < end; ++p)
        for (int64_t r = 0; r < rows; ++r) to[p * kMR + r] = static_cast<P>(from[p * a_column + r * a_row]);
    }
  return {packed, 1, kMR, k};
}

// A finished tile into C: C (+)= tile, then the epilogue where this is the last block of k.
template <class P, class C, class Epilogue>
inline void finish(const P* tile, int64_t tile_row, int rows, int64_t columns, C* c, int64_t c_row, bool add, bool last,
                   const Epilogue& epilogue, int64_t i0, int64_t j0) {
  constexpr int lanes = kLanes<P>;
  for (int i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += lanes) {
      const int count = static_cast<int>(smaller(lanes, columns - j));
      C* out = c + i * c_row + j;
      Vec<P> value = load(tile + i * tile_row + j);
      if (add) value += count == lanes ? load(out) : load_partial<C>(out, count);
      if (last) value = epilogue(value, i0 + i, j0 + j, count);
      if (count == lanes)
        store(out, value);
      else
        store_partial<C>(out, value, count);
    }
}

// The bias, then the epilogue.
template <class C, class Epilogue> struct Finished {
  const C* bias;
  const Epilogue& epilogue;
  template <class V> V operator()(V value, int64_t i, int64_t j, int count) const {
    if (bias) value += count == kLanes<C> ? load(bias + j) : load_partial<C>(bias + j, count);
    return epilogue(value, i, j, count);
  }
};

template <class A, class B> struct same {
  static constexpr bool value = false;
};
template <class A> struct same<A, A> {
  static constexpr bool value = true;
};

// Where rows of A and columns of B both lie along k, as in a linear layer's forward, and A is short, nothing is
// packed: vectors run along k, a tile holds one sum a pair of row and column, and its lanes are added at the end.
constexpr int kDotRows = kNV == 4 ? 6 : 3;
constexpr int kDotColumns = 4;
constexpr int64_t kDotMaxM = 24, kDotMaxNarrowM = kVectorBytes == 64 ? 24 : 96,  // where C has kNarrowN columns at most
    kDotMinK = 4 * kVectorBytes / 4;  // adding lanes up must not weigh

// The lanes of four vectors added up: result lane l holds sum l of 4.
template <class V> [[gnu::always_inline]] inline V add_lanes(V v0, V v1, V v2, V v3) {
  constexpr int N = sizeof(V) / sizeof(v0[0]);
  using I = decltype(v0 > v0);
  I even, odd, low, high;
#pragma GCC unroll 16
  for (int l = 0; l < N; ++l) {
    even[l] = l % 2 ? N + l - 1 : l;
    odd[l] = l % 2 ? N + l : l + 1;
    low[l] = l % 4 < 2 ? l : N + l - 2;
    high[l] = l % 4 < 2 ? l + 2 : N + l;
  }
  const V s01 = __builtin_shuffle(v0, v1, even) + __builtin_shuffle(v0, v1, odd);
  const V s23 = __builtin_shuffle(v2, v3, even) + __builtin_shuffle(v2, v3, odd);
  return __builtin_shuffle(s01, s23, low) + __builtin_shuffle(s01, s23, high);
}

// out[i, 0..3] = sum_p A[i, p] B[p, j..j+3], over k steps; rows of A and columns of B are strides apart.
template <int ROWS, int COLUMNS, class T, class P>
[[gnu::always_inline]] inline void dot_tile(int64_t k, const T* a, int64_t a_row, const T* b, int64_t b_column, P* out,
                                            int64_t out_row) {
  using V = Vec<P>;
  constexpr int lanes = kLanes<P>;
  V sum[ROWS][COLUMNS] = {};
  int64_t p = 0;
  for (; p + lanes <= k; p += lanes) {
    V bv[COLUMNS];
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) bv[j] = load(b + j * b_column + p);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const V av = load(a + i * a_row + p);
#pragma GCC unroll 8
      for (int j = 0; j < COLUMNS; ++j) sum[i][j] += av * bv[j];
    }
  }
  if (p < k) {
    const int rest = static_cast<int>(k - p);
    V bv[COLUMNS];
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; ++j) bv[j] = load_partial<T>(b + j * b_column + p, rest);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const V av = load_partial<T>(a + i * a_row + p, rest);
#pragma GCC unroll 8
      for (int j = 0; j < COLUMNS; ++j) sum[i][j] += av * bv[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    V total =
        add_lanes(sum[i][0], sum[i][COLUMNS > 1 ? 1 : 0], sum[i][COLUMNS > 2 ? 2 : 0], sum[i][COLUMNS > 3 ? 3 : 0]);
    for (int j = 0; j < COLUMNS; ++j) {
      P value = total[j % lanes];
      for (int l = 4; l < lanes; l += 4) value += total[l + j];
      if (lanes < 4) value = reduce_add(sum[i][j]);
      out[i * out_row + j] = value;
    }
  }
}

template <class T, class P>
using DotKernel = void (*)(int64_t, const T*, int64_t, const T*, int64_t, P*, int64_t);
template <int ROWS, int COLUMNS, class T, class P>
void dot_kernel(int64_t k, const T* a, int64_t a_row, const T* b, int64_t b_column, P* out, int64_t out_row) {
  dot_tile<ROWS, COLUMNS, T, P>(k, a, a_row, b, b_column, out, out_row);
}
template <class T, class P> DotKernel<T, P> dot_kernel_for(int rows, int columns) {
#define DLKERN_ROW(r) \
  { dot_kernel<r, 1, T, P>, dot_kernel<r, 2, T, P>, dot_kernel<r, 3, T, P>, dot_kernel<r, 4, T, P> }
  constexpr int most = kDotRows;
  static constexpr DotKernel<T, P> table[6][4] = {DLKERN_ROW(1),
                                                  DLKERN_ROW(2),
                                                  DLKERN_ROW(3),
                                                  DLKERN_ROW((most < 4 ? 1 : 4)),
                                                  DLKERN_ROW((most < 5 ? 1 : 5)),
                                                  DLKERN_ROW((most < 6 ? 1 : 6))};
#undef DLKERN_ROW
  return table[rows - 1][columns - 1];
}

template <class T, class C, class Epilogue>
void run_dot(const Gemm<T, C>& g, const Epilogue& epilogue, int64_t i_begin, int64_t i_end, int64_t j_begin,
             int64_t j_end) {
  using P = acc_t<T>;
  constexpr int64_t group = 16;  // columns whose sums are finished together
  // A block of A stays in the second-level cache, 16 columns of B in the first.
  int64_t kc_max = 32768 / g.m / 64 * 64;
  if (kc_max < 256) kc_max = 256;
  const Finished<C, Epilogue> finished{g.bias, epilogue};
  const int64_t m = i_end - i_begin, n = j_end - j_begin;
  P* sums = same<C, P>::value || g.k <= kc_max ? nullptr : scratch<P>(Slot::gemm_c, m * n);
  P tile[kDotRows * group];
  for (int64_t pc = 0; pc == 0 || pc < g.k; pc += kc_max) {
    const int64_t kc = smaller(kc_max, g.k - pc);
    const bool first = pc == 0, last = pc + kc_max >= g.k;
    for (int64_t j = j_begin; j < j_end; j += group) {
      const int64_t columns = smaller(group, j_end - j);
      for (int64_t i = i_begin; i < i_end; i += kDotRows) {
        const int rows = static_cast<int>(smaller(kDotRows, i_end - i));
        for (int64_t c = 0; c < columns; c += kDotColumns) {
          const int some = static_cast<int>(smaller(kDotColumns, columns - c));
          dot_kernel_for<T, P>(rows, some)(kc, g.a + i * g.a_row + pc, g.a_row, g.b + (j + c) * g.b_column + pc,
                                           g.b_column, tile + c, group);
        }
        C* c_tile = g.c + i * g.c_row + j;
        if (!sums) {
          finish(tile, group, rows, columns, c_tile, g.c_row, g.accumulate || !first, last, finished, i, j);
          continue;
        }
        P* sum = sums + (i - i_begin) * n + (j - j_begin);
        finish(tile, group, rows, columns, sum, n, !first, false, NoEpilogue{}, i, j);
        if (last) finish(sum, n, rows, columns, c_tile, g.c_row, g.accumulate, true, finished, i, j);
      }
    }
  }
}

// Steps of a block of k, all blocks as even as can be.
template <class T, class C> int64_t steps_of_k(const Gemm<T, C>& g, int64_t most) {
  if (g.n <= kNarrowN || g.m * g.n * g.k < kSmallWork) most = kShortKC;
  return g.k <= most ? most : ceil_div(ceil_div(g.k, ceil_div(g.k, most)), kAheadSteps) * kAheadSteps;
}

// Whether C^T = B^T A^T is computed: a short A, whose rows lie along k as B's columns do, is packed and B is read where
// it is, once.
template <class T, class C> bool is_turned(const Gemm<T, C>& g) {
  return g.a_column == 1 && g.b_row == 1 && g.m <= kTurnedM && g.n > g.m && g.m * g.n * g.k >= kSmallWork;
}

// The sums of some columns of C stay in the cache, as C^T, and are transposed on their way out.
template <class T, class C, class Epilogue>
void run_turned(const Gemm<T, C>& g, const Epilogue& epilogue, int64_t i_begin, int64_t i_end, int64_t j_begin,
                int64_t j_end) {
  using P = acc_t<T>;
  constexpr int64_t width = kNR<P>, lanes = kLanes<P>;
  const Finished<C, Epilogue> finished{g.bias, epilogue};
  const int64_t m = i_end - i_begin, panels = ceil_div(m, width), pitch = panels * width;
  const int64_t kc_step = steps_of_k(g, kKC), nc_step = kTurnedSums<P> / pitch;
  P* packed_a = scratch<P>(Slot::gemm_b, kc_step * pitch);
  P* packed_b = same<T, P>::value ? nullptr : scratch<P>(Slot::gemm_a, kc_step * kMR);
  P* sums = scratch<P>(Slot::gemm_c, nc_step * pitch);
  for (int64_t jc = j_begin; jc < j_end; jc += nc_step) {
    const int64_t nc = smaller(nc_step, j_end - jc);
    for (int64_t pc = 0; pc == 0 || pc < g.k; pc += kc_step) {
      const int64_t kc = smaller(kc_step, g.k - pc);
      pack_b(kc, m, g.a + i_begin * g.a_row + pc, 1, g.a_row, packed_a);
      for (int64_t j = 0; j < nc; j += kMR) {
        const int rows = static_cast<int>(smaller(kMR, nc - j));
        const T* b = g.b + (jc + j) * g.b_column + pc;
        Block<P> block;
        if constexpr (same<T, P>::value)
          block = {b, g.b_column, 1, 0};
        else
          block = pack_a(rows, kc, b, g.b_column, 1, packed_b);
        Ahead ahead;
        if (j + kMR < nc)
          ahead = Ahead(b + kMR * g.b_column, 1, g.b_column, smaller(kMR, nc - j - kMR));
        else if (pc + kc < g.k)
          ahead = Ahead(b - j * g.b_column + kc, 1, g.b_column, smaller(kMR, nc));
        for (int64_t i = 0; i < m; i += width) {
          const int vectors = static_cast<int>(ceil_div(smaller(width, m - i), lanes));
          ahead.share(i / width, panels);
          kernel_for<P>(rows, vectors)(kc, block.a, block.row, block.column, packed_a + i * kc, width,
                                       sums + j * pitch + i, pitch, nullptr, pc == 0 ? Out::set : Out::add, ahead);
        }
      }
    }
    for (int64_t j = 0; j < nc; j += lanes)
      for (int64_t i = 0; i < m; i += lanes) {
        Vec<P> square[lanes];
        for (int64_t c = 0; c < lanes; ++c) square[c] = j + c < nc ? load(sums + (j + c) * pitch + i) : Vec<P>{};
        transpose(square);
        for (int64_t r = 0; r < smaller(lanes, m - i); ++r) {
          const int64_t row = i_begin + i + r, count = nc - j;
          C* out = g.c + row * g.c_row + jc + j;
          if (g.accumulate) square[r] += load_some(out, count);
          const int some = static_cast<int>(smaller(lanes, count));
          store_some(out, finished(square[r], row, jc + j, some), count);
        }
      }
  }
}

// Rows [i_begin, i_end) and columns [j_begin, j_end) of C, on this thread, by vectors.
template <class T, class C, class Epilogue>
void run_vectors(const Gemm<T, C>& g, const Epilogue& epilogue, int64_t i_begin, int64_t i_end, int64_t j_begin,
                 int64_t j_end) {
  const int64_t dot_m = g.n <= kNarrowN ? kDotMaxNarrowM : kDotMaxM;
  if (g.a_column == 1 && g.b_row == 1 && g.m <= dot_m && (g.k >= kDotMinK || g.m == 1)) {
    run_dot(g, epilogue, i_begin, i_end, j_begin, j_end);
    return;
  }
  if (is_turned(g)) {
    run_turned(g, epilogue, i_begin, i_end, j_begin, j_end);
    return;
  }
  using P = acc_t<T>;  // what is packed, multiplied and summed
  constexpr int64_t width = kNR<P>;
  constexpr bool c_is_sum = same<C, P>::value;  // C can hold sums between blocks of k
  constexpr bool same_type = same<T, P>::value;
  constexpr bool plain = same<Epilogue, NoEpilogue>::value;
  const Finished<C, Epilogue> finished{g.bias, epilogue};
  const int64_t m = i_end - i_begin;
  const bool once = m <= kOnceM<P>;  // each panel of B meets one block of rows
  const int64_t mc_max = once ? kOnceM<P> : kMC<P>;
  // Copies pay where they are read often enough. B in place is walked a few rows at a time.
  const bool b_in_place = same_type && g.b_column == 1 && g.m <= kInPlaceM;
  const int64_t kc_step = steps_of_k(g, b_in_place ? kInPlaceKC : kKC);
  const bool a_in_place = same_type && g.n <= 4 * width;
  alignas(64) P tile[kMR * width];
  const bool keeps_sums = !c_is_sum && g.k > kc_step;  // between blocks of k, where C's own type would round them
  const int64_t nc_step = keeps_sums && !once ? kSummedNC<P> : kNC<P>,
                nc_max = smaller(nc_step, ceil_div(j_end - j_begin, width) * width);
  // In place, a last panel that does not fill its vectors is packed all the same: they would reach past the end of B.
  P* packed_b = scratch<P>(Slot::gemm_b, kc_step * (once || b_in_place ? width : nc_max));
  P* packed_a = a_in_place ? nullptr : scratch<P>(Slot::gemm_a, kc_step * smaller(mc_max, ceil_div(m, kMR) * kMR));
  P* sums = keeps_sums ? scratch<P>(Slot::gemm_c, m * nc_max) : nullptr;
  // Results that leave the caches anyway, in whole vectors, need not enter them.
  const bool past = kStreams && c_is_sum && plain && g.k <= kc_step && !g.accumulate &&
                    g.m * g.n * static_cast<int64_t>(sizeof(C)) >= kCaches && g.c_row % kLanes<P> == 0 &&
                    reinterpret_cast<uintptr_t>(g.c) % kVectorBytes == 0;

  for (int64_t jc = j_begin; jc < j_end; jc += nc_step) {
    const int64_t nc = smaller(nc_step, j_end - jc);
    for (int64_t pc = 0; pc == 0 || pc < g.k; pc += kc_step) {
      const int64_t kc = smaller(kc_step, g.k - pc);
      const bool first = pc == 0, last = pc + kc_step >= g.k;
      const T* b = g.b + pc * g.b_row + jc * g.b_column;
      const int64_t in_place = !b_in_place      ? 0
                               : nc % kLanes<P> ? nc / width * width
                                                : nc;  // columns read where they are
      for (int64_t ic = i_begin; ic < i_end; ic += mc_max) {
        const int64_t mc = smaller(mc_max, i_end - ic), tiles = ceil_div(mc, kMR);
        const T* a = g.a + ic * g.a_row + pc * g.a_column;
        Block<P> block;
        if constexpr (same_type) block = {a, g.a_row, g.a_column, g.a_row};
        if (!a_in_place) block = pack_a(mc, kc, a, g.a_row, g.a_column, packed_a);
        for (int64_t j = 0; j < nc; j += width) {
          const int64_t columns = smaller(width, nc - j);
          const int vectors = static_cast<int>(ceil_div(columns, kLanes<P>));
          P* panel = once ? packed_b : packed_b + j * kc;
          const P* b_panel = panel;
          int64_t b_row = width;
          Ahead ahead;
          if constexpr (same_type)
            if (j < in_place) {
              b_panel = b + j;
              b_row = g.b_row;
            }
          if (j >= in_place && ic == i_begin) {
            pack_b(kc, columns, b + j * g.b_column, g.b_row, g.b_column, panel);
            if (j + width < nc)
              ahead = Ahead(b + (j + width) * g.b_column, g.b_row, g.b_column, width);
            else if (!last)
              ahead = Ahead(b + kc * g.b_row, g.b_row, g.b_column, width);
          }
          for (int64_t i = 0; i < mc; i += kMR) {
            const int rows = static_cast<int>(smaller(kMR, mc - i));
            const Kernel<P> multiply = kernel_for<P>(rows, vectors);
            const P* a_tile = block.a + i * block.tile;
            C* c_tile = g.c + (ic + i) * g.c_row + jc + j;
            ahead.share(i / kMR, tiles);
            if constexpr (c_is_sum) {
              const bool add = g.accumulate || !first;
              if ((plain || !last) && columns % kLanes<P> == 0) {
                multiply(kc, a_tile, block.row, block.column, b_panel, b_row, c_tile, g.c_row,
                         last && g.bias ? g.bias + jc + j : nullptr,
                         past  ? Out::past
                         : add ? Out::add
                               : Out::set,
                         ahead);
                continue;
              }
            }
            P* sum = sums ? sums + (ic - i_begin + i) * nc_max + j : tile;
            const int64_t sum_row = sums ? nc_max : width;
            const bool add_sums = sums && !first;
            if (last)  // while the tile is multiplied
              for (int r = 0; r < rows; ++r) __builtin_prefetch(c_tile + r * g.c_row, 1);
            multiply(kc, a_tile, block.row, block.column, b_panel, b_row, sum, sum_row, nullptr,
                     add_sums ? Out::add : Out::set, ahead);
            if (last || c_is_sum)
              finish(sum, sum_row, rows, columns, c_tile, g.c_row, c_is_sum ? g.accumulate || !first : g.accumulate,
                     last, finished, ic + i, jc + j);
          }
        }
      }
    }
  }
  if (past) fence();
}

// By tiles (tiles.h): C = L R where the left side's lines are A's rows and the right side's B's columns, or, turned, the
// other way round, whichever has fewer lines to lay out anew. The side with fewer lines is packed a block at a time, which
// stays in the second-level cache; strips of the other are packed into the first, each when it is multiplied.
constexpr int64_t kBlockLines = 512, kTileSums = 262144, kKeptBytes = 1 << 20;
template <class T> constexpr int64_t kTileKC = kParts<T> == 1 ? 1024 : kParts<T> == 2 ? 384 : 256;

// Whether tiles pay: float's parts are worth making where each is multiplied often enough.
template <class T, class C> bool is_tiled(const Gemm<T, C>& g) {
  constexpr int64_t work = kParts<T> == 1 ? 1 << 15 : kParts<T> == 2 ? 1 << 16 : 1 << 22;
  constexpr int64_t reuse = kParts<T> == 3 ? 80 : 4;
  return (g.a_row == 1 || g.a_column == 1) && (g.b_row == 1 || g.b_column == 1) && g.k >= kTile &&
         g.m * g.n >= reuse * (g.m + g.n) && g.m * g.n * g.k >= work && uses_tiles<T>();
}

#if DLKERN_TILE_CODE
template <class T, class C, class Epilogue>
void run_tiles(const Gemm<T, C>& g, const Epilogue& epilogue, int64_t i_begin, int64_t i_end, int64_t j_begin,
               int64_t j_end) {
  const Finished<C, Epilogue> finished{g.bias, epilogue};
  const Lines<T> rows{g.a, g.a_row, g.a_column}, columns{g.b, g.b_column, g.b_row};
  const bool turned =
      (g.a_column == 1 ? 0 : g.m) + (g.b_column == 1 ? 0 : g.n) > (g.b_row == 1 ? 0 : g.n) + (g.a_row == 1 ? 0 : g.m);
  const bool rows_kept = g.m <= g.n;
  const int64_t kept_begin = rows_kept ? i_begin : j_begin, kept_end = rows_kept ? i_end : j_end;
  const int64_t met_begin = rows_kept ? j_begin : i_begin, met_end = rows_kept ? j_end : i_end;
  const Lines<T>&kept = rows_kept ? rows : columns, &met = rows_kept ? columns : rows;
  const bool kept_left = rows_kept != turned;
  // Blocks of k are summed one by one: a sum's rounding errors grow with its length. Of the kept side, as many are there
  // at a time as fit where the other's lines lie along k, so that these are read in long runs.
  const int64_t blocks = ceil_div(g.k, kTileKC<T>), step = ceil_div(ceil_div(g.k, kTileStep), blocks) * kTileStep;
  const int64_t strip = strip_bytes<T>(step);
  const int64_t kept_step = smaller(kBlockLines, ceil_div(kept_end - kept_begin, kStrip) * kStrip),
                kept_count = kept_step / kStrip;
  const int64_t together = met.k == 1 ? larger(1, smaller(blocks, kKeptBytes / (kept_count * strip))) : 1;
  const bool once = together == blocks;
  const int64_t met_step = once ? met_end - met_begin : larger(kStrip, kTileSums / kept_step / kStrip * kStrip),
                met_count = once ? 1 : ceil_div(smaller(met_step, met_end - met_begin), kStrip);
  constexpr int64_t area = kStrip * kStrip;
  char* kept_strips = scratch<char>(Slot::tiles_a, together * kept_count * strip);
  char* met_strip = scratch<char>(Slot::tiles_b, strip);
  float* sums = scratch<float>(Slot::tiles_c, kept_count * met_count * area);
  alignas(64) float other[area];  // a block's sums before they are added, or finished ones turned
  const auto pack = [&](bool left, const Lines<T>& lines, int64_t line, int64_t count, int64_t block, char* to) {
    const int64_t k = block * step, some = smaller(step, g.k - k);
    const Lines<T> from{lines.at + line * lines.line + k * lines.k, lines.line, lines.k};
    if constexpr (same<T, bfloat16>::value)
      left ? pack_pairs<true>(from, count, some, to) : pack_pairs<false>(from, count, some, to);
    else
      left ? pack_strip<true>(from, count, some, to) : pack_strip<false>(from, count, some, to);
  };
  [[maybe_unused]] const Tiles tiles;
  for (int64_t kb = kept_begin; kb < kept_end; kb += kept_step)
    for (int64_t mb = met_begin; mb < met_end; mb += met_step)
      for (int64_t first = 0; first < blocks; first += together) {
        const int64_t kept_some = smaller(kept_step, kept_end - kb), met_some = smaller(met_step, met_end - mb),
                      end = smaller(first + together, blocks);
        if (!once || mb == met_begin)
          for (int64_t block = first; block < end; ++block)
            for (int64_t s = 0; s < kept_some; s += kStrip)
              pack(kept_left, kept, kb + s, smaller(kStrip, kept_some - s), block,
                   kept_strips + ((block - first) * kept_count + s / kStrip) * strip);
        for (int64_t m = 0; m < met_some; m += kStrip)
          for (int64_t block = first; block < end; ++block) {
            const int64_t met_lines = smaller(kStrip, met_some - m),
                          steps = ceil_div(smaller(step, g.k - block * step), kTileStep);
            pack(!kept_left, met, mb + m, met_lines, block, met_strip);
            for (int64_t s = 0; s < kept_some; s += kStrip) {
              const int64_t kept_lines = smaller(kStrip, kept_some - s);
              const char* kept_strip = kept_strips + ((block - first) * kept_count + s / kStrip) * strip;
              float* sum = sums + ((once ? 0 : m / kStrip * kept_count) + s / kStrip) * area;
              multiply_strips<T>(steps, kept_left ? kept_strip : met_strip, kept_left ? met_strip : kept_strip,
                                 block == 0 ? sum : other, kStrip, false, kept_left ? kept_lines : met_lines,
                                 kept_left ? met_lines : kept_lines);
              if (block > 0) add_strip(other, sum);
              if (block + 1 < blocks) continue;
              const int64_t i = rows_kept ? kb + s : mb + m, j = rows_kept ? mb + m : kb + s;
              const int64_t height = rows_kept ? kept_lines : met_lines, width = rows_kept ? met_lines : kept_lines;
              if (!is_exact(sum, kStrip, turned ? width : height, turned ? height : width)) {
                run_vectors(g, epilogue, i, i + height, j, j + width);
                continue;
              }
              if (turned) {
                turn_strip(sum, other);
                sum = other;
              }
              finish(sum, kStrip, static_cast<int>(height), width, g.c + i * g.c_row + j, g.c_row, g.accumulate, true,
                     finished, i, j);
            }
          }
      }
}
#endif

// Rows [i_begin, i_end) and columns [j_begin, j_end) of C, on this thread.
template <class T, class C, class Epilogue>
void run(const Gemm<T, C>& g, const Epilogue& epilogue, int64_t i_begin, int64_t i_end, int64_t j_begin,
         int64_t j_end) {
  if constexpr (kHasTileCode<T>) {
    if (is_tiled(g)) return run_tiles(g, epilogue, i_begin, i_end, j_begin, j_end);
  }
  run_vectors(g, epilogue, i_begin, i_end, j_begin, j_end);
}

// What several families multiply with is compiled once, in gemm.cpp.
#define DLKERN_GEMM_TYPES(KIND, T, P)                           \
  KIND template DotKernel<T, P> dot_kernel_for<T, P>(int, int); \
  KIND template void pack_b(int64_t, int64_t, const T*, int64_t, int64_t, P*);
#define DLKERN_GEMM_RUN(KIND, WAY, T, C) \
  KIND template void WAY(const Gemm<T, C>&, const NoEpilogue&, int64_t, int64_t, int64_t, int64_t);
#if DLKERN_TILE_CODE
#define DLKERN_GEMM_TILES(KIND)                     \
  DLKERN_GEMM_RUN(KIND, run_tiles, float, float)    \
  DLKERN_GEMM_RUN(KIND, run_tiles, float, float16)  \
  DLKERN_GEMM_RUN(KIND, run_tiles, float, bfloat16) \
  DLKERN_GEMM_RUN(KIND, run_tiles, float16, float)  \
  DLKERN_GEMM_RUN(KIND, run_tiles, bfloat16, float) \
  DLKERN_GEMM_RUN(KIND, run_tiles, bfloat16, bfloat16)
#else
#define DLKERN_GEMM_TILES(KIND)
#endif
#define DLKERN_GEMM(KIND)                                \
  KIND template Kernel<float> kernel_for(int, int);      \
  KIND template Kernel<double> kernel_for(int, int);     \
  DLKERN_GEMM_TYPES(KIND, float, float)                  \
  DLKERN_GEMM_TYPES(KIND, double, double)                \
  DLKERN_GEMM_TYPES(KIND, float16, float)                \
  DLKERN_GEMM_TYPES(KIND, bfloat16, float)               \
  DLKERN_GEMM_RUN(KIND, run_vectors, float, float)       \
  DLKERN_GEMM_RUN(KIND, run_vectors, double, double)     \
  DLKERN_GEMM_RUN(KIND, run_vectors, float, float16)     \
  DLKERN_GEMM_RUN(KIND, run_vectors, float, bfloat16)    \
  DLKERN_GEMM_RUN(KIND, run_vectors, bfloat16, bfloat16) \
  DLKERN_GEMM_RUN(KIND, run_vectors, float16, float)     \
  DLKERN_GEMM_RUN(KIND, run_vectors, bfloat16, float)    \
  DLKERN_GEMM_TILES(KIND)
DLKERN_GEMM(extern)

}  // namespace gemm_detail

// On the calling thread only.
template <class T, class C, class Epilogue = NoEpilogue>
inline void gemm_block(const Gemm<T, C>& g, const Epilogue& epilogue = {}) {
  if (g.m > 0 && g.n > 0) gemm_detail::run(g, epilogue, 0, g.m, 0, g.n);
}

// On all threads.
template <class T, class C, class Epilogue = NoEpilogue>
void gemm(const Gemm<T, C>& g, const Epilogue& epilogue = {}) {
  using namespace gemm_detail;
  if (g.m <= 0 || g.n <= 0) return;
  const int64_t threads = num_threads();
  if (threads == 1 || g.m * g.n * (g.k + 1) < kSmallWork) {  // not worth waking a thread
    run(g, epilogue, 0, g.m, 0, g.n);
    return;
  }
  // A grid of across x down threads, at the least cost: each packs the B it needs, which costs about as much as two
  // tiles of rows; or, turned, the A, which costs as much as two vectors of columns do where tiles are a vector of rows,
  // and B is read once more for each part of the rows.
  const bool tiled = is_tiled(g), turned = !tiled && is_turned(g);
  const int64_t lanes = tiled ? kStrip : kLanes<T>, tile = tiled ? kStrip : turned ? lanes : kMR;
  const int64_t row_tiles = ceil_div(g.m, tile), vectors = ceil_div(g.n, lanes);
  int64_t across = 1, least = -1;
  for (int64_t a = 1; a <= threads; ++a) {
    const int64_t some = ceil_div(vectors, a), tiles = ceil_div(row_tiles, threads / a);
    const int64_t cost = tiled    ? some * tiles + some + tiles
                         : turned ? tiles * (6 * some + 4) + some
                                  : some * (tiles + 2);
    if (least < 0 || cost <= least) {
      least = cost;
      across = a;
    }
  }
  const int64_t down = threads / across;
  parallel_for(across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t x = t % across, y = t / across;
      const int64_t i0 = smaller(y * row_tiles / down * tile, g.m),
                    i1 = smaller((y + 1) * row_tiles / down * tile, g.m);
      const int64_t j0 = smaller(x * vectors / across * lanes, g.n),
                    j1 = smaller((x + 1) * vectors / across * lanes, g.n);
      if (i0 < i1 && j0 < j1) run(g, epilogue, i0, i1, j0, j1);
    }
  });
}

}  // namespace dlkern::cpu::DLKERN_ISA

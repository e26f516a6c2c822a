// General matrix product, C = A B or C += A B, with a function applied to C's elements on their way out. Everything
// that multiplies matrices in the CPU column stands on it.
//
// BLIS's plan: blocks of KC along k and NC along n; a block of B is packed into panels of NR columns, zero-padded,
// A is read in place through its two strides, and one micro-kernel holds an MR x NR tile of C in registers, one
// broadcast of A and NV vectors of B a step. Threads split C, never k, and a split falls between tiles: the bits do
// not depend on the number of threads. Floor: 2 M N K over the FMA peak.
//
// gemm() uses all threads; gemm_block() only the calling one, for use inside a parallel region.
#pragma once
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {

// A[i, p] = a[i * a_row + p * a_column], B[p, j] = b[p * b_row + j * b_column], C[i, j] = c[i * c_row + j].
template <class T, class C = T> struct Gemm {
  int64_t m, n, k;
  const T* a;
  int64_t a_row, a_column;
  const T* b;
  int64_t b_row, b_column;
  C* c;
  int64_t c_row;
  bool accumulate = false;
};

// An epilogue maps a vector of C, row i, columns j .. j + lanes - 1 (`count` of them valid), after the last k.
struct NoEpilogue {
  template <class V> V operator()(V value, int64_t, int64_t, int) const { return value; }
};

namespace gemm_detail {

constexpr int kMR = 6;
#if defined(__AVX512F__)
constexpr int kNV = 4;
#else
constexpr int kNV = 2;
#endif
template <class T> constexpr int kNR = kNV * kLanes<T>;
constexpr int64_t kKC = 256;
constexpr int64_t kMC = 16 * kMR;  // rows of A that stay in the second-level cache: MC x KC
constexpr int64_t kNC = 1024;      // columns of B packed at a time: KC x NC

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// tile[ROWS, NV vectors] (+)= A[ROWS, k] B[k, NV vectors]; rows of B are b_row apart, rows of the tile tile_row.
template <int ROWS, int NV, class T>
[[gnu::always_inline]] inline void micro_kernel(int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b,
                                                int64_t b_row, T* tile, int64_t tile_row, bool add) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  V sum[ROWS][NV] = {};
  for (int64_t p = 0; p < k; ++p) {
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
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      T* out = tile + i * tile_row + j * lanes;
      store(out, add ? load(out) + sum[i][j] : sum[i][j]);
    }
}

template <class T>
using Kernel = void (*)(int64_t, const T*, int64_t, int64_t, const T*, int64_t, T*, int64_t, bool);

template <int ROWS, int NV, class T>
void kernel(int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_row, T* tile,
            int64_t tile_row, bool add) {
  micro_kernel<ROWS, NV, T>(k, a, a_row, a_column, b, b_row, tile, tile_row, add);
}

// The kernel for a tile of rows x vectors.
template <class T> inline Kernel<T> kernel_for(int rows, int vectors) {
#define DLKERN_ROW(r) {kernel<r, 1, T>, kernel<r, 2, T>, kernel<r, kNV < 3 ? 2 : 3, T>, kernel<r, kNV, T>}
  static constexpr Kernel<T> table[kMR][4] = {DLKERN_ROW(1), DLKERN_ROW(2), DLKERN_ROW(3),
                                              DLKERN_ROW(4), DLKERN_ROW(5), DLKERN_ROW(6)};
#undef DLKERN_ROW
  return table[rows - 1][vectors == kNV ? 3 : vectors - 1];
}

// B[k, n] into panels of NR columns: panel j holds rows p at panel + p * NR, zero beyond column n.
template <class T, class P>
inline void pack_b(int64_t k, int64_t n, const T* b, int64_t b_row, int64_t b_column, P* packed) {
  constexpr int64_t width = kNR<P>;
  for (int64_t j = 0; j < n; j += width, packed += k * width) {
    const int64_t columns = smaller(width, n - j);
    const T* from = b + j * b_column;
    if (b_column == 1 && columns == width) {
      for (int64_t p = 0; p < k; ++p)
        for (int64_t v = 0; v < width; v += kLanes<P>) store(packed + p * width + v, load(from + p * b_row + v));
    } else {
      for (int64_t p = 0; p < k; ++p) {
        for (int64_t c = 0; c < columns; ++c) packed[p * width + c] = static_cast<P>(from[p * b_row + c * b_column]);
        for (int64_t c = columns; c < width; ++c) packed[p * width + c] = P(0);
      }
    }
  }
}

// A[m, k] as it is, row by row, in the type sums are carried in (bfloat16 only: the others are read in place).
template <class T, class P>
inline void pack_a(int64_t m, int64_t k, const T* a, int64_t a_row, int64_t a_column, P* packed) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t p = 0; p < k; ++p) packed[i * k + p] = static_cast<P>(a[i * a_row + p * a_column]);
}

// A finished tile into C: C (+)= tile, then the epilogue where this is the last block of k.
template <class P, class C, class Epilogue>
inline void finish(const P* tile, int64_t tile_row, int rows, int64_t columns, C* c, int64_t c_row, bool add,
                   bool last, const Epilogue& epilogue, int64_t i0, int64_t j0) {
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

template <class A, class B> struct same { static constexpr bool value = false; };
template <class A> struct same<A, A> { static constexpr bool value = true; };

// Rows [i_begin, i_end) and columns [j_begin, j_end) of C, on this thread.
template <class T, class C, class Epilogue>
void run(const Gemm<T, C>& g, const Epilogue& epilogue, int64_t i_begin, int64_t i_end, int64_t j_begin,
         int64_t j_end) {
  using P = acc_t<T>;  // what is packed, multiplied and summed
  constexpr int64_t width = kNR<P>;
  constexpr bool c_is_sum = same<C, P>::value;      // C can hold sums between blocks of k
  constexpr bool a_in_place = same<T, P>::value;
  constexpr bool plain = same<Epilogue, NoEpilogue>::value;
  alignas(64) P tile[kMR * width];
  const int64_t nc_max = smaller(kNC, blocks(j_end - j_begin, width) * width);
  P* packed_b = scratch<P>(Slot::gemm_b, smaller(kKC, g.k) * nc_max);
  P* packed_a = a_in_place ? nullptr : scratch<P>(Slot::gemm_a, smaller(kKC, g.k) * (i_end - i_begin));
  // Sums between blocks of k, where C's own type would round them.
  const int64_t sums_row = nc_max;
  P* sums = c_is_sum || g.k <= kKC ? nullptr : scratch<P>(Slot::gemm_c, (i_end - i_begin) * sums_row);

  for (int64_t jc = j_begin; jc < j_end; jc += kNC) {
    const int64_t nc = smaller(kNC, j_end - jc);
    for (int64_t pc = 0; pc == 0 || pc < g.k; pc += kKC) {
      const int64_t kc = smaller(kKC, g.k - pc);
      const bool first = pc == 0, last = pc + kKC >= g.k;
      pack_b(kc, nc, g.b + pc * g.b_row + jc * g.b_column, g.b_row, g.b_column, packed_b);
      const P* a;
      int64_t a_row, a_column;
      if constexpr (a_in_place) {
        a = g.a + i_begin * g.a_row + pc * g.a_column;
        a_row = g.a_row;
        a_column = g.a_column;
      } else {
        pack_a(i_end - i_begin, kc, g.a + i_begin * g.a_row + pc * g.a_column, g.a_row, g.a_column, packed_a);
        a = packed_a;
        a_row = kc;
        a_column = 1;
      }
      for (int64_t ic = i_begin; ic < i_end; ic += kMC) {
        const int64_t i_stop = smaller(ic + kMC, i_end);
        for (int64_t j = 0; j < nc; j += width) {
          const int64_t columns = smaller(width, nc - j);
          const int vectors = static_cast<int>(blocks(columns, kLanes<P>));
          for (int64_t i = ic; i < i_stop; i += kMR) {
            const int rows = static_cast<int>(smaller(kMR, i_stop - i));
            const Kernel<P> multiply = kernel_for<P>(rows, vectors);
            const P* a_tile = a + (i - i_begin) * a_row;
            const P* b_tile = packed_b + j * kc;
            C* c_tile = g.c + i * g.c_row + jc + j;
            if constexpr (c_is_sum) {
              const bool add = g.accumulate || !first;
              if ((plain || !last) && columns % kLanes<P> == 0) {
                multiply(kc, a_tile, a_row, a_column, b_tile, width, c_tile, g.c_row, add);
              } else {
                multiply(kc, a_tile, a_row, a_column, b_tile, width, tile, width, false);
                finish(tile, width, rows, columns, c_tile, g.c_row, add, last, epilogue, i, jc + j);
              }
            } else {
              P* sum = sums ? sums + (i - i_begin) * sums_row + j : tile;
              const int64_t sum_row = sums ? sums_row : width;
              multiply(kc, a_tile, a_row, a_column, b_tile, width, sum, sum_row, !first);
              if (last) finish(sum, sum_row, rows, columns, c_tile, g.c_row, g.accumulate, true, epilogue, i, jc + j);
            }
          }
        }
      }
    }
  }
}

}  // namespace gemm_detail

// On the calling thread only.
template <class T, class C, class Epilogue = NoEpilogue>
inline void gemm_block(const Gemm<T, C>& g, const Epilogue& epilogue = {}) {
  if (g.m > 0 && g.n > 0) gemm_detail::run(g, epilogue, 0, g.m, 0, g.n);
}

// On all threads.
template <class T, class C, class Epilogue = NoEpilogue>
inline void gemm(const Gemm<T, C>& g, const Epilogue& epilogue = {}) {
  using namespace gemm_detail;
  if (g.m <= 0 || g.n <= 0) return;
  const int64_t threads = num_threads();
  const int64_t row_tiles = blocks(g.m, kMR), column_tiles = blocks(g.n, kNR<T>);
  if (threads == 1 || g.m * g.n * (g.k + 1) < 32768 || row_tiles * column_tiles == 1) {
    run(g, epilogue, 0, g.m, 0, g.n);
    return;
  }
  // Each thread packs the B it needs: splitting n packs nothing twice, so n is split as far as it goes.
  const int64_t across = smaller(threads, column_tiles);
  const int64_t down = smaller(blocks(threads, across), row_tiles);
  parallel_for(across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t x = t % across, y = t / across;
      run(g, epilogue, smaller(y * row_tiles / down * kMR, g.m), smaller((y + 1) * row_tiles / down * kMR, g.m),
          smaller(x * column_tiles / across * kNR<T>, g.n), smaller((x + 1) * column_tiles / across * kNR<T>, g.n));
    }
  });
}

}  // namespace dlkern::cpu::DLKERN_ISA

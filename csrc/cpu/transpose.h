// Transposes of small matrices into, and out of, the type sums are carried in: dst[j][i] = src[i][j]. In registers where
// sums are float: squares of 16 x 16 with AVX-512, of 8 x 8 with AVX2; plain loops elsewhere. Squares follow each other
// along the rows of the side whose rows lie further apart, so that its cache lines, which often fight for one set, are
// read or written whole.
#pragma once
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {

#if defined(__AVX2__)
namespace transpose_detail {

inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const bfloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline __m256 load8(const float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline __m256 load8(const float* p, int64_t count) { return _mm256_maskload_ps(p, first_lanes(count)); }
template <class T> inline __m256 load8(const T* p, int64_t count) {
  T lanes[8] = {};
  std::memcpy(static_cast<void*>(lanes), p, sizeof(T) * static_cast<size_t>(count));
  return load8(lanes);
}
inline void store8(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
inline void store8(bfloat16* p, __m256 v) {
  float lanes[8];
  _mm256_storeu_ps(lanes, v);
  for (int i = 0; i < 8; ++i) p[i] = bfloat16(lanes[i]);
}
inline void store8(float16* p, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store8(float* p, __m256 v, int64_t count) { _mm256_maskstore_ps(p, first_lanes(count), v); }
template <class T> inline void store8(T* p, __m256 v, int64_t count) {
  float lanes[8];
  _mm256_storeu_ps(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = T(lanes[i]);
}

inline void transpose8(__m256 (&r)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

}  // namespace transpose_detail
#endif

// Calls put(j, row) for each column j of src[rows <= 8][columns]: row holds its `rows` elements, in 8 lanes. For
// destinations that are not evenly spaced; only where sums are float and there is AVX2.
#if defined(__AVX2__)
template <class T, class Put>
[[gnu::always_inline]] inline void transpose_columns(const T* src, int64_t src_row, int64_t rows, int64_t columns,
                                                     Put&& put) {
  using namespace transpose_detail;
  for (int64_t j = 0; j < columns; j += 8) {
    const int64_t width = columns - j < 8 ? columns - j : 8;
    __m256 r[8];
    for (int i = 0; i < 8; ++i) {
      if (i >= rows)
        r[i] = _mm256_setzero_ps();
      else
        r[i] = width == 8 ? load8(src + i * src_row + j) : load8(src + i * src_row + j, width);
    }
    transpose8(r);
    for (int i = 0; i < 8; ++i)
      if (i < width) put(j + i, r[i]);
  }
}
#endif

#if defined(__AVX512F__)
// One square of rows x columns <= 16 x 16.
template <class S, class D>
[[gnu::always_inline]] inline void transpose_square(const S* src, int64_t src_row, int rows, int columns, D* dst,
                                                    int64_t dst_row) {
  vfloat square[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    square[i] = i >= rows       ? vfloat{}
                : columns == 16 ? load(src + i * src_row)
                                : load_partial<S>(src + i * src_row, columns);
  transpose(square);
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j)
    if (j < columns) {
      if (rows == 16)
        store(dst + j * dst_row, square[j]);
      else
        store_partial<D>(dst + j * dst_row, square[j], rows);
    }
}
#endif

// dst[j * dst_row + i] = src[i * src_row + j] for i < rows, j < columns.
template <class S, class D>
void transpose(const S* src, int64_t src_row, int64_t rows, int64_t columns, D* dst, int64_t dst_row) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) <= 4 && sizeof(D) <= 4)
    if (rows > 8 && columns > 8) {
      const bool down = dst_row > src_row;  // the inner loop goes down src, along dst
      const int64_t outer = down ? columns : rows, inner = down ? rows : columns;
      for (int64_t o = 0; o < outer; o += 16)
        for (int64_t n = 0; n < inner; n += 16) {
          const int64_t i = down ? n : o, j = down ? o : n;
          const int r = static_cast<int>(rows - i < 16 ? rows - i : 16),
                    c = static_cast<int>(columns - j < 16 ? columns - j : 16);
          const S* from = src + i * src_row + j;
          D* to = dst + j * dst_row + i;
          if (r == 16 && c == 16)
            transpose_square(from, src_row, 16, 16, to, dst_row);
          else
            transpose_square(from, src_row, r, c, to, dst_row);
        }
      return;
    }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(S) <= 4 && sizeof(D) <= 4) {
    using namespace transpose_detail;
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8)
      transpose_columns(src + i * src_row, src_row, 8, columns,
                        [&](int64_t j, __m256 v) { store8(dst + j * dst_row + i, v); });
    if (i < rows)
      transpose_columns(src + i * src_row, src_row, rows - i, columns,
                        [&](int64_t j, __m256 v) { store8(dst + j * dst_row + i, v, rows - i); });
    return;
  }
#endif
  for (int64_t i0 = 0; i0 < rows; i0 += 8)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = i0; i < rows && i < i0 + 8; ++i)
        dst[j * dst_row + i] = static_cast<D>(static_cast<acc_t<S>>(src[i * src_row + j]));
}

// Compiled once, in transpose.cpp.
#define DLKERN_TRANSPOSE(KIND, S, D) KIND template void transpose(const S*, int64_t, int64_t, int64_t, D*, int64_t);
#define DLKERN_TRANSPOSES(KIND)           \
  DLKERN_TRANSPOSE(KIND, float, float)    \
  DLKERN_TRANSPOSE(KIND, double, double)  \
  DLKERN_TRANSPOSE(KIND, float16, float)  \
  DLKERN_TRANSPOSE(KIND, bfloat16, float) \
  DLKERN_TRANSPOSE(KIND, float, float16)  \
  DLKERN_TRANSPOSE(KIND, float, bfloat16)
DLKERN_TRANSPOSES(extern)

// dst[i] = src[i], converted.
template <class S, class D> inline void copy(const S* src, D* dst, int64_t count) {
  constexpr int lanes = kLanes<S>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(dst + i, load(src + i));
  if (i < count)
    store_partial<D>(dst + i, load_partial<S>(src + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}
// from, or a copy in the type sums are carried in, at `room`.
template <class T> const acc_t<T>* widened(const T* from, int64_t count, acc_t<T>* room) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    return from;
  } else {
    copy(from, room, count);
    return room;
  }
}

}  // namespace dlkern::cpu::DLKERN_ISA

// Attention's products of matrices on AMX's tiles (tiles.h): how the operands of a block of kKeys keys and of strips of 32
// queries are laid out, and when such products may stand for those of vectors.
//
// Probabilities and the gradients of scores, which are made in float, become as many parts as the operands have: in
// bfloat16 they are rounded to it, as libraries round them.
#pragma once
#include "attention.h"
#include "gemm.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace attention_detail {

constexpr int64_t kKeys = 128;  // of a tile of scores
constexpr int64_t kKeyStrips = kKeys / kStrip, kKeySteps = kKeys / kTileStep;

// Scores that are products, of types that are made of parts.
template <class T, int SCORE>
constexpr bool kTiled = kHasTileCode<T> && (SCORE == kDotScore || SCORE == kCosineScore);

// Sums of more products would lose more by rounding than vectors do, fewer are not worth laying out.
constexpr int64_t kMostDepth = 512, kLeastDepth = 12, kLeastQueries = 9;

template <class T, int SCORE> bool is_tiled(const AttentionShape& s) {
  if constexpr (!kTiled<T, SCORE>) return false;
  // Of scores in memory torch's probabilities and their gradients are floats; those of a tile would be rounded.
  if (kParts<T> == 1 && s.from_scores) return false;
  // Where scores are not magnified, what tiles flush to zero does not show in them.
  constexpr double small = 0x1p-32, large = 0x1p32;
  return s.queries >= kLeastQueries && s.depth >= kLeastDepth && s.depth <= kMostDepth &&
         s.value_depth >= kLeastDepth && s.value_depth <= kMostDepth &&
         s.queries * s.keys * (s.depth + s.value_depth) >= 2 * gemm_detail::kSmallWork && s.scale <= large &&
         s.scale >= -large && (s.softcap == 0 || s.softcap >= small) && uses_tiles<T>();
}

// The largest of absolute values' bits, as the number that they are.
inline float largest_of(vint32 bits) {
  const int32_t largest = largest_lane(bits);
  float value;
  std::memcpy(&value, &largest, sizeof value);
  return value;
}
// The largest absolute value of rows of numbers; a NaN is one. Bits are compared, which order numbers alike; those of 16-bit
// types as they lie.
template <class T> inline float most_of(const T* from, int64_t row, int64_t rows, int64_t columns) {
  using vuint16 [[gnu::vector_size(kVectorBytes)]] = uint16_t;
  constexpr int64_t lanes = kLanes<float>, halves = sizeof(T) == 2 ? 2 * lanes : 0;
  vuint16 most_halves{};
  vint32 most{};
  const auto compare = [&](vfloat v) {
    const vint32 bits = (vint32)v & 0x7fffffff;
    most = bits > most ? bits : most;
  };
  for (int64_t r = 0; r < rows; ++r, from += row) {
    int64_t c = 0;
    for (; halves && c + halves <= columns; c += halves) {
      vuint16 bits;
      std::memcpy(&bits, from + c, sizeof bits);
      bits &= 0x7fff;
      most_halves = bits > most_halves ? bits : most_halves;
    }
    for (; c < columns; c += lanes) compare(load_some(from + c, columns - c));
  }
  if constexpr (halves > 0) {
    T some[halves];
    std::memcpy(static_cast<void*>(some), &most_halves, sizeof most_halves);
    for (int64_t half = 0; half < halves; half += lanes) compare(load(some + half));
  }
  return largest_of(most);
}

// Whether tiles may multiply numbers up to `a` by numbers up to `b`: nothing overflows, and what they flush to zero is far
// below the largest products. (Zeros are multiplied exactly.)
inline bool are_large(float a, float b) {
  constexpr float least = 0x1p-80f;
  return a == 0 || b == 0 || (a >= least && b >= least && a * b >= least);
}
inline bool is_bounded(float a) { return a < 0x1p56f; }

#if DLKERN_TILE_CODE

// e^(x factor - base), at most 1, as what becomes parts of a T: with AVX-512 by 2^x, to 2^-17, for types of 16 bits.
template <class T> struct Exponential {
  vfloat factor, base;
#if defined(__AVX512F__)
  static constexpr bool kShort = sizeof(T) < sizeof(float);
#else
  static constexpr bool kShort = false;
#endif
  Exponential(float a, float b) {
    constexpr float log2e = 1.44269504088896341f;
    factor = broadcast<float>(kShort ? a * log2e : a);
    base = broadcast<float>(kShort ? b * log2e : b);
  }
  [[gnu::always_inline]] vfloat operator()(vfloat x) const {
    const vfloat t = x * factor - base;
#if defined(__AVX512F__)
    if constexpr (kShort) {
      constexpr float kLow = -126;  // below it 0; a NaN stays one
      const __mmask16 kept = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(kLow), _CMP_NLT_UQ);
      const vfloat k = (vfloat)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                   r = t - k;
      // Of the polynomials with 2^0 = 1 the one of least largest relative error on [-1/2, 1/2].
      vfloat y = broadcast<float>(0.00958285294f);
      y = y * r + 0.0559064262f;
      y = y * r + 0.240240991f;
      y = y * r + 0.693124175f;
      y = y * r + 1.0f;
      return (vfloat)_mm512_maskz_scalef_ps(kept, (__m512)y, (__m512)k);
    }
#endif
    return exp_nonpositive(t);
  }
};

// The largest lane of each of 16 vectors.
inline vfloat largest_lanes(const vfloat* rows) {
  vfloat square[kTile];
  load_turned(reinterpret_cast<const float*>(rows), kTile, square);
#pragma GCC unroll 16
  for (int step = kTile / 2; step > 0; step /= 2)
#pragma GCC unroll 8
    for (int r = 0; r < step; ++r) square[r] = square[r] > square[r + step] ? square[r] : square[r + step];
  return square[0];
}

// Lines in strips `bytes` apart, as parts of a T.
template <class T, bool LEFT, class F>
inline void pack_lines(const Lines<F>& from, int64_t count, int64_t k, char* to, int64_t bytes) {
  for (int64_t i = 0; i < count; i += kStrip)
    pack_strip<LEFT, F, T>({from.at + i * from.line, from.line, from.k}, smaller(kStrip, count - i), k,
                           to + i / kStrip * bytes);
}

// sums[rows, columns] = one strip on the left x strips `bytes` apart on the right. Whole products: scores are exponents.
template <class T>
inline void multiply_row(int64_t steps, const char* left, const char* right, int64_t bytes, float* sums, int64_t pitch,
                         int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kStrip)
    multiply_strips<T, true>(steps, left, right + j / kStrip * bytes, sums + j, pitch, false, rows,
                             smaller(kStrip, columns - j));
}

// sums[rows, columns] += the same; columns are whole vectors. Long sums of float are sums of blocks' sums.
template <class T>
inline void add_row(int64_t steps, const char* left, const char* right, int64_t bytes, float* sums, int64_t pitch,
                    int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kStrip) {
    const char* strip = right + j / kStrip * bytes;
    const int64_t some = smaller(kStrip, columns - j);
    if (sizeof(T) < sizeof(float) && rows % kTile == 0) {
      multiply_strips<T>(steps, left, strip, sums + j, pitch, true, rows, some);
    } else {
      alignas(64) float block[kStrip * kStrip];
      multiply_strips<T>(steps, left, strip, block, kStrip, false, rows, some);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < some; c += kTile) {
          float* to = sums + r * pitch + j + c;
          store(to, load(to) + load(block + r * kStrip + c));
        }
    }
  }
}

// to[j, d] += from[d, j], for `count` of j and `depth`, padded to whole vectors, of d.
inline void add_turned(const float* from, int64_t from_row, int64_t count, int64_t depth, float* to, int64_t to_row) {
  for (int64_t j = 0; j < count; j += kTile)
    for (int64_t d = 0; d < depth; d += kTile) {
      vfloat square[kTile];
      load_turned(from + d * from_row + j, from_row, square);
      for (int64_t r = 0; r < smaller(kTile, count - j); ++r) {
        float* row = to + (j + r) * to_row + d;
        store(row, load(row) + square[r]);
      }
    }
}

#endif

// f(), with the calling thread's tiles set up if it multiplies by them.
template <class T, int SCORE, class F> inline void on_tiles([[maybe_unused]] bool tiled, const F& f) {
#if DLKERN_TILE_CODE
  if constexpr (kTiled<T, SCORE>)
    if (tiled) {
      const Tiles tiles;
      return f();
    }
#endif
  f();
}

}  // namespace attention_detail
}  // namespace dlkern::cpu::DLKERN_ISA

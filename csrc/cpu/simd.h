// Vectors as wide as the instruction set this file is compiled for, through the compiler's vector
// types: one source serves AVX-512, AVX2 and portable code, and the compiler contracts a * b + c to FMA.
// Vec<float> and Vec<double> hold kVectorBytes; bfloat16 and float16 are loaded into and stored
// from Vec<float>.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "scalar.h"

#ifndef DLKERN_ISA
#define DLKERN_ISA portable
#endif

namespace dlkern::cpu::DLKERN_ISA {

#if defined(DLKERN_VECTOR_BYTES)  // the "wide" test build: AVX-512's code on a CPU without it
constexpr int kVectorBytes = DLKERN_VECTOR_BYTES;
#elif defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

using vfloat [[gnu::vector_size(kVectorBytes)]] = float;
using vdouble [[gnu::vector_size(kVectorBytes)]] = double;
using vint32 [[gnu::vector_size(kVectorBytes)]] = int32_t;
using vuint32 [[gnu::vector_size(kVectorBytes)]] = uint32_t;
using vint64 [[gnu::vector_size(kVectorBytes)]] = int64_t;
using vuint16_half [[gnu::vector_size(kVectorBytes / 2)]] = uint16_t;

using vfloat_half [[gnu::vector_size(kVectorBytes / 2)]] = float;
using vuint32_half [[gnu::vector_size(kVectorBytes / 2)]] = uint32_t;
using vuint16_quarter [[gnu::vector_size(kVectorBytes / 4)]] = uint16_t;

template <class T> struct vector_of {
  using type = vfloat;
};
template <> struct vector_of<double> {
  using type = vdouble;
};
// The vector in which elements of type T are computed: Vec<bfloat16> is a vector of float.
template <class T> using Vec = typename vector_of<T>::type;
// Lanes of Vec<T>.
template <class T> constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(acc_t<T>));

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T> inline Vec<T> broadcast(acc_t<T> value) {
  return value - Vec<T>{};
}  // x - 0 is x, for -0 too: no addition is left

// Unaligned loads and stores of a whole vector.
inline vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vdouble load(const double* p) {
  vdouble v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vfloat load(const bfloat16* p) {
  vuint16_half h;
  std::memcpy(&h, p, sizeof h);
  vuint32 u = __builtin_convertvector(h, vuint32) << 16;
  vfloat v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}
// float16's bits, in 32-bit lanes, to float and back, lane by lane as float16 itself does it.
template <class F, class U> inline F float_of_half(U bits) {
  using I = decltype(bits == bits);
  const U h = bits & 0x7fffu;
  const F small = __builtin_convertvector((I)h, F) * 0x1p-24f;
  U u = (h << 13) + (h < 0x7c00u ? U{} + 0x38000000u : U{} + 0x70000000u);
  u |= h > 0x7c00u ? U{} + 0x400000u : U{};
  u = h < 0x400u ? (U)small : u;
  return (F)(u | (bits & 0x8000u) << 16);
}
inline vuint32 half_of_float(vfloat v) {
  const vuint32 u = (vuint32)v & 0x7fffffffu, sign = ((vuint32)v >> 16) & 0x8000u;
  const vuint32 small = (vuint32)((vfloat)u + 0.5f) - 0x3f000000u;
  vuint32 h = (u + 0xfffu + ((u >> 13) & 1u) - 0x38000000u) >> 13;
  h = u < 0x38800000u ? small : h;
  h = u >= 0x47800000u ? vuint32{} + 0x7c00u : h;
  h = u > 0x7f800000u ? 0x7e00u | ((u >> 13) & 0x3ffu) : h;
  return sign | h;
}
inline vfloat load(const float16* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && !defined(DLKERN_VECTOR_BYTES)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vuint16_half h;
  std::memcpy(&h, p, sizeof h);
  return float_of_half<vfloat>(__builtin_convertvector(h, vuint32));
#endif
}
// kLanes<double> elements of any type, widened to double.
inline vdouble load_wide(const double* p) { return load(p); }
// GCC converts halves of a vector one at a time; one instruction does it.
inline vdouble widen(vfloat_half v) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_cvtps_pd((__m256)v);
#elif defined(__AVX2__) && !defined(DLKERN_VECTOR_BYTES)
  return (vdouble)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, vdouble);
#endif
}
inline vdouble widen(vdouble v) { return v; }
#if defined(__AVX512F__)
inline vfloat_half low_half(vfloat v) { return (vfloat_half)_mm512_castps512_ps256((__m512)v); }
inline vfloat_half high_half(vfloat v) { return (vfloat_half)_mm512_extractf32x8_ps((__m512)v, 1); }
#else
inline vfloat_half low_half(vfloat v) {
  vfloat_half h;
  std::memcpy(&h, &v, sizeof h);
  return h;
}
inline vfloat_half high_half(vfloat v) {
  vfloat_half h[2];
  std::memcpy(h, &v, sizeof h);
  return h[1];
}
#endif
inline vdouble load_wide(const float* p) {
  vfloat_half v;
  std::memcpy(&v, p, sizeof v);
  return widen(v);
}
inline vdouble load_wide(const bfloat16* p) {
  vuint16_quarter h;
  std::memcpy(&h, p, sizeof h);
  vuint32_half u = __builtin_convertvector(h, vuint32_half) << 16;
  vfloat_half v;
  std::memcpy(&v, &u, sizeof v);
  return widen(v);
}
inline vdouble load_wide(const float16* p) {
#if defined(__AVX512F__)
  return widen((vfloat_half)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__F16C__) && !defined(DLKERN_VECTOR_BYTES)
  return widen((vfloat_half)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vuint16_quarter h;
  std::memcpy(&h, p, sizeof h);
  return widen(float_of_half<vfloat_half>(__builtin_convertvector(h, vuint32_half)));
#endif
}
inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, vdouble v) { std::memcpy(p, &v, sizeof v); }
// Twice as many consecutive bfloat16s as elements at even and at odd places: what does not ask for their order is spared
// its conversions' shuffles.
template <class T> constexpr bool kEvenOdd = std::is_same_v<T, bfloat16>;
inline vfloat load_even(const bfloat16* p) {
  vuint32 words;
  std::memcpy(&words, p, sizeof words);
  return (vfloat)(words << 16);
}
inline vfloat load_odd(const bfloat16* p) {
  vuint32 words;
  std::memcpy(&words, p, sizeof words);
  return (vfloat)(words & 0xffff0000u);
}
// The same of two vectors of consecutive elements.
inline vfloat take_even(vfloat first, vfloat second) {
  vint32 at;
#pragma GCC unroll 16
  for (int l = 0; l < kLanes<float>; ++l) at[l] = 2 * l;
  return __builtin_shuffle(first, second, at);
}
inline vfloat take_odd(vfloat first, vfloat second) {
  vint32 at;
#pragma GCC unroll 16
  for (int l = 0; l < kLanes<float>; ++l) at[l] = 2 * l + 1;
  return __builtin_shuffle(first, second, at);
}
// A bfloat16 in the upper half of each lane, rounded to nearest even; below it is rubbish.
inline vuint32 round_to_upper_half(vfloat v) {
  const vuint32 u = (vuint32)v;
  return v == v ? u + 0x7fffu + ((u >> 16) & 1u) : u | 0x400000u;
}
inline vuint32 merge_even_odd(vfloat even, vfloat odd) {
  return (round_to_upper_half(even) >> 16) | (round_to_upper_half(odd) & 0xffff0000u);
}
inline void store(bfloat16* p, vfloat v) {
  const vuint16_half h = __builtin_convertvector(round_to_upper_half(v) >> 16, vuint16_half);
  std::memcpy(p, &h, sizeof h);
}
inline void store(float16* p, vfloat v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && !defined(DLKERN_VECTOR_BYTES)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  vuint16_half h = __builtin_convertvector(half_of_float(v), vuint16_half);
  std::memcpy(p, &h, sizeof h);
#endif
}

// Whether a store past the caches exists; stream() is that store, to a multiple of the stored bytes; order it by fence().
#if defined(__AVX512F__)
constexpr bool kStreams = true;
inline void stream(float* p, vfloat v) { _mm512_stream_ps(p, (__m512)v); }
inline void stream(double* p, vdouble v) { _mm512_stream_pd(p, (__m512d)v); }
inline void stream(bfloat16* p, vfloat v) {
  bfloat16 some[kLanes<bfloat16>];
  store(some, v);
  __m256i bits;
  std::memcpy(&bits, some, sizeof bits);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
}
inline void stream(float16* p, vfloat v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
inline void fence() { _mm_sfence(); }
#elif defined(__AVX2__) && !defined(DLKERN_VECTOR_BYTES)
constexpr bool kStreams = true;
inline void stream(float* p, vfloat v) { _mm256_stream_ps(p, (__m256)v); }
inline void stream(double* p, vdouble v) { _mm256_stream_pd(p, (__m256d)v); }
template <class T> inline void stream_halves(T* p, vfloat v) {
  T some[kLanes<T>];
  store(some, v);
  __m128i bits;
  std::memcpy(&bits, some, sizeof bits);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits);
}
inline void stream(bfloat16* p, vfloat v) { stream_halves(p, v); }
inline void stream(float16* p, vfloat v) { stream_halves(p, v); }
inline void fence() { _mm_sfence(); }
#else
constexpr bool kStreams = false;
template <class T> inline void stream(T* p, Vec<T> v) { store(p, v); }
inline void fence() {}
#endif

// The first `count` lanes only (0 < count <= lanes); the others read as zero and are not written.
template <class T> inline Vec<T> load_partial(const T* p, int count) {
  T lanes[kLanes<T>];
  std::memset(static_cast<void*>(lanes), 0, sizeof lanes);
  std::memcpy(static_cast<void*>(lanes), p, sizeof(T) * static_cast<size_t>(count));
  return load(lanes);
}
template <class T> inline void store_partial(T* p, Vec<T> v, int count) {
  T lanes[kLanes<T>];
  store(lanes, v);
  std::memcpy(static_cast<void*>(p), lanes, sizeof(T) * static_cast<size_t>(count));
}
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(DLKERN_VECTOR_BYTES)
inline __m256i lane_mask(int count) {
  alignas(32) static constexpr int32_t kOnes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOnes + 8 - count));
}
template <> inline vfloat load_partial<float>(const float* p, int count) {
  return (vfloat)_mm256_maskload_ps(p, lane_mask(count));
}
template <> inline vdouble load_partial<double>(const double* p, int count) {
  return (vdouble)_mm256_maskload_pd(p, lane_mask(2 * count));
}
// Stores in pieces of 4, 2 and 1: a masked store takes AMD's CPUs before Zen 4 a dozen cycles or more.
template <> inline void store_partial<float>(float* p, vfloat v, int count) {
  if (count >= 8) return store(p, v);
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (count & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps((__m256)v, 1);
    p += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (count & 1) _mm_store_ss(p, part);
}
template <> inline void store_partial<double>(double* p, vdouble v, int count) {
  if (count >= 4) return store(p, v);
  __m128d part = _mm256_castpd256_pd128((__m256d)v);
  if (count & 2) {
    _mm_storeu_pd(p, part);
    part = _mm256_extractf128_pd((__m256d)v, 1);
    p += 2;
  }
  if (count & 1) _mm_store_sd(p, part);
}
// The same of 16-bit elements.
inline __m128i load_some_halves(const void* from, int count) {
  const char* p = static_cast<const char*>(from);
  if (count >= 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const char* q = p + 2 * (count & 4);
  uint64_t rest = 0;
  if (count & 1) {
    uint16_t one;
    std::memcpy(&one, q + 2 * (count & 2), sizeof one);
    rest = one;
  }
  if (count & 2) {
    uint32_t two;
    std::memcpy(&two, q, sizeof two);
    rest = rest << 32 | two;
  }
  if (!(count & 4)) return _mm_cvtsi64_si128(static_cast<int64_t>(rest));
  return _mm_insert_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), static_cast<int64_t>(rest), 1);
}
inline void store_some_halves(void* to, __m128i v, int count) {
  char* p = static_cast<char*>(to);
  if (count >= 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v);
  uint64_t part = static_cast<uint64_t>(_mm_cvtsi128_si64(v));
  if (count & 4) {
    std::memcpy(p, &part, sizeof part);
    part = static_cast<uint64_t>(_mm_extract_epi64(v, 1));
    p += 8;
  }
  if (count & 2) {
    const uint32_t two = static_cast<uint32_t>(part);
    std::memcpy(p, &two, sizeof two);
    part >>= 32;
    p += 4;
  }
  if (count & 1) {
    const uint16_t one = static_cast<uint16_t>(part);
    std::memcpy(p, &one, sizeof one);
  }
}
template <> inline vfloat load_partial<bfloat16>(const bfloat16* p, int count) {
  return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_some_halves(p, count)), 16);
}
template <> inline vfloat load_partial<float16>(const float16* p, int count) {
  return (vfloat)_mm256_cvtph_ps(load_some_halves(p, count));
}
template <> inline void store_partial<bfloat16>(bfloat16* p, vfloat v, int count) {
  const __m256i words = (__m256i)(round_to_upper_half(v) >> 16);
  store_some_halves(p, _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)), count);
}
template <> inline void store_partial<float16>(float16* p, vfloat v, int count) {
  store_some_halves(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT), count);
}
#endif
// The first `count` of kLanes<double> elements, widened; the others read as zero.
template <class T> inline vdouble load_wide_partial(const T* p, int count) {
  T lanes[kLanes<double>];
  std::memset(static_cast<void*>(lanes), 0, sizeof lanes);
  std::memcpy(static_cast<void*>(lanes), p, sizeof(T) * static_cast<size_t>(count));
  return load_wide(lanes);
}
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(DLKERN_VECTOR_BYTES)
template <> inline vdouble load_wide_partial<double>(const double* p, int count) {
  return load_partial<double>(p, count);
}
template <> inline vdouble load_wide_partial<float>(const float* p, int count) {
  return (vdouble)_mm256_cvtps_pd(_mm_maskload_ps(p, _mm256_castsi256_si128(lane_mask(count))));
}
#endif
#if defined(__AVX512F__)
inline __mmask16 lane_mask(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
template <> inline vfloat load_partial<float>(const float* p, int count) {
  return (vfloat)_mm512_maskz_loadu_ps(lane_mask(count), p);
}
template <> inline vdouble load_partial<double>(const double* p, int count) {
  return (vdouble)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lane_mask(count)), p);
}
template <> inline void store_partial<double>(double* p, vdouble v, int count) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lane_mask(count)), (__m512d)v);
}
template <> inline vdouble load_wide_partial<double>(const double* p, int count) {
  return load_partial<double>(p, count);
}
template <> inline vdouble load_wide_partial<float>(const float* p, int count) {
  return (vdouble)_mm512_cvtps_pd(_mm256_maskz_loadu_ps(static_cast<__mmask8>(lane_mask(count)), p));
}
template <> inline void store_partial<float>(float* p, vfloat v, int count) {
  _mm512_mask_storeu_ps(p, lane_mask(count), (__m512)v);
}
template <> inline vfloat load_partial<bfloat16>(const bfloat16* p, int count) {
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lane_mask(count), p)), 16);
}
template <> inline void store_partial<bfloat16>(bfloat16* p, vfloat v, int count) {
  bfloat16 lanes[16];
  store(lanes, v);
  _mm256_mask_storeu_epi16(p, lane_mask(count), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
}
template <> inline vfloat load_partial<float16>(const float16* p, int count) {
  return (vfloat)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lane_mask(count), p));
}
template <> inline void store_partial<float16>(float16* p, vfloat v, int count) {
  _mm256_mask_storeu_epi16(p, lane_mask(count), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

constexpr int64_t kAheadBytes = 2048;
// What a loop over memory reads soon. Beyond the end of an array it does nothing.
inline void prefetch_ahead(const void* at) { __builtin_prefetch(static_cast<const char*>(at) + kAheadBytes); }
// What it stores to soon: where a line is in no cache, the store waits for it, and later ones behind that store.
inline void prefetch_ahead_to_store(const void* at) {
  __builtin_prefetch(static_cast<const char*>(at) + kAheadBytes, 1);
}

// The same of any count: all lanes from kLanes<T> on.
template <class T> inline Vec<T> load_some(const T* p, int64_t count) {
  return count >= kLanes<T> ? load(p) : load_partial<T>(p, static_cast<int>(count));
}
template <class T> inline void store_some(T* p, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>)
    store(p, v);
  else
    store_partial<T>(p, v, static_cast<int>(count));
}

// The integers beside Vec<T>: as many lanes, as wide.
template <class T> struct tag_of {
  using vector = vint32;
  using element = int32_t;
};
template <> struct tag_of<double> {
  using vector = vint64;
  using element = int64_t;
};
template <class T> using Tag = typename tag_of<T>::vector;
template <class T> using TagElement = typename tag_of<T>::element;
template <class T> inline Tag<T> tags(int64_t value) { return Tag<T>{} + static_cast<TagElement<T>>(value); }
template <class T> inline Tag<T> iota() {
  Tag<T> lanes;
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i;
  return lanes;
}

// A byte a lane.
template <class T> struct bytes_of {
  using type [[gnu::vector_size(kLanes<T>)]] = uint8_t;
};
template <class T> using Bytes = typename bytes_of<T>::type;
// Lanes from `count` on become `fill`.
template <class T> inline Vec<T> first_lanes(Vec<T> v, int64_t count, Vec<T> fill = Vec<T>{}) {
  return iota<T>() < tags<T>(count) ? v : fill;
}

// A square of lanes x lanes elements, rows and columns exchanged: log2(lanes) rounds of exchanging halves.
template <int HALF, class V, int N> [[gnu::always_inline]] inline void transpose_round(V (&row)[N]) {
  using I = decltype(row[0] > row[0]);  // integer lanes of the same width
  I low, high;                          // which lanes of (a, b) make the new a and the new b
#pragma GCC unroll 16
  for (int l = 0; l < N; ++l) {
    low[l] = l & HALF ? N + l - HALF : l;
    high[l] = l & HALF ? N + l : l + HALF;
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    if (!(i & HALF)) {
      const V a = row[i], b = row[i + HALF];
      row[i] = __builtin_shuffle(a, b, low);
      row[i + HALF] = __builtin_shuffle(a, b, high);
    }
}
template <class V, int N> [[gnu::always_inline]] inline void transpose(V (&row)[N]) {
  if constexpr (N > 8) transpose_round<8>(row);
  if constexpr (N > 4) transpose_round<4>(row);
  if constexpr (N > 2) transpose_round<2>(row);
  transpose_round<1>(row);
}
// both(first lanes, last lanes), halved until one is left. By shuffles: what goes through memory waits until all stores
// before are done. (Widths as constants: else the compiler builds the orders of lanes lane by lane in every call.)
template <int WIDTH, class V, class F> [[gnu::always_inline]] inline auto reduce_lanes(V v, F&& both) {
  if constexpr (WIDTH == 0) {
    return v[0];
  } else {
    decltype(v > v) other;
#pragma GCC unroll 16
    for (int l = 0; l < static_cast<int>(sizeof(V) / sizeof(v[0])); ++l) other[l] = l ^ WIDTH;
    return reduce_lanes<WIDTH / 2>(both(v, __builtin_shuffle(v, other)), both);
  }
}
template <class V> constexpr int kHalfLanes = sizeof(V) / sizeof(V{}[0]) / 2;
// Sum of the lanes, in a fixed order.
template <class V> [[gnu::always_inline]] inline auto reduce_add(V v) {
  return reduce_lanes<kHalfLanes<V>>(v, [](V a, V b) __attribute__((always_inline)) { return a + b; });
}
// The largest lane; of a NaN and a number, either.
template <class V> [[gnu::always_inline]] inline auto largest_lane(V v) {
  return reduce_lanes<kHalfLanes<V>>(v, [](V a, V b) __attribute__((always_inline)) { return b > a ? b : a; });
}
// Larger of two lanes; NaN in either gives NaN, as torch.max has it.
template <class V> inline V maximum(V a, V b) { return (a > b) | (a != a) ? a : b; }

inline vfloat square_root(vfloat v) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__) && !defined(DLKERN_VECTOR_BYTES)
  return (vfloat)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
inline vdouble square_root(vdouble v) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__) && !defined(DLKERN_VECTOR_BYTES)
  return (vdouble)_mm256_sqrt_pd((__m256d)v);
#else
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

// A correction by what rounding lost; none to what is infinite, where it could be the opposite infinity.
template <class V> inline V finite_part(V v) { return v - v == V{} ? v : V{}; }
// A sum (of numbers or of lanes) and the rounding errors it lost, by Knuth's two-sum.
template <class V> struct CompensatedSum {
  V value{}, lost{};
  void operator+=(V x) {
    const V next = value + x, added = next - value;
    lost += (value - (next - added)) + (x - added);
    value = next;
  }
  V total() const { return value + finite_part(lost); }
};

// (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2: Cephes' polynomial of degree 5 in float; Taylor's of degree 11 in double (4e-18
// of e^r off).
inline vfloat exp_polynomial(vfloat r) {
  vfloat y = broadcast<float>(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  return y;
}
inline vdouble exp_polynomial(vdouble r) {
  vdouble y = broadcast<double>(1.0 / 6227020800.0);
  y = y * r + 1.0 / 479001600.0;
  y = y * r + 1.0 / 39916800.0;
  y = y * r + 1.0 / 3628800.0;
  y = y * r + 1.0 / 362880.0;
  y = y * r + 1.0 / 40320.0;
  y = y * r + 1.0 / 5040.0;
  y = y * r + 1.0 / 720.0;
  y = y * r + 1.0 / 120.0;
  y = y * r + 1.0 / 24.0;
  y = y * r + 1.0 / 6.0;
  y = y * r + 0.5;
  return y;
}
// e^x of x <= 0 (or NaN), with less to look after: softmax needs no more. A polynomial after reduction by ln 2; under 2
// ulp, flushes below -87.3.
inline vfloat exp_nonpositive(vfloat x) {
  constexpr float kLow = -87.3365447504f, kShifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vfloat t = x * 1.44269504088896341f + kShifter, k = t - kShifter;
  vfloat r = x - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  vfloat y = exp_polynomial(r) * (r * r) + r + 1.0f;
#if defined(__AVX512F__)  // times 2^k where not below kLow, so that a NaN stays one
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(kLow), _CMP_NLT_UQ);
  return (vfloat)_mm512_maskz_scalef_ps(kept, (__m512)y, (__m512)k);
#else
  vuint32 n, bits;  // unsigned: below kLow they wrap around
  std::memcpy(&n, &t, sizeof n);
  std::memcpy(&bits, &y, sizeof bits);
  bits += n << 23;
  std::memcpy(&y, &bits, sizeof y);
  y = x < kLow ? broadcast<float>(0.0f) : y;
  return x != x ? x : y;
#endif
}
// The same of any x.
inline vfloat exp(vfloat x) {
#if defined(__AVX512F__)  // 2^k is that large there, and a NaN passes the minimum
  return exp_nonpositive((vfloat)_mm512_min_ps(_mm512_set1_ps(89.0f), (__m512)x));
#else
  constexpr float kHigh = 88.3762626647949f, kLow = -87.3365447504f;
  vfloat clamped = x > kHigh ? broadcast<float>(kHigh) : x;
  clamped = clamped < kLow ? broadcast<float>(kLow) : clamped;
  vfloat t = clamped * 1.44269504088896341f;
  vint32 n = __builtin_convertvector(t + (t >= 0.0f ? broadcast<float>(0.5f) : broadcast<float>(-0.5f)), vint32);
  vfloat k = __builtin_convertvector(n, vfloat);
  vfloat r = clamped - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  vfloat y = exp_polynomial(r) * (r * r) + r + 1.0f;
  vint32 half = n >> 1;  // in two steps, so that 2^n for n = 128 does not overflow
  vint32 first = (half + 127) << 23, second = (n - half + 127) << 23;
  vfloat scale1, scale2;
  std::memcpy(&scale1, &first, sizeof first);
  std::memcpy(&scale2, &second, sizeof second);
  y = y * scale1 * scale2;
  y = x < kLow ? broadcast<float>(0.0f) : y;
  y = x > kHigh ? broadcast<float>(__builtin_inff()) : y;
  return x != x ? x : y;
#endif
}
// Reduced by ln 2 in two parts; under 1 ulp, subnormal results too.
inline vdouble exp(vdouble x) {
  constexpr double kHigh = 709.782712893384, kLow = -745.2, kShifter = 6755399441055744.0;  // 1.5 * 2^52
  vdouble clamped = x > kHigh ? broadcast<double>(kHigh) : x;
  clamped = clamped < kLow ? broadcast<double>(kLow) : clamped;
  const vdouble k = (clamped * 1.4426950408889634074 + kShifter) - kShifter;
  vdouble r = clamped - k * 6.93147180369123816490e-01;
  r = r - k * 1.90821492927058770002e-10;
  vdouble y = exp_polynomial(r) * (r * r) + r + 1.0;
  // 2^k in two steps, so that neither over- nor underflows: an integer's bits lie at the end of its sum with kShifter.
  const vdouble half = (k * 0.5 + kShifter) - kShifter;
  const vdouble first_sum = half + (kShifter + 1023.0), second_sum = (k - half) + (kShifter + 1023.0);
  vint64 first, second;
  std::memcpy(&first, &first_sum, sizeof first);
  std::memcpy(&second, &second_sum, sizeof second);
  first <<= 52;
  second <<= 52;
  vdouble scale1, scale2;
  std::memcpy(&scale1, &first, sizeof first);
  std::memcpy(&scale2, &second, sizeof second);
  y = y * scale1 * scale2;
  y = x > kHigh ? broadcast<double>(__builtin_inf()) : y;
  return x != x ? x : y;
}
inline vdouble exp_nonpositive(vdouble x) { return exp(x); }
inline vfloat sigmoid(vfloat x) { return 1.0f / (1.0f + exp(-x)); }
inline vdouble sigmoid(vdouble x) { return 1.0 / (1.0 + exp(-x)); }
// 1 - 2 / (1 + E) for E = scale + scale u > 1.5, scale a power of 2: what rounding 1 + E and the last difference lost is
// put back, so that little but the division's error is left, of which at most half counts.
template <class V> inline V one_minus_two_over(V scale, V u) {
  const V one = scale + 1, sum = one + scale * u, sum_lost = scale * u - (sum - one);
  const V part = 2 / sum, rest = 1 - part;
  return rest + (((1 - rest) - part) + part * part * sum_lost / 2);
}
// tanh |x| = 1 - 2 / (e^{2|x|} + 1), of which e^{2|x|} comes as 2^k (1 + u); where that form cancels, |x| < 0.625, Cephes'
// odd polynomial (float) or rational function (double). Under 0.9 ulp; the sign is x's, for zeros too.
inline vfloat tanh(vfloat x) {
  constexpr float kShifter = 12582912.0f;  // 1.5 * 2^23
  vuint32 bits, sign;
  std::memcpy(&bits, &x, sizeof x);
  sign = bits & 0x80000000u;
  bits ^= sign;
  vfloat a;
  std::memcpy(&a, &bits, sizeof a);
  const vfloat z = a * a;
  vfloat p = broadcast<float>(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  const vfloat small = p * z * a + a;

  const vfloat twice = a > 10.0f ? broadcast<float>(20.0f) : a + a;  // from 9.02 on the result is 1
  const vfloat shifted = twice * 1.44269504088896341f + kShifter, k = shifted - kShifter;
  const vfloat high = twice - k * 0.693359375f, r = high - k * -2.12194440e-4f, lost = (high - r) - k * -2.12194440e-4f;
  vuint32 n;
  std::memcpy(&n, &shifted, sizeof n);
  n = (n + 127u) << 23;
  vfloat scale;
  std::memcpy(&scale, &n, sizeof n);
  const vfloat result = a < 0.625f ? small : one_minus_two_over(scale, (exp_polynomial(r) * (r * r) + lost) + r);
  std::memcpy(&bits, &result, sizeof bits);
  bits |= sign;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline vdouble tanh(vdouble x) {
  constexpr double kShifter = 6755399441055744.0;  // 1.5 * 2^52
  vint64 bits, sign;
  std::memcpy(&bits, &x, sizeof x);
  sign = bits & INT64_MIN;
  bits ^= sign;
  vdouble a;
  std::memcpy(&a, &bits, sizeof a);
  const vdouble z = a * a;
  const vdouble p = (z * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * z - 1.61468768441708447952e3;
  const vdouble q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3;
  const vdouble small = p / q * z * a + a;

  const vdouble twice = a > 20.0 ? broadcast<double>(40.0) : a + a;  // from 19.1 on the result is 1
  const vdouble shifted = twice * 1.4426950408889634074 + kShifter, k = shifted - kShifter;
  const vdouble high = twice - k * 6.93147180369123816490e-01, r = high - k * 1.90821492927058770002e-10,
                lost = (high - r) - k * 1.90821492927058770002e-10;
  const vdouble scale_sum = k + (kShifter + 1023.0);
  vint64 n;
  std::memcpy(&n, &scale_sum, sizeof n);
  n <<= 52;
  vdouble scale;
  std::memcpy(&scale, &n, sizeof n);
  const vdouble u = (exp_polynomial(r) * (r * r) + lost) + r;
  const vdouble result = a < 0.625 ? small : one_minus_two_over(scale, u);
  std::memcpy(&bits, &result, sizeof bits);
  bits |= sign;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace dlkern::cpu::DLKERN_ISA

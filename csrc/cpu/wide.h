// The lanes of a Vec<T> as doubles: two vectors for float and 16-bit types, the vector itself for double. A struct, since
// GCC keeps a vector that is wider than the machine's in memory, and sums in it wait there for their own stores.
#pragma once
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {

struct vdouble_pair {
  vdouble low, high;
};
template <class T> using Wide = std::conditional_t<std::is_same_v<acc_t<T>, double>, vdouble, vdouble_pair>;

inline vdouble_pair operator+(vdouble_pair a, vdouble_pair b) { return {a.low + b.low, a.high + b.high}; }
inline vdouble_pair operator-(vdouble_pair a, vdouble_pair b) { return {a.low - b.low, a.high - b.high}; }
inline vdouble_pair operator*(vdouble_pair a, vdouble_pair b) { return {a.low * b.low, a.high * b.high}; }
inline vdouble_pair operator+(vdouble_pair a, double b) { return {a.low + b, a.high + b}; }
inline vdouble_pair operator*(vdouble_pair a, double b) { return {a.low * b, a.high * b}; }
inline vdouble_pair operator/(vdouble_pair a, double b) { return {a.low / b, a.high / b}; }
inline void operator+=(vdouble_pair& a, vdouble_pair b) { a = a + b; }
inline void operator-=(vdouble_pair& a, vdouble_pair b) { a = a - b; }

inline vdouble wide(vdouble v) { return v; }
inline vdouble_pair wide(vfloat v) { return {widen(low_half(v)), widen(high_half(v))}; }
// Rounded to T's vector again.
inline vdouble narrow(vdouble v) { return v; }
inline vfloat narrow(vdouble_pair v) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)v.low)),
                                    _mm512_cvtpd_ps((__m512d)v.high), 1);
#elif defined(__AVX2__) && !defined(DLKERN_VECTOR_BYTES)
  return (vfloat)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)v.high), _mm256_cvtpd_ps((__m256d)v.low));
#else
  const vfloat_half halves[2] = {__builtin_convertvector(v.low, vfloat_half),
                                 __builtin_convertvector(v.high, vfloat_half)};
  vfloat both;
  std::memcpy(&both, halves, sizeof both);
  return both;
#endif
}

template <class T> inline Wide<T> load_lanes(const double* p) {
  Wide<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_lanes(double* p, vdouble v) { store(p, v); }
inline void store_lanes(double* p, vdouble_pair v) {
  store(p, v.low);
  store(p + kLanes<double>, v.high);
}
// Sum of the lanes, in a fixed order.
inline double reduce_add(vdouble_pair v) { return reduce_add(v.low + v.high); }
// Lanes from `count` on become zero.
inline vdouble first_wide(vdouble v, int64_t count) { return first_lanes<double>(v, count); }
inline vdouble_pair first_wide(vdouble_pair v, int64_t count) {
  return {first_lanes<double>(v.low, count), first_lanes<double>(v.high, count - kLanes<double>)};
}

}  // namespace dlkern::cpu::DLKERN_ISA

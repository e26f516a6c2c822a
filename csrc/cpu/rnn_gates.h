// The activations of gates.
#pragma once
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {

// The first SIGMOIDS of x become their sigmoid, the others their tanh.
template <class T, int SIGMOIDS, int N> [[gnu::always_inline]] inline void activate_gates(Vec<acc_t<T>> (&x)[N]) {
#if defined(__AVX512F__) && !defined(DLKERN_VECTOR_BYTES)
  if constexpr (sizeof(T) == 2) {
    // 16 bits allow for tanh |x| = (1 - e) / (1 + e), e = exp(-2 |x|), and for a reciprocal by one step of Newton's, errors
    // of 2^-22. All vectors take each step together: one by one they would wait for their own results.
    vfloat e[N], k[N], y[N];
    const auto each = [](const auto& step) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) step(n);
    };
    const auto magnitude = [](vfloat v) { return (vfloat)((vuint32)v & 0x7fffffffu); };
    each([&](int n) __attribute__((always_inline)) {
      e[n] = n < SIGMOIDS ? (vfloat)_mm512_min_ps(_mm512_set1_ps(87.0f), (__m512)-x[n]) : -2.0f * magnitude(x[n]);
    });
    // As exp_nonpositive().
    constexpr float shifter = 12582912.0f;
    each([&](int n) __attribute__((always_inline)) { k[n] = e[n] * 1.44269504088896341f + shifter; });
    each([&](int n) __attribute__((always_inline)) { k[n] -= shifter; });
    each([&](int n) __attribute__((always_inline)) { y[n] = e[n] - k[n] * 0.693147180559945f; });
    constexpr float terms[] = {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f};
    vfloat p[N];
    each([&](int n) __attribute__((always_inline)) { p[n] = y[n] * 1.3981999507e-3f + terms[0]; });
#pragma GCC unroll 8
    for (int t = 1; t < 6; ++t) each([&](int n) __attribute__((always_inline)) { p[n] = p[n] * y[n] + terms[t]; });
    each([&](int n) __attribute__((always_inline)) {
      // Below, e does not show.
      const __mmask16 kept = _mm512_cmp_ps_mask((__m512)e[n], _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
      e[n] = (vfloat)_mm512_maskz_scalef_ps(kept, (__m512)p[n], (__m512)k[n]);
    });
    each([&](int n) __attribute__((always_inline)) { y[n] = (vfloat)_mm512_rcp14_ps((__m512)(1.0f + e[n])); });
    each([&](int n) __attribute__((always_inline)) { y[n] = y[n] * (2.0f - (1.0f + e[n]) * y[n]); });
    each([&](int n) __attribute__((always_inline)) {
      if (n < SIGMOIDS) {
        x[n] = y[n];
        return;
      }
      // Where 1 - e cancels, an odd polynomial, tanh()'s.
      const vfloat a = magnitude(x[n]), z = a * a;
      vfloat q = z * -5.70498872745e-3f + 2.06390887954e-2f;
      q = q * z + -5.37397155531e-2f;
      q = q * z + 1.33314422036e-1f;
      q = q * z + -3.33332819422e-1f;
      const vfloat result = a < 0.625f ? q * z * a + a : (1.0f - e[n]) * y[n];
      x[n] = (vfloat)((vuint32)result | ((vuint32)x[n] & 0x80000000u));
    });
    return;
  }
#endif
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) x[n] = n < SIGMOIDS ? sigmoid(x[n]) : tanh(x[n]);
}

}  // namespace dlkern::cpu::DLKERN_ISA

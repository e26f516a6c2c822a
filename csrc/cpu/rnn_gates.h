// The activations of gates, and what layers with and without options make of GRU's and RNN's.
#pragma once
#include "rnn.h"
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

// h: the new state of U vectors of hidden units of one row of GRU or RNN, from j on, from what `gate` holds of the input,
// the state before (GRU's) and the recurrent sums, of the first vector at `sums`, a vector a gate; `steps` are between gates
// and between vectors of units.
template <class T, int mode, int U>
[[gnu::always_inline]] inline void new_state(acc_t<T>* gate, const acc_t<T>* previous, int64_t hidden, int64_t j,
                                             const acc_t<T>* sums, int64_t gate_step, int64_t unit_step,
                                             const acc_t<T>* hidden_bias, bool keep, Vec<acc_t<T>> (&h)[U]) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<A>;
  const auto in = [&](const A* p, int u) { return load_some(p + j + u * lanes, hidden - j - u * lanes); };
  const auto out = [&](A* p, int u, V v) { store_some(p + j + u * lanes, v, hidden - j - u * lanes); };
  const auto sum = [&](int g, int u) { return load(sums + g * gate_step + u * unit_step); };
  if constexpr (mode == kRnnGru) {
    V n[U], z[U];
    for (int u = 0; u < U; ++u) {
      V recurrent = sum(2, u);
      if (hidden_bias) recurrent += in(hidden_bias, u);
      V x[2] = {in(gate + hidden, u) + sum(0, u), in(gate + 2 * hidden, u) + sum(1, u)};
      activate_gates<T, 2>(x);
      n[u] = in(gate + 3 * hidden, u) + x[0] * recurrent;
      z[u] = x[1];
      if (keep) {
        out(gate, u, recurrent);
        out(gate + hidden, u, x[0]);
        out(gate + 2 * hidden, u, x[1]);
      }
    }
    activate_gates<T, 0>(n);
    for (int u = 0; u < U; ++u) {
      if (keep) out(gate + 3 * hidden, u, n[u]);
      h[u] = n[u] + z[u] * (in(previous, u) - n[u]);
    }
  } else {
    V x[U];
    for (int u = 0; u < U; ++u) h[u] = x[u] = in(gate, u) + sum(0, u);
    if constexpr (mode == kRnnTanh) activate_gates<T, 0>(h);
    for (int u = 0; u < U; ++u) {
      const V nan = x[u] != x[u] ? x[u] : V{};
      if (mode == kRnnRelu) h[u] = x[u] > A(0) ? x[u] : nan;
      if (keep) out(gate, u, mode == kRnnTanh ? A(1) - h[u] * h[u] : (x[u] > A(0) ? broadcast<A>(1) : nan));
    }
  }
}

}  // namespace dlkern::cpu::DLKERN_ISA

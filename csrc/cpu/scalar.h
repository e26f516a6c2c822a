// Element types of the CPU column. bfloat16 and float16 are storage only: values are computed in float.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace dlkern {

struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  [[gnu::always_inline]] explicit bfloat16(float value) {
    uint32_t u;
    std::memcpy(&u, &value, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) {
      bits = static_cast<uint16_t>((u >> 16) | 0x40);  // NaN stays NaN
    } else {
      bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);  // round to nearest even
    }
  }
  [[gnu::always_inline]] operator float() const {
    uint32_t u = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &u, 4);
    return value;
  }
};

// IEEE 754's binary16: 5 bits of exponent, 10 of fraction; from 65520 on values round to infinity.
struct float16 {
  uint16_t bits;
  float16() = default;
  [[gnu::always_inline]] explicit float16(float value) {
#if defined(__F16C__)
    bits = static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
    uint32_t u;
    std::memcpy(&u, &value, 4);
    const uint32_t sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    uint32_t h;
    if (u > 0x7f800000u) {
      h = 0x7e00u | ((u >> 13) & 0x3ffu);  // NaN stays NaN, quiet
    } else if (u >= 0x47800000u) {         // 2^16
      h = 0x7c00u;
    } else if (u < 0x38800000u) {  // 2^-14: a sum with 0.5, whose last place is the subnormals' step, rounds to even
      float sum;
      std::memcpy(&sum, &u, 4);
      sum += 0.5f;
      std::memcpy(&u, &sum, 4);
      h = u - 0x3f000000u;
    } else {
      h = (u + 0xfffu + ((u >> 13) & 1u) - 0x38000000u) >> 13;  // the exponent's bias is 112 less
    }
    bits = static_cast<uint16_t>(sign | h);
#endif
  }
  [[gnu::always_inline]] operator float() const {
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    const uint32_t h = bits & 0x7fffu, sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    uint32_t u;
    if (h < 0x400u) {
      const float value = static_cast<float>(static_cast<int32_t>(h)) * 0x1p-24f;
      std::memcpy(&u, &value, 4);
    } else {
      u = (h << 13) + (h < 0x7c00u ? 0x38000000u : 0x70000000u);
      if (h > 0x7c00u) u |= 0x400000u;
    }
    u |= sign;
    float value;
    std::memcpy(&value, &u, 4);
    return value;
#endif
  }
};

// The type sums are carried in: double for double, float for the others.
template <class T> struct accumulate_type {
  using type = float;
};
template <> struct accumulate_type<double> {
  using type = double;
};
template <class T> using acc_t = typename accumulate_type<T>::type;

}  // namespace dlkern

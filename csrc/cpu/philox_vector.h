// Philox (philox.h) a vector of counters at a time, in 64-bit lanes: one instruction makes both halves of a 32 x 32 bit
// product.
#pragma once
#include "../philox.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {

constexpr int kWords = kLanes<float>;  // counters at a time: those with even offsets in one vector, odd ones in another
using vuint64 [[gnu::vector_size(kVectorBytes)]] = uint64_t;

// Products of the low halves of lanes with a 32-bit number; the high halves may hold anything.
inline vuint64 multiply(vuint64 a, uint32_t b) {
#if defined(__AVX512F__)
  return (vuint64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__) && !defined(DLKERN_VECTOR_BYTES)
  return (vuint64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * static_cast<uint64_t>(b);
#endif
}

// The keys of the rounds.
struct Keys {
  uint32_t k0[philox::kRounds], k1[philox::kRounds];
  explicit Keys(uint64_t seed) {
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < philox::kRounds; ++round) {
      k0[round] = low;
      k1[round] = high;
      low += philox::kWeyl0;
      high += philox::kWeyl1;
    }
  }
};

// Philox blocks of the counters in the lanes' low halves; of the results, too, only the low halves mean something.
struct Blocks {
  vuint64 c0, c1, c2, c3;
};

inline void round(Blocks& x, uint32_t k0, uint32_t k1) {
  const vuint64 p0 = multiply(x.c0, philox::kMultiplier0), p1 = multiply(x.c2, philox::kMultiplier1);
  x.c0 = (p1 >> 32) ^ x.c1 ^ k0;
  x.c2 = (p0 >> 32) ^ x.c3 ^ k1;
  x.c1 = p1;
  x.c3 = p0;
}

// Low halves of even and odd lanes in turn.
inline vuint32 interleave(vuint64 even, vuint64 odd) {
  const vuint64 both = (even & 0xffffffffu) | (odd << 32);
  vuint32 words;
  std::memcpy(&words, &both, sizeof words);
  return words;
}

// Four words for kWords consecutive counters starting at `counter`, whose low half does not carry on the way.
inline void philox_words(const Keys& keys, uint64_t counter, vuint32 (&word)[4]) {
  vuint64 lane{};
  for (int i = 0; i < kWords / 2; ++i) lane[i] = static_cast<uint64_t>(2 * i);
  const vuint64 low = lane + (counter & 0xffffffffu), high = vuint64{} + (counter >> 32);
  Blocks even{low, high, vuint64{}, vuint64{}}, odd{low + 1, high, vuint64{}, vuint64{}};
#pragma GCC unroll 10
  for (int r = 0; r < philox::kRounds; ++r) {
    round(even, keys.k0[r], keys.k1[r]);
    round(odd, keys.k0[r], keys.k1[r]);
  }
  word[0] = interleave(even.c0, odd.c0);
  word[1] = interleave(even.c1, odd.c1);
  word[2] = interleave(even.c2, odd.c2);
  word[3] = interleave(even.c3, odd.c3);
}

}  // namespace dlkern::cpu::DLKERN_ISA

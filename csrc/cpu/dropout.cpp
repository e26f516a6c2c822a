// dropout: zero each element with probability p, scale the rest by 1 / (1 - p). The same op with the same
// seed is its own backward, so no mask is stored. Counter-based random numbers (philox.h) are generated a
// vector of counters at a time. Floor: one read and one write of the tensor.
#include "dropout.h"

#include "../philox.h"
#include "parallel.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

constexpr int kWords = kLanes<float>;  // 32-bit counters a vector

// High and low halves of lane-wise 32 x 32 -> 64 bit products.
inline void multiply(vuint32 a, uint32_t b, vuint32& high, vuint32& low) {
  for (int i = 0; i < kWords; ++i) {
    uint64_t product = static_cast<uint64_t>(a[i]) * b;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
}

#if defined(__AVX512F__)
inline void multiply512(__m512i a, __m512i b, __m512i& high, __m512i& low) {
  __m512i even = _mm512_mul_epu32(a, b);
  __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
  low = _mm512_mullo_epi32(a, b);
  high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
}
#endif

// Four words for kWords consecutive counters starting at `counter` (which do not carry into the high half).
inline void philox_words(uint64_t seed, uint64_t counter, vuint32 (&word)[4]) {
  vuint32 c0 = vuint32{} + static_cast<uint32_t>(counter), c1 = vuint32{} + static_cast<uint32_t>(counter >> 32);
  for (int i = 0; i < kWords; ++i) c0[i] += static_cast<uint32_t>(i);
  vuint32 c2{}, c3{};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < philox::kRounds; ++round) {
    vuint32 high0, low0, high1, low1;
#if defined(__AVX512F__)
    __m512i h, l;
    multiply512((__m512i)c0, _mm512_set1_epi32(static_cast<int>(philox::kMultiplier0)), h, l);
    high0 = (vuint32)h;
    low0 = (vuint32)l;
    multiply512((__m512i)c2, _mm512_set1_epi32(static_cast<int>(philox::kMultiplier1)), h, l);
    high1 = (vuint32)h;
    low1 = (vuint32)l;
#else
    multiply(c0, philox::kMultiplier0, high0, low0);
    multiply(c2, philox::kMultiplier1, high1, low1);
#endif
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += philox::kWeyl0;
    k1 += philox::kWeyl1;
  }
  word[0] = c0;
  word[1] = c1;
  word[2] = c2;
  word[3] = c3;
}

template <class T> void run(const DropoutArgs<T>& args) {
  using A = acc_t<T>;
  const uint64_t threshold = philox::threshold(args.p);
  const A scale = static_cast<A>(1.0 / (1.0 - args.p));
  const int64_t groups = (args.count + philox::kGroup - 1) / philox::kGroup;
  parallel_for(groups, 16, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group)
      for (int64_t j = 0; j < philox::kRun; j += kWords) {
        vuint32 word[4];
        philox_words(args.seed, static_cast<uint64_t>(group * philox::kRun + j), word);
        for (int w = 0; w < 4; ++w) {
          const int64_t first = group * philox::kGroup + w * philox::kRun + j;
          if (first >= args.count) break;
          const int lanes = static_cast<int>(args.count - first < kWords ? args.count - first : kWords);
          for (int i = 0; i < lanes; ++i) {
            const A value = static_cast<A>(args.input[first + i]);
            args.output[first + i] = static_cast<T>(word[w][i] >= threshold ? value * scale : A(0));
          }
        }
      }
  });
}

}  // namespace

void dropout(const DropoutArgs<float>& args) { run(args); }
void dropout(const DropoutArgs<double>& args) { run(args); }
void dropout(const DropoutArgs<bfloat16>& args) { run(args); }

}  // namespace dlkern::cpu::DLKERN_ISA

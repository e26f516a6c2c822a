// dropout: zero each element with probability p, scale the rest by 1 / (1 - p). The same op with the same
// seed is its own backward, so no mask is stored. Counter-based random numbers (philox.h) are generated a
// vector of counters at a time, in 64-bit lanes: one instruction makes both halves of a 32 x 32 bit product.
// Floor: one read and one write of the tensor.
#include "dropout.h"

#include "../philox.h"
#include "parallel.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

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

// value * scale where its word is at least the threshold, else 0.
inline vfloat keep(vuint32 word, vuint32 threshold, vfloat value, float scale) {
  return word >= threshold ? value * scale : vfloat{};
}

// Elements [0, count) from `word`, count <= kWords.
template <class T>
inline void drop(const T* input, T* output, int64_t count, vuint32 word, vuint32 threshold, acc_t<T> scale) {
  if constexpr (sizeof(T) == 8) {
    constexpr int lanes = kLanes<double>;
    for (int half = 0; half < 2 && half * lanes < count; ++half) {
      vint64 kept;
      for (int i = 0; i < lanes; ++i) kept[i] = word[half * lanes + i] >= threshold[0] ? -1 : 0;
      const int64_t left = count - half * lanes;
      const int some = static_cast<int>(left < lanes ? left : lanes);
      const vdouble value = some == lanes ? load(input + half * lanes) : load_partial<T>(input + half * lanes, some);
      const vdouble result = kept ? value * scale : vdouble{};
      if (some == lanes)
        store(output + half * lanes, result);
      else
        store_partial<T>(output + half * lanes, result, some);
    }
  } else if (count == kWords) {
    store(output, keep(word, threshold, load(input), scale));
  } else {
    const int some = static_cast<int>(count);
    store_partial<T>(output, keep(word, threshold, load_partial<T>(input, some), scale), some);
  }
}

template <class T> void run(const DropoutArgs<T>& args) {
  const vuint32 threshold = vuint32{} + static_cast<uint32_t>(philox::threshold(args.p));  // below 2^32, since p < 1
  const acc_t<T> scale = static_cast<acc_t<T>>(1.0 / (1.0 - args.p));
  const Keys keys(args.seed);
  const int64_t groups = (args.count + philox::kGroup - 1) / philox::kGroup;
  parallel_for(groups, 8, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group)
      for (int64_t j = 0; j < philox::kRun && group * philox::kGroup + j < args.count; j += kWords) {
        vuint32 word[4];
        philox_words(keys, static_cast<uint64_t>(group * philox::kRun + j), word);
        for (int w = 0; w < 4; ++w) {
          const int64_t first = group * philox::kGroup + w * philox::kRun + j;
          if (first >= args.count) break;
          const int64_t left = args.count - first;
          drop(args.input + first, args.output + first, left < kWords ? left : kWords, word[w], threshold, scale);
        }
      }
  });
}

}  // namespace

void dropout(const DropoutArgs<float>& args) { run(args); }
void dropout(const DropoutArgs<double>& args) { run(args); }
void dropout(const DropoutArgs<bfloat16>& args) { run(args); }

}  // namespace dlkern::cpu::DLKERN_ISA

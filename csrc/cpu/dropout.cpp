// dropout: zero each element with probability p, scale the rest by 1 / (1 - p). The same op with the same
// seed is its own backward, so no mask is stored. Counter-based random numbers (philox_vector.h) are
// generated a vector of counters at a time.
// Floor: one read and one write of the tensor.
#include "dropout.h"

#include "parallel.h"
#include "philox_vector.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

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
          prefetch_ahead_to_store(args.output + first);
          drop(args.input + first, args.output + first, left < kWords ? left : kWords, word[w], threshold, scale);
        }
      }
  });
}

}  // namespace

void dropout(const DropoutArgs<float>& args) { run(args); }
void dropout(const DropoutArgs<double>& args) { run(args); }
void dropout(const DropoutArgs<bfloat16>& args) { run(args); }
void dropout(const DropoutArgs<float16>& args) { run(args); }

}  // namespace dlkern::cpu::DLKERN_ISA

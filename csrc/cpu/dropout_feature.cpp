// Dropout of whole channels: each [n, c] feature of an image batch is scaled by its factor, or zero where that is 0.
// Which ones, dropout.cpp decides, on a tensor of features. Floor: one read and one write of the tensor.
#include "dropout.h"
#include "parallel.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

// y = x * factor of `count` elements, zeros where a factor is 0; factor(i) gives those of the lanes from i on.
template <class T, class F> inline void scale_row(const T* x, T* y, int64_t count, F&& factor) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const Vec<T> f = factor(i);
    store(y + i, f == 0 ? Vec<T>{} : load(x + i) * f);
  }
  if (i < count) {
    const int some = static_cast<int>(count - i);
    const Vec<T> f = factor(i);
    store_partial<T>(y + i, f == 0 ? Vec<T>{} : load_partial<T>(x + i, some) * f, some);
  }
}

template <class T> void run(const FeatureDropoutArgs<T>& args) {
  using A = acc_t<T>;
  constexpr int lanes = kLanes<T>;
  const int64_t c = args.c, inner = args.inner, length = args.channels_last ? c : inner;
  const int64_t grain = 16384 / (length < 16384 ? length : 16384);
  parallel_for(args.n * (args.channels_last ? inner : c), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* x = args.input + i * length;
      T* y = args.output + i * length;
      if (args.channels_last) {
        const A* factors = args.factors + i / inner * c;
        scale_row(x, y, length, [&](int64_t at) {
          if (at + lanes <= c) return load(factors + at);
          Vec<T> some{};
          std::memcpy(&some, factors + at, sizeof(A) * static_cast<size_t>(c - at));
          return some;
        });
      } else {
        const Vec<T> f = broadcast<T>(args.factors[i]);
        scale_row(x, y, length, [&](int64_t) { return f; });
      }
    }
  });
}

}  // namespace

void feature_dropout(const FeatureDropoutArgs<float>& args) { run(args); }
void feature_dropout(const FeatureDropoutArgs<double>& args) { run(args); }
void feature_dropout(const FeatureDropoutArgs<bfloat16>& args) { run(args); }
void feature_dropout(const FeatureDropoutArgs<float16>& args) { run(args); }

}  // namespace dlkern::cpu::DLKERN_ISA

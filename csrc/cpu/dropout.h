#pragma once
#include <cstdint>

#include "isa.h"
#include "scalar.h"

namespace dlkern::cpu {
// output[i] = kept(i) ? input[i] * scale : 0 for i in [0, count); kept(i) by philox.h's contract.
template <class T> struct DropoutArgs {
  const T* input;
  T* output;
  int64_t count;
  double p;
  uint64_t seed;
};
// [n, c, inner] or, channels_last, [n, inner, c]; a factor for each of n * c features, 0 where it is dropped.
template <class T> struct FeatureDropoutArgs {
  const T* input;
  T* output;
  const acc_t<T>* factors;
  int64_t n, c, inner;
  bool channels_last;
};

DLKERN_DECLARE(void, feature_dropout, const FeatureDropoutArgs<float>&)
DLKERN_DECLARE(void, feature_dropout, const FeatureDropoutArgs<double>&)
DLKERN_DECLARE(void, feature_dropout, const FeatureDropoutArgs<bfloat16>&)
DLKERN_DECLARE(void, feature_dropout, const FeatureDropoutArgs<float16>&)
DLKERN_DECLARE(void, dropout, const DropoutArgs<float>&)
DLKERN_DECLARE(void, dropout, const DropoutArgs<double>&)
DLKERN_DECLARE(void, dropout, const DropoutArgs<bfloat16>&)
DLKERN_DECLARE(void, dropout, const DropoutArgs<float16>&)
}  // namespace dlkern::cpu

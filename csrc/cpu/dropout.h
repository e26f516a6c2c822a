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
DLKERN_DECLARE(void, dropout, const DropoutArgs<float>&)
DLKERN_DECLARE(void, dropout, const DropoutArgs<double>&)
DLKERN_DECLARE(void, dropout, const DropoutArgs<bfloat16>&)
}  // namespace dlkern::cpu

// The last step of a fused convolution: activation(output + residual), block by block while the output is in the cache.
#pragma once
#include "activation.h"
#include "conv.h"

namespace dlkern::cpu::DLKERN_ISA {

// out[i] = activation(out[i] + residual[i]) for `count` neighbouring elements; residual may be null.
template <class T> inline void finish_run(T* out, const T* residual, int64_t count, int activation) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t i = 0; i < count; i += lanes) {
    const int some = static_cast<int>(count - i < lanes ? count - i : lanes);
    Vec<T> value = some == lanes ? load(out + i) : load_partial<T>(out + i, some);
    if (residual) value += some == lanes ? load(residual + i) : load_partial<T>(residual + i, some);
    value = activate(value, activation);
    if (some == lanes)
      store(out + i, value);
    else
      store_partial<T>(out + i, value, some);
  }
}

}  // namespace dlkern::cpu::DLKERN_ISA

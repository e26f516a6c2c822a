// Activations that kernels fuse into their last step, by the number the schemas carry
// (dlkern/ops/_activation.py): applied to a vector, and their derivative from the activation's own output.
#pragma once
#include "simd.h"

namespace dlkern::cpu {
enum Activation : int { kNone = 0, kRelu = 1, kTanh = 2, kSigmoid = 3 };
}

namespace dlkern::cpu::DLKERN_ISA {

template <class V> inline V activate(V x, int activation) {
  switch (activation) {
    case kRelu: return x <= 0 ? V{} : x;  // NaN stays
    case kTanh: return tanh(x);
    case kSigmoid: return sigmoid(x);
    default: return x;
  }
}

// grad * activation'(z), where y = activation(z).
template <class V> inline V activation_backward(V grad, V y, int activation) {
  switch (activation) {
    case kRelu: return y <= 0 ? V{} : grad;
    case kTanh: return grad * (1 - y * y);
    case kSigmoid: return grad * y * (1 - y);
    default: return grad;
  }
}

}  // namespace dlkern::cpu::DLKERN_ISA

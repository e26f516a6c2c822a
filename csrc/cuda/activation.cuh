// Activations that kernels fuse into their last step, by the number the schemas carry (dlkern/ops/_activation.py):
// 0 none, 1 relu, 2 tanh, 3 sigmoid; and their derivatives from the activation's own output.
#pragma once
#include "platform.cuh"

namespace dlkern::cuda {

DLKERN_DEVICE float activated(float value, int activation) {
  if (activation == 1) return value > 0.0f || value != value ? value : 0.0f;
  if (activation == 2) return tanhf(value);
  if (activation == 3) return 1.0f / (1.0f + expf(-value));
  return value;
}

// grad * activation'(z), where y = activation(z).
DLKERN_DEVICE float activation_gradient(float grad, float y, int activation) {
  if (activation == 1) return y <= 0.0f ? 0.0f : grad;
  if (activation == 2) return grad * (1.0f - y * y);
  if (activation == 3) return grad * y * (1.0f - y);
  return grad;
}

}  // namespace dlkern::cuda

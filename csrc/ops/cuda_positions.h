// Rotary positions in the CUDA column, for its other op layers.
#pragma once
#include "cuda_common.h"

namespace dlkern::ops {

// x [a, b, length, depth] with its pairs turned, of valid arguments: cos and sin have at least `length` positions.
Tensor turned_cuda(const char* op, const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved,
                   bool inverse);

}  // namespace dlkern::ops

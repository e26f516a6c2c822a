// Sums that conv's kernels cut into parts: gradients of weights and biases, of linear's float32 too.
#pragma once
#include "../cuda/conv.h"
#include "cuda_common.h"

namespace dlkern::ops {

// kernel(sums) writes `size` elements at `result`, or, given sums, `count` parts of them there, which are added here
// in order.
template <class Kernel>
void in_parts(Call& call, cuda::Element element, int count, int64_t size, const Tensor& like, void* result,
              Kernel kernel) {
  if (count <= 1) return kernel(nullptr);
  const Tensor parts = allocate({count, size}, ScalarType::Float, like);
  float* sums = static_cast<float*>(call.writes(parts));
  kernel(sums);
  cuda::conv2d_sum_parts(element, sums, count, size, result, call.stream());
}

}  // namespace dlkern::ops

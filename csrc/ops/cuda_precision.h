// Whether products of float32 are exact or TF32's, by torch's own settings.
#pragma once
#include "cuda_common.h"

namespace dlkern::ops {

enum class Products { convolutions, matrices };

// x's element, which was checked; tf32 for float32 where torch's setting for such products allows it.
cuda::Element product_element(const Tensor& x, Products which);

}  // namespace dlkern::ops

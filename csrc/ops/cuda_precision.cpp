#include "cuda_precision.h"

namespace dlkern::ops {
namespace {

// Torch's stable ABI does not tell these settings, so Python does (dlkern/_native.py): 1 where TF32 is allowed for
// convolutions (0) or matrix products (1). Without Python nothing is rounded.
int (*source)(int) = nullptr;

}  // namespace

extern "C" [[gnu::visibility("default")]] void dlkern_set_tf32_source(int (*function)(int)) { source = function; }

cuda::Element product_element(const Tensor& x, Products which) {
  if (x.scalar_type() != ScalarType::Float) return element_of(x);
  return source && source(static_cast<int>(which)) ? cuda::Element::tf32 : cuda::Element::float32;
}

}  // namespace dlkern::ops

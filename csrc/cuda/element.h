// The element types of tensors that launchers are told of, in plain C++ for the op layer.
#pragma once

namespace dlkern::cuda {

enum class Element { float32, bfloat16, float16 };

}  // namespace dlkern::cuda

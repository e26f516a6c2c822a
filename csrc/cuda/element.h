// The element types of tensors that launchers are told of, in plain C++ for the op layer.
#pragma once

namespace dlkern::cuda {

// tf32: float32, of which products may round their operands to TF32 (10 bits of fraction). Products alone know it.
enum class Element { float32, bfloat16, float16, tf32 };
constexpr bool is_16_bit(Element element) { return element == Element::bfloat16 || element == Element::float16; }

}  // namespace dlkern::cuda

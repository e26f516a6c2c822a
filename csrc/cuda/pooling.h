// Launchers of pooling.cu, pooling_adaptive_max.cu and pooling_lp.cu, in plain C++ for the op layer. Each throws std::runtime_error where its launch fails.
#pragma once
#include <cstdint>

#include "element.h"

namespace dlkern::cuda {

// One spatial axis of a pooling.
struct PoolAxis {
  int size, out_size, kernel, stride, padding, dilation;
};

// Both layouts are [outer, height, width, inner]: contiguous has outer = N * C, inner = 1; channels_last outer = N,
// inner = C. Of one image or plane, a launch numbers fewer than 2**31 packs; those of more throw.
struct PoolGeometry {
  int64_t outer, inner;
  PoolAxis height, width;
};

enum class PoolIndices { none, window_offset, flat };  // none, uint8 r * kernel_w + s, int64 h * width + w

void max_pool2d_forward(Element element, const PoolGeometry& geometry, const void* input, void* output,
                        PoolIndices kind, void* indices, void* stream);
void max_pool2d_backward(Element element, const PoolGeometry& geometry, const void* grad_output, PoolIndices kind,
                         const void* indices, void* grad_input, void* stream);

// What a window's sum is divided by: divisor_override where it is not 0, else the window's size with or without
// padding. `adaptive`: windows are those of adaptive pooling; kernel, stride and padding are not looked at.
struct AverageRule {
  bool adaptive, count_include_pad;
  int divisor_override;
};

void avg_pool2d_forward(Element element, const PoolGeometry& geometry, const AverageRule& rule, const void* input,
                        void* output, void* stream);
void avg_pool2d_backward(Element element, const PoolGeometry& geometry, const AverageRule& rule,
                         const void* grad_output, void* grad_input, void* stream);

// `indices`: h * width + w, as many as the output has elements. A plane of the input has fewer than 2**31 elements.
void adaptive_max_pool2d_forward(Element element, const PoolGeometry& geometry, const void* input, void* output,
                                 int64_t* indices, void* stream);
void adaptive_max_pool2d_backward(Element element, const PoolGeometry& geometry, const void* grad_output,
                                  const int64_t* indices, void* grad_input, void* stream);

// The geometry has no padding and no dilation. `slopes`: memory for as many doubles as the output has elements, or
// floats where lp_pool2d_is_in_double says no.
inline bool lp_pool2d_is_in_double(double norm) { return norm != 1.0 && norm != 2.0; }
void lp_pool2d_forward(Element element, const PoolGeometry& geometry, double norm, const void* input, void* output,
                       void* stream);
void lp_pool2d_backward(Element element, const PoolGeometry& geometry, double norm, const void* grad_output,
                        const void* input, void* slopes, void* grad_input, void* stream);

}  // namespace dlkern::cuda

// Convolution in groups of 2, 4, 8 or 16 channels (as far as they fit a vector), as many out as in: conv_grouped.cpp.
// Each function says whether it did the work.
#pragma once
#include "conv.h"

namespace dlkern::cpu::DLKERN_ISA {

#define DLKERN_GROUPED(T)                                            \
  bool grouped_forward(const ConvForwardArgs<T>& args);              \
  bool grouped_backward_input(const ConvBackwardInputArgs<T>& args); \
  bool grouped_backward_weight(const ConvBackwardWeightArgs<T>& args);
DLKERN_GROUPED(float)
DLKERN_GROUPED(double)
DLKERN_GROUPED(bfloat16)
DLKERN_GROUPED(float16)
#undef DLKERN_GROUPED

}  // namespace dlkern::cpu::DLKERN_ISA

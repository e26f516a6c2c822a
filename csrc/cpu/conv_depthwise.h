// Depthwise convolution: every output channel sees one input channel, so there is no sum over channels and nothing for
// the matrix kernels. Two files, a layout each: conv_depthwise_last.cpp (vectors of channels) and
// conv_depthwise_planar.cpp (vectors of columns).
//
// Each function says whether it did the work: it does where channels and groups are as many and both images have the
// layout of the file.
#pragma once
#include "conv.h"
#include "conv_taps.h"

namespace dlkern::cpu::DLKERN_ISA {

#define DLKERN_DEPTHWISE(T)                                                   \
  bool depthwise_last_forward(const ConvForwardArgs<T>& args);                \
  bool depthwise_last_backward_input(const ConvBackwardInputArgs<T>& args);   \
  bool depthwise_last_backward_weight(const ConvBackwardWeightArgs<T>& args); \
  bool depthwise_planar_forward(const ConvForwardArgs<T>& args);              \
  bool depthwise_planar_backward_input(const ConvBackwardInputArgs<T>& args); \
  bool depthwise_planar_backward_weight(const ConvBackwardWeightArgs<T>& args);
DLKERN_DEPTHWISE(float)
DLKERN_DEPTHWISE(double)
DLKERN_DEPTHWISE(bfloat16)
DLKERN_DEPTHWISE(float16)
#undef DLKERN_DEPTHWISE

template <class T> inline bool depthwise_forward(const ConvForwardArgs<T>& args) {
  return depthwise_last_forward(args) || depthwise_planar_forward(args);
}
template <class T> inline bool depthwise_backward_input(const ConvBackwardInputArgs<T>& args) {
  return depthwise_last_backward_input(args) || depthwise_planar_backward_input(args);
}
template <class T> inline bool depthwise_backward_weight(const ConvBackwardWeightArgs<T>& args) {
  return depthwise_last_backward_weight(args) || depthwise_planar_backward_weight(args);
}

}  // namespace dlkern::cpu::DLKERN_ISA

// Launchers of conv_depthwise.cu, for conv.cu: convolutions with one input channel a group. As in conv.h.
#pragma once
#include "conv.h"

namespace dlkern::cuda {

void depthwise_forward(Element element, const ConvGeometry& geometry, const ConvTensor& x, const ConvTensor& w,
                       const void* bias, const void* residual, int activation, const ConvResult& y, void* stream);
void depthwise_backward_input(Element element, const ConvGeometry& geometry, const ConvTensor& dy, const ConvTensor& w,
                              const void* bias, const ConvResult& dx, void* stream);
int depthwise_weight_parts(Element element, const ConvGeometry& geometry);
void depthwise_backward_weight(Element element, const ConvGeometry& geometry, const ConvTensor& dy, const ConvTensor& x,
                               float* parts, const ConvResult& dw, void* stream);

}  // namespace dlkern::cuda

// Launchers of conv.cu and conv_depthwise.cu, in plain C++ for the op layer. float32, bfloat16 and float16,
// both memory formats through strides. Each throws std::runtime_error where its launch fails.
#pragma once
#include <cstdint>

#include "element.h"

namespace dlkern::cuda {

// Sizes of y[n,k,p,q] = bias[k] + sum over c,r,s of w[k,c,r,s] x[n, c, p*sh - ph + r*dh, q*sw - pw + s*dw], w's c counting
// the channels of k's group. Every extent with its padding, and every filter's reach, is below 2**30.
struct ConvGeometry {
  int64_t n, c, k, groups;
  int h, w, r, s, p, q;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  // Depthwise: one input channel a group. Those have kernels of their own (conv_depthwise.cu).
  bool depthwise() const { return groups > 1 && c == groups; }
};

// A 4-D tensor's data and strides in elements: [n, c, h, w], or [k, c, r, s] for a weight.
template <class Void>
struct ConvTensorOf {
  Void* data;
  int64_t n, c, h, w;
};
using ConvTensor = ConvTensorOf<const void>;
using ConvResult = ConvTensorOf<void>;

// Whether the kernels load 16 bytes of channels at once, where images and weights are channels_last and 16-byte aligned.
bool conv2d_takes_vectors(Element element, const ConvGeometry& geometry);

// y = activation(conv(x, w) + bias + residual); bias and residual may be null, a residual has y's strides.
// activation: 0 none, 1 relu, 2 tanh, 3 sigmoid.
void conv2d_forward(Element element, const ConvGeometry& geometry, const ConvTensor& x, const ConvTensor& w,
                    const void* bias, const void* residual, int activation, const ConvResult& y, void* stream);

// The gradient of x, plus bias[c] where that is not null: a transposed convolution.
void conv2d_backward_input(Element element, const ConvGeometry& geometry, const ConvTensor& dy, const ConvTensor& w,
                           const void* bias, const ConvResult& dx, void* stream);

// The gradient of w. The sum over pixels is cut into conv2d_weight_parts; where that is more than 1, `parts` holds so
// many times the floats of dw, and their sum in a fixed order is dw.
int conv2d_weight_parts(Element element, const ConvGeometry& geometry);
void conv2d_backward_weight(Element element, const ConvGeometry& geometry, const ConvTensor& dy, const ConvTensor& x,
                            float* parts, const ConvResult& dw, void* stream);

// grad_bias[k] = the sum of dy over images and pixels; `parts` holds conv2d_bias_parts * k floats where those exceed 1.
int conv2d_bias_parts(const ConvGeometry& geometry);
void conv2d_backward_bias(Element element, const ConvGeometry& geometry, const ConvTensor& dy, float* parts,
                          void* grad_bias, void* stream);

// result[i] = sum over parts of parts[part * count + i].
void conv2d_sum_parts(Element element, const float* parts, int count_of_parts, int64_t count, void* result,
                      void* stream);

// The same by conv_sm90.cu, where the GPU is a Hopper and the tensors fit it; false where nothing was done.
bool conv2d_forward_sm90(Element element, const ConvGeometry& geometry, const ConvTensor& x, const ConvTensor& w,
                         const void* bias, const void* residual, int activation, const ConvResult& y, void* stream);
bool conv2d_backward_input_sm90(Element element, const ConvGeometry& geometry, const ConvTensor& dy,
                                const ConvTensor& w, const void* bias, const ConvResult& dx, void* stream);
// Of `count` parts of `length` pixels, a multiple of 64; `parts` null where there is one.
bool conv2d_backward_weight_sm90(Element element, const ConvGeometry& geometry, const ConvTensor& dy,
                                 const ConvTensor& x, float* parts, int count, int64_t length, const ConvResult& dw,
                                 void* stream);
// Blocks that it makes of one part; 0 where conv_sm90.cu does not serve.
int64_t conv2d_weight_tiles_sm90(Element element, const ConvGeometry& geometry);

}  // namespace dlkern::cuda

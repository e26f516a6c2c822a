#pragma once
#include <cstdint>

#include "isa.h"
#include "scalar.h"

namespace dlkern::cpu {

// Sizes of y[n,k,p,q] = bias[k] + sum over c,r,s of w[k,c,r,s] x[n, c, p*sh - ph + r*dh, q*sw - pw + s*dw],
// w's c counting the channels of k's group. The op layer has checked that they fit together.
struct ConvShape {
  int64_t n, c, h, w;              // input
  int64_t k, r, s;                 // output channels, kernel
  int64_t p, q;                    // output
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
};

// Input, output and their gradients are dense, in the layout their flag says; the weight and its gradient dense
// in either, by its own flag. Dense channels_last of [K, C, R, S] is K, R, S, C in memory.
template <class T> struct ConvForwardArgs {
  ConvShape shape;
  const T* input;
  const T* weight;
  const T* bias;  // or null
  T* output;
  bool input_channels_last, weight_channels_last, output_channels_last;
  const acc_t<T>* packed;  // what conv2d_pack made of the weight, or null
  const T* residual;  // added to the output, whose layout it has; or null
  int activation;  // then applied
};
// A transposed convolution's forward is this, too: then there is a bias of the input's channels.
template <class T> struct ConvBackwardInputArgs {
  ConvShape shape;
  const T* grad_output;
  const T* weight;
  const T* bias;  // or null
  T* grad_input;
  bool grad_output_channels_last, weight_channels_last, grad_input_channels_last;
};
template <class T> struct ConvBackwardWeightArgs {
  ConvShape shape;
  const T* grad_output;
  const T* input;
  T* grad_weight;
  T* grad_bias;  // or null
  bool grad_output_channels_last, input_channels_last, grad_weight_channels_last;
};

// The weight as the dense kernel reads it; conv2d_pack returns how many elements that are, of the shape's k, c, r, s and
// groups alone, and only counts them where packed is null.
template <class T> struct ConvPackArgs {
  ConvShape shape;
  const T* weight;
  bool weight_channels_last;
  acc_t<T>* packed;
};
// grad_bias[k] = sum of grad_output[:, k], of n images with p x q pixels.
template <class T> struct ConvBackwardBiasArgs {
  int64_t n, k, p, q;
  const T* grad_output;
  bool channels_last;
  T* grad_bias;
};

#define DLKERN_DECLARE_CONV(T)                                                   \
  DLKERN_DECLARE(int64_t, conv2d_pack, const ConvPackArgs<T>&)                   \
  DLKERN_DECLARE(void, conv2d_forward, const ConvForwardArgs<T>&)                \
  DLKERN_DECLARE(void, conv2d_backward_input, const ConvBackwardInputArgs<T>&)   \
  DLKERN_DECLARE(void, conv2d_backward_weight, const ConvBackwardWeightArgs<T>&) \
  DLKERN_DECLARE(void, conv2d_backward_bias, const ConvBackwardBiasArgs<T>&)
DLKERN_DECLARE_CONV(float)
DLKERN_DECLARE_CONV(double)
DLKERN_DECLARE_CONV(bfloat16)
DLKERN_DECLARE_CONV(float16)
#undef DLKERN_DECLARE_CONV

}  // namespace dlkern::cpu

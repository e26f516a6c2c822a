#pragma once
#include <cstdint>

#include "isa.h"
#include "scalar.h"

namespace dlkern::cpu {

enum AttentionScore { kDotScore = 0, kGaussianScore = 1, kAdditiveScore = 2, kCosineScore = 3 };
enum AttentionMask { kNoMask = 0, kBoolMask = 1, kOwnMask = 2, kFloatMask = 3 };  // kOwnMask: of the type of query

// Element (b, h, i, j) lies at data[b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3]]; strides may be 0.
template <class P> struct Strided {
  P* data;
  int64_t stride[4];
};

struct AttentionShape {
  int64_t batch, heads, key_heads, queries, keys, depth, value_depth;
  int score;
  double scale, softcap;   // softcap 0: none
  int64_t left, right;     // query i sees keys i + shift - left .. i + shift + right; -1: no bound
  int64_t shift;
  double p;                // of dropout
  uint64_t seed;
  int mask;
  int64_t mask_size[4];    // each the attention's or 1
  bool from_scores = false;  // of a backward: torch has the matrix of scores of this call in memory
};

// Rotary positions: query i and key j are turned by the angles of i and j, in [batch, positions, half].
template <class A> struct AttentionRotary {
  const A *cos, *sin;  // null: none
  int64_t batch_stride, half;
  bool interleaved;
};

template <class T> struct AttentionArgs {
  AttentionShape shape;
  Strided<const T> query, key, value;
  Strided<const void> mask;
  Strided<const int64_t> lengths;  // keys a query sees: (b, -, i, -); or null
  const acc_t<T>* slopes;          // [heads], of -slope |i - j|; or null
  const acc_t<T>* weight;          // [depth], of the additive score
  AttentionRotary<acc_t<T>> rotary;  // of the dot score
  Strided<T> output;
  acc_t<T>* largest;               // [batch, heads, queries] each: the two halves of the log-sum-exp,
  acc_t<T>* inverse;               // the largest score and 1 / sum(exp(score - largest))
};

template <class T> struct AttentionBackwardArgs {
  AttentionArgs<T> forward;
  Strided<const T> grad_output;
  Strided<T> grad_query, grad_key, grad_value;  // dense in depth
  void* grad_mask;                        // contiguous, in the mask's shape and type; or null
  acc_t<T>* grad_weight;                  // [depth]; or null
};

#define DLKERN_ATTENTION(T)                                        \
  DLKERN_DECLARE(void, attention_forward, const AttentionArgs<T>&) \
  DLKERN_DECLARE(void, attention_backward, const AttentionBackwardArgs<T>&)
DLKERN_ATTENTION(float)
DLKERN_ATTENTION(double)
DLKERN_ATTENTION(bfloat16)
DLKERN_ATTENTION(float16)
#undef DLKERN_ATTENTION
}  // namespace dlkern::cpu

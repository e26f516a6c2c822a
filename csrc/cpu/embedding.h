#pragma once
#include <cstdint>

#include "isa.h"
#include "scalar.h"

namespace dlkern::cpu {
// Rows `indices` of a table of `width` numbers a row, each row `weight_stride` after the one before.
template <class T> struct EmbeddingArgs {
  int64_t count, width, weight_stride;
  const int64_t* indices;
  const T* weight;
  T* output;  // [count, width]
};
template <class T> struct EmbeddingBackwardArgs {
  int64_t count, rows, width;
  const int64_t* indices;
  const T* grad_output;  // [count, width]
  int64_t padding_idx;   // this row's gradient is zero; out of range for none
  bool scale_grad_by_freq;
  T* grad_weight;  // [rows, width]
};
#define DLKERN_EMBEDDING(T)                                \
  DLKERN_DECLARE(void, embedding, const EmbeddingArgs<T>&) \
  DLKERN_DECLARE(void, embedding_backward, const EmbeddingBackwardArgs<T>&)
DLKERN_EMBEDDING(float)
DLKERN_EMBEDDING(double)
DLKERN_EMBEDDING(bfloat16)
DLKERN_EMBEDDING(float16)
#undef DLKERN_EMBEDDING
}  // namespace dlkern::cpu

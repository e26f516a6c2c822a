// Launchers of embedding.cu, in plain C++ for the op layer. Each throws std::runtime_error where its launch fails.
#pragma once
#include <cstdint>

#include "element.h"

namespace dlkern::cuda {

// Rows `indices` of a table [rows, width] with `stride` elements from one row to the next.
struct Embedding {
  int64_t count, rows, width, stride;
  bool wide_indices;  // int64, else int32
  const void *indices, *weight;
  void* output;  // [count, width]
  int64_t element_bytes;
};
void embedding_forward(const Embedding& args, void* stream);

// keys[i]: the row position i is of, or kNoRow where it adds to none: outside the table, or the padding's.
constexpr int32_t kNoRow = 0x7fffffff;  // behind all rows
void embedding_keys(int64_t count, int64_t rows, int64_t padding_idx, bool wide_indices, const void* indices,
                    int32_t* keys, void* stream);

struct EmbeddingBackward {
  Element element;
  int64_t count, width;
  const int32_t* keys;     // sorted
  const int64_t* order;    // the position each key is of
  const void* grad_output;  // [count, width]
  bool scale_grad_by_freq;
  float* parts;       // embedding_parts(count) rows of `width`
  void* grad_weight;  // zeros: rows that do not occur are left as they are
};
int64_t embedding_parts(int64_t count);
void embedding_backward(const EmbeddingBackward& args, void* stream);

}  // namespace dlkern::cuda

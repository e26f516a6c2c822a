// Launchers of embedding.cu, in plain C++ for the op layer. Each throws std::runtime_error where its launch fails.
#pragma once
#include <cstdint>

#include "element.h"

namespace dlkern::cuda {

// A table of `rows` rows of `width` numbers, looked up at `count` positions, count below 2^31.
struct EmbeddingTable {
  Element element;
  int64_t count, rows, width;
};

// Positions whose index is outside the table get NaN. `stride`: from a row of the table to the next.
void embedding_forward(const EmbeddingTable& shape, const void* table, int64_t stride, const int64_t* index,
                       void* output, void* stream);

// How many floats `parts` of the backward has.
int64_t embedding_parts(const EmbeddingTable& shape);

// `sorted`: the indices in rising order; `order`: the position of each, rising within a row. Only rows that occur are
// written, but padding_idx. `scaled`: the sum of a row is divided by how often it occurs.
void embedding_backward(const EmbeddingTable& shape, const void* grad_output, const int64_t* sorted,
                        const int64_t* order, int64_t padding_idx, bool scaled, float* parts, void* grad_table,
                        void* stream);

}  // namespace dlkern::cuda

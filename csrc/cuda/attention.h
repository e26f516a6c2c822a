// Launchers of attention.cu and attention_backward.cu, in plain C++ for the op layer: attention of every score,
// float32, bfloat16 or float16. Each throws std::runtime_error where its launch fails.
#pragma once
#include <cstdint>

#include "element.h"

namespace dlkern::cuda {

// Numbered as in csrc/cpu/attention.h.
enum AttentionScore { kDotScore = 0, kGaussianScore = 1, kAdditiveScore = 2, kCosineScore = 3 };
enum AttentionMask { kNoMask = 0, kBoolMask = 1, kOwnMask = 2, kFloatMask = 3 };

// [batch, heads, length, depth], or a mask's [batch, heads, queries, keys]; strides are 0 where a size is 1.
struct AttentionOperand {
  const void* data;
  int64_t stride[4];
};

// Angles of rotary positions, dense [1 or batch, positions, half]; floats where `wide`, else of the operands' type.
struct AttentionAngles {
  const void *cos, *sin;  // null: none
  int64_t batch_stride, half;
  bool wide, neighbours;  // pairs are (2d, 2d + 1), else (d, d + half)
};

// slopes and weight are floats where their `wide` is set, else of the operands' type.
struct Attention {
  Element element;
  int score, mask;
  int64_t batch, heads, key_heads, queries, keys, depth, value_depth;
  double scale, softcap, p;
  int64_t left, right;  // query i sees keys i - left .. i + right; -1: no bound
  AttentionOperand query, key, value, mask_at;
  const int64_t* lengths;  // of (batch, query), or null
  int64_t lengths_stride[2];
  const void *slopes, *weight;
  bool wide_slopes, wide_weight;
  const int64_t* seed;
  AttentionAngles angles;  // of the dot score, where attention_turns() says so
  float *query_unit, *key_unit;  // cosine: working memory, reciprocals of lengths, [batch, heads, length]
  float *largest, *inverse;  // [batch, heads, queries]: the largest score and 1 / sum(exp(score - largest))
};

// Rows first_row .. of one of several sequences that lie one after another: kAttentionTileRows of them, or as many as
// Hopper's kernels want.
struct AttentionTile {
  int sequence, first_query, first_key, queries, keys, first_row;
};
constexpr int kAttentionTileRows = 64, kAttentionHopperRows = 128;
struct AttentionTiles {
  const AttentionTile* at;  // on the device
  int64_t count;
};
struct AttentionTables {
  AttentionTiles of_hopper, others;  // those of sequences that Hopper's kernels take, and of the others
};
constexpr int kAttentionFewKeys = 128;  // the backward goes through so many twice

// Whether the launchers below take a call with rotary positions, without the gradient of a mask. They do not where heads
// are beyond one block of columns, since pairs would cross blocks; and where the same call without positions has Hopper's
// kernels, whose operands are copied by hardware: to turn first costs less than to do without those.
bool attention_turns(const Attention& attention);

// output: in any order of batch, heads and queries, values last.
void attention_forward(const Attention& attention, const AttentionOperand& output, void* stream);

// Parts of the weight's gradient that attention_backward wants room for, each of `depth` floats.
int64_t attention_weight_parts(const Attention& attention);

struct AttentionBackward {
  AttentionOperand grad_output, output;
  bool of_mask, wide_grad_weight;
  bool from_scores;  // torch has the matrix of scores of this call in memory
  int64_t mask_size[4];
  float* delta;  // working memory, [batch, heads, queries]
  void *grad_query, *grad_key;  // dense; floats for the cosine score, whose
  void *unit_query, *unit_key;  // gradients these are (else null)
  void *grad_value, *grad_mask, *grad_weight;  // dense; the latter two may be null
  float* weight_parts;
};
void attention_backward(const Attention& attention, const AttentionBackward& tensors, void* stream);

// Of sequences, dot scores alone: `attention` has their tokens as one long sequence of batch 1, windows are aligned at a
// sequence's last query and key, and sequence b drops what seed + b does. Statistics and delta are [heads, queries] of
// each sequence in turn, gradients [tokens, heads, depth].
void attention_varlen_forward(const Attention& attention, const AttentionTables& tiles, const AttentionOperand& output,
                              void* stream);
void attention_varlen_backward(const Attention& attention, const AttentionTables& of_queries,
                               const AttentionTables& of_keys, const AttentionBackward& tensors, void* stream);

// attention_forward and attention_backward by attention_sm90.cu and attention_backward_sm90.cu, where the GPU is a Hopper
// and the call fits them; false where nothing was done.
bool attention_forward_sm90(const Attention& attention, const AttentionOperand& output, void* stream);
bool attention_backward_sm90(const Attention& attention, const AttentionBackward& tensors, void* stream);
bool attention_fits_sm90(const Attention& attention);  // at least the forward does

// Of sequences: whether Hopper's kernels take all of them, forward, and those of more than kAttentionFewKeys keys, backward,
// where these make so many tiles; and the launches, of tiles that are theirs.
bool attention_varlen_forward_fits_sm90(const Attention& attention, const AttentionOperand& output, int64_t tiles);
bool attention_varlen_backward_fits_sm90(const Attention& attention, const AttentionBackward& tensors,
                                         int64_t query_tiles, int64_t key_tiles);
void attention_varlen_forward_sm90(const Attention& attention, const AttentionTiles& tiles,
                                   const AttentionOperand& output, void* stream);
void attention_varlen_backward_sm90(const Attention& attention, const AttentionTiles& of_queries,
                                    const AttentionTiles& of_keys, const AttentionBackward& tensors, void* stream);

}  // namespace dlkern::cuda

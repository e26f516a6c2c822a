// What the op layers of attention share: the checks of a call, and the result's layout. Operands are 4-D, [batch, heads,
// length, depth] with any strides; masks are 4-D with sizes that broadcast.
#pragma once
#include <algorithm>

#include "../cpu/attention.h"
#include "common.h"

namespace dlkern::ops {

struct AttentionOperands {
  const Tensor &query, &key, &value;
  const std::optional<Tensor>&mask, &lengths, &slopes, &weight, &seed;
};
struct AttentionOptions {
  double p, scale, softcap;
  int64_t left, right, score;
};

// A call's sizes and settings, checked; the seed is left to the caller. check_place(op, name, tensor) refuses a tensor that
// is elsewhere.
template <class Place>
cpu::AttentionShape check_attention(const char* op, const AttentionOperands& x, const AttentionOptions& options,
                                    Place&& check_place) {
  const auto check_operand = [&](const char* name, const Tensor& t) {
    check_place(op, name, t);
    check(t.scalar_type() == x.query.scalar_type(), op, ": ", name, " differs in dtype");
    check(t.dim() == 4, op, ": ", name, " has ", t.dim(), " dimensions, expected 4");
  };
  check_operand("query", x.query);
  check_operand("key", x.key);
  check_operand("value", x.value);
  cpu::AttentionShape s{};
  s.batch = x.query.size(0);
  s.heads = x.query.size(1);
  s.queries = x.query.size(2);
  s.depth = x.query.size(3);
  s.key_heads = x.key.size(1);
  s.keys = x.key.size(2);
  s.value_depth = x.value.size(3);
  check(x.key.size(0) == s.batch && x.value.size(0) == s.batch, op, ": batches differ");
  check(x.value.size(1) == s.key_heads && x.value.size(2) == s.keys, op, ": key and value differ in heads or length");
  check(x.key.size(3) == s.depth, op, ": query has depth ", s.depth, ", key ", x.key.size(3));
  check(s.heads == 0 || (s.key_heads > 0 && s.heads % s.key_heads == 0), op, ": ", s.key_heads,
        " heads of keys do not divide ", s.heads, " of queries");
  check<std::invalid_argument>(options.p >= 0 && options.p <= 1,
                               "dropout probability has to be between 0 and 1, but got ", options.p);
  check<std::invalid_argument>(options.score >= 0 && options.score <= 3, op, ": no score ", options.score);
  check<std::invalid_argument>(options.softcap >= 0, op, ": softcap must not be negative, got ", options.softcap);
  check<std::invalid_argument>(options.left >= -1 && options.right >= -1, op,
                               ": a window's sides are at least 0, or -1 for none");
  s.score = static_cast<int>(options.score);
  s.scale = options.scale;
  s.softcap = options.softcap;
  s.left = options.left >= s.queries ? -1 : options.left;
  s.right = options.right >= s.keys ? -1 : options.right;
  s.p = options.p;
  if (s.p > 0) {
    check(x.seed && x.seed->numel() == 1 && x.seed->scalar_type() == ScalarType::Long, op,
          ": dropout wants a seed of one int64");
    check_place(op, "seed", *x.seed);
  }
  if (x.mask) {
    const ScalarType dtype = x.mask->scalar_type();
    s.mask = dtype == ScalarType::Bool        ? cpu::kBoolMask
             : dtype == x.query.scalar_type() ? cpu::kOwnMask
             : dtype == ScalarType::Float     ? cpu::kFloatMask
                                              : cpu::kNoMask;
    check(s.mask != cpu::kNoMask, op, ": mask must be bool, float32 or of query's dtype");
    check_place(op, "mask", *x.mask);
    const int64_t full[4] = {s.batch, s.heads, s.queries, s.keys};
    bool fits = x.mask->dim() == 4;
    for (int d = 0; fits && d < 4; ++d) {
      s.mask_size[d] = x.mask->size(d);
      fits = x.mask->size(d) == full[d] || x.mask->size(d) == 1;
    }
    check(fits, op, ": mask does not broadcast to [batch, heads, queries, keys]");
  }
  if (x.lengths) {
    check_place(op, "lengths", *x.lengths);
    check(x.lengths->scalar_type() == ScalarType::Long && x.lengths->dim() == 2 && x.lengths->size(0) == s.batch &&
              (x.lengths->size(1) == 1 || x.lengths->size(1) == s.queries),
          op, ": lengths must be int64 [batch, 1] or [batch, queries]");
  }
  const auto check_parameter = [&](const char* name, const std::optional<Tensor>& t, int64_t size) {
    if (!t) return;
    check_place(op, name, *t);
    check(t->dim() == 1 && t->size(0) == size, op, ": ", name, " is not [", size, "]");
    check(t->scalar_type() == x.query.scalar_type() || t->scalar_type() == sum_type(x.query), op, ": ", name,
          " differs in dtype");
  };
  check_parameter("slopes", x.slopes, s.heads);
  check_parameter("weight", x.weight, s.depth);
  check(x.weight.has_value() == (s.score == cpu::kAdditiveScore), op, ": weight is for the additive score");
  return s;
}

// What a call with rotary positions has besides: angles [1 or batch, 1, positions, half].
struct AttentionRotary {
  const Tensor &cos, &sin;
  bool interleaved;
};
template <class Place>
void check_attention_rotary(const char* op, const Tensor& query, const cpu::AttentionShape& s,
                            const AttentionRotary& rotary, Place&& check_place) {
  const Tensor &cos = rotary.cos, &sin = rotary.sin;
  check_place(op, "cos", cos), check_place(op, "sin", sin);
  check(cos.dim() == 4 && same_sizes(cos.sizes(), sin.sizes()), op, ": cos and sin must be 4-D and alike in shape");
  check((cos.size(0) == 1 || cos.size(0) == s.batch) && cos.size(1) == 1 &&
            cos.size(2) >= std::max(s.queries, s.keys) && 2 * cos.size(3) <= s.depth,
        op, ": cos must be [1 or batch, 1, positions, half], for all queries and keys and at most half of the depth");
  check(cos.scalar_type() == sin.scalar_type() &&
            (cos.scalar_type() == query.scalar_type() || cos.scalar_type() == sum_type(query)),
        op, ": cos and sin must be in the dtype of query or of its sums");
  check(s.score == cpu::kDotScore, op, ": rotary positions are of dot products");
}

// What a backward has besides.
template <class Place>
void check_attention_backward(const char* op, const AttentionOperands& x, const cpu::AttentionShape& s,
                              const Tensor& grad_output, const Tensor& output, const Tensor& statistics, bool of_mask,
                              Place&& check_place) {
  const int64_t size[4] = {s.batch, s.heads, s.queries, s.value_depth};
  for (const Tensor* t : {&grad_output, &output}) {
    check_place(op, "grad_output or output", *t);
    check(t->scalar_type() == x.query.scalar_type(), op, ": grad_output or output differs in dtype");
    check(t->dim() == 4 && same_sizes(t->sizes(), Ints(size, 4)), op,
          ": grad_output or output is not of the output's size");
  }
  check(s.value_depth <= 1 || output.stride(3) == 1, op, ": output is not what attention_forward gave");
  check_place(op, "statistics", statistics);
  check(statistics.scalar_type() == sum_type(x.query) && statistics.is_contiguous() && statistics.dim() == 4 &&
            statistics.size(0) == 2 && statistics.size(1) == s.batch && statistics.size(2) == s.heads &&
            statistics.size(3) == s.queries,
        op, ": statistics is not what attention_forward gave");
  check(!of_mask || (x.mask && s.mask != cpu::kBoolMask), op, ": no gradient of this mask");
}

// The result lies in query's order of heads and queries, so that [B, L, H, D] seen as [B, H, L, D] stays that.
inline Tensor allocate_attention_output(const Tensor& query, int64_t value_depth) {
  const int64_t size[4] = {query.size(0), query.size(1), query.size(2), value_depth};
  const bool turned = query.stride(1) < query.stride(2);
  const int64_t heads = std::max<int64_t>(size[1], 1), length = std::max<int64_t>(size[2], 1),
                depth = std::max<int64_t>(size[3], 1);
  const int64_t stride[4] = {heads * length * depth, turned ? depth : length * depth, turned ? heads * depth : depth,
                             1};
  return allocate_strided(Ints(size, 4), stride, query.scalar_type(), query);
}

}  // namespace dlkern::ops

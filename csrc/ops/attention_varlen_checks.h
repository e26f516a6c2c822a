// What the op layers of attention_varlen share: the checks of a call. Operands are [tokens, heads, depth] with any strides;
// where sequences begin is told on the CPU.
#pragma once
#include "common.h"

namespace dlkern::ops {

struct VarlenOperands {
  const Tensor &query, &key, &value, &starts_of_queries, &starts_of_keys;
  const std::optional<Tensor>& seed;
};

struct VarlenOptions {
  double p, scale, softcap;
  int64_t left, right;
};

struct Sequences {
  int64_t count, heads, key_heads, depth, value_depth;
  const int64_t *queries, *keys;  // where each begins, and the end of the last
  bool all;  // every sequence has queries and keys
};

inline const int64_t* check_starts(const char* op, const char* name, const Tensor& starts, int64_t tokens) {
  check(starts.is_cpu() && starts.scalar_type() == ScalarType::Long && starts.dim() == 1 && starts.size(0) >= 1 &&
            starts.is_contiguous(),
        op, ": ", name, " must be contiguous int64 [sequences + 1] on the CPU");
  const int64_t* at = data<int64_t>(starts);
  const int64_t count = starts.size(0) - 1;
  bool rises = at[0] == 0 && at[count] == tokens;
  for (int64_t b = 0; rises && b < count; ++b) rises = at[b] <= at[b + 1];
  check(rises, op, ": ", name, " must rise from 0 to the ", tokens, " tokens");
  return at;
}

// check_place(op, name, tensor) refuses a tensor that is elsewhere.
template <class Place>
Sequences check_varlen(const char* op, const VarlenOperands& x, const VarlenOptions& options, Place&& check_place) {
  for (const Tensor* t : {&x.query, &x.key, &x.value}) {
    check_place(op, "an operand", *t);
    check(t->dim() == 3, op, ": operands must be [tokens, heads, depth]");
    check(t->scalar_type() == x.query.scalar_type(), op, ": operands differ in dtype");
  }
  Sequences s{};
  s.heads = x.query.size(1), s.key_heads = x.key.size(1), s.depth = x.query.size(2), s.value_depth = x.value.size(2);
  check(x.key.size(2) == s.depth, op, ": query has depth ", s.depth, ", key ", x.key.size(2));
  check(x.value.size(0) == x.key.size(0) && x.value.size(1) == s.key_heads, op,
        ": key and value differ in tokens or heads");
  check(s.heads == 0 || (s.key_heads > 0 && s.heads % s.key_heads == 0), op, ": ", s.key_heads,
        " heads of keys do not divide ", s.heads, " of queries");
  check<std::invalid_argument>(options.left >= -1 && options.right >= -1, op,
                               ": a window's sides are at least 0, or -1 for none");
  check<std::invalid_argument>(options.p >= 0 && options.p <= 1,
                               "dropout probability has to be between 0 and 1, but got ", options.p);
  check<std::invalid_argument>(options.softcap >= 0, op, ": softcap must not be negative, got ", options.softcap);
  if (options.p > 0) {
    check(x.seed && x.seed->numel() == 1 && x.seed->scalar_type() == ScalarType::Long, op,
          ": dropout wants a seed of one int64");
    check_place(op, "seed", *x.seed);
  }
  s.queries = check_starts(op, "cu_seq_q", x.starts_of_queries, x.query.size(0));
  s.keys = check_starts(op, "cu_seq_k", x.starts_of_keys, x.key.size(0));
  s.count = x.starts_of_queries.size(0) - 1;
  check(x.starts_of_keys.size(0) == s.count + 1, op, ": cu_seq_q and cu_seq_k count different sequences");
  s.all = true;
  for (int64_t b = 0; b < s.count; ++b) s.all = s.all && s.queries[b] < s.queries[b + 1] && s.keys[b] < s.keys[b + 1];
  return s;
}

// What a backward has besides.
template <class Place>
void check_varlen_backward(const char* op, const VarlenOperands& x, const Sequences& s, const Tensor& grad_output,
                           const Tensor& output, const Tensor& statistics, Place&& check_place) {
  const int64_t size[3] = {x.query.size(0), s.heads, s.value_depth};
  for (const Tensor* t : {&grad_output, &output}) {
    check_place(op, "grad_output or output", *t);
    check(t->scalar_type() == x.query.scalar_type() && t->dim() == 3 && same_sizes(t->sizes(), Ints(size, 3)), op,
          ": grad_output or output is not of the output's size and dtype");
  }
  check_place(op, "statistics", statistics);
  check(output.is_contiguous() && statistics.is_contiguous() && statistics.scalar_type() == sum_type(x.query) &&
            statistics.dim() == 2 && statistics.size(0) == 2 && statistics.size(1) == s.heads * x.query.size(0),
        op, ": output or statistics is not what attention_varlen_forward gave");
}

}  // namespace dlkern::ops

// attention_varlen, op layer: scaled dot-product attention of sequences of different lengths that lie one after another,
// [tokens, heads, depth]. Each sequence is a call of attention's kernels on its part of the operands; where there are
// many, threads take whole sequences.
#include "../cpu/attention.h"
#include "../cpu/parallel.h"
#include "common.h"

namespace dlkern::ops {
namespace {

struct Operands {
  const Tensor &query, &key, &value, &starts_of_queries, &starts_of_keys;
  const std::optional<Tensor>& seed;
};

struct Options {
  double p, scale, softcap;
  int64_t left, right;
};

struct Sequences {
  int64_t count, heads, key_heads, depth, value_depth;
  const int64_t *queries, *keys;  // where each begins, and the end of the last
  bool all;  // every sequence has queries and keys
};

const int64_t* check_starts(const char* op, const char* name, const Tensor& starts, int64_t tokens) {
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

Sequences check_operands(const char* op, const Operands& x, const Options& options) {
  for (const Tensor* t : {&x.query, &x.key, &x.value}) {
    check(t->is_cpu(), op, ": operands must be on the CPU");
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
  check(options.p == 0 ||
            (x.seed && x.seed->is_cpu() && x.seed->numel() == 1 && x.seed->scalar_type() == ScalarType::Long),
        op, ": dropout wants a seed of one int64 on the CPU");
  s.queries = check_starts(op, "cu_seq_q", x.starts_of_queries, x.query.size(0));
  s.keys = check_starts(op, "cu_seq_k", x.starts_of_keys, x.key.size(0));
  s.count = x.starts_of_queries.size(0) - 1;
  check(x.starts_of_keys.size(0) == s.count + 1, op, ": cu_seq_q and cu_seq_k count different sequences");
  s.all = true;
  for (int64_t b = 0; b < s.count; ++b) s.all = s.all && s.queries[b] < s.queries[b + 1] && s.keys[b] < s.keys[b + 1];
  return s;
}

// [tokens, heads, depth] from token `first` on, as the kernels' [1, heads, tokens, depth].
template <class P> cpu::Strided<P> from_token(P* data, const Tensor& x, int64_t first) {
  return {data + first * x.stride(0), {0, x.stride(1), x.stride(0), x.stride(2)}};
}

// The kernels' arguments for sequence b, without results. Windows are aligned at the last query and the last key; dropout
// is that of a call of its own with seed + b.
template <class T>
cpu::AttentionArgs<T> sequence(const Operands& x, const Sequences& s, int64_t b, const Options& options,
                               acc_t<T>* statistics) {
  cpu::AttentionArgs<T> args{};
  const int64_t first = s.queries[b], first_key = s.keys[b];
  args.shape.batch = 1;
  args.shape.heads = s.heads;
  args.shape.key_heads = s.key_heads;
  args.shape.queries = s.queries[b + 1] - first;
  args.shape.keys = s.keys[b + 1] - first_key;
  args.shape.depth = s.depth;
  args.shape.value_depth = s.value_depth;
  args.shape.score = cpu::kDotScore;
  args.shape.p = options.p;
  if (options.p > 0) args.shape.seed = static_cast<uint64_t>(*data<int64_t>(*x.seed)) + static_cast<uint64_t>(b);
  args.shape.scale = options.scale;
  args.shape.softcap = options.softcap;
  args.shape.left = options.left;
  args.shape.right = options.right;
  args.shape.shift = args.shape.keys - args.shape.queries;
  args.shape.mask = cpu::kNoMask;
  args.query = from_token(data<T>(x.query), x.query, first);
  args.key = from_token(data<T>(x.key), x.key, first_key);
  args.value = from_token(data<T>(x.value), x.value, first_key);
  args.largest = statistics + s.heads * first;
  args.inverse = args.largest + s.heads * x.query.size(0);
  return args;
}

// run(b) for every sequence that has queries and keys.
template <class F> void each_sequence(const Sequences& s, const F& run) {
  const bool many = s.count >= 4 * cpu::num_threads();
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      if (s.queries[b] < s.queries[b + 1] && s.keys[b] < s.keys[b + 1]) run(b);
  };
  if (many)
    cpu::parallel_for(s.count, 1, [&](int64_t begin, int64_t end) { some(begin, end); });
  else
    some(0, s.count);
}

std::tuple<Tensor, Tensor> attention_varlen_forward_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                                        const Tensor& starts_of_queries, const Tensor& starts_of_keys,
                                                        const std::optional<Tensor>& seed, double p, double scale,
                                                        double softcap, int64_t left, int64_t right) {
  const char* op = "attention_varlen";
  const Operands x{query, key, value, starts_of_queries, starts_of_keys, seed};
  const Options options{p, scale, softcap, left, right};
  const Sequences s = check_operands(op, x, options);
  Tensor output = allocate({query.size(0), s.heads, s.value_depth}, query.scalar_type(), query);
  Tensor statistics = allocate({2, s.heads * query.size(0)}, sum_type(query), query);
  dispatch_floating(query.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!s.all) torch::stable::zero_(output), torch::stable::zero_(statistics);
    if (s.heads == 0) return;
    each_sequence(s, [&](int64_t b) {
      cpu::AttentionArgs<T> args = sequence<T>(x, s, b, options, mutable_data<acc_t<T>>(statistics));
      args.output = from_token(mutable_data<T>(output), output, s.queries[b]);
      DLKERN_CALL(attention_forward, args);
    });
  });
  return {output, statistics};
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_backward_cpu(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& starts_of_queries, const Tensor& starts_of_keys, const std::optional<Tensor>& seed,
    const Tensor& output, const Tensor& statistics, double p, double scale, double softcap, int64_t left,
    int64_t right) {
  const char* op = "attention_varlen_backward";
  const Operands x{query, key, value, starts_of_queries, starts_of_keys, seed};
  const Options options{p, scale, softcap, left, right};
  const Sequences s = check_operands(op, x, options);
  const int64_t size[3] = {query.size(0), s.heads, s.value_depth};
  for (const Tensor* t : {&grad_output, &output}) {
    check(t->is_cpu() && t->scalar_type() == query.scalar_type() && t->dim() == 3 &&
              same_sizes(t->sizes(), Ints(size, 3)),
          op, ": grad_output or output is not of the output's size, dtype and device");
  }
  check(output.is_contiguous() && statistics.is_cpu() && statistics.is_contiguous() &&
            statistics.scalar_type() == sum_type(query) && statistics.dim() == 2 && statistics.size(0) == 2 &&
            statistics.size(1) == s.heads * query.size(0),
        op, ": output or statistics is not what attention_varlen_forward gave");
  Tensor grad_query = allocate(query.sizes(), query.scalar_type(), query),
         grad_key = allocate(key.sizes(), query.scalar_type(), query),
         grad_value = allocate(value.sizes(), query.scalar_type(), query);
  dispatch_floating(query.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!s.all || s.heads == 0)
      for (Tensor* t : {&grad_query, &grad_key, &grad_value}) torch::stable::zero_(*t);
    if (s.heads == 0) return;
    each_sequence(s, [&](int64_t b) {
      cpu::AttentionArgs<T> forward = sequence<T>(x, s, b, options, const_cast<acc_t<T>*>(data<acc_t<T>>(statistics)));
      forward.output = from_token(const_cast<T*>(data<T>(output)), output, s.queries[b]);
      const cpu::AttentionBackwardArgs<T> args{forward,
                                               from_token(data<T>(grad_output), grad_output, s.queries[b]),
                                               from_token(mutable_data<T>(grad_query), grad_query, s.queries[b]),
                                               from_token(mutable_data<T>(grad_key), grad_key, s.keys[b]),
                                               from_token(mutable_data<T>(grad_value), grad_value, s.keys[b]),
                                               nullptr,
                                               nullptr};
      DLKERN_CALL(attention_backward, args);
    });
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) {
  m.impl("attention_varlen_forward_cpu", TORCH_BOX(&attention_varlen_forward_cpu));
  m.impl("attention_varlen_backward_cpu", TORCH_BOX(&attention_varlen_backward_cpu));
}

}  // namespace dlkern::ops

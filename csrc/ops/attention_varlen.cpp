// attention_varlen, op layer: scaled dot-product attention of sequences of different lengths that lie one after another,
// [tokens, heads, depth]. Each sequence is a call of attention's kernels on its part of the operands; where there are
// many, threads take whole sequences.
#include "../cpu/attention.h"
#include "../cpu/parallel.h"
#include "attention_varlen_checks.h"

namespace dlkern::ops {
namespace {

void check_cpu(const char* op, const char* name, const Tensor& x) {
  check(x.is_cpu(), op, ": ", name, " is not on the CPU");
}

// [tokens, heads, depth] from token `first` on, as the kernels' [1, heads, tokens, depth].
template <class P> cpu::Strided<P> from_token(P* data, const Tensor& x, int64_t first) {
  return {data + first * x.stride(0), {0, x.stride(1), x.stride(0), x.stride(2)}};
}

// The kernels' arguments for sequence b, without results. Windows are aligned at the last query and the last key; dropout
// is that of a call of its own with seed + b.
template <class T>
cpu::AttentionArgs<T> sequence(const VarlenOperands& x, const Sequences& s, int64_t b, const VarlenOptions& options,
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
  const VarlenOperands x{query, key, value, starts_of_queries, starts_of_keys, seed};
  const VarlenOptions options{p, scale, softcap, left, right};
  const Sequences s = check_varlen(op, x, options, check_cpu);
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
  const VarlenOperands x{query, key, value, starts_of_queries, starts_of_keys, seed};
  const VarlenOptions options{p, scale, softcap, left, right};
  const Sequences s = check_varlen(op, x, options, check_cpu);
  check_varlen_backward(op, x, s, grad_output, output, statistics, check_cpu);
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

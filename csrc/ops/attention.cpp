// attention, op layer: attention_forward, attention_backward. Operands are 4-D, [batch, heads, length, depth] with any
// strides; masks are 4-D with sizes that broadcast, and are read where they lie.
#include "../cpu/attention.h"

#include <algorithm>

#include "common.h"

namespace dlkern::ops {
namespace {

struct Options {
  double p, scale, softcap;
  int64_t left, right, score;
};

void check_operand(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  check(x.is_cpu(), op, ": ", name, " is not on the CPU");
  check(x.scalar_type() == like.scalar_type(), op, ": ", name, " differs in dtype");
  check(x.dim() == 4, op, ": ", name, " has ", x.dim(), " dimensions, expected 4");
}

template <class P> cpu::Strided<P> strided(P* data, const Tensor& x) {
  cpu::Strided<P> result{data, {}};
  for (int d = 0; d < 4; ++d) result.stride[d] = x.size(d) == 1 ? 0 : x.stride(d);
  return result;
}

// Everything but the results, checked; `kept` holds copies that the pointers lead to.
template <class T> struct Call {
  cpu::AttentionArgs<T> args{};
  std::vector<Tensor> kept;

  Call(const char* op, const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
       const std::optional<Tensor>& lengths, const std::optional<Tensor>& slopes, const std::optional<Tensor>& weight,
       const std::optional<Tensor>& seed, const Options& options) {
    check_operand(op, "query", query, query);
    check_operand(op, "key", key, query);
    check_operand(op, "value", value, query);
    cpu::AttentionShape& s = args.shape;
    s.batch = query.size(0);
    s.heads = query.size(1);
    s.queries = query.size(2);
    s.depth = query.size(3);
    s.key_heads = key.size(1);
    s.keys = key.size(2);
    s.value_depth = value.size(3);
    check(key.size(0) == s.batch && value.size(0) == s.batch, op, ": batches differ");
    check(value.size(1) == s.key_heads && value.size(2) == s.keys, op, ": key and value differ in heads or length");
    check(key.size(3) == s.depth, op, ": query has depth ", s.depth, ", key ", key.size(3));
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
    args.query = strided(data<T>(query), query);
    args.key = strided(data<T>(key), key);
    args.value = strided(data<T>(value), value);
    if (s.p > 0) {
      check(seed && seed->is_cpu() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long, op,
            ": dropout wants a seed of one int64");
      s.seed = static_cast<uint64_t>(*data<int64_t>(*seed));
    }
    if (mask) {
      const ScalarType dtype = mask->scalar_type();
      s.mask = dtype == ScalarType::Bool      ? cpu::kBoolMask
               : dtype == query.scalar_type() ? cpu::kOwnMask
               : dtype == ScalarType::Float   ? cpu::kFloatMask
                                              : cpu::kNoMask;
      check(s.mask != cpu::kNoMask, op, ": mask must be bool, float32 or of query's dtype");
      const int64_t full[4] = {s.batch, s.heads, s.queries, s.keys};
      bool fits = mask->is_cpu() && mask->dim() == 4;
      for (int d = 0; fits && d < 4; ++d) {
        s.mask_size[d] = mask->size(d);
        fits = mask->size(d) == full[d] || mask->size(d) == 1;
      }
      check(fits, op, ": mask does not broadcast to [batch, heads, queries, keys]");
      args.mask = strided(mask->const_data_ptr(), *mask);
    }
    if (lengths) {
      check(lengths->is_cpu() && lengths->scalar_type() == ScalarType::Long && lengths->dim() == 2 &&
                lengths->size(0) == s.batch && (lengths->size(1) == 1 || lengths->size(1) == s.queries),
            op, ": lengths must be int64 [batch, 1] or [batch, queries]");
      args.lengths = {data<int64_t>(*lengths),
                      {lengths->stride(0), 0, lengths->size(1) == 1 ? 0 : lengths->stride(1), 0}};
    }
    args.slopes = parameter(op, "slopes", slopes, s.heads, query);
    args.weight = parameter(op, "weight", weight, s.depth, query);
    check(weight.has_value() == (s.score == cpu::kAdditiveScore), op, ": weight is for the additive score");
  }

 private:
  const acc_t<T>* parameter(const char* op, const char* name, const std::optional<Tensor>& x, int64_t size,
                            const Tensor& query) {
    if (!x) return nullptr;
    check(x->is_cpu() && x->dim() == 1 && x->size(0) == size, op, ": ", name, " is not [", size, "]");
    check(x->scalar_type() == query.scalar_type() || x->scalar_type() == sum_type(query), op, ": ", name,
          " differs in dtype");
    kept.push_back(*widened(x, query));
    return data<acc_t<T>>(kept.back());
  }
};

// The result lies in query's order of heads and queries, so that [B, L, H, D] seen as [B, H, L, D] stays that.
Tensor allocate_output(const Tensor& query, int64_t value_depth) {
  const int64_t size[4] = {query.size(0), query.size(1), query.size(2), value_depth};
  const bool turned = query.stride(1) < query.stride(2);
  const int64_t heads = std::max<int64_t>(size[1], 1), length = std::max<int64_t>(size[2], 1),
                depth = std::max<int64_t>(size[3], 1);
  const int64_t stride[4] = {heads * length * depth, turned ? depth : length * depth, turned ? heads * depth : depth,
                             1};
  return allocate_strided(Ints(size, 4), stride, query.scalar_type(), query);
}

using Two = std::tuple<Tensor, Tensor>;
Two attention_forward_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                          const std::optional<Tensor>& mask, const std::optional<Tensor>& lengths,
                          const std::optional<Tensor>& slopes, const std::optional<Tensor>& weight,
                          const std::optional<Tensor>& seed, double p, double scale, double softcap, int64_t left,
                          int64_t right, int64_t score) {
  const char* op = "attention";
  Tensor output, statistics;
  dispatch_floating(query.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Call<T> call(op, query, key, value, mask, lengths, slopes, weight, seed, {p, scale, softcap, left, right, score});
    const cpu::AttentionShape& s = call.args.shape;
    output = allocate_output(query, s.value_depth);
    statistics = allocate({2, s.batch, s.heads, s.queries}, sum_type(query), query);
    if (s.batch * s.heads * s.queries == 0) return;
    call.args.output = strided(mutable_data<T>(output), output);
    call.args.largest = mutable_data<acc_t<T>>(statistics);
    call.args.inverse = call.args.largest + s.batch * s.heads * s.queries;
    DLKERN_CALL(attention_forward, call.args);
  });
  return {output, statistics};
}

// grad_mask is of size [0] where none is wanted, grad_weight where there is no weight.
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
Five attention_backward_cpu(const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
                            const std::optional<Tensor>& mask, const std::optional<Tensor>& lengths,
                            const std::optional<Tensor>& slopes, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& seed, const Tensor& output, const Tensor& statistics, double p,
                            double scale, double softcap, int64_t left, int64_t right, int64_t score, bool of_mask) {
  const char* op = "attention_backward";
  Tensor grad_query, grad_key, grad_value, grad_mask, grad_weight;
  dispatch_floating(query.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    Call<T> call(op, query, key, value, mask, lengths, slopes, weight, seed, {p, scale, softcap, left, right, score});
    const cpu::AttentionShape& s = call.args.shape;
    const int64_t size[4] = {s.batch, s.heads, s.queries, s.value_depth};
    for (const Tensor* x : {&grad_output, &output}) {
      check_operand(op, "grad_output or output", *x, query);
      check(same_sizes(x->sizes(), Ints(size, 4)), op, ": grad_output or output is not of the output's size");
    }
    check(s.value_depth <= 1 || output.stride(3) == 1, op, ": output is not what attention_forward gave");
    check(statistics.is_cpu() && statistics.scalar_type() == sum_type(query) && statistics.is_contiguous() &&
              statistics.dim() == 4 && statistics.size(0) == 2 && statistics.size(1) == s.batch &&
              statistics.size(2) == s.heads && statistics.size(3) == s.queries,
          op, ": statistics is not what attention_forward gave");
    check(!of_mask || (mask && s.mask != cpu::kBoolMask), op, ": no gradient of this mask");
    grad_query = allocate(query.sizes(), query.scalar_type(), query);
    grad_key = allocate(key.sizes(), query.scalar_type(), query);
    grad_value = allocate(value.sizes(), query.scalar_type(), query);
    grad_mask =
        of_mask ? allocate(mask->sizes(), mask->scalar_type(), query) : allocate({0}, query.scalar_type(), query);
    Tensor sums = allocate({weight ? s.depth : 0}, sum_type(query), query);
    if (s.batch * s.heads == 0 || s.keys == 0) {
      for (Tensor* x : {&grad_query, &grad_key, &grad_value, &grad_mask, &sums}) torch::stable::zero_(*x);
    } else {
      call.args.output = strided(const_cast<T*>(data<T>(output)), output);
      call.args.output.stride[3] = 1;
      call.args.largest = const_cast<A*>(data<A>(statistics));
      call.args.inverse = call.args.largest + s.batch * s.heads * s.queries;
      const cpu::AttentionBackwardArgs<T> args{call.args,
                                               strided(data<T>(grad_output), grad_output),
                                               mutable_data<T>(grad_query),
                                               mutable_data<T>(grad_key),
                                               mutable_data<T>(grad_value),
                                               of_mask ? grad_mask.mutable_data_ptr() : nullptr,
                                               weight ? mutable_data<A>(sums) : nullptr};
      DLKERN_CALL(attention_backward, args);
    }
    grad_weight = weight ? narrowed(sums, weight->scalar_type()) : narrowed(sums, query.scalar_type());
  });
  return {grad_query, grad_key, grad_value, grad_mask, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) {
  m.impl("attention_forward_cpu", TORCH_BOX(&attention_forward_cpu));
  m.impl("attention_backward_cpu", TORCH_BOX(&attention_backward_cpu));
}

}  // namespace dlkern::ops

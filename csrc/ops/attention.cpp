// attention, op layer: attention_forward, attention_backward, and the same with rotary positions. Operands and masks are read where they lie.
#include "attention_checks.h"

namespace dlkern::ops {
namespace {

void check_place(const char* op, const char* name, const Tensor& x) {
  check(x.is_cpu(), op, ": ", name, " is not on the CPU");
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

  Call(const char* op, const AttentionOperands& x, const AttentionOptions& options) {
    cpu::AttentionShape& s = args.shape = check_attention(op, x, options, check_place);
    args.query = strided(data<T>(x.query), x.query);
    args.key = strided(data<T>(x.key), x.key);
    args.value = strided(data<T>(x.value), x.value);
    if (s.p > 0) s.seed = static_cast<uint64_t>(*data<int64_t>(*x.seed));
    if (x.mask) args.mask = strided(x.mask->const_data_ptr(), *x.mask);
    if (x.lengths) {
      const int64_t step = x.lengths->size(1) == 1 ? 0 : x.lengths->stride(1);
      args.lengths = {data<int64_t>(*x.lengths), {x.lengths->stride(0), 0, step, 0}};
    }
    args.slopes = parameter(x.slopes, x.query);
    args.weight = parameter(x.weight, x.query);
  }

  // In the type of sums and dense.
  const acc_t<T>* parameter(const std::optional<Tensor>& x, const Tensor& query) {
    if (!x) return nullptr;
    kept.push_back(*widened(x, query));
    return data<acc_t<T>>(kept.back());
  }
};

template <class T>
void set_rotary(const char* op, const Tensor& query, const AttentionRotary& rotary, Call<T>& call) {
  const Tensor& cos = rotary.cos;
  check_attention_rotary(op, query, call.args.shape, rotary, check_place);
  const int64_t stride = cos.size(0) == 1 ? 0 : cos.size(2) * cos.size(3);
  call.args.rotary = {call.parameter(cos, query), call.parameter(rotary.sin, query), stride, cos.size(3),
                      rotary.interleaved};
}

using Two = std::tuple<Tensor, Tensor>;
Two forward(const char* op, const AttentionOperands& x, const AttentionOptions& options,
            const AttentionRotary* rotary) {
  const Tensor& query = x.query;
  Tensor output, statistics;
  dispatch_floating(query.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Call<T> call(op, x, options);
    if (rotary) set_rotary(op, query, *rotary, call);
    const cpu::AttentionShape& s = call.args.shape;
    output = allocate_attention_output(query, s.value_depth);
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
Five backward(const char* op, const Tensor& grad_output, const AttentionOperands& x, const Tensor& output,
              const Tensor& statistics, const AttentionOptions& options, bool of_mask, bool from_scores,
              const AttentionRotary* rotary) {
  const Tensor &query = x.query, &key = x.key, &value = x.value;
  const std::optional<Tensor>&mask = x.mask, &weight = x.weight;
  Tensor grad_query, grad_key, grad_value, grad_mask, grad_weight;
  dispatch_floating(query.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    Call<T> call(op, x, options);
    if (rotary) set_rotary(op, query, *rotary, call);
    const cpu::AttentionShape& s = call.args.shape;
    check_attention_backward(op, x, s, grad_output, output, statistics, of_mask, check_place);
    grad_query = allocate(query.sizes(), query.scalar_type(), query);
    grad_key = allocate(key.sizes(), query.scalar_type(), query);
    grad_value = allocate(value.sizes(), query.scalar_type(), query);
    grad_mask =
        of_mask ? allocate(mask->sizes(), mask->scalar_type(), query) : allocate({0}, query.scalar_type(), query);
    Tensor sums = allocate({weight ? s.depth : 0}, sum_type(query), query);
    if (s.batch * s.heads == 0 || s.keys == 0) {
      for (Tensor* t : {&grad_query, &grad_key, &grad_value, &grad_mask, &sums}) torch::stable::zero_(*t);
    } else {
      call.args.output = strided(const_cast<T*>(data<T>(output)), output);
      call.args.output.stride[3] = 1;
      call.args.largest = const_cast<A*>(data<A>(statistics));
      call.args.inverse = call.args.largest + s.batch * s.heads * s.queries;
      call.args.shape.from_scores = from_scores;
      const cpu::AttentionBackwardArgs<T> args{call.args,
                                               strided(data<T>(grad_output), grad_output),
                                               strided(mutable_data<T>(grad_query), grad_query),
                                               strided(mutable_data<T>(grad_key), grad_key),
                                               strided(mutable_data<T>(grad_value), grad_value),
                                               of_mask ? grad_mask.mutable_data_ptr() : nullptr,
                                               weight ? mutable_data<A>(sums) : nullptr};
      DLKERN_CALL(attention_backward, args);
    }
    grad_weight = weight ? narrowed(sums, weight->scalar_type()) : narrowed(sums, query.scalar_type());
  });
  return {grad_query, grad_key, grad_value, grad_mask, grad_weight};
}

Two attention_forward_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                          const std::optional<Tensor>& mask, const std::optional<Tensor>& lengths,
                          const std::optional<Tensor>& slopes, const std::optional<Tensor>& weight,
                          const std::optional<Tensor>& seed, double p, double scale, double softcap, int64_t left,
                          int64_t right, int64_t score) {
  return forward("attention", {query, key, value, mask, lengths, slopes, weight, seed},
                 {p, scale, softcap, left, right, score}, nullptr);
}

Five attention_backward_cpu(const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
                            const std::optional<Tensor>& mask, const std::optional<Tensor>& lengths,
                            const std::optional<Tensor>& slopes, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& seed, const Tensor& output, const Tensor& statistics, double p,
                            double scale, double softcap, int64_t left, int64_t right, int64_t score, bool of_mask,
                            bool from_scores) {
  return backward("attention_backward", grad_output, {query, key, value, mask, lengths, slopes, weight, seed}, output,
                  statistics, {p, scale, softcap, left, right, score}, of_mask, from_scores, nullptr);
}

Two attention_rotary_forward_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                 const std::optional<Tensor>& mask, const std::optional<Tensor>& lengths,
                                 const std::optional<Tensor>& slopes, const std::optional<Tensor>& seed,
                                 const Tensor& cos, const Tensor& sin, double p, double scale, double softcap,
                                 int64_t left, int64_t right, bool interleaved) {
  const AttentionRotary rotary{cos, sin, interleaved};
  return forward("attention_rotary", {query, key, value, mask, lengths, slopes, std::nullopt, seed},
                 {p, scale, softcap, left, right, cpu::kDotScore}, &rotary);
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
Four attention_rotary_backward_cpu(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                   const Tensor& value, const std::optional<Tensor>& mask,
                                   const std::optional<Tensor>& lengths, const std::optional<Tensor>& slopes,
                                   const std::optional<Tensor>& seed, const Tensor& cos, const Tensor& sin,
                                   const Tensor& output, const Tensor& statistics, double p, double scale,
                                   double softcap, int64_t left, int64_t right, bool interleaved, bool of_mask) {
  const AttentionRotary rotary{cos, sin, interleaved};
  auto [of_query, of_key, of_value, of_added, none] =
      backward("attention_rotary_backward", grad_output, {query, key, value, mask, lengths, slopes, std::nullopt, seed},
               output, statistics, {p, scale, softcap, left, right, cpu::kDotScore}, of_mask, false, &rotary);
  return {of_query, of_key, of_value, of_added};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) {
  m.impl("attention_forward_cpu", TORCH_BOX(&attention_forward_cpu));
  m.impl("attention_backward_cpu", TORCH_BOX(&attention_backward_cpu));
  m.impl("attention_rotary_forward_cpu", TORCH_BOX(&attention_rotary_forward_cpu));
  m.impl("attention_rotary_backward_cpu", TORCH_BOX(&attention_rotary_backward_cpu));
}

}  // namespace dlkern::ops

// attention, op layer of the CUDA column: attention_forward, attention_backward of every score, and the same with rotary
// positions; float32, bfloat16 or float16. Operands and masks are read where they lie.
#include "../cuda/attention.h"

#include "attention_checks.h"
#include "cuda_positions.h"

namespace dlkern::ops {
namespace {

float* floats(void* data) { return static_cast<float*>(data); }

cuda::AttentionOperand operand(const void* data, const Tensor& x) {
  cuda::AttentionOperand to{data, {}};
  for (int d = 0; d < 4; ++d) to.stride[d] = x.size(d) == 1 ? 0 : x.stride(d);
  return to;
}

struct Problem {
  AttentionOperands x;
  cpu::AttentionShape shape;
  std::optional<Tensor> slopes, weight, cos, sin;  // dense
  bool interleaved = false;
  Tensor query_unit, key_unit;

  Problem(const char* op, const AttentionOperands& operands, const AttentionOptions& options,
          const AttentionRotary* rotary)
      : x(operands) {
    const auto place = [&](const char* name_of_op, const char* name, const Tensor& t) {
      check_device(name_of_op, name, t, x.query);
    };
    shape = check_attention(op, x, options, place);
    const cpu::AttentionShape& s = shape;
    if (rotary) {
      check_attention_rotary(op, x.query, s, *rotary, place);
      cos = as_contiguous(rotary->cos);
      sin = as_contiguous(rotary->sin);
      interleaved = rotary->interleaved;
    }
    check_element(op, x.query);
    const int64_t most = int64_t{1} << 30;  // positions are ints
    check(s.queries < most && s.keys < most && s.depth < most && s.value_depth < most &&
              s.batch * s.heads * (s.queries / 64 + 1) < most && s.batch * s.key_heads * (s.keys / 64 + 1) < most,
          op, ": too many queries, keys or heads (cuda column)");
    slopes = as_contiguous(x.slopes);
    weight = as_contiguous(x.weight);
    const bool units = s.score == cpu::kCosineScore;
    query_unit = allocate({units ? s.batch * s.heads * s.queries : 0}, ScalarType::Float, x.query);
    key_unit = allocate({units ? s.batch * s.key_heads * s.keys : 0}, ScalarType::Float, x.query);
  }

  // Makes the operands known to the call.
  cuda::Attention reads(Call& call) const {
    const cpu::AttentionShape& s = shape;
    cuda::Attention a{};
    a.element = element_of(x.query);
    a.score = s.score;
    a.mask = s.mask;
    a.batch = s.batch;
    a.heads = s.heads;
    a.key_heads = s.key_heads;
    a.queries = s.queries;
    a.keys = s.keys;
    a.depth = s.depth;
    a.value_depth = s.value_depth;
    a.scale = s.scale;
    a.softcap = s.softcap;
    a.p = s.p;
    a.left = s.left;
    a.right = s.right;
    a.query = operand(call.reads(x.query), x.query);
    a.key = operand(call.reads(x.key), x.key);
    a.value = operand(call.reads(x.value), x.value);
    if (x.mask) a.mask_at = operand(call.reads(*x.mask), *x.mask);
    if (x.lengths) {
      a.lengths = static_cast<const int64_t*>(call.reads(*x.lengths));
      a.lengths_stride[0] = x.lengths->stride(0);
      a.lengths_stride[1] = x.lengths->size(1) == 1 ? 0 : x.lengths->stride(1);
    }
    a.slopes = call.reads(slopes);
    a.weight = call.reads(weight);
    a.wide_slopes = slopes && slopes->scalar_type() == ScalarType::Float;
    a.wide_weight = weight && weight->scalar_type() == ScalarType::Float;
    if (cos) {
      const int64_t stride = cos->size(0) == 1 ? 0 : cos->size(2) * cos->size(3);
      a.angles = {call.reads(cos), call.reads(sin), stride, cos->size(3), cos->scalar_type() == ScalarType::Float,
                  interleaved};
    }
    if (s.p > 0) a.seed = static_cast<const int64_t*>(call.reads(*x.seed));
    a.query_unit = floats(call.writes(query_unit));
    a.key_unit = floats(call.writes(key_unit));
    return a;
  }

  // Whether rotary positions are turned by a kernel before attention's.
  bool turns_first(bool of_mask) const {
    if (!cos) return false;
    Call call(x.query);
    return of_mask || !cuda::attention_turns(reads(call));
  }
  Tensor turned(const char* op, const Tensor& rows, bool inverse = false) const {
    return turned_cuda(op, rows, *cos, *sin, interleaved, inverse);
  }
};

using Two = std::tuple<Tensor, Tensor>;
Two forward(const char* op, const AttentionOperands& x, const AttentionOptions& options,
            const AttentionRotary* rotary) {
  const Tensor& query = x.query;
  const Problem problem(op, x, options, rotary);
  const cpu::AttentionShape& s = problem.shape;
  Tensor output = allocate_attention_output(query, s.value_depth);
  Tensor statistics = allocate({2, s.batch, s.heads, s.queries}, ScalarType::Float, query);
  const int64_t rows = s.batch * s.heads * s.queries;
  if (rows == 0) return {output, statistics};
  if (s.p == 1) {  // nothing is kept
    for (Tensor* t : {&output, &statistics}) torch::stable::zero_(*t);
    return {output, statistics};
  }
  const auto run = [&](const Problem& of) {
    Call call(query);
    cuda::Attention a = of.reads(call);
    a.largest = floats(call.writes(statistics));
    a.inverse = a.largest + rows;
    cuda::attention_forward(a, operand(call.writes(output), output), call.stream());
  };
  if (problem.turns_first(false)) {
    const Tensor q = problem.turned(op, query), k = problem.turned(op, x.key);
    run(Problem(op, {q, k, x.value, x.mask, x.lengths, x.slopes, x.weight, x.seed}, options, nullptr));
  } else {
    run(problem);
  }
  return {output, statistics};
}

// grad_mask is of size [0] where none is wanted, grad_weight where there is no weight.
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
Five backward(const char* op, const Tensor& grad_output, const AttentionOperands& x, const Tensor& output,
              const Tensor& statistics, const AttentionOptions& options, bool of_mask, bool from_scores,
              const AttentionRotary* rotary) {
  const Tensor &query = x.query, &key = x.key, &value = x.value;
  const std::optional<Tensor>&mask = x.mask, &weight = x.weight;
  const Problem problem(op, x, options, rotary);
  const cpu::AttentionShape& s = problem.shape;
  check_attention_backward(
      op, x, s, grad_output, output, statistics, of_mask,
      [&](const char* name_of_op, const char* name, const Tensor& t) { check_device(name_of_op, name, t, query); });
  if (problem.turns_first(of_mask)) {
    const Tensor q = problem.turned(op, query), k = problem.turned(op, key);
    auto [of_query, of_key, of_value, of_added, none] =
        backward(op, grad_output, {q, k, value, mask, x.lengths, x.slopes, weight, x.seed}, output, statistics, options,
                 of_mask, from_scores, nullptr);
    return {problem.turned(op, of_query, true), problem.turned(op, of_key, true), of_value, of_added, none};
  }
  const ScalarType dtype = query.scalar_type();
  Tensor grad_query = allocate(query.sizes(), dtype, query), grad_key = allocate(key.sizes(), dtype, query),
         grad_value = allocate(value.sizes(), dtype, query);
  Tensor grad_mask = of_mask ? allocate(mask->sizes(), mask->scalar_type(), query) : allocate({0}, dtype, query);
  Tensor grad_weight = weight ? allocate({s.depth}, weight->scalar_type(), query) : allocate({0}, dtype, query);
  if (s.p == 1 || s.batch * s.heads == 0 || s.keys == 0) {
    for (Tensor* t : {&grad_query, &grad_key, &grad_value, &grad_mask, &grad_weight}) torch::stable::zero_(*t);
    return {grad_query, grad_key, grad_value, grad_mask, grad_weight};
  }
  const int64_t rows = s.batch * s.heads * s.queries;
  const bool units = s.score == cpu::kCosineScore;
  const Tensor unit_query = allocate({units ? rows * s.depth : 0}, ScalarType::Float, query);
  const Tensor unit_key = allocate({units ? s.batch * s.key_heads * s.keys * s.depth : 0}, ScalarType::Float, query);
  const Tensor delta = allocate({rows}, ScalarType::Float, query);
  Call call(query);
  cuda::Attention a = problem.reads(call);
  a.largest = const_cast<float*>(static_cast<const float*>(call.reads(statistics)));
  a.inverse = a.largest + rows;
  const Tensor parts = allocate({cuda::attention_weight_parts(a), s.depth}, ScalarType::Float, query);
  cuda::AttentionBackward tensors{};
  tensors.grad_output = operand(call.reads(grad_output), grad_output);
  tensors.output = operand(call.reads(output), output);
  tensors.output.stride[3] = 1;
  tensors.of_mask = of_mask && grad_mask.numel() != 0;
  tensors.from_scores = from_scores;
  tensors.wide_grad_weight = a.wide_weight;
  for (int d = 0; d < 4; ++d) tensors.mask_size[d] = s.mask_size[d];
  tensors.delta = floats(call.writes(delta));
  tensors.grad_query = call.writes(grad_query);
  tensors.grad_key = call.writes(grad_key);
  tensors.unit_query = call.writes(unit_query);
  tensors.unit_key = call.writes(unit_key);
  tensors.grad_value = call.writes(grad_value);
  tensors.grad_mask = of_mask ? call.writes(grad_mask) : nullptr;
  tensors.grad_weight = weight ? call.writes(grad_weight) : nullptr;
  tensors.weight_parts = weight ? floats(call.writes(parts)) : nullptr;
  cuda::attention_backward(a, tensors, call.stream());
  return {grad_query, grad_key, grad_value, grad_mask, grad_weight};
}

Two attention_forward_cuda(const Tensor& query, const Tensor& key, const Tensor& value,
                           const std::optional<Tensor>& mask, const std::optional<Tensor>& lengths,
                           const std::optional<Tensor>& slopes, const std::optional<Tensor>& weight,
                           const std::optional<Tensor>& seed, double p, double scale, double softcap, int64_t left,
                           int64_t right, int64_t score) {
  return forward("attention", {query, key, value, mask, lengths, slopes, weight, seed},
                 {p, scale, softcap, left, right, score}, nullptr);
}

Five attention_backward_cuda(const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
                             const std::optional<Tensor>& mask, const std::optional<Tensor>& lengths,
                             const std::optional<Tensor>& slopes, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& seed, const Tensor& output, const Tensor& statistics,
                             double p, double scale, double softcap, int64_t left, int64_t right, int64_t score,
                             bool of_mask, bool from_scores) {
  return backward("attention_backward", grad_output, {query, key, value, mask, lengths, slopes, weight, seed}, output,
                  statistics, {p, scale, softcap, left, right, score}, of_mask, from_scores, nullptr);
}

Two attention_rotary_forward_cuda(const Tensor& query, const Tensor& key, const Tensor& value,
                                  const std::optional<Tensor>& mask, const std::optional<Tensor>& lengths,
                                  const std::optional<Tensor>& slopes, const std::optional<Tensor>& seed,
                                  const Tensor& cos, const Tensor& sin, double p, double scale, double softcap,
                                  int64_t left, int64_t right, bool interleaved) {
  const AttentionRotary rotary{cos, sin, interleaved};
  return forward("attention_rotary", {query, key, value, mask, lengths, slopes, std::nullopt, seed},
                 {p, scale, softcap, left, right, cpu::kDotScore}, &rotary);
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
Four attention_rotary_backward_cuda(const Tensor& grad_output, const Tensor& query, const Tensor& key,
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

DLKERN_REGISTER(DLKERN_CUDA_KEY, m) {
  m.impl("attention_forward_cuda", TORCH_BOX(&attention_forward_cuda));
  m.impl("attention_backward_cuda", TORCH_BOX(&attention_backward_cuda));
  m.impl("attention_rotary_forward_cuda", TORCH_BOX(&attention_rotary_forward_cuda));
  m.impl("attention_rotary_backward_cuda", TORCH_BOX(&attention_rotary_backward_cuda));
}

}  // namespace dlkern::ops

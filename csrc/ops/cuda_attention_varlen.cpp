// attention_varlen, op layer of the CUDA column: scaled dot-product attention of sequences that lie one after another,
// float32, bfloat16 or float16. One launch serves all (on Hopper two in backward, whose short sequences are left to the
// other kernels): a block finds its sequence and rows in a table of tiles.
#include <limits>

#include "../cuda/attention.h"

#include "attention_varlen_checks.h"
#include "cuda_common.h"

namespace dlkern::ops {
namespace {

float* floats(void* data) { return static_cast<float*>(data); }

// [tokens, heads, depth] as one sequence of batch 1.
cuda::AttentionOperand operand(const void* data, const Tensor& x) {
  const auto stride = [&](int d) { return x.size(d) == 1 ? 0 : x.stride(d); };
  return {data, {0, stride(1), stride(0), stride(2)}};
}

// Refuses tensors that are elsewhere than `like`.
auto beside(const Tensor& like) {
  return [&like](const char* op, const char* name, const Tensor& x) { check_device(op, name, x, like); };
}

// Hopper's kernels take sequences of more keys than a border.
constexpr int64_t kAll = -1, kNone = std::numeric_limits<int64_t>::max();

// Calls f(tile, tiles, rows) for each sequence, whose queries, or keys, are so many tiles of so many rows.
template <class F>
void for_each_sequence(const Sequences& s, bool of_keys, bool of_hopper, int64_t border, F&& f) {
  for (int64_t b = 0; b < s.count; ++b) {
    cuda::AttentionTile tile{};
    tile.sequence = static_cast<int>(b);
    tile.first_query = static_cast<int>(s.queries[b]);
    tile.first_key = static_cast<int>(s.keys[b]);
    tile.queries = static_cast<int>(s.queries[b + 1] - s.queries[b]);
    tile.keys = static_cast<int>(s.keys[b + 1] - s.keys[b]);
    const int rows = of_hopper ? cuda::kAttentionHopperRows : cuda::kAttentionTileRows;
    if ((tile.keys > border) == of_hopper) f(tile, ((of_keys ? tile.keys : tile.queries) + rows - 1) / rows, rows);
  }
}

int64_t count_tiles(const Sequences& s, bool of_keys, bool of_hopper, int64_t border) {
  int64_t count = 0;
  for_each_sequence(s, of_keys, of_hopper, border, [&](const cuda::AttentionTile&, int tiles, int) { count += tiles; });
  return count;
}

// Where attention is causal, the last queries and the first keys have most to do, and come first.
cuda::AttentionTile* write_tiles(const Sequences& s, bool of_keys, bool of_hopper, int64_t border,
                                 cuda::AttentionTile* to) {
  for_each_sequence(s, of_keys, of_hopper, border, [&](cuda::AttentionTile tile, int tiles, int rows) {
    for (int n = 0; n < tiles; ++n) {
      tile.first_row = (of_keys ? n : tiles - 1 - n) * rows;
      *to++ = tile;
    }
  });
  return to;
}

struct Problem {
  VarlenOperands x;
  VarlenOptions options;
  Sequences sequences;

  Problem(const char* op, const VarlenOperands& operands, const VarlenOptions& settings)
      : x(operands), options(settings) {
    const Sequences& s = sequences = check_varlen(op, x, options, beside(x.query));
    check_element(op, x.query);
    const int64_t most = int64_t{1} << 30;  // positions are ints
    const int64_t queries = x.query.size(0), keys = x.key.size(0);
    check(queries < most && keys < most && s.depth < most && s.value_depth < most &&
              s.heads * (queries / 64 + s.count + 1) < most && s.key_heads * (keys / 64 + s.count + 1) < most,
          op, ": too many tokens, sequences or heads (cuda column)");
  }

  // The operands, known to the call. Windows that hide nothing are none.
  cuda::Attention reads(Call& call) const {
    const Sequences& s = sequences;
    cuda::Attention a{};
    a.element = element_of(x.query);
    a.score = cuda::kDotScore;
    a.mask = cuda::kNoMask;
    a.batch = 1;
    a.heads = s.heads;
    a.key_heads = s.key_heads;
    a.queries = x.query.size(0);
    a.keys = x.key.size(0);
    a.depth = s.depth;
    a.value_depth = s.value_depth;
    a.scale = options.scale;
    a.softcap = options.softcap;
    a.p = options.p;
    a.left = options.left >= a.keys ? -1 : options.left;
    a.right = options.right >= a.queries ? -1 : options.right;
    a.query = operand(call.reads(x.query), x.query);
    a.key = operand(call.reads(x.key), x.key);
    a.value = operand(call.reads(x.value), x.value);
    if (a.p > 0) a.seed = static_cast<const int64_t*>(call.reads(*x.seed));
    return a;
  }
};

// Tables of tiles, of queries and perhaps of keys, on the device. They are copied from pinned memory: nobody waits.
struct Tables {
  static constexpr int64_t kInts = sizeof(cuda::AttentionTile) / sizeof(int);
  int64_t count[2][2] = {};  // of queries and of keys, each the others' and Hopper's
  Tensor at;

  Tables(const Problem& problem, bool keys, int64_t border) {
    const Sequences& s = problem.sequences;
    int64_t tiles = 0;
    for (int side = 0; side <= keys; ++side) {
      for (const bool of_hopper : {false, true})
        tiles += count[side][of_hopper] = count_tiles(s, side, of_hopper, border);
    }
    at = allocate({tiles, kInts}, ScalarType::Int, problem.x.query);
    const Tensor host = pinned_like(at);
    auto* to = static_cast<cuda::AttentionTile*>(host.mutable_data_ptr());
    for (int side = 0; side <= keys; ++side) {
      for (const bool of_hopper : {false, true}) to = write_tiles(s, side, of_hopper, border, to);
    }
    torch::stable::copy_(at, host, true);
  }
  std::pair<cuda::AttentionTables, cuda::AttentionTables> reads(Call& call) const {
    const auto* tiles = static_cast<const cuda::AttentionTile*>(call.reads(at));
    cuda::AttentionTables found[2];
    for (int side = 0; side < 2; ++side) {
      found[side].others = {tiles, count[side][false]};
      found[side].of_hopper = {tiles + count[side][false], count[side][true]};
      tiles += count[side][false] + count[side][true];
    }
    return {found[0], found[1]};
  }
};

std::tuple<Tensor, Tensor> attention_varlen_forward_cuda(const Tensor& query, const Tensor& key, const Tensor& value,
                                                         const Tensor& starts_of_queries, const Tensor& starts_of_keys,
                                                         const std::optional<Tensor>& seed, double p, double scale,
                                                         double softcap, int64_t left, int64_t right) {
  const Problem problem("attention_varlen", {query, key, value, starts_of_queries, starts_of_keys, seed},
                        {p, scale, softcap, left, right});
  const Sequences& s = problem.sequences;
  const int64_t rows = s.heads * query.size(0);
  Tensor output = allocate({query.size(0), s.heads, s.value_depth}, query.scalar_type(), query);
  Tensor statistics = allocate({2, rows}, ScalarType::Float, query);
  if (rows == 0) return {output, statistics};
  if (p == 1) {  // nothing is kept
    for (Tensor* t : {&output, &statistics}) torch::stable::zero_(*t);
    return {output, statistics};
  }
  Call call(query);
  cuda::Attention a = problem.reads(call);
  a.largest = floats(call.writes(statistics));
  a.inverse = a.largest + rows;
  const cuda::AttentionOperand to = operand(call.writes(output), output);
  const bool hopper = cuda::attention_varlen_forward_fits_sm90(a, to, count_tiles(s, false, true, kAll));
  const Tables tables(problem, false, hopper ? kAll : kNone);
  cuda::attention_varlen_forward(a, tables.reads(call).first, to, call.stream());
  return {output, statistics};
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_backward_cuda(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& starts_of_queries, const Tensor& starts_of_keys, const std::optional<Tensor>& seed,
    const Tensor& output, const Tensor& statistics, double p, double scale, double softcap, int64_t left,
    int64_t right) {
  const char* op = "attention_varlen_backward";
  const Problem problem(op, {query, key, value, starts_of_queries, starts_of_keys, seed},
                        {p, scale, softcap, left, right});
  const Sequences& s = problem.sequences;
  check_varlen_backward(op, problem.x, s, grad_output, output, statistics, beside(query));
  const ScalarType dtype = query.scalar_type();
  Tensor grad_query = allocate(query.sizes(), dtype, query), grad_key = allocate(key.sizes(), dtype, query),
         grad_value = allocate(value.sizes(), dtype, query);
  if (p == 1 || s.heads == 0) {
    for (Tensor* t : {&grad_query, &grad_key, &grad_value}) torch::stable::zero_(*t);
    return {grad_query, grad_key, grad_value};
  }
  const int64_t rows = s.heads * query.size(0);
  const Tensor delta = allocate({rows}, ScalarType::Float, query);
  Call call(query);
  cuda::Attention a = problem.reads(call);
  a.largest = const_cast<float*>(static_cast<const float*>(call.reads(statistics)));
  a.inverse = a.largest + rows;
  cuda::AttentionBackward tensors{};
  tensors.grad_output = operand(call.reads(grad_output), grad_output);
  tensors.output = operand(call.reads(output), output);
  tensors.delta = floats(call.writes(delta));
  tensors.grad_query = call.writes(grad_query);
  tensors.grad_key = call.writes(grad_key);
  tensors.grad_value = call.writes(grad_value);
  constexpr int64_t kFew = cuda::kAttentionFewKeys;
  const bool hopper = cuda::attention_varlen_backward_fits_sm90(a, tensors, count_tiles(s, false, true, kFew),
                                                                count_tiles(s, true, true, kFew));
  const Tables tables(problem, true, hopper ? kFew : kNone);
  const auto [of_queries, of_keys] = tables.reads(call);
  cuda::attention_varlen_backward(a, of_queries, of_keys, tensors, call.stream());
  return {grad_query, grad_key, grad_value};
}

}  // namespace

DLKERN_REGISTER(DLKERN_CUDA_KEY, m) {
  m.impl("attention_varlen_forward_cuda", TORCH_BOX(&attention_varlen_forward_cuda));
  m.impl("attention_varlen_backward_cuda", TORCH_BOX(&attention_varlen_backward_cuda));
}

}  // namespace dlkern::ops

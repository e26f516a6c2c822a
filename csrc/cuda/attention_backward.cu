// Attention of every score, backward: probabilities are made again, tile by tile, from the two saved numbers of a query.
//
// With P the probabilities, g the output's gradient and delta = sum(g output) of a query, the gradient of its scores is
// dS = P (g V^T - delta). One kernel takes 64 queries through their keys (delta, the query's gradient, the additive
// weight's), one 64 keys through the queries of all heads that share them (gradients of key and value), and where a mask
// wants its gradient, one takes a tile of the mask through all that it was broadcast to. The next tile is loaded while one
// is computed. Nothing is added by two blocks: the same bits every run.
// Floor: 2.5 times the forward's operations; recomputing scores and g V^T twice makes it 3.5.
#include "attention_tile.cuh"

namespace dlkern::cuda {
namespace {

using namespace attention;

// Columns of a tile: fewer where sums of results leave fewer registers for it. The key kernel has sums of two.
template <class T, int SIZE>
constexpr int kKeysAcross = sizeof(T) == 4 && SIZE == 128 ? 16 : 32;
template <class T, int SIZE>
constexpr int kQueriesAcross = sizeof(T) == 4 || SIZE == 128 ? 16 : 32;

// Where a gradient goes: its elements lie side by side.
struct Rows {
  void* data;
  int64_t head_stride, row_stride;
};

template <class A>
struct BackwardArgsOf {
  A x;
  Operand grad_output, output;
  bool by_tiles;  // delta is sum(P g V^T), of a pass of its own
  bool split;  // 16-bit P and dS are multiplied in two parts
  bool wide;  // gradients of query and key are floats: those of vectors of length 1
  float* delta;
  Rows grad_query, grad_key, grad_value;
  void* grad_mask;
  float* weight_parts;
  int64_t mask_size[4];
};
using BackwardArgs = BackwardArgsOf<Args>;

// Shared memory: two tiles of 64 rows, a ring of pairs of tiles of ACROSS, scratch, and for pairwise scores the sums.
template <class T, int SIZE, bool PAIRWISE, int ACROSS>
struct Plan {
  static constexpr int kStages = PAIRWISE ? 1 : 2;
  static constexpr int kStride = TileOf<T, SIZE>::kStride, kRowTile = kTileRows * kStride, kRingTile = ACROSS * kStride;
  static constexpr int kScratch = Scratch<T, ACROSS>::kFloats;
  static constexpr int kSumStride = SIZE + 4;
  static constexpr int kSums = PAIRWISE ? (kTileRows + kWarps) * kSumStride : 0;
  static constexpr int kNumbers = kStages * 3 * ACROSS;  // largest, inverse, delta of queries across
  static constexpr int kBytes = (2 * kRowTile + 2 * kStages * kRingTile) * static_cast<int>(sizeof(T)) +
                                (kScratch + kSums + kNumbers) * static_cast<int>(sizeof(float));
  T *first_rows, *second_rows, *ring;
  float *scratch, *sums, *numbers;

  explicit DLKERN_DEVICE Plan(unsigned char* shared) {
    first_rows = reinterpret_cast<T*>(shared);
    second_rows = first_rows + kRowTile;
    ring = second_rows + kRowTile;
    scratch = reinterpret_cast<float*>(ring + 2 * kStages * kRingTile);
    sums = scratch + kScratch;
    numbers = sums + kSums;
  }
  // Both tiles of rows, once nobody reads them, for sums of results.
  DLKERN_DEVICE float* all_rows() const {
    static_assert(2 * kRowTile * sizeof(T) >= kTileRows * kSumStride * sizeof(float));
    return reinterpret_cast<float*>(first_rows);
  }
  DLKERN_DEVICE T* tile(int n, int which) const { return ring + (n % kStages * 2 + which) * kRingTile; }
  DLKERN_DEVICE float* numbers_of(int n) const { return numbers + n % kStages * 3 * ACROSS; }
  // Of pairwise scores: a warp's sums of results, and of the weight's gradient.
  DLKERN_DEVICE float* row_sums() const { return sums + warp() * 16 * kSumStride; }
  DLKERN_DEVICE float* weight_sums() const { return sums + (kTileRows + warp()) * kSumStride; }
  DLKERN_DEVICE void clear_sums() const {
    for (int i = static_cast<int>(threadIdx.x); i < kSums; i += kThreads) sums[i] = 0.0f;
    __syncthreads();
  }
};

// What pairwise scores hand on to `a`, the warp's rows, from dS: added to the warp's sums, `width` columns from `column`
// on; and to the weight's.
template <int SIZE, class T, int ACROSS>
DLKERN_DEVICE void add_pairwise_gradient(const Fragment<T, ACROSS>& change, const Args& x, const T* a, const T* b,
                                         int column, int width, float* row_sums, float* weight_sums, int sum_stride) {
  using Mine = Layout<T>;
  constexpr int kStride = TileOf<T, SIZE>::kStride;
#pragma unroll 1
  for (int d = 0; d < width; d++) {
    float of_weight = 0.0f;
    const float weight = x.score == kAdditiveScore ? number_at<T>(x.weight, x.wide_weight, column + d) : 1.0f;
#pragma unroll
    for (int r = 0; r < Mine::kRows; r++) {
      const float p = to_float(a[Mine::row(r) * kStride + d]);
      float of_row = 0.0f;
#pragma unroll
      for (int c = 0; c < change.kColumns; c++) {
        const float q = to_float(b[Mine::column(c) * kStride + d]);
        if (x.score == kAdditiveScore) {
          const float t = tanhf(p + q);
          of_row = fmaf(change.at[r][c], 1.0f - t * t, of_row);
          of_weight = fmaf(change.at[r][c], t, of_weight);
        } else {
          of_row = fmaf(change.at[r][c], q - p, of_row);
        }
      }
      of_row = row_sum<T>(of_row);
      if (lane() % Mine::kAcross == 0) row_sums[Mine::row(r) * sum_stride + d] += of_row * weight;
    }
    if (weight_sums && x.score == kAdditiveScore) {
      of_weight = warp_sum(of_weight);
      if (lane() == 0) weight_sums[d] += of_weight;
    }
  }
}

struct Numbers {
  float largest, inverse, delta;
};

// Scores become probabilities. numbers(r, c) are those of the query there.
template <class T, int ACROSS, class F>
DLKERN_DEVICE void to_probabilities(Fragment<T, ACROSS>& s, F&& numbers) {
  s.each([&](int r, int c, float& value) {
    const Numbers of_query = numbers(r, c);
    value = exponential(value, of_query.largest) * of_query.inverse;
  });
}

// The gradient of a score. It is zero where one key has all the weight: what rounding leaves of the difference there must
// not pass for a gradient. (Infinities and NaN do pass.)
DLKERN_DEVICE float through_softmax(float probability, float change, float delta) {
  return (probability == 1.0f ? 0.0f : probability) * (change - delta);
}

// The gradient of a probability, from that of what dropout left of it.
DLKERN_DEVICE float through_dropout(const Args& x, uint32_t kept, int place, float change) {
  return kept >> place & 1 ? change * x.kept : 0.0f;
}

template <class OUT, int SIZE, class T>
DLKERN_DEVICE void store_gradient(const Rows& to, int64_t head, Fragment<T, SIZE>& sum, int first, int rows, int column,
                                  int columns) {
  store_rows(static_cast<OUT*>(to.data) + head * to.head_stride, to.row_stride, sum, first, rows, column, columns);
}

// Queries i0 .. i0 + kTileRows - 1 of a head. blockIdx.y: block of the gradient's columns.
template <class T, int SIZE, bool PAIRWISE, class A>
DLKERN_DEVICE void backward_query_tile(const BackwardArgsOf<A>& args, int64_t head, int64_t b, int h, int i0) {
  using Mine = Layout<T>;
  constexpr int kAcross = kKeysAcross<T, SIZE>;
  using Memory = Plan<T, SIZE, PAIRWISE, kAcross>;
  DLKERN_DYNAMIC_SHARED(shared);
  const Memory memory(shared);
  const A& x = args.x;
  const int own = static_cast<int>(blockIdx.y), first = i0 + warp() * 16;
  const Side<T> queries{head_of<T>(x.query, b, h), x.query, memory.first_rows, i0, x.queries};
  const Side<T> grads{head_of<T>(args.grad_output, b, h), args.grad_output, memory.second_rows, i0, x.queries};
  Side<T> keys{head_of<T>(x.key, b, h / x.group), x.key, nullptr, 0, x.keys};
  Side<T> values{head_of<T>(x.value, b, h / x.group), x.value, nullptr, 0, x.keys};
  const Range range = range_of<kTileRows>(x, b, i0);
  const bool deep = !kTurned<A> && x.depth > SIZE, deep_value = x.value_depth > SIZE;
  if (PAIRWISE) memory.clear_sums();

  float largest[Mine::kRows], inverse[Mine::kRows], delta[Mine::kRows];
#pragma unroll
  for (int r = 0; r < Mine::kRows; r++) {
    const int i = first + Mine::row(r);
    const bool inside = i < x.queries;
    largest[r] = inside ? x.largest[head * x.queries + i] : 0.0f;
    inverse[r] = inside ? x.inverse[head * x.queries + i] : 0.0f;
    delta[r] = 0.0f;
    if (args.by_tiles) continue;
    // In double: it is subtracted from numbers that may be nearly the same.
    double sum = 0;
    if (inside) {
      const T* g = grads.head + i * args.grad_output.stride[2];
      const T* y = head_of<T>(args.output, b, h) + i * args.output.stride[2];
      for (int d = lane() % Mine::kAcross; d < x.value_depth; d += Mine::kAcross)
        sum += static_cast<double>(to_float(g[d * args.grad_output.stride[3]])) * static_cast<double>(to_float(y[d]));
    }
#pragma unroll
    for (int distance = Mine::kAcross / 2; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    delta[r] = static_cast<float>(sum);
  }

  const int start = range.first / kAcross * kAcross;
  const int key_tiles = range.last > start ? static_cast<int>(ceil_div(range.last - start, kAcross)) : 0;
  const int steps = key_tiles * (args.by_tiles ? 2 : 1);
  const auto load = [&](int n) {
    keys.first = values.first = start + n % key_tiles * kAcross;
    keys.tile = memory.tile(n, 0), values.tile = memory.tile(n, 1);
    if (!deep) load_side<kAcross, SIZE>(x, b, keys);
    if (!deep_value) values.template load<kAcross, SIZE>(0, x.value_depth);
  };
  if (!deep && steps > 0) load_side<kTileRows, SIZE>(x, b, queries);
  if (!deep_value && steps > 0) grads.template load<kTileRows, SIZE>(0, x.value_depth);
  if (Memory::kStages > 1 && steps > 0) load(0);
  cp_async_commit();

  Fragment<T, SIZE> sum;
  RowScale<T> scale;
#pragma unroll 1
  for (int n = 0; n < steps; n++) {
    if (Memory::kStages == 1)
      load(n);
    else if (n + 1 < steps)
      load(n + 1);
    cp_async_commit();
    cp_async_wait<Memory::kStages - 1>();
    __syncthreads();  // this step's tiles are there
    const int j0 = start + n % key_tiles * kAcross;
    keys.first = values.first = j0;
    keys.tile = memory.tile(n, 0), values.tile = memory.tile(n, 1);
    const Places<T, false> at{first, j0};
    Fragment<T, kAcross> s, change;
    float cap[s.kRows][s.kColumns];
    multiply<false, SIZE>(change, x, grads, values, x.value_depth, 0);
    multiply<PAIRWISE, SIZE, kTurned<A>>(s, x, queries, keys, x.depth, own);
    finish_scores(s, cap, x, b, h, at, range.covers(j0, j0 + kAcross));
    to_probabilities(s, [&](int r, int) { return Numbers{largest[r], inverse[r], 0.0f}; });
    if (x.dropout) {
      const uint32_t kept = kept_bits<T, kAcross>(x, head, at);
      change.each([&](int r, int c, float& value) { value = through_dropout(x, kept, r * s.kColumns + c, value); });
    }
    if (args.by_tiles && n < key_tiles) {
      s.each([&](int r, int c, float value) { delta[r] += value * change.at[r][c]; });
      if (n + 1 == key_tiles) {
#pragma unroll
        for (int r = 0; r < Mine::kRows; r++) delta[r] = row_sum<T>(delta[r]);
      }
    } else {
      s.each([&](int r, int c, float& value) { value = through_softmax(value, change.at[r][c], delta[r]); });
      if (x.softcap != 0.0f) s.each([&](int r, int c, float& value) { value *= cap[r][c]; });
      if (x.score == kCosineScore) {
        const float* unit = x.key_unit + (b * x.key_heads + h / x.group) * x.keys;
        s.each([&](int r, int c, float& value) { value *= at.key(r, c) < x.keys ? unit[at.key(r, c)] : 0.0f; });
      }
      const int width = min(SIZE, x.depth - own * SIZE);
      if constexpr (PAIRWISE) {
        add_pairwise_gradient<SIZE>(s, x, queries.tile + warp() * 16 * Memory::kStride, keys.tile, own * SIZE, width,
                                    memory.row_sums(), memory.weight_sums(), Memory::kSumStride);
      } else {
        scale.fit(s, sum);
        add_product<SIZE>(sum, s, keys.tile, width, args.split, memory.scratch);
      }
    }
    __syncthreads();  // everybody is done with this step's tiles
  }

  if (PAIRWISE) {
    __syncwarp();
    sum.each([&](int r, int c, float& value) {
      value = memory.row_sums()[Mine::row(r) * Memory::kSumStride + Mine::result_column(c)];
    });
    if (args.weight_parts) {
      __syncthreads();
      const int d = static_cast<int>(threadIdx.x);
      static_assert(SIZE <= kThreads);
      if (d < SIZE && own * SIZE + d < x.depth) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; w++) total += memory.sums[(kTileRows + w) * Memory::kSumStride + d];
        args.weight_parts[blockIdx.x * static_cast<int64_t>(x.depth) + own * SIZE + d] = total * x.scale;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < Mine::kRows; r++) {
    const int i = first + Mine::row(r);
    if (own == 0 && i < x.queries && lane() % Mine::kAcross == 0) args.delta[head * x.queries + i] = delta[r];
  }
  if (!PAIRWISE) scale.undo(sum);
  sum.each([&](int, int, float& value) { value *= x.scale; });
  if constexpr (kTurned<A>) turn_back(sum, x, b, first, x.queries, memory.all_rows());
  if (!kTurned<A> && args.wide)
    store_gradient<float>(args.grad_query, head, sum, first, x.queries, own * SIZE, x.depth);
  else
    store_gradient<T>(args.grad_query, head, sum, first, x.queries, own * SIZE, x.depth);
}

// blockIdx.x: head, and tile of queries, the last first.
template <class T, int SIZE, bool PAIRWISE, class A>
DLKERN_DEVICE void backward_query(const BackwardArgsOf<A>& args) {
  const int tiles = static_cast<int>(ceil_div(args.x.queries, kTileRows));
  const int64_t head = blockIdx.x / tiles, b = head / args.x.heads;
  const int h = static_cast<int>(head % args.x.heads);
  const int i0 = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * kTileRows;
  backward_query_tile<T, SIZE, PAIRWISE>(args, head, b, h, i0);
}
template <class T, int SIZE, bool PAIRWISE>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_query_kernel(const __grid_constant__ BackwardArgs args) {
  backward_query<T, SIZE, PAIRWISE>(args);
}
template <class T, int SIZE>
__global__ void __launch_bounds__(kThreads, 1)
    attention_rotary_backward_query_kernel(const __grid_constant__ BackwardArgsOf<RotaryArgs> args) {
  backward_query<T, SIZE, false>(args);
}

// Keys j0 .. j0 + kTileRows - 1 of a head of keys. blockIdx.y: block of both gradients' columns.
template <class T, int SIZE, bool PAIRWISE, class A>
DLKERN_DEVICE void backward_key_tile(const BackwardArgsOf<A>& args, int64_t key_head, int64_t b, int kh, int j0) {
  using Mine = Layout<T>;
  constexpr int kAcross = kQueriesAcross<T, SIZE>;
  using Memory = Plan<T, SIZE, PAIRWISE, kAcross>;
  DLKERN_DYNAMIC_SHARED(shared);
  const Memory memory(shared);
  const A& x = args.x;
  const int own = static_cast<int>(blockIdx.y), first = j0 + warp() * 16;
  const Side<T> keys{head_of<T>(x.key, b, kh), x.key, memory.first_rows, j0, x.keys};
  const Side<T> values{head_of<T>(x.value, b, kh), x.value, memory.second_rows, j0, x.keys};
  const bool deep = !kTurned<A> && x.depth > SIZE, deep_value = x.value_depth > SIZE;
  const int own_key = deep ? own : 0, own_value = deep_value ? own : 0;
  if (PAIRWISE) memory.clear_sums();

  // Queries that may see some of these keys.
  const int start = x.right < 0 ? 0 : max(0, j0 - x.right - shift_of(x)) / kAcross * kAcross;
  int end = x.left < 0 ? x.queries : min(x.queries, j0 + kTileRows + x.left - shift_of(x));
  if (x.lengths && x.lengths_stride[1] == 0 && x.lengths[b * x.lengths_stride[0]] <= j0) end = 0;
  const int query_tiles = end > start ? static_cast<int>(ceil_div(end - start, kAcross)) : 0;
  const int steps = query_tiles * x.group;
  const auto head_at = [&](int n) { return kh * x.group + n / query_tiles; };
  const auto tile_at = [&](int n) { return start + n % query_tiles * kAcross; };
  const auto queries_at = [&](int n) {
    return Side<T>{head_of<T>(x.query, b, head_at(n)), x.query, memory.tile(n, 0), tile_at(n), x.queries};
  };
  const auto grads_at = [&](int n) {
    return Side<T>{head_of<T>(args.grad_output, b, head_at(n)), args.grad_output, memory.tile(n, 1), tile_at(n),
                   x.queries};
  };
  const auto load = [&](int n) {
    if (!deep) load_side<kAcross, SIZE>(x, b, queries_at(n));
    if (!deep_value) grads_at(n).template load<kAcross, SIZE>(0, x.value_depth);
    if (warp() < 3 && lane() < kAcross) {
      const float* from = warp() == 0 ? x.largest : warp() == 1 ? x.inverse : args.delta;
      const int i = tile_at(n) + lane();
      const int64_t at = (b * x.heads + head_at(n)) * x.queries + i;
      cp_async4(memory.numbers_of(n) + warp() * kAcross + lane(), i < x.queries ? from + at : from,
                i < x.queries ? 4 : 0);
    }
  };
  if (!deep && steps > 0) load_side<kTileRows, SIZE>(x, b, keys);
  if (!deep_value && steps > 0) values.template load<kTileRows, SIZE>(0, x.value_depth);
  if (Memory::kStages > 1 && steps > 0) load(0);
  cp_async_commit();

  Fragment<T, SIZE> of_key, of_value;
  RowScale<T> scale;  // of of_key; probabilities themselves need none
#pragma unroll 1
  for (int n = 0; n < steps; n++) {
    if (Memory::kStages == 1)
      load(n);
    else if (n + 1 < steps)
      load(n + 1);
    cp_async_commit();
    cp_async_wait<Memory::kStages - 1>();
    __syncthreads();  // this step's tiles are there
    const int i0 = tile_at(n), h = head_at(n);
    const Range range = range_of<kAcross>(x, b, i0);
    if (range.meets(j0, j0 + kTileRows)) {  // the same for all threads
      const Side<T> queries = queries_at(n), grads = grads_at(n);
      const int64_t head = b * x.heads + h;
      const Places<T, true> at{first, i0};
      const float* numbers = memory.numbers_of(n);
      Fragment<T, kAcross> s;
      float cap[s.kRows][s.kColumns];
      multiply<PAIRWISE, SIZE, kTurned<A>>(s, x, keys, queries, x.depth, own_key);
      finish_scores(s, cap, x, b, h, at, range.covers(j0, j0 + kTileRows));
      to_probabilities(
          s, [&](int, int c) { return Numbers{numbers[Mine::column(c)], numbers[kAcross + Mine::column(c)], 0.0f}; });
      const uint32_t kept = x.dropout ? kept_bits<T, kAcross>(x, head, at) : ~0u;
      if (deep_value) {
        __syncthreads();
        grads.template load<kAcross, SIZE>(own_value * SIZE, x.value_depth);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
      }
      {
        Fragment<T, kAcross> left;  // by dropout
        s.each([&](int r, int c, float value) { left.at[r][c] = through_dropout(x, kept, r * s.kColumns + c, value); });
        add_product<SIZE>(of_value, left, grads.tile, x.value_depth - own_value * SIZE, args.split, memory.scratch);
      }
      if (x.softcap != 0.0f) s.each([&](int r, int c, float& value) { value *= cap[r][c]; });
      Fragment<T, kAcross> change;
      multiply<false, SIZE>(change, x, values, grads, x.value_depth, own_value);
      s.each([&](int r, int c, float& value) {
        value = through_softmax(value, through_dropout(x, kept, r * s.kColumns + c, change.at[r][c]),
                                numbers[2 * kAcross + Mine::column(c)]);
      });
      if (x.score == kCosineScore) {
        const float* unit = x.query_unit + head * x.queries;
        s.each([&](int r, int c, float& value) { value *= at.query(r, c) < x.queries ? unit[at.query(r, c)] : 0.0f; });
      }
      const int width = min(SIZE, x.depth - own_key * SIZE);
      if constexpr (PAIRWISE) {
        add_pairwise_gradient<SIZE>(s, x, keys.tile + warp() * 16 * Memory::kStride, queries.tile, own_key * SIZE,
                                    width, memory.row_sums(), static_cast<float*>(nullptr), Memory::kSumStride);
      } else {
        scale.fit(s, of_key);
        add_product<SIZE>(of_key, s, queries.tile, width, args.split, memory.scratch);
      }
    }
    __syncthreads();  // everybody is done with this step's tiles
  }

  if (PAIRWISE) {
    __syncwarp();
    of_key.each([&](int r, int c, float& value) {
      value = memory.row_sums()[Mine::row(r) * Memory::kSumStride + Mine::result_column(c)];
    });
  }
  if (!PAIRWISE) scale.undo(of_key);
  of_key.each([&](int, int, float& value) { value *= x.scale; });
  if constexpr (kTurned<A>) turn_back(of_key, x, b, first, x.keys, memory.all_rows());
  if (!kTurned<A> && own == own_key && args.wide)
    store_gradient<float>(args.grad_key, key_head, of_key, first, x.keys, own * SIZE, x.depth);
  else if (own == own_key)
    store_gradient<T>(args.grad_key, key_head, of_key, first, x.keys, own * SIZE, x.depth);
  if (own == own_value)
    store_gradient<T>(args.grad_value, key_head, of_value, first, x.keys, own * SIZE, x.value_depth);
}

// blockIdx.x: head of keys, and tile of keys.
template <class T, int SIZE, bool PAIRWISE, class A>
DLKERN_DEVICE void backward_key(const BackwardArgsOf<A>& args) {
  const int tiles = static_cast<int>(ceil_div(args.x.keys, kTileRows));
  const int64_t key_head = blockIdx.x / tiles, b = key_head / args.x.key_heads;
  const int kh = static_cast<int>(key_head % args.x.key_heads), j0 = static_cast<int>(blockIdx.x % tiles) * kTileRows;
  backward_key_tile<T, SIZE, PAIRWISE>(args, key_head, b, kh, j0);
}
template <class T, int SIZE, bool PAIRWISE>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_key_kernel(const __grid_constant__ BackwardArgs args) {
  backward_key<T, SIZE, PAIRWISE>(args);
}
template <class T, int SIZE>
__global__ void __launch_bounds__(kThreads, 1)
    attention_rotary_backward_key_kernel(const __grid_constant__ BackwardArgsOf<RotaryArgs> args) {
  backward_key<T, SIZE, false>(args);
}

// The arguments of a call, as those of one sequence alone, whose own number of keys says how delta is made.
template <class T>
DLKERN_DEVICE BackwardArgsOf<SequenceArgs> of_sequence(const BackwardArgs& all, const AttentionTile& tile) {
  BackwardArgsOf<SequenceArgs> args{};
  args.x = attention::of_sequence<T>(all.x, tile);
  args.grad_output = from_row<T>(all.grad_output, tile.first_query);
  args.output = from_row<T>(all.output, tile.first_query);
  args.by_tiles = args.split = tile.keys <= kFewKeys;
  args.delta = all.delta + static_cast<int64_t>(args.x.heads) * tile.first_query;
  const auto from = [](const Rows& to, int64_t row) {
    return Rows{static_cast<T*>(to.data) + row * to.row_stride, to.head_stride, to.row_stride};
  };
  args.grad_query = from(all.grad_query, tile.first_query);
  args.grad_key = from(all.grad_key, tile.first_key), args.grad_value = from(all.grad_value, tile.first_key);
  return args;
}

// blockIdx.x: head, and tile of a sequence; so in the kernel for keys.
template <class T, int SIZE>
__global__ void __launch_bounds__(kThreads, 1)
    attention_varlen_backward_query_kernel(const __grid_constant__ BackwardArgs args, const AttentionTile* tiles,
                                           int count) {
  const AttentionTile tile = tiles[blockIdx.x % count];
  const int h = static_cast<int>(blockIdx.x / count);
  backward_query_tile<T, SIZE, false>(of_sequence<T>(args, tile), h, 0, h, tile.first_row);
}
template <class T, int SIZE>
__global__ void __launch_bounds__(kThreads, 1)
    attention_varlen_backward_key_kernel(const __grid_constant__ BackwardArgs args, const AttentionTile* tiles,
                                         int count) {
  const AttentionTile tile = tiles[blockIdx.x % count];
  const int kh = static_cast<int>(blockIdx.x / count);
  backward_key_tile<T, SIZE, false>(of_sequence<T>(args, tile), kh, 0, kh, tile.first_row);
}

// A block takes a tile of the mask and adds up, in order, the dS of all batches, heads, queries and keys that it is for.
template <class T, int SIZE, bool PAIRWISE>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_mask_kernel(const __grid_constant__ BackwardArgs args) {
  using Mine = Layout<T>;
  constexpr int kAcross = kKeysAcross<T, SIZE>;
  using Memory = Plan<T, SIZE, PAIRWISE, kAcross>;
  DLKERN_DYNAMIC_SHARED(shared);
  const Memory memory(shared);
  const Args& x = args.x;
  const int64_t* size = args.mask_size;
  const bool every_query = size[2] == 1, every_key = size[3] == 1;
  const int row_tiles = static_cast<int>(ceil_div(size[2], kTileRows)),
            column_tiles = static_cast<int>(ceil_div(size[3], kAcross));
  const int column = static_cast<int>(blockIdx.x % column_tiles) * kAcross,
            row = static_cast<int>(blockIdx.x / column_tiles % row_tiles) * kTileRows;
  const int64_t mask_head = blockIdx.x / column_tiles / row_tiles, mb = mask_head / size[1], mh = mask_head % size[1];
  const int64_t batches = x.all_heads / x.heads;
  const int i_end = every_query ? x.queries : min(row + kTileRows, x.queries),
            j_end = every_key ? x.keys : min(column + kAcross, x.keys);
  Fragment<T, kAcross> total;
#pragma unroll 1
  for (int64_t b = size[0] == 1 ? 0 : mb; b < (size[0] == 1 ? batches : mb + 1); b++) {
#pragma unroll 1
    for (int h = size[1] == 1 ? 0 : static_cast<int>(mh); h < (size[1] == 1 ? x.heads : mh + 1); h++) {
      const int64_t head = b * x.heads + h;
#pragma unroll 1
      for (int i0 = row; i0 < i_end; i0 += kTileRows) {
        const Range range = range_of<kTileRows>(x, b, i0);
        const Side<T> queries{head_of<T>(x.query, b, h), x.query, memory.first_rows, i0, x.queries};
        const Side<T> grads{head_of<T>(args.grad_output, b, h), args.grad_output, memory.second_rows, i0, x.queries};
        const int first = i0 + warp() * 16;
#pragma unroll 1
        for (int j0 = column; j0 < j_end; j0 += kAcross) {
          if (!range.meets(j0, j0 + kAcross)) continue;  // the same for all threads
          const Side<T> keys{head_of<T>(x.key, b, h / x.group), x.key, memory.tile(0, 0), j0, x.keys};
          const Side<T> values{head_of<T>(x.value, b, h / x.group), x.value, memory.tile(0, 1), j0, x.keys};
          __syncthreads();  // everybody is done with the tiles before
          if (x.depth <= SIZE) {
            queries.template load<kTileRows, SIZE>(0, x.depth);
            keys.template load<kAcross, SIZE>(0, x.depth);
          }
          if (x.value_depth <= SIZE) {
            grads.template load<kTileRows, SIZE>(0, x.value_depth);
            values.template load<kAcross, SIZE>(0, x.value_depth);
          }
          cp_async_commit();
          cp_async_wait<0>();
          __syncthreads();
          const Places<T, false> at{first, j0};
          Fragment<T, kAcross> s, change;
          multiply<false, SIZE>(change, x, grads, values, x.value_depth, 0);
          multiply<PAIRWISE, SIZE>(s, x, queries, keys, x.depth, 0);
          finish_scores(s, nullptr, x, b, h, at, range.covers(j0, j0 + kAcross));
          const auto numbers = [&](int r, int) {
            const int i = at.query(r, 0);
            const int64_t place = head * x.queries + i;
            return i < x.queries ? Numbers{x.largest[place], x.inverse[place], args.delta[place]} : Numbers{};
          };
          to_probabilities(s, numbers);
          const uint32_t kept = x.dropout ? kept_bits<T, kAcross>(x, head, at) : ~0u;
          s.each([&](int r, int c, float value) {  // the mask is added behind the cap
            const float of_probability = through_dropout(x, kept, r * s.kColumns + c, change.at[r][c]);
            total.at[r][c] += through_softmax(value, of_probability, numbers(r, c).delta);
          });
        }
      }
    }
  }
  // Not in an array of its own: with the tiles it would be more than the 48 KB that a launch has without asking.
  static_assert(kAcross + 1 <= Memory::kSumStride);
  auto* const totals = reinterpret_cast<float (*)[kAcross + 1]>(memory.all_rows());
  __syncthreads();  // everybody is done with the last tiles
  total.each([&](int r, int c, float value) { totals[warp() * 16 + Mine::row(r)][Mine::column(c)] = value; });
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  if (every_query) {
    if (thread < kAcross) {
      float sum = 0.0f;
      for (int r = 0; r < kTileRows; r++) sum += totals[r][thread];
      totals[0][thread] = sum;
    }
    __syncthreads();
  }
  if (every_key) {
    if (thread < kTileRows && (!every_query || thread == 0)) {
      float sum = 0.0f;
      for (int c = 0; c < kAcross; c++) sum += totals[thread][c];
      totals[thread][0] = sum;
    }
    __syncthreads();
  }
  for (int place = thread; place < kTileRows * kAcross; place += kThreads) {
    const int r = place / kAcross, c = place % kAcross;
    if (row + r >= size[2] || column + c >= size[3]) continue;
    const int64_t to = (mask_head * size[2] + row + r) * size[3] + column + c;
    if (x.mask == kFloatMask)
      static_cast<float*>(args.grad_mask)[to] = totals[r][c];
    else
      static_cast<T*>(args.grad_mask)[to] = from_float<T>(totals[r][c]);
  }
}

// A warp takes a row. With u = x / |x| and g its gradient: dx = (g - u (u g)) / |x|.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    attention_unit_backward_kernel(const __grid_constant__ Operand rows, const float* unit, const float* of_unit,
                                   int64_t heads, int64_t length, int depth, int64_t count, T* to) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp();
  if (row >= count) return;
  const T* at = head_of<T>(rows, row / length / heads, row / length % heads) + row % length * rows.stride[2];
  const float* g = of_unit + row * depth;
  const float factor = unit[row];
  float along = 0.0f;
  for (int d = lane(); d < depth; d += 32) along += to_float(at[d * rows.stride[3]]) * factor * g[d];
  along = warp_sum(along);
  if (!(factor < 1e8f)) along = 0.0f;  // shorter ones are not divided by their length
  for (int d = lane(); d < depth; d += 32)
    to[row * depth + d] = from_float<T>((g[d] - to_float(at[d * rows.stride[3]]) * factor * along) * factor);
}

constexpr int kSumColumns = 32, kSumRows = kThreads / kSumColumns;

// A block adds up 32 columns of the weight's parts, in their order.
template <class W>
__global__ void __launch_bounds__(kThreads, 1)
    attention_weight_kernel(const float* parts, int64_t count, int depth, W* grad_weight) {
  DLKERN_SHARED(double, totals, [kSumRows][kSumColumns]);
  const int c = static_cast<int>(threadIdx.x) % kSumColumns, r = static_cast<int>(threadIdx.x) / kSumColumns;
  const int d = static_cast<int>(blockIdx.x) * kSumColumns + c;
  double total = 0;
  if (d < depth) {
    for (int64_t part = r; part < count; part += kSumRows) total += parts[part * depth + d];
  }
  totals[r][c] = total;
  __syncthreads();
  if (r != 0 || d >= depth) return;
#pragma unroll
  for (int other = 1; other < kSumRows; other++) total += totals[other][c];
  grad_weight[d] = from_float<W>(static_cast<float>(total));
}

// ---- Launching ----

template <class A>
void set_arguments(BackwardArgsOf<A>& args, const Attention& a, const AttentionBackward& tensors) {
  args.grad_output = operand_of(tensors.grad_output, a.value_depth, a.element);
  args.output = operand_of(tensors.output, a.value_depth, a.element);
  // With the matrix of scores in memory, delta cancels exactly where one key has all the weight; torch has it there for
  // these scores and masks, and does not round probabilities to 16 bits. Where keys are few it costs nothing.
  args.by_tiles = a.score != kDotScore || tensors.of_mask || tensors.from_scores || a.keys <= kFewKeys;
  args.split = args.by_tiles && a.score == kDotScore;
  args.wide = a.score == kCosineScore;
  args.delta = tensors.delta;
  args.grad_query = {args.wide ? tensors.unit_query : tensors.grad_query, a.queries * a.depth, a.depth};
  args.grad_key = {args.wide ? tensors.unit_key : tensors.grad_key, a.keys * a.depth, a.depth};
  args.grad_value = {tensors.grad_value, a.keys * a.value_depth, a.value_depth};
  args.grad_mask = tensors.grad_mask;
  args.weight_parts = tensors.weight_parts;
  for (int d = 0; d < 4; d++) args.mask_size[d] = tensors.mask_size[d];
}

dim3 query_grid(const Attention& a, int size) {
  return dim3(static_cast<unsigned>(a.batch * a.heads * ceil_div(a.queries, kTileRows)), blocks_of(a.depth, size));
}
dim3 key_grid(const Attention& a, int size) {
  const int64_t deepest = a.depth > a.value_depth ? a.depth : a.value_depth;
  return dim3(static_cast<unsigned>(a.batch * a.key_heads * ceil_div(a.keys, kTileRows)), blocks_of(deepest, size));
}
template <class T, int SIZE, bool PAIRWISE>
using OfQuery = Plan<T, SIZE, PAIRWISE, kKeysAcross<T, SIZE>>;
template <class T, int SIZE, bool PAIRWISE>
using OfKey = Plan<T, SIZE, PAIRWISE, kQueriesAcross<T, SIZE>>;
template <class T, int SIZE>
constexpr bool fit(int bytes) {
  return OfQuery<T, SIZE, false>::kBytes <= bytes && OfKey<T, SIZE, false>::kBytes <= bytes &&
         OfQuery<T, SIZE, true>::kBytes <= bytes && OfKey<T, SIZE, true>::kBytes <= bytes;
}
static_assert(fit<float, kMostColumns>(kWideFloatBytes) && fit<float, 64>(kLeastSharedBytes));
static_assert(fit<bf16, kMostColumns>(kLeastSharedBytes) && fit<bf16, 64>(kLeastSharedBytes));

void rotary_backward(const Attention& a, const AttentionBackward& tensors, void* stream) {
  BackwardArgsOf<RotaryArgs> args{};
  args.x = rotary_arguments_of(a);
  set_arguments(args, a, tensors);
  dispatch_dot(a, [&](auto* type, auto size) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (a.queries != 0)
      DLKERN_LAUNCH((attention_rotary_backward_query_kernel<T, size.value>), query_grid(a, size.value), dim3(kThreads),
                    (OfQuery<T, size.value, false>::kBytes), stream, args);
    DLKERN_LAUNCH((attention_rotary_backward_key_kernel<T, size.value>), key_grid(a, size.value), dim3(kThreads),
                  (OfKey<T, size.value, false>::kBytes), stream, args);
  });
}

}  // namespace

int64_t attention_weight_parts(const Attention& a) {
  return a.weight ? a.batch * a.heads * ceil_div(a.queries, attention::kTileRows) : 0;
}

void attention_backward(const Attention& a, const AttentionBackward& tensors, void* stream) {
  if (a.angles.cos) return rotary_backward(a, tensors, stream);
  if (attention_backward_sm90(a, tensors, stream)) return;
  BackwardArgs args{};
  args.x = arguments_of(a);
  set_arguments(args, a, tensors);
  make_units(a, args.x, stream);
  dispatch(a, [&](auto* type, auto size, auto pairwise) {
    using T = std::remove_pointer_t<decltype(type)>;
    using OfMask = Plan<T, 64, pairwise.value, kKeysAcross<T, 64>>;
    const Args& x = args.x;
    if (a.queries != 0)
      DLKERN_LAUNCH((attention_backward_query_kernel<T, size.value, pairwise.value>), query_grid(a, size.value),
                    dim3(kThreads), (OfQuery<T, size.value, pairwise.value>::kBytes), stream, args);
    DLKERN_LAUNCH((attention_backward_key_kernel<T, size.value, pairwise.value>), key_grid(a, size.value),
                  dim3(kThreads), (OfKey<T, size.value, pairwise.value>::kBytes), stream, args);
    if (tensors.of_mask) {
      const int64_t* n = tensors.mask_size;
      const int64_t blocks = n[0] * n[1] * ceil_div(n[2], kTileRows) * ceil_div(n[3], kKeysAcross<T, 64>);
      if (blocks != 0)
        DLKERN_LAUNCH((attention_backward_mask_kernel<T, 64, pairwise.value>), grid_of(blocks), dim3(kThreads),
                      OfMask::kBytes, stream, args);
    }
    if (args.wide) {
      const auto run = [&](const Operand& rows, const float* unit, void* from, int64_t heads, int64_t length,
                           void* to) {
        const int64_t count = a.batch * heads * length;
        if (count == 0) return;
        DLKERN_LAUNCH(attention_unit_backward_kernel<T>, grid_of(ceil_div(count, kWarps)), dim3(kThreads), 0, stream,
                      rows, unit, static_cast<const float*>(from), heads, length, x.depth, count, static_cast<T*>(to));
      };
      run(x.query, x.query_unit, tensors.unit_query, a.heads, a.queries, tensors.grad_query);
      run(x.key, x.key_unit, tensors.unit_key, a.key_heads, a.keys, tensors.grad_key);
    }
    if (a.weight && a.depth != 0) {
      const auto finish = [&](auto* kind) {
        using W = std::remove_pointer_t<decltype(kind)>;
        DLKERN_LAUNCH(attention_weight_kernel<W>, dim3(static_cast<unsigned>(ceil_div(a.depth, kSumColumns))),
                      dim3(kThreads), 0, stream, static_cast<const float*>(tensors.weight_parts),
                      attention_weight_parts(a), x.depth, static_cast<W*>(tensors.grad_weight));
      };
      if (tensors.wide_grad_weight)
        finish(static_cast<float*>(nullptr));
      else
        finish(static_cast<T*>(nullptr));
    }
  });
}

void attention_varlen_backward(const Attention& a, const AttentionTables& query_tables,
                               const AttentionTables& key_tables, const AttentionBackward& tensors, void* stream) {
  const AttentionTiles &of_queries = query_tables.others, &of_keys = key_tables.others;
  BackwardArgs args{};
  args.x = arguments_of(a);
  args.grad_output = operand_of(tensors.grad_output, a.value_depth, a.element);
  args.output = operand_of(tensors.output, a.value_depth, a.element);
  args.delta = tensors.delta;
  args.grad_query = {tensors.grad_query, a.depth, a.heads * a.depth};
  args.grad_key = {tensors.grad_key, a.depth, a.key_heads * a.depth};
  args.grad_value = {tensors.grad_value, a.value_depth, a.key_heads * a.value_depth};
  const int64_t query_blocks = a.heads * of_queries.count, key_blocks = a.key_heads * of_keys.count;
  const int64_t deepest = a.depth > a.value_depth ? a.depth : a.value_depth;
  dispatch_dot(a, [&](auto* type, auto size) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (query_blocks != 0)
      DLKERN_LAUNCH((attention_varlen_backward_query_kernel<T, size.value>),
                    dim3(static_cast<unsigned>(query_blocks), blocks_of(a.depth, size.value)), dim3(kThreads),
                    (OfQuery<T, size.value, false>::kBytes), stream, args, of_queries.at,
                    static_cast<int>(of_queries.count));
    if (key_blocks != 0)
      DLKERN_LAUNCH((attention_varlen_backward_key_kernel<T, size.value>),
                    dim3(static_cast<unsigned>(key_blocks), blocks_of(deepest, size.value)), dim3(kThreads),
                    (OfKey<T, size.value, false>::kBytes), stream, args, of_keys.at, static_cast<int>(of_keys.count));
  });
  attention_varlen_backward_sm90(a, query_tables.of_hopper, key_tables.of_hopper, tensors, stream);
}

}  // namespace dlkern::cuda

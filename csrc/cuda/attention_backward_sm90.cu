// Attention in 16-bit types on Hopper, backward, heads of 64 and 128: what attention_backward.cu does, by tensor copies
// and wgmma. One kernel takes 128 queries through their keys (delta, the query's gradient), one 128 keys through the
// queries of all heads that share them (gradients of key and value), 64 rows a warpgroup. Scores are made with the rows
// of the gradient down, so that probabilities and their gradients, rounded once, are the A of the next product from the
// registers they are in: nothing of them passes through memory. Nothing is added by two blocks: the same bits every run.
// Floor: 2.5 times the forward's operations; recomputing scores and g V^T twice makes it 3.5.
#include "attention_sm90.cuh"

namespace dlkern::cuda {
namespace {

using namespace attention;
using namespace attention::hopper;

struct BackwardArgs {
  Args x;
  TensorMap query, key, value, grad_output;
  Operand gradient, output;
  float scale;  // of scores that are exponents of 2
  float* delta;
  void *grad_query, *grad_key, *grad_value;
};

// A query's exponent: a probability is 2^(score scale - this).
DLKERN_DEVICE float exponent_of(const Args& x, int64_t place) {
  return x.largest[place] * kLog2E - log2f(x.inverse[place]);
}

// Where the gradient of a head's rows goes: dense [batch, heads, rows, DEPTH], or [tokens, heads, DEPTH] of sequences.
template <class T>
struct Gradient {
  T* data;
  int64_t row_stride;
};
template <class T, int DEPTH, class A>
DLKERN_DEVICE Gradient<T> gradient_of(void* data, const A&, int head, int heads, int rows, int first_row) {
  if constexpr (kPacked<A>)
    return {static_cast<T*>(data) + (static_cast<int64_t>(first_row) * heads + head) * DEPTH, int64_t{heads} * DEPTH};
  else
    return {static_cast<T*>(data) + static_cast<int64_t>(head) * rows * DEPTH, DEPTH};
}

// Stores rows from `first` on, a warp's, of `rows` rows.
template <int DEPTH, class T>
DLKERN_DEVICE void store_sums(const Gradient<T>& to, const float (&sum)[DEPTH / 2], float scale, int first, int rows) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = first + lane() / 4 + 8 * r;
    if (row >= rows) continue;
#pragma unroll
    for (int j = 0; j < DEPTH / 8; j++) {
      const Pack<T, 2> pair{from_float<T>(sum[4 * j + 2 * r] * scale), from_float<T>(sum[4 * j + 2 * r + 1] * scale)};
      store_pack(to.data + row * to.row_stride + 8 * j + lane() % 4 * 2, pair);
    }
  }
}

// ---- Gradient of queries ----

// Shared memory: queries and gradients of the output, and a ring of tiles of keys and of values.
template <class T, int DEPTH>
struct OfQuery {
  static constexpr int kAcross = DEPTH == 64 ? 128 : 64, kStages = 4;
  using Down = Rows<T, kBlockRows, DEPTH>;
  using Tile = Rows<T, kAcross, DEPTH>;
  static constexpr int kBytes = 2 * Down::kBytes + kStages * Tile::kBytes;
};

// The sum of g times the output over a row, by the four lanes that share it; in double: it is subtracted from numbers that
// may be nearly the same.
template <int DEPTH, class T>
DLKERN_DEVICE float delta_of(const T* g, const T* y) {
  double sum = 0;
#pragma unroll
  for (int d = lane() % 4 * 8; d < DEPTH; d += 32) {
    const auto g_part = load_pack<T, 8>(g + d), y_part = load_pack<T, 8>(y + d);
#pragma unroll
    for (int v = 0; v < 8; v++)
      sum += static_cast<double>(to_float(g_part.at[v])) * static_cast<double>(to_float(y_part.at[v]));
  }
#pragma unroll
  for (int distance = 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return static_cast<float>(sum);
}

// Queries i0 .. i0 + kBlockRows - 1 of head h of batch b. deltas: the call's, or the sequence's.
template <class T, int DEPTH, class A>
DLKERN_DEVICE void query_block(const BackwardArgs& args, const A& x, float* deltas, int head, int b, int h, int i0,
                               Origin origin) {
  using Memory = OfQuery<T, DEPTH>;
  using Down = typename Memory::Down;
  using Tile = typename Memory::Tile;
  constexpr int kAcross = Memory::kAcross;
  DLKERN_DYNAMIC_SHARED(shared);
  DLKERN_SHARED(uint64_t, full, [Memory::kStages]);
  DLKERN_SHARED(uint64_t, empty, [Memory::kStages]);
  DLKERN_SHARED(uint64_t, rows_full, [1]);
  T* const queries = reinterpret_cast<T*>(shared);
  T* const grads = queries + Down::kElements;
  const auto tile_of = [&](int use) { return grads + Down::kElements + use % Memory::kStages * Tile::kElements; };
  const Ring<Memory::kStages> ring{full, empty};
  if (threadIdx.x == 0) {
    ring.init();
    mbarrier_init(rows_full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();

  const Range range = range_of<kBlockRows>(x, b, i0);
  const int start = range.first / kAcross * kAcross;
  const int tiles = range.last > start ? static_cast<int>(ceil_div(range.last - start, kAcross)) : 0;

  if (threadIdx.x < 128) {
    give_registers_back<40>();
    if (threadIdx.x != 0 || tiles == 0) return;
    mbarrier_arrive_expect(rows_full, 2 * Down::kBytes);
    Down::copy(queries, args.query, rows_full, origin.query + i0, h, b);
    Down::copy(grads, args.grad_output, rows_full, origin.query + i0, h, b);
    for (int use = 0; use < 2 * tiles; use++) {
      uint64_t* const barrier = ring.fill(use, Tile::kBytes);
      const int row = origin.key + start + use / 2 * kAcross;
      Tile::copy(tile_of(use), use % 2 ? args.value : args.key, barrier, row, h / x.group, b);
    }
  } else {
    take_registers<232>();
    const int row = 64 * group(), first = i0 + warp_row();
    const Range seen = range_of<64>(x, b, i0 + row);
    float exponent[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int own = first + lane() / 4 + 8 * r, i = own < x.queries ? own : x.queries - 1;
      const int64_t place = static_cast<int64_t>(head) * x.queries + i;
      exponent[r] = exponent_of(x, place);
      delta[r] = delta_of<DEPTH>(head_of<T>(args.gradient, b, h) + (origin.query + i) * args.gradient.stride[2],
                                 head_of<T>(args.output, b, h) + (origin.query + i) * args.output.stride[2]);
      if (own == i && lane() % 4 == 0) deltas[place] = delta[r];
    }
    float sum[DEPTH / 2] = {};
    RowScale<T> scale;
    if (tiles > 0) mbarrier_wait(rows_full, 0);
#pragma unroll 1
    for (int n = 0; n < tiles; n++) {
      T *const keys = tile_of(2 * n), *const values = tile_of(2 * n + 1);
      const int j0 = start + n * kAcross;
      float s[kAcross / 2], change[kAcross / 2];
      ring.wait(2 * n);
      if (kPacked<A> && j0 + kAcross > x.keys) {
        ring.wait(2 * n + 1);
        Tile::clear(keys, x.keys - j0);
        Tile::clear(values, x.keys - j0);
        end_clearing();
      }
      wgmma_fence(s);
      start_row_products<DEPTH, kBlockRows>(s, queries, row, keys);
      ring.wait(2 * n + 1);
      wgmma_fence(change);
      start_row_products<DEPTH, kBlockRows>(change, grads, row, values);
      wgmma_wait<1>(s);
      if (!seen.covers(j0, j0 + kAcross)) hide_keys(s, x, b, first, j0);
      for_each<kAcross / 2>([&](int r, int, int i) { s[i] = exp2_fast(fmaf(s[i], args.scale, -exponent[r])); });
      wgmma_wait<0>(change);
      ring.release(2 * n + 1);
      for_each<kAcross / 2>([&](int r, int, int i) { s[i] *= change[i] - delta[r]; });
      fit(scale, s, sum);
      uint32_t p[kAcross / 16][4];
      to_operand<T>(p, s);
      wgmma_fence(sum, p);
      start_product<DEPTH>(sum, p, keys);
      wgmma_wait<0>(sum, p);
      ring.release(2 * n);
    }
    undo(scale, sum);
    store_sums<DEPTH>(gradient_of<T, DEPTH>(args.grad_query, x, head, x.heads, x.queries, origin.query), sum, x.scale,
                      first, x.queries);
  }
}

// blockIdx.x: head, and tile of queries, the last first.
template <class T, int DEPTH>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_backward_query_sm90_kernel(const __grid_constant__ BackwardArgs args) {
#ifdef DLKERN_HOPPER
  const Args& x = args.x;
  const int blocks = static_cast<int>(ceil_div(x.queries, kBlockRows));
  const int head = static_cast<int>(blockIdx.x) / blocks;
  const int i0 = (blocks - 1 - static_cast<int>(blockIdx.x) % blocks) * kBlockRows;
  query_block<T, DEPTH>(args, x, args.delta, head, head / x.heads, head % x.heads, i0, {});
#endif
}

// blockIdx.x: head, and tile of a sequence; so in the kernel for keys.
template <class T, int DEPTH>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_varlen_backward_query_sm90_kernel(const __grid_constant__ BackwardArgs args, const AttentionTile* tiles,
                                                int count) {
#ifdef DLKERN_HOPPER
  const AttentionTile tile = tiles[blockIdx.x % count];
  const int h = static_cast<int>(blockIdx.x) / count;
  float* const deltas = args.delta + static_cast<int64_t>(args.x.heads) * tile.first_query;
  query_block<T, DEPTH>(args, of_sequence<T>(args.x, tile), deltas, h, 0, h, tile.first_row,
                        {tile.first_query, tile.first_key});
#endif
}

// ---- Gradients of keys and values ----

// Shared memory: keys and values, and a ring of tiles of queries and of gradients of the output.
template <class T, int DEPTH>
struct OfKey {
  static constexpr int kAcross = 64, kStages = 8;
  // Registers of the thread that copies, and of those that multiply: scales of float16 want more.
  static constexpr int kGiven = std::is_same_v<T, fp16> ? 24 : 40, kTaken = std::is_same_v<T, fp16> ? 240 : 232;
  using Down = Rows<T, kBlockRows, DEPTH>;
  using Tile = Rows<T, kAcross, DEPTH>;
  static constexpr int kBytes = 2 * Down::kBytes + kStages * Tile::kBytes;
};

// Whether the queries i0 .. i0 + ROWS - 1 all see all keys of j0 .. j1 - 1. What the first and the last one see tells,
// unless they have lengths.
template <int ROWS, class A>
DLKERN_DEVICE bool all_see(const A& x, int64_t b, int i0, int j0, int j1) {
  if (x.lengths) return range_of<ROWS>(x, b, i0).covers(j0, j1);
  const Span first = span_of(x, b, i0), last = span_of(x, b, min(i0 + ROWS, x.queries) - 1);
  return max(first.begin, last.begin) <= j0 && min(first.end, last.end) >= j1;
}

// What position hides of keys, from `first` on a warp, and queries becomes -infinity.
template <int N, class A>
DLKERN_DEVICE void hide_queries(float (&s)[N], const A& x, int64_t b, int first, int i0) {
#pragma unroll
  for (int column = 0; column < N / 2; column++) {
    const Span span = span_of(x, b, i0 + column / 2 * 8 + lane() % 4 * 2 + column % 2);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int j = first + lane() / 4 + 8 * r;
      if (j < span.begin || j >= span.end) s[column / 2 * 4 + 2 * r + column % 2] = minus_infinity();
    }
  }
}

// Keys j0 .. j0 + kBlockRows - 1 of head kh of batch b.
template <class T, int DEPTH, class A>
DLKERN_DEVICE void key_block(const BackwardArgs& args, const A& x, const float* deltas, int key_head, int b, int kh,
                             int j0, Origin origin) {
  using Memory = OfKey<T, DEPTH>;
  using Down = typename Memory::Down;
  using Tile = typename Memory::Tile;
  constexpr int kAcross = Memory::kAcross;
  DLKERN_DYNAMIC_SHARED(shared);
  DLKERN_SHARED(uint64_t, full, [Memory::kStages]);
  DLKERN_SHARED(uint64_t, empty, [Memory::kStages]);
  DLKERN_SHARED(uint64_t, rows_full, [1]);
  DLKERN_SHARED(float, numbers, [4 * kGroups][2][kAcross]);  // a warp's own: exponents and deltas of queries
  T* const keys = reinterpret_cast<T*>(shared);
  T* const values = keys + Down::kElements;
  const auto tile_of = [&](int use) { return values + Down::kElements + use % Memory::kStages * Tile::kElements; };
  const Ring<Memory::kStages> ring{full, empty};
  if (threadIdx.x == 0) {
    ring.init();
    mbarrier_init(rows_full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();

  // Queries that may see some of these keys.
  const int start = x.right < 0 ? 0 : max(0, j0 - x.right - shift_of(x)) / kAcross * kAcross;
  int end = x.left < 0 ? x.queries : min(x.queries, j0 + kBlockRows + x.left - shift_of(x));
  if (x.lengths && x.lengths_stride[1] == 0 && x.lengths[b * x.lengths_stride[0]] <= j0) end = 0;
  const int query_tiles = end > start ? static_cast<int>(ceil_div(end - start, kAcross)) : 0;
  const int steps = query_tiles * x.group;
  const auto head_at = [&](int n) { return kh * x.group + n / query_tiles; };
  const auto tile_at = [&](int n) { return start + n % query_tiles * kAcross; };

  if (threadIdx.x < 128) {
    give_registers_back<Memory::kGiven>();
    if (threadIdx.x != 0 || steps == 0) return;
    mbarrier_arrive_expect(rows_full, 2 * Down::kBytes);
    Down::copy(keys, args.key, rows_full, origin.key + j0, kh, b);
    Down::copy(values, args.value, rows_full, origin.key + j0, kh, b);
    for (int use = 0; use < 2 * steps; use++) {
      uint64_t* const barrier = ring.fill(use, Tile::kBytes);
      const int n = use / 2;
      const int row = origin.query + tile_at(n);
      Tile::copy(tile_of(use), use % 2 ? args.grad_output : args.query, barrier, row, head_at(n), b);
    }
  } else {
    take_registers<Memory::kTaken>();
    const int row = 64 * group(), first = j0 + warp_row();
    float (&mine)[2][kAcross] = numbers[warp() - 4];
    const auto put_numbers = [&](int n) {
#pragma unroll
      for (int column = lane(); column < kAcross; column += 32) {
        const int i = tile_at(n) + column;
        const int64_t place = static_cast<int64_t>(b * x.heads + head_at(n)) * x.queries + i;
        mine[0][column] = i < x.queries ? exponent_of(x, place) : INFINITY;
        mine[1][column] = i < x.queries ? deltas[place] : 0.0f;
      }
    };
    float of_key[DEPTH / 2] = {}, of_value[DEPTH / 2] = {};
    RowScale<T> scale;  // of of_key; probabilities themselves need none
    if (steps > 0) {
      put_numbers(0);
      mbarrier_wait(rows_full, 0);
    }
#pragma unroll 1
    for (int n = 0; n < steps; n++) {
      T *const queries = tile_of(2 * n), *const grads = tile_of(2 * n + 1);
      const int i0 = tile_at(n);
      float s[kAcross / 2], change[kAcross / 2];
      ring.wait(2 * n);
      if (kPacked<A> && i0 + kAcross > x.queries) {
        ring.wait(2 * n + 1);
        Tile::clear(queries, x.queries - i0);
        Tile::clear(grads, x.queries - i0);
        end_clearing();
      }
      wgmma_fence(s);
      start_row_products<DEPTH, kBlockRows>(s, keys, row, queries);
      ring.wait(2 * n + 1);
      wgmma_fence(change);
      start_row_products<DEPTH, kBlockRows>(change, values, row, grads);
      __syncwarp();  // the numbers are there
      wgmma_wait<1>(s);
      if (!all_see<kAcross>(x, b, i0, j0, j0 + kBlockRows)) hide_queries(s, x, b, first, i0);
      for_each<kAcross / 2>([&](int, int c, int i) { s[i] = exp2_fast(fmaf(s[i], args.scale, -mine[0][c])); });
      uint32_t p[kAcross / 16][4], q[kAcross / 16][4];
      to_operand<T>(p, s);
      wgmma_wait<0>(change);
      for_each<kAcross / 2>([&](int, int c, int i) { s[i] *= change[i] - mine[1][c]; });
      fit(scale, s, of_key);
      to_operand<T>(q, s);
      wgmma_fence(of_value, of_key, p, q);
      start_product<DEPTH>(of_value, p, grads);
      start_product<DEPTH>(of_key, q, queries);
      __syncwarp();  // the warp is done with the numbers
      if (n + 1 < steps) put_numbers(n + 1);
      wgmma_wait<0>(of_value, of_key, p, q);
      ring.release(2 * n);
      ring.release(2 * n + 1);
    }
    undo(scale, of_key);
    store_sums<DEPTH>(gradient_of<T, DEPTH>(args.grad_key, x, key_head, x.key_heads, x.keys, origin.key), of_key,
                      x.scale, first, x.keys);
    store_sums<DEPTH>(gradient_of<T, DEPTH>(args.grad_value, x, key_head, x.key_heads, x.keys, origin.key), of_value,
                      1.0f, first, x.keys);
  }
}

// blockIdx.x: head of keys, and tile of keys.
template <class T, int DEPTH>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_backward_key_sm90_kernel(const __grid_constant__ BackwardArgs args) {
#ifdef DLKERN_HOPPER
  const Args& x = args.x;
  const int blocks = static_cast<int>(ceil_div(x.keys, kBlockRows));
  const int key_head = static_cast<int>(blockIdx.x) / blocks;
  const int j0 = static_cast<int>(blockIdx.x) % blocks * kBlockRows;
  key_block<T, DEPTH>(args, x, args.delta, key_head, key_head / x.key_heads, key_head % x.key_heads, j0, {});
#endif
}
template <class T, int DEPTH>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_varlen_backward_key_sm90_kernel(const __grid_constant__ BackwardArgs args, const AttentionTile* tiles,
                                              int count) {
#ifdef DLKERN_HOPPER
  const AttentionTile tile = tiles[blockIdx.x % count];
  const int kh = static_cast<int>(blockIdx.x) / count;
  const float* const deltas = args.delta + static_cast<int64_t>(args.x.heads) * tile.first_query;
  key_block<T, DEPTH>(args, of_sequence<T>(args.x, tile), deltas, kh, 0, kh, tile.first_row,
                      {tile.first_query, tile.first_key});
#endif
}

// ---- Launchers ----

bool make_arguments(BackwardArgs& args, const Attention& a, const AttentionBackward& tensors) {
  args.x = arguments_of(a);
  args.gradient = operand_of(tensors.grad_output, a.depth, a.element);
  args.output = operand_of(tensors.output, a.depth, a.element);
  args.scale = args.x.scale * kLog2E;
  args.delta = tensors.delta;
  args.grad_query = tensors.grad_query;
  args.grad_key = tensors.grad_key;
  args.grad_value = tensors.grad_value;
  return args.output.aligned;
}

bool make_maps(BackwardArgs& args, const Attention& a, int query_rows, int key_rows) {
  const Args& x = args.x;
  return make_rows_map(args.query, x.query, a.depth, a.queries, a.heads, a.batch, query_rows) &&
         make_rows_map(args.grad_output, args.gradient, a.depth, a.queries, a.heads, a.batch, query_rows) &&
         make_rows_map(args.key, x.key, a.depth, a.keys, a.key_heads, a.batch, key_rows) &&
         make_rows_map(args.value, x.value, a.depth, a.keys, a.key_heads, a.batch, key_rows);
}

// Whether calls of so many blocks fit, as far as the operands do not tell.
bool fits_blocks(const Attention& a, int64_t query_blocks, int64_t key_blocks) {
  const int64_t enough = multiprocessors() / 2;
  if (!fits(a, arguments_of(a)) || query_blocks < enough || key_blocks < enough) return false;
  return attention::hopper::dispatch(a, [](auto* type, auto depth) {
    return runs_on_hopper(attention_backward_key_sm90_kernel<std::remove_pointer_t<decltype(type)>, depth.value>);
  });
}

}  // namespace

bool attention_backward_sm90(const Attention& a, const AttentionBackward& tensors, void* stream) {
  const int64_t query_blocks = a.batch * a.heads * ceil_div(a.queries, kBlockRows),
                key_blocks = a.batch * a.key_heads * ceil_div(a.keys, kBlockRows);
  if (a.keys <= kFewKeys || tensors.from_scores) return false;  // delta is made in another way
  BackwardArgs args{};
  if (!fits_blocks(a, query_blocks, key_blocks) || !make_arguments(args, a, tensors)) return false;
  return attention::hopper::dispatch(a, [&](auto* type, auto depth) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kDepth = depth.value;
    if (!make_maps(args, a, kBlockRows, OfQuery<T, kDepth>::kAcross)) return false;
    launch("attention_backward_query_sm90_kernel", attention_backward_query_sm90_kernel<T, kDepth>,
           dim3(static_cast<unsigned>(query_blocks)), dim3(kBlockThreads), OfQuery<T, kDepth>::kBytes, stream, false,
           args);
    make_maps(args, a, OfKey<T, kDepth>::kAcross, kBlockRows);
    launch("attention_backward_key_sm90_kernel", attention_backward_key_sm90_kernel<T, kDepth>,
           dim3(static_cast<unsigned>(key_blocks)), dim3(kBlockThreads), OfKey<T, kDepth>::kBytes, stream, false, args);
    return true;
  });
}

bool attention_varlen_backward_fits_sm90(const Attention& a, const AttentionBackward& tensors, int64_t query_tiles,
                                         int64_t key_tiles) {
  BackwardArgs args{};
  return fits_blocks(a, a.heads * query_tiles, a.key_heads * key_tiles) && make_arguments(args, a, tensors) &&
         make_maps(args, a, kBlockRows, kBlockRows);
}

void attention_varlen_backward_sm90(const Attention& a, const AttentionTiles& of_queries, const AttentionTiles& of_keys,
                                    const AttentionBackward& tensors, void* stream) {
  const int64_t query_blocks = a.heads * of_queries.count, key_blocks = a.key_heads * of_keys.count;
  if (key_blocks == 0) return;
  BackwardArgs args{};
  make_arguments(args, a, tensors);
  attention::hopper::dispatch(a, [&](auto* type, auto depth) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kDepth = depth.value;
    make_maps(args, a, kBlockRows, OfQuery<T, kDepth>::kAcross);
    if (query_blocks != 0)
      launch("attention_varlen_backward_query_sm90_kernel", attention_varlen_backward_query_sm90_kernel<T, kDepth>,
             dim3(static_cast<unsigned>(query_blocks)), dim3(kBlockThreads), OfQuery<T, kDepth>::kBytes, stream, false,
             args, of_queries.at, static_cast<int>(of_queries.count));
    make_maps(args, a, OfKey<T, kDepth>::kAcross, kBlockRows);
    launch("attention_varlen_backward_key_sm90_kernel", attention_varlen_backward_key_sm90_kernel<T, kDepth>,
           dim3(static_cast<unsigned>(key_blocks)), dim3(kBlockThreads), OfKey<T, kDepth>::kBytes, stream, false, args,
           of_keys.at, static_cast<int>(of_keys.count));
  });
}

}  // namespace dlkern::cuda

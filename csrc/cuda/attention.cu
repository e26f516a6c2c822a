// Attention of every score, forward: softmax(scores) value without a matrix of scores, by online softmax (Milakov and
// Gimelshein 2018, in the tiles of Dao 2023, "FlashAttention-2"). A block takes 64 queries of one head, 16 a warp, and
// one block of the value's columns through the keys they see; scores, sums and exponents stay in registers. The next
// keys are loaded while values are multiplied, and values while scores are made. Saved are two numbers a query, its
// largest score and the reciprocal of the sum of exponentials.
// Floor: 2 L S (D + Dv) operations a head at the tensor cores' rate; Gaussian and additive scores: L S D on ordinary ones.
#include "attention_tile.cuh"

namespace dlkern::cuda {
namespace {

using namespace attention;

template <class T>
constexpr int kForwardKeys = sizeof(T) == 2 ? 64 : 32;

template <class T, int SIZE>
constexpr int forward_shared_bytes() {
  return (kTileRows + 2 * kForwardKeys<T>)*TileOf<T, SIZE>::kStride * static_cast<int>(sizeof(T)) +
         Scratch<T, kForwardKeys<T>>::kFloats * static_cast<int>(sizeof(float));
}

// Queries i0 .. i0 + kTileRows - 1 of head h of batch b. blockIdx.y: block of the value's columns.
template <class T, int SIZE, bool PAIRWISE, class A>
DLKERN_DEVICE void forward_tile(const A& x, const Operand& output, int64_t head, int64_t b, int h, int i0) {
  using Mine = Layout<T>;
  constexpr int kKeys = kForwardKeys<T>, kStride = TileOf<T, SIZE>::kStride;
  DLKERN_DYNAMIC_SHARED(shared);
  T* const query_tile = reinterpret_cast<T*>(shared);
  T* const key_tile = query_tile + kTileRows * kStride;
  T* const value_tile = key_tile + kKeys * kStride;
  float* const scratch = reinterpret_cast<float*>(value_tile + kKeys * kStride);

  const int own = static_cast<int>(blockIdx.y) * SIZE, first = i0 + warp() * 16;
  const Side<T> queries{head_of<T>(x.query, b, h), x.query, query_tile, i0, x.queries};
  Side<T> keys{head_of<T>(x.key, b, h / x.group), x.key, key_tile, 0, x.keys};
  Side<T> values{head_of<T>(x.value, b, h / x.group), x.value, value_tile, 0, x.keys};
  const Range range = range_of<kTileRows>(x, b, i0);
  const bool deep = !kTurned<A> && x.depth > SIZE;

  Fragment<T, SIZE> sum;
  float largest[Mine::kRows], total[Mine::kRows];
#pragma unroll
  for (int r = 0; r < Mine::kRows; r++) largest[r] = minus_infinity(), total[r] = 0.0f;
  int j0 = range.first / kKeys * kKeys;
  if (!deep && j0 < range.last) {
    load_side<kTileRows, SIZE>(x, b, queries);
    keys.first = j0;
    load_side<kKeys, SIZE>(x, b, keys);
  }
  cp_async_commit();
#pragma unroll 1
  for (; j0 < range.last; j0 += kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // the keys are there, and everybody is done with the values before
    values.first = keys.first = j0;
    values.template load<kKeys, SIZE>(own, x.value_depth);
    cp_async_commit();
    const Places<T, false> at{first, j0};
    Fragment<T, kKeys> s;
    multiply<PAIRWISE, SIZE, kTurned<A>>(s, x, queries, keys, x.depth, static_cast<int>(ceil_div(x.depth, SIZE)) - 1);
    finish_scores(s, nullptr, x, b, h, at, range.covers(j0, j0 + kKeys));
#pragma unroll
    for (int r = 0; r < Mine::kRows; r++) {
      float highest = largest[r];
#pragma unroll
      for (int c = 0; c < s.kColumns; c++) highest = fmaxf(highest, s.at[r][c]);
      highest = row_max<T>(highest);
      const float base = highest == minus_infinity() ? 0.0f : highest, shrink = exponential(largest[r], base);
      largest[r] = highest;
      float some = 0.0f;
#pragma unroll
      for (int c = 0; c < s.kColumns; c++) some += s.at[r][c] = exponential(s.at[r][c], base);
      total[r] = total[r] * shrink + some;
#pragma unroll
      for (int c = 0; c < sum.kColumns; c++) sum.at[r][c] *= shrink;
    }
    if (x.dropout) {
      const uint32_t kept = kept_bits<T, kKeys>(x, head, at);
      s.each([&](int r, int c, float& value) {
        if (!(kept >> (r * s.kColumns + c) & 1)) value = 0.0f;
      });
    }
    cp_async_wait<0>();
    __syncthreads();  // the values are there, and everybody is done with the keys
    if (!deep && j0 + kKeys < range.last) {
      keys.first = j0 + kKeys;
      load_side<kKeys, SIZE>(x, b, keys);
    }
    cp_async_commit();
    add_product<SIZE>(sum, s, value_tile, x.value_depth - own, false, scratch);
  }

#pragma unroll
  for (int r = 0; r < Mine::kRows; r++) {
    const float all = row_sum<T>(total[r]), inverse = all == 0.0f ? 0.0f : 1.0f / all;
    const int i = first + Mine::row(r);
    if (blockIdx.y == 0 && i < x.queries && lane() % Mine::kAcross == 0) {
      x.largest[head * x.queries + i] = all == 0.0f ? 0.0f : largest[r];
      x.inverse[head * x.queries + i] = inverse;
    }
#pragma unroll
    for (int c = 0; c < sum.kColumns; c++) sum.at[r][c] *= inverse * x.kept;
  }
  T* const to = const_cast<T*>(head_of<T>(output, b, h));
  store_rows(to, output.stride[2], sum, first, x.queries, own, x.value_depth);
}

// blockIdx.x: head, and tile of queries, the last first: they see most where attention is causal.
template <class T, int SIZE, bool PAIRWISE, class A>
DLKERN_DEVICE void forward(const A& x, const Operand& output) {
  const int tiles = static_cast<int>(ceil_div(x.queries, kTileRows));
  const int64_t head = blockIdx.x / tiles, b = head / x.heads;
  const int h = static_cast<int>(head % x.heads), i0 = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * kTileRows;
  forward_tile<T, SIZE, PAIRWISE>(x, output, head, b, h, i0);
}
template <class T, int SIZE, bool PAIRWISE>
__global__ void __launch_bounds__(kThreads, 1)
    attention_forward_kernel(const __grid_constant__ Args x, const __grid_constant__ Operand output) {
  forward<T, SIZE, PAIRWISE>(x, output);
}
template <class T, int SIZE>
__global__ void __launch_bounds__(kThreads, 1)
    attention_rotary_forward_kernel(const __grid_constant__ RotaryArgs x, const __grid_constant__ Operand output) {
  forward<T, SIZE, false>(x, output);
}

// blockIdx.x: head, and tile of a sequence.
template <class T, int SIZE>
__global__ void __launch_bounds__(kThreads, 1)
    attention_varlen_forward_kernel(const __grid_constant__ Args args, const __grid_constant__ Operand output,
                                    const AttentionTile* tiles, int count) {
  const AttentionTile tile = tiles[blockIdx.x % count];
  const int h = static_cast<int>(blockIdx.x / count);
  forward_tile<T, SIZE, false>(of_sequence<T>(args, tile), from_row<T>(output, tile.first_query), h, 0, h,
                               tile.first_row);
}

// A warp takes a row: the reciprocal of its length.
template <class T>
__global__ void __launch_bounds__(kThreads)
    attention_unit_kernel(const __grid_constant__ Operand rows, int64_t heads, int64_t length, int depth, int64_t count,
                          float* unit) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp();
  if (row >= count) return;
  const T* at = head_of<T>(rows, row / length / heads, row / length % heads) + row % length * rows.stride[2];
  double squares = 0;
  for (int d = lane(); d < depth; d += 32) {
    const double value = to_float(at[d * rows.stride[3]]);
    squares += value * value;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, distance);
  const double size = sqrt(squares);
  if (lane() == 0) unit[row] = static_cast<float>(1.0 / (size < 1e-8 ? 1e-8 : size));
}

template <class T>
void make_unit(const Operand& rows, int64_t batch, int64_t heads, int64_t length, int64_t depth, float* unit,
               void* stream) {
  const int64_t count = batch * heads * length;
  if (count == 0) return;
  DLKERN_LAUNCH(attention_unit_kernel<T>, grid_of(ceil_div(count, kWarps)), dim3(kThreads), 0, stream, rows, heads,
                length, static_cast<int>(depth), count, unit);
}

}  // namespace

namespace attention {

Operand operand_of(const AttentionOperand& x, int64_t depth, Element element) {
  Operand to{x.data, {x.stride[0], x.stride[1], x.stride[2], x.stride[3]}, false};
  const int64_t piece = element == Element::float32 ? 4 : 8;
  to.aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride[3] == 1 && depth % piece == 0;
  for (int d = 0; d < 3; d++) to.aligned = to.aligned && x.stride[d] % piece == 0;
  return to;
}

Args arguments_of(const Attention& a) {
  Args x{};
  x.score = a.score;
  x.mask = a.mask;
  x.heads = static_cast<int>(a.heads);
  x.key_heads = static_cast<int>(a.key_heads);
  x.group = static_cast<int>(a.heads / a.key_heads);
  x.queries = static_cast<int>(a.queries);
  x.keys = static_cast<int>(a.keys);
  x.depth = static_cast<int>(a.depth);
  x.value_depth = static_cast<int>(a.value_depth);
  x.left = static_cast<int>(a.left);
  x.right = static_cast<int>(a.right);
  x.scale = static_cast<float>(a.scale);
  x.softcap = static_cast<float>(a.softcap);
  x.dropout = a.p > 0;
  x.kept = static_cast<float>(1 / (1 - a.p));
  x.threshold = static_cast<uint32_t>(philox::threshold(a.p));
  x.plain = a.mask == kNoMask && a.score != kCosineScore && a.softcap == 0 && !a.slopes;
  x.all_heads = a.batch * a.heads;
  x.query = operand_of(a.query, a.depth, a.element);
  x.key = operand_of(a.key, a.depth, a.element);
  x.value = operand_of(a.value, a.value_depth, a.element);
  x.mask_at = operand_of(a.mask_at, 1, a.element);
  x.lengths = a.lengths;
  x.lengths_stride[0] = a.lengths_stride[0], x.lengths_stride[1] = a.lengths_stride[1];
  x.slopes = a.slopes;
  x.weight = a.weight;
  x.wide_slopes = a.wide_slopes;
  x.wide_weight = a.wide_weight;
  x.seed = a.seed;
  x.query_unit = a.query_unit;
  x.key_unit = a.key_unit;
  x.largest = a.largest;
  x.inverse = a.inverse;
  return x;
}

RotaryArgs rotary_arguments_of(const Attention& a) {
  const AttentionAngles& angles = a.angles;
  RotaryArgs x{};
  static_cast<Args&>(x) = arguments_of(a);
  x.cos = angles.cos;
  x.sin = angles.sin;
  x.angles_stride = angles.batch_stride;
  x.half = static_cast<int>(angles.half);
  x.wide_angles = angles.wide;
  x.neighbours = angles.neighbours;
  x.packed = angles.half % (a.element == Element::float32 ? 4 : 8) == 0;
  for (const void* p : {angles.cos, angles.sin}) x.packed = x.packed && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return x;
}

void make_units(const Attention& a, const Args& x, void* stream) {
  if (a.score != kCosineScore) return;
  with_type(a.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    make_unit<T>(x.query, a.batch, a.heads, a.queries, a.depth, a.query_unit, stream);
    make_unit<T>(x.key, a.batch, a.key_heads, a.keys, a.depth, a.key_unit, stream);
  });
}

}  // namespace attention

bool attention_turns(const Attention& a) {
  return a.depth <= attention::most_columns(a.element) && !attention_fits_sm90(a);
}

void attention_forward(const Attention& a, const AttentionOperand& output, void* stream) {
  const Operand to = operand_of(output, a.value_depth, a.element);
  const auto grid = [&](int size) {
    return dim3(static_cast<unsigned>(a.batch * a.heads * ceil_div(a.queries, kTileRows)),
                blocks_of(a.value_depth, size));
  };
  if (a.angles.cos) {
    const RotaryArgs x = rotary_arguments_of(a);
    return dispatch_dot(a, [&](auto* type, auto size) {
      using T = std::remove_pointer_t<decltype(type)>;
      DLKERN_LAUNCH((attention_rotary_forward_kernel<T, size.value>), grid(size.value), dim3(kThreads),
                    (forward_shared_bytes<T, size.value>()), stream, x, to);
    });
  }
  if (attention_forward_sm90(a, output, stream)) return;
  const Args x = arguments_of(a);
  make_units(a, x, stream);
  dispatch(a, [&](auto* type, auto size, auto pairwise) {
    using T = std::remove_pointer_t<decltype(type)>;
    DLKERN_LAUNCH((attention_forward_kernel<T, size.value, pairwise.value>), grid(size.value), dim3(kThreads),
                  (forward_shared_bytes<T, size.value>()), stream, x, to);
  });
}

void attention_varlen_forward(const Attention& a, const AttentionTables& tables, const AttentionOperand& output,
                              void* stream) {
  attention_varlen_forward_sm90(a, tables.of_hopper, output, stream);
  const AttentionTiles& tiles = tables.others;
  if (a.heads * tiles.count == 0) return;
  const Args x = arguments_of(a);
  dispatch_dot(a, [&](auto* type, auto size) {
    using T = std::remove_pointer_t<decltype(type)>;
    DLKERN_LAUNCH((attention_varlen_forward_kernel<T, size.value>),
                  dim3(static_cast<unsigned>(a.heads * tiles.count), blocks_of(a.value_depth, size.value)),
                  dim3(kThreads), (forward_shared_bytes<T, size.value>()), stream, x,
                  operand_of(output, a.value_depth, a.element), tiles.at, static_cast<int>(tiles.count));
  });
}

}  // namespace dlkern::cuda

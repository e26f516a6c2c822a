// Attention in 16-bit types on Hopper, forward, heads of 64 and 128: the online softmax of attention.cu by tensor copies
// and wgmma (Shah et al. 2024, "FlashAttention-3"). A block takes 128 queries of one head, 64 a warpgroup, through the
// keys they see, 128 at a time; one thread of a third warpgroup copies tiles of keys and values ahead. Probabilities are
// rounded in registers and multiplied from there. While a warpgroup makes the probabilities of one tile, the tensor
// cores add the values of the tile before; and the two take turns (ping-pong): one's products run while the other is at
// its exponentials.
// attention.cu serves where this does not: other scores, masks but those by position, dropout, other sizes, operands
// that are not 16-byte aligned, few tiles, other GPUs.
// Floor: 2 L S (D + Dv) operations a head at the tensor cores' 16-bit rate.
#include "attention_sm90.cuh"

namespace dlkern::cuda {
namespace {

using namespace attention;
using namespace attention::hopper;

constexpr int kKeys = 128;

// Shared memory: the queries, and a ring of tiles of keys and of values.
template <class T, int DEPTH>
struct Forward {
  using Tile = Rows<T, 128, DEPTH>;
  static constexpr int kStages = 4, kBytes = (1 + kStages) * Tile::kBytes;
};

struct ForwardArgs {
  Args x;
  TensorMap query, key, value;
  Operand output;
  float scale;  // of scores that are exponents of 2
};

// Scores become exponentials of what they are over the largest so far, and `shrink` what older ones must be multiplied by.
template <class T>
DLKERN_DEVICE void softmax_step(float (&s)[kKeys / 2], float scale, float (&largest)[2], float (&total)[2],
                                float (&shrink)[2]) {
  float highest[2][2] = {{largest[0], largest[0]}, {largest[1], largest[1]}}, some[2][2] = {};
  for_each<kKeys / 2>([&](int r, int, int i) { highest[r][i % 2] = fmaxf(highest[r][i % 2], s[i]); });
  float base[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float now = row_max<T>(fmaxf(highest[r][0], highest[r][1]));
    base[r] = now == minus_infinity() ? 0.0f : now * scale;
    shrink[r] = exp2_fast(fmaf(largest[r], scale, -base[r]));
    largest[r] = now;
  }
  for_each<kKeys / 2>([&](int r, int, int i) { some[r][i % 2] += s[i] = exp2_fast(fmaf(s[i], scale, -base[r])); });
#pragma unroll
  for (int r = 0; r < 2; r++) total[r] = total[r] * shrink[r] + (some[r][0] + some[r][1]);
}

// Queries i0 .. i0 + kBlockRows - 1 of head h of batch b.
template <class T, int DEPTH, class A>
DLKERN_DEVICE void forward_block(const ForwardArgs& args, const A& x, int head, int b, int h, int i0, Origin origin) {
  using Memory = Forward<T, DEPTH>;
  using Tile = typename Memory::Tile;
  DLKERN_DYNAMIC_SHARED(shared);
  DLKERN_SHARED(uint64_t, full, [Memory::kStages]);
  DLKERN_SHARED(uint64_t, empty, [Memory::kStages]);
  DLKERN_SHARED(uint64_t, queries_full, [1]);
  T* const queries = reinterpret_cast<T*>(shared);
  const auto tile_of = [&](int use) { return queries + (1 + use % Memory::kStages) * Tile::kElements; };
  const Ring<Memory::kStages> ring{full, empty};
  if (threadIdx.x == 0) {
    ring.init();
    mbarrier_init(queries_full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();

  const Range range = range_of<kBlockRows>(x, b, i0);
  const int start = range.first / kKeys * kKeys;
  const int tiles = range.last > start ? static_cast<int>(ceil_div(range.last - start, kKeys)) : 0;

  // Uses of the ring: keys of the first tile, then of each next one and values of the one before, values of the last one.
  if (threadIdx.x < 128) {
    give_registers_back<40>();
    if (threadIdx.x != 0 || tiles == 0) return;
    mbarrier_arrive_expect(queries_full, Tile::kBytes);
    Tile::copy(queries, args.query, queries_full, origin.query + i0, h, b);
    for (int use = 0; use < 2 * tiles; use++) {
      const bool last = use + 1 == 2 * tiles, of_values = last || (use > 0 && use % 2 == 0);
      const int tile = last ? tiles - 1 : of_values ? use / 2 - 1 : (use + 1) / 2;
      uint64_t* const barrier = ring.fill(use, Tile::kBytes);
      const int row = origin.key + start + tile * kKeys;
      Tile::copy(tile_of(use), of_values ? args.value : args.key, barrier, row, h / x.group, b);
    }
  } else {
    take_registers<232>();
    const int row = 64 * group(), first = i0 + warp_row();
    const Range seen = range_of<64>(x, b, i0 + row);
    float s[kKeys / 2], sum[DEPTH / 2] = {}, largest[2] = {minus_infinity(), minus_infinity()}, total[2] = {},
                                    shrink[2];
    uint32_t p[kKeys / 16][4];
    const auto soften = [&](int j0) {
      if (!seen.covers(j0, j0 + kKeys)) hide_keys(s, x, b, first, j0);
      softmax_step<T>(s, args.scale, largest, total, shrink);
    };
    if (tiles > 0) {
      mbarrier_wait(queries_full, 0);
      ring.wait(0);
      wgmma_fence(s);
      start_row_products<DEPTH, 128>(s, queries, row, tile_of(0));
      wgmma_wait<0>(s);
      ring.release(0);
      soften(start);
      to_operand<T>(p, s);
      if (group() == 1 && tiles > 1) barrier_arrive<256>(1);
#pragma unroll 1
      for (int n = 1; n < tiles; n++) {
        const int keys_use = 2 * n - 1, values_use = 2 * n;
        ring.wait(keys_use);
        barrier_sync<256>(1 + group());
        wgmma_fence(s);
        start_row_products<DEPTH, 128>(s, queries, row, tile_of(keys_use));
        ring.wait(values_use);
        wgmma_fence(sum, p);
        start_product<DEPTH>(sum, p, tile_of(values_use));
        if (group() == 0 || n + 1 < tiles) barrier_arrive<256>(2 - group());
        wgmma_wait<1>(s);
        ring.release(keys_use);
        soften(start + n * kKeys);
        wgmma_wait<0>(sum, p);
        ring.release(values_use);
        for_each<DEPTH / 2>([&](int r, int, int i) { sum[i] *= shrink[r]; });
        to_operand<T>(p, s);
      }
      ring.wait(2 * tiles - 1);
      if (kPacked<A> && start + tiles * kKeys > x.keys) {
        Tile::clear(tile_of(2 * tiles - 1), x.keys - start - (tiles - 1) * kKeys);
        end_clearing();
      }
      wgmma_fence(sum, p);
      start_product<DEPTH>(sum, p, tile_of(2 * tiles - 1));
      wgmma_wait<0>(sum, p);
    }

    T* const to = const_cast<T*>(head_of<T>(args.output, b, h));
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int i = first + lane() / 4 + 8 * r;
      const float all = row_sum<T>(total[r]), inverse = all == 0.0f ? 0.0f : 1.0f / all;
      if (i >= x.queries) continue;
      if (lane() % 4 == 0) {
        x.largest[static_cast<int64_t>(head) * x.queries + i] = all == 0.0f ? 0.0f : largest[r] * x.scale;
        x.inverse[static_cast<int64_t>(head) * x.queries + i] = inverse;
      }
#pragma unroll
      for (int j = 0; j < DEPTH / 8; j++) {
        const Pack<T, 2> pair{from_float<T>(sum[4 * j + 2 * r] * inverse),
                              from_float<T>(sum[4 * j + 2 * r + 1] * inverse)};
        store_pack(to + (origin.query + i) * args.output.stride[2] + 8 * j + lane() % 4 * 2, pair);
      }
    }
  }
}

// blockIdx.x: head, and tile of queries, the last first: they see most where attention is causal.
template <class T, int DEPTH>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_forward_sm90_kernel(const __grid_constant__ ForwardArgs args) {
#ifdef DLKERN_HOPPER
  const Args& x = args.x;
  const int blocks = static_cast<int>(ceil_div(x.queries, kBlockRows));
  const int head = static_cast<int>(blockIdx.x) / blocks;
  const int i0 = (blocks - 1 - static_cast<int>(blockIdx.x) % blocks) * kBlockRows;
  forward_block<T, DEPTH>(args, x, head, head / x.heads, head % x.heads, i0, {});
#endif
}

// blockIdx.x: head, and tile of a sequence.
template <class T, int DEPTH>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_varlen_forward_sm90_kernel(const __grid_constant__ ForwardArgs args, const AttentionTile* tiles,
                                         int count) {
#ifdef DLKERN_HOPPER
  const AttentionTile tile = tiles[blockIdx.x % count];
  const int h = static_cast<int>(blockIdx.x) / count;
  forward_block<T, DEPTH>(args, of_sequence<T>(args.x, tile), h, 0, h, tile.first_row,
                          {tile.first_query, tile.first_key});
#endif
}

bool make_arguments(ForwardArgs& args, const Attention& a, const AttentionOperand& output) {
  const Args& x = args.x = arguments_of(a);
  args.output = operand_of(output, a.depth, a.element);
  args.scale = x.scale * kLog2E;
  return args.output.aligned && make_rows_map(args.query, x.query, a.depth, a.queries, a.heads, a.batch, kBlockRows) &&
         make_rows_map(args.key, x.key, a.depth, a.keys, a.key_heads, a.batch, kKeys) &&
         make_rows_map(args.value, x.value, a.depth, a.keys, a.key_heads, a.batch, kKeys);
}

bool fits_tiles(const Attention& a, int64_t blocks) {
  if (!fits(a, arguments_of(a)) || blocks < multiprocessors() / 2)
    return false;  // small tiles then use more of the GPU
  return attention::hopper::dispatch(a, [](auto* type, auto depth) {
    return runs_on_hopper(attention_forward_sm90_kernel<std::remove_pointer_t<decltype(type)>, depth.value>);
  });
}

int64_t blocks_of_queries(const Attention& a) { return a.batch * a.heads * ceil_div(a.queries, kBlockRows); }

}  // namespace

bool attention_fits_sm90(const Attention& a) { return fits_tiles(a, blocks_of_queries(a)); }

bool attention_forward_sm90(const Attention& a, const AttentionOperand& output, void* stream) {
  ForwardArgs args{};
  if (!attention_fits_sm90(a) || !make_arguments(args, a, output)) return false;
  attention::hopper::dispatch(a, [&](auto* type, auto depth) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("attention_forward_sm90_kernel", attention_forward_sm90_kernel<T, depth.value>,
           dim3(static_cast<unsigned>(blocks_of_queries(a))), dim3(kBlockThreads), Forward<T, depth.value>::kBytes,
           stream, false, args);
  });
  return true;
}

bool attention_varlen_forward_fits_sm90(const Attention& a, const AttentionOperand& output, int64_t tiles) {
  ForwardArgs args{};
  return fits_tiles(a, a.heads * tiles) && make_arguments(args, a, output);
}

void attention_varlen_forward_sm90(const Attention& a, const AttentionTiles& tiles, const AttentionOperand& output,
                                   void* stream) {
  if (a.heads * tiles.count == 0) return;
  ForwardArgs args{};
  make_arguments(args, a, output);
  attention::hopper::dispatch(a, [&](auto* type, auto depth) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("attention_varlen_forward_sm90_kernel", attention_varlen_forward_sm90_kernel<T, depth.value>,
           dim3(static_cast<unsigned>(a.heads * tiles.count)), dim3(kBlockThreads), Forward<T, depth.value>::kBytes,
           stream, false, args, tiles.at, static_cast<int>(tiles.count));
  });
}

}  // namespace dlkern::cuda

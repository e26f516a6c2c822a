// Attention, forward: softmax(scores) value without a matrix of scores, by online softmax (Milakov and Gimelshein 2018,
// in the tiles of Dao et al. 2022, "FlashAttention"). A thread takes a chunk of queries of one head through all keys,
// kKeys at a time, and keeps the largest score, the sum of exponentials and the weighted sum of values of each query;
// what is saved for the backward is two numbers a query. Tiles that no query sees are skipped. Every query's sums run
// over the keys in the same blocks, whatever the chunks and threads. Floor: 2 L S (D + Dv) operations a head.
#include "attention_tile.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

using namespace attention_detail;

constexpr int64_t kMostRows = 4 * kRows, kMostTiledRows = 16 * kStrip;  // of a chunk

// One row of a tile: exponentials relative to the largest score so far, what was summed before brought down to it.
template <class T, int SCORE>
inline void softmax_row(Tile<T, SCORE>& tile, int64_t r0, int64_t r, int64_t count,
                        const typename Tile<T, SCORE>::Row& row, acc_t<T>& largest, acc_t<T>* sum, acc_t<T>* output) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<A>;
  const A minus_infinity = -__builtin_inf();
  const A highest = largest_lane(row.top) * row.factor, next = highest > largest ? highest : largest;
  const A base = next == minus_infinity ? A(0) : next;
  V total = load(sum);
  if (next != largest) {
    const V shrink = exp_nonpositive(broadcast<A>(largest - base));
    total *= shrink;
    for (int64_t d = 0; d < tile.value_depth; d += lanes) store(output + d, load(output + d) * shrink);
    largest = next;
  }
  A* x = tile.scores + r * kKeys;
  for (int64_t j = 0; j < count; j += lanes) {
    const V e = exp_nonpositive(load(x + j) * row.factor - base);
    total += e;
    store(x + j, e);
  }
  if (tile.s.p > 0) tile.each_dropped(r0, r, count, [&](int64_t j, V factor) { store(x + j, load(x + j) * factor); });
  store(sum, total);
}

#if DLKERN_TILE_CODE
// The same for a strip of rows, which leaves the exponentials as a left side for products by tiles.
template <class T, int SCORE>
void softmax_strip(Tile<T, SCORE>& tile, int64_t r0, int64_t rows, int64_t count, const Seen& seen, float* largest,
                   float* sums, float* output) {
  constexpr int64_t lanes = kTile;
  constexpr bool whole = kParts<T> == kParts<float>;
  const float minus_infinity = -__builtin_inff();
  const bool plain = count == kKeys && tile.is_plain(count, seen.last_begin, seen.first_end);
  for (int64_t t = 0; t < rows; t += lanes) {
    vfloat top[lanes];
    alignas(64) float factors[lanes], bases[lanes], shrinks[lanes];
    const int64_t some = smaller(lanes, rows - t);
    for (int64_t r = 0; r < some; ++r) {
      if (plain) {
        const float* x = tile.scores + (t + r) * kKeys;
        vfloat v[2] = {load(x), load(x + lanes)};
#pragma GCC unroll 3
        for (int64_t j = 2 * lanes; j < kKeys; j += 2 * lanes)
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const vfloat other = load(x + j + half * lanes);
            v[half] = other > v[half] ? other : v[half];
          }
        top[r] = v[0] > v[1] ? v[0] : v[1];
        factors[r] = static_cast<float>(tile.s.scale);
        continue;
      }
      const auto row = tile.finish_row(r0, t + r, count, seen.begin[t + r], seen.end[t + r], false);
      top[r] = row.top;
      factors[r] = row.factor;
    }
    for (int64_t r = some; r < lanes; ++r) {
      top[r] = broadcast<float>(minus_infinity);
      factors[r] = 1;
    }
    const vfloat highest = largest_lanes(top) * load(factors), before = load(largest + t);
    const vfloat next = highest > before ? highest : before;
    const vfloat base = next == minus_infinity ? vfloat{} : next;
    store(largest + t, next);
    store(bases, base);
    // Nothing was summed before a row's first keys.
    store(shrinks,
          (next != before) & (before != minus_infinity) ? exp_nonpositive(before - base) : broadcast<float>(1));
    for (int64_t r = 0; r < some; ++r) {
      vfloat total = load(sums + (t + r) * lanes);
      if (shrinks[r] != 1) {
        const vfloat by = broadcast<float>(shrinks[r]);
        float* out = output + (t + r) * tile.value_depth;
        total *= by;
        for (int64_t d = 0; d < tile.value_depth; d += lanes) store(out + d, load(out + d) * by);
      }
      const Exponential<T> exponential(factors[r], bases[r]);
      float* x = tile.scores + (t + r) * kKeys;
      char* to = tile.weight_strip + t / kTile * kTileBytes + r * 64;
      if (tile.s.p > 0) {
        for (int64_t j = 0; j < count; j += lanes) {
          const vfloat e = exponential(load(x + j));
          total += e;
          store(x + j, e);
        }
        tile.each_dropped(r0, t + r, count, [&](int64_t j, vfloat factor) { store(x + j, load(x + j) * factor); });
      } else if (count == kKeys) {
        vfloat others{};
#pragma GCC unroll 4
        for (int64_t j = 0; j < kKeys; j += kTileStep, to += kStepBytes<T>) {
          const vfloat low = exponential(load(x + j)), high = exponential(load(x + j + lanes));
          total += low;
          others += high;
          tiles_detail::store_words<kParts<T>, whole>(low, high, to);
        }
        total += others;
      } else {
        for (int64_t j = 0; j < count; j += kTileStep, to += kStepBytes<T>) {
          const vfloat low = exponential(load(x + j));
          const vfloat high = j + lanes < count ? exponential(load(x + j + lanes)) : vfloat{};
          total += low;
          total += high;
          tiles_detail::store_words<kParts<T>, whole>(low, high, to);
        }
      }
      store(sums + (t + r) * lanes, total);
    }
  }
}
#endif

template <class T, int SCORE> void forward_chunk(const AttentionArgs<T>& args, int64_t b, int64_t h, int64_t i0,
                                                 int64_t rows, int64_t chunk) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<A>;
  const AttentionShape& s = args.shape;
  const int64_t value_depth = padded<A>(s.value_depth), tile_size = Tile<T, SCORE>::size(s, chunk);
  A* memory = scratch<A>(Slot::family_0, tile_size + chunk * (value_depth + lanes));
  Tile<T, SCORE> tile(args, chunk, memory);
  A *output = memory + tile_size, *sums = output + chunk * value_depth;
  A largest[kMostTiledRows];
  for (int64_t r = 0; r < chunk; ++r) largest[r] = -__builtin_inf();
  for (int64_t i = 0; i < rows * value_depth; i += lanes) store(output + i, V{});
  for (int64_t i = 0; i < rows * lanes; i += lanes) store(sums + i, V{});

  tile.set_head(b, h);
  tile.load_queries(i0, rows);
  const int64_t row_step = tile.strips ? kStrip : kRows;
  const Span span(args, b, i0, rows);
  for (int64_t j0 = span.first / kKeys * kKeys; j0 < span.last; j0 += kKeys) {
    tile.load_keys(j0, smaller(kKeys, s.keys - j0));
    for (int64_t r0 = 0; r0 < rows; r0 += row_step) {
      const int64_t some = smaller(row_step, rows - r0);
      const Seen seen(args, b, i0 + r0, some);
      if (seen.last <= j0 || seen.first >= j0 + tile.n) continue;
      const int64_t count = smaller(tile.n, seen.last - j0);
      if (tile.strips) tile.choose(r0);
      tile.multiply(r0, some, count);
      if constexpr (kTiled<T, SCORE>)
        if (tile.by_strips) {
          softmax_strip(tile, r0, some, count, seen, largest + r0, sums + r0 * lanes, output + r0 * value_depth);
          tile.add_values(some, count, output + r0 * value_depth);
          continue;
        }
      for (int64_t r = 0; r < some; ++r) {
        const auto row = tile.finish_row(r0, r, count, seen.begin[r], seen.end[r], false);
        softmax_row(tile, r0, r, count, row, largest[r0 + r], sums + (r0 + r) * lanes, output + (r0 + r) * value_depth);
      }
      tile.add_values(some, count, output + r0 * value_depth);
    }
  }

  const Strided<T>& to = args.output;
  for (int64_t r = 0; r < rows; ++r) {
    const A sum = reduce_add(load(sums + r * lanes)), inverse = sum == 0 ? A(0) : A(1) / sum;
    args.largest[tile.row_number(i0 + r)] = sum == 0 ? A(0) : largest[r];
    args.inverse[tile.row_number(i0 + r)] = inverse;
    T* out = to.data + b * to.stride[0] + h * to.stride[1] + (i0 + r) * to.stride[2];
    for (int64_t d = 0; d < s.value_depth; d += lanes) {
      store_some<T>(out + d, load(output + r * value_depth + d) * inverse, s.value_depth - d);
    }
  }
}

template <class T, int SCORE> void forward(const AttentionArgs<T>& args) {
  const AttentionShape& s = args.shape;
  const int64_t heads = s.batch * s.heads, threads = num_threads();
  const bool tiled = is_tiled<T, SCORE>(s);
  const int64_t row_step = tiled ? kStrip : kRows;
  int64_t chunk = tiled ? kMostTiledRows : kMostRows;
  while (chunk > row_step && heads * ceil_div(s.queries, chunk) < 2 * threads) chunk /= 2;
  const int64_t chunks = ceil_div(s.queries, chunk), tasks = heads * chunks;
  const double work = static_cast<double>(heads * s.queries) * static_cast<double>(s.keys * (s.depth + s.value_depth));
  const int64_t workers = work < kWorthWaking ? 1 : smaller(threads, tasks);
  // Later chunks first: they see more keys where attention is causal.
  parallel_tasks(workers, tasks, [&](int64_t task) {
    const int64_t head = task / chunks, i0 = (chunks - 1 - task % chunks) * chunk;
    on_tiles<T, SCORE>(tiled, [&] {
      forward_chunk<T, SCORE>(args, head / s.heads, head % s.heads, i0, smaller(chunk, s.queries - i0),
                              smaller(chunk, ceil_div(s.queries, row_step) * row_step));
    });
  });
}

}  // namespace

#define DLKERN_DEFINE_ATTENTION(T)                                  \
  void attention_forward(const AttentionArgs<T>& args) {            \
    switch (args.shape.score) {                                     \
      case kGaussianScore: return forward<T, kGaussianScore>(args); \
      case kAdditiveScore: return forward<T, kAdditiveScore>(args); \
      case kCosineScore: return forward<T, kCosineScore>(args);     \
      default: return forward<T, kDotScore>(args);                  \
    }                                                               \
  }
DLKERN_DEFINE_ATTENTION(float)
DLKERN_DEFINE_ATTENTION(double)
DLKERN_DEFINE_ATTENTION(bfloat16)
DLKERN_DEFINE_ATTENTION(float16)

}  // namespace dlkern::cpu::DLKERN_ISA

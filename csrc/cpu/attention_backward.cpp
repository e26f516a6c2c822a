// Attention, backward: probabilities are made again from the two saved numbers of each query, tile by tile.
//
// With P the probabilities, g the output's gradient and delta = sum(g output) of a query, the gradient of its scores is
// dS = P (g V^T - delta). A thread takes the keys of one head, kKeys at a time, through all queries: the gradients of
// keys and values are complete when it is done. Queries' gradients are partial sums where a head's keys are split over
// several tasks (few heads); they are added in the tasks' order. How keys are split depends on the shape alone, and
// nothing is added by two threads: the same bits for any number of threads. A mask's gradient is another pass, in which
// a thread takes a tile of the mask through all that share it. Floor: 2.5 times the forward's operations.
#include "attention_tile.h"
#include "wide.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

using namespace attention_detail;

constexpr int64_t kTasks = 8;  // at least, where a head has that many blocks of keys

constexpr int64_t kBlockRows = 256, kBlockStrips = kBlockRows / kStrip;  // of queries, where products are of strips

// A tile and the gradient of its scores.
template <class T, int SCORE> struct GradientTile : Tile<T, SCORE> {
  using Base = Tile<T, SCORE>;
  using Base::args, Base::s, Base::lanes, Base::value_depth, Base::scores;
  using typename Base::A;
  using typename Base::V;
  const AttentionBackwardArgs<T>& all;
  const A* delta;  // [batch, heads, queries]
  Rows<A> grad;
  A *grad_copy, *value_turned, *change;
  A of_all[kRows];  // sums of a tile's probabilities, before dropout
  // Strips of a block of queries, and of the loaded values for products with gradients.
  char *block_queries, *block_grads, *value_squares;
  const char* grad_strip;
  int64_t grad_bytes = 0;
  float block_query_most[kBlockStrips], block_grad_most[kBlockStrips];
  bool through_cap = true;  // dS of scores before their cap, or behind it

  static int64_t size(const AttentionShape& s) {
    int64_t bytes_of_strips = 0;
    if constexpr (kTiled<T, SCORE>)
      if (is_tiled<T, SCORE>(s))
        bytes_of_strips = kBlockStrips * (strip_bytes<T>(s.depth) + strip_bytes<T>(s.value_depth)) +
                          kKeyStrips * strip_bytes<T>(s.value_depth);
    return bytes_of_strips / static_cast<int64_t>(sizeof(A)) + Base::size(s, kRows) + kRows * padded<A>(s.value_depth) +
           s.value_depth * kKeys + kRows * kKeys;
  }
  GradientTile(const AttentionBackwardArgs<T>& arguments, const A* deltas, A* memory)
      : Base(arguments.forward, kRows, memory), all(arguments), delta(deltas) {
    grad_copy = memory + Base::size(s, kRows);
    value_turned = grad_copy + kRows * value_depth;
    change = value_turned + s.value_depth * kKeys;
    if constexpr (kTiled<T, SCORE>) {
      grad_bytes = strip_bytes<T>(s.value_depth);
      block_queries = reinterpret_cast<char*>(change + kRows * kKeys);
      block_grads = block_queries + kBlockStrips * this->strip_of_depth;
      value_squares = block_grads + kBlockStrips * grad_bytes;
    }
  }
  // Blocks of queries and of keys, which each_part() then hands on as the products' rows at a time:
  // f(first, count).
  int64_t block_rows() const { return this->strips ? kBlockRows : kRows; }
  void load_block_keys(int64_t first, int64_t count) {
    this->set_keys(first, count);
    if constexpr (kTiled<T, SCORE>)
      if (this->strips) {
        pack_keys(*this);
        return pack_value_squares(*this);
      }
    load_keys();
  }
  void load_block(int64_t first, int64_t rows) {
    if constexpr (kTiled<T, SCORE>)
      for (int64_t r = 0; this->strips && r < rows; r += kStrip) {
        this->set_queries(first + r, smaller(kStrip, rows - r));
        pack_block_strip(*this, r / kStrip);
      }
  }
  template <class F> void each_part(int64_t first, int64_t rows, const F& f) {
    const int64_t step = this->strips ? kStrip : kRows;
    for (int64_t r = 0; r < rows; r += step) {
      const int64_t some = smaller(step, rows - r);
      if (this->strips && is_bounded(block_query_most[r / kStrip]) && is_bounded(this->key_most) &&
          fit(block_grad_most[r / kStrip])) {
        use_strips(first + r, some, block_queries + r / kStrip * this->strip_of_depth,
                   block_grads + r / kStrip * grad_bytes);
      } else {
        if (!this->has_key_vectors) load_keys();
        load_queries(first + r, some);
      }
      f(first + r, some);
    }
  }
  bool fit(float grad_most) const {
    return is_bounded(grad_most) && is_bounded(this->value_most) && are_large(grad_most, this->value_most);
  }
  void use_strips(int64_t first, int64_t rows, char* queries, const char* grads) {
    this->by_strips = true;
    this->set_queries(first, rows);
    this->query_strips = queries;
    grad_strip = grads;
  }
  // As vectors.
  void load_keys(int64_t first, int64_t count) {
    this->set_keys(first, count);
    load_keys();
  }
  void load_keys() {
    const int64_t count = this->n;
    this->load_key_vectors();
    transpose_rows(this->value.data, this->value.row, count, s.value_depth, value_turned, kKeys);
  }
  void load_queries(int64_t first, int64_t rows) {
    this->by_strips = false;
    this->set_queries(first, rows);
    this->load_query_vectors();
    load_grad_rows(first, rows);
  }
  const T* grad_at(int64_t i) const {
    const Strided<const T>& g = all.grad_output;
    return g.data + this->b * g.stride[0] + this->h * g.stride[1] + i * g.stride[2];
  }
  void load_grad_rows(int64_t first, int64_t rows) {
    grad = rows_of<true>(grad_at(first), all.grad_output.stride[2], all.grad_output.stride[3], rows, s.value_depth,
                         grad_copy);
  }
  void multiply_grad(int64_t rows, int64_t width) {
    if constexpr (kTiled<T, SCORE>)
      if (this->by_strips) return multiply_grad_strip(*this, rows, width);
    product(rows, width, s.value_depth, grad.data, grad.row, 1, value_turned, kKeys, change, kKeys, false,
            this->k_step);
  }
  // Leaves P, with dropout, in `scores` and dS in `change`. Where a tile has all keys that a query sees, delta is
  // sum(P g V^T), which is the same number but cancels exactly where one key has all the weight.
  void compute(int64_t rows, int64_t count, const Seen& seen) {
    alignas(64) A factors[kKeys];  // of dropout
    this->multiply(0, rows, count);
    multiply_grad(rows, padded<A>(count));
    for (int64_t r = 0; r < rows; ++r) {
      const A factor = this->finish_row(0, r, count, seen.begin[r], seen.end[r], true).factor;
      const int64_t row = this->row_number(this->i0 + r);
      const A largest = args.largest[row], inverse = args.inverse[row];
      A *x = scores + r * kKeys, *d = change + r * kKeys;
      const A* cap = this->slope_of_cap + r * kKeys;
      V sums{}, all{};
      for (int64_t j = 0; j < count; j += lanes) {
        const V p = exp_nonpositive(load(x + j) * factor - largest) * inverse;
        all += p;
        store(x + j, p);
      }
      of_all[r] = reduce_add(all);
      if (s.p > 0)
        this->each_dropped(0, r, count, [&](int64_t j, V factor) {
          store(factors + j, factor);
          store(d + j, load(d + j) * factor);
        });
      const bool whole = seen.begin[r] >= this->j0 && seen.end[r] <= this->j0 + count;
      A sum = delta[row];
      if (whole) {
        for (int64_t j = 0; j < count; j += lanes) sums += load(x + j) * load(d + j);
        // Divided by what probabilities sum to, which rounding leaves beside 1: where gradients of them are alike, it shows.
        sum = reduce_add(sums) / (of_all[r] > 0 ? of_all[r] : A(1));
      }
      for (int64_t j = 0; j < count; j += lanes) {
        const V p = load(x + j);
        V change_of_score = p * (load(d + j) - sum);
        if (s.softcap != 0 && through_cap) change_of_score *= load(cap + j);
        if (s.p > 0) store(x + j, p * load(factors + j));
        store(d + j, change_of_score);
      }
    }
  }
};

// What a pairwise score hands on, all added to: rows of queries and keys, [depth] of the weight; depth is padded, and
// lanes hold terms of the scores' sums, so that nothing is summed over lanes.
// With t = tanh(q + k): dq = sum over keys of dS w (1 - t^2), dk = the same over queries, dw = sum of dS t.
template <Pairwise KIND, int R, class A>
[[gnu::always_inline]] inline void pairwise_backward_rows(int64_t keys, int64_t depth, const A* q, const A* k,
                                                          Vec<A> weight, const A* change, A* grad_query, A* grad_key,
                                                          A* grad_weight) {
  using V = Vec<A>;
  constexpr int64_t kBlock = 32;  // short sums
  V x[R];
  for (int r = 0; r < R; ++r) x[r] = load(q + r * depth);
  for (int64_t j0 = 0; j0 < keys; j0 += kBlock) {
    V of_query[R] = {}, of_weight{};
    for (int64_t j = j0; j < smaller(j0 + kBlock, keys); ++j) {
      const V key = load(k + j * depth);
      V of_key{};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const A d = change[r * kKeys + j];
        if constexpr (KIND == kSquare) {
          const V u = d * (key - x[r]);
          of_query[r] += u;
          of_key -= u;
        } else {
          V t, u;
          if constexpr (KIND == kTanh) {  // u = (1 - t^2) / 4, which does not cancel
            const V e = x[r] * key, rest = reciprocal(e + A(1)), s = e * rest;
            t = s - rest;
            u = s * rest;
          } else {
            t = KIND == kSmallTanh ? tanh_of_small(x[r] + key) : tanh(x[r] + key);
            u = A(1) - t * t;
          }
          of_query[r] += d * u;
          of_key += d * u;
          of_weight += d * t;
        }
      }
      store(grad_key + j * depth, load(grad_key + j * depth) + of_key * weight);
    }
    for (int r = 0; r < R; ++r) store(grad_query + r * depth, load(grad_query + r * depth) + of_query[r] * weight);
    if constexpr (KIND != kSquare) store(grad_weight, load(grad_weight) + of_weight);
  }
}

template <Pairwise KIND, class A>
void pairwise_backward(int64_t rows, int64_t keys, int64_t depth, const A* q, const A* k, const A* weight,
                       const A* change, A* grad_query, A* grad_key, A* grad_weight) {
  const int64_t width = padded<A>(depth);
  for (int64_t h = 0; h < depth; h += kLanes<A>) {
    const Vec<A> factor =
        KIND == kSquare ? broadcast<A>(1) : load_some(weight + h, depth - h) * A(KIND == kTanh ? 4 : 1);
    const auto some = [&]<int R>(int64_t r) {
      pairwise_backward_rows<KIND, R>(keys, width, q + r * width + h, k + h, factor, change + r * kKeys,
                                      grad_query + r * width + h, grad_key + h, grad_weight + h);
    };
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) some.template operator()<4>(r);
    for (; r < rows; ++r) some.template operator()<1>(r);
  }
}

// A task's products by AMX's tiles, where there are any.
template <class T, int SCORE, bool TILED = kTiled<T, SCORE>> struct StripGradients {
  static int64_t size(const AttentionShape&) { return 0; }
  StripGradients(GradientTile<T, SCORE>&, acc_t<T>*) {}
  void load_keys(int64_t, int64_t) {}
  bool add(int64_t, int64_t, int64_t, acc_t<T>*) { return false; }
  void finish(acc_t<T>*, acc_t<T>*) {}
};

#if DLKERN_TILE_CODE

template <class T, int SCORE> void multiply_grad_strip(GradientTile<T, SCORE>& tile, int64_t rows, int64_t width) {
  multiply_row<T>(ceil_div(tile.s.value_depth, kTileStep), tile.grad_strip, tile.value_squares, tile.grad_bytes,
                  tile.change, kKeys, rows, width);
}
template <class T, int SCORE> void pack_value_squares(GradientTile<T, SCORE>& tile) {
  with_value_rows(tile, [&](const auto* from, int64_t row) {
    tile.value_most = most_of(from, row, tile.n, tile.s.value_depth);
    pack_lines<T, false>(Lines{from, row, 1}, tile.n, tile.s.value_depth, tile.value_squares, tile.grad_bytes);
  });
}
template <class T, int SCORE, class F> void with_grad_rows(GradientTile<T, SCORE>& tile, const F& f) {
  const Strided<const T>& g = tile.all.grad_output;
  if (g.stride[3] == 1) return f(tile.grad_at(tile.i0), g.stride[2]);
  tile.load_grad_rows(tile.i0, tile.rows_loaded);
  f(tile.grad.data, tile.grad.row);
}
// Of the set queries, strip `r` of a block.
template <class T, int SCORE> void pack_block_strip(GradientTile<T, SCORE>& tile, int64_t r) {
  with_query_rows(tile, [&](const auto* from, int64_t row) {
    tile.block_query_most[r] = most_of(from, row, tile.rows_loaded, tile.s.depth);
    pack_lines<T, true>(Lines{from, row, 1}, tile.rows_loaded, tile.s.depth,
                        tile.block_queries + r * tile.strip_of_depth, 0);
  });
  with_grad_rows(tile, [&](const auto* from, int64_t row) {
    tile.block_grad_most[r] = most_of(from, row, tile.rows_loaded, tile.s.value_depth);
    pack_lines<T, true>(Lines{from, row, 1}, tile.rows_loaded, tile.s.value_depth,
                        tile.block_grads + r * tile.grad_bytes, 0);
  });
}

// Strips of queries, a block of kBlockRows at a time, are laid out when the first keys need them and kept for the others.
// What is summed over queries, the gradients of keys and values, is summed turned: probabilities are then a right side as
// they lie, and no more than the sums is turned back.
template <class T, int SCORE> class StripGradients<T, SCORE, true> {
  struct Block {
    float query_most, grad_most;
    bool is_packed;
  };
  GradientTile<T, SCORE>& tile;
  const AttentionShape& s;
  const int64_t blocks, query_bytes, grad_bytes, depth_strips, value_strips;
  static constexpr int64_t kRowBytes = kBlockStrips * kStepBytes<T>;  // of a line of rows
  const int64_t block_bytes;
  char *packed, *key_rows, *weights, *changes, *change_rows;
  float *key_sums, *value_sums;
  Block* block;

  static int64_t bytes_of_block(const AttentionShape& s) {
    return kBlockStrips * (strip_bytes<T>(s.depth) + strip_bytes<T>(s.value_depth)) +
           (ceil_div(s.depth, kStrip) + ceil_div(s.value_depth, kStrip)) * kRowBytes;
  }
  static int64_t blocks_of(const AttentionShape& s) { return s.heads / s.key_heads * ceil_div(s.queries, kBlockRows); }

 public:
  static int64_t size(const AttentionShape& s) {
    const int64_t lines = ceil_div(s.depth, kStrip) + ceil_div(s.value_depth, kStrip), number = sizeof(float);
    if (!is_tiled<T, SCORE>(s)) return 0;
    return (blocks_of(s) * (bytes_of_block(s) + static_cast<int64_t>(sizeof(Block))) +
            ceil_div(s.depth, kStrip) * strip_bytes<T>(kKeys) + 2 * kKeyStrips * kRowBytes +
            kBlockStrips * strip_bytes<T>(kKeys) + lines * kStrip * kKeys * number) /
           number;
  }
  StripGradients(GradientTile<T, SCORE>& gradient_tile, float* memory)
      : tile(gradient_tile),
        s(tile.s),
        blocks(ceil_div(s.queries, kBlockRows)),
        query_bytes(strip_bytes<T>(s.depth)),
        grad_bytes(strip_bytes<T>(s.value_depth)),
        depth_strips(ceil_div(s.depth, kStrip)),
        value_strips(ceil_div(s.value_depth, kStrip)),
        block_bytes(bytes_of_block(s)) {
    if (!tile.strips) return;
    char* next = reinterpret_cast<char*>(memory);
    const auto take = [&next](int64_t bytes) {
      char* at = next;
      next += bytes;
      return at;
    };
    packed = take(blocks_of(s) * block_bytes);
    key_rows = take(depth_strips * strip_bytes<T>(kKeys));
    weights = take(kKeyStrips * kRowBytes);
    changes = take(kKeyStrips * kRowBytes);
    change_rows = take(kBlockStrips * strip_bytes<T>(kKeys));
    key_sums = reinterpret_cast<float*>(take(depth_strips * kStrip * kKeys * 4));
    value_sums = reinterpret_cast<float*>(take(value_strips * kStrip * kKeys * 4));
    block = reinterpret_cast<Block*>(take(0));
    for (int64_t i = 0; i < blocks_of(s); ++i) block[i] = {0, 0, false};
  }

  void load_keys(int64_t first, int64_t count) {
    tile.set_keys(first, count);
    with_key_rows(tile, [&](const auto* from, int64_t row) {
      tile.key_most = most_of(from, row, count, s.depth);
      pack_lines<T, false>(Lines{from, row, 1}, count, s.depth, tile.key_strips, query_bytes);
      pack_lines<T, false>(Lines{from, 1, row}, s.depth, count, key_rows, strip_bytes<T>(kKeys));
    });
    pack_value_squares(tile);
    std::memset(key_sums, 0, static_cast<size_t>((depth_strips + value_strips) * kStrip * kKeys) * sizeof(float));
  }

  // The gradients from queries i0 .. i0 + rows - 1, kBlockRows at most, and the loaded keys, where tiles serve; g is the
  // head's number in its group.
  bool add(int64_t g, int64_t i0, int64_t rows, float* grad_query) {
    int64_t counts[kBlockStrips] = {}, first = kBlockStrips, last = 0, most_keys = 0;
    for (int64_t r = 0; r * kStrip < rows; ++r) {
      const Seen seen(tile.args, tile.b, i0 + r * kStrip, smaller(kStrip, rows - r * kStrip));
      if (seen.last <= tile.j0 || seen.first >= tile.j0 + tile.n) continue;
      counts[r] = smaller(tile.n, seen.last - tile.j0);
      first = smaller(first, r);
      last = r + 1;
      most_keys = larger(most_keys, counts[r]);
    }
    if (last == 0) return true;
    Block& own = block[g * blocks + i0 / kBlockRows];
    char* queries = packed + (&own - block) * block_bytes;
    char* grads = queries + kBlockStrips * query_bytes;
    char* turned_queries = grads + kBlockStrips * grad_bytes;
    char* turned_grads = turned_queries + depth_strips * kRowBytes;
    if (!own.is_packed) pack(own, i0, rows, queries, grads, turned_queries, turned_grads);
    if (!is_bounded(own.query_most) || !is_bounded(tile.key_most) || !tile.fit(own.grad_most) ||
        !are_large(1, own.grad_most))
      return false;

    float change_most = 0;
    for (int64_t r = first; r < last; ++r) {
      const int64_t i = i0 + r * kStrip, some = smaller(kStrip, rows - r * kStrip), count = counts[r];
      if (count == 0) continue;
      const Seen seen(tile.args, tile.b, i, some);
      tile.use_strips(i, some, queries + r * query_bytes, grads + r * grad_bytes);
      const float most = some == kStrip && count % kStrip == 0 && is_simple(seen, count)
                             ? make_simple_strip(seen, count, r)
                             : make_strip(seen, some, count, r);
      if (!is_bounded(most)) return false;
      change_most = larger_of(most, change_most);
    }
    if (!are_large(change_most, own.query_most) || !are_large(change_most, tile.key_most)) return false;

    for (int64_t r = first; r < last; ++r) {
      for (int64_t j = ceil_div(counts[r], kStrip) * kStrip; j < most_keys; j += kStrip) {
        const int64_t at = j / kStrip * kRowBytes + r * kStepBytes<T>;
        std::memset(weights + at, 0, kStepBytes<T>);
        std::memset(changes + at, 0, kStepBytes<T>);
      }
      if (counts[r] > 0)
        add_row<T>(ceil_div(counts[r], kTileStep), change_rows + r * strip_bytes<T>(kKeys), key_rows,
                   strip_bytes<T>(kKeys), grad_query + r * kStrip * tile.depth, tile.depth,
                   smaller(kStrip, rows - r * kStrip), tile.depth);
    }
    const auto add_turned_sums = [&](int64_t depth, const char* left, const char* right, float* sums) {
      for (int64_t d = 0; d < depth; d += kStrip)
        add_row<T>(last - first, left + d / kStrip * kRowBytes + first * kStepBytes<T>, right + first * kStepBytes<T>,
                   kRowBytes, sums + d * kKeys, kKeys, smaller(kStrip, depth - d), padded<float>(most_keys));
    };
    add_turned_sums(tile.depth, turned_queries, changes, key_sums);
    add_turned_sums(tile.value_depth, turned_grads, weights, value_sums);
    return true;
  }

  void finish(float* grad_key, float* grad_value) {
    add_turned(key_sums, kKeys, tile.n, tile.depth, grad_key, tile.depth);
    add_turned(value_sums, kKeys, tile.n, tile.value_depth, grad_value, tile.value_depth);
  }

 private:
  static float larger_of(float a, float b) { return a > b ? a : b; }

  // Row strip r's probabilities and gradients of scores as sides of products; returns the largest of the latter.
  float make_strip(const Seen& seen, int64_t rows, int64_t count, int64_t r) {
    tile.compute(rows, count, seen);
    pack_strip<true, float, T>({tile.change, kKeys, 1}, rows, count, change_rows + r * strip_bytes<T>(kKeys));
    for (int64_t j = 0; j < count; j += kStrip) {
      const int64_t at = j / kStrip * kRowBytes + r * kStepBytes<T>, columns = smaller(kStrip, count - j);
      pack_strip<false, float, T>({tile.scores + j, 1, kKeys}, columns, rows, weights + at);
      pack_strip<false, float, T>({tile.change + j, 1, kKeys}, columns, rows, changes + at);
    }
    return most_of(tile.change, kKeys, rows, count);
  }
  // The same where all of it is dS = P (g V^T - delta), without numbers in between in memory.
  bool is_simple(const Seen& seen, int64_t count) const {
    if (s.p > 0 || s.softcap != 0) return false;
    for (int64_t r = 0; r < kStrip; ++r)
      if (seen.begin[r] >= tile.j0 && seen.end[r] <= tile.j0 + count) return false;
    return true;
  }
  float make_simple_strip(const Seen& seen, int64_t count, int64_t r) {
    constexpr bool whole = kParts<T> == kParts<float>;
    const bool plain = tile.is_plain(count, seen.last_begin, seen.first_end);
    tile.multiply(0, kStrip, count);
    tile.multiply_grad(kStrip, count);
    vint32 most{};
    for (int64_t i = 0; i < kTile; ++i) {
      float factor[2] = {static_cast<float>(s.scale), static_cast<float>(s.scale)}, largest[2];
      vfloat inverse[2], delta[2];
      const float *x = tile.scores + i * kKeys, *d = tile.change + i * kKeys;
      for (int half = 0; half < 2; ++half) {
        const int64_t line = i + half * kTile, row = tile.row_number(tile.i0 + line);
        if (!plain) factor[half] = tile.finish_row(0, line, count, seen.begin[line], seen.end[line], false).factor;
        largest[half] = tile.args.largest[row];
        inverse[half] = broadcast<float>(tile.args.inverse[row]);
        delta[half] = broadcast<float>(tile.delta[row]);
      }
      const Exponential<T> first(factor[0], largest[0]), second(factor[1], largest[1]);
      char *of_weights = weights + r * kStepBytes<T> + i * 64, *of_changes = changes + r * kStepBytes<T> + i * 64,
           *of_rows = change_rows + r * strip_bytes<T>(kKeys) + i * 64;
      for (int64_t j = 0; j < count; j += kStrip) {
        vfloat p[2][2], c[2][2];
#pragma GCC unroll 2
        for (int64_t side = 0; side < 2; ++side) {
          const int64_t at = j + side * kTile;
          p[0][side] = first(load(x + at)) * inverse[0];
          p[1][side] = second(load(x + at + kTile * kKeys)) * inverse[1];
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            c[half][side] = p[half][side] * (load(d + at + half * kTile * kKeys) - delta[half]);
            const vint32 bits = (vint32)c[half][side] & 0x7fffffff;
            most = bits > most ? bits : most;
          }
          tiles_detail::store_words<kParts<T>, whole>(p[0][side], p[1][side], of_weights + side * kTileBytes);
          tiles_detail::store_words<kParts<T>, whole>(c[0][side], c[1][side], of_changes + side * kTileBytes);
        }
        for (int half = 0; half < 2; ++half)
          tiles_detail::store_words<kParts<T>, whole>(c[half][0], c[half][1], of_rows + half * kTileBytes);
        of_weights += kRowBytes;
        of_changes += kRowBytes;
        of_rows += kStepBytes<T>;
      }
    }
    return largest_of(most);
  }

  void pack(Block& own, int64_t i0, int64_t rows, char* queries, char* grads, char* turned_queries,
            char* turned_grads) {
    own = {0, 0, true};
    for (int64_t r = 0; r * kStrip < rows; ++r) {
      const int64_t i = i0 + r * kStrip, some = smaller(kStrip, rows - r * kStrip);
      const auto pack_rows = [&](const auto* from, int64_t row, int64_t depth, float& most, char* left, char* turned) {
        const float largest = most_of(from, row, some, depth);
        if (!(largest <= most)) most = largest;
        pack_lines<T, true>(Lines{from, row, 1}, some, depth, left, 0);
        pack_lines<T, true>(Lines{from, 1, row}, depth, some, turned + r * kStepBytes<T>, kRowBytes);
      };
      tile.set_queries(i, some);
      with_query_rows(tile, [&](const auto* from, int64_t row) {
        pack_rows(from, row, s.depth, own.query_most, queries + r * query_bytes, turned_queries);
      });
      with_grad_rows(tile, [&](const auto* from, int64_t row) {
        pack_rows(from, row, s.value_depth, own.grad_most, grads + r * grad_bytes, turned_grads);
      });
    }
  }
};

#endif

template <class P> P* element(const Strided<P>& x, int64_t b, int64_t h, int64_t i) {
  return x.data + b * x.stride[0] + h * x.stride[1] + i * x.stride[2];
}

// sum over d of g output, of each query.
template <class T> void make_delta(const AttentionBackwardArgs<T>& args, acc_t<T>* delta) {
  using A = acc_t<T>;
  const AttentionShape& s = args.forward.shape;
  parallel_for(s.batch * s.heads * s.queries, 1 + 16384 / (s.value_depth + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = row % s.queries, h = row / s.queries % s.heads, b = row / s.queries / s.heads;
      const T* g = element(args.grad_output, b, h, i);
      const T* o = element(args.forward.output, b, h, i);
      const int64_t step = args.grad_output.stride[3];
      // In double: it is subtracted from numbers that may be nearly the same.
      vdouble sum{};
      constexpr int64_t lanes = kLanes<double>;
      for (int64_t d = 0; d < s.value_depth; d += lanes) {
        const int count = static_cast<int>(smaller(lanes, s.value_depth - d));
        vdouble x{};
        if (step == 1)
          x = count == lanes ? load_wide(g + d) : load_wide_partial(g + d, count);
        else
          for (int l = 0; l < count; ++l) x[l] = static_cast<double>(static_cast<A>(g[(d + l) * step]));
        sum += x * (count == lanes ? load_wide(o + d) : load_wide_partial(o + d, count));
      }
      delta[row] = static_cast<A>(reduce_add(sum));
    }
  });
}

// delta as sum(P g V^T), another pass over the tiles: it cancels in dS as it does where the matrix of scores is in memory,
// which is what torch does for scores other than dot products, and for all where a mask wants its gradient.
template <class T, int SCORE> void make_delta_by_tiles(const AttentionBackwardArgs<T>& args, acc_t<T>* delta) {
  using A = acc_t<T>;
  const AttentionShape& s = args.forward.shape;
  const bool tiled = is_tiled<T, SCORE>(s);
  const int64_t block = tiled ? kBlockRows : kRows, blocks = ceil_div(s.queries, block),
                tasks = s.batch * s.heads * blocks;
  std::memset(static_cast<void*>(delta), 0, sizeof(A) * static_cast<size_t>(s.batch * s.heads * s.queries));
  const auto run = [&](int64_t begin, int64_t end) {
    GradientTile<T, SCORE> tile(args, delta, scratch<A>(Slot::family_0, GradientTile<T, SCORE>::size(s)));
    tile.through_cap = false;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / blocks, i0 = task % blocks * block, rows = smaller(block, s.queries - i0);
      tile.set_head(head / s.heads, head % s.heads);
      tile.load_block(i0, rows);
      const Span span(args.forward, tile.b, i0, rows);
      double sums[kBlockRows] = {}, of_all[kBlockRows] = {};
      for (int64_t j0 = span.first / kKeys * kKeys; j0 < span.last; j0 += kKeys) {
        tile.load_block_keys(j0, smaller(kKeys, span.last - j0));
        tile.each_part(i0, rows, [&](int64_t first, int64_t some) {
          const Seen seen(args.forward, tile.b, first, some);
          if (seen.last <= j0 || seen.first >= j0 + tile.n) return;
          const int64_t count = smaller(tile.n, seen.last - j0);
          tile.compute(some, count, seen);  // with delta 0: P g V^T
          for (int64_t r = 0; r < some; ++r) {
            Wide<A> sum{};
            for (int64_t j = 0; j < count; j += kLanes<A>) sum += wide(load(tile.change + r * kKeys + j));
            sums[first - i0 + r] += reduce_add(sum);
            of_all[first - i0 + r] += tile.of_all[r];
          }
        });
      }
      for (int64_t r = 0; r < rows; ++r)
        delta[tile.row_number(i0 + r)] = static_cast<A>(sums[r] / (of_all[r] > 0 ? of_all[r] : 1));
    }
  };
  parallel_for(tasks, 1, [&](int64_t begin, int64_t end) { on_tiles<T, SCORE>(tiled, [&] { run(begin, end); }); });
}

template <class A, class T> void narrow(const A* from, T* to, int64_t count, A factor) {
  for (int64_t d = 0; d < count; ++d) to[d] = static_cast<T>(from[d] * factor);
}

template <class T, int SCORE>
void backward_keys(const AttentionBackwardArgs<T>& args, const acc_t<T>* delta, int64_t b, int64_t key_head,
                   int64_t split, int64_t splits, acc_t<T>* grad_query, acc_t<T>* grad_weight) {
  using A = acc_t<T>;
  constexpr bool additive = SCORE == kAdditiveScore, gaussian = SCORE == kGaussianScore;
  const AttentionShape& s = args.forward.shape;
  const int64_t group = s.heads / s.key_heads, depth = padded<A>(s.depth), value_depth = padded<A>(s.value_depth);
  const int64_t tile_size = GradientTile<T, SCORE>::size(s), sums_size = kKeys * (depth + value_depth) + depth;
  A* memory = scratch<A>(Slot::family_0, tile_size + sums_size + StripGradients<T, SCORE>::size(s));
  GradientTile<T, SCORE> tile(args, delta, memory);
  A *grad_key = memory + tile_size, *grad_value = grad_key + kKeys * depth,
    *of_weight = grad_value + kKeys * value_depth;
  const auto clear = [](A* p, int64_t count) {
    std::memset(static_cast<void*>(p), 0, static_cast<size_t>(count) * sizeof(A));
  };
  clear(grad_query, group * s.queries * depth);
  if (additive) clear(of_weight, depth);
  StripGradients<T, SCORE> strips(tile, memory + tile_size + sums_size);
  const int64_t block = tile.strips ? kBlockRows : larger(s.queries, 1);

  for (int64_t j0 = split * kKeys; j0 < s.keys; j0 += splits * kKeys) {
    const int64_t n = smaller(kKeys, s.keys - j0);
    tile.set_head(b, key_head * group);
    tile.strips ? strips.load_keys(j0, n) : tile.load_keys(j0, n);
    clear(grad_key, n * depth);
    clear(grad_value, n * value_depth);
    const auto add_vectors = [&](int64_t g, int64_t begin, int64_t end) {
      if (!tile.has_key_vectors) tile.load_keys();
      for (int64_t i0 = begin; i0 < end; i0 += kRows) {
        const int64_t rows = smaller(kRows, end - i0);
        const Seen seen(args.forward, b, i0, rows);
        if (seen.last <= j0 || seen.first >= j0 + n) continue;
        const int64_t count = smaller(n, seen.last - j0);
        tile.load_queries(i0, rows);
        tile.compute(rows, count, seen);
        A* of_query = grad_query + (g * s.queries + i0) * depth;
        product(count, value_depth, rows, tile.scores, 1, kKeys, tile.grad.data, tile.grad.row, grad_value, value_depth,
                true, tile.k_step);
        if constexpr (additive) {
          tile.with_tanh(0, [&]<Pairwise KIND>(const A* q, const A* k, const A*) {
            pairwise_backward<KIND>(rows, count, s.depth, q, k, args.forward.weight, tile.change, of_query, grad_key,
                                    of_weight);
          });
        } else if constexpr (gaussian) {
          pairwise_backward<kSquare>(rows, count, s.depth, tile.query_copy, tile.key_copy,
                                     static_cast<const A*>(nullptr), tile.change, of_query, grad_key, of_weight);
        } else {
          product(count, depth, rows, tile.change, 1, kKeys, tile.query.data, tile.query.row, grad_key, depth, true,
                  tile.k_step);
          product(rows, depth, count, tile.change, kKeys, 1, tile.key.data, tile.key.row, of_query, depth, true,
                  tile.k_step);
        }
      }
    };
    for (int64_t g = 0; g < group; ++g) {
      tile.set_head(b, key_head * group + g);
      for (int64_t i0 = 0; i0 < s.queries; i0 += block) {
        const int64_t rows = smaller(block, s.queries - i0);
        if (!tile.strips || !strips.add(g, i0, rows, grad_query + (g * s.queries + i0) * depth))
          add_vectors(g, i0, i0 + rows);
      }
    }
    if (tile.strips) strips.finish(grad_key, grad_value);
    if constexpr (SCORE == kCosineScore)
      for (int64_t j = 0; j < n; ++j)
        normalize_backward(tile.key_copy + j * depth, tile.of_key[j], grad_key + j * depth, depth);
    for (int64_t j = 0; j < n; ++j) {
      if (args.forward.rotary.cos) turn(args.forward.rotary, b, j0 + j, A(-1), grad_key + j * depth);
      narrow(grad_key + j * depth, element(args.grad_key, b, key_head, j0 + j), s.depth, static_cast<A>(s.scale));
      narrow(grad_value + j * value_depth, element(args.grad_value, b, key_head, j0 + j), s.value_depth, A(1));
    }
  }
  if (additive && grad_weight)
    for (int64_t d = 0; d < s.depth; ++d) grad_weight[d] = of_weight[d] * static_cast<A>(s.scale);
}

// The mask's gradient: a task is a tile of the mask and adds up, in order and in double, the dS of all that it was broadcast
// to: over keys they cancel.
template <class T, int SCORE> void backward_mask(const AttentionBackwardArgs<T>& args, const acc_t<T>* delta) {
  using A = acc_t<T>;
  const AttentionShape& s = args.forward.shape;
  const int64_t* size = s.mask_size;
  const bool every_row = size[2] == 1, every_key = size[3] == 1;
  const bool tiled = is_tiled<T, SCORE>(s);
  const int64_t block = tiled ? kBlockRows : kRows;
  const int64_t row_blocks = ceil_div(size[2], block), key_blocks = ceil_div(size[3], kKeys);
  const int64_t tasks = size[0] * size[1] * row_blocks * key_blocks;
  const double work = static_cast<double>(s.batch * s.heads * s.queries) * static_cast<double>(s.keys * s.depth);
  const auto run = [&](int64_t begin, int64_t end) {
    GradientTile<T, SCORE> tile(args, delta, scratch<A>(Slot::family_0, GradientTile<T, SCORE>::size(s)));
    tile.through_cap = false;  // the mask is added behind it
    double* total = scratch<double>(Slot::family_4, block * kKeys);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t key_block = task % key_blocks, row_block = task / key_blocks % row_blocks,
                    mh = task / key_blocks / row_blocks % size[1], mb = task / key_blocks / row_blocks / size[1];
      std::memset(total, 0, sizeof(double) * static_cast<size_t>(block * kKeys));
      for (int64_t b = size[0] == 1 ? 0 : mb; b < (size[0] == 1 ? s.batch : mb + 1); ++b)
        for (int64_t h = size[1] == 1 ? 0 : mh; h < (size[1] == 1 ? s.heads : mh + 1); ++h) {
          tile.set_head(b, h);
          const int64_t j_end = every_key ? s.keys : smaller((key_block + 1) * kKeys, s.keys),
                        i_end = every_row ? s.queries : smaller((row_block + 1) * block, s.queries);
          for (int64_t j0 = every_key ? 0 : key_block * kKeys; j0 < j_end; j0 += kKeys) {
            const int64_t n = smaller(kKeys, j_end - j0);
            tile.load_block_keys(j0, n);
            for (int64_t i0 = every_row ? 0 : row_block * block; i0 < i_end; i0 += block) {
              const int64_t rows = smaller(block, i_end - i0);
              const Span span(args.forward, b, i0, rows);
              if (span.last <= j0 || span.first >= j0 + n) continue;
              tile.load_block(i0, rows);
              tile.each_part(i0, rows, [&](int64_t first, int64_t some) {
                const Seen seen(args.forward, b, first, some);
                if (seen.last <= j0 || seen.first >= j0 + n) return;
                tile.compute(some, n, seen);
                for (int64_t r = 0; r < some; ++r) {
                  double* to = total + (every_row ? 0 : first - i0 + r) * kKeys;
                  Wide<A> sum{};
                  for (int64_t j = 0; j < n; j += kLanes<A>) {
                    if (!every_key) sum = load_lanes<A>(to + j);
                    sum += wide(load(tile.change + r * kKeys + j));
                    if (!every_key) store_lanes(to + j, sum);
                  }
                  if (every_key) to[0] += reduce_add(sum);
                }
              });
            }
          }
        }
      const int64_t rows = smaller(block, size[2] - row_block * block), n = smaller(kKeys, size[3] - key_block * kKeys);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < n; ++j) {
          const int64_t to = ((mb * size[1] + mh) * size[2] + row_block * block + r) * size[3] + key_block * kKeys + j;
          if (s.mask == kOwnMask)
            static_cast<T*>(args.grad_mask)[to] = static_cast<T>(total[r * kKeys + j]);
          else
            static_cast<float*>(args.grad_mask)[to] = static_cast<float>(total[r * kKeys + j]);
        }
    }
  };
  parallel_for(tasks, work < kWorthWaking ? tasks : 1,
               [&](int64_t begin, int64_t end) { on_tiles<T, SCORE>(tiled, [&] { run(begin, end); }); });
}

template <class T, int SCORE> void backward(const AttentionBackwardArgs<T>& args) {
  using A = acc_t<T>;
  const AttentionShape& s = args.forward.shape;
  const int64_t heads = s.batch * s.key_heads, group = s.heads / s.key_heads, depth = padded<A>(s.depth);
  const int64_t splits = larger(1, smaller(ceil_div(kTasks, heads), ceil_div(s.keys, kKeys))), tasks = heads * splits;
  const int64_t slice = group * s.queries * depth;
  A* delta = scratch<A>(Slot::family_1, s.batch * s.heads * s.queries);
  A* partial = scratch<A>(Slot::family_2, tasks * slice);
  A* weights = args.grad_weight ? scratch<A>(Slot::family_3, tasks * s.depth) : nullptr;
  // With the matrix of scores in memory, torch has exact sums where a rounded output of 16 bits would show: its own tiles
  // take no dropout, one depth, and elements that lie side by side; from_scores is what else the caller knows.
  const auto strided = [](const auto& x, int64_t size) { return size > 1 && x.stride[3] != 1; };
  const auto& x = args.forward;
  const bool torch_has_scores = s.p > 0 || s.depth != s.value_depth || strided(x.query, s.depth) ||
                                strided(x.key, s.depth) || strided(x.value, s.value_depth);
  const bool by_tiles =
      SCORE != kDotScore || args.grad_mask || s.from_scores || (sizeof(T) < sizeof(A) && torch_has_scores);
  if (s.keys > kKeys)  // else every tile is whole and makes its own
    by_tiles ? make_delta_by_tiles<T, SCORE>(args, delta) : make_delta(args, delta);
  const double work = static_cast<double>(s.batch * s.heads * s.queries) * static_cast<double>(s.keys * s.depth);
  const int64_t workers = work < kWorthWaking ? 1 : smaller(num_threads(), tasks);
  parallel_tasks(workers, tasks, [&](int64_t task) {
    const int64_t head = task / splits;
    on_tiles<T, SCORE>(is_tiled<T, SCORE>(s), [&] {
      backward_keys<T, SCORE>(args, delta, head / s.key_heads, head % s.key_heads, task % splits, splits,
                              partial + task * slice, weights ? weights + task * s.depth : nullptr);
    });
  });
  parallel_for(heads * group * s.queries, 1 + 16384 / (depth * splits + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = row % s.queries, h = row / s.queries % s.heads, b = row / s.queries / s.heads;
      A* sum = partial + row / (group * s.queries) * splits * slice + row % (group * s.queries) * depth;
      for (int64_t split = 1; split < splits; ++split)
        for (int64_t d = 0; d < depth; d += kLanes<A>) store(sum + d, load(sum + d) + load(sum + split * slice + d));
      if constexpr (SCORE == kCosineScore) {
        A* query = scratch<A>(Slot::family_0, depth);
        load_rows(element(args.forward.query, b, h, i), 0, args.forward.query.stride[3], 1, s.depth, query, depth);
        const A inverse = normalize(query, depth);
        normalize_backward(query, inverse, sum, depth);
      }
      if (args.forward.rotary.cos) turn(args.forward.rotary, b, i, A(-1), sum);
      narrow(sum, element(args.grad_query, b, h, i), s.depth, static_cast<A>(s.scale));
    }
  });
  for (int64_t d = 0; weights && d < s.depth; ++d) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += static_cast<double>(weights[task * s.depth + d]);
    args.grad_weight[d] = static_cast<A>(sum);
  }
  if (args.grad_mask) backward_mask<T, SCORE>(args, delta);
}

}  // namespace

#define DLKERN_DEFINE_ATTENTION(T)                                   \
  void attention_backward(const AttentionBackwardArgs<T>& args) {    \
    switch (args.forward.shape.score) {                              \
      case kGaussianScore: return backward<T, kGaussianScore>(args); \
      case kAdditiveScore: return backward<T, kAdditiveScore>(args); \
      case kCosineScore: return backward<T, kCosineScore>(args);     \
      default: return backward<T, kDotScore>(args);                  \
    }                                                                \
  }
DLKERN_DEFINE_ATTENTION(float)
DLKERN_DEFINE_ATTENTION(double)
DLKERN_DEFINE_ATTENTION(bfloat16)
DLKERN_DEFINE_ATTENTION(float16)

}  // namespace dlkern::cpu::DLKERN_ISA

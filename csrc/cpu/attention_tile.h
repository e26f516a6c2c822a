// One tile of attention scores, kRows queries x kKeys keys: what forward and backward share.
//
// Operands are brought into dense rows of the type sums are carried in, padded with zeros to whole vectors; products run
// on the micro-kernel of gemm.h, or on AMX's tiles, from strips laid out for them (attention_strips.h). Which keys a query
// sees without a mask (causal, a window, lengths) is one interval a row, so that tiles outside it are skipped and only
// those on its border look at single keys.
#pragma once
#include "attention_strips.h"
#include "philox_vector.h"
#include "positions_turn.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace attention_detail {

constexpr int64_t kRows = 48;  // at a time; with strips, 32
template <class A> inline int64_t padded(int64_t n) { return ceil_div(n, kLanes<A>) * kLanes<A>; }

// C (+)= A B for dense operands in rows padded to whole vectors: A[i, p] = a[i * a_row + p * a_column]; k_step products
// in one sum at most.
template <class A>
inline void product(int64_t m, int64_t n, int64_t k, const A* a, int64_t a_row, int64_t a_column, const A* b,
                    int64_t b_row, A* c, int64_t c_row, bool add, int64_t k_step) {
  using namespace gemm_detail;
  const Ahead none;
  if (k > k_step) {
    for (int64_t p = 0; p < k; p += k_step)
      product(m, n, smaller(k_step, k - p), a + p * a_column, a_row, a_column, b + p * b_row, b_row, c, c_row,
              add || p > 0, k_step);
    return;
  }
  for (int64_t j = 0; j < n; j += kNR<A>) {
    const int vectors = static_cast<int>(ceil_div(smaller(kNR<A>, n - j), kLanes<A>));
    for (int64_t i = 0; i < m; i += kMR)
      kernel_for<A>(static_cast<int>(smaller(kMR, m - i)), vectors)(k, a + i * a_row, a_row, a_column, b + j, b_row,
                                                                    c + i * c_row + j, c_row, nullptr,
                                                                    add ? Out::add : Out::set, none);
  }
}

// Small problems are summed in short sums, as gemm.h does it: libraries take inner products there.
inline int64_t sum_length(const AttentionShape& s) {
  return s.queries * s.keys * (s.depth + s.value_depth) < 2 * gemm_detail::kSmallWork ? gemm_detail::kShortKC
                                                                                      : gemm_detail::kKC;
}

// `count` strided rows into dense ones of `width` numbers, the last of them zeros.
template <class T, class A>
inline void load_rows(const T* from, int64_t row, int64_t column, int64_t count, int64_t depth, A* to, int64_t width) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t i = 0; i < count; ++i, from += row, to += width) {
    int64_t d = 0;
    if (column == 1) {
      for (; d + lanes <= depth; d += lanes) store(to + d, load(from + d));
      if (d < depth) {
        store(to + d, load_partial<T>(from + d, static_cast<int>(depth - d)));
        d += lanes;
      }
    } else {
      for (; d < depth; ++d) to[d] = static_cast<A>(from[d * column]);
    }
    for (; d < width; ++d) to[d] = A(0);
  }
}

// Such rows where they lie, if products can read them there as well as a copy: else a copy, in `memory`.
template <class A> struct Rows {
  const A* data;
  int64_t row;
};
template <bool IN_PLACE, class T, class A>
inline Rows<A> rows_of(const T* from, int64_t row, int64_t column, int64_t count, int64_t depth, A* memory) {
  const int64_t width = padded<A>(depth);
  if constexpr (IN_PLACE && std::is_same_v<T, A>)
    if (column == 1 && depth == width && row <= 2 * depth) return {from, row};
  load_rows(from, row, column, count, depth, memory, width);
  return {memory, width};
}

// to[d * to_row + j] = from[j * from_row + d]; columns beyond `count`, up to a whole vector, zero.
template <class A>
inline void transpose_rows(const A* from, int64_t from_row, int64_t count, int64_t depth, A* to, int64_t to_row) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t j = 0; j < count; j += lanes)
    for (int64_t d = 0; d < depth; d += lanes) {
      Vec<A> square[lanes];
      for (int64_t r = 0; r < lanes; ++r) square[r] = j + r < count ? load(from + (j + r) * from_row + d) : Vec<A>{};
      transpose(square);
      for (int64_t r = 0; r < smaller(lanes, depth - d); ++r) store(to + (d + r) * to_row + j, square[r]);
    }
}

// `count` numbers of a mask from `from`, `step` apart, as what is added to scores.
template <class A, class M> inline Vec<A> mask_vector(const M* from, int64_t step, int64_t count) {
  if (step == 0) return broadcast<A>(static_cast<A>(from[0]));
  if constexpr (sizeof(acc_t<M>) == sizeof(A)) {
    if (step == 1) return load_some(from, count);
  }
  Vec<A> v{};
  for (int64_t l = 0; l < count; ++l) v[l] = static_cast<A>(from[l * step]);
  return v;
}
// A byte a lane.
template <class A> inline Tag<A> bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  if constexpr (sizeof(A) == 4) return (Tag<A>)_mm512_cvtepu8_epi32(some);
#elif defined(__AVX2__)  // whose vectors need not be AVX2's: AVX-512's code is tested lowered to it
  if constexpr (sizeof(A) == 4 && sizeof(Tag<A>) == 32)
    return (Tag<A>)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#endif
  Bytes<A> lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return __builtin_convertvector(lanes, Tag<A>);
}
template <class A> inline Vec<A> bool_mask_vector(const uint8_t* from, int64_t step, int64_t count) {
  const A out = -__builtin_inf();
  if (step == 0) return broadcast<A>(from[0] ? A(0) : out);
  uint8_t some[kLanes<A>] = {};
  if (step != 1 || count < kLanes<A>) {
    for (int64_t l = 0; l < count; ++l) some[l] = from[l * step];
    from = some;
  }
  return bytes<A>(from) != 0 ? Vec<A>{} : broadcast<A>(out);
}

// The keys begin .. end - 1 that each of some queries sees by position.
struct Seen {
  int64_t begin[kRows], end[kRows];
  int64_t first, last;  // of all of them
  int64_t last_begin = 0, first_end;  // between which all see all
  template <class T> Seen(const AttentionArgs<T>& args, int64_t b, int64_t i0, int64_t rows) {
    const AttentionShape& s = args.shape;
    if (s.left < 0 && s.right < 0 && !args.lengths.data) {
      for (int64_t r = 0; r < rows; ++r) begin[r] = 0;
      for (int64_t r = 0; r < rows; ++r) end[r] = s.keys;
      first = 0;
      last = first_end = s.keys;
      return;
    }
    first = first_end = s.keys;
    last = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = i0 + r, place = i + s.shift;
      int64_t from = s.left < 0 ? 0 : larger(0, place - s.left);
      int64_t to = s.right < 0 ? s.keys : smaller(s.keys, place + s.right + 1);
      if (args.lengths.data)
        to = smaller(to, args.lengths.data[b * args.lengths.stride[0] + i * args.lengths.stride[2]]);
      if (to <= from) from = to = 0;
      begin[r] = from;
      end[r] = to;
      last_begin = larger(last_begin, from);
      first_end = smaller(first_end, to);
      if (to > from) {
        first = smaller(first, from);
        last = larger(last, to);
      }
    }
    if (last == 0) first = 0;
  }
};
// The first and one past the last of all the keys that some queries, more than a Seen holds, see.
struct Span {
  int64_t first, last = 0;
  template <class T> Span(const AttentionArgs<T>& args, int64_t b, int64_t i0, int64_t rows) : first(args.shape.keys) {
    for (int64_t r = 0; r < rows; r += kRows) {
      const Seen seen(args, b, i0 + r, smaller(kRows, rows - r));
      if (seen.last == 0) continue;
      first = smaller(first, seen.first);
      last = larger(last, seen.last);
    }
    if (last == 0) first = 0;
  }
};

// Words of dropout for keys j0 .. j0 + n - 1 (j0 a multiple of 64) of row `row` of all [batch, heads, queries]: key j has
// word j % 64 / 16 of the block of counter (row * ceil(keys / 64) + j / 64) * 16 + j % 16.
inline void dropout_words(const Keys& keys, int64_t row, int64_t all_keys, int64_t j0, int64_t n, uint32_t* to) {
  const int64_t groups = ceil_div(all_keys, 64);
  for (int64_t j = 0; j < n; j += 64)
    for (int64_t c = 0; c < 16; c += kWords) {
      vuint32 word[4];
      philox_words(keys, static_cast<uint64_t>((row * groups + (j0 + j) / 64) * 16 + c), word);
      for (int w = 0; w < 4; ++w) std::memcpy(to + j + w * 16 + c, &word[w], sizeof word[w]);
    }
}

// Scores that are no product of matrices: sums over h of a function of q[i, h] and k[j, h].
// kTanh is weight[h] tanh(q + k) = weight[h] (e^2q e^2k - 1) / (e^2q e^2k + 1), whose operands are the exponentials. Of plain
// operands the same are kSmallTanh, where |q| + |k| is at most kSmall and the exponentials' rounding would count, and
// kExactTanh, where they would leave their range. kSquare is -(q - k)^2 / 2.
enum Pairwise { kTanh, kSmallTanh, kExactTanh, kSquare };
// Up to which |q| and |k| each, and in sum. Not in double, which has no wider exponentials to round.
template <class A> constexpr A kSafe = sizeof(A) == 4 ? 20 : -1;
template <class A> constexpr A kSmall = sizeof(A) == 4 ? 1 : -1;

// 1 / d for d from 1 to 1e38: with AVX-512 the estimate and a step of Newton's, of which only the last rounding counts.
inline vdouble reciprocal(vdouble d) { return 1.0 / d; }
inline vfloat reciprocal(vfloat d) {
#if defined(__AVX512F__)
  const vfloat r = (vfloat)_mm512_rcp14_ps((__m512)d);
  return r + r * (1.0f - d * r);
#else
  return 1.0f / d;
#endif
}
// a / d, likewise, the remainder put back: a division's result but for the last bit now and then.
inline vdouble quotient(vdouble a, vdouble d) { return a / d; }
inline vfloat quotient(vfloat a, vfloat d) {
#if defined(__AVX512F__)
  const vfloat r = reciprocal(d), q = a * r;
  return q + r * (a - d * q);
#else
  return a / d;
#endif
}

// tanh x for |x| up to 1 as x + x^3 P(x^2), P fitted for the least largest relative error, 2^-27.7.
inline vdouble tanh_of_small(vdouble x) { return tanh(x); }
inline vfloat tanh_of_small(vfloat x) {
  const vfloat z = x * x;
  vfloat p = broadcast<float>(-3.5845183e-4f);
  p = p * z + 2.301364e-3f;
  p = p * z + -7.946106e-3f;
  p = p * z + 2.1486657e-2f;
  p = p * z + -5.38798e-2f;
  p = p * z + 1.3332345e-1f;
  p = p * z + -3.3333296e-1f;
  return p * (z * x) + x;
}

// tile[R rows, a vector] of such sums, short ones: scores are exponents.
template <Pairwise KIND, int R, class A>
[[gnu::always_inline]] inline void pairwise_block(int64_t depth, const A* q, int64_t q_row, const A* k, const A* weight,
                                                  A* tile) {
  constexpr int kChains = 4;
  constexpr int64_t kBlock = 32;
  Vec<A> total[R] = {};
  for (int64_t h0 = 0; h0 < depth; h0 += kBlock) {
    Vec<A> sum[R][kChains] = {};
    const int64_t end = smaller(h0 + kBlock, depth);
    const auto add = [&](int64_t h, int chain) {
      const Vec<A> key = load(k + h * kKeys);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const A x = q[r * q_row + h];
        if constexpr (KIND == kTanh)
          sum[r][chain] += weight[h] * quotient(x * key - A(1), x * key + A(1));
        else if constexpr (KIND == kSmallTanh)
          sum[r][chain] += weight[h] * tanh_of_small(x + key);
        else if constexpr (KIND == kExactTanh)
          sum[r][chain] += weight[h] * tanh(x + key);
        else
          sum[r][chain] -= (x - key) * (x - key);
      }
    };
    int64_t h = h0;
    for (; h + kChains <= end; h += kChains)
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) add(h + chain, chain);
    for (; h < end; ++h) add(h, 0);
    for (int r = 0; r < R; ++r) total[r] += (sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]);
  }
  constexpr A factor = KIND == kSquare ? 0.5 : 1;
  for (int r = 0; r < R; ++r) store(tile + r * kKeys, total[r] * factor);
}

template <Pairwise KIND, class A>
void pairwise_scores(int64_t rows, int64_t n, int64_t depth, const A* q, int64_t q_row, const A* k, const A* weight,
                     A* tile) {
  for (int64_t j = 0; j < n; j += kLanes<A>) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
      pairwise_block<KIND, 4>(depth, q + r * q_row, q_row, k + j, weight, tile + r * kKeys + j);
    for (; r < rows; ++r) pairwise_block<KIND, 1>(depth, q + r * q_row, q_row, k + j, weight, tile + r * kKeys + j);
  }
}

// A row divided by its length, or by kShortest where that is more; returns the reciprocal.
constexpr double kShortest = 1e-8;
template <class A> inline A normalize(A* row, int64_t depth) {
  Vec<A> sum{};
  for (int64_t d = 0; d < depth; d += kLanes<A>) sum += load(row + d) * load(row + d);
  const double length = std::sqrt(static_cast<double>(reduce_add(sum)));
  const A inverse = static_cast<A>(1 / (length < kShortest ? kShortest : length));
  for (int64_t d = 0; d < depth; d += kLanes<A>) store(row + d, load(row + d) * inverse);
  return inverse;
}
// The gradient of a row from that of the row normalize() left.
template <class A> inline void normalize_backward(const A* row, A inverse, A* grad, int64_t depth) {
  Vec<A> sum{};
  for (int64_t d = 0; d < depth; d += kLanes<A>) sum += load(row + d) * load(grad + d);
  const A along = static_cast<double>(inverse) * kShortest < 1 ? reduce_add(sum) : A(0);
  for (int64_t d = 0; d < depth; d += kLanes<A>) store(grad + d, (load(grad + d) - load(row + d) * along) * inverse);
}

// e^x rounded once: products of two of these stand for e^2(q + k).
inline vdouble exp_rounded(vdouble x) { return exp(x); }
#if defined(__AVX512F__)
// In double, to 2^-32, of |x| below 700.
inline __m256 exp_of_half(vfloat_half x) {
  constexpr double kShifter = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const vdouble wide = widen(x), k = (wide * 1.4426950408889634074 + kShifter) - kShifter;
  const vdouble r = wide - k * 0.693147180559945309417;
  vdouble y = broadcast<double>(1.0 / 40320.0);
  y = y * r + 1.0 / 5040.0;
  y = y * r + 1.0 / 720.0;
  y = y * r + 1.0 / 120.0;
  y = y * r + 1.0 / 24.0;
  y = y * r + 1.0 / 6.0;
  y = y * r + 0.5;
  y = y * r + 1.0;
  y = y * r + 1.0;
  return _mm512_cvtpd_ps(_mm512_scalef_pd((__m512d)y, (__m512d)k));
}
inline vfloat exp_rounded(vfloat x) {
  return (vfloat)_mm512_insertf32x8(_mm512_castps256_ps512(exp_of_half(low_half(x))), exp_of_half(high_half(x)), 1);
}
#else
inline vfloat exp_rounded(vfloat x) {
  const vfloat_half half[2] = {__builtin_convertvector(exp(widen(low_half(x))), vfloat_half),
                               __builtin_convertvector(exp(widen(high_half(x))), vfloat_half)};
  vfloat result;
  std::memcpy(&result, half, sizeof result);
  return result;
}
#endif

// A row of a query or key, or of its gradient, turned by its position; by sign -1 back.
template <class A>
inline void turn(const AttentionRotary<A>& rotary, int64_t b, int64_t position, A sign, A* row) {
  const int64_t at = b * rotary.batch_stride + position * rotary.half;
  turn_row(row, rotary.cos + at, rotary.sin + at, rotary.half, rotary.interleaved, sign, row);
}

// Some queries against some keys of one head.
template <class T, int SCORE> struct Tile {
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int64_t lanes = kLanes<A>;
  static constexpr bool kAdditive = SCORE == kAdditiveScore, kGaussian = SCORE == kGaussianScore,
                        kCosine = SCORE == kCosineScore, kDot = SCORE == kDotScore;
  const AttentionArgs<T>& args;
  const AttentionShape& s;
  const int64_t depth, value_depth;  // padded
  const int64_t query_rows;  // loaded at a time
  const Keys words;
  const int64_t k_step;
  const bool strips;  // what is loaded lies in strips; of vectors, where they are needed beside them
  Rows<A> query, key, value;  // in place where they are products' operands as they are
  A *query_copy, *key_copy, *value_copy, *query_exp, *key_exp, *key_turned, *key_exp_turned, *of_key, *scores,
      *slope_of_cap;
  // of_key: the reciprocal of a key's length (cosine)
  A query_bound[64], key_bound = 0;  // of absolute values, a block of kRows queries each
  int64_t b = 0, h = 0, i0 = 0, rows_loaded = 0, j0 = 0, n = 0;
  // Strips, how far apart those along the depth lie, and bounds: of a strip of queries, and of all loaded keys.
  char *query_strips, *key_strips, *value_strips, *weight_strip;
  int64_t strip_of_depth = 0;
  float query_most[16], key_most = 0, value_most = 0;
  bool by_strips = false, has_query_vectors = false, has_key_vectors = false;

  static int64_t size(const AttentionShape& s, int64_t query_rows) {
    const int64_t depth = padded<A>(s.depth), value_depth = padded<A>(s.value_depth);
    int64_t bytes_of_strips = 0;
    if constexpr (kTiled<T, SCORE>)
      if (is_tiled<T, SCORE>(s))
        bytes_of_strips = (ceil_div(query_rows, kStrip) + kKeyStrips) * strip_bytes<T>(s.depth) +
                          (ceil_div(s.value_depth, kStrip) + 1) * strip_bytes<T>(kKeys);
    return bytes_of_strips / static_cast<int64_t>(sizeof(A)) + (query_rows + kKeys) * depth * (kAdditive ? 2 : 1) +
           s.depth * kKeys * (kAdditive ? 2 : 1) + kKeys * value_depth + kKeys + 2 * kRows * kKeys;
  }
  Tile(const AttentionArgs<T>& arguments, int64_t rows, A* memory)
      : args(arguments),
        s(arguments.shape),
        depth(padded<A>(s.depth)),
        value_depth(padded<A>(s.value_depth)),
        query_rows(rows),
        words(s.seed),
        k_step(sum_length(s)),
        strips(is_tiled<T, SCORE>(s)) {
    const auto take = [&memory](int64_t count) {
      A* at = memory;
      memory += count;
      return at;
    };
    query_copy = take(rows * depth);
    query_exp = kAdditive ? take(rows * depth) : query_copy;
    key_copy = take(kKeys * depth);
    key_exp = kAdditive ? take(kKeys * depth) : key_copy;
    key_turned = take(s.depth * kKeys);
    key_exp_turned = kAdditive ? take(s.depth * kKeys) : key_turned;
    value_copy = take(kKeys * value_depth);
    of_key = take(kKeys);
    scores = take(kRows * kKeys);
    slope_of_cap = take(kRows * kKeys);
    if constexpr (kTiled<T, SCORE>) {
      if (!strips) return;
      strip_of_depth = strip_bytes<T>(s.depth);
      char* at = reinterpret_cast<char*>(memory);
      query_strips = at;
      key_strips = query_strips + ceil_div(rows, kStrip) * strip_of_depth;
      value_strips = key_strips + kKeyStrips * strip_of_depth;
      weight_strip = value_strips + ceil_div(s.value_depth, kStrip) * strip_bytes<T>(kKeys);
    }
  }

  int64_t key_head() const { return h / (s.heads / s.key_heads); }
  int64_t row_number(int64_t i) const { return (b * s.heads + h) * s.queries + i; }

  // e^2x of rows; returns the largest |x|.
  static A double_exponentials(const A* from, int64_t count, A* to) {
    V most{};
    for (int64_t i = 0; i < count; i += lanes) {
      const V x = load(from + i), size = x < A(0) ? -x : x;
      most = size > most || size != size ? size : most;
      store(to + i, exp_rounded(x + x));
    }
    A bound = 0;
    for (int64_t l = 0; l < lanes; ++l)
      if (!(most[l] <= bound)) bound = most[l];
    return bound;
  }

  void set_head(int64_t batch, int64_t head) {
    b = batch;
    h = head;
  }
  // Rows of queries or keys from position `first` on: where they lie, or a copy, turned if they have rotary positions.
  Rows<A> operand(const T* from, int64_t row, int64_t column, int64_t first, int64_t count, A* memory) const {
    if (!kDot || !args.rotary.cos) return rows_of<kDot>(from, row, column, count, s.depth, memory);
    load_rows(from, row, column, count, s.depth, memory, depth);
    for (int64_t r = 0; r < count; ++r) turn(args.rotary, b, first + r, A(1), memory + r * depth);
    return {memory, depth};
  }
  // Whether strips are made of a query's or key's rows as they lie, or of copies that something was done to.
  bool packs_rows(const Strided<const T>& rows) const {
    return !kCosine && !(kDot && args.rotary.cos) && rows.stride[3] == 1;
  }
  const T* query_at(int64_t i) const {
    const Strided<const T>& q = args.query;
    return q.data + b * q.stride[0] + h * q.stride[1] + i * q.stride[2];
  }
  const T* key_at(const Strided<const T>& k) const {
    return k.data + b * k.stride[0] + key_head() * k.stride[1] + j0 * k.stride[2];
  }
  void set_queries(int64_t first, int64_t rows) {
    i0 = first;
    rows_loaded = rows;
    has_query_vectors = false;
  }
  void set_keys(int64_t first, int64_t count) {
    j0 = first;
    n = count;
    has_key_vectors = false;
  }
  void load_queries(int64_t first, int64_t rows) {
    set_queries(first, rows);
    if constexpr (kTiled<T, SCORE>)
      if (strips) return pack_queries(*this);
    load_query_vectors();
  }
  void load_query_vectors() {
    has_query_vectors = true;
    const int64_t rows = rows_loaded;
    query = operand(query_at(i0), args.query.stride[2], args.query.stride[3], i0, rows, query_copy);
    if constexpr (kCosine)
      for (int64_t i = 0; i < rows; ++i) normalize(query_copy + i * depth, depth);
    if constexpr (kAdditive)
      for (int64_t r = 0; r < rows; r += kRows)
        query_bound[r / kRows] =
            double_exponentials(query_copy + r * depth, smaller(kRows, rows - r) * depth, query_exp + r * depth);
  }
  void load_keys(int64_t first, int64_t count) {
    set_keys(first, count);
    if constexpr (kTiled<T, SCORE>)
      if (strips) {
        pack_keys(*this);
        return pack_values(*this);
      }
    load_key_vectors();
  }
  void load_key_rows() {
    key = operand(key_at(args.key), args.key.stride[2], args.key.stride[3], j0, n, key_copy);
    if constexpr (kCosine)
      for (int64_t j = 0; j < n; ++j) of_key[j] = normalize(key_copy + j * depth, depth);
  }
  void load_value_rows() {
    value = rows_of<true>(key_at(args.value), args.value.stride[2], args.value.stride[3], n, s.value_depth, value_copy);
  }
  void load_key_vectors() {
    has_key_vectors = true;
    load_key_rows();
    load_value_rows();
    transpose_rows(key.data, key.row, n, s.depth, key_turned, kKeys);
    if constexpr (kAdditive) {
      key_bound = double_exponentials(key_copy, n * depth, key_exp);
      transpose_rows(key_exp, depth, n, s.depth, key_exp_turned, kKeys);
    }
  }
  // Whether the strip of queries from r0 on is multiplied by tiles; if not, there are vectors.
  bool choose(int64_t r0) {
    by_strips = strips && is_bounded(query_most[r0 / kStrip]) && is_bounded(key_most) && is_bounded(value_most) &&
                are_large(1, value_most);
    if (!by_strips && !has_query_vectors) load_query_vectors();
    if (!by_strips && !has_key_vectors) load_key_vectors();
    return by_strips;
  }

  // f.operator()<kind>(queries from row r0 on, keys, keys turned) with the form of tanh that their bounds ask for.
  template <class F> void with_tanh(int64_t r0, const F& f) const {
    const A bound = query_bound[r0 / kRows];
    if (bound + key_bound <= kSmall<A>)
      f.template operator()<kSmallTanh>(query_copy + r0 * depth, key_copy, key_turned);
    else if (bound <= kSafe<A> && key_bound <= kSafe<A>)
      f.template operator()<kTanh>(query_exp + r0 * depth, key_exp, key_exp_turned);
    else
      f.template operator()<kExactTanh>(query_copy + r0 * depth, key_copy, key_turned);
  }

  // Scores of the loaded queries r0 .. r0 + rows - 1 and the first `count` loaded keys, without scale and masks.
  void multiply(int64_t r0, int64_t rows, int64_t count) {
    const int64_t width = padded<A>(count);
    if constexpr (kTiled<T, SCORE>)
      if (by_strips) return multiply_strip(*this, r0, rows, width);
    if constexpr (kAdditive) {
      with_tanh(r0, [&]<Pairwise KIND>(const A* q, const A*, const A* turned) {
        pairwise_scores<KIND>(rows, width, s.depth, q, depth, turned, args.weight, scores);
      });
    } else if constexpr (kGaussian) {
      pairwise_scores<kSquare>(rows, width, s.depth, query_copy + r0 * depth, depth, key_turned,
                               static_cast<const A*>(nullptr), scores);
    } else {
      product(rows, width, s.depth, query.data + r0 * query.row, query.row, 1, key_turned, kKeys, scores, kKeys, false,
              k_step);
    }
  }

  // output += weights, which the scores have become, x values.
  void add_values(int64_t rows, int64_t count, A* output) {
    if constexpr (kTiled<T, SCORE>)
      if (by_strips) return add_value_strips(*this, rows, count, output);
    product(rows, value_depth, count, scores, kKeys, 1, value.data, value.row, output, value_depth, true, k_step);
  }

  // v where a mask's bytes are set, else -infinity.
  static V bool_selected(const uint8_t* from, V v) { return bytes<A>(from) != 0 ? v : broadcast<A>(-__builtin_inf()); }

  // Scale, cap, slopes and masks of one row of scores, of query i0 + r0 + r, which sees keys begin .. end - 1.
  // Returns the largest in each lane, and what scores and it still have to be multiplied with: the scale, where nothing
  // but the scale is to be done. With `cap_slopes`, the derivative of the cap is left there.
  struct Row {
    V top;
    A factor;
  };
  // Whether row r's scores only want their scale, where it sees keys begin .. end - 1.
  bool is_plain(int64_t count, int64_t begin, int64_t end) const {
    return s.mask == kNoMask && !args.slopes && s.softcap == 0 && s.scale >= 0 && sees_all(count, begin, end);
  }
  bool sees_all(int64_t count, int64_t begin, int64_t end) const {
    return begin <= j0 && end >= j0 + padded<A>(count) && count % lanes == 0;
  }
  Row finish_row(int64_t r0, int64_t r, int64_t count, int64_t begin, int64_t end, bool cap_slopes) {
    A* x = scores + r * kKeys;
    const A scale = static_cast<A>(s.scale), minus_infinity = -__builtin_inf();
    V top = broadcast<A>(minus_infinity);
    const bool all = sees_all(count, begin, end);
    if (is_plain(count, begin, end)) {
      for (int64_t j = 0; j < count; j += lanes) {
        const V v = load(x + j);
        top = v > top ? v : top;
      }
      return {top, scale};
    }
    if (all && s.mask != kNoMask && args.mask.stride[3] == 1 && !args.slopes && s.softcap == 0) {
      const int64_t m = b * args.mask.stride[0] + h * args.mask.stride[1] + (i0 + r0 + r) * args.mask.stride[2] + j0;
      if (s.mask == kBoolMask && scale > 0) {
        const uint8_t* from = static_cast<const uint8_t*>(args.mask.data) + m;
        for (int64_t j = 0; j < count; j += lanes) {
          const V v = bool_selected(from + j, load(x + j));
          store(x + j, v);
          top = v > top ? v : top;
        }
        return {top, scale};
      }
      if (s.mask == kOwnMask) {
        const T* from = static_cast<const T*>(args.mask.data) + m;
        for (int64_t j = 0; j < count; j += lanes) {
          const V v = load(x + j) * scale + load(from + j);
          store(x + j, v);
          top = v > top ? v : top;
        }
        return {top, A(1)};
      }
    }
    const int64_t i = i0 + r0 + r;
    const int64_t at = b * args.mask.stride[0] + h * args.mask.stride[1] + i * args.mask.stride[2],
                  step = args.mask.stride[3];
    const Tag<A> lane = iota<A>();
    for (int64_t j = 0; j < count; j += lanes) {
      const int64_t some = smaller(lanes, count - j), m = at + (j0 + j) * step;
      V v = load(x + j);
      v *= scale;
      if (s.softcap != 0) {
        const V t = tanh(v * static_cast<A>(1 / s.softcap));
        v = t * static_cast<A>(s.softcap);
        if (cap_slopes) store(slope_of_cap + r * kKeys + j, A(1) - t * t);
      }
      if (args.slopes) {
        const V distance = __builtin_convertvector(lane, V) + static_cast<A>(j0 + j - i);
        v -= args.slopes[h] * (distance < A(0) ? -distance : distance);
      }
      if (s.mask == kBoolMask) v += bool_mask_vector<A>(static_cast<const uint8_t*>(args.mask.data) + m, step, some);
      if (s.mask == kOwnMask) v += mask_vector<A>(static_cast<const T*>(args.mask.data) + m, step, some);
      if (s.mask == kFloatMask) v += mask_vector<A>(static_cast<const float*>(args.mask.data) + m, step, some);
      if (!all) {
        const int64_t from = larger(begin - j0 - j, 0), to = larger(smaller(end - j0 - j, some), 0);
        v = (lane >= tags<A>(from)) & (lane < tags<A>(to)) ? v : broadcast<A>(minus_infinity);
      }
      store(x + j, v);
      top = v > top ? v : top;
    }
    return {top, A(1)};
  }

  // f(j, factor): what dropout multiplies vector j of row r's probabilities with.
  template <class F> void each_dropped(int64_t r0, int64_t r, int64_t count, const F& f) const {
    alignas(64) uint32_t word[kKeys + 64];
    dropout_words(words, row_number(i0 + r0 + r), s.keys, j0, count, word);
    const uint64_t threshold = philox::threshold(s.p);
    const A kept = s.p < 1 ? static_cast<A>(1 / (1 - s.p)) : A(0);
    for (int64_t j = 0; j < count; j += lanes) {
      V factor;
      for (int64_t l = 0; l < lanes; ++l) factor[l] = word[j + l] >= threshold ? kept : A(0);
      f(j, factor);
    }
  }
};

#if DLKERN_TILE_CODE
// f(numbers, row): what strips are packed from.
template <class T, int SCORE, class F> void with_query_rows(Tile<T, SCORE>& tile, const F& f) {
  if (tile.packs_rows(tile.args.query)) return f(tile.query_at(tile.i0), tile.args.query.stride[2]);
  tile.load_query_vectors();
  f(tile.query.data, tile.query.row);
}
template <class T, int SCORE> void pack_queries(Tile<T, SCORE>& tile) {
  with_query_rows(tile, [&](const auto* from, int64_t row) {
    for (int64_t r = 0; r < tile.rows_loaded; r += kStrip)
      tile.query_most[r / kStrip] = most_of(from + r * row, row, smaller(kStrip, tile.rows_loaded - r), tile.s.depth);
    pack_lines<T, true>(Lines{from, row, 1}, tile.rows_loaded, tile.s.depth, tile.query_strips, tile.strip_of_depth);
  });
}

template <class T, int SCORE, class F> void with_key_rows(Tile<T, SCORE>& tile, const F& f) {
  if (tile.packs_rows(tile.args.key)) return f(tile.key_at(tile.args.key), tile.args.key.stride[2]);
  tile.load_key_rows();
  f(tile.key.data, tile.key.row);
}
template <class T, int SCORE, class F> void with_value_rows(Tile<T, SCORE>& tile, const F& f) {
  if (tile.args.value.stride[3] == 1) return f(tile.key_at(tile.args.value), tile.args.value.stride[2]);
  tile.load_value_rows();
  f(tile.value.data, tile.value.row);
}
template <class T, int SCORE> void pack_keys(Tile<T, SCORE>& tile) {
  with_key_rows(tile, [&](const auto* from, int64_t row) {
    tile.key_most = most_of(from, row, tile.n, tile.s.depth);
    pack_lines<T, false>(Lines{from, row, 1}, tile.n, tile.s.depth, tile.key_strips, tile.strip_of_depth);
  });
}
template <class T, int SCORE> void pack_values(Tile<T, SCORE>& tile) {
  with_value_rows(tile, [&](const auto* from, int64_t row) {
    tile.value_most = most_of(from, row, tile.n, tile.s.value_depth);
    pack_lines<T, false>(Lines{from, 1, row}, tile.s.value_depth, tile.n, tile.value_strips, strip_bytes<T>(kKeys));
  });
}

template <class T, int SCORE> void multiply_strip(Tile<T, SCORE>& tile, int64_t r0, int64_t rows, int64_t width) {
  multiply_row<T>(ceil_div(tile.s.depth, kTileStep), tile.query_strips + r0 / kStrip * tile.strip_of_depth,
                  tile.key_strips, tile.strip_of_depth, tile.scores, kKeys, rows, width);
}

template <class T, int SCORE>
void add_value_strips(Tile<T, SCORE>& tile, int64_t rows, int64_t count, float* output) {
  if (tile.s.p > 0) pack_strip<true, float, T>({tile.scores, kKeys, 1}, rows, count, tile.weight_strip);
  add_row<T>(ceil_div(count, kTileStep), tile.weight_strip, tile.value_strips, strip_bytes<T>(kKeys), output,
             tile.value_depth, rows, tile.value_depth);
}
#endif

}  // namespace attention_detail
}  // namespace dlkern::cpu::DLKERN_ISA

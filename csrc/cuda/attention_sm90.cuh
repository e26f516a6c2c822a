// What attention_sm90.cu and attention_backward_sm90.cu share: blocks of two warpgroups that multiply, 64 rows each, and
// one thread that copies tiles into a ring of them; which calls they take.
#pragma once
#include <cmath>

#include "attention_tile.cuh"
#include "hopper.cuh"

namespace dlkern::cuda {
namespace attention {
namespace hopper {

constexpr int kGroups = 2, kBlockRows = kAttentionHopperRows, kBlockThreads = 128 * (1 + kGroups);
static_assert(kBlockRows == 64 * kGroups);

// Sequences that lie one after another: a block has the arguments of its own one, which begins at these rows of the
// operands. Of a call alone both are 0.
struct Origin {
  int query, key;
};
template <class A>
constexpr bool kPacked = std::is_same_v<A, SequenceArgs>;

// Of a thread that multiplies: its warpgroup, and the first of its warp's 16 rows of the block's.
DLKERN_DEVICE int group() { return warp() / 4 - 1; }
DLKERN_DEVICE int warp_row() { return (warp() - 4) * 16; }

// ROWS rows of one head in shared memory: panels of 64 columns, each rows of 128 bytes.
template <class T, int ROWS, int DEPTH>
struct Rows {
  static constexpr int kPanel = ROWS * 64, kElements = ROWS * DEPTH, kBytes = 2 * kElements;

  // Starts the copy of rows from `row` on. `barrier` must be told of kBytes.
  static DLKERN_DEVICE void copy(T* tile, const TensorMap& map, uint64_t* barrier, int row, int h, int b) {
#pragma unroll
    for (int panel = 0; panel < DEPTH / 64; panel++)
      tensor_copy_4d(tile + panel * kPanel, map, barrier, 64 * panel, row, h, b);
  }
  // Rows from `begin` on, which are those of the next sequence, become zeros: its NaN would also pass through factors of 0.
  // By all threads that multiply, before any of them starts a product; then end_clearing().
  static DLKERN_DEVICE void clear(T* tile, int begin) {
    constexpr int kAcross = DEPTH / 8;  // pieces of 16 bytes; the swizzle leaves them in their row
    for (int i = begin * kAcross + static_cast<int>(threadIdx.x) - 128; i < ROWS * kAcross; i += 128 * kGroups)
      store_pack(tile + i % kAcross / 8 * kPanel + i / kAcross * 64 + i % 8 * 8, Pack<T, 8>{});
  }
  // Of wgmma: 64 rows from `row` on, or all, with k down the columns, from `column` on.
  static DLKERN_DEVICE uint64_t across(const T* tile, int row, int column) {
    return matrix_descriptor(tile + column / 64 * kPanel + row * 64 + column % 64, 16);
  }
  // All columns, with k down the rows, from `row` on.
  static DLKERN_DEVICE uint64_t down(const T* tile, int row) { return matrix_descriptor(tile + row * 64, 2 * kPanel); }
};

DLKERN_DEVICE void end_clearing() {
  fence_proxy_async();
  barrier_sync<128 * kGroups>(3);
}

// s = a b^T: 64 rows of `a` from `row` on, N * 2 rows of `b`.
template <int DEPTH, int A_ROWS, int N, class T>
DLKERN_DEVICE void start_row_products(float (&s)[N], const T* a, int row, const T* b) {
#pragma unroll
  for (int d = 0; d < DEPTH; d += 16)
    wgmma<T, false, false>(s, Rows<T, A_ROWS, DEPTH>::across(a, row, d), Rows<T, 2 * N, DEPTH>::across(b, 0, d), d > 0);
  wgmma_commit();
}

// sum += p b, p in registers and 16 K columns wide.
template <int DEPTH, int K, class T>
DLKERN_DEVICE void start_product(float (&sum)[DEPTH / 2], const uint32_t (&p)[K][4], const T* b) {
#pragma unroll
  for (int k = 0; k < K; k++) wgmma_registers<T, true>(sum, p[k], Rows<T, 16 * K, DEPTH>::down(b, 16 * k), true);
  wgmma_commit();
}

// An accumulator, rounded, becomes the next product's A.
template <class T, int K>
DLKERN_DEVICE void to_operand(uint32_t (&p)[K][4], const float (&s)[8 * K]) {
#pragma unroll
  for (int i = 0; i < 4 * K; i++) p[i / 4][i % 4] = pack_pair<T>(s[2 * i], s[2 * i + 1]);
}

// Calls f(r, c, i): element i of an accumulator is in row lane() / 4 + 8 r of its warp's, and column c.
template <int N, class F>
DLKERN_DEVICE void for_each(F&& f) {
#pragma unroll
  for (int i = 0; i < N; i++) f(i / 2 % 2, i / 4 * 8 + lane() % 4 * 2 + i % 2, i);
}

// RowScale's fit and undo, of accumulators.
template <class T, int N, int M>
DLKERN_DEVICE void fit(RowScale<T>& scale, float (&s)[N], float (&sum)[M]) {
  if constexpr (std::is_same_v<T, fp16>) {
    float highest[2] = {scale.size[0], scale.size[1]}, inverse[2], shrink[2];
    for_each<N>([&](int r, int, int i) { highest[r] = fmaxf(highest[r], fabsf(s[i])); });
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float before = scale.size[r];
      inverse[r] = set_scale(scale.size[r], row_max<T>(highest[r]));
      shrink[r] = before * inverse[r];
    }
    for_each<N>([&](int r, int, int i) { s[i] *= inverse[r]; });
    for_each<M>([&](int r, int, int i) { sum[i] *= shrink[r]; });
  }
}
template <class T, int N>
DLKERN_DEVICE void undo(const RowScale<T>& scale, float (&sum)[N]) {
  if constexpr (std::is_same_v<T, fp16>) for_each<N>([&](int r, int, int i) { sum[i] *= scale.size[r]; });
}

// What position hides of queries, from `first` on a warp, and keys becomes -infinity.
template <int N, class A>
DLKERN_DEVICE void hide_keys(float (&s)[N], const A& x, int64_t b, int first, int j0) {
  const Span span[2] = {span_of(x, b, first + lane() / 4), span_of(x, b, first + lane() / 4 + 8)};
  for_each<N>([&](int r, int c, int i) {
    if (j0 + c < span[r].begin || j0 + c >= span[r].end) s[i] = minus_infinity();
  });
}

// Tiles in shared memory, filled and used in the same order: use n is of tile n % STAGES.
template <int STAGES>
struct Ring {
  uint64_t *full, *empty;

  DLKERN_DEVICE void init() const {
    for (int stage = 0; stage < STAGES; stage++) {
      mbarrier_init(full + stage, 1);
      mbarrier_init(empty + stage, 4 * kGroups);  // a warp each
    }
  }
  // By the thread that copies: waits until the tile is free, announces the bytes.
  DLKERN_DEVICE uint64_t* fill(int use, unsigned bytes) const {
    mbarrier_wait(empty + use % STAGES, (use / STAGES + 1) % 2);
    mbarrier_arrive_expect(full + use % STAGES, bytes);
    return full + use % STAGES;
  }
  DLKERN_DEVICE void wait(int use) const { mbarrier_wait(full + use % STAGES, use / STAGES % 2); }
  DLKERN_DEVICE void release(int use) const {
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(empty + use % STAGES);
  }
};

// ---- For launchers ----

// Whether scores are nothing but products with a scale, of a size that has kernels; and masks by position.
inline bool fits(const Attention& a, const Args& x) {
  return is_16_bit(a.element) && a.score == kDotScore && x.plain && !x.dropout && a.depth == a.value_depth &&
         (a.depth == 64 || a.depth == 128) && x.scale > 0 && std::isfinite(x.scale * kLog2E) && x.query.aligned &&
         x.key.aligned && x.value.aligned;
}

// The map of an operand, to be copied in `rows` rows of 64 columns; false where it cannot be.
inline bool make_rows_map(TensorMap& map, const Operand& x, int64_t depth, int64_t length, int64_t heads, int64_t batch,
                          int rows) {
  const int64_t size[4] = {depth, length, heads, batch};
  int64_t stride[3] = {x.stride[2], x.stride[1], x.stride[0]};
  for (int d = 0; d < 3; d++) {
    if (size[d + 1] == 1)
      stride[d] = depth;  // any that is right
    else if (stride[d] == 0)
      return false;
  }
  return x.aligned && make_tiled_map(map, x.data, 4, size, stride, rows);
}

// Calls f(type, depth) with T and DEPTH as values that carry them in their types.
template <class F>
auto dispatch(const Attention& a, F&& f) {
  const auto of_type = [&](auto* type) {
    return a.depth == 64 ? f(type, std::integral_constant<int, 64>{}) : f(type, std::integral_constant<int, 128>{});
  };
  return a.element == Element::float16 ? of_type(static_cast<fp16*>(nullptr)) : of_type(static_cast<bf16*>(nullptr));
}

}  // namespace hopper
}  // namespace attention
}  // namespace dlkern::cuda

// What forward and backward of recurrent layers share: a block's tile of the recurrent product, the order of steps, and
// how blocks wait for each other.
//
// A block owns 16 hidden units, with all their gates, of some rows of the batch: 64, a warp 16 of them, or where the
// batch is small 16, of which each warp has a quarter of the sum. Chunks of 32 of the sum pass through a ring in shared
// memory; the weights' stay there where they are kept from step to step. Sums of all warps meet in shared memory, and a
// thread then has all gates of its units. Blocks of the same rows wait for each other through a counter, once a step.
#pragma once
#include <mutex>
#include <type_traits>

#include "limits.cuh"
#include "mma_tile.cuh"
#include "pack.cuh"
#include "ptx.cuh"
#include "rnn.h"

namespace dlkern::cuda {
namespace rnn {

constexpr int kThreads = 128, kWarps = 4, kUnits = 16, kChunk = 32, kStages = 3;

// ---- Steps ----

// The sequences that a step has, and where their rows lie.
struct Step {
  int64_t offset = 0, size = 0;
};

DLKERN_DEVICE int64_t place(const RnnShape& s, int64_t b) { return s.order ? s.order[b] : b; }

// The n-th step of the recurrence; empty beyond both ends.
DLKERN_DEVICE Step step_at(const RnnShape& s, int64_t n) {
  if (n < 0 || n >= s.steps) return {};
  const int64_t t = s.reverse ? s.steps - 1 - n : n;
  return s.sizes ? Step{s.offsets[t], s.sizes[t]} : Step{t * s.batch, s.batch};
}

// ---- Waiting ----

// All blocks of the same rows have written: their threads' writes before arrive() are seen after wait() for them.
struct Meeting {
  unsigned* counter;  // null: a launch a step, nothing to wait for
  unsigned met = 0;

  DLKERN_DEVICE void wait() const {
    if (!counter || met == 0) return;
    if (threadIdx.x == 0) {
      while (ld_acquire(counter) < met * gridDim.x) spin_wait();
    }
    __syncthreads();
  }
  DLKERN_DEVICE void arrive() {
    __syncthreads();
    if (counter && threadIdx.x == 0) red_release_add(counter, 1);
    met++;
  }
};

// ---- Product ----

// COLUMNS of the product, 16 units times their gates. STORED: whether a row of the weights is a column of the product
// (k_last, forward) or a step of the sum (k_first, backward). WIDE: 64 rows of the batch, else 16.
template <class T, int COLUMNS, Stored STORED, bool WIDE>
struct Product {
  static constexpr int kWarpsK = WIDE ? 1 : kWarps, kWarpsM = kWarps / kWarpsK;
  static constexpr int kRows = 16 * kWarpsM;
  static constexpr bool kLast = STORED == Stored::k_last;
  static constexpr int kPiece = 16 / sizeof(T);
  static constexpr int kPad = 16 / sizeof(T);
  static constexpr int kStateStride = kChunk + kPad, kStateTile = kRows * kStateStride;
  static constexpr int kWeightRows = kLast ? COLUMNS : kChunk, kWeightColumns = kLast ? kChunk : COLUMNS;
  static constexpr int kWeightStride = kWeightColumns + kPad, kWeightTile = kWeightRows * kWeightStride;
  static constexpr int kSumStride = COLUMNS + 8, kSums = kWarpsK * kRows * kSumStride;
  static constexpr int kStatePieces = kRows * kChunk / kPiece * kWarpsK / kThreads;  // a thread
  static constexpr int kElements = kRows * kUnits / kThreads;  // of the results, a thread

  // A stage of the ring has a chunk for each of the warps that share the sum.
  static constexpr int64_t shared_bytes(int64_t k, bool keep) {
    const int64_t chunks = ceil_div(k, kChunk * kWarpsK) * kWarpsK, ring = kStages * kWarpsK;
    return static_cast<int64_t>(sizeof(T)) * (ring * kStateTile + (keep ? chunks : ring) * kWeightTile) +
           static_cast<int64_t>(sizeof(float)) * kSums;
  }

  const T* weight;
  int64_t k, hidden, unit;  // of the sum; columns of a gate; the block's first unit
  bool aligned, keep;
  T *states, *weights;
  float* sums;

  DLKERN_DEVICE Product(unsigned char* shared, const T* w, int64_t depth, int64_t units, bool vectors, bool kept)
      : weight(w),
        k(depth),
        hidden(units),
        unit(static_cast<int64_t>(blockIdx.x) * kUnits),
        aligned(vectors),
        keep(kept) {
    sums = reinterpret_cast<float*>(shared);
    states = reinterpret_cast<T*>(sums + kSums);
    weights = states + kStages * kWarpsK * kStateTile;
  }

  static DLKERN_DEVICE int warp() { return static_cast<int>(threadIdx.x) / 32; }
  static DLKERN_DEVICE int lane() { return static_cast<int>(threadIdx.x) % 32; }
  DLKERN_DEVICE int stages() const { return static_cast<int>(ceil_div(k, kChunk * kWarpsK)); }

  // Starts the copy of a piece, of which `count` elements exist, the others become zero.
  DLKERN_DEVICE void copy(T* to, const T* from, int64_t count) const {
    if (aligned) {
      cp_async16(to, count > 0 ? from : weight, count > 0 ? 16 : 0);
    } else {
#pragma unroll
      for (int e = 0; e < kPiece; e++) to[e] = e < count ? from[e] : from_float<T>(0.0f);
    }
  }

  DLKERN_DEVICE void load_weights(int stage, T* to) const {
    constexpr int kAcross = kWeightColumns / kPiece, kPieces = kWeightRows * kAcross * kWarpsK;
#pragma unroll 4
    for (int piece = static_cast<int>(threadIdx.x); piece < kPieces; piece += kThreads) {
      const int chunk = piece / (kWeightRows * kAcross), r = piece / kAcross % kWeightRows,
                c = piece % kAcross * kPiece;
      const int64_t k_at = static_cast<int64_t>(stage * kWarpsK + chunk) * kChunk + (kLast ? c : r);
      const int64_t of_unit = unit + (kLast ? r % kUnits : c);
      const int64_t row = kLast ? r / kUnits * hidden + of_unit : k_at;
      const int64_t column = kLast ? k_at : of_unit, columns = kLast ? k : hidden;
      const bool inside = kLast ? of_unit < hidden : k_at < k;
      copy(to + chunk * kWeightTile + r * kWeightStride + c, weight + row * columns + column,
           inside ? columns - column : 0);
    }
  }
  DLKERN_DEVICE void load_states(int stage, T* to, const T* const (&rows)[kStatePieces]) const {
    constexpr int kAcross = kChunk * kWarpsK / kPiece;
#pragma unroll
    for (int i = 0; i < kStatePieces; i++) {
      const int piece = static_cast<int>(threadIdx.x) + i * kThreads;
      const int r = piece / kAcross, c = piece % kAcross * kPiece;
      const int64_t k_at = static_cast<int64_t>(stage) * kChunk * kWarpsK + c;
      copy(to + c / kChunk * kStateTile + r * kStateStride + c % kChunk, rows[i] ? rows[i] + k_at : nullptr,
           rows[i] ? k - k_at : 0);
    }
  }

  // Starts loading the weights that are kept.
  DLKERN_DEVICE void begin() const {
    if (!keep) return;
    for (int stage = 0; stage < stages(); stage++) load_weights(stage, weights + stage * kWarpsK * kWeightTile);
    cp_async_commit();
  }

  // Makes all sums; row(r) is where the r-th row of states lies, null: zeros.
  template <class Row>
  DLKERN_DEVICE void run(Row&& row) const {
    const T* rows[kStatePieces];
#pragma unroll
    for (int i = 0; i < kStatePieces; i++)
      rows[i] = row((static_cast<int>(threadIdx.x) + i * kThreads) / (kChunk * kWarpsK / kPiece));
    const auto load = [&](int stage) {
      load_states(stage, states + stage % kStages * kWarpsK * kStateTile, rows);
      if (!keep) load_weights(stage, weights + stage % kStages * kWarpsK * kWeightTile);
    };
    const int count = stages(), warp_k = WIDE ? 0 : warp(), warp_m = WIDE ? warp() : 0;
    WarpSums sum;
#pragma unroll
    for (int stage = 0; stage < kStages - 1; stage++) {
      if (stage < count) load(stage);
      cp_async_commit();
    }
#pragma unroll 1
    for (int stage = 0; stage < count; stage++) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage is there, and everybody is done with the one that is loaded over next
      if (stage + kStages - 1 < count) load(stage + kStages - 1);
      cp_async_commit();
      sum.add(states + (stage % kStages * kWarpsK + warp_k) * kStateTile + 16 * warp_m * kStateStride,
              weights + ((keep ? stage : stage % kStages) * kWarpsK + warp_k) * kWeightTile);
    }
    sum.store(sums + (warp_k * kRows + 16 * warp_m) * kSumStride);
    __syncthreads();
  }
  DLKERN_DEVICE float sum(int row, int column) const {
    float total = sums[row * kSumStride + column];
#pragma unroll
    for (int w = 1; w < kWarpsK; w++) total += sums[(w * kRows + row) * kSumStride + column];
    return total;
  }

  // A warp's 16 rows of the product: on the tensor cores in 16-bit types, else a lane has eight rows of one unit.
  struct TensorCores {
    float value[COLUMNS / 8][4] = {};

    DLKERN_DEVICE void add(const T* state, const T* weight_tile) {
#pragma unroll
      for (int k_at = 0; k_at < kChunk; k_at += 16) {
        uint32_t a[4];
        Staged<T, 16, Stored::k_last>::a_fragment(a, state, 0, k_at);
#pragma unroll
        for (int j = 0; j < COLUMNS / 16; j++) {
          uint32_t b[4];
          Staged<T, COLUMNS, STORED>::b_fragments(b, weight_tile, 16 * j, k_at);
          mma_16x8x16<T>(value[2 * j], a, b[0], b[1]);
          mma_16x8x16<T>(value[2 * j + 1], a, b[2], b[3]);
        }
      }
    }
    DLKERN_DEVICE void store(float* to) const {
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; j++) {
#pragma unroll
        for (int v = 0; v < 4; v++)
          to[(lane() / 4 + v / 2 * 8) * kSumStride + 8 * j + lane() % 4 * 2 + v % 2] = value[j][v];
      }
    }
  };
  struct Exact {
    static constexpr int kGates = COLUMNS / kUnits;
    float value[8][kGates] = {};

    DLKERN_DEVICE void add(const T* state, const T* weight_tile) {
      const int of_unit = lane() % kUnits;
      float chain[8][kGates] = {};  // a chunk for itself: one chain of additions over all would lose digits
#pragma unroll 1
      for (int k_at = 0; k_at < kChunk; k_at += 4) {
        float w[kGates][4];
#pragma unroll
        for (int g = 0; g < kGates; g++) {
          if (kLast) {
            const auto four = load_pack<float, 4>(weight_tile + (g * kUnits + of_unit) * kWeightStride + k_at);
#pragma unroll
            for (int v = 0; v < 4; v++) w[g][v] = four.at[v];
          } else {
#pragma unroll
            for (int v = 0; v < 4; v++) w[g][v] = weight_tile[(k_at + v) * kWeightStride + of_unit];
          }
        }
#pragma unroll
        for (int r = 0; r < 8; r++) {
          const auto four = load_pack<float, 4>(state + (lane() / kUnits * 8 + r) * kStateStride + k_at);
#pragma unroll
          for (int g = 0; g < kGates; g++) {
#pragma unroll
            for (int v = 0; v < 4; v++) chain[r][g] = fmaf(four.at[v], w[g][v], chain[r][g]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 8; r++) {
#pragma unroll
        for (int g = 0; g < kGates; g++) value[r][g] += chain[r][g];
      }
    }
    DLKERN_DEVICE void store(float* to) const {
#pragma unroll
      for (int r = 0; r < 8; r++) {
#pragma unroll
        for (int g = 0; g < kGates; g++)
          to[(lane() / kUnits * 8 + r) * kSumStride + g * kUnits + lane() % kUnits] = value[r][g];
      }
    }
  };
  using WarpSums = std::conditional_t<sizeof(T) == 2, TensorCores, Exact>;

  // The i-th result of this thread: its row in the block, and its unit in the block (the same for all i).
  static DLKERN_DEVICE int row_of(int i) { return static_cast<int>(threadIdx.x) / kUnits + i * (kThreads / kUnits); }
  static DLKERN_DEVICE int unit_of() { return static_cast<int>(threadIdx.x) % kUnits; }
};

template <int THREADS>
__global__ void __launch_bounds__(THREADS) rnn_counters_kernel(unsigned* counters, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += THREADS) counters[i] = 0;
}

// ---- Launching ----

// How much shared memory its launches may ask for is a property of the kernel, and here a layer's own: from saying it
// to the launch CPU threads take turns.
inline std::mutex& launching() {
  static std::mutex mutex;
  return mutex;
}

// Whether blocks have 64 rows: where there are many, and where the ring of 16, four times as long, is more than this
// GPU gives a block, which in float32 with several gates may be.
inline bool wide(const RnnShape& s) {
  using Long = Product<float, 4 * kUnits, Stored::k_last, false>;
  if (s.batch > 16) return true;
  return s.element == Element::float32 && s.gates() > 1 && Long::shared_bytes(0, false) > most_shared_bytes();
}
static_assert(Product<float, 4 * kUnits, Stored::k_last, true>::shared_bytes(0, false) <= kLeastSharedBytes &&
              Product<bf16, 4 * kUnits, Stored::k_last, false>::shared_bytes(0, false) <= kLeastSharedBytes &&
              Product<float, kUnits, Stored::k_last, false>::shared_bytes(0, false) <= kLeastSharedBytes &&
              Product<float, kUnits, Stored::k_first, false>::shared_bytes(0, false) <= kLeastSharedBytes);
inline dim3 grid(const RnnShape& s) {
  return grid_of(ceil_div(s.hidden, kUnits), ceil_div(s.batch, wide(s) ? 64 : 16));
}
inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Calls f(type, gates, wide) with the shape's T, gates and width as values that carry them in their types.
template <class F>
void dispatch(const RnnShape& s, F&& f) {
  const auto with_width = [&](auto* type, auto gates) {
    if (wide(s))
      f(type, gates, std::true_type{});
    else
      f(type, gates, std::false_type{});
  };
  const auto with_gates = [&](auto* type) {
    if (s.gates() == 4)
      with_width(type, std::integral_constant<int, 4>{});
    else if (s.gates() == 3)
      with_width(type, std::integral_constant<int, 3>{});
    else
      with_width(type, std::integral_constant<int, 1>{});
  };
  with_type(s.element, with_gates);
}

// Whether a launch of `kernel` for all steps has its weights in shared memory and all of its blocks at once.
template <class... Parameters>
RnnRoute route_of(const RnnShape& s, void (*kernel)(Parameters...), int64_t shared_bytes) {
  if (s.steps == 1) return RnnRoute::few_steps;
  const dim3 blocks = grid(s);
  const std::lock_guard<std::mutex> lock(launching());
  const int64_t at_once = blocks_at_once(kernel, kThreads, shared_bytes);
  if (at_once < 0) return RnnRoute::too_large;
  return static_cast<int64_t>(blocks.x) * blocks.y > at_once ? RnnRoute::not_resident : RnnRoute::persistent;
}

}  // namespace rnn
}  // namespace dlkern::cuda

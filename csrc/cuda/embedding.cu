// Embedding: output[i] = weight[indices[i]], and the gradient of the table, the sum of grad_output[i] over indices[i] = v.
// The forward copies rows, in the widest words that addresses allow. For the backward positions are sorted by row, stably
// (the op layer does, between keys and sums). A warp has 32 neighbours among the sorted and some columns, and sums each
// row's in their order; rows that begin or end inside it are finished, of others it leaves a part, and a block adds the
// parts up in their order: no atomics, the same bits every run, and a frequent row is no one's alone. An index outside the
// table gives a row of NaN and takes no gradient.
// Floor: the rows read and written once; backward grad_output read once and the table's gradient written once.
#include "embedding.h"

#include <type_traits>

#include "pack.cuh"

namespace dlkern::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 32;  // sorted positions of a warp, one for each lane to hold
constexpr int kAhead = 4;  // rows in flight
constexpr unsigned kAll = 0xffffffffu;

// All bits set are NaN in every dtype.
template <class Word>
DLKERN_DEVICE Word missing() {
  if constexpr (std::is_same_v<Word, uint4>)
    return {kAll, kAll, kAll, kAll};
  else if constexpr (std::is_same_v<Word, uint2>)
    return {kAll, kAll};
  else
    return static_cast<Word>(kAll);
}

// 2^shift threads a row; width and stride in words.
template <class Word, class Index>
__global__ void __launch_bounds__(kThreads)
    embedding_forward_kernel(int64_t count, int64_t rows, int64_t width, int64_t stride, int shift,
                             const Index* indices, const Word* weight, Word* output) {
  const int thread = static_cast<int>(threadIdx.x), across = 1 << shift;
  const int64_t position = static_cast<int64_t>(blockIdx.x) * (kThreads >> shift) + (thread >> shift);
  if (position >= count) return;
  const int64_t row = indices[position];
  const bool exists = row >= 0 && row < rows;
  const Word* from = weight + (exists ? row * stride : 0);
  Word* to = output + position * width;
  for (int64_t j = thread & (across - 1); j < width; j += across) to[j] = exists ? from[j] : missing<Word>();
}

template <class Index>
__global__ void __launch_bounds__(kThreads)
    embedding_keys_kernel(int64_t count, int64_t rows, int64_t padding_idx, const Index* indices, int32_t* keys) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t row = indices[i];
  keys[i] = row >= 0 && row < rows && row != padding_idx ? static_cast<int32_t>(row) : kNoRow;
}

// Of the parts of a tile: of a row that began before it, and of one that begins in it and goes on behind.
DLKERN_DEVICE int64_t head_of(int64_t tile) { return 2 * tile; }
DLKERN_DEVICE int64_t tail_of(int64_t tile) { return 2 * tile + 1; }

template <int VEC>
DLKERN_DEVICE void divide(const EmbeddingBackward& args, float* sum, int64_t positions) {
  if (!args.scale_grad_by_freq) return;
#pragma unroll
  for (int v = 0; v < VEC; v++) sum[v] /= static_cast<float>(positions);
}

// A sum to its row of the gradient, or, where `part` is not null, there.
template <class T, int VEC>
DLKERN_DEVICE void store_sum(const EmbeddingBackward& args, int32_t row, int64_t column, float* part,
                             const float* sum) {
  // Masked: without seeing it end in zeros the compiler stores elements one by one.
  T* to = static_cast<T*>(args.grad_weight) + ((row * args.width + column) & ~int64_t{VEC - 1});
  if (!part) {
    store_floats<VEC>(to, sum);
  } else {
    constexpr int kStep = VEC < 4 ? VEC : 4;
#pragma unroll
    for (int v = 0; v < VEC; v += kStep) store_floats<kStep>(part + v, sum + v);
  }
}

// A warp: a tile of sorted positions, 32 * VEC columns.
template <class T, int VEC>
__global__ void __launch_bounds__(kThreads)
    embedding_sums_kernel(EmbeddingBackward args, int64_t tiles, int64_t chunks) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, tile = unit / chunks;
  if (tile >= tiles) return;
  const int64_t column = (unit % chunks * 32 + lane) * VEC, first = tile * kTile, place = first + lane;
  const bool inside = column < args.width;
  const int32_t key = place < args.count ? args.keys[place] : kNoRow;
  const int held_places = __popc(__ballot_sync(kAll, key != kNoRow));  // the others are behind
  if (held_places == 0) return;
  const int64_t position = place < args.count ? args.order[place] : 0;
  const int32_t before = first > 0 ? args.keys[first - 1] : kNoRow;
  const int32_t after = first + kTile < args.count ? args.keys[first + kTile] : kNoRow;
  int32_t next = __shfl_down_sync(kAll, key, 1);
  if (lane == 31) next = after;
  const unsigned ends = __ballot_sync(kAll, key != next);
  float sum[VEC] = {};
  int begin = 0;  // of the row that is summed
  for (int start = 0; start < held_places; start += kAhead) {
    float held[kAhead][VEC];
#pragma unroll
    for (int k = 0; k < kAhead; k++) {
      const int64_t from = __shfl_sync(kAll, position, start + k);
      if (inside && start + k < held_places)
        load_floats<VEC>(held[k], static_cast<const T*>(args.grad_output) + from * args.width + column);
    }
#pragma unroll
    for (int k = 0; k < kAhead; k++) {
      const int p = start + k;
      const int32_t row = __shfl_sync(kAll, key, p);
      if (!inside || p >= held_places) continue;
#pragma unroll
      for (int v = 0; v < VEC; v++) sum[v] += held[k][v];
      const bool goes_on = (ends >> p & 1) == 0;
      if (goes_on && p + 1 < kTile) continue;
      const bool opened = begin == 0 && before == row;
      const int64_t part = opened ? head_of(tile) : tail_of(tile);
      if (!opened && !goes_on) divide<VEC>(args, sum, p + 1 - begin);
      store_sum<T, VEC>(args, row, column, opened || goes_on ? args.parts + part * args.width + column : nullptr, sum);
#pragma unroll
      for (int v = 0; v < VEC; v++) sum[v] = 0.0f;
      begin = p + 1;
    }
  }
}

// The first of sorted keys [low, high) that is not below `value`.
DLKERN_DEVICE int64_t first_place(const int32_t* keys, int64_t low, int64_t high, int32_t value) {
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < value)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// A block: the row that begins in a tile and goes on behind it, where there is one; 32 * VEC columns.
template <class T, int VEC>
__global__ void __launch_bounds__(kThreads) embedding_parts_kernel(EmbeddingBackward args, int64_t chunks) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t tile = blockIdx.x / chunks, first = tile * kTile, last = first + kTile - 1;
  const int32_t row = args.keys[last];
  if (row == kNoRow || args.keys[last + 1] != row) return;
  if (first > 0 && args.keys[first - 1] == row) return;
  const int64_t begin = first_place(args.keys, first, last, row);
  const int64_t end = first_place(args.keys, last + 1, args.count, row + 1);
  const int64_t more = (end - 1) / kTile - tile;  // tiles behind this one
  const int64_t column = (blockIdx.x % chunks * 32 + lane) * VEC;
  const bool inside = column < args.width;
  float sum[VEC] = {};
  // Warps take parts in turn.
  if (inside) {
#pragma unroll 4
    for (int64_t j = warp; j <= more; j += kWarps) {
      float part[VEC];
      load_floats<VEC>(part, args.parts + (j == 0 ? tail_of(tile) : head_of(tile + j)) * args.width + column);
#pragma unroll
      for (int v = 0; v < VEC; v++) sum[v] += part[v];
    }
  }
  DLKERN_SHARED(float, sums, [kWarps][VEC][32]);
#pragma unroll
  for (int v = 0; v < VEC; v++) sums[warp][v][lane] = sum[v];
  __syncthreads();
  if (warp != 0 || !inside) return;
  for (int other = 1; other < kWarps; other++) {
#pragma unroll
    for (int v = 0; v < VEC; v++) sum[v] += sums[other][v][lane];
  }
  divide<VEC>(args, sum, end - begin);
  store_sum<T, VEC>(args, row, column, nullptr, sum);
}

template <class F>
void with_index(bool wide, F&& f) {
  wide ? f(static_cast<const int64_t*>(nullptr)) : f(static_cast<const int32_t*>(nullptr));
}

template <class Word>
void launch_forward(const Embedding& args, void* stream) {
  const int64_t per_word = static_cast<int64_t>(sizeof(Word)) / args.element_bytes, width = args.width / per_word;
  int shift = 0;
  while (1 << shift < kThreads && int64_t{1} << shift < width) shift++;
  with_index(args.wide_indices, [&](auto* type) {
    using Index = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    DLKERN_LAUNCH((embedding_forward_kernel<Word, Index>), grid_of(ceil_div(args.count, kThreads >> shift)),
                  dim3(kThreads), 0, stream, args.count, args.rows, width, args.stride / per_word, shift,
                  static_cast<const Index*>(args.indices), static_cast<const Word*>(args.weight),
                  static_cast<Word*>(args.output));
  });
}

template <class T, int VEC>
void launch_backward(const EmbeddingBackward& args, void* stream) {
  const int64_t tiles = ceil_div(args.count, kTile), chunks = ceil_div(args.width, 32 * VEC);
  DLKERN_LAUNCH((embedding_sums_kernel<T, VEC>), grid_of(ceil_div(tiles * chunks, kWarps)), dim3(kThreads), 0, stream,
                args, tiles, chunks);
  if (tiles > 1)  // behind the last tile there is none
    DLKERN_LAUNCH((embedding_parts_kernel<T, VEC>), grid_of((tiles - 1) * chunks), dim3(kThreads), 0, stream, args,
                  chunks);
}

}  // namespace

void embedding_forward(const Embedding& args, void* stream) {
  // What divides all addresses and distances, in bytes.
  const uintptr_t places = reinterpret_cast<uintptr_t>(args.weight) | reinterpret_cast<uintptr_t>(args.output) |
                           static_cast<uintptr_t>((args.width | args.stride) * args.element_bytes);
  if (places % 16 == 0)
    launch_forward<uint4>(args, stream);
  else if (places % 8 == 0)
    launch_forward<uint2>(args, stream);
  else if (places % 4 == 0)
    launch_forward<uint32_t>(args, stream);
  else
    launch_forward<uint16_t>(args, stream);
}

void embedding_keys(int64_t count, int64_t rows, int64_t padding_idx, bool wide_indices, const void* indices,
                    int32_t* keys, void* stream) {
  with_index(wide_indices, [&](auto* type) {
    using Index = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    DLKERN_LAUNCH(embedding_keys_kernel<Index>, grid_of(ceil_div(count, kThreads)), dim3(kThreads), 0, stream, count,
                  rows, padding_idx, static_cast<const Index*>(indices), keys);
  });
}

int64_t embedding_parts(int64_t count) { return 2 * ceil_div(count, kTile); }

void embedding_backward(const EmbeddingBackward& args, void* stream) {
  with_type(args.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVec = 16 / sizeof(T);
    bool packs = args.width % kVec == 0;
    for (const void* p :
         {args.grad_output, static_cast<const void*>(args.parts), static_cast<const void*>(args.grad_weight)})
      packs = packs && reinterpret_cast<uintptr_t>(p) % 16 == 0;
    if (packs)
      launch_backward<T, kVec>(args, stream);
    else
      launch_backward<T, 1>(args, stream);
  });
}

}  // namespace dlkern::cuda

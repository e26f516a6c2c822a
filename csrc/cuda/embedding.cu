// embedding: rows of a table, and the gradient of the table. The forward copies rows. The backward reads positions
// sorted by row, in chunks of fixed size: what a chunk has of a row is summed in the order of the positions, and stored
// where the row lies in the chunk as a whole, else kept as a part; a second kernel adds a row's parts in their order. So
// there are no atomics, the bits are the same every run, and a row that most positions have is as many chunks' work.
// Floor: rows read and written once; backward the gradient of the output read once and the table's written once.
#include "embedding.h"

#include <limits>
#include <type_traits>

#include "pack.cuh"

namespace dlkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kMostChunks = 4096;  // unless they would have fewer positions than
constexpr int64_t kLeastChunk = 16;

// A block: some items (positions, chunks) by threads across the columns.
struct Block {
  int across;  // a power of two, up to kThreads

  DLKERN_DEVICE int64_t item() const {
    return static_cast<int64_t>(blockIdx.x) * (kThreads / across) + static_cast<int>(threadIdx.x) / across;
  }
  // Calls f(column) for this thread's packs of VEC columns.
  template <int VEC, class F>
  DLKERN_DEVICE void each(int64_t width, F&& f) const {
    for (int64_t j = static_cast<int>(threadIdx.x) % across * VEC; j < width; j += across * VEC) f(j);
  }
};

template <class T, int VEC>
__global__ void __launch_bounds__(kThreads, 4)
    embedding_forward_kernel(Block block, EmbeddingTable shape, const T* table, int64_t stride, const int64_t* index,
                             T* output) {
  const int64_t position = block.item();
  if (position >= shape.count) return;
  const int64_t row = index[position];
  const bool exists = row >= 0 && row < shape.rows;
  block.each<VEC>(shape.width, [&](int64_t j) {
    Pack<T, VEC> pack;
    if (exists) {
      pack = load_pack<T, VEC>(table + row * stride + j);
    } else {
#pragma unroll
      for (int v = 0; v < VEC; v++) pack.at[v] = from_float<T>(kNan);
    }
    store_pack(output + position * shape.width + j, pack);
  });
}

template <class T>
struct BackwardArgs {
  EmbeddingTable shape;
  int64_t chunk;
  const T* grad_output;
  const int64_t *sorted, *order;
  int64_t padding_idx;
  bool scaled;
  float* parts;  // [chunks][2][width]: of a row that began before the chunk, and of one that goes on after it
  T* grad_table;

  DLKERN_DEVICE bool same(int64_t place, int64_t row) const {
    return place >= 0 && place < shape.count && sorted[place] == row;
  }
  DLKERN_DEVICE int64_t end_of(int64_t chunk_index) const {
    const int64_t end = (chunk_index + 1) * chunk;
    return end < shape.count ? end : shape.count;
  }
  template <int VEC>
  DLKERN_DEVICE void store(int64_t row, int64_t occurs, int64_t j, float* sum) const {
    if (row < 0 || row >= shape.rows || row == padding_idx) return;
#pragma unroll
    for (int v = 0; v < VEC; v++) sum[v] = scaled ? sum[v] / static_cast<float>(occurs) : sum[v];
    store_floats<VEC>(grad_table + row * shape.width + j, sum);
  }
};

// An item is a chunk of the sorted positions.
template <class T, int VEC>
__global__ void __launch_bounds__(kThreads, 4) embedding_backward_kernel(Block block, BackwardArgs<T> args) {
  const int64_t index = block.item(), begin = index * args.chunk, width = args.shape.width;
  if (begin >= args.shape.count) return;
  const int64_t end = args.end_of(index);
  block.each<VEC>(width, [&](int64_t j) {
    for (int64_t from = begin, to = begin; from < end; from = to) {
      const int64_t row = args.sorted[from];
      float sum[VEC] = {};
      for (; to < end && args.sorted[to] == row; to++) {
        float value[VEC];
        load_floats<VEC>(value, args.grad_output + args.order[to] * width + j);
#pragma unroll
        for (int v = 0; v < VEC; v++) sum[v] += value[v];
      }
      const bool goes_on = to == end && args.same(end, row);
      if (from == begin && args.same(begin - 1, row)) {
        for (int v = 0; v < VEC; v++) args.parts[2 * index * width + j + v] = sum[v];
      } else if (goes_on) {
        for (int v = 0; v < VEC; v++) args.parts[(2 * index + 1) * width + j + v] = sum[v];
      } else {
        args.template store<VEC>(row, to - from, j, sum);
      }
    }
  });
}

// An item is a chunk, which works where its last row begins in it and goes on after it.
template <class T, int VEC>
__global__ void __launch_bounds__(kThreads, 4) embedding_parts_kernel(Block block, BackwardArgs<T> args) {
  const int64_t index = block.item(), begin = index * args.chunk, width = args.shape.width;
  if (begin >= args.shape.count) return;
  const int64_t end = args.end_of(index), row = args.sorted[end - 1];
  if (!args.same(end, row)) return;
  int64_t from = end - 1;
  while (from > begin && args.sorted[from - 1] == row) from--;
  if (from == begin && args.same(begin - 1, row)) return;
  int64_t last = index + 1;  // the last chunk that has the row
  while (args.same(args.end_of(last), row)) last++;
  int64_t to = last * args.chunk;
  while (args.same(to, row)) to++;
  block.each<VEC>(width, [&](int64_t j) {
    float sum[VEC];
    for (int v = 0; v < VEC; v++) sum[v] = args.parts[(2 * index + 1) * width + j + v];
#pragma unroll 4
    for (int64_t part = index + 1; part <= last; part++)
#pragma unroll
      for (int v = 0; v < VEC; v++) sum[v] += args.parts[2 * part * width + j + v];
    args.template store<VEC>(row, to - from, j, sum);
  });
}

bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int64_t chunk_of(const EmbeddingTable& shape) {
  const int64_t even = ceil_div(shape.count, kMostChunks);
  return even > kLeastChunk ? even : kLeastChunk;
}

Block block_of(int64_t packs) {
  Block block{1};
  while (block.across < packs && block.across < kThreads) block.across *= 2;
  return block;
}

dim3 grid_of(int64_t items, const Block& block) {
  return dim3(static_cast<unsigned>(ceil_div(items, kThreads / block.across)));
}

// Calls f(type, vec); `wide`: rows may be read 16 bytes at a time.
template <class F>
void dispatch(const EmbeddingTable& shape, int64_t stride, bool aligned, F&& f) {
  with_type(shape.element, [&](auto* type) {
    constexpr int kVec = 16 / sizeof(*type);
    if (aligned && shape.width % kVec == 0 && stride % kVec == 0)
      f(type, std::integral_constant<int, kVec>{});
    else
      f(type, std::integral_constant<int, 1>{});
  });
}

}  // namespace

void embedding_forward(const EmbeddingTable& shape, const void* table, int64_t stride, const int64_t* index,
                       void* output, void* stream) {
  dispatch(shape, stride, aligned16(table) && aligned16(output), [&](auto* type, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Block block = block_of(ceil_div(shape.width, vec.value));
    DLKERN_LAUNCH((embedding_forward_kernel<T, vec.value>), grid_of(shape.count, block), dim3(kThreads), 0, stream,
                  block, shape, static_cast<const T*>(table), stride, index, static_cast<T*>(output));
  });
}

int64_t embedding_parts(const EmbeddingTable& shape) {
  return ceil_div(shape.count, chunk_of(shape)) * 2 * shape.width;
}

void embedding_backward(const EmbeddingTable& shape, const void* grad_output, const int64_t* sorted,
                        const int64_t* order, int64_t padding_idx, bool scaled, float* parts, void* grad_table,
                        void* stream) {
  dispatch(shape, shape.width, aligned16(grad_output) && aligned16(grad_table), [&](auto* type, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    const BackwardArgs<T> args{shape,  chunk_of(shape), static_cast<const T*>(grad_output), sorted, order, padding_idx,
                               scaled, parts,           static_cast<T*>(grad_table)};
    const Block block = block_of(ceil_div(shape.width, vec.value));
    const dim3 grid = grid_of(ceil_div(shape.count, args.chunk), block);
    DLKERN_LAUNCH((embedding_backward_kernel<T, vec.value>), grid, dim3(kThreads), 0, stream, block, args);
    DLKERN_LAUNCH((embedding_parts_kernel<T, vec.value>), grid, dim3(kThreads), 0, stream, block, args);
  });
}

}  // namespace dlkern::cuda

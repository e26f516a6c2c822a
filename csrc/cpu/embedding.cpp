// Embedding: output[i] = weight[indices[i]], and the gradient of the table, the sum of grad_output[i] over indices[i] = v.
//
// The forward copies rows. The backward sorts the positions by row, counting, so that positions of a row stay in their
// order, and then sums each row's in double. A thread owns whole elements of the table, some rows, or some columns of
// them: nothing that threads share is summed, so the bits do not depend on their number. Rows are dealt out by how often
// they occur, because words are not equally frequent. Floor: grad_output read once, the table's gradient written once.
#include "embedding.h"

#include "parallel.h"
#include "scratch.h"
#include "wide.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

constexpr int64_t kGrain = 32768;  // numbers for which another thread is worth waking
constexpr int kVectors = 4;  // columns summed together, in vectors
constexpr int64_t kAhead = 8;  // positions from what is summed to what is prefetched
constexpr int64_t kForwardAhead = 2048;  // bytes from what is copied to what is prefetched
constexpr int64_t kFewBytes = 131072;  // of the sums of a table of few rows, for some columns
constexpr int64_t kPastBytes = 32 << 20;  // of a gradient whose rows of zeros are stored past the caches

// Copies a row and fetches `next`, which is copied soon: rows lie anywhere, where no prefetcher of the machine's follows.
inline void copy_row(char* to, const char* from, const char* next, int64_t bytes) {
  constexpr int64_t line = 64;
  const auto copy = [=](int64_t at) __attribute__((always_inline)) {
    vuint32 v;
    std::memcpy(&v, from + at, sizeof v);
    std::memcpy(to + at, &v, sizeof v);
  };
  int64_t at = 0;
  for (; at + line <= bytes; at += line) {
    __builtin_prefetch(next + at);
    prefetch_ahead_to_store(to + at);
    for (int64_t i = 0; i < line; i += kVectorBytes) copy(at + i);
  }
  if (at < bytes) __builtin_prefetch(next + at);
  for (; at + kVectorBytes <= bytes; at += kVectorBytes) copy(at);
  if (at == bytes) return;
  if (bytes >= kVectorBytes)
    copy(bytes - kVectorBytes);
  else
    std::memcpy(to, from, static_cast<size_t>(bytes));
}

template <class T> void forward(const EmbeddingArgs<T>& args) {
  const int64_t width = args.width, bytes = width * static_cast<int64_t>(sizeof(T));
  if (width == 0) return;
  const int64_t ahead = larger(1, smaller(16, kForwardAhead / bytes));
  parallel_for(args.count, 1 + kGrain / width, [=, &args](int64_t begin, int64_t end) {
    const auto row = [&](int64_t i) {
      return reinterpret_cast<const char*>(args.weight + args.indices[i] * args.weight_stride);
    };
    for (int64_t i = begin; i < end; ++i)
      copy_row(reinterpret_cast<char*>(args.output + i * width), row(i), row(smaller(i + ahead, end - 1)), bytes);
  });
}

template <class T> void zero(T* to, int64_t count, bool past) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t c = 0;
  if (past && reinterpret_cast<uintptr_t>(to) % (lanes * sizeof(T)) == 0)
    for (; c + lanes <= count; c += lanes) stream(to + c, Vec<T>{});
  std::memset(static_cast<void*>(to + c), 0, static_cast<size_t>(count - c) * sizeof(T));
}

// The sum of `vectors` vectors and `rest` lanes from column c on over `count` positions; `known` more follow those, whose
// columns are read next.
template <class T, int vectors>
void sum_block(const EmbeddingBackwardArgs<T>& args, int64_t c, int rest, const int64_t* positions, int64_t count,
               int64_t known, double divisor, T* to) {
  constexpr int64_t lanes = kLanes<T>, line = 64 / static_cast<int64_t>(sizeof(T));
  Wide<T> sum[vectors + 1] = {};
  for (int64_t p = 0; p < count; ++p) {
    if (p + kAhead < count + known)
#pragma GCC unroll 4
      for (int64_t j = 0; j < vectors * lanes; j += line)
        __builtin_prefetch(args.grad_output + positions[p + kAhead] * args.width + c + j);
    const T* from = args.grad_output + positions[p] * args.width + c;
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sum[j] += wide(load(from + j * lanes));
    if (rest) sum[vectors] += wide(load_partial<T>(from + vectors * lanes, rest));
  }
  auto mean = [&](int j) -> Vec<T> { return narrow(divisor == 1.0 ? sum[j] : sum[j] / divisor); };
#pragma GCC unroll 4
  for (int j = 0; j < vectors; ++j) store(to + j * lanes, mean(j));
  if (rest) store_partial<T>(to + vectors * lanes, mean(vectors), rest);
}

// Columns [first, last) of row v: the sum over `count` positions, which `known` more follow.
template <class T>
void sum_row(const EmbeddingBackwardArgs<T>& args, int64_t v, int64_t first, int64_t last, const int64_t* positions,
             int64_t count, int64_t known) {
  constexpr int64_t lanes = kLanes<T>;
  const double divisor = args.scale_grad_by_freq ? static_cast<double>(count) : 1.0;
  T* to = args.grad_weight + v * args.width;
  int64_t c = first;
  for (; c + kVectors * lanes <= last; c += kVectors * lanes)
    sum_block<T, kVectors>(args, c, 0, positions, count, known, divisor, to + c);
  for (; c + lanes <= last; c += lanes) sum_block<T, 1>(args, c, 0, positions, count, known, divisor, to + c);
  if (c < last) sum_block<T, 0>(args, c, static_cast<int>(last - c), positions, count, known, divisor, to + c);
}

// A table of few rows: the sums of `block` columns of all rows stay in a second-level cache.
template <class T> void sum_positions(const EmbeddingBackwardArgs<T>& args, int64_t block) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t rows = args.rows, width = args.width, count = args.count, blocks = ceil_div(width, block);
  int64_t* times = scratch<int64_t>(Slot::family_0, rows);
  std::memset(times, 0, static_cast<size_t>(rows) * sizeof(int64_t));
  for (int64_t i = 0; i < count; ++i) ++times[args.indices[i]];
  parallel_for(blocks, 1 + kGrain / (count * block), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, columns = smaller(block, width - first), vectors = ceil_div(columns, lanes);
      Wide<T>* sums = scratch<Wide<T>>(Slot::family_1, rows * vectors);
      std::memset(static_cast<void*>(sums), 0, static_cast<size_t>(rows * vectors) * sizeof *sums);
      for (int64_t i = 0; i < count; ++i) {
        const T* from = args.grad_output + i * width + first;
        Wide<T>* to = sums + args.indices[i] * vectors;
        for (int64_t j = 0; j < vectors; ++j) {
          __builtin_prefetch(from + kAhead * width + j * lanes);
          to[j] += wide(load_some(from + j * lanes, columns - j * lanes));
        }
      }
      for (int64_t v = 0; v < rows; ++v) {
        const double divisor = args.scale_grad_by_freq ? larger(times[v], int64_t{1}) : 1.0;
        for (int64_t j = 0; j < vectors; ++j) {
          const Wide<T> sum = v == args.padding_idx ? Wide<T>{} : sums[v * vectors + j] / divisor;
          store_some(args.grad_weight + v * width + first + j * lanes, narrow(sum), columns - j * lanes);
        }
      }
    }
  });
}

template <class T> void backward(const EmbeddingBackwardArgs<T>& args) {
  const int64_t rows = args.rows, width = args.width, count = args.count;
  if (rows == 0 || width == 0) return;
  const int64_t columns = kFewBytes / (rows * static_cast<int64_t>(sizeof(double))) / 64 * 64;
  if (count >= 2 * rows && columns > 0) return sum_positions(args, columns);
  int64_t* start = scratch<int64_t>(Slot::family_0, rows + 1);  // of each row's positions among the sorted
  int64_t* sorted = scratch<int64_t>(Slot::family_1, count);
  for (int64_t v = 0; v <= rows; ++v) start[v] = 0;
  for (int64_t i = 0; i < count; ++i) ++start[args.indices[i]];
  int64_t most = 0;
  for (int64_t v = 0, before = 0; v <= rows; ++v) {
    const int64_t here = start[v];
    most = larger(most, here);
    start[v] = before;
    before += here;
  }
  for (int64_t i = 0; i < count; ++i) sorted[start[args.indices[i]]++] = i;
  for (int64_t v = rows; v > 0; --v) start[v] = start[v - 1];  // each had become the next one's
  start[0] = 0;

  // Threads take rows, which are whole stretches of memory; where one row has more than a thread's share of positions,
  // columns too.
  const int64_t threads = num_threads(), block = kVectors * kLanes<T>, blocks = ceil_div(width, block);
  const int64_t work = count + rows;
  const int64_t parts = smaller(most > work / threads ? ceil_div(threads, blocks) : threads, rows);
  const bool past = kStreams && rows * width * static_cast<int64_t>(sizeof(T)) >= kPastBytes;
  // A part's first row: the work before row v is start[v] + v.
  auto row_of = [&](int64_t part) {
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (start[middle] + middle < work / parts * part + work % parts * part / parts)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  parallel_for(parts * blocks, 1 + kGrain * parts * blocks / (work * width), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end;) {
      // Blocks of columns that one thread has of the same rows go together.
      const int64_t part = unit / blocks, upto = smaller(end, (part + 1) * blocks);
      const int64_t first = unit % blocks * block, last = smaller(width, first + (upto - unit) * block);
      const int64_t first_row = part == 0 ? 0 : row_of(part), last_row = part + 1 == parts ? rows : row_of(part + 1);
      for (int64_t v = first_row; v < last_row; ++v) {
        const int64_t positions = v == args.padding_idx ? 0 : start[v + 1] - start[v];
        if (positions == 0)
          zero(args.grad_weight + v * width + first, last - first, past);
        else
          sum_row(args, v, first, last, sorted + start[v], positions, count - start[v + 1]);
      }
      unit = upto;
    }
    if (past) fence();
  });
}

}  // namespace

#define DLKERN_EMBEDDING(T)                                       \
  void embedding(const EmbeddingArgs<T>& args) { forward(args); } \
  void embedding_backward(const EmbeddingBackwardArgs<T>& args) { backward(args); }
DLKERN_EMBEDDING(float)
DLKERN_EMBEDDING(double)
DLKERN_EMBEDDING(bfloat16)
DLKERN_EMBEDDING(float16)

}  // namespace dlkern::cpu::DLKERN_ISA

// layer_norm: (x - mean) * rstd * weight + bias along rows (Ba et al. 2016), and its gradients, float and bfloat16.
// A short row is a warp's, a longer one a block's, and stays in registers from its only load on: mean, then deviations
// squared about that mean. Rows longer than a block's registers are read again for each pass. Backward makes the
// gradient of the input in one pass; each block takes a chunk of rows and keeps its sums down the columns, for weight
// and bias, which a second kernel adds in the chunks' order: no atomics, the same bits every run.
// Floor: one read and one write of the rows; backward two reads and one write.
#include "layer_norm.h"

#include <type_traits>

#include "block_reduce.cuh"
#include "pack.cuh"

namespace dlkern::cuda {
namespace {

constexpr int kThreads = 256;  // of every block, of which two fit a multiprocessor; a short row has one warp of it
constexpr int kHeld = 16;      // elements of a row that a thread keeps
constexpr int kMostParts = 512;

// Who takes a row: a warp, a block, or a block that cannot keep it.
enum class Rows { warp, block, streamed };

constexpr int64_t kWarpColumns = 32 * kHeld, kBlockColumns = kThreads * kHeld;  // at most

// A thread's share of a row: packs of VEC, a pack a thread in turn.
template <Rows ROWS, int VEC>
struct Share {
  static constexpr bool kKept = ROWS != Rows::streamed;
  static constexpr int kAcross = ROWS == Rows::warp ? 32 : kThreads;  // threads a row
  static constexpr int kRowsAtOnce = kThreads / kAcross;
  static constexpr int kPacks = kHeld / VEC;

  static DLKERN_DEVICE int first() { return static_cast<int>(threadIdx.x) % kAcross * VEC; }
  static DLKERN_DEVICE int row_in_block() { return static_cast<int>(threadIdx.x) / kAcross; }

  // Calls f(column, number of the pack) for the packs of this thread.
  template <class F>
  static DLKERN_DEVICE void each(int64_t columns, F&& f) {
    if (kKept) {
#pragma unroll
      for (int p = 0; p < kPacks; p++) {
        const int64_t j = first() + p * kAcross * VEC;
        if (j < columns) f(j, p);
      }
    } else {
      for (int64_t j = first(); j < columns; j += kAcross * VEC) f(j, 0);
    }
  }

  // Sum over the row's threads. `partial`: shared, 32 floats, free again after the next barrier.
  static DLKERN_DEVICE float sum(float value, float* partial) {
    return ROWS == Rows::warp ? warp_sum(value) : block_sum<kThreads>(value, partial);
  }
};

// A weight or bias: null, floats, or numbers of the rows' type.
struct Parameter {
  const void* data;
  bool wide;

  template <int VEC, class T>
  DLKERN_DEVICE void load(float* out, int64_t column) const {
    if (wide)
      load_floats<VEC>(out, static_cast<const float*>(data) + column);
    else
      load_floats<VEC>(out, static_cast<const T*>(data) + column);
  }
};

template <class T, Rows ROWS, int VEC>
__global__ void __launch_bounds__(kThreads, 2)
    layer_norm_forward_kernel(int64_t rows, int64_t columns, const T* input, Parameter weight, Parameter bias,
                              float eps, T* output, float* mean_out, float* rstd_out) {
  using My = Share<ROWS, VEC>;
  DLKERN_SHARED(float, partial, [3][32]);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * My::kRowsAtOnce + My::row_in_block();
  if (row >= rows) return;  // a warp as a whole; a block has a row each
  const T* x = input + row * columns;
  float held[kHeld];
  My::each(columns, [&](int64_t j, int p) {
    if (My::kKept) load_floats<VEC>(held + p * VEC, x + j);
  });
  // The sum of f(value); the streamed row's in double, because a thread has many.
  const auto sum = [&](auto&& f, float* shared) {
    std::conditional_t<My::kKept, float, double> total = 0;
    My::each(columns, [&](int64_t j, int p) {
      if (!My::kKept) load_floats<VEC>(held, x + j);
      float some = 0.0f;
#pragma unroll
      for (int v = 0; v < VEC; v++) some += f(held[p * VEC + v]);
      total += some;
    });
    return My::sum(static_cast<float>(total), shared);
  };
  const float count = static_cast<float>(columns);
  float mean = sum([](float value) { return value; }, partial[0]) / count;
  // What rounding left of the mean, to be had for a few additions: an error of it is in every result.
  if (My::kKept) mean += sum([mean](float value) { return value - mean; }, partial[2]) / count;
  const auto square = [mean](float value) { return (value - mean) * (value - mean); };
  const float rstd = 1.0f / sqrtf(sum(square, partial[1]) / count + eps);
  My::each(columns, [&](int64_t j, int p) {
    if (!My::kKept) load_floats<VEC>(held, x + j);
    float* value = held + p * VEC;
    float of_weight[VEC] = {}, of_bias[VEC] = {};
    if (weight.data) weight.template load<VEC, T>(of_weight, j);
    if (bias.data) bias.template load<VEC, T>(of_bias, j);
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      value[v] = (value[v] - mean) * rstd;
      if (weight.data) value[v] *= of_weight[v];
      if (bias.data) value[v] += of_bias[v];
    }
    store_floats<VEC>(output + row * columns + j, value);
  });
  if (My::first() == 0) mean_out[row] = mean, rstd_out[row] = rstd;
}

template <class T>
struct BackwardArgs {
  int64_t rows, columns, chunk;  // rows a block takes
  const T *grad_output, *input;
  Parameter weight;
  const float *mean, *rstd;
  T* grad_input;  // or null
  float* parts;   // [blocks][2][columns], of weight and of bias; or null
};

template <class T, Rows ROWS, int VEC>
__global__ void __launch_bounds__(kThreads, 2) layer_norm_backward_kernel(BackwardArgs<T> args) {
  using My = Share<ROWS, VEC>;
  DLKERN_SHARED(float, partial, [2][32]);
  const int64_t columns = args.columns, begin = blockIdx.x * args.chunk;
  const int64_t end = begin + args.chunk < args.rows ? begin + args.chunk : args.rows;
  float of_weight[kHeld] = {}, of_bias[kHeld] = {};  // sums down this thread's columns
  const float share = 1.0f / static_cast<float>(columns);
  float* const to = args.parts ? args.parts + blockIdx.x * 2 * columns : nullptr;
  for (int64_t row = begin + My::row_in_block(); row < end; row += My::kRowsAtOnce) {
    const T* x = args.input + row * columns;
    const T* g = args.grad_output + row * columns;
    const float mean = args.mean[row], rstd = args.rstd[row];
    float normal[kHeld], gradient[kHeld];  // (x - mean) rstd, and grad_output, times weight once the sums have it
    const auto load = [&](int64_t j, int p) {
      load_floats<VEC>(normal + p * VEC, x + j);
      load_floats<VEC>(gradient + p * VEC, g + j);
#pragma unroll
      for (int v = 0; v < VEC; v++) normal[p * VEC + v] = (normal[p * VEC + v] - mean) * rstd;
    };
    const auto weigh = [&](int64_t j, int p) {
      if (!args.weight.data) return;
      float weight[VEC];
      args.weight.template load<VEC, T>(weight, j);
#pragma unroll
      for (int v = 0; v < VEC; v++) gradient[p * VEC + v] *= weight[v];
    };
    std::conditional_t<My::kKept, float, double> first = 0, second = 0;
    My::each(columns, [&](int64_t j, int p) {
      load(j, p);
      if (args.parts) {
#pragma unroll
        for (int v = 0; v < VEC; v++) {
          const int i = p * VEC + v;
          if (My::kKept) {
            of_weight[i] += gradient[i] * normal[i];
            of_bias[i] += gradient[i];
          } else {  // in memory, by the one thread that has the column
            const bool fresh = row == begin;
            to[j + v] = (fresh ? 0.0f : to[j + v]) + gradient[i] * normal[i];
            to[columns + j + v] = (fresh ? 0.0f : to[columns + j + v]) + gradient[i];
          }
        }
      }
      weigh(j, p);
      float some = 0.0f, other = 0.0f;
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        some += gradient[p * VEC + v];
        other += gradient[p * VEC + v] * normal[p * VEC + v];
      }
      first += some, second += other;
    });
    if (!args.grad_input) continue;
    const float mean_first = My::sum(static_cast<float>(first), partial[0]) * share;
    const float mean_second = My::sum(static_cast<float>(second), partial[1]) * share;
    My::each(columns, [&](int64_t j, int p) {
      if (!My::kKept) load(j, p), weigh(j, p);
      float* value = gradient + p * VEC;
#pragma unroll
      for (int v = 0; v < VEC; v++) value[v] = ((value[v] - mean_first) - normal[p * VEC + v] * mean_second) * rstd;
      store_floats<VEC>(args.grad_input + row * columns + j, value);
    });
    if (ROWS != Rows::warp) __syncthreads();  // `partial` is read by all before the next row's sums
  }
  if (!args.parts || !My::kKept) return;
  if (ROWS == Rows::block) {
    My::each(columns, [&](int64_t j, int p) {
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        to[j + v] = of_weight[p * VEC + v];
        to[columns + j + v] = of_bias[p * VEC + v];
      }
    });
    return;
  }
  // The warps' sums, added in their order.
  DLKERN_SHARED(float, sums, [My::kRowsAtOnce][32 * kHeld]);
  const auto add_up = [&](const float* mine, float* result) {
    My::each(columns, [&](int64_t j, int p) {
#pragma unroll
      for (int v = 0; v < VEC; v++) sums[My::row_in_block()][j + v] = mine[p * VEC + v];
    });
    __syncthreads();
    for (int64_t j = threadIdx.x; j < columns; j += kThreads) {
      float total = 0.0f;
#pragma unroll
      for (int warp = 0; warp < My::kRowsAtOnce; warp++) total += sums[warp][j];
      result[j] = total;
    }
    __syncthreads();
  };
  add_up(of_weight, to);
  add_up(of_bias, to + columns);
}

constexpr int kFinalColumns = 32, kFinalRows = 8;

// A block adds up 32 columns, 8 threads each; blockIdx.y: 0 weight, 1 bias.
template <class W>
__global__ void __launch_bounds__(kFinalColumns* kFinalRows)
    layer_norm_sums_kernel(const float* parts, int count, int64_t columns, W* grad_weight, W* grad_bias) {
  const int lane = static_cast<int>(threadIdx.x) % kFinalColumns, row = static_cast<int>(threadIdx.x) / kFinalColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kFinalColumns + lane;
  W* const result = blockIdx.y == 0 ? grad_weight : grad_bias;
  if (!result) return;
  float total = 0.0f;
  if (column < columns) {
    for (int part = row; part < count; part += kFinalRows) total += parts[(2 * part + blockIdx.y) * columns + column];
  }
  DLKERN_SHARED(float, totals, [kFinalRows][kFinalColumns]);
  totals[row][lane] = total;
  __syncthreads();
  if (row != 0 || column >= columns) return;
#pragma unroll
  for (int r = 1; r < kFinalRows; r++) total += totals[r][lane];
  result[column] = from_float<W>(total);
}

bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The rows a block takes, backward.
int64_t chunk_rows(const LayerNormRows& shape) {
  const int64_t least = shape.columns <= kWarpColumns ? kThreads / 32 : 1;
  const int64_t even = ceil_div(shape.rows, kMostParts);
  return even > least ? even : least;
}

// Calls f(type, rows, vec) with the shape's T, Rows and VEC as values that carry them in their types.
template <class F>
void dispatch(const LayerNormRows& shape, bool aligned, F&& f) {
  const auto with_vec = [&](auto* type, auto vec) {
    if (shape.columns <= kWarpColumns)
      f(type, std::integral_constant<Rows, Rows::warp>{}, vec);
    else if (shape.columns <= kBlockColumns)
      f(type, std::integral_constant<Rows, Rows::block>{}, vec);
    else
      f(type, std::integral_constant<Rows, Rows::streamed>{}, vec);
  };
  with_type(shape.element, [&](auto* type) {
    constexpr int kVec = 16 / sizeof(*type);
    if (aligned && shape.columns % kVec == 0)
      with_vec(type, std::integral_constant<int, kVec>{});
    else
      with_vec(type, std::integral_constant<int, 1>{});
  });
}

}  // namespace

void layer_norm_forward(const LayerNormRows& shape, const void* input, const void* weight, const void* bias, double eps,
                        void* output, float* mean, float* rstd, void* stream) {
  const bool aligned = aligned16(input) && aligned16(weight) && aligned16(bias) && aligned16(output);
  dispatch(shape, aligned, [&](auto* type, auto rows, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    using My = Share<rows.value, vec.value>;
    const dim3 grid = grid_of(ceil_div(shape.rows, My::kRowsAtOnce));
    DLKERN_LAUNCH((layer_norm_forward_kernel<T, rows.value, vec.value>), grid, dim3(kThreads), 0, stream, shape.rows,
                  shape.columns, static_cast<const T*>(input), Parameter{weight, shape.wide_parameters},
                  Parameter{bias, shape.wide_parameters}, static_cast<float>(eps), static_cast<T*>(output), mean, rstd);
  });
}

int layer_norm_parts(const LayerNormRows& shape) { return static_cast<int>(ceil_div(shape.rows, chunk_rows(shape))); }

void layer_norm_backward(const LayerNormRows& shape, const void* grad_output, const void* input, const void* weight,
                         const float* mean, const float* rstd, void* grad_input, float* parts, void* grad_weight,
                         void* grad_bias, void* stream) {
  const bool aligned = aligned16(grad_output) && aligned16(input) && aligned16(weight) && aligned16(grad_input);
  const int count = layer_norm_parts(shape);
  const bool sums = grad_weight || grad_bias;
  dispatch(shape, aligned, [&](auto* type, auto rows, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    const BackwardArgs<T> args{shape.rows,
                               shape.columns,
                               chunk_rows(shape),
                               static_cast<const T*>(grad_output),
                               static_cast<const T*>(input),
                               Parameter{weight, shape.wide_parameters},
                               mean,
                               rstd,
                               static_cast<T*>(grad_input),
                               sums ? parts : nullptr};
    DLKERN_LAUNCH((layer_norm_backward_kernel<T, rows.value, vec.value>), grid_of(count), dim3(kThreads), 0, stream,
                  args);
  });
  if (!sums) return;
  const dim3 grid = grid_of(ceil_div(shape.columns, kFinalColumns), 2);
  with_type(shape.wide_parameters ? Element::float32 : shape.element, [&](auto* type) {
    using W = std::remove_pointer_t<decltype(type)>;
    DLKERN_LAUNCH(layer_norm_sums_kernel<W>, grid, dim3(kFinalColumns * kFinalRows), 0, stream,
                  static_cast<const float*>(parts), count, shape.columns, static_cast<W*>(grad_weight),
                  static_cast<W*>(grad_bias));
  });
}

}  // namespace dlkern::cuda

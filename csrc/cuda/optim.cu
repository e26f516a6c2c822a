// Steps of SGD, Adam (AdamW) and LARS, and clipping of gradients: a launch serves the tensors of a dtype, as many as fit in
// its parameters. They hold a table with a row of addresses and settings for each tensor, so nothing is copied to the
// device, the host waits for nothing, and a captured graph keeps its table. A block owns 4,096 elements, finds their tensor
// by bisection, and reads and writes each element once, 16 bytes at a time where addresses allow it. Norms are a pass
// before: a double for each block, which another kernel adds in their order: the same bits every run.
// Floor: bytes of parameters, gradients and state over the bandwidth.
#include "optim.h"

#include <cmath>
#include <type_traits>

#include "block_reduce.cuh"
#include "pack.cuh"

namespace dlkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kNormThreads = 1024;

// Rows for one launch, whose parameters may have 4,096 bytes in all.
template <class Row>
struct Table {
  static constexpr int kMost = (4096 - 128) / sizeof(Row);
  Row rows[kMost];
  int count;
};

// The row whose tensor this block is of: the last that starts at or before it.
template <class Row>
DLKERN_DEVICE const Row& row_of_block(const Table<Row>& table) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.rows[middle].first_block <= static_cast<int>(blockIdx.x))
      low = middle;
    else
      high = middle;
  }
  return table.rows[low];
}

// Some neighbouring elements of a tensor, a thread's: VEC of them, or what is left of the tensor.
template <class T>
struct Some {
  static constexpr int VEC = 16 / sizeof(T);
  int64_t first;
  int left;
  bool whole;  // in one access

  DLKERN_DEVICE void load(float* out, const void* data) const {
    const T* x = static_cast<const T*>(data) + first;
    if (whole) {
      load_floats<VEC>(out, x);
      return;
    }
#pragma unroll
    for (int v = 0; v < VEC; v++) out[v] = v < left ? to_float(x[v]) : 0.0f;
  }
  DLKERN_DEVICE void store(void* data, const float* values) const {
    T* x = static_cast<T*>(data) + first;
    if (whole) {
      store_floats<VEC>(x, values);
      return;
    }
#pragma unroll
    for (int v = 0; v < VEC; v++)
      if (v < left) x[v] = from_float<T>(values[v]);
  }
};

// f(some) for this thread's elements of the block, all threads' packs side by side.
template <class T, class Row, class F>
DLKERN_DEVICE void each(const Row& row, F&& f) {
  constexpr int VEC = Some<T>::VEC;
  const int64_t begin = (static_cast<int>(blockIdx.x) - row.first_block) * kOptimBlock;
#pragma unroll
  for (int start = 0; start < kOptimBlock; start += kThreads * VEC) {
    const int64_t first = begin + start + static_cast<int>(threadIdx.x) * VEC, left = row.count - first;
    if (left <= 0) return;
    f(Some<T>{first, left < VEC ? static_cast<int>(left) : VEC, row.aligned && left >= VEC});
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sgd_kernel(const __grid_constant__ Table<SgdTensor> table) {
  constexpr int VEC = Some<T>::VEC;
  const SgdTensor& row = row_of_block(table);
  each<T>(row, [&](const Some<T>& some) {
    float param[VEC], grad[VEC], buffer[VEC];
    some.load(param, row.data[0]);
    some.load(grad, row.data[1]);
    if (row.data[2] && !row.fresh) some.load(buffer, row.data[2]);
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      grad[v] *= row.sign;
      if (row.weight_decay != 0.0f) grad[v] += row.weight_decay * param[v];
      if (row.data[2]) {
        buffer[v] = row.fresh ? grad[v] : row.momentum * buffer[v] + row.kept * grad[v];
        grad[v] = row.nesterov ? grad[v] + row.momentum * buffer[v] : buffer[v];
      }
      param[v] -= row.lr * grad[v];
    }
    if (row.data[2]) some.store(row.data[2], buffer);
    some.store(row.data[0], param);
  });
}

// A thread a step.
__global__ void adam_count_kernel(const __grid_constant__ Table<AdamStep> table, float* corrections) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= table.count) return;
  const AdamStep& row = table.rows[i];
  const float step = *row.step + 1.0f;
  *row.step = step;
  corrections[2 * row.place] = static_cast<float>(row.lr / (1.0 - pow(row.beta1, static_cast<double>(step))));
  corrections[2 * row.place + 1] = static_cast<float>(sqrt(1.0 - pow(row.beta2, static_cast<double>(step))));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(const __grid_constant__ Table<AdamTensor> table, const float* corrections) {
  constexpr int VEC = Some<T>::VEC;
  const AdamTensor& row = row_of_block(table);
  const bool here = row.counted < 0;
  const float step_size = here ? row.step_size : corrections[2 * row.counted];
  const float root = here ? row.correction_root : corrections[2 * row.counted + 1];
  each<T>(row, [&](const Some<T>& some) {
    float param[VEC], grad[VEC], mean[VEC], square[VEC], largest[VEC];
    some.load(param, row.data[0]);
    some.load(grad, row.data[1]);
    some.load(mean, row.data[2]);
    some.load(square, row.data[3]);
    if (row.data[4]) some.load(largest, row.data[4]);
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      param[v] *= row.param_factor;
      grad[v] *= row.sign;
      if (row.weight_decay != 0.0f) grad[v] += row.weight_decay * param[v];
      mean[v] += row.new1 * (grad[v] - mean[v]);
      square[v] = row.beta2 * square[v] + row.new2 * grad[v] * grad[v];
      if (row.data[4]) largest[v] = largest[v] < square[v] || square[v] != square[v] ? square[v] : largest[v];
      const float below = sqrtf(row.data[4] ? largest[v] : square[v]) / root + row.eps;
      param[v] -= step_size * mean[v] / below;
    }
    some.store(row.data[2], mean);
    some.store(row.data[3], square);
    if (row.data[4]) some.store(row.data[4], largest);
    some.store(row.data[0], param);
  });
}

// You, Gitman, Ginsburg 2017, "Large batch training of convolutional networks", algorithm 1. rates: of this launch's
// tensors, or null.
template <class T>
__global__ void __launch_bounds__(kThreads)
    lars_kernel(const __grid_constant__ Table<LarsTensor> table, const float* rates) {
  constexpr int VEC = Some<T>::VEC;
  const LarsTensor& row = row_of_block(table);
  const float rate = rates ? rates[&row - table.rows] : static_cast<float>(row.lr);
  const float momentum = static_cast<float>(row.momentum), decay = static_cast<float>(row.weight_decay);
  each<T>(row, [&](const Some<T>& some) {
    float param[VEC], change[VEC], buffer[VEC];
    some.load(param, row.data[0]);
    some.load(change, row.data[1]);
    if (row.data[2]) some.load(buffer, row.data[2]);
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      change[v] *= row.sign;
      if (decay != 0.0f) change[v] += decay * param[v];
      change[v] *= rate;
      if (row.data[2]) change[v] += momentum * buffer[v];
      param[v] -= change[v];
    }
    if (row.data[2]) some.store(row.data[2], change);
    some.store(row.data[0], param);
  });
}

// ---- norms ----

// Two sums, or the one of two magnitudes that is further out; NaN is the furthest.
template <NormKind KIND>
DLKERN_DEVICE double together(double a, double b) {
  if (KIND == NormKind::largest) return a > b || a != a ? a : b;
  if (KIND == NormKind::smallest) return a < b || a != a ? a : b;
  return a + b;
}
// What comes before all magnitudes.
template <NormKind KIND>
DLKERN_DEVICE double nothing() {
  return KIND == NormKind::smallest ? static_cast<double>(INFINITY) : 0.0;
}
template <NormKind KIND>
DLKERN_DEVICE double term(double x, double power) {
  if (KIND == NormKind::squares) return x * x;
  if (KIND == NormKind::nonzeros) return x != 0.0 ? 1.0 : 0.0;
  if (KIND == NormKind::powers) return pow(fabs(x), power);
  return fabs(x);
}
template <int THREADS, NormKind KIND>
DLKERN_DEVICE double over_block(double value, double* partial) {
  return block_reduce<THREADS>(value, partial, [](double a, double b) { return together<KIND>(a, b); });
}

// blockIdx.y: of which operand. parts: of this launch, [operands, stride].
template <class T, NormKind KIND, class Row>
__global__ void __launch_bounds__(kThreads)
    optim_sums_kernel(const __grid_constant__ Table<Row> table, double power, double* parts, int64_t stride) {
  constexpr int VEC = Some<T>::VEC;
  DLKERN_SHARED(double, partial, [32]);
  const Row& row = row_of_block(table);
  double total = nothing<KIND>();
  each<T>(row, [&](const Some<T>& some) {
    float x[VEC];
    some.load(x, row.data[blockIdx.y]);
#pragma unroll
    for (int v = 0; v < VEC; v++)
      if (v < some.left) total = together<KIND>(term<KIND>(static_cast<double>(x[v]), power), total);
  });
  total = over_block<kThreads, KIND>(total, partial);
  if (threadIdx.x == 0) parts[blockIdx.y * stride + blockIdx.x] = total;
}

// The sum of a tensor's parts, each thread's in their order; all threads receive it.
template <class Row>
DLKERN_DEVICE double sum_of_tensor(const Row& row, const double* parts, double* partial) {
  const int blocks = static_cast<int>(ceil_div(row.count, kOptimBlock));
  double total = 0.0;
  for (int i = static_cast<int>(threadIdx.x); i < blocks; i += kThreads) total += parts[row.first_block + i];
  return over_block<kThreads, NormKind::squares>(total, partial);
}

// A block a tensor.
__global__ void __launch_bounds__(kThreads) lars_rate_kernel(const __grid_constant__ Table<LarsTensor> table,
                                                             const double* parts, int64_t stride, float* rates) {
  DLKERN_SHARED(double, partial, [2][32]);
  const LarsTensor& row = table.rows[blockIdx.x];
  const double param_norm = sqrt(sum_of_tensor(row, parts, partial[0]));
  const double grad_norm = sqrt(sum_of_tensor(row, parts + stride, partial[1]));
  if (threadIdx.x != 0) return;
  double rate = row.lr;
  if (row.trust_coefficient >= 0.0 && param_norm > 0.0 && grad_norm > 0.0)
    rate *= row.trust_coefficient * param_norm / (grad_norm + row.weight_decay * param_norm + row.eps);
  rates[blockIdx.x] = static_cast<float>(rate);
}

// A block a tensor.
__global__ void __launch_bounds__(kThreads)
    grad_nonzero_kernel(const __grid_constant__ Table<GradTensor> table, const double* parts, double* found) {
  DLKERN_SHARED(double, partial, [32]);
  const double total = sum_of_tensor(table.rows[blockIdx.x], parts, partial);
  if (threadIdx.x == 0) found[blockIdx.x] = total > 0.0 ? 1.0 : 0.0;
}

// One block.
template <NormKind KIND>
__global__ void __launch_bounds__(kNormThreads)
    grad_norm_kernel(const double* parts, int64_t count, double power, double max_norm, double* norm_out, void* total,
                     Element element) {
  DLKERN_SHARED(double, partial, [32]);
  double norm = nothing<KIND>();
  for (int64_t i = threadIdx.x; i < count; i += kNormThreads) norm = together<KIND>(parts[i], norm);
  norm = over_block<kNormThreads, KIND>(norm, partial);
  if (threadIdx.x != 0) return;
  if (KIND == NormKind::squares) norm = sqrt(norm);
  if (KIND == NormKind::powers) norm = pow(norm, 1.0 / power);
  const double factor = max_norm / (norm + 1e-6);
  norm_out[0] = norm;
  norm_out[1] = factor >= 1.0 ? 1.0 : factor;  // NaN stays
  const float rounded = static_cast<float>(norm);
  if (element == Element::float32) *static_cast<float*>(total) = rounded;
  if (element == Element::bfloat16) *static_cast<bf16*>(total) = from_float<bf16>(rounded);
  if (element == Element::float16) *static_cast<fp16*>(total) = from_float<fp16>(rounded);
}

// ---- clipping ----

template <class T>
__global__ void __launch_bounds__(kThreads)
    grad_scale_kernel(const __grid_constant__ Table<GradTensor> table, const double* factor) {
  constexpr int VEC = Some<T>::VEC;
  const double exact = *factor;
  if (exact == 1.0) return;
  const float by = static_cast<float>(exact);
  const GradTensor& row = row_of_block(table);
  each<T>(row, [&](const Some<T>& some) {
    float x[VEC];
    some.load(x, row.data[0]);
#pragma unroll
    for (int v = 0; v < VEC; v++) x[v] *= by;
    some.store(row.data[0], x);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    grad_clamp_kernel(const __grid_constant__ Table<GradTensor> table, float limit) {
  constexpr int VEC = Some<T>::VEC;
  const GradTensor& row = row_of_block(table);
  each<T>(row, [&](const Some<T>& some) {
    float x[VEC];
    some.load(x, row.data[0]);
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      if (x[v] < -limit) x[v] = -limit;
      if (x[v] > limit) x[v] = limit;
      if (limit != limit) x[v] = limit;  // what torch clamps to NaN is NaN
    }
    some.store(row.data[0], x);
  });
}

// Calls f(table, its first row, its first block, its blocks) for tables that hold all rows together.
template <class Row, class F>
void over_tables(const Row* rows, int64_t count, F&& f) {
  int64_t before = 0;
  for (int64_t begin = 0; begin < count; begin += Table<Row>::kMost) {
    Table<Row> table{};
    table.count = static_cast<int>(count - begin < Table<Row>::kMost ? count - begin : Table<Row>::kMost);
    int64_t blocks = 0;
    for (int i = 0; i < table.count; i++) {
      Row& row = table.rows[i] = rows[begin + i];
      row.first_block = static_cast<int32_t>(blocks);
      uintptr_t bits = 0;
      for (const void* data : row.data) bits |= reinterpret_cast<uintptr_t>(data);
      row.aligned = bits % 16 == 0;
      blocks += optim_blocks(row.count);
    }
    f(table, begin, before, blocks);
    before += blocks;
  }
}

// f with the kind in its argument's type.
template <class F>
void with_kind(NormKind kind, F&& f) {
  switch (kind) {
    case NormKind::squares: return f(std::integral_constant<NormKind, NormKind::squares>{});
    case NormKind::magnitudes: return f(std::integral_constant<NormKind, NormKind::magnitudes>{});
    case NormKind::nonzeros: return f(std::integral_constant<NormKind, NormKind::nonzeros>{});
    case NormKind::largest: return f(std::integral_constant<NormKind, NormKind::largest>{});
    case NormKind::smallest: return f(std::integral_constant<NormKind, NormKind::smallest>{});
    case NormKind::powers: return f(std::integral_constant<NormKind, NormKind::powers>{});
  }
}

}  // namespace

void sgd(Element element, const SgdTensor* tensors, int64_t count, void* stream) {
  over_tables(tensors, count, [&](const auto& table, int64_t, int64_t, int64_t blocks) {
    with_type(element, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      DLKERN_LAUNCH(sgd_kernel<T>, grid_of(blocks), dim3(kThreads), 0, stream, table);
    });
  });
}

void adam_count(const AdamStep* steps, int64_t count, float* corrections, void* stream) {
  constexpr int kMost = Table<AdamStep>::kMost;
  for (int64_t begin = 0; begin < count; begin += kMost) {
    Table<AdamStep> table{};
    table.count = static_cast<int>(count - begin < kMost ? count - begin : kMost);
    for (int i = 0; i < table.count; i++) table.rows[i] = steps[begin + i];
    DLKERN_LAUNCH(adam_count_kernel, dim3(1), dim3(128), 0, stream, table, corrections);
    static_assert(kMost <= 128);
  }
}

void adam(Element element, const AdamTensor* tensors, int64_t count, const float* corrections, void* stream) {
  over_tables(tensors, count, [&](const auto& table, int64_t, int64_t, int64_t blocks) {
    with_type(element, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      DLKERN_LAUNCH(adam_kernel<T>, grid_of(blocks), dim3(kThreads), 0, stream, table, corrections);
    });
  });
}

void lars(Element element, const LarsTensor* tensors, int64_t count, double* parts, float* rates, void* stream) {
  int64_t stride = 0;
  for (int64_t i = 0; i < count; i++) stride += optim_blocks(tensors[i].count);
  over_tables(tensors, count, [&](const auto& table, int64_t first, int64_t before, int64_t blocks) {
    with_type(element, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if (rates) {
        DLKERN_LAUNCH((optim_sums_kernel<T, NormKind::squares, LarsTensor>), grid_of(blocks, 2), dim3(kThreads), 0,
                      stream, table, 0.0, parts + before, stride);
        DLKERN_LAUNCH(lars_rate_kernel, grid_of(table.count), dim3(kThreads), 0, stream, table,
                      static_cast<const double*>(parts + before), stride, rates + first);
      }
      DLKERN_LAUNCH(lars_kernel<T>, grid_of(blocks), dim3(kThreads), 0, stream, table,
                    static_cast<const float*>(rates ? rates + first : nullptr));
    });
  });
}

void grad_sums(Element element, const GradTensor* tensors, int64_t count, NormKind kind, double power, double* parts,
               void* stream) {
  over_tables(tensors, count, [&](const auto& table, int64_t, int64_t before, int64_t blocks) {
    with_type(element, [&](auto* type) {
      with_kind(kind, [&](auto of_kind) {
        using T = std::remove_pointer_t<decltype(type)>;
        DLKERN_LAUNCH((optim_sums_kernel<T, of_kind.value, GradTensor>), grid_of(blocks), dim3(kThreads), 0, stream,
                      table, power, parts + before, int64_t{0});
      });
    });
  });
}

void grad_nonzeros(const GradTensor* tensors, int64_t count, const double* parts, double* found, void* stream) {
  over_tables(tensors, count, [&](const auto& table, int64_t first, int64_t before, int64_t) {
    DLKERN_LAUNCH(grad_nonzero_kernel, grid_of(table.count), dim3(kThreads), 0, stream, table, parts + before,
                  found + first);
  });
}

void grad_norm(Element element, const double* parts, int64_t count, NormKind kind, double power, double max_norm,
               double* norm, void* total, void* stream) {
  with_kind(kind, [&](auto of_kind) {
    DLKERN_LAUNCH(grad_norm_kernel<of_kind.value>, dim3(1), dim3(kNormThreads), 0, stream, parts, count, power,
                  max_norm, norm, total, element);
  });
}

void grad_scale(Element element, const GradTensor* tensors, int64_t count, const double* factor, void* stream) {
  over_tables(tensors, count, [&](const auto& table, int64_t, int64_t, int64_t blocks) {
    with_type(element, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      DLKERN_LAUNCH(grad_scale_kernel<T>, grid_of(blocks), dim3(kThreads), 0, stream, table, factor);
    });
  });
}

void grad_clamp(Element element, const GradTensor* tensors, int64_t count, float limit, void* stream) {
  over_tables(tensors, count, [&](const auto& table, int64_t, int64_t, int64_t blocks) {
    with_type(element, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      DLKERN_LAUNCH(grad_clamp_kernel<T>, grid_of(blocks), dim3(kThreads), 0, stream, table, limit);
    });
  });
}

}  // namespace dlkern::cuda

// Batch norm with an activation and a residual sum in the same pass: forward on the batch's or on running statistics,
// and backward, in float, bfloat16 and float16. Three kernels a pass over the data: partial sums of chunks, their merge, application.
// Statistics: a thread takes a few values at once, finds their mean and squared deviations in registers and merges them
// into its own by count (Chan et al. 1983); so do a block's threads, and then the chunks, in double. Every merge has a
// fixed order: no atomics, the same bits every run, and no cancellation between E[x^2] and E[x]^2. A thread's own sums
// are floats with what rounding took off beside them (Knuth's two-sum): as exact as double, at float's rate.
// Floor: input read twice and output written once; backward five tensors, plus the residual's gradient.
#include "batch_norm.h"

#include "activation.cuh"
#include "fast_divide.cuh"
#include "pack.cuh"

namespace dlkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // packs a thread has in flight

// ---- Values per channel ----

DLKERN_DEVICE double widened(double value) { return value; }
template <class T>
DLKERN_DEVICE double widened(T value) {
  return to_float(value);
}

// Those of COUNT neighbouring channels, or `otherwise`. The type is asked for once: inside the loop it makes nvcc slow.
template <int COUNT>
DLKERN_DEVICE void load_channels(const ChannelValues& values, int64_t channel, double otherwise,
                                 double (&found)[COUNT]) {
  const auto read = [&](auto* data) {
#pragma unroll
    for (int c = 0; c < COUNT; c++) found[c] = widened(data[channel + c]);
  };
  if (!values.data) {
#pragma unroll
    for (int c = 0; c < COUNT; c++) found[c] = otherwise;
  } else if (values.type == NormType::float32) {
    read(static_cast<const float*>(values.data));
  } else if (values.type == NormType::bfloat16) {
    read(static_cast<const bf16*>(values.data));
  } else if (values.type == NormType::float16) {
    read(static_cast<const fp16*>(values.data));
  } else {
    read(static_cast<const double*>(values.data));
  }
}
template <int COUNT>
DLKERN_DEVICE void load_channels(const ChannelValues& values, int64_t channel, float (&found)[COUNT]) {
  double wide[COUNT];
  load_channels(values, channel, 0.0, wide);
#pragma unroll
  for (int c = 0; c < COUNT; c++) found[c] = static_cast<float>(wide[c]);
}
DLKERN_DEVICE double load_channel(const ChannelValues& values, int64_t channel) {
  double found[1];
  load_channels(values, channel, 0.0, found);
  return found[0];
}
DLKERN_DEVICE void store_channel(const ChannelResults& results, int64_t channel, double value) {
  if (results.type == NormType::float64)
    static_cast<double*>(results.data)[channel] = value;
  else if (results.type == NormType::bfloat16)
    static_cast<bf16*>(results.data)[channel] = from_float<bf16>(static_cast<float>(value));
  else if (results.type == NormType::float16)
    static_cast<fp16*>(results.data)[channel] = from_float<fp16>(static_cast<float>(value));
  else
    static_cast<float*>(results.data)[channel] = static_cast<float>(value);
}

// ---- Where a thread works ----

// A block takes one chunk of the items of `lanes` neighbouring packs of channels (channels_last, an item is a row) or
// of one channel (contiguous, an item is a pack of pixels). It numbers them from the first of its first image on, so
// that 31 bits are enough however many there are.
struct Plan {
  int64_t channels, inner, items;
  FastDivide packs_an_image;
  uint32_t items_a_chunk, elements_an_item, channel_blocks, chunks;
  int lanes;  // a power of two

  __host__ __device__ int64_t items_of_chunk(int64_t chunk) const {
    const int64_t left = items - chunk * items_a_chunk;
    return left < items_a_chunk ? left : items_a_chunk;
  }
};

template <bool LAST, int VEC>
struct Place {
  static constexpr int kChannels = LAST ? VEC : 1;  // of one pack
  const Plan& plan;
  int64_t channel, base;  // base: the offset of item 0
  uint32_t first, end, step;
  int row;

  DLKERN_DEVICE explicit Place(const Plan& p) : plan(p) {
    const int thread = static_cast<int>(threadIdx.x);
    row = thread / p.lanes;
    channel = (static_cast<int64_t>(blockIdx.x) * p.lanes + thread % p.lanes) * kChannels;
    step = static_cast<uint32_t>(kThreads / p.lanes);
    const int64_t before = static_cast<int64_t>(blockIdx.y) * p.items_a_chunk;
    const int64_t image = LAST ? before : before / p.packs_an_image.divisor;  // the chunk's first
    const uint32_t start = LAST ? 0 : static_cast<uint32_t>(before - image * p.packs_an_image.divisor);
    base = LAST ? image * p.channels + channel : (image * p.channels + channel) * p.inner;
    first = start + static_cast<uint32_t>(row);
    end = channel >= p.channels ? 0 : start + static_cast<uint32_t>(p.items_of_chunk(blockIdx.y));
  }
  DLKERN_DEVICE int64_t offset(uint32_t item) const {
    if (LAST) return base + item * plan.channels;
    uint32_t pack;
    const uint32_t image = plan.packs_an_image.divide(item, pack);
    return base + image * plan.channels * plan.inner + static_cast<int64_t>(pack) * VEC;
  }
  // Calls f(channel within the pack, element within the pack) for the elements of a pack.
  template <class F>
  static DLKERN_DEVICE void each(F&& f) {
#pragma unroll
    for (int v = 0; v < VEC; v++) f(LAST ? v : 0, v);
  }
};

// A float sum and what rounding took off.
struct Sum {
  float high = 0.0f, low = 0.0f;

  DLKERN_DEVICE void add(float value) {
    const float sum = high + value, added = sum - high;
    low += (high - (sum - added)) + (value - added);
    high = sum;
  }
  DLKERN_DEVICE void add_product(float a, float b) {
    const float product = a * b;
    low += fmaf(a, b, -product);
    add(product);
  }
  DLKERN_DEVICE double value() const { return high - high == 0.0f ? static_cast<double>(high) + low : high; }  // inf
};

// ---- Statistics ----

// (count, mean, sum of squared deviations) of two sets together, into the first.
DLKERN_DEVICE void merge(double count, double& mean, double& m2, double other_count, double other_mean,
                         double other_m2) {
  if (other_count == 0.0) return;
  const double share = other_count / (count + other_count), delta = other_mean - mean;
  mean += delta * share;
  m2 += other_m2 + delta * delta * count * share;
}

template <class T, bool LAST, int VEC>
__global__ void __launch_bounds__(kThreads) batch_norm_partial_kernel(Plan plan, const T* input, double* partial) {
  using At = Place<LAST, VEC>;
  constexpr int kChannels = At::kChannels;
  const At at(plan);
  float thread_count = 0.0f, thread_m2[kChannels] = {};
  Sum thread_mean[kChannels], thread_total[kChannels];  // the mean of m2, and the exact sum
  for (uint32_t item = at.first; item < at.end; item += kUnroll * at.step) {
    Pack<T, VEC> packs[kUnroll];
    int found = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (item + u * at.step >= at.end) continue;
      packs[u] = load_pack<T, VEC>(input + at.offset(item + u * at.step));
      found = u + 1;
    }
    const float new_count = static_cast<float>(found * VEC / kChannels);
    float new_mean[kChannels] = {}, new_m2[kChannels] = {}, left[kChannels] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (u < found) At::each([&](int c, int v) { new_mean[c] += to_float(packs[u].at[v]); });
    }
#pragma unroll
    for (int c = 0; c < kChannels; c++) new_mean[c] /= new_count;
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      if (u < found)
        At::each([&](int c, int v) {
          const float value = to_float(packs[u].at[v]), deviation = value - new_mean[c];
          thread_total[c].add(value);
          left[c] += deviation;
          new_m2[c] += deviation * deviation;
        });
    }
    const float share = new_count / (thread_count + new_count);
#pragma unroll
    for (int c = 0; c < kChannels; c++) {
      const float rest = left[c] / new_count;
      if (thread_count == 0.0f) {  // a difference from 0 would round `rest` away
        thread_mean[c] = {new_mean[c], rest}, thread_m2[c] = new_m2[c];
        continue;
      }
      const float delta = (new_mean[c] - thread_mean[c].high) + (rest - thread_mean[c].low);
      thread_mean[c].add(delta * share);
      thread_m2[c] += new_m2[c] + delta * delta * thread_count * share;
    }
    thread_count += new_count;
  }

  DLKERN_SHARED(double, counts, [kThreads]);
  DLKERN_SHARED(double, means, [kChannels][kThreads]);
  DLKERN_SHARED(double, m2s, [kChannels][kThreads]);
  double count = thread_count, mean[kChannels], m2[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; c++) {
    mean[c] = count == 0.0 ? 0.0 : thread_total[c].value() / count;
    m2[c] = thread_m2[c];
  }
  const int thread = static_cast<int>(threadIdx.x);
  const auto share = [&] {
    counts[thread] = count;
#pragma unroll
    for (int c = 0; c < kChannels; c++) means[c][thread] = mean[c], m2s[c][thread] = m2[c];
  };
  share();
  for (int rows = kThreads / plan.lanes / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (at.row >= rows) continue;
    const int other = thread + rows * plan.lanes;
#pragma unroll
    for (int c = 0; c < kChannels; c++) merge(count, mean[c], m2[c], counts[other], means[c][other], m2s[c][other]);
    count += counts[other];
    share();
  }
  if (at.row != 0 || at.channel >= plan.channels) return;
#pragma unroll
  for (int c = 0; c < kChannels; c++) {
    const int64_t to = blockIdx.y * plan.channels + at.channel + c;
    partial[to] = mean[c];
    partial[plan.chunks * plan.channels + to] = m2[c];
  }
}

constexpr int kFinalChannels = 32, kFinalRows = 8;

// A block makes 32 channels, 8 threads each.
__global__ void __launch_bounds__(kFinalChannels* kFinalRows)
    batch_norm_statistics_kernel(Plan plan, const double* partial, NormStatistics statistics) {
  const int lane = static_cast<int>(threadIdx.x) % kFinalChannels, row = static_cast<int>(threadIdx.x) / kFinalChannels;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kFinalChannels + lane;
  double count = 0.0, mean = 0.0, m2 = 0.0;
  if (channel < plan.channels) {
    for (uint32_t chunk = static_cast<uint32_t>(row); chunk < plan.chunks; chunk += kFinalRows) {
      const double new_count = static_cast<double>(plan.items_of_chunk(chunk)) * plan.elements_an_item;
      const int64_t from = chunk * plan.channels + channel;
      merge(count, mean, m2, new_count, partial[from], partial[plan.chunks * plan.channels + from]);
      count += new_count;
    }
  }
  DLKERN_SHARED(double, parts, [3][kFinalRows][kFinalChannels]);
  parts[0][row][lane] = count, parts[1][row][lane] = mean, parts[2][row][lane] = m2;
  __syncthreads();
  if (row != 0 || channel >= plan.channels) return;
#pragma unroll
  for (int r = 1; r < kFinalRows; r++) {
    merge(count, mean, m2, parts[0][r][lane], parts[1][r][lane], parts[2][r][lane]);
    count += parts[0][r][lane];
  }
  const bool any = count > 0.0;
  statistics.mean[channel] = static_cast<float>(mean);
  statistics.invstd[channel] = any ? static_cast<float>(1.0 / sqrt(m2 / count + statistics.eps)) : 1.0f;
  if (!statistics.running_mean.data) return;
  const double step = any ? statistics.momentum : 0.0;
  const auto moved = [&](const ChannelValues& old, double value) {
    const double before = load_channel(old, channel);
    return step == 0.0 ? before : step * value + (1.0 - step) * before;
  };
  store_channel(statistics.new_mean, channel, moved(statistics.running_mean, mean));
  store_channel(statistics.new_var, channel, moved(statistics.running_var, m2 / (count - 1.0)));
}

__global__ void __launch_bounds__(kThreads)
    batch_norm_running_kernel(ChannelValues running_mean, ChannelValues running_var, double eps, int64_t channels,
                              double* mean, double* invstd) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= channels) return;
  mean[channel] = load_channel(running_mean, channel);
  invstd[channel] = 1.0 / sqrt(load_channel(running_var, channel) + eps);
}

// ---- Application ----

// invstd * weight, rounded once.
template <int COUNT>
DLKERN_DEVICE void load_scales(const ChannelValues& invstd, const ChannelValues& weight, int64_t channel,
                               float (&scale)[COUNT]) {
  double a[COUNT], b[COUNT];
  load_channels(invstd, channel, 1.0, a);
  load_channels(weight, channel, 1.0, b);
#pragma unroll
  for (int c = 0; c < COUNT; c++) scale[c] = static_cast<float>(a[c] * b[c]);
}

template <class T, bool LAST, int VEC>
__global__ void __launch_bounds__(kThreads)
    batch_norm_apply_kernel(Plan plan, const T* input, const T* residual, ChannelValues mean_, ChannelValues invstd,
                            ChannelValues weight, ChannelValues bias_, int activation, T* output) {
  using At = Place<LAST, VEC>;
  const At at(plan);
  if (at.first >= at.end) return;
  float mean[At::kChannels], scale[At::kChannels], bias[At::kChannels];
  load_channels(mean_, at.channel, mean);
  load_scales(invstd, weight, at.channel, scale);
  load_channels(bias_, at.channel, bias);
#pragma unroll 2
  for (uint32_t item = at.first; item < at.end; item += at.step) {
    const int64_t offset = at.offset(item);
    const auto x = load_pack<T, VEC>(input + offset);
    Pack<T, VEC> added = {}, result;
    if (residual) added = load_pack<T, VEC>(residual + offset);
    At::each([&](int c, int v) {
      float y = (to_float(x.at[v]) - mean[c]) * scale[c] + bias[c];
      if (residual) y += to_float(added.at[v]);
      result.at[v] = from_float<T>(activated(y, activation));
    });
    store_pack(output + offset, result);
  }
}

// ---- Backward ----

template <class T>
struct BackwardPointers {
  const T *grad_output, *input, *output;
  T *grad_input, *grad_residual;
};

// Sums over a chunk of g, the gradient before the activation, and of g * (x - mean).
template <class T, bool LAST, int VEC>
__global__ void __launch_bounds__(kThreads)
    batch_norm_backward_partial_kernel(Plan plan, BackwardPointers<T> tensors, ChannelValues mean_, int activation,
                                       double* partial) {
  using At = Place<LAST, VEC>;
  constexpr int kChannels = At::kChannels;
  const At at(plan);
  float mean[kChannels] = {};
  Sum thread_total[kChannels], thread_dot[kChannels];
  if (at.first < at.end) load_channels(mean_, at.channel, mean);
#pragma unroll 2
  for (uint32_t item = at.first; item < at.end; item += at.step) {
    const int64_t offset = at.offset(item);
    const auto grad = load_pack<T, VEC>(tensors.grad_output + offset), x = load_pack<T, VEC>(tensors.input + offset);
    Pack<T, VEC> y = {};
    if (activation) y = load_pack<T, VEC>(tensors.output + offset);
    At::each([&](int c, int v) {
      const float g = activation_gradient(to_float(grad.at[v]), to_float(y.at[v]), activation);
      thread_total[c].add(g);
      thread_dot[c].add_product(g, to_float(x.at[v]) - mean[c]);
    });
  }

  DLKERN_SHARED(double, totals, [kChannels][kThreads]);
  DLKERN_SHARED(double, dots, [kChannels][kThreads]);
  const int thread = static_cast<int>(threadIdx.x);
  double total[kChannels], dot[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; c++) {
    totals[c][thread] = total[c] = thread_total[c].value();
    dots[c][thread] = dot[c] = thread_dot[c].value();
  }
  for (int rows = kThreads / plan.lanes / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (at.row >= rows) continue;
    const int other = thread + rows * plan.lanes;
#pragma unroll
    for (int c = 0; c < kChannels; c++) {
      totals[c][thread] = total[c] += totals[c][other];
      dots[c][thread] = dot[c] += dots[c][other];
    }
  }
  if (at.row != 0 || at.channel >= plan.channels) return;
#pragma unroll
  for (int c = 0; c < kChannels; c++) {
    const int64_t to = blockIdx.y * plan.channels + at.channel + c;
    partial[to] = total[c];
    partial[plan.chunks * plan.channels + to] = dot[c];
  }
}

// Gradients of weight and bias, and the means that the gradient through the statistics takes off.
__global__ void __launch_bounds__(kFinalChannels* kFinalRows)
    batch_norm_backward_sums_kernel(Plan plan, const double* partial, ChannelValues invstd_, float* coefficients,
                                    ChannelResults grad_weight, ChannelResults grad_bias) {
  const int lane = static_cast<int>(threadIdx.x) % kFinalChannels, row = static_cast<int>(threadIdx.x) / kFinalChannels;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kFinalChannels + lane;
  double total = 0.0, dot = 0.0;
  if (channel < plan.channels) {
    for (uint32_t chunk = static_cast<uint32_t>(row); chunk < plan.chunks; chunk += kFinalRows) {
      const int64_t from = chunk * plan.channels + channel;
      total += partial[from];
      dot += partial[plan.chunks * plan.channels + from];
    }
  }
  DLKERN_SHARED(double, parts, [2][kFinalRows][kFinalChannels]);
  parts[0][row][lane] = total, parts[1][row][lane] = dot;
  __syncthreads();
  if (row != 0 || channel >= plan.channels) return;
#pragma unroll
  for (int r = 1; r < kFinalRows; r++) total += parts[0][r][lane], dot += parts[1][r][lane];
  const double invstd = load_channel(invstd_, channel);
  store_channel(grad_weight, channel, dot * invstd);
  store_channel(grad_bias, channel, total);
  const double count = static_cast<double>(plan.items) * plan.elements_an_item;
  if (count == 0.0) return;
  coefficients[channel] = static_cast<float>(total / count);
  coefficients[plan.channels + channel] = static_cast<float>(dot * invstd * invstd / count);
}

// grad_input = (g - mean(g) - (x - mean) * invstd^2 * mean(g * (x - mean))) * invstd * weight; g * invstd * weight on
// frozen statistics.
template <class T, bool LAST, int VEC>
__global__ void __launch_bounds__(kThreads)
    batch_norm_backward_apply_kernel(Plan plan, BackwardPointers<T> tensors, ChannelValues mean_, ChannelValues invstd,
                                     ChannelValues weight, const float* coefficients, bool train, int activation) {
  using At = Place<LAST, VEC>;
  const At at(plan);
  if (at.first >= at.end) return;
  float mean[At::kChannels] = {}, scale[At::kChannels], mean_g[At::kChannels] = {}, slope[At::kChannels] = {};
  load_scales(invstd, weight, at.channel, scale);
  if (train) {
    load_channels(mean_, at.channel, mean);
#pragma unroll
    for (int c = 0; c < At::kChannels; c++) {
      mean_g[c] = coefficients[at.channel + c];
      slope[c] = coefficients[plan.channels + at.channel + c];
    }
  }
  for (uint32_t item = at.first; item < at.end; item += at.step) {
    const int64_t offset = at.offset(item);
    const auto grad = load_pack<T, VEC>(tensors.grad_output + offset);
    Pack<T, VEC> x = {}, y = {}, result, before;
    if (train) x = load_pack<T, VEC>(tensors.input + offset);
    if (activation) y = load_pack<T, VEC>(tensors.output + offset);
    At::each([&](int c, int v) {
      float g = activation_gradient(to_float(grad.at[v]), to_float(y.at[v]), activation);
      before.at[v] = from_float<T>(g);
      if (train) g = g - mean_g[c] - (to_float(x.at[v]) - mean[c]) * slope[c];
      result.at[v] = from_float<T>(g * scale[c]);
    });
    store_pack(tensors.grad_input + offset, result);
    if (tensors.grad_residual) store_pack(tensors.grad_residual + offset, before);
  }
}

// ---- Launchers ----

int width_of(NormType type, const NormShape& shape) {
  const int width = type == NormType::float32 ? 4 : 8;
  return (shape.channels_last ? shape.channels : shape.inner) % width == 0 ? width : 1;
}

// A chunk has a few turns of every thread at least, and there are about as many blocks as an H100 runs at once.
Plan plan_of(NormType type, const NormShape& shape) {
  const int vec = width_of(type, shape);
  Plan plan{};
  plan.channels = shape.channels, plan.inner = shape.inner, plan.lanes = 1;
  if (shape.channels_last) {
    while (plan.lanes < 32 && plan.lanes * vec < shape.channels) plan.lanes *= 2;
    plan.items = shape.images * shape.inner, plan.elements_an_item = 1;
  } else {
    const int64_t packs = shape.inner / vec;
    plan.packs_an_image = FastDivide(packs == 0 ? 1 : packs);
    plan.items = shape.images * packs, plan.elements_an_item = static_cast<uint32_t>(vec);
  }
  const int64_t channels_a_block = shape.channels_last ? static_cast<int64_t>(plan.lanes) * vec : 1;
  plan.channel_blocks = static_cast<uint32_t>(shape.channels == 0 ? 1 : ceil_div(shape.channels, channels_a_block));
  const int64_t turn = kThreads / plan.lanes * kUnroll;  // items of one turn of a block
  const int64_t turns = ceil_div(plan.items, turn), most = ceil_div(1024, plan.channel_blocks);
  const int64_t wanted = turns == 0 ? 1 : ceil_div(turns, turns < most ? turns : most);
  // Numbers go up to a chunk's last item, and before it is a part of an image.
  const int64_t largest = (most_numbers() + 1 - plan.packs_an_image.divisor) / turn;
  if (largest < 1 || ceil_div(turns, largest) > 65535)
    throw std::runtime_error("batch_norm: more than 2^31 - 1 elements of one image's channel (cuda column)");
  plan.items_a_chunk = static_cast<uint32_t>((wanted < largest ? wanted : largest) * turn);
  plan.chunks = static_cast<uint32_t>(ceil_div(plan.items, plan.items_a_chunk));
  return plan;
}

template <class T, int VEC, class F>
void with_layout(const NormShape& shape, F&& f) {
  if (shape.channels_last)
    f(static_cast<T*>(nullptr), std::true_type{}, std::integral_constant<int, VEC>{});
  else
    f(static_cast<T*>(nullptr), std::false_type{}, std::integral_constant<int, VEC>{});
}

// Calls f(T*, constant LAST, constant VEC).
template <class F>
void with_kernel(NormType type, const NormShape& shape, F&& f) {
  const bool wide = width_of(type, shape) > 1;
  if (type == NormType::float32)
    wide ? with_layout<float, 4>(shape, f) : with_layout<float, 1>(shape, f);
  else if (type == NormType::bfloat16)
    wide ? with_layout<bf16, 8>(shape, f) : with_layout<bf16, 1>(shape, f);
  else
    wide ? with_layout<fp16, 8>(shape, f) : with_layout<fp16, 1>(shape, f);
}

dim3 final_grid(const NormShape& shape) { return grid_of(ceil_div(shape.channels, kFinalChannels)); }

}  // namespace

int64_t batch_norm_chunks(NormType type, const NormShape& shape) { return plan_of(type, shape).chunks; }

void batch_norm_statistics(NormType type, const NormShape& shape, const void* input, double* partial,
                           const NormStatistics& statistics, void* stream) {
  const Plan plan = plan_of(type, shape);
  if (plan.chunks > 0) {
    with_kernel(type, shape, [&](auto* element, auto last, auto vec) {
      using T = std::remove_pointer_t<decltype(element)>;
      launch("batch_norm_partial_kernel", batch_norm_partial_kernel<T, decltype(last)::value, decltype(vec)::value>,
             dim3(plan.channel_blocks, plan.chunks), dim3(kThreads), 0, stream, false, plan,
             static_cast<const T*>(input), partial);
    });
  }
  DLKERN_LAUNCH(batch_norm_statistics_kernel, final_grid(shape), dim3(kFinalChannels * kFinalRows), 0, stream, plan,
                static_cast<const double*>(partial), statistics);
}

void batch_norm_running(const ChannelValues& running_mean, const ChannelValues& running_var, double eps,
                        int64_t channels, double* mean, double* invstd, void* stream) {
  const dim3 grid = grid_of(ceil_div(channels, kThreads));
  DLKERN_LAUNCH(batch_norm_running_kernel, grid, dim3(kThreads), 0, stream, running_mean, running_var, eps, channels,
                mean, invstd);
}

void batch_norm_apply(NormType type, const NormShape& shape, const void* input, const void* residual,
                      const ChannelValues& mean, const ChannelValues& invstd, const ChannelValues& weight,
                      const ChannelValues& bias, int activation, void* output, void* stream) {
  const Plan plan = plan_of(type, shape);
  with_kernel(type, shape, [&](auto* element, auto last, auto vec) {
    using T = std::remove_pointer_t<decltype(element)>;
    launch("batch_norm_apply_kernel", batch_norm_apply_kernel<T, decltype(last)::value, decltype(vec)::value>,
           dim3(plan.channel_blocks, plan.chunks), dim3(kThreads), 0, stream, false, plan, static_cast<const T*>(input),
           static_cast<const T*>(residual), mean, invstd, weight, bias, activation, static_cast<T*>(output));
  });
}

void batch_norm_backward(NormType type, const NormShape& shape, const NormBackward& args, void* stream) {
  const Plan plan = plan_of(type, shape);
  with_kernel(type, shape, [&](auto* element, auto last, auto vec) {
    using T = std::remove_pointer_t<decltype(element)>;
    constexpr bool LAST = decltype(last)::value;
    constexpr int VEC = decltype(vec)::value;
    const BackwardPointers<T> tensors{static_cast<const T*>(args.grad_output), static_cast<const T*>(args.input),
                                      static_cast<const T*>(args.output), static_cast<T*>(args.grad_input),
                                      static_cast<T*>(args.grad_residual)};
    const dim3 grid(plan.channel_blocks, plan.chunks);
    if (plan.chunks > 0)
      launch("batch_norm_backward_partial_kernel", batch_norm_backward_partial_kernel<T, LAST, VEC>, grid,
             dim3(kThreads), 0, stream, false, plan, tensors, args.mean, args.activation, args.partial);
    DLKERN_LAUNCH(batch_norm_backward_sums_kernel, final_grid(shape), dim3(kFinalChannels * kFinalRows), 0, stream,
                  plan, static_cast<const double*>(args.partial), args.invstd, args.coefficients, args.grad_weight,
                  args.grad_bias);
    if (plan.chunks > 0)
      launch("batch_norm_backward_apply_kernel", batch_norm_backward_apply_kernel<T, LAST, VEC>, grid, dim3(kThreads),
             0, stream, false, plan, tensors, args.mean, args.invstd, args.weight,
             static_cast<const float*>(args.coefficients), args.train, args.activation);
  });
}

}  // namespace dlkern::cuda

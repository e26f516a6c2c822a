// Depthwise conv2d (one input channel a group) as direct sums, because a product of depth 1 would leave the tensor cores
// idle; and the sums over pixels that the weight's and the bias's gradients are. A thread makes a run of kRun pixels of
// a row, 16 bytes of channels each where channels_last allows: a tap's weights are loaded once a run. The weight's
// gradient cuts the pixels into parts, whose floats conv2d_sum_parts adds: every sum has a fixed order, no atomics.
// Floor: the tensors once over the memory's bandwidth.
#include "conv_depthwise.h"

#include <type_traits>

#include "activation.cuh"
#include "fast_divide.cuh"
#include "pack.cuh"

namespace dlkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRun = 4;

// ---- Forward and input gradient ----

// A thread's place in image blockIdx.y (and every gridDim.y-th after it): a pack of channels, a row and a run of columns.
// Packs run fastest where channels lie together, else runs.
struct Items {
  FastDivide fastest, middle;
  uint32_t count;
  bool packs_first;

  DLKERN_DEVICE bool find(uint32_t& pack, uint32_t& row, uint32_t& run) const {
    const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
    if (item >= count) return false;
    if (packs_first)
      row = middle.divide(fastest.divide(item, pack), run);
    else
      pack = middle.divide(fastest.divide(item, run), row);
    return true;
  }
};

struct Depthwise {
  ConvGeometry g;
  ConvTensor source, weight;  // x of the forward pass, dy of the input gradient
  ConvResult result;
  const void *bias, *residual;
  int activation;
  int multiplier;  // output channels an input channel
  FastDivide by_multiplier;
  Items items;
  FastDivide runs;  // of a residue class of columns (input gradient)
};

template <class T, int VEC>
DLKERN_DEVICE void load_taps(float (&tap)[VEC], const T* weight, int64_t stride) {
#pragma unroll
  for (int v = 0; v < VEC; v++) tap[v] = to_float(weight[v * stride]);
}

template <class T, int VEC>
DLKERN_DEVICE void add_product(float (&sum)[VEC], const T* source, const float (&tap)[VEC]) {
  const auto pack = load_pack<T, VEC>(source);
#pragma unroll
  for (int v = 0; v < VEC; v++) sum[v] = fmaf(to_float(pack.at[v]), tap[v], sum[v]);
}

// Bias, residual, activation; one pixel.
template <class T, int VEC>
DLKERN_DEVICE void finish(const Depthwise& args, const float (&sum)[VEC], int64_t channel, int64_t offset) {
  const T* bias = static_cast<const T*>(args.bias);
  Pack<T, VEC> added = {}, result;
  if (args.residual) added = load_pack<T, VEC>(static_cast<const T*>(args.residual) + offset);
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    float y = sum[v];
    if (bias) y += to_float(bias[channel + v]);
    if (args.residual) y += to_float(added.at[v]);
    result.at[v] = from_float<T>(activated(y, args.activation));
  }
  store_pack(static_cast<T*>(args.result.data) + offset, result);
}

template <class T, int VEC>
__global__ void __launch_bounds__(kThreads, 3) depthwise_forward_kernel(const __grid_constant__ Depthwise args) {
  uint32_t pack, row, run, in_group;
  if (!args.items.find(pack, row, run)) return;
  const ConvGeometry& g = args.g;
  const int64_t channel = static_cast<int64_t>(pack) * VEC;
  const int64_t in_channel = VEC > 1 ? channel : args.by_multiplier.divide(pack, in_group);
  const int h0 = static_cast<int>(row) * g.stride_h - g.pad_h, q0 = static_cast<int>(run) * kRun;
  const T* weight = static_cast<const T*>(args.weight.data) + channel * args.weight.n;
  for (int64_t n = blockIdx.y; n < g.n; n += gridDim.y) {
    const T* x = static_cast<const T*>(args.source.data) + n * args.source.n + in_channel * args.source.c;
    float sum[kRun][VEC] = {};
    for (int r = 0; r < g.r; r++) {
      const int h = h0 + r * g.dilation_h;
      if (h < 0 || h >= g.h) continue;
      for (int s = 0; s < g.s; s++) {
        float tap[VEC];
        load_taps<T, VEC>(tap, weight + r * args.weight.h + s * args.weight.w, args.weight.n);
#pragma unroll
        for (int i = 0; i < kRun; i++) {
          const int w = (q0 + i) * g.stride_w - g.pad_w + s * g.dilation_w;
          if (w < 0 || w >= g.w) continue;
          add_product<T, VEC>(sum[i], x + h * args.source.h + w * args.source.w, tap);
        }
      }
    }
    const int64_t at = n * args.result.n + channel * args.result.c + row * args.result.h;
#pragma unroll
    for (int i = 0; i < kRun; i++)
      if (q0 + i < g.q) finish<T, VEC>(args, sum[i], channel, at + (q0 + i) * args.result.w);
  }
}

// A run is of columns of one residue modulo the stride: they see the same taps.
template <class T, int VEC>
__global__ void __launch_bounds__(kThreads, 3) depthwise_backward_input_kernel(const __grid_constant__ Depthwise args) {
  uint32_t pack, row, run, in_residue;
  if (!args.items.find(pack, row, run)) return;
  const ConvGeometry& g = args.g;
  const int64_t channel = static_cast<int64_t>(pack) * VEC;
  const int residue = static_cast<int>(args.runs.divide(run, in_residue));
  const int w0 = residue + static_cast<int>(in_residue) * kRun * g.stride_w, h = static_cast<int>(row);
  for (int64_t n = blockIdx.y; n < g.n; n += gridDim.y) {
    float sum[kRun][VEC] = {};
    for (int member = 0; member < args.multiplier; member++) {
      const int64_t k = channel * args.multiplier + member;
      const T* dy = static_cast<const T*>(args.source.data) + n * args.source.n + k * args.source.c;
      const T* weight = static_cast<const T*>(args.weight.data) + k * args.weight.n;
      for (int r = 0; r < g.r; r++) {
        const int reach_h = h + g.pad_h - r * g.dilation_h;
        if (reach_h < 0 || reach_h % g.stride_h != 0 || reach_h / g.stride_h >= g.p) continue;
        const int p = reach_h / g.stride_h;
        for (int s = 0; s < g.s; s++) {
          const int reach_w = w0 + g.pad_w - s * g.dilation_w;
          if (reach_w % g.stride_w != 0) continue;
          const int q0 = reach_w / g.stride_w;
          float tap[VEC];
          load_taps<T, VEC>(tap, weight + r * args.weight.h + s * args.weight.w, args.weight.n);
#pragma unroll
          for (int i = 0; i < kRun; i++) {
            if (q0 + i < 0 || q0 + i >= g.q) continue;
            add_product<T, VEC>(sum[i], dy + p * args.source.h + (q0 + i) * args.source.w, tap);
          }
        }
      }
    }
    const int64_t at = n * args.result.n + channel * args.result.c + row * args.result.h;
#pragma unroll
    for (int i = 0; i < kRun; i++) {
      const int w = w0 + i * g.stride_w;
      if (w < g.w) finish<T, VEC>(args, sum[i], channel, at + w * args.result.w);
    }
  }
}

// ---- Sums over pixels ----

struct PixelSums {
  ConvGeometry g;
  ConvTensor dy, x;
  ConvResult result;  // [k, c, r, s]; of parts where there are several, floats then
  int64_t part_length, part_stride;
  FastDivide by_p, by_q, by_multiplier;
  int lanes;  // threads side by side on packs of channels, a power of two
  bool parts;
};

// One block: `lanes` packs of output channels, one filter tap (blockIdx.y), one part of the pixels (blockIdx.z).
// Without an input it is the sum of dy.
template <class T, int VEC, bool WITH_INPUT>
__global__ void __launch_bounds__(kThreads) pixel_sums_kernel(const __grid_constant__ PixelSums args) {
  const ConvGeometry& g = args.g;
  const int thread = static_cast<int>(threadIdx.x), row = thread / args.lanes, rows = kThreads / args.lanes;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * args.lanes + thread % args.lanes) * VEC;
  const bool any = channel < g.k;
  const int r = static_cast<int>(blockIdx.y) / g.s, s = static_cast<int>(blockIdx.y) % g.s;
  const int64_t pixels = g.n * g.p * g.q, an_image = static_cast<int64_t>(g.p) * g.q;
  const int64_t first = blockIdx.z * args.part_length, image = first / an_image;
  const int64_t left = any ? pixels - first : 0;
  const uint32_t start = static_cast<uint32_t>(first - image * an_image);
  const uint32_t count = static_cast<uint32_t>(left < args.part_length ? left : args.part_length);
  uint32_t in_group;
  const int64_t in_channel = VEC > 1 ? channel : args.by_multiplier.divide(static_cast<uint32_t>(channel), in_group);
  const T* dy = static_cast<const T*>(args.dy.data) + image * args.dy.n + channel * args.dy.c;
  const T* x = static_cast<const T*>(args.x.data) + image * args.x.n + in_channel * args.x.c;
  float sum[VEC] = {};
#pragma unroll 2
  for (uint32_t i = static_cast<uint32_t>(row); i < count; i += static_cast<uint32_t>(rows)) {
    uint32_t p, q;
    const int64_t n = args.by_p.divide(args.by_q.divide(start + i, q), p);
    const int h = static_cast<int>(p) * g.stride_h - g.pad_h + r * g.dilation_h;
    const int w = static_cast<int>(q) * g.stride_w - g.pad_w + s * g.dilation_w;
    if (WITH_INPUT && (h < 0 || h >= g.h || w < 0 || w >= g.w)) continue;
    const auto grad = load_pack<T, VEC>(dy + n * args.dy.n + p * args.dy.h + q * args.dy.w);
    Pack<T, VEC> value;
    if (WITH_INPUT) value = load_pack<T, VEC>(x + n * args.x.n + h * args.x.h + w * args.x.w);
#pragma unroll
    for (int v = 0; v < VEC; v++)
      sum[v] = fmaf(to_float(grad.at[v]), WITH_INPUT ? to_float(value.at[v]) : 1.0f, sum[v]);
  }

  DLKERN_SHARED(float, sums, [VEC][kThreads]);
#pragma unroll
  for (int v = 0; v < VEC; v++) sums[v][thread] = sum[v];
  for (int half = rows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row >= half) continue;
#pragma unroll
    for (int v = 0; v < VEC; v++) sums[v][thread] = sum[v] += sums[v][thread + half * args.lanes];
  }
  if (row != 0 || !any) return;
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    const int64_t at = (channel + v) * args.result.n + r * args.result.h + s * args.result.w;
    if (args.parts)
      static_cast<float*>(args.result.data)[blockIdx.z * args.part_stride + at] = sum[v];
    else
      static_cast<T*>(args.result.data)[at] = from_float<T>(sum[v]);
  }
}

// A thread adds one element's parts.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const float* parts, int count_of_parts, int64_t count, T* result) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int part = 0; part < count_of_parts; part++) sum += parts[part * count + i];
  result[i] = from_float<T>(sum);
}

// ---- Launchers ----

template <class T, class TENSOR>
bool has_packs(const TENSOR& x) {
  constexpr int kVec = 16 / sizeof(T);
  return x.c == 1 && x.n % kVec == 0 && x.h % kVec == 0 && x.w % kVec == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// Calls f(T*, constant VEC): 16 bytes of channels a thread where both tensors allow.
template <class F>
void with_packs(Element element, int64_t channels, const ConvTensor& a, const ConvResult& b, F&& f) {
  with_type(element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVec = 16 / sizeof(T);
    if (channels % kVec == 0 && has_packs<T>(a) && has_packs<T>(b))
      f(type, std::integral_constant<int, kVec>{});
    else
      f(type, std::integral_constant<int, 1>{});
  });
}

Items items_of(int64_t packs, int64_t rows, int64_t runs, bool packs_first) {
  if (packs * rows * runs >= int64_t{1} << 31)
    throw std::runtime_error("conv2d: more than 2^31 - 1 elements of one image (cuda column)");
  const FastDivide by_runs(runs);
  return {packs_first ? FastDivide(packs) : by_runs, packs_first ? by_runs : FastDivide(rows),
          static_cast<uint32_t>(packs * rows * runs), packs_first};
}

void launch_images(const char* name, void (*kernel)(Depthwise), const Depthwise& args, void* stream) {
  const int64_t images = args.g.n < 65535 ? args.g.n : 65535;
  launch(name, kernel, grid_of(ceil_div(args.items.count, kThreads), images), dim3(kThreads), 0, stream, false, args);
}

constexpr int64_t kWantedBlocks = 512, kLeastOfAPart = 512, kMostOfAPart = int64_t{1} << 29;

int parts_of(const ConvGeometry& g, int64_t taps) {
  const int64_t pixels = g.n * g.p * g.q, most = pixels / kLeastOfAPart;
  const int64_t wanted = kWantedBlocks / (ceil_div(g.k, 32) * taps);
  int64_t parts = wanted < most ? wanted : most;
  if (parts < ceil_div(pixels, kMostOfAPart)) parts = ceil_div(pixels, kMostOfAPart);
  return static_cast<int>(parts < 1 ? 1 : parts);
}

template <bool WITH_INPUT>
void launch_sums(Element element, const ConvGeometry& g, const ConvTensor& dy, const ConvTensor& x, int count,
                 float* parts, const ConvResult& result, int64_t part_stride, void* stream) {
  PixelSums args{
      g,  dy, x,        result, ceil_div(g.n * g.p * g.q, count), part_stride, FastDivide(g.p), FastDivide(g.q),
      {}, 1,  count > 1};
  if (WITH_INPUT) args.by_multiplier = FastDivide(g.k / g.c);
  if (count > 1) args.result.data = parts;
  const bool one = !WITH_INPUT || g.k == g.c;
  const ConvResult other{const_cast<void*>(WITH_INPUT ? x.data : dy.data), WITH_INPUT ? x.n : dy.n,
                         WITH_INPUT ? x.c : dy.c, WITH_INPUT ? x.h : dy.h, WITH_INPUT ? x.w : dy.w};
  with_packs(element, one ? g.k : 1, dy, other, [&](auto* type, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int VEC = decltype(vec)::value;
    const int64_t packs = g.k / VEC;
    if (dy.c == 1)
      while (args.lanes < 32 && args.lanes < packs) args.lanes *= 2;
    const dim3 grid = grid_of(ceil_div(packs, args.lanes), WITH_INPUT ? g.r * g.s : 1, count);
    launch("pixel_sums_kernel", pixel_sums_kernel<T, VEC, WITH_INPUT>, grid, dim3(kThreads), 0, stream, false, args);
  });
}

}  // namespace

void depthwise_forward(Element element, const ConvGeometry& g, const ConvTensor& x, const ConvTensor& w,
                       const void* bias, const void* residual, int activation, const ConvResult& y, void* stream) {
  Depthwise args{g, x, w, y, bias, residual, activation, static_cast<int>(g.k / g.c), FastDivide(g.k / g.c), {}, {}};
  const bool residual_aligned = reinterpret_cast<uintptr_t>(residual) % 16 == 0;
  with_packs(element, g.k == g.c && residual_aligned ? g.k : 1, x, y, [&](auto* type, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int VEC = decltype(vec)::value;
    args.items = items_of(g.k / VEC, g.p, ceil_div(g.q, kRun), y.c == 1);
    launch_images("depthwise_forward_kernel", depthwise_forward_kernel<T, VEC>, args, stream);
  });
}

void depthwise_backward_input(Element element, const ConvGeometry& g, const ConvTensor& dy, const ConvTensor& w,
                              const void* bias, const ConvResult& dx, void* stream) {
  Depthwise args{g, dy, w, dx, bias, nullptr, 0, static_cast<int>(g.k / g.c), {}, {}, {}};
  with_packs(element, g.k == g.c ? g.k : 1, dy, dx, [&](auto* type, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int VEC = decltype(vec)::value;
    const int64_t residues = g.stride_w < g.w ? g.stride_w : g.w;
    const int64_t runs = ceil_div(ceil_div(g.w, g.stride_w), kRun);
    args.runs = FastDivide(runs);
    args.items = items_of(g.c / VEC, g.h, residues * runs, dx.c == 1);
    launch_images("depthwise_backward_input_kernel", depthwise_backward_input_kernel<T, VEC>, args, stream);
  });
}

int depthwise_weight_parts(Element, const ConvGeometry& g) { return parts_of(g, int64_t{g.r} * g.s); }

void depthwise_backward_weight(Element element, const ConvGeometry& g, const ConvTensor& dy, const ConvTensor& x,
                               float* parts, const ConvResult& dw, void* stream) {
  const int64_t elements = g.k * g.r * g.s;
  launch_sums<true>(element, g, dy, x, depthwise_weight_parts(element, g), parts, dw, elements, stream);
}

int conv2d_bias_parts(const ConvGeometry& g) { return parts_of(g, 1); }

void conv2d_backward_bias(Element element, const ConvGeometry& g, const ConvTensor& dy, float* parts, void* grad_bias,
                          void* stream) {
  launch_sums<false>(element, g, dy, {}, conv2d_bias_parts(g), parts, {grad_bias, 1, 0, 0, 0}, g.k, stream);
}

void conv2d_sum_parts(Element element, const float* parts, int count_of_parts, int64_t count, void* result,
                      void* stream) {
  const dim3 grid = grid_of(ceil_div(count, kThreads));
  with_type(element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    DLKERN_LAUNCH(sum_parts_kernel<T>, grid, dim3(kThreads), 0, stream, parts, count_of_parts, count,
                  static_cast<T*>(result));
  });
}

}  // namespace dlkern::cuda

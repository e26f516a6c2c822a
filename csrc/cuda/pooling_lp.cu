// Power-average pooling, forward and backward: y = (sum of x^norm over the window)^(1 / norm), threads and gathers as
// in pooling.cu. A window cut off by the end of the input (ceil_mode) counts its mean times the whole window's size, as
// in torch. Norms 1 and 2 need products and roots alone and are computed in float; every other one is in double, so
// that x^norm overflows only where float64's does, one element a thread: powers, not loads, are its cost.
// Backward, with m the mean and m' = size m: dy / norm m'^(1 / norm - 1) is made once a window, times the share it counts
// for; each pixel adds those of the windows that cover it, and its own norm x^(norm - 1) comes last.
// Floor: input and output once, at the memory's bandwidth.
#include "pooling_window.cuh"

namespace dlkern::cuda {
namespace {

DLKERN_DEVICE float square_root(float v) { return sqrtf(v); }
DLKERN_DEVICE double square_root(double v) { return sqrt(v); }

// v^exponent as pow() has it: small whole exponents and square roots without it. In float those are all there are.
template <class A>
struct Power {
  enum class Kind { whole, root, inverse_root, other };
  double exponent;
  int whole;
  Kind kind;

  explicit Power(double e)
      : exponent(e),
        whole(e >= -8 && e <= 8 ? static_cast<int>(e) : 0),
        kind(static_cast<double>(whole) == e ? Kind::whole
             : e == 0.5                      ? Kind::root
             : e == -0.5                     ? Kind::inverse_root
                                             : Kind::other) {}
  DLKERN_DEVICE A operator()(A v) const {
    if (kind == Kind::root) return square_root(v);
    if (kind == Kind::inverse_root) return 1 / square_root(v);
    if constexpr (sizeof(A) == 8) {
      if (kind == Kind::other) return pow(v, exponent);
    }
    A result = 1;
    for (int i = 0; i < (whole < 0 ? -whole : whole); i++) result *= v;
    return whole < 0 ? 1 / result : result;
  }
};

// The windows' sums of powers, times `share`: the whole window's size over the size there is.
template <class T, int VEC, class A>
DLKERN_DEVICE void window_sums(const Pixels::At& at, const PoolGeometry& g, const Power<A>& power, const T* input,
                               A (&sum)[VEC], A& share) {
  const int64_t channel = static_cast<int64_t>(at.pack) * VEC;
  const Window rows = window<false>(g.height, static_cast<int>(at.y));
  const Window columns = window<false>(g.width, static_cast<int>(at.x));
  for (int h = rows.begin; h < rows.end; h++) {
    A row_sum[VEC] = {};  // row by row, so that the rounding errors of a large window stay small
    for (int w = columns.begin; w < columns.end; w++) {
      const auto pack =
          load_pack<T, VEC>(input + pixel_offset(at.outer, h, w, g.height.size, g.width.size, g.inner) + channel);
#pragma unroll
      for (int v = 0; v < VEC; v++) row_sum[v] += power(static_cast<A>(to_float(pack.at[v])));
    }
#pragma unroll
    for (int v = 0; v < VEC; v++) sum[v] += row_sum[v];
  }
  share = static_cast<A>(static_cast<int64_t>(g.height.kernel) * g.width.kernel) /
          static_cast<A>(static_cast<int64_t>(rows.end - rows.begin) * (columns.end - columns.begin));
#pragma unroll
  for (int v = 0; v < VEC; v++) sum[v] *= share;
}

// Element offset of a thread's window.
template <int VEC>
DLKERN_DEVICE int64_t window_offset(const Pixels::At& at, const PoolGeometry& g) {
  return pixel_offset(at.outer, static_cast<int>(at.y), static_cast<int>(at.x), g.height.out_size, g.width.out_size,
                      g.inner) +
         static_cast<int64_t>(at.pack) * VEC;
}

template <class T, int VEC, class A>
__global__ void lp_pool2d_forward_kernel(Pixels outputs, PoolGeometry g, Power<A> power, Power<A> root, const T* input,
                                         T* output) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= outputs.count) return;
  const auto at = outputs.at(item);
  A sum[VEC] = {}, share;
  window_sums<T, VEC>(at, g, power, input, sum, share);
  Pack<T, VEC> result;
#pragma unroll
  for (int v = 0; v < VEC; v++) result.at[v] = from_float<T>(static_cast<float>(root(sum[v])));
  store_pack(output + window_offset<VEC>(at, g), result);
}

template <class T, int VEC, class A>
__global__ void lp_pool2d_slope_kernel(Pixels outputs, PoolGeometry g, A inverse, Power<A> power, Power<A> root_slope,
                                       const T* grad_output, const T* input, A* slopes) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= outputs.count) return;
  const auto at = outputs.at(item);
  A sum[VEC] = {}, share;
  window_sums<T, VEC>(at, g, power, input, sum, share);
  const int64_t to = window_offset<VEC>(at, g);
  const auto grad = load_pack<T, VEC>(grad_output + to);
  Pack<A, VEC> result;
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    const A slope = static_cast<A>(to_float(grad.at[v])) * (inverse * root_slope(sum[v])) * share;
    // As in torch: nothing from a sum of zero, and of one that is NaN nothing but a slope's own NaN.
    result.at[v] = sum[v] == 0 ? 0 : sum[v] != sum[v] ? slope * 0 : slope;
  }
  store_pack(slopes + to, result);
}

template <class T, int VEC, class A>
__global__ void lp_pool2d_backward_kernel(Pixels inputs, PoolGeometry g, A norm, Power<A> power_slope, const T* input,
                                          const A* slopes, T* grad_input) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= inputs.count) return;
  const auto at = inputs.at(item);
  const int64_t channel = static_cast<int64_t>(at.pack) * VEC;
  const int h = static_cast<int>(at.y), w = static_cast<int>(at.x);
  const Covering rows = covering_windows(g.height, h), columns = covering_windows(g.width, w);

  A sum[VEC] = {};
  for (int oh = rows.first; oh <= rows.last; oh++) {
    for (int ow = columns.first; ow <= columns.last; ow++) {
      const auto slope = load_pack<A, VEC>(
          slopes + pixel_offset(at.outer, oh, ow, g.height.out_size, g.width.out_size, g.inner) + channel);
#pragma unroll
      for (int v = 0; v < VEC; v++) sum[v] += slope.at[v];
    }
  }
  const int64_t to = pixel_offset(at.outer, h, w, g.height.size, g.width.size, g.inner) + channel;
  const auto pack = load_pack<T, VEC>(input + to);
  Pack<T, VEC> result;
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    const A gradient = sum[v] * (norm * power_slope(static_cast<A>(to_float(pack.at[v]))));
    result.at[v] = from_float<T>(static_cast<float>(gradient));
  }
  store_pack(grad_input + to, result);
}

// ---- Launchers ----

// Calls f(T*, constant VEC, zero of the type that sums have).
template <class F>
void with_sums(Element element, int64_t inner, double norm, F&& f) {
  if (lp_pool2d_is_in_double(norm))
    with_type(element, [&](auto* type) { f(type, std::integral_constant<int, 1>{}, 0.0); });
  else
    with_pack(element, inner, [&](auto* type, auto vec) { f(type, vec, 0.0f); });
}

}  // namespace

void lp_pool2d_forward(Element element, const PoolGeometry& geometry, double norm, const void* input, void* output,
                       void* stream) {
  with_sums(element, geometry.inner, norm, [&](auto* type, auto vec, auto zero) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = decltype(zero);
    constexpr int VEC = decltype(vec)::value;
    for_output_pixels(geometry, VEC, [&](const Pixels& pixels, int64_t first) {
      DLKERN_LAUNCH((lp_pool2d_forward_kernel<T, VEC, A>), blocks_for(pixels), kThreads, 0, stream, pixels, geometry,
                    Power<A>(norm), Power<A>(1.0 / norm), from_input(static_cast<const T*>(input), geometry, first),
                    from_output(static_cast<T*>(output), geometry, first));
    });
  });
}

void lp_pool2d_backward(Element element, const PoolGeometry& geometry, double norm, const void* grad_output,
                        const void* input, void* slopes, void* grad_input, void* stream) {
  with_sums(element, geometry.inner, norm, [&](auto* type, auto vec, auto zero) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = decltype(zero);
    constexpr int VEC = decltype(vec)::value;
    const double inverse = 1.0 / norm;
    for_output_pixels(geometry, VEC, [&](const Pixels& windows, int64_t first) {
      DLKERN_LAUNCH((lp_pool2d_slope_kernel<T, VEC, A>), blocks_for(windows), kThreads, 0, stream, windows, geometry,
                    static_cast<A>(inverse), Power<A>(norm), Power<A>(inverse - 1.0),
                    from_output(static_cast<const T*>(grad_output), geometry, first),
                    from_input(static_cast<const T*>(input), geometry, first),
                    from_output(static_cast<A*>(slopes), geometry, first));
    });
    for_input_pixels(geometry, VEC, [&](const Pixels& pixels, int64_t first) {
      DLKERN_LAUNCH((lp_pool2d_backward_kernel<T, VEC, A>), blocks_for(pixels), kThreads, 0, stream, pixels, geometry,
                    static_cast<A>(norm), Power<A>(norm - 1.0),
                    from_input(static_cast<const T*>(input), geometry, first),
                    from_output(static_cast<const A*>(slopes), geometry, first),
                    from_input(static_cast<T*>(grad_input), geometry, first));
    });
  });
}

}  // namespace dlkern::cuda

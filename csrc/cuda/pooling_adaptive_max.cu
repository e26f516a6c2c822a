// Adaptive max pooling, forward and backward, with torch's int64 indices; threads and gathers as in pooling.cu.
// Between equals the first in reading order wins, and the last NaN over all. A pixel of grad_input asks the windows that
// cover it whether their index is its own: windows overlap in a pixel or two, so it asks few.
// Floor: every tensor read or written once, at the memory's bandwidth; the indices are most of it.
#include "pooling_window.cuh"

namespace dlkern::cuda {
namespace {

template <class T, int VEC>
__global__ void adaptive_max_pool2d_forward_kernel(Pixels outputs, PoolGeometry g, const T* input, T* output,
                                                   int64_t* indices) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= outputs.count) return;
  const auto at = outputs.at(item);
  const int64_t channel = static_cast<int64_t>(at.pack) * VEC;
  const Window rows = window<true>(g.height, static_cast<int>(at.y));
  const Window columns = window<true>(g.width, static_cast<int>(at.x));

  float best[VEC];
  int where[VEC];  // the first one stands where all are -inf
#pragma unroll
  for (int v = 0; v < VEC; v++) best[v] = -INFINITY, where[v] = rows.begin * g.width.size + columns.begin;
  for (int h = rows.begin; h < rows.end; h++) {
    for (int w = columns.begin; w < columns.end; w++) {
      const auto pack =
          load_pack<T, VEC>(input + pixel_offset(at.outer, h, w, g.height.size, g.width.size, g.inner) + channel);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        const float value = to_float(pack.at[v]);
        if (value > best[v] || value != value) best[v] = value, where[v] = h * g.width.size + w;
      }
    }
  }

  const int64_t to = pixel_offset(at.outer, static_cast<int>(at.y), static_cast<int>(at.x), g.height.out_size,
                                  g.width.out_size, g.inner) +
                     channel;
  Pack<T, VEC> result;
  Pack<int64_t, VEC> places;
#pragma unroll
  for (int v = 0; v < VEC; v++) result.at[v] = from_float<T>(best[v]), places.at[v] = where[v];
  store_pack(output + to, result);
  store_pack(indices + to, places);
}

template <class T, int VEC>
__global__ void adaptive_max_pool2d_backward_kernel(Pixels inputs, PoolGeometry g, const T* grad_output,
                                                    const int64_t* indices, T* grad_input) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= inputs.count) return;
  const auto at = inputs.at(item);
  const int64_t channel = static_cast<int64_t>(at.pack) * VEC;
  const int h = static_cast<int>(at.y), w = static_cast<int>(at.x);
  const int64_t self = static_cast<int64_t>(h) * g.width.size + w;
  const Covering rows = covering<true>(g.height, h), columns = covering<true>(g.width, w);

  float sum[VEC] = {};
  for (int oh = rows.first; oh <= rows.last; oh++) {
    for (int ow = columns.first; ow <= columns.last; ow++) {
      const int64_t from = pixel_offset(at.outer, oh, ow, g.height.out_size, g.width.out_size, g.inner) + channel;
      const auto grad = load_pack<T, VEC>(grad_output + from);
      const auto winner = load_pack<int64_t, VEC>(indices + from);
#pragma unroll
      for (int v = 0; v < VEC; v++) sum[v] += winner.at[v] == self ? to_float(grad.at[v]) : 0.0f;
    }
  }
  Pack<T, VEC> result;
#pragma unroll
  for (int v = 0; v < VEC; v++) result.at[v] = from_float<T>(sum[v]);
  store_pack(grad_input + pixel_offset(at.outer, h, w, g.height.size, g.width.size, g.inner) + channel, result);
}

}  // namespace

// ---- Launchers ----

void adaptive_max_pool2d_forward(Element element, const PoolGeometry& geometry, const void* input, void* output,
                                 int64_t* indices, void* stream) {
  with_pack(element, geometry.inner, [&](auto* type, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int VEC = decltype(vec)::value;
    for_output_pixels(geometry, VEC, [&](const Pixels& pixels, int64_t first) {
      DLKERN_LAUNCH((adaptive_max_pool2d_forward_kernel<T, VEC>), blocks_for(pixels), kThreads, 0, stream, pixels,
                    geometry, from_input(static_cast<const T*>(input), geometry, first),
                    from_output(static_cast<T*>(output), geometry, first), from_output(indices, geometry, first));
    });
  });
}

void adaptive_max_pool2d_backward(Element element, const PoolGeometry& geometry, const void* grad_output,
                                  const int64_t* indices, void* grad_input, void* stream) {
  with_pack(element, geometry.inner, [&](auto* type, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int VEC = decltype(vec)::value;
    for_input_pixels(geometry, VEC, [&](const Pixels& pixels, int64_t first) {
      DLKERN_LAUNCH((adaptive_max_pool2d_backward_kernel<T, VEC>), blocks_for(pixels), kThreads, 0, stream, pixels,
                    geometry, from_output(static_cast<const T*>(grad_output), geometry, first),
                    from_output(indices, geometry, first), from_input(static_cast<T*>(grad_input), geometry, first));
    });
  });
}

}  // namespace dlkern::cuda

// Max, average and adaptive average pooling, forward and backward; bfloat16 and float16 are summed in float.
// A thread makes the neighbouring channels that fill 16 bytes (channels_last) or one element (contiguous) of one pixel
// of the result. The backward gathers: each pixel of grad_input asks the windows that cover it, in a fixed order, so
// there are no atomics and the same bits every run. The max keeps one byte a window for the backward, its offset in
// the window. Floor: every tensor read or written once, at the memory's bandwidth.
#include "pooling_window.cuh"

namespace dlkern::cuda {
namespace {

DLKERN_DEVICE float divisor(const AverageRule& rule, const Window& h, const Window& w) {
  if (rule.divisor_override != 0) return static_cast<float>(rule.divisor_override);
  if (rule.count_include_pad) return static_cast<float>(static_cast<int64_t>(h.padded) * w.padded);
  return static_cast<float>(static_cast<int64_t>(h.end - h.begin) * (w.end - w.begin));
}

template <class T, int VEC, PoolIndices INDICES>
__global__ void max_pool2d_forward_kernel(Pixels outputs, PoolGeometry g, const T* input, T* output, void* indices) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= outputs.count) return;
  const auto at = outputs.at(item);
  const int64_t channel = static_cast<int64_t>(at.pack) * VEC;
  const int h0 = static_cast<int>(at.y) * g.height.stride - g.height.padding;
  const int w0 = static_cast<int>(at.x) * g.width.stride - g.width.padding;
  const int r0 = h0 < 0 ? (-h0 + g.height.dilation - 1) / g.height.dilation : 0;
  const int s0 = w0 < 0 ? (-w0 + g.width.dilation - 1) / g.width.dilation : 0;

  // The offset in the window, or in the plane from the window's first pixel inside: numbers of as many pixels as are
  // looked at, however far a window reaches.
  const auto place = [&](int r, int s) {
    return INDICES == PoolIndices::flat
               ? static_cast<uint32_t>((r - r0) * g.height.dilation) * g.width.size + (s - s0) * g.width.dilation
               : static_cast<uint32_t>(r) * g.width.kernel + s;
  };
  float best[VEC];
  uint32_t where[VEC];  // the first one inside stands where all are -inf
#pragma unroll
  for (int v = 0; v < VEC; v++) best[v] = -INFINITY, where[v] = place(r0, s0);
  for (int r = r0; r < g.height.kernel; r++) {
    const int h = h0 + r * g.height.dilation;
    if (h >= g.height.size) break;
    for (int s = s0; s < g.width.kernel; s++) {
      const int w = w0 + s * g.width.dilation;
      if (w >= g.width.size) break;
      const auto pack =
          load_pack<T, VEC>(input + pixel_offset(at.outer, h, w, g.height.size, g.width.size, g.inner) + channel);
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        const float value = to_float(pack.at[v]);
        if (value > best[v] || value != value) best[v] = value, where[v] = place(r, s);  // NaN wins
      }
    }
  }

  const int64_t to = pixel_offset(at.outer, static_cast<int>(at.y), static_cast<int>(at.x), g.height.out_size,
                                  g.width.out_size, g.inner) +
                     channel;
  Pack<T, VEC> result;
#pragma unroll
  for (int v = 0; v < VEC; v++) result.at[v] = from_float<T>(best[v]);
  store_pack(output + to, result);
  if (INDICES == PoolIndices::window_offset) {
    Pack<uint8_t, VEC> offsets;
#pragma unroll
    for (int v = 0; v < VEC; v++) offsets.at[v] = static_cast<uint8_t>(where[v]);
    store_pack(static_cast<uint8_t*>(indices) + to, offsets);
  }
  if (INDICES == PoolIndices::flat) {
    const int64_t first = static_cast<int64_t>(h0 + r0 * g.height.dilation) * g.width.size + w0 + s0 * g.width.dilation;
#pragma unroll
    for (int v = 0; v < VEC; v++) static_cast<int64_t*>(indices)[to + v] = first + where[v];
  }
}

template <class T, int VEC, class INDEX>
__global__ void max_pool2d_backward_kernel(Pixels inputs, PoolGeometry g, const T* grad_output, const INDEX* indices,
                                           T* grad_input) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= inputs.count) return;
  const auto at = inputs.at(item);
  const int64_t channel = static_cast<int64_t>(at.pack) * VEC;
  const int h = static_cast<int>(at.y), w = static_cast<int>(at.x);
  const Covering rows = covering_windows(g.height, h), columns = covering_windows(g.width, w);

  float sum[VEC] = {};
  for (int oh = rows.first; oh <= rows.last; oh++) {
    const int down = h + g.height.padding - oh * g.height.stride;  // r * dilation
    if (down % g.height.dilation != 0) continue;
    for (int ow = columns.first; ow <= columns.last; ow++) {
      const int across = w + g.width.padding - ow * g.width.stride;
      if (across % g.width.dilation != 0) continue;
      const int64_t from = pixel_offset(at.outer, oh, ow, g.height.out_size, g.width.out_size, g.inner) + channel;
      const auto grad = load_pack<T, VEC>(grad_output + from);
      // What this window holds if its maximum is this pixel.
      const INDEX self = sizeof(INDEX) == 1
                             ? static_cast<INDEX>(down / g.height.dilation * g.width.kernel + across / g.width.dilation)
                             : static_cast<INDEX>(static_cast<int64_t>(h) * g.width.size + w);
      const auto index = load_pack<INDEX, VEC>(indices + from);
#pragma unroll
      for (int v = 0; v < VEC; v++) sum[v] += index.at[v] == self ? to_float(grad.at[v]) : 0.0f;
    }
  }
  Pack<T, VEC> result;
#pragma unroll
  for (int v = 0; v < VEC; v++) result.at[v] = from_float<T>(sum[v]);
  store_pack(grad_input + pixel_offset(at.outer, h, w, g.height.size, g.width.size, g.inner) + channel, result);
}

template <class T, int VEC, bool ADAPTIVE>
__global__ void avg_pool2d_forward_kernel(Pixels outputs, PoolGeometry g, AverageRule rule, const T* input, T* output) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= outputs.count) return;
  const auto at = outputs.at(item);
  const int64_t channel = static_cast<int64_t>(at.pack) * VEC;
  const Window rows = window<ADAPTIVE>(g.height, static_cast<int>(at.y));
  const Window columns = window<ADAPTIVE>(g.width, static_cast<int>(at.x));

  float sum[VEC] = {};
  for (int h = rows.begin; h < rows.end; h++) {
    float row_sum[VEC] = {};  // row by row, so that the rounding errors of a large window stay small
    for (int w = columns.begin; w < columns.end; w++) {
      const auto pack =
          load_pack<T, VEC>(input + pixel_offset(at.outer, h, w, g.height.size, g.width.size, g.inner) + channel);
#pragma unroll
      for (int v = 0; v < VEC; v++) row_sum[v] += to_float(pack.at[v]);
    }
#pragma unroll
    for (int v = 0; v < VEC; v++) sum[v] += row_sum[v];
  }
  const bool empty = rows.begin >= rows.end || columns.begin >= columns.end;  // a window of padding alone
  const float by = empty ? 1.0f : divisor(rule, rows, columns);
  Pack<T, VEC> result;
#pragma unroll
  for (int v = 0; v < VEC; v++) result.at[v] = from_float<T>(sum[v] / by);
  store_pack(output +
                 pixel_offset(at.outer, static_cast<int>(at.y), static_cast<int>(at.x), g.height.out_size,
                              g.width.out_size, g.inner) +
                 channel,
             result);
}

template <class T, int VEC, bool ADAPTIVE>
__global__ void avg_pool2d_backward_kernel(Pixels inputs, PoolGeometry g, AverageRule rule, const T* grad_output,
                                           T* grad_input) {
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= inputs.count) return;
  const auto at = inputs.at(item);
  const int64_t channel = static_cast<int64_t>(at.pack) * VEC;
  const int h = static_cast<int>(at.y), w = static_cast<int>(at.x);
  const Covering rows = covering<ADAPTIVE>(g.height, h), columns = covering<ADAPTIVE>(g.width, w);

  float sum[VEC] = {};
  for (int oh = rows.first; oh <= rows.last; oh++) {
    const Window window_rows = window<ADAPTIVE>(g.height, oh);
    for (int ow = columns.first; ow <= columns.last; ow++) {
      const float by = divisor(rule, window_rows, window<ADAPTIVE>(g.width, ow));
      const auto grad = load_pack<T, VEC>(
          grad_output + pixel_offset(at.outer, oh, ow, g.height.out_size, g.width.out_size, g.inner) + channel);
#pragma unroll
      for (int v = 0; v < VEC; v++) sum[v] += to_float(grad.at[v]) / by;
    }
  }
  Pack<T, VEC> result;
#pragma unroll
  for (int v = 0; v < VEC; v++) result.at[v] = from_float<T>(sum[v]);
  store_pack(grad_input + pixel_offset(at.outer, h, w, g.height.size, g.width.size, g.inner) + channel, result);
}

}  // namespace

// ---- Launchers ----

void max_pool2d_forward(Element element, const PoolGeometry& geometry, const void* input, void* output,
                        PoolIndices kind, void* indices, void* stream) {
  with_pack(element, geometry.inner, [&](auto* type, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int VEC = decltype(vec)::value;
    const auto run = [&](auto kernel) {
      for_output_pixels(geometry, VEC, [&](const Pixels& pixels, int64_t first) {
        void* places = indices;
        if (kind == PoolIndices::window_offset) places = from_output(static_cast<uint8_t*>(indices), geometry, first);
        if (kind == PoolIndices::flat) places = from_output(static_cast<int64_t*>(indices), geometry, first);
        launch("max_pool2d_forward_kernel", kernel, blocks_for(pixels), dim3(kThreads), 0, stream, false, pixels,
               geometry, from_input(static_cast<const T*>(input), geometry, first),
               from_output(static_cast<T*>(output), geometry, first), places);
      });
    };
    if (kind == PoolIndices::none) run(max_pool2d_forward_kernel<T, VEC, PoolIndices::none>);
    if (kind == PoolIndices::window_offset) run(max_pool2d_forward_kernel<T, VEC, PoolIndices::window_offset>);
    if (kind == PoolIndices::flat) run(max_pool2d_forward_kernel<T, VEC, PoolIndices::flat>);
  });
}

void max_pool2d_backward(Element element, const PoolGeometry& geometry, const void* grad_output, PoolIndices kind,
                         const void* indices, void* grad_input, void* stream) {
  with_pack(element, geometry.inner, [&](auto* type, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int VEC = decltype(vec)::value;
    const auto run = [&](auto kernel, auto* index_type) {
      using INDEX = std::remove_pointer_t<decltype(index_type)>;
      for_input_pixels(geometry, VEC, [&](const Pixels& pixels, int64_t first) {
        launch("max_pool2d_backward_kernel", kernel, blocks_for(pixels), dim3(kThreads), 0, stream, false, pixels,
               geometry, from_output(static_cast<const T*>(grad_output), geometry, first),
               from_output(static_cast<const INDEX*>(indices), geometry, first),
               from_input(static_cast<T*>(grad_input), geometry, first));
      });
    };
    if (kind == PoolIndices::window_offset)
      run(max_pool2d_backward_kernel<T, VEC, uint8_t>, static_cast<uint8_t*>(nullptr));
    else
      run(max_pool2d_backward_kernel<T, VEC, int64_t>, static_cast<int64_t*>(nullptr));
  });
}

void avg_pool2d_forward(Element element, const PoolGeometry& geometry, const AverageRule& rule, const void* input,
                        void* output, void* stream) {
  with_pack(element, geometry.inner, [&](auto* type, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int VEC = decltype(vec)::value;
    const auto run = [&](auto kernel) {
      for_output_pixels(geometry, VEC, [&](const Pixels& pixels, int64_t first) {
        launch("avg_pool2d_forward_kernel", kernel, blocks_for(pixels), dim3(kThreads), 0, stream, false, pixels,
               geometry, rule, from_input(static_cast<const T*>(input), geometry, first),
               from_output(static_cast<T*>(output), geometry, first));
      });
    };
    if (rule.adaptive)
      run(avg_pool2d_forward_kernel<T, VEC, true>);
    else
      run(avg_pool2d_forward_kernel<T, VEC, false>);
  });
}

void avg_pool2d_backward(Element element, const PoolGeometry& geometry, const AverageRule& rule,
                         const void* grad_output, void* grad_input, void* stream) {
  with_pack(element, geometry.inner, [&](auto* type, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int VEC = decltype(vec)::value;
    const auto run = [&](auto kernel) {
      for_input_pixels(geometry, VEC, [&](const Pixels& pixels, int64_t first) {
        launch("avg_pool2d_backward_kernel", kernel, blocks_for(pixels), dim3(kThreads), 0, stream, false, pixels,
               geometry, rule, from_output(static_cast<const T*>(grad_output), geometry, first),
               from_input(static_cast<T*>(grad_input), geometry, first));
      });
    };
    if (rule.adaptive)
      run(avg_pool2d_backward_kernel<T, VEC, true>);
    else
      run(avg_pool2d_backward_kernel<T, VEC, false>);
  });
}

}  // namespace dlkern::cuda

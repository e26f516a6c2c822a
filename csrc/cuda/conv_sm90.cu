// conv2d and its gradients in bfloat16 and float16 on Hopper, as products that are never laid out: tensor copies in
// im2col mode bring each filter tap's pixels, padding as zeros, straight into the tiles that wgmma multiplies
// (wgmma_tile.cuh).
//   forward          rows: output pixels,    columns: output channels,   k: taps x input channels
//   input gradient   rows: input pixels,     columns: input channels,    k: taps, from the last, x output channels
//   weight gradient  rows: output channels,  columns: taps x channels,   k: output pixels, cut into parts
// conv.cu serves where this does not: groups, channels that are no multiple of 8, input gradients with a stride, filters
// beyond what a tensor map can tell, few tiles, other GPUs.
// Floor: 2 N P Q K R S C operations at the tensor cores' rate, or the tensors once over the memory's bandwidth.
#include "activation.cuh"
#include "conv.h"
#include "tile_store.cuh"
#include "wgmma_tile.cuh"

namespace dlkern::cuda {

// How the im2col operand's pixels and taps are numbered.
struct Window {
  int height, width;  // pixels of an image
  int first_h, first_w, stride_h, stride_w, dilation_h, dilation_w;
  int taps, taps_w;

  DLKERN_DEVICE void start(unsigned pixel, int& w, int& h, int& n) const {
    const unsigned row = pixel / static_cast<unsigned>(width);
    w = static_cast<int>(pixel % static_cast<unsigned>(width)) * stride_w + first_w;
    h = static_cast<int>(row % static_cast<unsigned>(height)) * stride_h + first_h;
    n = static_cast<int>(row / static_cast<unsigned>(height));
  }
};

namespace {

enum class Pass { forward, backward_input, backward_weight };
template <Pass PASS>
constexpr bool kWeight = PASS == Pass::backward_weight;
template <Pass PASS>
constexpr bool kBFirst = PASS != Pass::forward;

struct Args {
  TensorMap a, b;
  Window window;
  TileGrid grid;
  int channel_blocks;  // of k, 64 each; of the weight gradient's columns, a tile each
  int steps;  // where k is not cut
  unsigned rows, columns;  // of the result; columns of one tap
  unsigned row_middle, row_last;  // digits of a row
  int64_t step_n, step_h, step_w, step_c;  // of the result: of a row's digits and of a column
  int64_t tap_h, tap_w;  // of the weight gradient's taps
  void* result;
  const void *bias, *residual;
  int activation;
  unsigned pixels, part_length;
  int64_t part_stride;  // of the parts, floats; 0: not cut
};

// One block makes one tile of the result, or of a part (blockIdx.y).
template <class T, class SHAPE, Pass PASS>
__global__ void __launch_bounds__(SHAPE::kThreads, 1) conv2d_sm90_kernel(const __grid_constant__ Args args) {
#ifdef DLKERN_HOPPER
  DLKERN_DYNAMIC_SHARED(shared);
  constexpr int kPanels = SHAPE::kBlockN / 64;
  const Window& window = args.window;
  int row_tile, column_tile, tap = 0;
  args.grid.tile_of(static_cast<int>(blockIdx.x), row_tile, column_tile);
  if (kWeight<PASS>) {
    tap = column_tile / args.channel_blocks;
    column_tile %= args.channel_blocks;
  }
  const int row_start = row_tile * SHAPE::kBlockM, column_start = column_tile * SHAPE::kBlockN;
  const unsigned first_pixel = blockIdx.y * args.part_length;
  int steps = args.steps;
  if (kWeight<PASS>) {
    const unsigned left = args.pixels - first_pixel;
    steps = static_cast<int>(((left < args.part_length ? left : args.part_length) + 63) / 64);
  }
  int w, h, n;
  window.start(static_cast<unsigned>(row_start), w, h, n);

  wgmma_tile<SHAPE, kWeight<PASS>, kBFirst<PASS>>(
      reinterpret_cast<T*>(shared), steps,
      [&](T* a_tile, T* b_tile, uint64_t* barrier, int step) {
        if (kWeight<PASS>) {
          const unsigned pixel = first_pixel + static_cast<unsigned>(step) * 64;
          window.start(pixel, w, h, n);
#pragma unroll
          for (int i = 0; i < SHAPE::kBlockM / 64; i++)
            tensor_copy_2d(a_tile + i * SHAPE::kPanel, args.a, barrier, row_start + 64 * i, static_cast<int>(pixel));
#pragma unroll
          for (int i = 0; i < kPanels; i++) {
            tensor_copy_im2col(b_tile + i * SHAPE::kPanel, args.b, barrier, column_start + 64 * i, w, h, n,
                               tap % window.taps_w * window.dilation_w, tap / window.taps_w * window.dilation_h);
          }
          return;
        }
        const int here = step / args.channel_blocks, channel = step % args.channel_blocks * 64;
        tensor_copy_im2col(a_tile, args.a, barrier, channel, w, h, n, here % window.taps_w * window.dilation_w,
                           here / window.taps_w * window.dilation_h);
        if (PASS == Pass::forward) {
          tensor_copy_3d(b_tile, args.b, barrier, channel, column_start, here);
        } else {
#pragma unroll
          for (int i = 0; i < kPanels; i++) {
            tensor_copy_3d(b_tile + i * SHAPE::kPanel, args.b, barrier, column_start + 64 * i, channel,
                           window.taps - 1 - here);
          }
        }
      },
      [](const T*) {},
      [&](const WgmmaSum<SHAPE>& sum) {
        const int first_row = WgmmaSum<SHAPE>::first_row();
        int64_t at[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const unsigned row = static_cast<unsigned>(row_start + first_row + 8 * i), digits = row / args.row_last;
          at[i] = row < args.rows ? digits / args.row_middle * args.step_n + digits % args.row_middle * args.step_h +
                                        row % args.row_last * args.step_w
                                  : -1;
        }
        const int64_t of_tap = tap / window.taps_w * args.tap_h + tap % window.taps_w * args.tap_w;
        const T *const bias = static_cast<const T*>(args.bias), *const residual = static_cast<const T*>(args.residual);
        sum.for_each_pair([&](int r, int c, float first, float second) {
          const int64_t row_at = at[r == first_row ? 0 : 1];
          const unsigned column = static_cast<unsigned>(column_start + c);
          if (row_at < 0 || column >= args.columns) return;
          const bool has_second = column + 1 < args.columns;
          const int64_t first_at = row_at + of_tap + column * args.step_c, second_at = first_at + args.step_c;
          if (kWeight<PASS> && args.part_stride) {
            float* const part = static_cast<float*>(args.result) + blockIdx.y * args.part_stride;
            return store_columns(part, first_at, second_at, has_second, first, second);
          }
          if (!kWeight<PASS>) {
            if (bias) {
              first += to_float(bias[column]);
              if (has_second) second += to_float(bias[column + 1]);
            }
            if (residual) {
              first += to_float(residual[first_at]);
              if (has_second) second += to_float(residual[second_at]);
            }
            first = activated(first, args.activation), second = activated(second, args.activation);
          }
          store_columns(static_cast<T*>(args.result), first_at, second_at, has_second, first, second);
        });
      });
#endif
}

// ---- Launchers ----

using Wide = WgmmaShape<256, 4>;
using Narrow = WgmmaShape<128, 4>;
using Slim = WgmmaShape<64, 6>;

bool is_dense(const ConvTensor& x, int64_t channels, int height, int width) {
  return x.c == 1 && x.w == channels && x.h == width * x.w && x.n == height * x.h;
}

// Whether numbers, and what a tensor map tells of windows, fit; before any pass.
bool fits(Element element, const ConvGeometry& g) {
  const auto axis = [](int filter, int stride, int pad, int dilation) {
    const int64_t reach = int64_t{filter - 1} * dilation;
    return stride <= 8 && pad <= 127 && reach <= 255 && reach - pad <= 127;
  };
  constexpr int64_t kMost = int64_t{1} << 30;
  return is_16_bit(element) && g.groups == 1 && g.c % 8 == 0 && g.k % 8 == 0 && g.c > 0 &&
         axis(g.r, g.stride_h, g.pad_h, g.dilation_h) && axis(g.s, g.stride_w, g.pad_w, g.dilation_w) &&
         g.n * g.h * g.w < kMost && g.n * g.p * g.q < kMost && g.c < kMost && g.k < kMost;
}

// im2col of images [n, height, width, channels], as the `window` goes over them.
bool make_window_map(TensorMap& map, const ConvTensor& x, const Window& window, int64_t images, int64_t channels,
                     int height, int width, int pixels) {
  const int64_t size[4] = {channels, width, height, images}, stride[3] = {x.w, x.h, x.n};
  const int lower[2] = {window.first_w, window.first_h};
  const int upper[2] = {window.first_w + (window.width - 1) * window.stride_w - (width - 1),
                        window.first_h + (window.height - 1) * window.stride_h - (height - 1)};
  const int step[2] = {window.stride_w, window.stride_h};
  return make_im2col_map(map, x.data, size, stride, lower, upper, step, pixels);
}

// The weight [k, r, s, c], rows of 64 channels: box_rows filters of one tap.
bool make_weight_map(TensorMap& map, const ConvTensor& w, const ConvGeometry& g, int box_rows) {
  const int64_t size[3] = {g.c, g.k, int64_t{g.r} * g.s}, stride[2] = {w.n, w.w};
  return make_tiled_map(map, w.data, 3, size, stride, box_rows);
}

Window window_of(const ConvGeometry& g) {
  return {g.p, g.q, -g.pad_h, -g.pad_w, g.stride_h, g.stride_w, g.dilation_h, g.dilation_w, g.r * g.s, g.s};
}

template <class SHAPE, Pass PASS>
bool run(Element element, Args& args, int taps, int parts, void* stream) {
  const int64_t rows = ceil_div(args.rows, SHAPE::kBlockM), columns = ceil_div(args.columns, SHAPE::kBlockN) * taps;
  if (rows * columns * TileGrid::kBand >= int64_t{1} << 31) return false;
  args.grid = {static_cast<int>(rows), static_cast<int>(columns)};
  with_16_bit_type(element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("conv2d_sm90_kernel", conv2d_sm90_kernel<T, SHAPE, PASS>, grid_of(rows * columns, parts),
           dim3(SHAPE::kThreads), SHAPE::kSharedBytes, stream, false, args);
  });
  return true;
}

// Width of the tiles; 0 where there would be too few of them to fill half the GPU.
int width_of(int64_t rows, int64_t columns, int64_t times) {
  const auto tiles = [&](int width) { return ceil_div(rows, 128) * ceil_div(columns, width) * times; };
  const int width = columns <= 64 ? 64 : tiles(256) >= multiprocessors() && columns > 128 ? 256 : 128;
  return tiles(width) < multiprocessors() / 2 ? 0 : width;
}

template <Pass PASS>
bool run_pixels(Element element, Args& args, const ConvTensor& x, const ConvTensor& w, const ConvGeometry& g,
                int height, int width, int64_t channels, void* stream) {
  const int tile = width_of(args.rows, args.columns, 1);
  if (tile == 0 || !is_dense(x, channels, height, width) || !is_dense(w, g.c, g.r, g.s)) return false;
  if (!make_window_map(args.a, x, args.window, g.n, channels, height, width, 128)) return false;
  if (!make_weight_map(args.b, w, g, kBFirst<PASS> ? 64 : tile)) return false;
  args.channel_blocks = static_cast<int>(ceil_div(channels, 64));
  args.steps = args.window.taps * args.channel_blocks;
  return tile == 64    ? run<Slim, PASS>(element, args, 1, 1, stream)
         : tile == 128 ? run<Narrow, PASS>(element, args, 1, 1, stream)
                       : run<Wide, PASS>(element, args, 1, 1, stream);
}

void set_result(Args& args, const ConvResult& y, int height, int width) {
  args.result = y.data;
  args.row_middle = static_cast<unsigned>(height), args.row_last = static_cast<unsigned>(width);
  args.step_n = y.n, args.step_h = y.h, args.step_w = y.w, args.step_c = y.c;
}

}  // namespace

bool conv2d_forward_sm90(Element element, const ConvGeometry& g, const ConvTensor& x, const ConvTensor& w,
                         const void* bias, const void* residual, int activation, const ConvResult& y, void* stream) {
  if (!fits(element, g) || !runs_on_hopper(conv2d_sm90_kernel<bf16, Narrow, Pass::forward>)) return false;
  Args args{};
  args.window = window_of(g);
  args.rows = static_cast<unsigned>(g.n * g.p * g.q), args.columns = static_cast<unsigned>(g.k);
  args.bias = bias, args.residual = residual;
  args.activation = activation;
  set_result(args, y, g.p, g.q);
  return run_pixels<Pass::forward>(element, args, x, w, g, g.h, g.w, g.c, stream);
}

// An input pixel meets tap r at output row h + pad - r * dilation: a forward pass over grad_output that goes through the
// taps backwards.
bool conv2d_backward_input_sm90(Element element, const ConvGeometry& g, const ConvTensor& dy, const ConvTensor& w,
                                const void* bias, const ConvResult& dx, void* stream) {
  if (!fits(element, g) || g.stride_h != 1 || g.stride_w != 1) return false;
  if (!runs_on_hopper(conv2d_sm90_kernel<bf16, Narrow, Pass::backward_input>)) return false;
  Args args{};
  args.window = window_of(g);
  args.window.height = g.h, args.window.width = g.w;
  args.window.first_h = g.pad_h - (g.r - 1) * g.dilation_h, args.window.first_w = g.pad_w - (g.s - 1) * g.dilation_w;
  args.rows = static_cast<unsigned>(g.n * g.h * g.w), args.columns = static_cast<unsigned>(g.c);
  args.bias = bias;
  set_result(args, dx, g.h, g.w);
  return run_pixels<Pass::backward_input>(element, args, dy, w, g, g.p, g.q, g.k, stream);
}

int64_t conv2d_weight_tiles_sm90(Element element, const ConvGeometry& g) {
  if (!fits(element, g) || !runs_on_hopper(conv2d_sm90_kernel<bf16, Narrow, Pass::backward_weight>)) return 0;
  return ceil_div(g.k, 128) * ceil_div(g.c, g.c <= 64 ? 64 : 128) * g.r * g.s;
}

bool conv2d_backward_weight_sm90(Element element, const ConvGeometry& g, const ConvTensor& dy, const ConvTensor& x,
                                 float* parts, int count, int64_t length, const ConvResult& dw, void* stream) {
  if (conv2d_weight_tiles_sm90(element, g) == 0 || !is_dense(dy, g.k, g.p, g.q) || !is_dense(x, g.c, g.h, g.w))
    return false;
  const int taps = g.r * g.s, tile = width_of(g.k, g.c, int64_t{taps} * count);
  if (tile == 0) return false;
  Args args{};
  args.window = window_of(g);
  args.rows = static_cast<unsigned>(g.k), args.columns = static_cast<unsigned>(g.c);
  args.pixels = static_cast<unsigned>(g.n * g.p * g.q), args.part_length = static_cast<unsigned>(length);
  args.row_middle = args.row_last = 1;
  args.step_n = dw.n, args.step_c = dw.c, args.tap_h = dw.h, args.tap_w = dw.w;
  args.result = parts ? parts : dw.data;
  args.part_stride = parts ? g.k * g.c * taps : 0;
  args.channel_blocks = static_cast<int>(ceil_div(g.c, tile));
  const int64_t size[3] = {g.k, args.pixels, 1}, stride[2] = {g.k, 0};
  if (!make_tiled_map(args.a, dy.data, 2, size, stride, 64)) return false;
  if (!make_window_map(args.b, x, args.window, g.n, g.c, g.h, g.w, 64)) return false;
  return tile == 64    ? run<Slim, Pass::backward_weight>(element, args, taps, count, stream)
         : tile == 128 ? run<Narrow, Pass::backward_weight>(element, args, taps, count, stream)
                       : run<Wide, Pass::backward_weight>(element, args, taps, count, stream);
}

}  // namespace dlkern::cuda

// linear and its gradients in bfloat16 and float16 on Hopper: tensor copies and wgmma (wgmma_tile.cuh), float sums.
// Every sum has a fixed order; bias, activation and bias gradient on the way, as in linear.cu, which serves where this does not: other GPUs, rows that are no multiple of 16 bytes, few tiles.
// Floor: 2 * rows * in_features * out_features operations at the tensor cores' rate.
#include "activation.cuh"
#include "linear.h"
#include "tile_store.cuh"
#include "wgmma_tile.cuh"

namespace dlkern::cuda {
namespace {

using Wide = WgmmaShape<256, 4>;
using Narrow = WgmmaShape<128, 4>;

enum class Pass { forward, backward_input, backward_weight };
template <Pass PASS>
constexpr bool kAFirst = PASS == Pass::backward_weight;
template <Pass PASS>
constexpr bool kBFirst = PASS != Pass::forward;

struct Args {
  TensorMap a, b;
  const void* bias;
  void *result, *grad_bias;
  int64_t rows, columns;  // of the result
  TileGrid grid;
  int steps, activation;
};

// Starts the copies of an operand's tile: OUTER rows from `outer`, 64 of k.
template <bool FIRST, int OUTER, class T>
DLKERN_DEVICE void copy_operand(T* tile, const TensorMap& map, uint64_t* barrier, int outer, int k) {
#pragma unroll
  for (int i = 0; i < WgmmaTile<FIRST, OUTER>::kCopies; i++) {
    if (FIRST)
      tensor_copy_2d(tile + i * 64 * 64, map, barrier, outer + 64 * i, k);
    else
      tensor_copy_2d(tile, map, barrier, k, outer);
  }
}

// One block makes one tile of the result.
template <class T, class SHAPE, Pass PASS>
__global__ void __launch_bounds__(SHAPE::kThreads, 1) linear_sm90_kernel(const __grid_constant__ Args args) {
#ifdef DLKERN_HOPPER
  DLKERN_DYNAMIC_SHARED(shared);
  int row_tile, column_tile;
  args.grid.tile_of(static_cast<int>(blockIdx.x), row_tile, column_tile);
  const int row_start = row_tile * SHAPE::kBlockM, column_start = column_tile * SHAPE::kBlockN;
  // The first column of blocks adds up the columns of grad_output, a thread each.
  const int thread = static_cast<int>(threadIdx.x) - 128;
  const bool sums_bias = PASS == Pass::backward_weight && args.grad_bias && column_tile == 0 && thread >= 0;
  float bias_sum = 0.0f;
  const T* const bias = static_cast<const T*>(args.bias);
  wgmma_tile<SHAPE, kAFirst<PASS>, kBFirst<PASS>>(
      reinterpret_cast<T*>(shared), args.steps,
      [&](T* a_tile, T* b_tile, uint64_t* barrier, int step) {
        copy_operand<kAFirst<PASS>, SHAPE::kBlockM>(a_tile, args.a, barrier, row_start, step * SHAPE::kBlockK);
        copy_operand<kBFirst<PASS>, SHAPE::kBlockN>(b_tile, args.b, barrier, column_start, step * SHAPE::kBlockK);
      },
      [&](const T* a_tile) {
        if (!sums_bias || thread >= SHAPE::kBlockM) return;
        const T* const panel = a_tile + thread / 64 * SHAPE::kPanel;
        const int piece = thread % 64 / 8, within = thread % 8;
#pragma unroll 8
        for (int k = 0; k < SHAPE::kBlockK; k++) bias_sum += to_float(panel[k * 64 + (piece ^ k % 8) * 8 + within]);
      },
      [&](const WgmmaSum<SHAPE>& sum) {
        if (sums_bias && thread < SHAPE::kBlockM && row_start + thread < args.rows)
          static_cast<T*>(args.grad_bias)[row_start + thread] = from_float<T>(bias_sum);
        sum.for_each_pair([&](int r, int c, float first, float second) {
          const int64_t row = row_start + r, column = column_start + c;
          if (PASS == Pass::forward) {
            if (bias && column < args.columns) {
              first += to_float(bias[column]);
              if (column + 1 < args.columns) second += to_float(bias[column + 1]);
            }
            first = activated(first, args.activation), second = activated(second, args.activation);
          }
          store_pair(static_cast<T*>(args.result), args.rows, args.columns, row, column, first, second);
        });
      });
#endif
}

// ---- Launchers ----

// An operand of `outer` rows of the result, stored [outer, k] or, FIRST, [k, outer].
template <bool FIRST, int OUTER>
bool make_map(TensorMap& map, const void* data, int64_t outer, int64_t k) {
  const int64_t size[3] = {FIRST ? outer : k, FIRST ? k : outer, 1}, stride[2] = {size[0], 0};
  return make_tiled_map(map, data, 2, size, stride, WgmmaTile<FIRST, OUTER>::kMapRows);
}

template <class SHAPE, Pass PASS>
bool run(Element element, Args& args, const void* a, const void* b, int64_t k, void* stream) {
  if (!runs_on_hopper(linear_sm90_kernel<bf16, SHAPE, PASS>)) return false;
  if (!make_map<kAFirst<PASS>, SHAPE::kBlockM>(args.a, a, args.rows, k)) return false;
  if (!make_map<kBFirst<PASS>, SHAPE::kBlockN>(args.b, b, args.columns, k)) return false;
  const int64_t row_tiles = ceil_div(args.rows, SHAPE::kBlockM), column_tiles = ceil_div(args.columns, SHAPE::kBlockN);
  if (row_tiles * column_tiles * TileGrid::kBand >= int64_t{1} << 31) return false;
  args.grid = {static_cast<int>(row_tiles), static_cast<int>(column_tiles)};
  args.steps = static_cast<int>(ceil_div(k, SHAPE::kBlockK));
  with_16_bit_type(element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("linear_sm90_kernel", linear_sm90_kernel<T, SHAPE, PASS>, grid_of(row_tiles * column_tiles),
           dim3(SHAPE::kThreads), SHAPE::kSharedBytes, stream, false, args);
  });
  return true;
}

template <Pass PASS>
bool choose(Element element, Args& args, const void* a, const void* b, int64_t k, void* stream) {
  const auto tiles = [&](int width) { return ceil_div(args.rows, 128) * ceil_div(args.columns, width); };
  if (k == 0 || tiles(128) < multiprocessors() / 2) return false;  // small tiles then use more of the GPU
  if (tiles(256) >= multiprocessors()) return run<Wide, PASS>(element, args, a, b, k, stream);
  return run<Narrow, PASS>(element, args, a, b, k, stream);
}

}  // namespace

bool linear_forward_sm90(Element element, const void* input, const void* weight, const void* bias, void* output,
                         int64_t rows, int64_t in_features, int64_t out_features, int activation, void* stream) {
  Args args{};
  args.bias = bias, args.result = output;
  args.rows = rows, args.columns = out_features, args.activation = activation;
  return choose<Pass::forward>(element, args, input, weight, in_features, stream);
}

bool linear_backward_input_sm90(Element element, const void* grad_output, const void* weight, void* grad_input,
                                int64_t rows, int64_t in_features, int64_t out_features, void* stream) {
  Args args{};
  args.result = grad_input, args.rows = rows, args.columns = in_features;
  return choose<Pass::backward_input>(element, args, grad_output, weight, out_features, stream);
}

bool linear_backward_weight_sm90(Element element, const void* grad_output, const void* input, void* grad_weight,
                                 void* grad_bias, int64_t rows, int64_t in_features, int64_t out_features,
                                 void* stream) {
  Args args{};
  args.result = grad_weight, args.grad_bias = grad_bias;
  args.rows = out_features, args.columns = in_features;
  return choose<Pass::backward_weight>(element, args, grad_output, input, rows, stream);
}

}  // namespace dlkern::cuda

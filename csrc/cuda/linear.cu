// linear and its gradients in bfloat16 and float16 on the tensor cores (mma.sync, sm_80 and newer), float sums.
// One block makes one tile of the result over the whole sum, so every result has one fixed order of additions: no
// split, no atomics. Bias and activation are applied, and the bias gradient summed up, on the way: no extra pass.
// Floor: 2 * rows * in_features * out_features operations at the tensor cores' rate.
#include "linear.h"

#include <type_traits>

#include "activation.cuh"
#include "mma_tile.cuh"
#include "pack.cuh"
#include "tile_store.cuh"

namespace dlkern::cuda {
namespace {

using LargeShape = MmaShape<128, 128, 2, 4, 4>;
using SmallShape = MmaShape<64, 64, 2, 2, 4>;

// A block per tile: blockIdx.x counts rows of C, of which there may be more than 65,535 tiles.
template <class SHAPE>
DLKERN_DEVICE int64_t tile_row() {
  return static_cast<int64_t>(blockIdx.x) * SHAPE::kBlockM;
}
template <class SHAPE>
DLKERN_DEVICE int64_t tile_column() {
  return static_cast<int64_t>(blockIdx.y) * SHAPE::kBlockN;
}

// ---- Kernels ----

template <class T>
struct LinearArgs {
  const T *left, *right, *bias;
  T *result, *grad_bias;
  int64_t rows, in_features, out_features;
  int activation;
};

template <class T, class SHAPE, bool ALIGNED>
struct Forward {
  using A = Operand<T, SHAPE::kBlockM, Stored::k_last, ALIGNED, SHAPE::kThreads>;  // input [rows, in_features]
  using B = Operand<T, SHAPE::kBlockN, Stored::k_last, ALIGNED, SHAPE::kThreads>;  // weight [out_features, in_features]
};

template <class T, class SHAPE, bool ALIGNED>
__global__ void __launch_bounds__(SHAPE::kThreads, SHAPE::kBlocks) linear_forward_kernel(LinearArgs<T> args) {
  using Operands = Forward<T, SHAPE, ALIGNED>;
  DLKERN_DYNAMIC_SHARED(shared);
  Accumulator<SHAPE> sum;
  mma_tile<SHAPE>(sum, typename Operands::A{args.left, args.rows, args.in_features},
                  typename Operands::B{args.right, args.out_features, args.in_features}, tile_row<SHAPE>(),
                  tile_column<SHAPE>(), reinterpret_cast<T*>(shared), [](const T*) {});
  sum.for_each_pair([&](int r, int c, float first, float second) {
    const int64_t row = tile_row<SHAPE>() + r, column = tile_column<SHAPE>() + c;
    if (args.bias) {
      if (column < args.out_features) first += to_float(args.bias[column]);
      if (column + 1 < args.out_features) second += to_float(args.bias[column + 1]);
    }
    store_pair(args.result, args.rows, args.out_features, row, column, activated(first, args.activation),
               activated(second, args.activation));
  });
}

template <class T, class SHAPE, bool ALIGNED>
struct BackwardInput {
  using A = Operand<T, SHAPE::kBlockM, Stored::k_last, ALIGNED, SHAPE::kThreads>;  // grad_output [rows, out_features]
  using B =
      Operand<T, SHAPE::kBlockN, Stored::k_first, ALIGNED, SHAPE::kThreads>;  // weight [out_features, in_features]
};

template <class T, class SHAPE, bool ALIGNED>
__global__ void __launch_bounds__(SHAPE::kThreads, SHAPE::kBlocks) linear_backward_input_kernel(LinearArgs<T> args) {
  using Operands = BackwardInput<T, SHAPE, ALIGNED>;
  DLKERN_DYNAMIC_SHARED(shared);
  Accumulator<SHAPE> sum;
  mma_tile<SHAPE>(sum, typename Operands::A{args.left, args.rows, args.out_features},
                  typename Operands::B{args.right, args.in_features, args.out_features}, tile_row<SHAPE>(),
                  tile_column<SHAPE>(), reinterpret_cast<T*>(shared), [](const T*) {});
  sum.for_each_pair([&](int r, int c, float first, float second) {
    store_pair(args.result, args.rows, args.in_features, tile_row<SHAPE>() + r, tile_column<SHAPE>() + c, first,
               second);
  });
}

template <class T, class SHAPE, bool ALIGNED>
struct BackwardWeight {
  using A = Operand<T, SHAPE::kBlockM, Stored::k_first, ALIGNED, SHAPE::kThreads>;  // grad_output [rows, out_features]
  using B = Operand<T, SHAPE::kBlockN, Stored::k_first, ALIGNED, SHAPE::kThreads>;  // input [rows, in_features]
};

template <class T, class SHAPE, bool ALIGNED>
__global__ void __launch_bounds__(SHAPE::kThreads, SHAPE::kBlocks) linear_backward_weight_kernel(LinearArgs<T> args) {
  using Operands = BackwardWeight<T, SHAPE, ALIGNED>;
  DLKERN_DYNAMIC_SHARED(shared);
  Accumulator<SHAPE> sum;
  // The first column of blocks has all of grad_output pass through shared memory: a thread a column adds it up.
  const int column_of_bias = static_cast<int>(threadIdx.x);
  const bool sums_bias = args.grad_bias && blockIdx.y == 0 && column_of_bias < SHAPE::kBlockM;
  float bias = 0.0f;
  mma_tile<SHAPE>(sum, typename Operands::A{args.left, args.out_features, args.rows},
                  typename Operands::B{args.right, args.in_features, args.rows}, tile_row<SHAPE>(),
                  tile_column<SHAPE>(), reinterpret_cast<T*>(shared), [&](const T* grad_output_tile) {
                    if (!sums_bias) return;
#pragma unroll 8
                    for (int k = 0; k < kBlockK<T>; k++)
                      bias += to_float(grad_output_tile[k * Operands::A::TileType::kStride + column_of_bias]);
                  });
  if (sums_bias && tile_row<SHAPE>() + column_of_bias < args.out_features)
    args.grad_bias[tile_row<SHAPE>() + column_of_bias] = from_float<T>(bias);
  sum.for_each_pair([&](int r, int c, float first, float second) {
    store_pair(args.result, args.out_features, args.in_features, tile_row<SHAPE>() + r, tile_column<SHAPE>() + c, first,
               second);
  });
}

constexpr int kElementwiseThreads = 256;

// A thread makes 16 bytes, the last one what is left.
template <class T>
__global__ void __launch_bounds__(kElementwiseThreads)
    activation_backward_kernel(const T* grad_output, const T* output, T* grad_input, int64_t count, int activation) {
  constexpr int kVec = 16 / sizeof(T);
  const auto gradient = [activation](T grad, T out) {
    return from_float<T>(activation_gradient(to_float(grad), to_float(out), activation));
  };
  const int64_t start = (static_cast<int64_t>(blockIdx.x) * kElementwiseThreads + threadIdx.x) * kVec;
  if (start + kVec <= count) {
    const auto grad = load_pack<T, kVec>(grad_output + start), out = load_pack<T, kVec>(output + start);
    Pack<T, kVec> result;
#pragma unroll
    for (int v = 0; v < kVec; v++) result.at[v] = gradient(grad.at[v], out.at[v]);
    store_pack(grad_input + start, result);
  } else {
    for (int64_t i = start; i < count; i++) grad_input[i] = gradient(grad_output[i], output[i]);
  }
}

// ---- Launchers ----

bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <template <class, class, bool> class OPERANDS, class SHAPE, bool ALIGNED, class T>
void launch_tiles(const char* name, void (*kernel)(LinearArgs<T>), int64_t rows, int64_t columns,
                  const LinearArgs<T>& args, void* stream) {
  using Operands = OPERANDS<T, SHAPE, ALIGNED>;
  // One column of blocks at least: a weight without columns still has a bias gradient.
  const int64_t tiles = columns == 0 ? 1 : ceil_div(columns, SHAPE::kBlockN);
  const dim3 grid = grid_of(ceil_div(rows, SHAPE::kBlockM), tiles);
  constexpr int kSharedBytes = mma_shared_bytes<SHAPE, typename Operands::A, typename Operands::B>();
  static_assert(SHAPE::kBlocks * (kSharedBytes + 1024) <=
                164 * 1024);  // an A100's multiprocessor, 1 KB a block its own
  launch(name, kernel, grid, dim3(SHAPE::kThreads), kSharedBytes, stream, false, args);
}

// Large tiles once they fill half the multiprocessors of an A100 or H200; the choice looks at sizes alone.
bool enough_for_large(int64_t rows, int64_t columns) {
  return ceil_div(rows, LargeShape::kBlockM) * ceil_div(columns, LargeShape::kBlockN) >= 64;
}

}  // namespace

// Calls kernel<T, SHAPE, ALIGNED> with the arguments; T is the type that `type` points to.
#define DLKERN_LAUNCH_LINEAR(kernel, OPERANDS, rows, columns, is_aligned)                                            \
  do {                                                                                                               \
    if (!(is_aligned))                                                                                               \
      launch_tiles<OPERANDS, SmallShape, false>(#kernel, kernel<T, SmallShape, false>, rows, columns, args, stream); \
    else if (enough_for_large(rows, columns))                                                                        \
      launch_tiles<OPERANDS, LargeShape, true>(#kernel, kernel<T, LargeShape, true>, rows, columns, args, stream);   \
    else                                                                                                             \
      launch_tiles<OPERANDS, SmallShape, true>(#kernel, kernel<T, SmallShape, true>, rows, columns, args, stream);   \
  } while (0)

void linear_forward(Element element, const void* input, const void* weight, const void* bias, void* output,
                    int64_t rows, int64_t in_features, int64_t out_features, int activation, void* stream) {
  if (linear_forward_sm90(element, input, weight, bias, output, rows, in_features, out_features, activation, stream))
    return;
  const bool aligned = aligned16(input) && aligned16(weight) && in_features % 8 == 0;
  with_16_bit_type(element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const LinearArgs<T> args{static_cast<const T*>(input),
                             static_cast<const T*>(weight),
                             static_cast<const T*>(bias),
                             static_cast<T*>(output),
                             nullptr,
                             rows,
                             in_features,
                             out_features,
                             activation};
    DLKERN_LAUNCH_LINEAR(linear_forward_kernel, Forward, rows, out_features, aligned);
  });
}

void linear_backward_input(Element element, const void* grad_output, const void* weight, void* grad_input, int64_t rows,
                           int64_t in_features, int64_t out_features, void* stream) {
  if (linear_backward_input_sm90(element, grad_output, weight, grad_input, rows, in_features, out_features, stream))
    return;
  const bool aligned = aligned16(grad_output) && aligned16(weight) && in_features % 8 == 0 && out_features % 8 == 0;
  with_16_bit_type(element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const LinearArgs<T> args{static_cast<const T*>(grad_output),
                             static_cast<const T*>(weight),
                             nullptr,
                             static_cast<T*>(grad_input),
                             nullptr,
                             rows,
                             in_features,
                             out_features,
                             0};
    DLKERN_LAUNCH_LINEAR(linear_backward_input_kernel, BackwardInput, rows, in_features, aligned);
  });
}

void linear_backward_weight(Element element, const void* grad_output, const void* input, void* grad_weight,
                            void* grad_bias, int64_t rows, int64_t in_features, int64_t out_features, void* stream) {
  if (linear_backward_weight_sm90(element, grad_output, input, grad_weight, grad_bias, rows, in_features, out_features,
                                  stream))
    return;
  const bool aligned = aligned16(grad_output) && aligned16(input) && in_features % 8 == 0 && out_features % 8 == 0;
  with_16_bit_type(element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const LinearArgs<T> args{static_cast<const T*>(grad_output),
                             static_cast<const T*>(input),
                             nullptr,
                             static_cast<T*>(grad_weight),
                             static_cast<T*>(grad_bias),
                             rows,
                             in_features,
                             out_features,
                             0};
    DLKERN_LAUNCH_LINEAR(linear_backward_weight_kernel, BackwardWeight, out_features, in_features, aligned);
  });
}

void activation_backward(Element element, const void* grad_output, const void* output, void* grad_input, int64_t count,
                         int activation, void* stream) {
  with_type(element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const dim3 grid = grid_of(ceil_div(count, kElementwiseThreads * 16 / static_cast<int>(sizeof(T))));
    DLKERN_LAUNCH(activation_backward_kernel<T>, grid, dim3(kElementwiseThreads), 0, stream,
                  static_cast<const T*>(grad_output), static_cast<const T*>(output), static_cast<T*>(grad_input), count,
                  activation);
  });
}

}  // namespace dlkern::cuda

#pragma once
#include <cstdint>

#include "isa.h"
#include "scalar.h"

namespace dlkern::cpu {
// Elements of many tensors are cut in blocks, so that one pass over all blocks serves all tensors and sums over a block
// do not depend on the number of threads. A tensor's blocks are numbered from first_block on, after the tensor's before.
constexpr int64_t kOptimBlock = 4096;
inline int64_t optim_blocks(int64_t count) { return (count + kOptimBlock - 1) / kOptimBlock; }

template <class T> struct OptimTensors {
  const T* tensors;
  int64_t count;   // of tensors
  int64_t blocks;  // of all together
};

template <class T> struct SgdTensor {
  int64_t first_block, count;
  T* param;
  const T* grad;
  T* momentum_buffer;  // or null
  bool fresh;          // the buffer holds nothing yet: it becomes the gradient
  bool nesterov, maximize;
  double lr, momentum, dampening, weight_decay;
};
template <class T> struct AdamTensor {
  int64_t first_block, count;
  T* param;
  const T* grad;
  T* exp_avg;
  T* exp_avg_sq;
  T* max_exp_avg_sq;  // or null
  bool maximize;
  double param_factor;       // 1 - lr * weight_decay where weight decay is decoupled, else 1
  double weight_decay;       // added to the gradient; 0 where it is decoupled
  double beta1, beta2, eps;
  double step_size;          // lr / (1 - beta1^step)
  double correction_root;    // sqrt(1 - beta2^step)
};
template <class T> struct LarsTensor {
  int64_t first_block, count;
  T* param;
  const T* grad;
  T* momentum_buffer;  // or null
  bool maximize;
  double lr, momentum, weight_decay;
  double trust_coefficient, eps;  // a negative coefficient: the layer's rate is lr itself
};
template <class T> struct GradTensor {
  int64_t first_block, count;
  T* grad;
};

// What grad_sums puts in a block's place.
enum class NormKind { squares, magnitudes, nonzeros, largest, smallest, powers };

#define DLKERN_OPTIM(T)                                                                                            \
  DLKERN_DECLARE(void, sgd, const OptimTensors<SgdTensor<T>>&)                                                     \
  DLKERN_DECLARE(void, adam, const OptimTensors<AdamTensor<T>>&)                                                   \
  /* sums: [2, blocks], room for the squares of parameters and gradients */                                        \
  DLKERN_DECLARE(void, lars, const OptimTensors<LarsTensor<T>>&, double* sums)                                     \
  DLKERN_DECLARE(void, grad_sums, const OptimTensors<GradTensor<T>>&, NormKind kind, double power, double* blocks) \
  DLKERN_DECLARE(void, grad_scale, const OptimTensors<GradTensor<T>>&, double factor)                              \
  DLKERN_DECLARE(void, grad_clamp, const OptimTensors<GradTensor<T>>&, double limit)
DLKERN_OPTIM(float)
DLKERN_OPTIM(double)
DLKERN_OPTIM(bfloat16)
DLKERN_OPTIM(float16)
#undef DLKERN_OPTIM
}  // namespace dlkern::cpu

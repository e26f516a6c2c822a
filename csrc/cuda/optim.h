// Launchers of optim.cu, in plain C++ for the op layer. Each throws std::runtime_error where a launch fails.
#pragma once
#include <cstdint>

#include "element.h"

namespace dlkern::cuda {

// Elements of many tensors are cut in blocks, one a thread block, so that one launch serves many tensors.
constexpr int64_t kOptimBlock = 4096;
constexpr int64_t optim_blocks(int64_t count) { return (count + kOptimBlock - 1) / kOptimBlock; }

// What a tensor's row begins with: `count` elements, more than none, at each address that is not null. The launchers
// fill in the rest.
template <int OPERANDS>
struct OptimTensor {
  void* data[OPERANDS];
  int64_t count;
  int32_t first_block;  // in its launch
  bool aligned;         // all addresses, to 16 bytes
};

struct SgdTensor : OptimTensor<3> {  // parameter, gradient, momentum buffer or null
  bool fresh;                        // the buffer holds nothing yet: it becomes the gradient
  bool nesterov;
  float sign;  // -1 to maximize
  float lr, momentum, kept, weight_decay;  // kept: 1 - dampening
};
struct AdamTensor : OptimTensor<5> {  // parameter, gradient, average, average of squares, its maximum or null
  int32_t counted;                    // where in `corrections` the step's are; -1: they are here
  float sign;
  float param_factor;   // 1 - lr * weight_decay where weight decay is decoupled, else 1
  float weight_decay;   // added to the gradient; 0 where it is decoupled
  float new1;           // 1 - beta1
  float beta2, new2, eps;
  float step_size;        // lr / (1 - beta1^step)
  float correction_root;  // sqrt(1 - beta2^step)
};
struct LarsTensor : OptimTensor<3> {  // parameter, gradient, momentum buffer or null
  float sign;
  double lr, momentum, weight_decay;
  double trust_coefficient, eps;  // a negative coefficient: the layer's rate is lr itself
};
using GradTensor = OptimTensor<1>;

// A step that is counted on the device.
struct AdamStep {
  float* step;
  double lr, beta1, beta2;
  int64_t place;  // in corrections
};

void sgd(Element element, const SgdTensor* tensors, int64_t count, void* stream);

// Counts steps up; corrections[place] = {step_size, correction_root}.
void adam_count(const AdamStep* steps, int64_t count, float* corrections, void* stream);
void adam(Element element, const AdamTensor* tensors, int64_t count, const float* corrections, void* stream);

// parts: [2, blocks of all tensors], room for squares; rates: one a tensor. Both null where no tensor has a coefficient.
void lars(Element element, const LarsTensor* tensors, int64_t count, double* parts, float* rates, void* stream);

// What is summed for a norm, or compared.
enum class NormKind { squares, magnitudes, nonzeros, largest, smallest, powers };

// parts: one a block, of all tensors.
void grad_sums(Element element, const GradTensor* tensors, int64_t count, NormKind kind, double power, double* parts,
               void* stream);
// found[tensor]: 1 where one of its parts is not 0, else 0.
void grad_nonzeros(const GradTensor* tensors, int64_t count, const double* parts, double* found, void* stream);
// From all parts: norm[0], the norm; norm[1], what gradients are to be multiplied by; *total, the norm as `element`.
void grad_norm(Element element, const double* parts, int64_t count, NormKind kind, double power, double max_norm,
               double* norm, void* total, void* stream);
void grad_scale(Element element, const GradTensor* tensors, int64_t count, const double* factor, void* stream);
void grad_clamp(Element element, const GradTensor* tensors, int64_t count, float limit, void* stream);

}  // namespace dlkern::cuda

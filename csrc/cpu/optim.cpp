// Steps of SGD, Adam (AdamW) and LARS, and clipping of gradients: all tensors in one parallel pass over blocks of
// elements, each element read and written once. Norms (LARS, clipping) are a pass before, summed in double by block, and
// blocks in their order, so bits do not depend on the number of threads.
// Floor: bytes of parameters, gradients and state over the bandwidth. Stores past the caches would not save any: each
// line that is written was read before.
#include "optim.h"

#include "parallel.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

constexpr int64_t kGrain = 8;  // blocks worth another thread

// f(tensor, begin, end) on ranges of elements that together cover all tensors, one thread a range.
template <class T, class F> void over_elements(const OptimTensors<T>& all, F&& f) {
  parallel_for(all.blocks, kGrain, [&](int64_t begin, int64_t end) {
    int64_t low = 0, high = all.count;  // the last tensor that starts at or before `begin`
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (all.tensors[middle].first_block <= begin ? low : high) = middle;
    }
    for (const T* tensor = all.tensors + low; begin < end; ++tensor) {
      const int64_t last = smaller(end, tensor->first_block + optim_blocks(tensor->count));
      if (begin < last)
        f(*tensor, (begin - tensor->first_block) * kOptimBlock,
          smaller(tensor->count, (last - tensor->first_block) * kOptimBlock));
      begin = larger(begin, last);
    }
  });
}
// sums[block] = f(tensor, begin, end) for each block.
template <class T, class F> void over_blocks(const OptimTensors<T>& all, double* sums, F&& f) {
  over_elements(all, [&](const T& tensor, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kOptimBlock)
      sums[tensor.first_block + i / kOptimBlock] = f(tensor, i, smaller(end, i + kOptimBlock));
  });
}

template <class T> void sgd_range(const SgdTensor<T>& t, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A lr = static_cast<A>(t.lr), momentum = static_cast<A>(t.momentum), kept = static_cast<A>(1 - t.dampening),
          decay = static_cast<A>(t.weight_decay), sign = t.maximize ? A(-1) : A(1);
  for (int64_t i = begin; i < end; i += kLanes<T>) {
    const int64_t left = end - i;
    prefetch_ahead(t.param + i);
    prefetch_ahead(t.grad + i);
    if (t.momentum_buffer) prefetch_ahead(t.momentum_buffer + i);
    const Vec<T> param = load_some(t.param + i, left);
    Vec<T> grad = load_some(t.grad + i, left) * sign;
    if (decay != 0) grad += decay * param;
    if (t.momentum_buffer) {
      const Vec<T> buffer = t.fresh ? grad : momentum * load_some(t.momentum_buffer + i, left) + kept * grad;
      store_some(t.momentum_buffer + i, buffer, left);
      grad = t.nesterov ? grad + momentum * buffer : buffer;
    }
    store_some(t.param + i, param - lr * grad, left);
  }
}

template <class T> void adam_range(const AdamTensor<T>& t, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A factor = static_cast<A>(t.param_factor), decay = static_cast<A>(t.weight_decay),
          sign = t.maximize ? A(-1) : A(1), new1 = static_cast<A>(1 - t.beta1), beta2 = static_cast<A>(t.beta2),
          new2 = static_cast<A>(1 - t.beta2), eps = static_cast<A>(t.eps), step_size = static_cast<A>(t.step_size),
          root = static_cast<A>(t.correction_root);
  for (int64_t i = begin; i < end; i += kLanes<T>) {
    const int64_t left = end - i;
    prefetch_ahead(t.param + i);
    prefetch_ahead(t.grad + i);
    prefetch_ahead(t.exp_avg + i);
    prefetch_ahead(t.exp_avg_sq + i);
    const Vec<T> param = load_some(t.param + i, left) * factor;
    Vec<T> grad = load_some(t.grad + i, left) * sign;
    if (decay != 0) grad += decay * param;
    const Vec<T> old = load_some(t.exp_avg + i, left), mean = old + new1 * (grad - old);
    Vec<T> square = beta2 * load_some(t.exp_avg_sq + i, left) + new2 * grad * grad;
    store_some(t.exp_avg + i, mean, left);
    store_some(t.exp_avg_sq + i, square, left);
    if (t.max_exp_avg_sq) {
      square = maximum(load_some(t.max_exp_avg_sq + i, left), square);
      store_some(t.max_exp_avg_sq + i, square, left);
    }
    store_some(t.param + i, param - step_size * mean / (square_root(square) / root + eps), left);
  }
}

// Sum of term(x, lanes) over [begin, end), lanes of double; the tail's missing elements count as zeros, so term(0) must
// be 0. Compensated where the elements are doubles themselves.
template <class T, class F> double sum_of(const T* x, int64_t begin, int64_t end, F&& term) {
  constexpr int lanes = kLanes<double>;
  if constexpr (sizeof(T) == 8) {
    CompensatedSum<vdouble> sum;
    for (int64_t i = begin; i < end; i += lanes) sum += term(load_some(x + i, end - i));
    const vdouble parts = sum.total();
    CompensatedSum<double> total;
    for (int l = 0; l < lanes; ++l) total += parts[l];
    return total.total();
  } else {
    vdouble even{}, odd{};
    int64_t i = begin;
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      even += term(load_wide(x + i));
      odd += term(load_wide(x + i + lanes));
    }
    for (; i < end; i += lanes)
      even += term(end - i >= lanes ? load_wide(x + i) : load_wide_partial(x + i, static_cast<int>(end - i)));
    return reduce_add(even + odd);
  }
}
inline vdouble magnitude(vdouble v) { return v < 0 ? -v : v; }
struct Square {
  vdouble operator()(vdouble v) const { return v * v; }
};

// The largest magnitude, or with `sign` -1 the smallest; NaN where there is one.
template <class T> double extreme_of(const T* x, int64_t begin, int64_t end, double sign) {
  vdouble most = broadcast<double>(-__builtin_inf());
  int64_t i = begin;
  for (; i + kLanes<double> <= end; i += kLanes<double>) most = maximum(sign * magnitude(load_wide(x + i)), most);
  double result = -__builtin_inf();
  for (int l = 0; l < kLanes<double>; ++l) result = maximum(static_cast<double>(most[l]), result);
  for (; i < end; ++i)
    result = maximum(sign * __builtin_fabs(static_cast<double>(static_cast<acc_t<T>>(x[i]))), result);
  return sign * result;
}

template <class T> void sums_of(const OptimTensors<GradTensor<T>>& all, NormKind kind, double power, double* blocks) {
  over_blocks(all, blocks, [&](const GradTensor<T>& t, int64_t begin, int64_t end) {
    switch (kind) {
      case NormKind::squares: return sum_of(t.grad, begin, end, Square{});
      case NormKind::magnitudes: return sum_of(t.grad, begin, end, magnitude);
      case NormKind::nonzeros:
        return sum_of(t.grad, begin, end, [](vdouble v) { return v == 0 ? vdouble{} : broadcast<double>(1); });
      case NormKind::largest: return extreme_of(t.grad, begin, end, 1);
      case NormKind::smallest: return extreme_of(t.grad, begin, end, -1);
      case NormKind::powers: break;
    }
    CompensatedSum<double> sum;
    for (int64_t i = begin; i < end; ++i) sum += __builtin_pow(__builtin_fabs(static_cast<acc_t<T>>(t.grad[i])), power);
    return sum.total();
  });
}

// The sum of a tensor's blocks, in their order.
template <class T> double over_tensor(const T& tensor, const double* sums) {
  CompensatedSum<double> sum;
  for (int64_t b = 0; b < optim_blocks(tensor.count); ++b) sum += sums[tensor.first_block + b];
  return sum.total();
}

// You, Gitman, Ginsburg 2017, "Large batch training of convolutional networks", algorithm 1.
template <class T> void lars_all(const OptimTensors<LarsTensor<T>>& all, double* sums) {
  double *params = sums, *grads = sums + all.blocks;
  over_blocks(all, params, [](const LarsTensor<T>& t, int64_t begin, int64_t end) {
    return t.trust_coefficient < 0 ? 0.0 : sum_of(t.param, begin, end, Square{});
  });
  over_blocks(all, grads, [](const LarsTensor<T>& t, int64_t begin, int64_t end) {
    return t.trust_coefficient < 0 ? 0.0 : sum_of(t.grad, begin, end, Square{});
  });
  over_elements(all, [&](const LarsTensor<T>& t, int64_t begin, int64_t end) {
    using A = acc_t<T>;
    double rate = t.lr;
    if (t.trust_coefficient >= 0) {
      const double param_norm = __builtin_sqrt(over_tensor(t, params)),
                   grad_norm = __builtin_sqrt(over_tensor(t, grads));
      const double below = grad_norm + t.weight_decay * param_norm + t.eps;
      if (param_norm > 0 && grad_norm > 0) rate *= t.trust_coefficient * param_norm / below;
    }
    const A lr = static_cast<A>(rate), decay = static_cast<A>(t.weight_decay), momentum = static_cast<A>(t.momentum),
            sign = t.maximize ? A(-1) : A(1);
    for (int64_t i = begin; i < end; i += kLanes<T>) {
      const int64_t left = end - i;
      const Vec<T> param = load_some(t.param + i, left);
      Vec<T> change = load_some(t.grad + i, left) * sign;
      if (decay != 0) change += decay * param;
      change *= lr;
      if (t.momentum_buffer) {
        change += momentum * load_some(t.momentum_buffer + i, left);
        store_some(t.momentum_buffer + i, change, left);
      }
      store_some(t.param + i, param - change, left);
    }
  });
}

template <class T> void scale_all(const OptimTensors<GradTensor<T>>& all, double factor) {
  over_elements(all, [&](const GradTensor<T>& t, int64_t begin, int64_t end) {
    const acc_t<T> by = static_cast<acc_t<T>>(factor);
    for (int64_t i = begin; i < end; i += kLanes<T>)
      store_some(t.grad + i, load_some(t.grad + i, end - i) * by, end - i);
  });
}

template <class T> void clamp_all(const OptimTensors<GradTensor<T>>& all, double limit) {
  over_elements(all, [&](const GradTensor<T>& t, int64_t begin, int64_t end) {
    const Vec<T> high = broadcast<T>(static_cast<acc_t<T>>(limit)), low = -high;
    for (int64_t i = begin; i < end; i += kLanes<T>) {
      Vec<T> v = load_some(t.grad + i, end - i);
      v = v < low ? low : v;
      v = v > high ? high : v;
      store_some(t.grad + i, v, end - i);
    }
  });
}

}  // namespace

#define DLKERN_OPTIM(T)                                                                                 \
  void sgd(const OptimTensors<SgdTensor<T>>& all) { over_elements(all, sgd_range<T>); }                 \
  void adam(const OptimTensors<AdamTensor<T>>& all) { over_elements(all, adam_range<T>); }              \
  void lars(const OptimTensors<LarsTensor<T>>& all, double* sums) { lars_all(all, sums); }              \
  void grad_sums(const OptimTensors<GradTensor<T>>& all, NormKind kind, double power, double* blocks) { \
    sums_of(all, kind, power, blocks);                                                                  \
  }                                                                                                     \
  void grad_scale(const OptimTensors<GradTensor<T>>& all, double factor) { scale_all(all, factor); }    \
  void grad_clamp(const OptimTensors<GradTensor<T>>& all, double limit) { clamp_all(all, limit); }
DLKERN_OPTIM(float)
DLKERN_OPTIM(double)
DLKERN_OPTIM(bfloat16)
DLKERN_OPTIM(float16)

}  // namespace dlkern::cpu::DLKERN_ISA

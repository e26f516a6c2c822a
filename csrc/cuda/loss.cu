// Softmax cross-entropy: for each place -(1 - e) w[t] log p[t] - e / C sum_c w[c] log p[c], p = softmax(logits), times
// the place's own weight where there is one; or the same of targets that are a probability for each class. The forward
// reads the logits once, keeping the largest so far and the sum of exponentials relative to it (online softmax, Milakov
// and Gimelshein 2018), and stores these two numbers a place; the backward makes the gradient from them in one pass.
// Probabilities are read once more, relative to the largest logit. Where classes lie side by side, a row is a warp's or
// a block's; where places do, a thread's. A block adds its places in their order and a last one the blocks': no
// atomics, the same bits every run. Doubles are a few a place. Floor: one read of the logits; backward a read and a
// write.
#include "loss.h"

#include <cmath>
#include <limits>
#include <type_traits>

#include "block_reduce.cuh"
#include "pack.cuh"

namespace dlkern::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kWarpClasses = 2048;  // of a row that is a warp's, at most

// A product rounded before it is used: v in a gradient is the number it was in the sum of v's.
DLKERN_DEVICE float rounded_product(float a, float b) {
#ifdef __CUDACC__
  return __fmul_rn(a, b);
#else
  volatile float product = a * b;
  return product;
#endif
}

// ACROSS threads share a place: 1, 32 or all of a block. Classes go in packs of VEC. ANYWHERE: rows need not start or end
// at 16 bytes, and the classes before and behind the whole packs are a thread's each.
template <class T, int ACROSS, int VEC, bool ANYWHERE = false>
struct Place {
  static constexpr int kAtOnce = kThreads / ACROSS;
  int64_t index, begin;  // the place's number, and where its first class is
  int64_t head, end;  // classes [head, end) are in packs
  bool exists;

  DLKERN_DEVICE explicit Place(const Logits& s)
      : index(static_cast<int64_t>(blockIdx.x) * kAtOnce + static_cast<int>(threadIdx.x) / ACROSS) {
    exists = index < s.outer * s.inner;
    begin = index / s.inner * (s.classes * s.inner) + index % s.inner * s.place_stride;
    const int64_t before = ANYWHERE ? (VEC - begin % VEC) % VEC : 0;
    head = before < s.classes ? before : s.classes;
    end = ANYWHERE ? head + (s.classes - head) / VEC * VEC : s.classes;
  }
  static DLKERN_DEVICE int lane() { return static_cast<int>(threadIdx.x) % ACROSS; }
  // Whether this thread has class c.
  DLKERN_DEVICE bool owns(int64_t c) const {
    if (c < head) return lane() == c;
    return lane() == (c < end ? (c - head) / VEC % ACROSS : head + c - end);
  }
  // Calls f(width, class, offset) for this thread's packs and for its one class outside of them.
  template <class F>
  DLKERN_DEVICE void each(const Logits& s, F&& f) const {
    if (!exists) return;
    using std::integral_constant;
#pragma unroll 4
    for (int64_t c = head + lane() * VEC; c < end; c += ACROSS * VEC)
      f(integral_constant<int, VEC>(), c, begin + (VEC == 1 ? c * s.class_stride : c));
    if constexpr (ANYWHERE) {
      const int64_t c = lane() < head ? lane() : end + lane() - head;
      if (c < s.classes) f(integral_constant<int, 1>(), c, begin + c);
    }
  }
  // Sum over the place's threads. `partial`: shared.
  template <class N>
  static DLKERN_DEVICE N sum(N value, N* partial) {
    return ACROSS == 1 ? value : ACROSS == 32 ? warp_sum(value) : block_sum<kThreads>(value, partial);
  }
};

// The largest logit and the sum of exponentials relative to it. NaN is not the largest, but makes the sum NaN.
struct Softmax {
  float most = -kInfinity, total = 0.0f;

  DLKERN_DEVICE float shift() const { return most == -kInfinity ? 0.0f : most; }
  DLKERN_DEVICE void raise(float value) {
    if (!(value > most)) return;
    total *= expf(most - value);
    most = value;
  }
  template <int VEC>
  DLKERN_DEVICE void take(const float* x) {
    float highest = x[0];
#pragma unroll
    for (int v = 1; v < VEC; v++) highest = fmaxf(highest, x[v]);
    raise(highest);
    const float by = shift();
    float some = 0.0f;
#pragma unroll
    for (int v = 0; v < VEC; v++) some += expf(x[v] - by);
    total += some;
  }
  DLKERN_DEVICE void take(const Softmax& other) {
    raise(other.most);
    total += other.total * expf(other.most - shift());
  }
};

// Over all threads of a place. `partial`: shared.
template <int ACROSS>
DLKERN_DEVICE Softmax joined(Softmax mine, float (*partial)[kWarps]) {
  if constexpr (ACROSS > 1) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      Softmax other;
      other.most = __shfl_xor_sync(0xffffffffu, mine.most, distance);
      other.total = __shfl_xor_sync(0xffffffffu, mine.total, distance);
      mine.take(other);
    }
  }
  if constexpr (ACROSS <= 32) {
    return mine;
  } else {
    if (threadIdx.x % 32 == 0) partial[0][threadIdx.x / 32] = mine.most, partial[1][threadIdx.x / 32] = mine.total;
    __syncthreads();
    Softmax all;
#pragma unroll
    for (int warp = 0; warp < kWarps; warp++) {
      Softmax other;
      other.most = partial[0][warp], other.total = partial[1][warp];
      all.take(other);
    }
    return all;
  }
}

// VEC weights of classes from c on.
template <int VEC, class T>
DLKERN_DEVICE void load_weights(float* out, const T* weight, int64_t c) {
  if (weight) return load_floats<VEC>(out, weight + c);
#pragma unroll
  for (int v = 0; v < VEC; v++) out[v] = 1.0f;
}

template <class T>
struct Args {
  Logits shape;
  const T* input;
  const void* target;
  const T *weight, *sample_weight;
  int reduction;
  int64_t ignore_index;
  double smoothing;

  DLKERN_DEVICE int64_t places() const { return shape.outer * shape.inner; }
  DLKERN_DEVICE int64_t target_of(int64_t place) const { return static_cast<const int64_t*>(target)[place]; }
  DLKERN_DEVICE bool is_class(int64_t t) const { return t >= 0 && t < shape.classes; }
  DLKERN_DEVICE double weight_of(int64_t t) const { return weight ? static_cast<double>(to_float(weight[t])) : 1.0; }
  DLKERN_DEVICE double own_weight(int64_t place) const {
    return sample_weight ? static_cast<double>(to_float(sample_weight[place])) : 1.0;
  }
};

// The block's sums of losses and weights, as its part of the whole.
DLKERN_DEVICE void store_part(double loss, double share, double* parts, double (*partial)[32]) {
  loss = block_sum<kThreads>(loss, partial[0]);
  share = block_sum<kThreads>(share, partial[1]);
  if (threadIdx.x != 0) return;
  parts[blockIdx.x] = loss;
  parts[gridDim.x + blockIdx.x] = share;
}

// class_weights: the sum of all classes' weights, where labels are smoothed and classes have weights.
template <class T, int ACROSS, int VEC>
__global__ void __launch_bounds__(kThreads, 4)
    cross_entropy_forward_kernel(Args<T> args, const double* class_weights, T* loss_out, float* lse, double* parts) {
  DLKERN_SHARED(float, of_warps, [2][kWarps]);
  DLKERN_SHARED(double, partial, [3][32]);
  const Logits& s = args.shape;
  const Place<T, ACROSS, VEC, (VEC > 1)> my(s);
  const bool smooth = args.smoothing > 0;
  // Weighted logits are summed relative to the first one: their sum may be much larger than what is asked.
  float first = smooth && my.exists && s.classes > 0 ? to_float(args.input[my.begin]) : 0.0f;
  if (!(fabsf(first) < kInfinity)) first = 0.0f;
  Softmax softmax;
  double weighted = 0;
  my.each(s, [&](auto width, int64_t c, int64_t at) {
    constexpr int N = decltype(width)::value;
    float x[N];
    load_floats<N>(x, args.input + at);
    softmax.template take<N>(x);
    if (!smooth) return;
    float weight[N], some = 0.0f;
    load_weights<N>(weight, args.weight, c);
#pragma unroll
    for (int v = 0; v < N; v++) some += weight[v] * (x[v] - first);
    weighted += static_cast<double>(some);
  });
  softmax = joined<ACROSS>(softmax, of_warps);
  if (smooth) weighted = my.sum(weighted, partial[2]);
  double loss = 0, share = 0;
  if (my.exists && my.lane() == 0) {
    const double log_total = log(static_cast<double>(softmax.total)), most = static_cast<double>(softmax.most);
    lse[my.index] = softmax.most;
    lse[args.places() + my.index] = static_cast<float>(log_total);
    const int64_t target = args.target_of(my.index);
    if (target != args.ignore_index) {
      loss = share = static_cast<double>(kNan);
      if (args.is_class(target)) {
        const double own = args.own_weight(my.index), w = args.weight_of(target);
        const T logit = args.input[my.begin + target * s.class_stride];
        loss = w * (most - static_cast<double>(to_float(logit)) + log_total);
        if (smooth) {
          const double classes = static_cast<double>(s.classes), weights = args.weight ? *class_weights : classes;
          loss = (1 - args.smoothing) * loss +
                 args.smoothing / classes * (weights * (most - static_cast<double>(first) + log_total) - weighted);
        }
        loss *= own;
        share = w * own;
      }
    }
    if (args.reduction == 0) loss_out[my.index] = from_float<T>(static_cast<float>(loss));
  }
  store_part(loss, share, parts, partial);
}

// One block adds the parts in an order that their number alone decides.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    loss_reduce_kernel(const double* parts, int64_t count, int reduction, T* loss, float* total_weight) {
  DLKERN_SHARED(double, partial, [2][32]);
  double sum = 0, weight = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += parts[i], weight += parts[count + i];
  sum = block_sum<kThreads>(sum, partial[0]);
  weight = block_sum<kThreads>(weight, partial[1]);
  if (threadIdx.x != 0) return;
  if (total_weight) *total_weight = static_cast<float>(weight);
  if (reduction != 0) *loss = from_float<T>(static_cast<float>(reduction == 1 ? sum / weight : sum));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) class_weights_kernel(const T* weight, int64_t classes, double* result) {
  DLKERN_SHARED(double, partial, [32]);
  double sum = 0;
  for (int64_t c = threadIdx.x; c < classes; c += kThreads) sum += static_cast<double>(to_float(weight[c]));
  sum = block_sum<kThreads>(sum, partial);
  if (threadIdx.x == 0) *result = sum;
}

// grad[c] = p[c] * all - w[c] * each away from the target; there along (p - 1) + each (sum(w) p - w), in this form and
// in double, because it cancels.
template <class T, int ACROSS, int VEC>
__global__ void __launch_bounds__(kThreads, 4)
    cross_entropy_backward_kernel(Args<T> args, const double* class_weights, const T* grad_loss, const float* lse,
                                  const float* total_weight, T* grad_input) {
  const Logits& s = args.shape;
  const Place<T, ACROSS, VEC, (VEC > 1)> my(s);
  if (!my.exists) return;
  const int64_t target = args.target_of(my.index);
  const bool used = target != args.ignore_index, known = args.is_class(target);
  const float most = lse[my.index], log_total = lse[args.places() + my.index];
  float all = kNan, each = 0.0f, chosen = 0.0f;
  if (used && known) {
    double grad = static_cast<double>(to_float(grad_loss[args.reduction == 0 ? my.index : 0]));
    if (args.reduction == 1) grad /= static_cast<double>(*total_weight);
    grad *= args.own_weight(my.index);
    const double w = args.weight_of(target), classes = static_cast<double>(s.classes);
    const double along = grad * (1 - args.smoothing) * w, spread = grad * args.smoothing / classes;
    const double weights = args.smoothing > 0 && args.weight ? *class_weights : classes;
    all = static_cast<float>(along + spread * weights);
    each = static_cast<float>(spread);
    if (my.owns(target)) {
      const T logit = args.input[my.begin + target * s.class_stride];
      const double p =
          exp(static_cast<double>(to_float(logit)) - static_cast<double>(most) - static_cast<double>(log_total));
      chosen = static_cast<float>(along * (p - 1) + static_cast<double>(each) * (weights * p - w));
    }
  }
  my.each(s, [&](auto width, int64_t c, int64_t at) {
    constexpr int N = decltype(width)::value;
    float value[N] = {};
    if (used) {  // else zeros, whatever the logits
      load_floats<N>(value, args.input + at);
#pragma unroll
      for (int v = 0; v < N; v++) value[v] = expf(value[v] - most - log_total) * all;
      if (each != 0.0f) {
        float weight[N];
        load_weights<N>(weight, args.weight, c);
#pragma unroll
        for (int v = 0; v < N; v++) value[v] -= weight[v] * each;
      }
#pragma unroll
      for (int v = 0; v < N; v++) value[v] = c + v == target ? chosen : value[v];
    }
    store_floats<N>(grad_input + at, value);
  });
}

// --- targets that are a probability for each class ------------------------------------------------------------------
// With v[c] = ((1 - e) t[c] + e / C) w[c], a place's loss is sum_c v[c] (largest - x[c] + log_sum), and its gradients
// are p[c] sum(v) - v[c] for the logits, -(1 - e) w[c] log p[c] for the targets.

struct Smoothed {
  float keep, share;

  DLKERN_DEVICE Smoothed(double smoothing, int64_t classes)
      : keep(static_cast<float>(1 - smoothing)), share(static_cast<float>(smoothing / static_cast<double>(classes))) {}
  DLKERN_DEVICE float operator()(float target, float weight) const {
    return rounded_product(rounded_product(target, keep) + share, weight);
  }
};

template <class T, int ACROSS, int VEC>
__global__ void __launch_bounds__(kThreads, 4)
    probabilities_forward_kernel(Args<T> args, T* loss_out, double* kept, double* parts) {
  DLKERN_SHARED(float, of_warps, [2][kWarps]);
  DLKERN_SHARED(double, partial, [4][32]);
  const Logits& s = args.shape;
  const Place<T, ACROSS, VEC> my(s);
  const Smoothed smoothed(args.smoothing, s.classes);
  const T* const targets = static_cast<const T*>(args.target);
  Softmax softmax;
  my.each(s, [&](auto, int64_t, int64_t at) {
    float x[VEC];
    load_floats<VEC>(x, args.input + at);
    softmax.template take<VEC>(x);
  });
  softmax = joined<ACROSS>(softmax, of_warps);
  double mass = 0, apart = 0;
  my.each(s, [&](auto, int64_t c, int64_t at) {
    float x[VEC], target[VEC], weight[VEC], some = 0.0f, other = 0.0f;
    load_floats<VEC>(x, args.input + at);
    load_floats<VEC>(target, targets + at);
    load_weights<VEC>(weight, args.weight, c);
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      const float of_class = smoothed(target[v], weight[v]);
      some += of_class;
      other += of_class * (softmax.most - x[v]);
    }
    mass += static_cast<double>(some), apart += static_cast<double>(other);
  });
  mass = my.sum(mass, partial[2]);
  apart = my.sum(apart, partial[3]);
  double loss = 0, count = 0;
  if (my.exists && my.lane() == 0) {
    loss = apart + mass * log(static_cast<double>(softmax.total));
    count = 1;
    kept[my.index] = static_cast<double>(softmax.most);
    kept[args.places() + my.index] = static_cast<double>(softmax.total);
    kept[2 * args.places() + my.index] = mass;
    if (args.reduction == 0) loss_out[my.index] = from_float<T>(static_cast<float>(loss));
  }
  if (args.reduction != 0) store_part(loss, count, parts, partial);
}

template <class T, int ACROSS, int VEC>
__global__ void __launch_bounds__(kThreads, 4)
    probabilities_backward_kernel(Args<T> args, const T* grad_loss, const double* kept, T* grad_input, T* grad_target) {
  const Logits& s = args.shape;
  const Place<T, ACROSS, VEC> my(s);
  if (!my.exists) return;
  const Smoothed smoothed(args.smoothing, s.classes);
  const T* const targets = static_cast<const T*>(args.target);
  const float most = static_cast<float>(kept[my.index]);
  const double total = kept[args.places() + my.index];
  const float factor = static_cast<float>(kept[2 * args.places() + my.index] / total);
  const float log_total = static_cast<float>(log(total));
  float grad = to_float(grad_loss[args.reduction == 0 ? my.index : 0]);
  if (args.reduction == 1) grad /= static_cast<float>(args.places());
  my.each(s, [&](auto, int64_t c, int64_t at) {
    float x[VEC], weight[VEC], value[VEC];
    load_floats<VEC>(x, args.input + at);
    load_weights<VEC>(weight, args.weight, c);
    if (grad_input) {
      load_floats<VEC>(value, targets + at);
#pragma unroll
      for (int v = 0; v < VEC; v++)
        value[v] = grad * (rounded_product(expf(x[v] - most), factor) - smoothed(value[v], weight[v]));
      store_floats<VEC>(grad_input + at, value);
    }
    if (grad_target) {
#pragma unroll
      for (int v = 0; v < VEC; v++) value[v] = grad * smoothed.keep * weight[v] * (log_total - (x[v] - most));
      store_floats<VEC>(grad_target + at, value);
    }
  });
}

// --- launchers ------------------------------------------------------------------------------------------------------

bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int across_of(const Logits& s) { return s.class_stride != 1 ? 1 : s.classes <= kWarpClasses ? 32 : kThreads; }
int64_t blocks_of(const Logits& s) { return ceil_div(s.outer * s.inner, kThreads / across_of(s)); }

template <class T>
Args<T> typed(const Logits& shape, const LossArgs& a) {
  return {shape,
          static_cast<const T*>(a.input),
          a.target,
          static_cast<const T*>(a.weight),
          static_cast<const T*>(a.sample_weight),
          a.reduction,
          a.ignore_index,
          a.label_smoothing};
}

// Calls f(type, across, vec) with the shape's T, ACROSS and VEC as values that carry them in their types. anywhere:
// long rows may start where no pack does.
template <class F>
void dispatch(const Logits& shape, bool anywhere, bool aligned, F&& f) {
  with_type(shape.element, [&](auto* type) {
    using one = std::integral_constant<int, 1>;
    using warp = std::integral_constant<int, 32>;
    using block = std::integral_constant<int, kThreads>;
    using pack = std::integral_constant<int, 16 / sizeof(*type)>;
    const bool packs = aligned && (shape.classes % pack::value == 0 || (anywhere && shape.classes >= 32 * pack::value));
    switch (across_of(shape)) {
      case 1: f(type, one{}, one{}); break;
      case 32: packs ? f(type, warp{}, pack{}) : f(type, warp{}, one{}); break;
      default: packs ? f(type, block{}, pack{}) : f(type, block{}, one{});
    }
  });
}

// scratch[0] is the sum of classes' weights, the parts follow.
const double* sum_class_weights(const Logits& shape, const LossArgs& args, double* scratch, void* stream) {
  if (!args.weight || args.label_smoothing == 0) return nullptr;
  with_type(shape.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    DLKERN_LAUNCH(class_weights_kernel<T>, dim3(1), dim3(kThreads), 0, stream, static_cast<const T*>(args.weight),
                  shape.classes, scratch);
  });
  return scratch;
}

void reduce(const Logits& shape, const LossArgs& args, const double* parts, void* loss, float* total_weight,
            void* stream) {
  with_type(shape.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    DLKERN_LAUNCH(loss_reduce_kernel<T>, dim3(1), dim3(kThreads), 0, stream, parts, blocks_of(shape), args.reduction,
                  static_cast<T*>(loss), total_weight);
  });
}

dim3 grid_of(const Logits& shape) { return cuda::grid_of(blocks_of(shape)); }

}  // namespace

int64_t cross_entropy_scratch(const Logits& shape) { return 1 + 2 * blocks_of(shape); }

void cross_entropy_forward(const Logits& shape, const LossArgs& args, double* scratch, void* loss, float* lse,
                           float* total_weight, void* stream) {
  double* const parts = scratch + 1;
  if (blocks_of(shape) > 0) {
    const double* const weights = sum_class_weights(shape, args, scratch, stream);
    dispatch(shape, !args.weight, aligned16(args.input) && aligned16(args.weight),
             [&](auto* type, auto across, auto vec) {
               using T = std::remove_pointer_t<decltype(type)>;
               DLKERN_LAUNCH((cross_entropy_forward_kernel<T, across.value, vec.value>), grid_of(shape), dim3(kThreads),
                             0, stream, typed<T>(shape, args), weights, static_cast<T*>(loss), lse, parts);
             });
  }
  reduce(shape, args, parts, loss, total_weight, stream);
}

void cross_entropy_backward(const Logits& shape, const LossArgs& args, double* scratch, const void* grad_loss,
                            const float* lse, const float* total_weight, void* grad_input, void* stream) {
  const double* const weights = sum_class_weights(shape, args, scratch, stream);
  const bool aligned = aligned16(args.input) && aligned16(args.weight) && aligned16(grad_input);
  dispatch(shape, !args.weight, aligned, [&](auto* type, auto across, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    DLKERN_LAUNCH((cross_entropy_backward_kernel<T, across.value, vec.value>), grid_of(shape), dim3(kThreads), 0,
                  stream, typed<T>(shape, args), weights, static_cast<const T*>(grad_loss), lse, total_weight,
                  static_cast<T*>(grad_input));
  });
}

void probabilities_forward(const Logits& shape, const LossArgs& args, double* scratch, void* loss, double* kept,
                           void* stream) {
  const bool aligned = aligned16(args.input) && aligned16(args.target) && aligned16(args.weight);
  dispatch(shape, false, aligned, [&](auto* type, auto across, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    DLKERN_LAUNCH((probabilities_forward_kernel<T, across.value, vec.value>), grid_of(shape), dim3(kThreads), 0, stream,
                  typed<T>(shape, args), static_cast<T*>(loss), kept, scratch + 1);
  });
  if (args.reduction != 0) reduce(shape, args, scratch + 1, loss, nullptr, stream);
}

void probabilities_backward(const Logits& shape, const LossArgs& args, const void* grad_loss, const double* kept,
                            void* grad_input, void* grad_target, void* stream) {
  const bool aligned = aligned16(args.input) && aligned16(args.target) && aligned16(args.weight) &&
                       aligned16(grad_input) && aligned16(grad_target);
  dispatch(shape, false, aligned, [&](auto* type, auto across, auto vec) {
    using T = std::remove_pointer_t<decltype(type)>;
    DLKERN_LAUNCH((probabilities_backward_kernel<T, across.value, vec.value>), grid_of(shape), dim3(kThreads), 0,
                  stream, typed<T>(shape, args), static_cast<const T*>(grad_loss), kept, static_cast<T*>(grad_input),
                  static_cast<T*>(grad_target));
  });
}

}  // namespace dlkern::cuda

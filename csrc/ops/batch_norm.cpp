// Batch norm, op layer: batch_norm_train_forward, batch_norm_eval_forward, batch_norm_backward.
#include "../cpu/batch_norm.h"
#include "../cpu/parallel.h"

#include <cmath>

#include "common.h"

namespace dlkern::ops {
namespace {

using cpu::NormShape;

ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// x in the given order of dimensions.
Tensor ordered(const Tensor& x, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  if (!channels_last) return x.is_contiguous() ? x : torch::stable::contiguous(x);
  if (layout_of(x) == Layout::channels_last ||
      (x.is_contiguous() && (x.size(1) == 1 || x.numel() == x.size(0) * x.size(1))))
    return x;
  return torch::stable::contiguous(x, x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d);
}

NormShape norm_shape(const char* op, const Tensor& input, bool channels_last) {
  NormShape shape{input.size(0), input.size(1), 1, channels_last};
  for (int64_t d = 2; d < input.dim(); ++d) shape.inner *= input.size(d);
  check(input.is_cpu(), op, ": expected CPU tensors");
  if (shape.inner == 1) shape.channels_last = true;  // [n, c] is rows of channels
  return shape;
}

void check_input(const char* op, const Tensor& input) {
  const ScalarType dtype = input.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double || is_reduced(dtype), op,
        ": expected float32, float64, bfloat16 or float16");
  check<std::out_of_range>(input.dim() >= 2, op, ": expected [N, C, ...], got ", input.dim(), " dimensions");
}

void check_like(const char* op, const std::optional<Tensor>& x, const Tensor& input, const char* name) {
  if (!x) return;
  check<std::invalid_argument>(same_sizes(x->sizes(), input.sizes()), op, ": ", name, " must have input's sizes");
  check(x->scalar_type() == input.scalar_type(), op, ": ", name, " must have input's dtype");
  check(x->is_cpu(), op, ": ", name, " must be on the CPU");
}

// A per-channel tensor as numbers of type A; empty where there is none.
template <class A> std::vector<A> per_channel(const std::optional<Tensor>& x) {
  std::vector<A> values;
  if (!x) return values;
  const Tensor dense = as_contiguous(*x);
  values.resize(static_cast<size_t>(dense.numel()));
  dispatch_floating(dense.scalar_type(), "batch_norm", [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    const P* p = data<P>(dense);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<A>(p[i]);
  });
  return values;
}

// A [C] tensor of the given dtype, written by f(i).
template <class F> Tensor make_per_channel(int64_t count, ScalarType dtype, const Tensor& like, F&& f) {
  Tensor result = allocate({count}, dtype, like);
  dispatch_floating(dtype, "batch_norm", [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    P* p = mutable_data<P>(result);
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (sizeof(P) == 2)
        p[i] = P(static_cast<float>(f(static_cast<size_t>(i))));
      else
        p[i] = static_cast<P>(f(static_cast<size_t>(i)));
    }
  });
  return result;
}

void check_parameter(const char* op, const std::optional<Tensor>& x, const Tensor& input, const char* name) {
  if (!x) return;
  check(x->numel() == input.size(1), op, ": ", name, " should contain ", input.size(1), " elements not ", x->numel());
  check(x->scalar_type() == input.scalar_type() || x->scalar_type() == ScalarType::Float, op, ": ", name,
        " must have input's dtype or float32");
  check(input.scalar_type() != ScalarType::Double || x->scalar_type() == ScalarType::Double, op, ": ", name,
        " must be float64 like input");
  check(x->is_cpu(), op, ": ", name, " must be on the CPU");
}

// Parameters and running statistics come in one dtype.
void check_one_dtype(const char* op, const std::optional<Tensor>& a, const std::optional<Tensor>& b) {
  check(!a || !b || a->scalar_type() == b->scalar_type(), op, ": parameters and running statistics differ in dtype");
}

template <class A> const A* pointer(const std::vector<A>& values) { return values.empty() ? nullptr : values.data(); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> train_forward_cpu(
    const Tensor& input, std::optional<Tensor> residual, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> running_mean, std::optional<Tensor> running_var, double momentum, double eps,
    int64_t activation) {
  const char* op = "batch_norm";
  check_input(op, input);
  check_like(op, residual, input, "residual");
  check_parameter(op, weight, input, "weight");
  check_parameter(op, bias, input, "bias");
  check_parameter(op, running_mean, input, "running_mean");
  check_parameter(op, running_var, input, "running_var");
  check_one_dtype(op, weight, bias);
  check_one_dtype(op, running_mean, running_var);
  check_one_dtype(op, weight ? weight : bias, running_mean);
  check<std::invalid_argument>(running_mean.has_value() == running_var.has_value(),
                               "running_mean and running_var must either both be None or neither be None");
  check_activation(op, activation);
  check<std::invalid_argument>(eps > 0, "batch_norm eps must be positive during training, but got ", eps);
  const bool channels_last = suggests_channels_last(input);
  const NormShape shape = norm_shape(op, input, channels_last);
  const int64_t count = shape.n * shape.inner;
  check<std::invalid_argument>(count != 1, "Expected more than 1 value per channel when training");
  const Tensor x = ordered(input, channels_last);
  std::optional<Tensor> r;
  if (residual) r = ordered(*residual, channels_last);
  Tensor output = allocate(x.sizes(), x.scalar_type(), x, channels_last);
  const ScalarType accumulated = accumulate_dtype(x.scalar_type());
  std::vector<double> mean(static_cast<size_t>(shape.c), 0.0), invstd(mean.size(), 1.0), var(mean.size(), 0.0);
  dispatch_floating(x.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    if (output.numel() > 0) {
      const auto w = per_channel<A>(weight), b = per_channel<A>(bias);
      cpu::BatchNormArgs<T> args{shape,
                                 data<T>(x),
                                 data<T>(r),
                                 pointer(w),
                                 pointer(b),
                                 mean.data(),
                                 invstd.data(),
                                 var.data(),
                                 eps,
                                 true,
                                 static_cast<int>(activation),
                                 mutable_data<T>(output)};
      DLKERN_CALL(batch_norm_forward, args);
    }
  });
  Tensor new_mean, new_var;
  if (running_mean) {
    // Nothing seen, nothing moved; else towards the mean and the unbiased variance.
    const double step = count == 0 ? 0.0 : momentum;
    const double unbias = count > 1 ? static_cast<double>(count) / static_cast<double>(count - 1) : 1.0;
    const auto old_mean = per_channel<double>(running_mean), old_var = per_channel<double>(running_var);
    new_mean = make_per_channel(shape.c, running_mean->scalar_type(), x, [&](size_t i) {
      return step == 0.0 ? old_mean[i] : step * mean[i] + (1.0 - step) * old_mean[i];
    });
    new_var = make_per_channel(shape.c, running_var->scalar_type(), x, [&](size_t i) {
      return step == 0.0 ? old_var[i] : step * unbias * var[i] + (1.0 - step) * old_var[i];
    });
  } else {
    new_mean = allocate({0}, accumulated, x);
    new_var = allocate({0}, accumulated, x);
  }
  return {output, make_per_channel(shape.c, accumulated, x, [&](size_t i) { return mean[i]; }),
          make_per_channel(shape.c, accumulated, x, [&](size_t i) { return invstd[i]; }), new_mean, new_var};
}

std::tuple<Tensor, Tensor, Tensor> eval_forward_cpu(const Tensor& input, std::optional<Tensor> residual,
                                                    std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                    const Tensor& running_mean, const Tensor& running_var, double eps,
                                                    int64_t activation) {
  const char* op = "batch_norm";
  check_input(op, input);
  check_like(op, residual, input, "residual");
  check_parameter(op, weight, input, "weight");
  check_parameter(op, bias, input, "bias");
  check_parameter(op, running_mean, input, "running_mean");
  check_parameter(op, running_var, input, "running_var");
  check_one_dtype(op, weight, bias);
  check_one_dtype(op, running_mean, running_var);
  check_one_dtype(op, weight ? weight : bias, running_mean);
  check_activation(op, activation);
  check<std::invalid_argument>(eps >= 0, "batch_norm eps must be non-negative, but got ", eps);
  const bool channels_last = suggests_channels_last(input);
  const NormShape shape = norm_shape(op, input, channels_last);
  const Tensor x = ordered(input, channels_last);
  std::optional<Tensor> r;
  if (residual) r = ordered(*residual, channels_last);
  Tensor output = allocate(x.sizes(), x.scalar_type(), x, channels_last);
  Tensor mean = allocate({shape.c}, ScalarType::Double, x);
  Tensor invstd = allocate({shape.c}, ScalarType::Double, x);
  const auto old_mean = per_channel<double>(running_mean), old_var = per_channel<double>(running_var);
  double* m = mutable_data<double>(mean);
  double* s = mutable_data<double>(invstd);
  for (int64_t i = 0; i < shape.c; ++i) {
    m[i] = old_mean[static_cast<size_t>(i)];
    s[i] = 1.0 / std::sqrt(old_var[static_cast<size_t>(i)] + eps);
  }
  if (output.numel() == 0) return {output, mean, invstd};
  dispatch_floating(x.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const auto w = per_channel<A>(weight), b = per_channel<A>(bias);
    cpu::BatchNormArgs<T> args{shape,
                               data<T>(x),
                               data<T>(r),
                               pointer(w),
                               pointer(b),
                               m,
                               s,
                               nullptr,
                               eps,
                               false,
                               static_cast<int>(activation),
                               mutable_data<T>(output)};
    DLKERN_CALL(batch_norm_forward, args);
  });
  return {output, mean, invstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                        std::optional<Tensor> output, std::optional<Tensor> weight,
                                                        const Tensor& mean, const Tensor& invstd, bool train,
                                                        int64_t activation, bool residual) {
  const char* op = "batch_norm_backward";
  check_input(op, input);
  check_like(op, grad_output, input, "grad_output");
  check_like(op, output, input, "output");
  check_parameter(op, weight, input, "weight");
  check_activation(op, activation);
  check<std::invalid_argument>(activation == 0 || output.has_value(), op,
                               ": an activation's backward needs its output");
  const ScalarType accumulated = accumulate_dtype(input.scalar_type());
  for (const Tensor& t : {mean, invstd}) {
    check(t.numel() == input.size(1), op, ": mean and invstd should contain ", input.size(1), " elements");
    check((t.scalar_type() == accumulated || t.scalar_type() == ScalarType::Double) && t.is_cpu(), op,
          ": mean and invstd must be float64 or in the dtype sums are carried in, on the CPU");
  }
  const bool channels_last = suggests_channels_last(input);
  const NormShape shape = norm_shape(op, input, channels_last);
  const Tensor x = ordered(input, channels_last), g = ordered(grad_output, channels_last);
  std::optional<Tensor> y;
  if (activation != 0) y = ordered(*output, channels_last);
  Tensor grad_input = allocate(x.sizes(), x.scalar_type(), x, channels_last);
  Tensor grad_residual =
      residual ? allocate(x.sizes(), x.scalar_type(), x, channels_last) : allocate({0}, x.scalar_type(), x);
  Tensor grad_weight, grad_bias;
  dispatch_floating(x.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const auto w = per_channel<A>(weight), m = per_channel<A>(mean);
    const auto s = per_channel<double>(invstd);
    std::vector<A> sums(static_cast<size_t>(2 * shape.c), A(0));
    A* sum_weight = sums.data();
    A* sum_bias = sum_weight + shape.c;
    if (x.numel() > 0) {
      cpu::BatchNormBackwardArgs<T> args{shape,
                                         data<T>(g),
                                         data<T>(x),
                                         data<T>(y),
                                         pointer(w),
                                         m.data(),
                                         s.data(),
                                         train,
                                         static_cast<int>(activation),
                                         mutable_data<T>(grad_input),
                                         sum_weight,
                                         sum_bias,
                                         residual ? mutable_data<T>(grad_residual) : nullptr};
      DLKERN_CALL(batch_norm_backward, args);
    }
    const ScalarType dtype = weight ? weight->scalar_type() : accumulated;
    grad_weight = make_per_channel(shape.c, dtype, x, [&](size_t i) { return sum_weight[i]; });
    grad_bias = make_per_channel(shape.c, dtype, x, [&](size_t i) { return sum_bias[i]; });
  });
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) {
  m.impl("batch_norm_train_forward_cpu", TORCH_BOX(&train_forward_cpu));
  m.impl("batch_norm_eval_forward_cpu", TORCH_BOX(&eval_forward_cpu));
  m.impl("batch_norm_backward_cpu", TORCH_BOX(&backward_cpu));
}

}  // namespace dlkern::ops

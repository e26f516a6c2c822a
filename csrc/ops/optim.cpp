// Optimisers and gradient clipping, op layer: sgd, adam, lars, clip_grad_norm_, clip_grad_value_ on lists of tensors.
// Each checks all tensors before it writes to one.
#include "../cpu/optim.h"

#include <limits>

#include "optim_checks.h"

namespace dlkern::ops {
namespace {

// to[...] = from[...] for tensors of one shape and dtype and any strides.
void copy(const Tensor& from, const Tensor& to) {
  if (from.numel() == 0) return;
  const int64_t size = static_cast<int64_t>(element_bytes(from.scalar_type())), dim = from.dim();
  const auto* source = static_cast<const char*>(from.const_data_ptr());
  auto* target = static_cast<char*>(to.mutable_data_ptr());
  int64_t index[kMostDims] = {};
  while (true) {
    std::memcpy(target, source, static_cast<size_t>(size));
    int64_t d = dim - 1;
    for (; d >= 0; --d) {
      source += from.stride(d) * size, target += to.stride(d) * size;
      if (++index[d] < from.size(d)) break;
      source -= from.stride(d) * size * from.size(d), target -= to.stride(d) * size * to.size(d);
      index[d] = 0;
    }
    if (d < 0) return;
  }
}

void check_tensor(const char* op, const char* name, const Tensor& x) {
  check(x.is_cpu(), op, ": expected CPU tensors in ", name);
  check(static_cast<size_t>(x.dim()) <= kMostDims, op, ": more than ", kMostDims, " dimensions");
  const ScalarType dtype = x.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Double || is_reduced(dtype), op,
        ": expected float32, float64, bfloat16 or float16 in ", name);
  x.const_data_ptr();  // refuses tensors without memory
}
auto checks(const char* op) {
  return [op](const char* name, const Tensor& x, const Tensor&) { check_tensor(op, name, x); };
}

// kernel(null pointer of the element type, tensors) for each dtype there is, on entries that make(entry, i, operands)
// fills; operands are parameter, gradient, state. Overlapping tensors go one at a time.
template <template <class> class Entry, class Make, class Kernel>
void run_range(const Step& step, size_t begin, size_t end, Make&& make, Kernel&& kernel) {
  std::vector<std::vector<Operand>> operands;
  for (size_t i = begin; i < end; ++i) operands.push_back(step.operands(i, copy));
  for (const ScalarType dtype : {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half})
    dispatch_floating(dtype, step.op, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      std::vector<Entry<T>> entries;
      int64_t blocks = 0;
      for (size_t i = begin; i < end; ++i) {
        const Tensor& param = step.params[i];
        if (param.scalar_type() != dtype || param.numel() == 0) continue;
        auto& entry = entries.emplace_back();
        entry.first_block = blocks;
        entry.count = param.numel();
        blocks += cpu::optim_blocks(entry.count);
        make(entry, i, operands[i - begin]);
      }
      if (entries.empty()) return;
      kernel(type, cpu::OptimTensors<Entry<T>>{entries.data(), static_cast<int64_t>(entries.size()), blocks});
    });
  for (const auto& row : operands)
    for (const Operand& operand : row) operand.write_back();
}
template <template <class> class Entry, class Make, class Kernel>
void run(const Step& step, Make&& make, Kernel&& kernel) {
  const size_t n = step.params.size();
  if (!step.in_turn()) return run_range<Entry>(step, 0, n, make, kernel);
  for (size_t i = 0; i < n; ++i) run_range<Entry>(step, i, i + 1, make, kernel);
}

template <class Entry> using ElementOf = std::remove_pointer_t<decltype(std::declval<Entry>().param)>;

void sgd_cpu(Tensors params, Tensors grads, Tensors momentum_buffers, Indices fresh, Indices groups, Numbers settings) {
  const Step step{"sgd", params, grads, {&momentum_buffers}};
  step.check_all(groups, settings, 6, checks(step.op));
  check_fresh(fresh, momentum_buffers);
  run<cpu::SgdTensor>(
      step,
      [&](auto& entry, size_t i, const std::vector<Operand>& operands) {
        using T = ElementOf<std::remove_reference_t<decltype(entry)>>;
        const double* row = &settings[static_cast<size_t>(groups[i]) * 6];
        const bool keeps = !momentum_buffers.empty();
        entry.param = operands[0].pointer<T>();
        entry.grad = operands[1].pointer<T>();
        entry.momentum_buffer = keeps ? operands[2].pointer<T>() : nullptr;
        entry.fresh = keeps && fresh[i];
        entry.lr = row[0], entry.momentum = row[1], entry.dampening = row[2], entry.weight_decay = row[3];
        entry.nesterov = row[4] != 0, entry.maximize = row[5] != 0;
      },
      [&](auto*, const auto& all) { DLKERN_CALL(sgd, all); });
}

void adam_cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
              Tensors steps, Indices groups, Numbers settings) {
  const Step step{"adam", params, grads, {&exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs}};
  step.check_all(groups, settings, 7, checks(step.op));
  const size_t n = params.size();
  check_adam(n, exp_avgs, exp_avg_sqs, steps);
  for (const Tensor& x : steps) {
    check(x.is_cpu() && x.numel() == 1, "adam: a step is one number on the CPU");
    check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
          "adam: expected steps in float32 or float64");
  }
  run<cpu::AdamTensor>(
      step,
      [&](auto& entry, size_t i, const std::vector<Operand>& operands) {
        using T = ElementOf<std::remove_reference_t<decltype(entry)>>;
        const double* row = &settings[static_cast<size_t>(groups[i]) * 7];
        const double lr = row[0], count = counted(steps[i]);
        entry.param = operands[0].pointer<T>();
        entry.grad = operands[1].pointer<T>();
        entry.exp_avg = operands[2].pointer<T>();
        entry.exp_avg_sq = operands[3].pointer<T>();
        entry.max_exp_avg_sq = max_exp_avg_sqs.empty() ? nullptr : operands[4].pointer<T>();
        entry.beta1 = row[1], entry.beta2 = row[2], entry.eps = row[3];
        const bool decoupled = row[5] != 0;
        entry.param_factor = decoupled ? 1 - lr * row[4] : 1;
        entry.weight_decay = decoupled ? 0 : row[4];
        entry.maximize = row[6] != 0;
        entry.step_size = lr / (1 - std::pow(entry.beta1, count));
        entry.correction_root = std::sqrt(1 - std::pow(entry.beta2, count));
      },
      [&](auto*, const auto& all) { DLKERN_CALL(adam, all); });
  for (size_t i = 0; i < n; ++i)
    if (params[i].numel() == 0) counted(steps[i]);  // as torch does, though there is nothing to update
}

void lars_cpu(Tensors params, Tensors grads, Tensors momentum_buffers, Indices groups, Numbers settings) {
  const Step step{"lars", params, grads, {&momentum_buffers}};
  step.check_all(groups, settings, 6, checks(step.op));
  run<cpu::LarsTensor>(
      step,
      [&](auto& entry, size_t i, const std::vector<Operand>& operands) {
        using T = ElementOf<std::remove_reference_t<decltype(entry)>>;
        const double* row = &settings[static_cast<size_t>(groups[i]) * 6];
        entry.param = operands[0].pointer<T>();
        entry.grad = operands[1].pointer<T>();
        entry.momentum_buffer = momentum_buffers.empty() ? nullptr : operands[2].pointer<T>();
        entry.lr = row[0], entry.momentum = row[1], entry.weight_decay = row[2];
        entry.trust_coefficient = row[3], entry.eps = row[4], entry.maximize = row[5] != 0;
      },
      [&](auto*, const auto& all) {
        std::vector<double> sums(static_cast<size_t>(2 * all.blocks));
        DLKERN_CALL(lars, all, sums.data());
      });
}

// f(null pointer of the element type, tensors, indices of the list) for each dtype there is among gradients that were
// checked; dense ones are used where they lie.
template <class F> void for_grads(const char* op, const Tensors& grads, bool written, F&& f) {
  std::vector<Operand> operands;
  operands.reserve(grads.size());
  for (const Tensor& x : grads) operands.emplace_back(x, x, is_dense(x), written, copy);
  for (const ScalarType dtype : {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half})
    dispatch_floating(dtype, op, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      std::vector<cpu::GradTensor<T>> entries;
      Indices indices;
      int64_t blocks = 0;
      for (size_t i = 0; i < grads.size(); ++i) {
        if (grads[i].scalar_type() != dtype || grads[i].numel() == 0) continue;
        entries.push_back({blocks, grads[i].numel(), operands[i].pointer<T>()});
        indices.push_back(static_cast<int64_t>(i));
        blocks += cpu::optim_blocks(grads[i].numel());
      }
      if (entries.empty()) return;
      f(type, cpu::OptimTensors<cpu::GradTensor<T>>{entries.data(), static_cast<int64_t>(entries.size()), blocks},
        indices);
    });
  for (const Operand& operand : operands) operand.write_back();
}
// Written gradients: one at a time where they share memory.
template <class F> void change_grads(const char* op, const Tensors& grads, F&& f) {
  if (grads.size() > 1 && overlapping({&grads})) {
    for (const Tensor& x : grads) for_grads(op, Tensors{x}, true, f);
    return;
  }
  for_grads(op, grads, true, f);
}

// The norm of one tensor from its blocks, or of all from the tensors' norms.
double norm_of(const double* parts, int64_t count, double norm_type, bool of_blocks) {
  if (std::isinf(norm_type)) {
    double result = norm_type > 0 ? 0 : std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < count; ++i)
      if (std::isnan(parts[i]) || (norm_type > 0 ? parts[i] > result : parts[i] < result)) {
        result = parts[i];
        if (std::isnan(result)) break;
      }
    return result;
  }
  double sum = 0, lost = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double part = of_blocks        ? parts[i]
                        : norm_type == 0 ? (parts[i] != 0)
                        : norm_type == 1 ? parts[i]
                        : norm_type == 2 ? parts[i] * parts[i]
                                         : std::pow(parts[i], norm_type);
    const double next = sum + part, added = next - sum;
    lost += (sum - (next - added)) + (part - added);
    sum = next;
  }
  if (std::isfinite(lost)) sum += lost;
  return norm_type == 0 || norm_type == 1 ? sum : norm_type == 2 ? std::sqrt(sum) : std::pow(sum, 1 / norm_type);
}

Tensor clip_grad_norm_cpu(Tensors grads, double max_norm, double norm_type, bool error_if_nonfinite) {
  const char* op = "clip_grad_norm_";
  check<std::invalid_argument>(!grads.empty(), op, ": no gradients");
  check_grads(op, grads, checks(op));
  check_norm(op, grads, norm_type);
  const cpu::NormKind kind = norm_kind<cpu::NormKind>(norm_type);
  Numbers norms(grads.size(), 0.0);
  for_grads(op, grads, false, [&](auto*, const auto& all, const Indices& indices) {
    Numbers blocks(static_cast<size_t>(all.blocks));
    DLKERN_CALL(grad_sums, all, kind, norm_type, blocks.data());
    for (size_t i = 0; i < indices.size(); ++i)
      norms[static_cast<size_t>(indices[i])] =
          norm_of(blocks.data() + all.tensors[i].first_block, cpu::optim_blocks(all.tensors[i].count), norm_type, true);
  });
  const double norm = norm_of(norms.data(), static_cast<int64_t>(norms.size()), norm_type, false);
  if (error_if_nonfinite) check_finite(norm, norm_type);
  const ScalarType dtype = common_type(grads);
  Tensor total = allocate({}, dtype, grads[0]);
  dispatch_floating(dtype, op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    *mutable_data<T>(total) = static_cast<T>(static_cast<acc_t<T>>(norm));
  });
  const double factor = max_norm / (norm + 1e-6);
  if (factor >= 1) return total;  // (torch multiplies by 1)
  change_grads(op, grads, [&](auto*, const auto& all, const Indices&) { DLKERN_CALL(grad_scale, all, factor); });
  return total;
}

void clip_grad_value_cpu(Tensors grads, double clip_value) {
  const char* op = "clip_grad_value_";
  check_grads(op, grads, checks(op));
  change_grads(op, grads, [&](auto*, const auto& all, const Indices&) {
    if (std::isnan(clip_value))  // what torch clamps to NaN is NaN
      DLKERN_CALL(grad_scale, all, clip_value);
    else
      DLKERN_CALL(grad_clamp, all, clip_value);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) {
  m.impl("sgd_cpu", TORCH_BOX(&sgd_cpu));
  m.impl("adam_cpu", TORCH_BOX(&adam_cpu));
  m.impl("lars_cpu", TORCH_BOX(&lars_cpu));
  m.impl("clip_grad_norm_cpu", TORCH_BOX(&clip_grad_norm_cpu));
  m.impl("clip_grad_value_cpu", TORCH_BOX(&clip_grad_value_cpu));
}

}  // namespace dlkern::ops

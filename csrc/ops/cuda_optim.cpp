// Optimisers and gradient clipping, op layer of the CUDA column: sgd, adam, lars, clip_grad_norm_, clip_grad_value_ on
// lists of float32, bfloat16 and float16 tensors, which may be on several devices. Adam's steps are on the host or, in
// float32, on their parameters' device, where they are counted without waiting for them.
#include "../cuda/optim.h"

#include "cuda_common.h"
#include "optim_checks.h"

namespace dlkern::ops {
namespace {

// On the parameter's device.
void copy(const Tensor& from, const Tensor& to) {
  Tensor target = to;
  torch::stable::copy_(target, from);
}

auto checks(const char* op) {
  return [op](const char* name, const Tensor& x, const Tensor& like) {
    check_device(op, name, x, like);
    check(static_cast<size_t>(x.dim()) <= kMostDims, op, ": more than ", kMostDims, " dimensions");
    check_element(op, x);
    x.const_data_ptr();  // refuses tensors without memory
  };
}
// Of lists whose tensors may be on several devices.
auto checks_anywhere(const char* op) {
  return [op](const char* name, const Tensor& x, const Tensor&) { checks(op)(name, x, x); };
}

// f(first tensor there, call) for each device there is among tensors [begin, end).
template <class F> void for_devices(const Tensors& tensors, size_t begin, size_t end, F&& f) {
  std::vector<int32_t> seen;
  for (size_t i = begin; i < end; ++i) {
    const int32_t device = tensors[i].get_device_index();
    if (std::find(seen.begin(), seen.end(), device) != seen.end()) continue;
    seen.push_back(device);
    Call call(tensors[i]);
    f(tensors[i], call);
  }
}

// launch(element, rows) for each dtype there is among the tensors [begin, end) that are where `like` is and have
// elements. fill(row, i) does all but the count.
template <class Row, class Fill, class Launch>
void for_dtypes(const Tensors& tensors, size_t begin, size_t end, const Tensor& like, Fill&& fill, Launch&& launch) {
  for (const ScalarType dtype : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}) {
    std::vector<Row> rows;
    cuda::Element element{};
    for (size_t i = begin; i < end; ++i) {
      const Tensor& x = tensors[i];
      if (x.scalar_type() != dtype || x.numel() == 0 || x.get_device_index() != like.get_device_index()) continue;
      Row& row = rows.emplace_back();
      row.count = x.numel();
      fill(row, i);
      element = element_of(x);
    }
    if (!rows.empty()) launch(element, rows);
  }
}

// fill(row, i) for each parameter that has elements, the addresses aside; launch(element, rows, like, call) for
// each device and dtype. Overlapping tensors go one at a time.
template <class Row, class Fill, class Launch>
void run_range(const Step& step, size_t begin, size_t end, Fill&& fill, Launch&& launch) {
  std::vector<std::vector<Operand>> operands;
  for (size_t i = begin; i < end; ++i) operands.push_back(step.operands(i, copy));
  for_devices(step.params, begin, end, [&](const Tensor& like, Call& call) {
    for_dtypes<Row>(
        step.params, begin, end, like,
        [&](Row& row, size_t i) {
          const std::vector<Operand>& mine = operands[i - begin];
          for (size_t j = 0; j < mine.size(); ++j)
            row.data[j] = j == 1 ? const_cast<void*>(call.reads(mine[j].tensor())) : call.updates(mine[j].tensor());
          fill(row, i);
        },
        [&](cuda::Element element, const std::vector<Row>& rows) { launch(element, rows, like, call); });
  });
  for (const auto& row : operands)
    for (const Operand& operand : row) operand.write_back();
}
template <class Row, class Fill, class Launch> void run(const Step& step, Fill&& fill, Launch&& launch) {
  const size_t n = step.params.size();
  if (!step.in_turn()) return run_range<Row>(step, 0, n, fill, launch);
  for (size_t i = 0; i < n; ++i) run_range<Row>(step, i, i + 1, fill, launch);
}

template <class Row> int64_t size_of(const std::vector<Row>& rows) { return static_cast<int64_t>(rows.size()); }

void sgd_cuda(Tensors params, Tensors grads, Tensors momentum_buffers, Indices fresh, Indices groups,
              Numbers settings) {
  const Step step{"sgd", params, grads, {&momentum_buffers}};
  step.check_all(groups, settings, 6, checks(step.op));
  check_fresh(fresh, momentum_buffers);
  run<cuda::SgdTensor>(
      step,
      [&](cuda::SgdTensor& row, size_t i) {
        const double* from = &settings[static_cast<size_t>(groups[i]) * 6];
        row.fresh = !fresh.empty() && fresh[i];
        row.lr = static_cast<float>(from[0]), row.momentum = static_cast<float>(from[1]);
        row.kept = static_cast<float>(1 - from[2]), row.weight_decay = static_cast<float>(from[3]);
        row.nesterov = from[4] != 0, row.sign = from[5] != 0 ? -1.0f : 1.0f;
      },
      [](cuda::Element element, const std::vector<cuda::SgdTensor>& rows, const Tensor&, Call& call) {
        cuda::sgd(element, rows.data(), size_of(rows), call.stream());
      });
}

// On the host, where no step is elsewhere, float32 stands for the device, so that its kernel is tested, too.
bool on_host(const Tensor& step) {
#ifdef DLKERN_CUDA_ON_HOST
  return step.scalar_type() == ScalarType::Double;
#else
  return step.is_cpu();
#endif
}

void adam_cuda(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
               Tensors steps, Indices groups, Numbers settings) {
  const Step step{"adam", params, grads, {&exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs}};
  step.check_all(groups, settings, 7, checks(step.op));
  const size_t n = params.size();
  check_adam(n, exp_avgs, exp_avg_sqs, steps);
  for (size_t i = 0; i < n; ++i) {
    const Tensor& x = steps[i];
    check(x.numel() == 1, "adam: a step is one number");
    check(x.scalar_type() == ScalarType::Float || (x.is_cpu() && x.scalar_type() == ScalarType::Double),
          "adam: expected steps in float32, on the host also in float64");
    if (!on_host(x)) check_device(step.op, "steps", x, params[i]);
  }
  const auto group_of = [&](size_t i) { return &settings[static_cast<size_t>(groups[i]) * 7]; };

  Numbers counts(n, 0.0);  // of the host's steps
  for (size_t i = 0; i < n; ++i)
    if (on_host(steps[i])) counts[i] = counted(steps[i]);
  std::vector<Tensor> corrections;  // a device's: two numbers for each parameter
  const auto corrections_at = [&](const Tensor& like) -> const Tensor* {
    for (const Tensor& x : corrections)
      if (x.get_device_index() == like.get_device_index()) return &x;
    return nullptr;
  };
  for_devices(params, 0, n, [&](const Tensor& like, Call& call) {
    std::vector<cuda::AdamStep> rows;
    for (size_t i = 0; i < n; ++i) {
      if (on_host(steps[i]) || params[i].get_device_index() != like.get_device_index()) continue;
      const double* from = group_of(i);
      rows.push_back({static_cast<float*>(call.updates(steps[i])), from[0], from[1], from[2], static_cast<int64_t>(i)});
    }
    if (rows.empty()) return;
    corrections.push_back(allocate({static_cast<int64_t>(n), 2}, ScalarType::Float, like));
    cuda::adam_count(rows.data(), size_of(rows), static_cast<float*>(call.writes(corrections.back())), call.stream());
  });
  run<cuda::AdamTensor>(
      step,
      [&](cuda::AdamTensor& row, size_t i) {
        const double* from = group_of(i);
        const double lr = from[0], beta1 = from[1], beta2 = from[2], decay = from[4];
        const bool decoupled = from[5] != 0;
        row.counted = on_host(steps[i]) ? -1 : static_cast<int32_t>(i);
        row.sign = from[6] != 0 ? -1.0f : 1.0f;
        row.param_factor = static_cast<float>(decoupled ? 1 - lr * decay : 1);
        row.weight_decay = static_cast<float>(decoupled ? 0 : decay);
        row.new1 = static_cast<float>(1 - beta1);
        row.beta2 = static_cast<float>(beta2), row.new2 = static_cast<float>(1 - beta2);
        row.eps = static_cast<float>(from[3]);
        row.step_size = static_cast<float>(lr / (1 - std::pow(beta1, counts[i])));
        row.correction_root = static_cast<float>(std::sqrt(1 - std::pow(beta2, counts[i])));
      },
      [&](cuda::Element element, const std::vector<cuda::AdamTensor>& rows, const Tensor& like, Call& call) {
        const Tensor* found = corrections_at(like);
        cuda::adam(element, rows.data(), size_of(rows), found ? static_cast<const float*>(call.reads(*found)) : nullptr,
                   call.stream());
      });
}

void lars_cuda(Tensors params, Tensors grads, Tensors momentum_buffers, Indices groups, Numbers settings) {
  const Step step{"lars", params, grads, {&momentum_buffers}};
  step.check_all(groups, settings, 6, checks(step.op));
  run<cuda::LarsTensor>(
      step,
      [&](cuda::LarsTensor& row, size_t i) {
        const double* from = &settings[static_cast<size_t>(groups[i]) * 6];
        row.lr = from[0], row.momentum = from[1], row.weight_decay = from[2];
        row.trust_coefficient = from[3], row.eps = from[4], row.sign = from[5] != 0 ? -1.0f : 1.0f;
      },
      [](cuda::Element element, const std::vector<cuda::LarsTensor>& rows, const Tensor& like, Call& call) {
        int64_t blocks = 0;
        bool scaled = false;
        for (const cuda::LarsTensor& row : rows)
          blocks += cuda::optim_blocks(row.count), scaled = scaled || row.trust_coefficient >= 0;
        if (!scaled) return cuda::lars(element, rows.data(), size_of(rows), nullptr, nullptr, call.stream());
        const Tensor parts = allocate({2, blocks}, ScalarType::Double, like);
        const Tensor rates = allocate({size_of(rows)}, ScalarType::Float, like);
        cuda::lars(element, rows.data(), size_of(rows), static_cast<double*>(call.writes(parts)),
                   static_cast<float*>(call.writes(rates)), call.stream());
      });
}

// launch(element, rows) for each dtype of gradients that are where `like` is; dense ones are used where they lie.
template <class Launch>
void for_grads(const Tensors& grads, const Tensor& like, Call& call, bool written, Launch&& launch) {
  std::vector<Operand> operands;
  operands.reserve(grads.size());
  for (const Tensor& x : grads) operands.emplace_back(x, x, is_dense(x), written, copy);
  for_dtypes<cuda::GradTensor>(
      grads, 0, grads.size(), like,
      [&](cuda::GradTensor& row, size_t i) {
        row.data[0] = call.updates(operands[i].tensor());  // sums first, and later written
      },
      launch);
  for (const Operand& operand : operands) operand.write_back();
}
// Written gradients: one at a time where they share memory.
template <class Launch> void change_grads(const Tensors& grads, const Tensor& like, Call& call, Launch&& launch) {
  if (grads.size() < 2 || !overlapping({&grads})) return for_grads(grads, like, call, true, launch);
  for (const Tensor& x : grads) for_grads(Tensors{x}, like, call, true, launch);
}

double first_number(const Tensor& x) {
#ifdef DLKERN_CUDA_ON_HOST
  return *data<double>(x);
#else
  return *data<double>(torch::stable::to(x, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
#endif
}

Tensor clip_grad_norm_cuda(Tensors grads, double max_norm, double norm_type, bool error_if_nonfinite) {
  const char* op = "clip_grad_norm_";
  check<std::invalid_argument>(!grads.empty(), op, ": no gradients");
  check_grads(op, grads, checks(op));
  check_norm(op, grads, norm_type);
  const cuda::NormKind kind = norm_kind<cuda::NormKind>(norm_type);
  const bool of_tensors = kind == cuda::NormKind::nonzeros;  // order 0 counts tensors
  int64_t blocks = 0, tensors = 0;
  for (const Tensor& x : grads) blocks += cuda::optim_blocks(x.numel()), tensors += x.numel() != 0;
  const Tensor& like = grads[0];
  const Tensor parts = allocate({blocks}, ScalarType::Double, like);
  const Tensor found = allocate({of_tensors ? tensors : 0}, ScalarType::Double, like);
  const Tensor norm = allocate({2}, ScalarType::Double, like);
  const Tensor total = allocate({}, common_type(grads), like);
  Call call(like);
  auto* part = static_cast<double*>(call.writes(parts));
  auto* flag = static_cast<double*>(call.writes(found));
  for_grads(grads, like, call, false, [&](cuda::Element element, const std::vector<cuda::GradTensor>& rows) {
    cuda::grad_sums(element, rows.data(), size_of(rows), kind, norm_type, part, call.stream());
    if (of_tensors) cuda::grad_nonzeros(rows.data(), size_of(rows), part, flag, call.stream());
    for (const cuda::GradTensor& row : rows) part += cuda::optim_blocks(row.count);
    flag += rows.size();
  });
  auto* result = static_cast<double*>(call.writes(norm));
  cuda::grad_norm(element_of(total), data<double>(of_tensors ? found : parts), of_tensors ? tensors : blocks, kind,
                  norm_type, max_norm, result, call.writes(total), call.stream());
  if (error_if_nonfinite) check_finite(first_number(norm), norm_type);
  change_grads(grads, like, call, [&](cuda::Element element, const std::vector<cuda::GradTensor>& rows) {
    cuda::grad_scale(element, rows.data(), size_of(rows), result + 1, call.stream());
  });
  return total;
}

void clip_grad_value_cuda(Tensors grads, double clip_value) {
  const char* op = "clip_grad_value_";
  check_grads(op, grads, checks_anywhere(op));
  for_devices(grads, 0, grads.size(), [&](const Tensor& like, Call& call) {
    change_grads(grads, like, call, [&](cuda::Element element, const std::vector<cuda::GradTensor>& rows) {
      cuda::grad_clamp(element, rows.data(), size_of(rows), static_cast<float>(clip_value), call.stream());
    });
  });
}

}  // namespace

DLKERN_REGISTER(DLKERN_CUDA_KEY, m) {
  m.impl("sgd_cuda", TORCH_BOX(&sgd_cuda));
  m.impl("adam_cuda", TORCH_BOX(&adam_cuda));
  m.impl("lars_cuda", TORCH_BOX(&lars_cuda));
  m.impl("clip_grad_norm_cuda", TORCH_BOX(&clip_grad_norm_cuda));
  m.impl("clip_grad_value_cuda", TORCH_BOX(&clip_grad_value_cuda));
}

}  // namespace dlkern::ops

// The op layer: checks and allocation, shared by every family and column. An op here is called through
// torch.ops.dlkern.<op>_<column>; it validates everything before a kernel starts, because a direct call may
// pass anything, and raises ValueError, IndexError or RuntimeError through the standard exceptions that the
// stable ABI carries across.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/scalar.h"

namespace dlkern::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = torch::headeronly::IntHeaderOnlyArrayRef;

template <class Error = std::runtime_error, class... Parts>
inline void check(bool ok, const Parts&... parts) {
  if (ok) [[likely]]
    return;
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

// Sizes in a message, [2, 3], written only where a check fails.
struct Shown {
  Ints sizes;
};
inline std::ostream& operator<<(std::ostream& out, const Shown& shown) {
  out << "[";
  for (size_t d = 0; d < shown.sizes.size(); ++d) out << (d ? ", " : "") << shown.sizes[d];
  return out << "]";
}

// Dimensions from the innermost outwards when channels are innermost: 1, the spatial ones backwards, 0.
inline int64_t channels_last_dim(int64_t position, int64_t dim) {
  return position == 0 ? 1 : position == dim - 1 ? 0 : dim - position;
}

// Contiguous, or channels_last (channels_last_3d) for 4-D (5-D) tensors; `other` needs a copy first.
enum class Layout { contiguous, channels_last, other };

inline Layout layout_of(const Tensor& x) {
  if (x.is_contiguous()) return Layout::contiguous;
  if (x.dim() != 4 && x.dim() != 5) return Layout::other;
  auto size = x.sizes(), stride = x.strides();
  int64_t expected = 1;
  for (int64_t i = 0; i < x.dim(); ++i) {
    const int64_t d = channels_last_dim(i, x.dim());
    if (size[d] == 0) return Layout::contiguous;
    if (size[d] != 1) {
      if (stride[d] != expected) return Layout::other;
      expected *= size[d];
    }
  }
  return Layout::channels_last;
}

// Whether torch would give an op's result channels_last for this input (torch's suggest_memory_format):
// strides say channels_last, and sizes of 1 are resolved as torch resolves them.
inline bool suggests_channels_last(const Tensor& x) {
  if (x.dim() != 4 && x.dim() != 5) return false;
  auto size = x.sizes(), stride = x.strides();
  int64_t least = 0;
  if (stride[1] == 0) return false;
  for (int64_t i = 0; i < x.dim(); ++i) {
    const int64_t d = channels_last_dim(i, x.dim());
    if (size[d] == 0) return false;
    if (stride[d] < least) return false;
    if (d == 0 && least == stride[1]) return false;  // N111 is contiguous
    least = stride[d];
    if (size[d] > 1) least *= size[d];
  }
  return true;
}

// Dimensions of an allocated tensor, so that sizes and strides fit on the stack. torch's own kernels stop there, too.
constexpr size_t kMostDims = 64;

// Strides of a dense tensor.
inline void fill_strides(Ints size, bool channels_last, int64_t* stride) {
  const auto dim = static_cast<int64_t>(size.size());
  int64_t running = 1;
  for (int64_t i = 0; i < dim; ++i) {
    const int64_t d = channels_last ? channels_last_dim(i, dim) : dim - 1 - i;
    stride[d] = running;
    if (size[d] > 1) running *= size[d];
  }
}

inline size_t element_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::Bool:
    case ScalarType::Byte: return 1;
    default: return 2;
  }
}
// From the first element's first byte to the last one's last.
inline size_t span_bytes(const Tensor& x) {
  if (x.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
  return static_cast<size_t>(last + 1) * element_bytes(x.scalar_type());
}

// Tests set DLKERN_POISON: every result starts as NaN (all bits set), so that what a kernel leaves out is seen.
inline void poison_memory(const Tensor& x, Ints size, ScalarType dtype) {
  size_t bytes = element_bytes(dtype);
  for (int64_t n : size) bytes *= static_cast<size_t>(n);
  if (bytes) std::memset(x.mutable_data_ptr(), 0xFF, bytes);
}

// An uninitialised tensor of the given sizes and strides (dense ones) on x's device.
inline Tensor allocate_strided(Ints size, const int64_t* stride, ScalarType dtype, const Tensor& x) {
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  int32_t dtype_code = 0;
  switch (dtype) {
    case ScalarType::Float: dtype_code = aoti_torch_dtype_float32(); break;
    case ScalarType::Double: dtype_code = aoti_torch_dtype_float64(); break;
    case ScalarType::BFloat16: dtype_code = aoti_torch_dtype_bfloat16(); break;
    case ScalarType::Half: dtype_code = aoti_torch_dtype_float16(); break;
    case ScalarType::Long: dtype_code = aoti_torch_dtype_int64(); break;
    case ScalarType::Int: dtype_code = aoti_torch_dtype_int32(); break;
    case ScalarType::Byte: dtype_code = aoti_torch_dtype_uint8(); break;
    default: check(false, "dlkern: no allocation for this dtype");
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), stride, dtype_code,
                                                  device_type, device_index, &handle));
  Tensor result(handle);
  static const bool poison = std::getenv("DLKERN_POISON") != nullptr;
  if (poison && device_type == aoti_torch_device_type_cpu()) poison_memory(result, size, dtype);
  return result;
}
// The same, contiguous or channels_last. 0.3 us, against 1.4 for aten::empty.
inline Tensor allocate(Ints size, ScalarType dtype, const Tensor& x, bool channels_last = false) {
  check(size.size() <= kMostDims, "dlkern: tensors of more than ", kMostDims, " dimensions are not supported");
  int64_t stride[kMostDims];
  fill_strides(size, channels_last, stride);
  return allocate_strided(size, stride, dtype, x);
}

inline bool same_sizes(Ints a, Ints b) {
  if (a.size() != b.size()) return false;
  for (size_t d = 0; d < a.size(); ++d)
    if (a[d] != b[d]) return false;
  return true;
}
// x, or a contiguous copy of it.
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }
inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(as_contiguous(*x)) : std::nullopt;
}

// Fused activations by their numbers (csrc/cpu/activation.h).
inline void check_activation(const char* op, int64_t activation) {
  check<std::invalid_argument>(activation >= 0 && activation <= 3, op, ": activation must be 0, 1, 2 or 3, got ",
                               activation);
}

inline std::vector<int64_t> to_vector(Ints ints) { return std::vector<int64_t>(ints.begin(), ints.end()); }

// Calls f with a null pointer of the C++ element type; the dtypes every CPU family serves.
template <class F> inline void dispatch_floating(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float: f(static_cast<float*>(nullptr)); break;
    case ScalarType::Double: f(static_cast<double*>(nullptr)); break;
    case ScalarType::BFloat16: f(static_cast<bfloat16*>(nullptr)); break;
    case ScalarType::Half: f(static_cast<float16*>(nullptr)); break;
    default: check(false, op, ": expected float32, float64, bfloat16 or float16");
  }
}
inline bool is_reduced(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }
// The same for the 16-bit types alone.
template <class F> inline void dispatch_reduced(ScalarType dtype, F&& f) {
  dtype == ScalarType::Half ? f(static_cast<float16*>(nullptr)) : f(static_cast<bfloat16*>(nullptr));
}
template <class T> inline const T* data(const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }
template <class T> inline T* mutable_data(const Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }
template <class T> inline const T* data(const std::optional<Tensor>& x) { return x ? data<T>(*x) : nullptr; }

// The type sums over x are carried in.
inline ScalarType sum_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
// A parameter, in input's dtype or the type of its sums, contiguous and in the latter.
inline std::optional<Tensor> widened(const std::optional<Tensor>& x, const Tensor& input) {
  if (!x || x->scalar_type() == sum_type(input)) return as_contiguous(x);
  const Tensor from = as_contiguous(*x);
  Tensor to = allocate(from.sizes(), ScalarType::Float, from);
  dispatch_reduced(from.scalar_type(), [&](auto* type) {
    const auto* source = data<std::remove_pointer_t<decltype(type)>>(from);
    float* target = mutable_data<float>(to);
    const int64_t count = from.numel();  // a call into torch
    for (int64_t i = 0; i < count; ++i) target[i] = source[i];
  });
  return to;
}
// A parameter's gradient, of the type of sums, in the parameter's dtype.
inline Tensor narrowed(const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype) return x;
  Tensor to = allocate(x.sizes(), dtype, x);
  dispatch_reduced(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const float* source = data<float>(x);
    T* target = mutable_data<T>(to);
    const int64_t count = x.numel();  // a call into torch
    for (int64_t i = 0; i < count; ++i) target[i] = T(source[i]);
  });
  return to;
}

}  // namespace dlkern::ops

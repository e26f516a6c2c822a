// What the op layer of the CUDA column shares. Its sources are compiled twice: into libdlkern.so, where they serve CUDA
// tensors, and with DLKERN_CUDA_ON_HOST into the test library, where they serve CPU tensors (see csrc/cuda_on_host).
#pragma once
#include "../cuda/element.h"
#include "common.h"

#ifdef DLKERN_CUDA_ON_HOST
#include <cstring>
#include <mutex>

#include "../cuda_on_host/control.h"
#include "../cuda_on_host/cuda_on_host.h"
#define DLKERN_CUDA_KEY CPU
#else
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#define DLKERN_CUDA_KEY CUDA
#endif
#define DLKERN_REGISTER_(key, m) STABLE_TORCH_LIBRARY_IMPL(dlkern, key, m)
#define DLKERN_REGISTER(key, m) DLKERN_REGISTER_(key, m)

namespace dlkern::ops {

// All tensors of a call must be where its first one is.
inline void check_device(const char* op, const char* name, const Tensor& x, const Tensor& like) {
#ifdef DLKERN_CUDA_ON_HOST
  (void)like;
  check(x.is_cpu(), op, ": ", name, " is not on the CPU");
#else
  check(x.is_cuda() && x.get_device_index() == like.get_device_index(), op, ": ", name,
        " is not on the same CUDA device as the first argument");
#endif
}

inline void check_element(const char* op, const Tensor& x) {
  check(x.scalar_type() == ScalarType::Float || is_reduced(x.scalar_type()), op,
        ": expected float32, bfloat16 or float16 (cuda column)");
}

// Of a tensor that was checked.
inline cuda::Element element_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float  ? cuda::Element::float32
         : x.scalar_type() == ScalarType::Half ? cuda::Element::float16
                                               : cuda::Element::bfloat16;
}

// Of the first tensor of an op.
inline cuda::Element element_of(const char* op, const Tensor& x) {
  check_device(op, "input", x, x);
  check_element(op, x);
  return element_of(x);
}

// A dense x whose data begins at a multiple of 16 bytes, as kernels that load 16 at once need: a copy where it does
// not.
inline Tensor aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 ? x : torch::stable::clone(x);
}

// Uninitialised, of x's size and dtype, on the host: in pinned memory, from which a copy makes nobody wait.
inline Tensor pinned_like(const Tensor& x) {
#ifdef DLKERN_CUDA_ON_HOST
  return allocate(x.sizes(), x.scalar_type(), x);
#else
  return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, torch::headeronly::DeviceType::CPU, true);
#endif
}

#ifdef DLKERN_CUDA_ON_HOST

// One call of an op. On the host: announces to the checker what the kernels may touch, and makes results start as NaN.
class Call {
 public:
  explicit Call(const Tensor&) : lock_(cuda_on_host::launch_mutex) {}
  ~Call() { cuda_on_host::forget_tensors(); }
  const void* reads(const Tensor& x) { return track(x, false); }
  const void* reads(const std::optional<Tensor>& x) { return x ? track(*x, false) : nullptr; }
  void* writes(const Tensor& x) {
    if (x.numel() != 0) std::memset(x.mutable_data_ptr(), 0xff, bytes(x));
    track(x, true);
    return x.mutable_data_ptr();
  }
  // Read and written, or written in part: what is there stays.
  void* updates(const Tensor& x) {
    track(x, true, true);
    return x.mutable_data_ptr();
  }
  void* stream() const { return nullptr; }

 private:
  static size_t bytes(const Tensor& x) { return static_cast<size_t>(x.numel()) * element_bytes(x.scalar_type()); }
  // From the first element to the last, of a view with gaps too.
  static const void* track(const Tensor& x, bool written, bool kept = false) {
    cuda_on_host::track_tensor(x.const_data_ptr(), span_bytes(x), written, kept);
    return x.const_data_ptr();
  }
  std::lock_guard<std::recursive_mutex> lock_;
};

#else

// torch's current stream of a device. The function is looked up when first needed: only CUDA builds of torch have it, and
// this library also loads with the others. It is looked up in torch's own library, which Python loads with RTLD_LOCAL, so
// that nobody finds it among the global symbols; those are asked where torch is linked otherwise.
inline void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    constexpr const char* name = "aoti_torch_get_current_cuda_stream";
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found = library ? dlsym(library, name) : nullptr;
    return reinterpret_cast<Function>(found ? found : dlsym(RTLD_DEFAULT, name));
  }();
  check(function != nullptr, "dlkern: this build of torch has no CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

// One call of an op: makes the tensors' device current and knows torch's current stream there.
class Call {
 public:
  explicit Call(const Tensor& x) : guard_(x.get_device_index()), stream_(current_stream(x.get_device_index())) {}
  const void* reads(const Tensor& x) { return x.const_data_ptr(); }
  const void* reads(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }
  void* writes(const Tensor& x) { return x.mutable_data_ptr(); }
  void* updates(const Tensor& x) { return x.mutable_data_ptr(); }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

#endif

}  // namespace dlkern::ops

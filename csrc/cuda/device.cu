// Whether this machine can run the CUDA column. The CUDA runtime is linked statically and finds the driver when asked,
// so the library loads anywhere.
#include <cuda_runtime.h>

#include <string>

// "" where the current GPU runs the kernels of this build, else the reason it does not; valid until the next call.
extern "C" [[gnu::visibility("default")]] const char* dlkern_cuda_unavailable() {
  static std::string reason;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    reason = std::string("no CUDA device: ") + (status == cudaSuccess ? "none found" : cudaGetErrorString(status));
    return reason.c_str();
  }
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  reason = major >= 8 ? "" : "the GPU has compute capability " + std::to_string(major) + ".x; 8.0 is needed";
  return reason.c_str();
}

// dlkern._C: what this build and this CPU have. It holds no ops (libdlkern.so does, free of Python), builds in
// seconds for any Python, and dlkern imports without it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "build_info.h"
#include "cpu/isa.h"

namespace py = pybind11;

static std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> features;
#ifndef DLKERN_NO_SIMD
  __builtin_cpu_init();
  features["avx2"] = __builtin_cpu_supports("avx2");
  features["fma"] = __builtin_cpu_supports("fma");
  features["avx512f"] = __builtin_cpu_supports("avx512f");
  features["avx512bw"] = __builtin_cpu_supports("avx512bw");
  features["avx512dq"] = __builtin_cpu_supports("avx512dq");
  features["avx512vl"] = __builtin_cpu_supports("avx512vl");
  features["avx512bf16"] = __builtin_cpu_supports("avx512bf16");
#endif
  return features;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about this build of dlkern and this CPU.";
  m.def("cpu_features", &cpu_features, "Instruction-set extensions of this CPU that dlkern looks at.");
  m.def(
      "cpu_isa", [] { return dlkern::cpu::isa_name(dlkern::cpu::isa()); },
      "The instruction set the CPU column uses here: 'avx512', 'avx2' or 'portable'.");
  m.def(
      "cpu_tiles", [] { return dlkern::cpu::has_tiles(); },
      "Whether 16-bit matrix products go by AMX's tiles: the CPU has them, and DLKERN_CPU_ISA does not rule them out.");
  m.def(
      "cpu_float_tiles", [] { return dlkern::cpu::has_float_tiles(); },
      "Whether float32's do, too: DLKERN_AMX_FLOAT32=1 asks for it.");
  m.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{{"version", DLKERN_VERSION},
                                                  {"compiler", DLKERN_COMPILER},
                                                  {"torch", DLKERN_TORCH_VERSION},
                                                  {"nvcc", DLKERN_NVCC_VERSION},
                                                  {"cuda_architectures", DLKERN_CUDA_ARCHITECTURES},
                                                  {"isas", DLKERN_ISAS}};
      },
      "Versions and options this library was built with; empty strings where a part was left out.");
  m.def(
      "cuda_kernels_json", [] { return std::string(kCudaKernelsJson); },
      "JSON list: registers, shared memory, stack and spills of each CUDA kernel in the build, by architecture.");
}

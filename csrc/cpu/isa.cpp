#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace dlkern::cpu {

static Isa detect() {
  Isa best = Isa::portable;
#ifndef DLKERN_NO_SIMD
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Isa::avx512;
#endif
#ifndef DLKERN_BUILT_AVX512
  if (best == Isa::avx512) best = Isa::avx2;
#endif
#ifndef DLKERN_BUILT_AVX2
  if (best == Isa::avx2) best = Isa::portable;
#endif
#ifdef DLKERN_WIDE
  best = Isa::avx512;  // its code, compiled for AVX2
#endif
  [[maybe_unused]] const char* const cap = std::getenv("DLKERN_CPU_ISA");
  if (cap) {
#ifdef DLKERN_BUILT_PORTABLE
    if (!std::strcmp(cap, "portable")) return Isa::portable;
#endif
#ifdef DLKERN_BUILT_AVX2
    if (!std::strcmp(cap, "avx2") && best == Isa::avx512) return Isa::avx2;
#endif
  }
  return best;
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable"; }

bool has_bf16_dot() {
#ifdef DLKERN_NO_SIMD
  return false;
#else
  static const bool has = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return has;
#endif
}

}  // namespace dlkern::cpu

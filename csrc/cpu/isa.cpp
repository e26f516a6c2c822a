#include "isa.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dlkern::cpu {

static Isa best_of_cpu() {
  Isa best = Isa::portable;
#ifndef DLKERN_NO_SIMD
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Isa::avx512;
#endif
  return best;
}

static Isa detect() {
  Isa best = best_of_cpu();
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

extern "C" [[gnu::visibility("default")]] const char* dlkern_cpu_unavailable() {
#if defined(DLKERN_BUILT_PORTABLE)
  return "";
#elif defined(DLKERN_BUILT_AVX2) || defined(DLKERN_WIDE)
  return best_of_cpu() < Isa::avx2 ? "built without portable code, and this CPU has no AVX2 with FMA and F16C" : "";
#else
  return best_of_cpu() < Isa::avx512 ? "built for AVX-512 alone, which this CPU does not have" : "";
#endif
}

bool has_bf16_dot() {
#ifdef DLKERN_NO_SIMD
  return false;
#else
  static const bool has = isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return has;
#endif
}

static bool detect_tiles() {
  const char* const cap = std::getenv("DLKERN_CPU_ISA");
  if (isa() != Isa::avx512 || (cap && !std::strcmp(cap, "avx512"))) return false;
#ifdef DLKERN_WIDE
  return true;  // in memory
#elif !defined(DLKERN_NO_SIMD) && defined(__x86_64__) && defined(__linux__)
  constexpr unsigned tile_and_bf16 = 1u << 24 | 1u << 22;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tile_and_bf16) != tile_and_bf16) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

bool has_float_tiles() {
  static const char* const wanted = std::getenv("DLKERN_AMX_FLOAT32");
  return wanted && !std::strcmp(wanted, "1") && has_tiles();
}

bool has_winograd() {
  static const char* const wanted = std::getenv("DLKERN_WINOGRAD");
  return !wanted || std::strcmp(wanted, "0") != 0;
}

bool has_tiles() {
  static const bool has = detect_tiles();
  return has;
}

}  // namespace dlkern::cpu

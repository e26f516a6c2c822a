// Which instruction set the CPU column runs. Every csrc/cpu/<family>.cpp is compiled three times,
// with DLKERN_ISA naming the namespace (portable, avx2, avx512) and the compiler flags to match;
// DLKERN_DECLARE announces a function in all three and DLKERN_CALL picks one at run time.
// The choice is made once: the best the CPU has, capped by the environment variable DLKERN_CPU_ISA.
#pragma once

namespace dlkern::cpu {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2 };

// The instruction set in use, decided on the first call.
Isa isa();
const char* isa_name(Isa isa);
// Why this CPU runs nothing of what was built (DLKERN_ISAS left its instruction set out), or "".
extern "C" const char* dlkern_cpu_unavailable();
// Whether vdpbf16ps (AVX512_BF16) may be used: the CPU has it and isa() is avx512.
bool has_bf16_dot();
// Whether AMX's tiles may be used: the CPU has them for bfloat16, the system lets the process keep their state, and
// DLKERN_CPU_ISA is not set to less ("avx512" is less, too).
bool has_tiles();
// Whether float32 goes by them too: DLKERN_AMX_FLOAT32=1. Not by default: in convolutions and backward passes on two cores of
// a shared machine, where AMX's rate falls to a quarter for seconds, vectors were faster.
bool has_float_tiles();
// Whether 3 x 3 convolutions in float may take Winograd's transforms: not with DLKERN_WINOGRAD=0.
bool has_winograd();

}  // namespace dlkern::cpu

#define DLKERN_DECLARE(result, name, ...) \
  namespace portable {                    \
  result name(__VA_ARGS__);               \
  }                                       \
  namespace avx2 {                        \
  result name(__VA_ARGS__);               \
  }                                       \
  namespace avx512 {                      \
  result name(__VA_ARGS__);               \
  }

// A build may leave instruction sets out (DLKERN_ISAS): setup.py then defines DLKERN_BUILT_<NAME> for those it has.
// (One below the lowest built is never asked for: dlkern_cpu_unavailable.)
#ifdef DLKERN_BUILT_PORTABLE
#define DLKERN_CALL_PORTABLE(name, ...) ::dlkern::cpu::portable::name(__VA_ARGS__)
#elif defined(DLKERN_BUILT_AVX2)
#define DLKERN_CALL_PORTABLE(name, ...) ::dlkern::cpu::avx2::name(__VA_ARGS__)
#else
#define DLKERN_CALL_PORTABLE(name, ...) ::dlkern::cpu::avx512::name(__VA_ARGS__)
#endif
#ifdef DLKERN_BUILT_AVX2
#define DLKERN_CALL_AVX2(name, ...) ::dlkern::cpu::avx2::name(__VA_ARGS__)
#else
#define DLKERN_CALL_AVX2(name, ...) DLKERN_CALL_PORTABLE(name, __VA_ARGS__)
#endif
#ifdef DLKERN_BUILT_AVX512
#define DLKERN_CALL_AVX512(name, ...) ::dlkern::cpu::avx512::name(__VA_ARGS__)
#else
#define DLKERN_CALL_AVX512(name, ...) DLKERN_CALL_AVX2(name, __VA_ARGS__)
#endif
#define DLKERN_CALL(name, ...)                                                                \
  (::dlkern::cpu::isa() == ::dlkern::cpu::Isa::avx512 ? DLKERN_CALL_AVX512(name, __VA_ARGS__) \
   : ::dlkern::cpu::isa() == ::dlkern::cpu::Isa::avx2 ? DLKERN_CALL_AVX2(name, __VA_ARGS__)   \
                                                      : DLKERN_CALL_PORTABLE(name, __VA_ARGS__))

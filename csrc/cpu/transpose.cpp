// Transposes that several families call.
#include "transpose.h"

namespace dlkern::cpu::DLKERN_ISA {

DLKERN_TRANSPOSES()

}  // namespace dlkern::cpu::DLKERN_ISA

// The product's instances that several families call.
#include "gemm.h"

namespace dlkern::cpu::DLKERN_ISA::gemm_detail {

DLKERN_GEMM()

}  // namespace dlkern::cpu::DLKERN_ISA::gemm_detail

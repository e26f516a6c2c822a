// The products that recurrent layers with options and without share.
#include "rnn_product.h"

namespace dlkern::cpu::DLKERN_ISA {

#if DLKERN_TILE_CODE
DLKERN_LAID_PRODUCTS()
#endif

}  // namespace dlkern::cpu::DLKERN_ISA

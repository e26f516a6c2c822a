// Packing for the tiles, which several families call.
#include "tiles.h"

#if DLKERN_TILE_CODE
namespace dlkern::cpu::DLKERN_ISA {

DLKERN_PACKING()

}  // namespace dlkern::cpu::DLKERN_ISA
#endif

// grid_sync(): all threads of a cooperative launch meet. Apart from ptx.cuh because its header is slow to compile.
#pragma once
#include "platform.cuh"
#ifdef __CUDACC__
#include <cooperative_groups.h>
#endif

namespace dlkern::cuda {

DLKERN_DEVICE void grid_sync() {
#ifdef __CUDACC__
  cooperative_groups::this_grid().sync();
#else
  ::cuda_on_host::grid_barrier("grid_sync");
#endif
}

}  // namespace dlkern::cuda

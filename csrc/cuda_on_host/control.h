// What the op layer and tests tell the machine and ask of it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cuda_on_host {

int64_t findings();  // how many reports there were

// The tensors that kernels may touch until forget_tensors(): results (`written`) and inputs. Checked build only.
#ifdef DLKERN_CHECKED
void track_tensor(const void* data, size_t bytes, bool written);
void forget_tensors();
#else
inline void track_tensor(const void*, size_t, bool) {}
inline void forget_tensors() {}
#endif

bool looks_at_indices();  // whether ops raise where one is out of range, or leave it to their kernels, as on a GPU

}  // namespace cuda_on_host

// Whether a view's memory is a GPU's, and whether this library has kernels for one. A front door asks
//
//     if constexpr (kHasGpu) if (on_gpu(op.x)) return cuda::softmax_forward(op);
//
// once its checks are done: what a library without CUDA does not have is not even named there.
#pragma once
#include "tilewright/view.h"

namespace tilewright {

#ifdef TILEWRIGHT_HAS_GPU
constexpr bool kHasGpu = true;
constexpr const char* kGpuLevel = TILEWRIGHT_HAS_GPU;
#else
constexpr bool kHasGpu = false;
constexpr const char* kGpuLevel = "";
#endif

// What tw.stats calls the place where an op on this view runs: on the CPU, its ISA level.
inline const char* level_of(const View& v, const char* isa) {
  return v.device == Device::cpu ? isa : kGpuLevel;
}

inline bool on_gpu(const View& v) {
  return v.device == Device::gpu;
}

}  // namespace tilewright

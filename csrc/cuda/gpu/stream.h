// Where a thread's launches go, and memory that lasts for one call. The host's side of the gpu layer.
#pragma once
#include <cstddef>
#include <string>
#include <utility>

#include "cuda/gpu/gpu.h"
#include "tilewright/errors.h"

namespace tilewright::gpu {

#ifdef TILEWRIGHT_EMULATE
constexpr const char* kLevel = "emulated";  // what tw.explain and tw.stats call the place
#else
constexpr const char* kLevel = "cuda";
#endif

// The caller's current stream: the binding sets it before each call. Launches of one thread are in
// its order, and nothing here waits for them.
inline thread_local void* t_stream = nullptr;
inline Stream current_stream() {
  return static_cast<Stream>(t_stream);
}

// Device memory of a call, in the order of its stream: what the launches before its end use stays
// until they are done.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes) {
    if (bytes == 0) return;
#ifdef TILEWRIGHT_EMULATE
    data_ = emulator::allocate(bytes);
#else
    const cudaError_t code = cudaMallocAsync(&data_, bytes, current_stream());
    if (code == cudaSuccess) return;
    throw DeviceError("no room for a workspace of " + std::to_string(bytes) +
                      " bytes on the GPU: " + cudaGetErrorString(code));
#endif
  }
  ~Workspace() {
    if (!data_) return;
#ifdef TILEWRIGHT_EMULATE
    emulator::release(data_);
#else
    cudaFreeAsync(data_, current_stream());
#endif
  }
  Workspace(Workspace&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Workspace& operator=(Workspace&&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

}  // namespace tilewright::gpu

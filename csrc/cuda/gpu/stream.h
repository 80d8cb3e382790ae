// Where a thread's launches go, and memory that lasts for one call. The host's side of the gpu layer.
#pragma once
#include <cstddef>
#include <new>
#include <string>
#include <utility>

#include "cuda/gpu/current.h"
#include "cuda/gpu/gpu.h"
#include "tilewright/errors.h"

namespace tilewright::gpu {

#ifdef TILEWRIGHT_EMULATE
constexpr const char* kLevel = "emulated";  // what tw.explain and tw.stats call the place
#else
constexpr const char* kLevel = "cuda";
#endif

// Launches of one thread are in the order of this stream, and nothing but read_number waits for them.
inline Stream current_stream() {
  return static_cast<Stream>(t_stream);
}

// Python's MemoryError, as CuPy's own: whoever made the device current adds which op it was.
class OutOfMemory : public std::bad_alloc {
 public:
  OutOfMemory(std::size_t bytes, const char* why)
      : what_("no room for " + std::to_string(bytes) + " bytes (" + why + ")") {}
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  std::string what_;
};

// Device memory in the order of a stream: released, it stays until the launches before are done.
inline void* allocate(std::size_t bytes, [[maybe_unused]] Stream stream) {
#ifdef TILEWRIGHT_EMULATE
  void* const data = emulator::allocate(bytes);
  const char* const why = "out of memory";
#else
  void* data = nullptr;
  const char* const why = cudaGetErrorString(cudaMallocAsync(&data, bytes, stream));
  if (!data) cudaGetLastError();  // else the next launch would answer for it
#endif
  if (data) return data;
  throw OutOfMemory(bytes, why);
}
inline void release(void* data, [[maybe_unused]] Stream stream) {
#ifdef TILEWRIGHT_EMULATE
  emulator::release(data);
#else
  if (cudaFreeAsync(data, stream) != cudaSuccess) cudaFree(data);  // the stream is gone
#endif
}

// Device memory of a call.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes)
      : stream_(current_stream()), data_(bytes ? allocate(bytes, stream_) : nullptr) {}
  ~Workspace() {
    if (data_) release(data_, stream_);
  }
  Workspace(Workspace&& other) noexcept
      : stream_(other.stream_), data_(std::exchange(other.data_, nullptr)) {}
  Workspace& operator=(Workspace&&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  Stream stream_;
  void* data_;
};

// A number of the device, once the stream has come to it: the only thing here that waits.
template <class T>
T read_number(const T* from) {
  if (t_capturing) throw Waits{};
#ifdef TILEWRIGHT_EMULATE
  return *from;
#else
  T number;
  const Stream stream = current_stream();
  cudaError_t code = cudaMemcpyAsync(&number, from, sizeof(T), cudaMemcpyDeviceToHost, stream);
  if (code == cudaSuccess) code = cudaStreamSynchronize(stream);
  if (code == cudaSuccess) return number;
  throw DeviceError(std::string("no number came from the GPU: ") + cudaGetErrorString(code));
#endif
}

}  // namespace tilewright::gpu

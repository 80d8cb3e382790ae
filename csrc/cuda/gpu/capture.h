// Launches that a stream captures instead of running them, to be launched together. The host's side of
// the gpu layer, as stream.h.
//
// The capture has a stream of its own: the default stream can't be captured, and what a stream was
// given before is no part of a graph. Workspaces are allocated and freed in the order of that stream:
// CUDA makes nodes of both, and the memory is the graph's.
#pragma once
#include "cuda/gpu/stream.h"

#ifdef TILEWRIGHT_EMULATE
#include "emulator/tape.h"
#endif

namespace tilewright::gpu {

// begin(), launches, end(); then instantiate(), and launch() as often as wanted.
#ifdef TILEWRIGHT_EMULATE

class Capture {
 public:
  void begin() {
    tape_.start();
    t_capturing = true;
  }
  void end() noexcept {
    t_capturing = false;
    tape_.stop();
  }
  void instantiate() {}
  void launch() const { tape_.play(); }

 private:
  emulator::Tape tape_;
};

#else

class Capture {
 public:
  Capture() = default;
  Capture(const Capture&) = delete;
  ~Capture() {
    if (executable_) cudaGraphExecDestroy(executable_);
    if (graph_) cudaGraphDestroy(graph_);
    if (stream_) cudaStreamDestroy(stream_);
  }
  void begin() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    before_ = std::exchange(t_stream, stream_);
    t_capturing = true;
  }
  void end() noexcept {
    t_capturing = false;
    t_stream = before_;
    ended_ = cudaStreamEndCapture(stream_, &graph_);
  }
  void instantiate() {
    check(ended_);
    check(cudaGraphInstantiate(&executable_, graph_, 0));
  }
  void launch() const { check(cudaGraphLaunch(executable_, current_stream())); }

 private:
  static void check(cudaError_t code) {
    if (code == cudaSuccess) return;
    cudaGetLastError();  // else the next launch would answer for it
    throw DeviceError(std::string("a CUDA graph: ") + cudaGetErrorString(code));
  }

  cudaStream_t stream_ = nullptr;
  void* before_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  cudaError_t ended_ = cudaSuccess;
  cudaGraphExec_t executable_ = nullptr;
};

#endif

}  // namespace tilewright::gpu

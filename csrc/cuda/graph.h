// A sequence of launches, captured once and launched together: a CUDA graph. Plain C++.
#pragma once
#include <functional>
#include <memory>

namespace tilewright::cuda {

class Graph {
 public:
  virtual ~Graph() = default;
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // On the calling thread's stream. Addresses and numbers are those of the capture.
  virtual void launch() const = 0;

  // What `launches` launches on this thread's stream; nothing runs. nullptr where it waits for the
  // device in between. Throws what `launches` throws.
  static std::unique_ptr<const Graph> capture(const std::function<void()>& launches);
};

}  // namespace tilewright::cuda

// Graphs: gpu/capture.h says what becomes of the launches.
#include "cuda/gpu/capture.h"
#include "cuda/graph.h"

namespace tilewright::cuda {
namespace {

class Captured final : public Graph {
 public:
  explicit Captured(const std::function<void()>& launches) {
    capture_.begin();
    try {
      launches();
    } catch (...) {
      capture_.end();
      throw;
    }
    capture_.end();
    capture_.instantiate();
  }
  void launch() const override { capture_.launch(); }

 private:
  gpu::Capture capture_;
};

}  // namespace

std::unique_ptr<const Graph> Graph::capture(const std::function<void()>& launches) {
  try {
    return std::make_unique<Captured>(launches);
  } catch (const gpu::Waits&) {
    return nullptr;
  }
}

}  // namespace tilewright::cuda

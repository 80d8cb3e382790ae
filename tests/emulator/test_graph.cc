// Graphs: what a capture holds, what it refuses, and what it leaves behind.
#include "cuda/gpu/stream.h"
#include "cuda/graph.h"
#include "device.h"

using namespace tilewright;

namespace {

__global__ void add_kernel(const float* x, float by, float* y) {
  y[threadIdx.x] = x[threadIdx.x] + by;
}

void add(const float* x, float by, float* y) {
  gpu::launch("add", add_kernel, dim3(1), dim3(4), 0, gpu::current_stream(), x, by, y);
}

}  // namespace

TEST(a_graph_runs_what_was_launched_and_reads_what_is_there_then) {
  const Device<float> x(4, 1.0f), y(4, 0.0f);
  const auto graph = cuda::Graph::capture([&] {
    const gpu::Workspace room(4 * sizeof(float));  // the graph's, though it is released here
    add(x.get(), 2, room.as<float>());
    add(room.as<float>(), 4, y.get());
  });
  CHECK(graph && y[0] == 0);
  graph->launch();
  CHECK(y[0] == 7 && y[3] == 7);
  x[3] = 10;
  graph->launch();
  CHECK(y[0] == 7 && y[3] == 16);
}

TEST(its_memory_is_given_back) {
  const std::size_t before = emulator::allocated_bytes();
  {
    const auto graph = cuda::Graph::capture([&] {
      const gpu::Workspace room(4 * sizeof(float));
      add(room.as<float>(), 1, room.as<float>());
    });
    CHECK(emulator::allocated_bytes() == before + 4 * sizeof(float));
  }
  CHECK(emulator::allocated_bytes() == before);
}

TEST(what_waits_for_the_device_is_not_captured) {
  const Device<float> x(4, 1.0f), y(4, 0.0f);
  const auto graph = cuda::Graph::capture([&] {
    add(x.get(), 1, y.get());
    gpu::read_number(y.get());
  });
  CHECK(!graph && y[0] == 0);
  add(x.get(), 1, y.get());  // launches are run again
  CHECK(y[0] == 2 && gpu::read_number(y.get()) == 2);
}

TEST(an_error_ends_the_capture) {
  const Device<float> x(4, 1.0f), y(4, 0.0f);
  CHECK_THROWS(ShapeError, "no", cuda::Graph::capture([&] {
                 add(x.get(), 1, y.get());
                 throw ShapeError("no");
               }));
  CHECK(y[0] == 0);
  add(x.get(), 1, y.get());
  CHECK(y[0] == 2);
}

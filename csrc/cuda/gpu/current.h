// The caller's current stream, which the binding sets before each call. Plain C++: the binding is not
// compiled by nvcc.
#pragma once

namespace tilewright::gpu {

inline thread_local void* t_stream = nullptr;

// Whether this thread's launches are being captured (cuda/graph.h), and what then comes of waiting.
inline thread_local bool t_capturing = false;
struct Waits {};

}  // namespace tilewright::gpu

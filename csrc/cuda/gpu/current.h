// The caller's current stream, which the binding sets before each call. Plain C++: the binding is not
// compiled by nvcc.
#pragma once

namespace tilewright::gpu {

inline thread_local void* t_stream = nullptr;

}  // namespace tilewright::gpu

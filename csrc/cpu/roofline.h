// The roofline loops on every thread at once, for the bench.
#pragma once
#include "tilewright/view.h"

namespace tilewright {

// Each returns what it did: floating-point operations, or bytes moved (read and written). `tasks`
// run on num_threads().
double roofline_multiply_add(int64_t tasks, int64_t steps);
double roofline_multiply_add_int8(int64_t tasks, int64_t steps);
// The same of bfloat16; 0, at once, at a level without instructions for it.
double roofline_multiply_add_bf16(int64_t tasks, int64_t steps);
// `x` is cut into `tasks` pieces, each read (and written to `y`) `repeats` times by one thread.
double roofline_read(const View& x, int64_t tasks, int64_t repeats);
double roofline_copy(const View& x, const View& y, int64_t tasks, int64_t repeats);
// By stores past the caches, where the level has them.
double roofline_copy_streaming(const View& x, const View& y, int64_t tasks, int64_t repeats);

// out = a @ b by the kernel alone, `repeats` times in a loop without checks or Python; seconds for
// one.
double time_gemm(const View& a, const View& b, const View& out, int64_t repeats);

}  // namespace tilewright

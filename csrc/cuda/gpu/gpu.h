// All that kernels of csrc/cuda may use beyond plain CUDA C++, under one set of names: PTX and the
// CUDA runtime when nvcc compiles them, the emulator when TILEWRIGHT_EMULATE is defined.
//
//   launch(name, kernel, grid, block, shared_bytes, stream, args...)     the only way to launch
//   shared_memory<T>()                      the block's dynamic shared memory, as one struct
//   ldmatrix, ldmatrix_transposed(r, row)   1, 2 or 4 matrices of 8 x 8 16-bit elements
//   mma_bf16, mma_f16, mma_tf32(d, a, b)    d += a b on a 16 x 8 tile
//   mma_int8<A, B>(d, a, b)                 the same, A and B each int8 or uint8
//   cp_async16(shared, global, bytes), cp_async_commit(), cp_async_wait<groups left>()
//   load<V>(from), store(to, v)             one access of the vector type's width
//   exp2_fast(x)                            the hardware's approximation, subnormals are zero
//
// and CUDA's own __syncthreads, __syncwarp, __shfl_*_sync, votes and atomics. A new instruction is
// a function in ptx.h, one in emulated.h, and a test. csrc/README.md has the rules for kernels.
#pragma once
#include <cstdint>

#ifdef TILEWRIGHT_EMULATE
#include "cuda/gpu/emulated.h"
#else
#include "cuda/gpu/ptx.h"
#endif

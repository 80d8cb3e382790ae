// What attention reads of a KVCache in a GPU's memory, for one call.
#pragma once
#include "cuda/attention.h"
#include "cuda/gpu/stream.h"
#include "cuda/workspace.h"
#include "tilewright/kvcache.h"

namespace tilewright::cuda {

// Pages of floats are read where they are, by a table of their places; int8 is made float32 before.
class CachedKeys {
 public:
  explicit CachedKeys(const KVSnapshot& cache);

  attention::Operand k, v;      // (B, Hkv, tokens of the longest, D)
  attention::Integers lengths;  // (B,)

 private:
  gpu::Workspace words_;   // lengths (B,), then where pages begin (B, pages)
  gpu::Workspace floats_;  // of int8: K and V, (B, Hkv, longest, D) each
};

}  // namespace tilewright::cuda

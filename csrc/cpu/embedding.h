// Rows of a table by id, and the sum of gradients by id.
#pragma once
#include "cpu/kernel_table.h"
#include "tilewright/ops.h"

namespace tilewright {

// `ids` (count,): each in [0, V).
void embedding_forward(const EmbeddingForward& op, const int64_t* ids, const KernelTable& table);
void embedding_backward(const EmbeddingBackward& op, const int64_t* ids, const KernelTable& table);

}  // namespace tilewright

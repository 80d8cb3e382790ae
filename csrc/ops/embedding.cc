// embedding: the argument rules.
#include "cpu/embedding.h"

#include <algorithm>

#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/scratch.h"
#include "core/size.h"
#include "core/trace.h"
#include "cpu/isa.h"
#include "cuda/kernels.h"
#include "ops/ids.h"

namespace tilewright {
namespace {

const Check check{"embedding", Check::on_gpu_too};

void check_table(const char* arg, const View& table) {
  check.dtype(arg, table, kFloats);
  if (table.rank == 2) return;
  check.shape_error(std::string(arg) + " must have 2 axes, (V, C), got shape " +
                    format_shape(table));
}

// (..., C): a row of the table for each id.
void check_rows(const char* arg, const View& v, const View& ids, int64_t C) {
  if (ids.rank + 1 > kMaxRank) check.shape_error("ids must have at most 7 axes");
  int64_t want[kMaxRank];
  std::copy(ids.shape, ids.shape + ids.rank, want);
  want[ids.rank] = C;
  check.shape(arg, v, want, ids.rank + 1, "for a row of the table for each of ids", &ids);
}

}  // namespace

void run(const EmbeddingForward& op) {
  check.dtype("ids", op.ids, {DType::s32, DType::s64});
  check_table("table", op.table);
  check.output("out", op.y, kFloats);
  check_rows("out", op.y, op.ids, op.table.shape[1]);
  check.no_overlap("out", op.y, "table", op.table);
  check.no_overlap("out", op.y, "ids", op.ids);
  const KernelTable& table = kernels();
  if constexpr (kHasGpu) {
    if (on_gpu(op.ids)) {
      if (op.y.size() == 0) return;
      const Trace trace("embedding", kGpuLevel, [&] { return format_shape(op.y); });
      return cuda::embedding_forward(op);
    }
  }
  const Scratch ids(product_of({op.ids.size(), 8}));
  read_ids(check, "ids", op.ids, op.table.shape[0], "the rows of the table", nullptr,
           ids.as<int64_t>());
  if (op.y.size() == 0) return;
  const Trace trace("embedding", table.isa, [&] { return format_shape(op.y); });
  embedding_forward(op, ids.as<int64_t>(), table);
}

void run(const EmbeddingBackward& op) {
  check.dtype("ids", op.ids, {DType::s32, DType::s64});
  check_table("dtable", op.dtable);
  check.output("dtable", op.dtable, kFloats);
  check.dtype("dy", op.dy, kFloats);
  check_rows("dy", op.dy, op.ids, op.dtable.shape[1]);
  check.no_overlap("dtable", op.dtable, "dy", op.dy);
  const KernelTable& table = kernels();
  if constexpr (kHasGpu) {
    if (on_gpu(op.ids)) {
      if (op.dtable.size() == 0) return;
      const Trace trace("embedding_backward", kGpuLevel, [&] { return format_shape(op.dy); });
      return cuda::embedding_backward(op);
    }
  }
  const Scratch ids(product_of({op.ids.size(), 8}));
  read_ids(check, "ids", op.ids, op.dtable.shape[0], "the rows of the table", nullptr,
           ids.as<int64_t>());
  if (op.dtable.size() == 0) return;
  const Trace trace("embedding_backward", table.isa, [&] { return format_shape(op.dy); });
  embedding_backward(op, ids.as<int64_t>(), table);
}

}  // namespace tilewright

// KVCache: what one may be made with, and what may be appended to it.
#include "cpu/kvcache.h"

#include <initializer_list>
#include <string>

#include "core/check.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/trace.h"
#include "cuda/kernels.h"
#include "tilewright/ops.h"

namespace tilewright {
namespace {

constexpr int64_t kMost = int64_t{1} << 20;  // products of three such sizes stay below 2^63

void check_dtype(const Check& check, DType dtype) {
  if (is_float(dtype) || dtype == DType::s8) return;
  check.dtype_error(std::string("dtype must be float32, bfloat16, float16 or int8, got ") +
                    dtype_name(dtype));
}

}  // namespace

void check_sizes(const KVShape& s) {
  const Check check{"KVCache"};
  check_dtype(check, s.dtype);
  const struct {
    const char* name;
    int64_t value, least, most;
  } sizes[] = {{"layers", s.layers, 1, kMost},
               {"batch", s.batch, 0, kMost},
               {"heads_kv", s.heads, 1, kMost},
               {"head_dim", s.head_dim, 1, attention::kMaxHeadDim},
               {"max_tokens", s.max_tokens, 0, INT32_MAX},
               {"page", s.page, 1, kMost}};
  for (const auto& size : sizes) {
    if (size.value >= size.least && size.value <= size.most) continue;
    check.shape_error(std::string(size.name) + " must lie between " + std::to_string(size.least) +
                      " and " + std::to_string(size.most) + ", got " + std::to_string(size.value));
  }
}

// k and v in one memory, and in that of the pages.
void check_devices(const KVAppend& op) {
  const auto name = [](Device device) { return device == Device::gpu ? "the GPU" : "the CPU"; };
  const auto check = [&](const char* arg, Device got, Device want, const char* like) {
    if (got == want) return;
    throw DeviceError(std::string("KVCache.append: ") + arg + " must be on " + name(want) +
                      " like " + like + ", got an array of " + name(got));
  };
  check("v", op.v.device, op.k.device, "k");
  if (!op.cache->empty()) check("k", op.k.device, op.cache->device(), "the tokens before");
}

void check_operands(const KVAppend& op) {
  const Check check{"KVCache.append", Check::on_gpu_too};
  if (!op.cache) check.dtype_error("cache is required, got nullptr");
  const KVShape& s = op.cache->shape();
  if (op.layer < 0 || op.layer >= s.layers) {
    check.shape_error("layer must lie between 0 and " + std::to_string(s.layers - 1) + ", got " +
                      std::to_string(op.layer));
  }
  check.dtype("k", op.k, kFloats);
  check.dtype("v", op.v, kFloats);
  const int64_t tokens = op.k.rank == 4 ? op.k.shape[2] : 0;
  const std::initializer_list<int64_t> want = {s.batch, s.heads, tokens, s.head_dim};
  check.shape("k", op.k, want, "(batch, heads_kv, T, head_dim of the cache)");
  check.shape("v", op.v, want, "to match k", &op.k);
  check_devices(op);
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t length = op.cache->length(op.layer, b);
    if (length + tokens <= s.max_tokens) continue;
    check.shape_error("k must fit into max_tokens = " + std::to_string(s.max_tokens) + " after " +
                      std::to_string(length) + " tokens of sequence " + std::to_string(b) +
                      ", got " + std::to_string(tokens));
  }
}

void run(const KVAppend& op) {
  check_operands(op);
  const KVCache::Append append = op.cache->plan(op.layer, op.k.shape[2], op.k.device);
  op.cache->fill(append, op.k, op.v);
  op.cache->commit(append);
}

KVCache::Append KVCache::plan(int64_t layer, int64_t tokens, Device device) const {
  if constexpr (kHasGpu) {
    const NewPage new_gpu_page = [](int64_t bytes) {  // in the order of the current stream
      const cuda::Memory memory = cuda::allocate(bytes);
      return KVPage(memory.data, [memory](char*) { cuda::release(memory); });
    };
    if (device == Device::gpu) return plan(layer, tokens, device, new_gpu_page);
  }
  return plan(layer, tokens, device, &new_page);
}

void KVCache::fill(const Append& append, const View& k, const View& v) const {
  const KernelTable& table = kernels();
  const Trace trace("kvcache_append", level_of(k, table.isa), [&] { return format_shape(k); });
  if constexpr (kHasGpu) {
    if (on_gpu(k)) return cuda::fill_pages(append, state_->layout, k, v);
  }
  fill_pages(append, state_->layout, k, v, table);
}

void KVCache::append(int64_t layer, const View& k, const View& v) {
  run(KVAppend{this, layer, k, v});
}

}  // namespace tilewright

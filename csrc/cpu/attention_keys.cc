// Where the drivers of attention find a block of keys: paged memory looks like an array to them.
//
//   block of 128 keys     inside one page: read there        across pages: its rows are copied
//   +---------------+     +------------------------------+   +----------+ +----------+
//   | 256 ... 383   |     | page 0, 256 tokens |  page 1 |   | 48 rows  | | 80 rows  | -> scratch
//   +---------------+     +------------------------------+   +----------+ +----------+
//
// So pages of whole blocks are never copied, and no more than a block ever is. int8 rows are
// dequantized on the way where a reader packs floats; the few-row kernels multiply by the scales
// as they load.
#include <algorithm>
#include <cstring>

#include "cpu/attention.h"

namespace tilewright::attention {

KeyRows rows_in_page(const PagedKeys& k, bool v, const char* page, int64_t head, int64_t first) {
  const int64_t row = head * k.tokens + first;
  const char* data = page + (v ? k.value : 0) + row * k.dims * dtype_size(k.dtype);
  const auto scales = reinterpret_cast<const float*>(page + k.scale[v]);
  return {{data, k.dtype, k.dims, 1}, k.dtype == DType::s8 ? scales + row : nullptr};
}

namespace {

bool copies(const AttentionProblem& p, const KernelTable& table, bool widen) {
  return p.paged &&
         ((widen && p.paged->dtype == DType::s8) || p.paged->tokens % table.attention.block != 0);
}

}  // namespace

// Scratch: K's rows, V's rows, each followed by their scales.
KeyReader::KeyReader(const AttentionProblem& p, const KernelTable& table, bool widen)
    : p_(p),
      table_(table),
      widen_(widen),
      room_(copies(p, table, widen) ? table.attention.block * (p.paged->dims + 1) * 4 : 0),
      scratch_(2 * room_) {}

KeyRows KeyReader::keys(int64_t unit, int64_t key, int64_t count) const {
  if (p_.paged) return paged(false, unit, key, count);
  return {from_row(head_matrix(p_.k, unit / p_.heads_kv, unit % p_.heads_kv), key), nullptr};
}

KeyRows KeyReader::values(int64_t unit, int64_t key, int64_t count) const {
  if (p_.paged) return paged(true, unit, key, count);
  return {from_row(head_matrix(p_.v, unit / p_.heads_kv, unit % p_.heads_kv), key), nullptr};
}

KeyRows KeyReader::paged(bool v, int64_t unit, int64_t key, int64_t count) const {
  const PagedKeys& k = *p_.paged;
  const char* const* pages = k.pages + unit / p_.heads_kv * k.stride;
  const int64_t head = unit % p_.heads_kv;
  const bool widen = widen_ && k.dtype == DType::s8;
  if (key / k.tokens == (key + count - 1) / k.tokens && !widen) {
    return rows_in_page(k, v, pages[key / k.tokens], head, key % k.tokens);
  }
  char* const to = scratch_.as<char>() + (v ? room_ : 0);
  const DType dtype = widen ? DType::f32 : k.dtype;
  const int64_t row = k.dims * dtype_size(dtype);
  const auto scales = reinterpret_cast<float*>(to + table_.attention.block * k.dims * 4);
  for (int64_t i = 0; i < count;) {
    const int64_t token = (key + i) % k.tokens, n = std::min(count - i, k.tokens - token);
    const KeyRows part = rows_in_page(k, v, pages[(key + i) / k.tokens], head, token);
    if (widen) {
      table_.quantize.dequantize(part.rows, n, k.dims, part.scale, nullptr,
                                 {to + i * row, dtype, k.dims, 1});
    } else {
      std::memcpy(to + i * row, part.rows.data, size_t(n * row));
      if (part.scale) std::memcpy(scales + i, part.scale, size_t(n) * 4);
    }
    i += n;
  }
  return {{to, dtype, k.dims, 1}, dtype == DType::s8 ? scales : nullptr};
}

}  // namespace tilewright::attention

#include "cpu/kvcache.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <unordered_set>

#include "core/dtype.h"
#include "core/parallel.h"
#include "cpu/quantize.h"

namespace tilewright {
namespace {

constexpr int64_t kAlign = 64;
constexpr double kNsPerElement = 0.7;  // of quantizing, the slowest

int64_t aligned(int64_t bytes) {
  return (bytes + kAlign - 1) / kAlign * kAlign;
}

KVPage new_page(int64_t bytes) {
  const auto alignment = std::align_val_t(kAlign);
  const auto free = [alignment](char* p) { ::operator delete(p, alignment); };
  return KVPage(static_cast<char*>(::operator new(size_t(bytes), alignment)), free);
}

// Whether nobody else holds the page, nor reads it any more: what others did to it before they let
// go happens before what the caller does next. use_count() alone would not order that, counting
// does (acquire and release); a fence would too, but ThreadSanitizer does not know fences.
bool is_ours(const KVPage& page) {
  if (page.use_count() != 1) return false;
  const KVPage counted = page;
  return true;
}

// Rows of floats in a page's own form; int8 with their scales.
void store_rows(const Matrix& from, int64_t rows, int64_t dims, const attention::KeyRows& to,
                const QuantizeKernels& kernels) {
  void* data = const_cast<void*>(to.rows.data);
  if (to.scale) {
    const auto scale = const_cast<float*>(to.scale);
    std::fill(scale, scale + rows, 0.0f);
    kernels.amax(from, rows, dims, scale);
    for (int64_t i = 0; i < rows; ++i) scale[i] = cpu::scale_of(scale[i], 127.0f);
    return kernels.quantize(from, rows, dims, scale, nullptr, {-127.0f, 127.0f}, to.rows);
  }
  const int64_t size = dtype_size(to.rows.dtype), row = dims * size;
  for (int64_t i = 0; i < rows; ++i) {
    const char* source =
        static_cast<const char*>(from.data) + i * from.row * dtype_size(from.dtype);
    char* target = static_cast<char*>(data) + i * row;
    if (from.dtype == to.rows.dtype && (from.col == 1 || dims == 1)) {
      std::memcpy(target, source, size_t(row));
    } else {
      for (int64_t d = 0; d < dims; ++d) {
        store_float(target, d, to.rows.dtype, load_float(source, d * from.col, from.dtype));
      }
    }
  }
}

}  // namespace

PagedKeys KVSnapshot::paged() const& {
  PagedKeys k = layout_;
  k.pages = pages_.data();
  k.stride = lengths_.empty() ? 0 : int64_t(pages_.size() / lengths_.size());
  return k;
}

View KVSnapshot::lengths() const& {
  View v;
  v.data = const_cast<int64_t*>(lengths_.data());
  v.dtype = DType::s64, v.present = true;
  v.rank = 1, v.shape[0] = int64_t(lengths_.size()), v.stride[0] = 1;
  return v;
}

int64_t KVSnapshot::longest() const {
  return lengths_.empty() ? 0 : *std::max_element(lengths_.begin(), lengths_.end());
}

KVCache::KVCache(const KVShape& shape)
    : shape_(shape), layout_{}, sequences_(size_t(shape.layers * shape.batch)) {
  shape_.page = std::min(shape.page, std::max<int64_t>(shape.max_tokens, 1));
  const int64_t rows = shape_.heads * shape_.page;
  const int64_t values = aligned(rows * shape_.head_dim * dtype_size(shape_.dtype));
  const int64_t scales = shape_.dtype == DType::s8 ? aligned(rows * 4) : 0;
  layout_.tokens = shape_.page, layout_.heads = shape_.heads, layout_.dims = shape_.head_dim;
  layout_.dtype = shape_.dtype;
  layout_.value = values;
  layout_.scale[0] = 2 * values, layout_.scale[1] = 2 * values + scales;
  page_bytes_ = 2 * (values + scales);
}

KVSnapshot KVCache::snapshot(int64_t layer) const {
  KVSnapshot s;
  s.layout_ = layout_;
  size_t most = 0;
  for (int64_t b = 0; b < shape_.batch; ++b) most = std::max(most, at(layer, b).pages.size());
  s.pages_.assign(most * size_t(shape_.batch), nullptr);
  for (int64_t b = 0; b < shape_.batch; ++b) {
    const Sequence& from = at(layer, b);
    s.lengths_.push_back(from.length);
    s.held_.insert(s.held_.end(), from.pages.begin(), from.pages.end());
    for (size_t j = 0; j < from.pages.size(); ++j) {
      s.pages_[size_t(b) * most + j] = from.pages[j].get();
    }
  }
  return s;
}

int64_t KVCache::nbytes() const {
  std::unordered_set<const char*> distinct;
  for (const Sequence& s : sequences_) {
    for (const KVPage& page : s.pages) distinct.insert(page.get());
  }
  return int64_t(distinct.size()) * page_bytes_;
}

KVCache::Append KVCache::plan(int64_t layer, int64_t tokens) const {
  Append append{layer, tokens, {}};
  for (int64_t b = 0; b < shape_.batch; ++b) {
    const Sequence& s = at(layer, b);
    Append::Sequence planned{s.length, {}, nullptr};
    const auto first = size_t(s.length / shape_.page);
    const auto end = size_t(attention::divide_up(s.length + tokens, shape_.page));
    for (size_t j = first; tokens && j < end; ++j) {
      const bool begun = j < s.pages.size(), ours = begun && is_ours(s.pages[j]);
      planned.pages.push_back(ours ? s.pages[j] : new_page(page_bytes_));
      if (begun && !ours) planned.shared = s.pages[j];
    }
    append.sequences.push_back(std::move(planned));
  }
  return append;
}

// A task is a page. It has no other writer: is_ours, or it is new.
void KVCache::fill(const Append& append, const View& k, const View& v,
                   const KernelTable& table) const {
  struct Task {
    int64_t b;
    size_t page;
  };
  std::vector<Task> tasks;
  for (int64_t b = 0; b < shape_.batch; ++b) {
    const size_t count = append.sequences[size_t(b)].pages.size();
    for (size_t j = 0; j < count; ++j) tasks.push_back({b, j});
  }
  const double work = double(k.size() + v.size()) * kNsPerElement;
  parallel_for(int64_t(tasks.size()), work, [&](int64_t index) {
    const auto [b, j] = tasks[size_t(index)];
    const Append::Sequence& s = append.sequences[size_t(b)];
    char* page = s.pages[j].get();
    if (j == 0 && s.shared) std::memcpy(page, s.shared.get(), size_t(page_bytes_));
    const int64_t begin = (s.length / shape_.page + int64_t(j)) * shape_.page;
    const int64_t first = std::max(begin, s.length);
    const int64_t end = std::min(begin + shape_.page, s.length + append.tokens);
    for (const bool value : {false, true}) {
      for (int64_t h = 0; h < shape_.heads; ++h) {
        const Matrix from =
            attention::from_row(attention::head_matrix(value ? v : k, b, h), first - s.length);
        store_rows(from, end - first, shape_.head_dim,
                   attention::rows_in_page(layout_, value, page, h, first - begin), table.quantize);
      }
    }
  });
}

bool KVCache::commit(const Append& append) {
  for (int64_t b = 0; b < shape_.batch; ++b) {
    if (at(append.layer, b).length != append.sequences[size_t(b)].length) return false;
  }
  for (int64_t b = 0; b < shape_.batch; ++b) {
    Sequence& s = at(append.layer, b);
    const Append::Sequence& planned = append.sequences[size_t(b)];
    if (planned.pages.empty()) continue;
    s.pages.resize(size_t(s.length / shape_.page));
    s.pages.insert(s.pages.end(), planned.pages.begin(), planned.pages.end());
    s.length += append.tokens;
  }
  return true;
}

void KVCache::truncate(int64_t b, int64_t n) {
  for (int64_t layer = 0; layer < shape_.layers; ++layer) {
    Sequence& s = at(layer, b);
    s.length = std::min(s.length, n);
    s.pages.resize(size_t(attention::divide_up(s.length, shape_.page)));
  }
}

KVCache KVCache::fork(const std::vector<int64_t>& sequences) const {
  KVShape shape = shape_;
  shape.batch = int64_t(sequences.size());
  KVCache made(shape);
  for (int64_t layer = 0; layer < shape_.layers; ++layer) {
    for (int64_t b = 0; b < shape.batch; ++b) made.at(layer, b) = at(layer, sequences[size_t(b)]);
  }
  return made;
}

}  // namespace tilewright

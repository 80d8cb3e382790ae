#include "cpu/kvcache.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <unordered_set>
#include <utility>

#include "core/check.h"
#include "core/dtype.h"
#include "core/parallel.h"
#include "cpu/quantize.h"
#include "tilewright/ops.h"

namespace tilewright {
namespace {

constexpr int64_t kAlign = 64;
constexpr double kNsPerElement = 0.25;  // of quantizing, the slowest

int64_t aligned(int64_t bytes) {
  return (bytes + kAlign - 1) / kAlign * kAlign;
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

// The first `count` rows of a head, from one page to another. What lies beyond them in `from` may
// be written to meanwhile, by the cache that it is shared with.
void copy_rows(const PagedKeys& layout, bool value, int64_t head, int64_t count, const char* from,
               char* to) {
  const attention::KeyRows source = attention::rows_in_page(layout, value, from, head, 0);
  const attention::KeyRows target = attention::rows_in_page(layout, value, to, head, 0);
  const auto copy = [count](const void* of, const void* into, int64_t bytes) {
    std::memcpy(const_cast<void*>(into), of, size_t(count * bytes));
  };
  copy(source.rows.data, target.rows.data, layout.dims * dtype_size(layout.dtype));
  if (source.scale) copy(source.scale, target.scale, sizeof(float));
}

// 0 <= i < count, else ShapeError; `what` names the call and the argument.
void check_index(const char* what, int64_t i, int64_t count) {
  if (i >= 0 && i < count) return;
  throw ShapeError(std::string(what) + " must lie between 0 and " + std::to_string(count - 1) +
                   ", got " + std::to_string(i));
}

}  // namespace

KVPage new_page(int64_t bytes) {
  const auto alignment = std::align_val_t(kAlign);
  const auto free = [alignment](char* p) { ::operator delete(p, alignment); };
  return KVPage(static_cast<char*>(::operator new(size_t(bytes), alignment)), free);
}

KVSnapshot::KVSnapshot(std::shared_ptr<const State> state) : state_(std::move(state)) {}

PagedKeys KVSnapshot::paged() const& {
  const State& s = *state_;
  PagedKeys k = s.layout;
  k.pages = s.pages.data();
  k.stride = s.lengths.empty() ? 0 : int64_t(s.pages.size() / s.lengths.size());
  return k;
}

View KVSnapshot::lengths() const& {
  const std::vector<int64_t>& lengths = state_->lengths;
  View v;
  v.data = const_cast<int64_t*>(lengths.data());
  v.dtype = DType::s64, v.present = true;
  v.rank = 1, v.shape[0] = int64_t(lengths.size()), v.stride[0] = 1;
  return v;
}

Device KVSnapshot::device() const {
  return state_->device;
}

int64_t KVSnapshot::longest() const {
  const std::vector<int64_t>& lengths = state_->lengths;
  return lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
}

KVCache::State::State(const KVShape& wanted)
    : shape(wanted), layout{}, sequences(size_t(wanted.layers * wanted.batch)) {
  shape.page = std::min(shape.page, std::max<int64_t>(shape.max_tokens, 1));
  const int64_t rows = shape.heads * shape.page;
  const int64_t values = aligned(rows * shape.head_dim * dtype_size(shape.dtype));
  const int64_t scales = shape.dtype == DType::s8 ? aligned(rows * 4) : 0;
  layout.tokens = shape.page, layout.heads = shape.heads, layout.dims = shape.head_dim;
  layout.dtype = shape.dtype;
  layout.value = values;
  layout.scale[0] = 2 * values, layout.scale[1] = 2 * values + scales;
  page_bytes = 2 * (values + scales);
}

KVCache::KVCache(const KVShape& shape) {
  check_sizes(shape);
  state_ = std::make_unique<State>(shape);
}
KVCache::KVCache(KVCache&&) noexcept = default;
KVCache& KVCache::operator=(KVCache&&) noexcept = default;
KVCache::~KVCache() = default;

const KVShape& KVCache::shape() const {
  return state_->shape;
}

int64_t KVCache::length(int64_t layer, int64_t b) const {
  check_index("KVCache.length: layer", layer, shape().layers);
  check_index("KVCache.length: b", b, shape().batch);
  return state_->at(layer, b).length;
}

Device KVCache::device() const {
  return state_->device;
}

bool KVCache::empty() const {
  const auto& s = state_->sequences;
  return std::all_of(s.begin(), s.end(), [](const State::Sequence& x) { return x.pages.empty(); });
}

KVSnapshot KVCache::snapshot(int64_t layer) const {
  check_index("KVCache.snapshot: layer", layer, shape().layers);
  auto made = std::make_shared<KVSnapshot::State>();
  KVSnapshot::State& s = *made;
  s.layout = state_->layout, s.device = state_->device;
  size_t most = 0;
  for (int64_t b = 0; b < shape().batch; ++b)
    most = std::max(most, state_->at(layer, b).pages.size());
  s.pages.assign(most * size_t(shape().batch), nullptr);
  for (int64_t b = 0; b < shape().batch; ++b) {
    const State::Sequence& from = state_->at(layer, b);
    s.lengths.push_back(from.length);
    s.held.insert(s.held.end(), from.pages.begin(), from.pages.end());
    for (size_t j = 0; j < from.pages.size(); ++j) {
      s.pages[size_t(b) * most + j] = from.pages[j].get();
    }
  }
  return KVSnapshot(std::move(made));
}

int64_t KVCache::nbytes() const {
  std::unordered_set<const char*> distinct;
  for (const State::Sequence& s : state_->sequences) {
    for (const KVPage& page : s.pages) distinct.insert(page.get());
  }
  return int64_t(distinct.size()) * state_->page_bytes;
}

KVCache::Append KVCache::plan(int64_t layer, int64_t tokens, Device device,
                              NewPage new_page) const {
  Append append{layer, tokens, device, {}};
  for (int64_t b = 0; b < shape().batch; ++b) {
    const State::Sequence& s = state_->at(layer, b);
    Append::Sequence planned{s.length, {}, nullptr};
    const auto first = size_t(s.length / shape().page);
    const auto end = size_t(attention::divide_up(s.length + tokens, shape().page));
    for (size_t j = first; tokens && j < end; ++j) {
      const bool begun = j < s.pages.size(), ours = begun && is_ours(s.pages[j]);
      planned.pages.push_back(ours ? s.pages[j] : new_page(state_->page_bytes));
      if (begun && !ours) planned.shared = s.pages[j];
    }
    append.sequences.push_back(std::move(planned));
  }
  return append;
}

// A task is a page. It has no other writer: is_ours, or it is new.
void fill_pages(const KVCache::Append& append, const PagedKeys& layout, const View& k,
                const View& v, const KernelTable& table) {
  struct Task {
    int64_t b;
    size_t page;
  };
  std::vector<Task> tasks;
  for (int64_t b = 0; b < k.shape[0]; ++b) {
    const size_t count = append.sequences[size_t(b)].pages.size();
    for (size_t j = 0; j < count; ++j) tasks.push_back({b, j});
  }
  const double work = double(k.size() + v.size()) * kNsPerElement;
  parallel_for(int64_t(tasks.size()), work, [&](int64_t index) {
    const auto [b, j] = tasks[size_t(index)];
    const KVCache::Append::Sequence& s = append.sequences[size_t(b)];
    char* page = s.pages[j].get();
    const char* shared = j == 0 ? s.shared.get() : nullptr;
    const int64_t begin = (s.length / layout.tokens + int64_t(j)) * layout.tokens;
    const int64_t first = std::max(begin, s.length);
    const int64_t end = std::min(begin + layout.tokens, s.length + append.tokens);
    for (const bool value : {false, true}) {
      for (int64_t h = 0; h < layout.heads; ++h) {
        if (shared) copy_rows(layout, value, h, first - begin, shared, page);
        const Matrix from =
            attention::from_row(attention::head_matrix(value ? v : k, b, h), first - s.length);
        store_rows(from, end - first, layout.dims,
                   attention::rows_in_page(layout, value, page, h, first - begin), table.quantize);
      }
    }
  });
}

bool KVCache::commit(const Append& append) {
  for (int64_t b = 0; b < shape().batch; ++b) {
    if (state_->at(append.layer, b).length != append.sequences[size_t(b)].length) return false;
  }
  for (int64_t b = 0; b < shape().batch; ++b) {
    State::Sequence& s = state_->at(append.layer, b);
    const Append::Sequence& planned = append.sequences[size_t(b)];
    if (planned.pages.empty()) continue;
    s.pages.resize(size_t(s.length / shape().page));
    s.pages.insert(s.pages.end(), planned.pages.begin(), planned.pages.end());
    s.length += append.tokens;
    state_->device = append.device;
  }
  return true;
}

void KVCache::truncate(int64_t b, int64_t n) {
  check_index("KVCache.truncate: b", b, shape().batch);
  if (n < 0) throw ShapeError("KVCache.truncate: n must not be negative, got " + std::to_string(n));
  for (int64_t layer = 0; layer < shape().layers; ++layer) {
    State::Sequence& s = state_->at(layer, b);
    s.length = std::min(s.length, n);
    s.pages.resize(size_t(attention::divide_up(s.length, shape().page)));
  }
}

KVCache KVCache::fork(const std::vector<int64_t>& sequences) const {
  for (const int64_t b : sequences) check_index("KVCache.fork: sequences", b, shape().batch);
  KVShape shape = state_->shape;
  shape.batch = int64_t(sequences.size());
  KVCache made(shape);
  made.state_->device = state_->device;
  for (int64_t layer = 0; layer < shape.layers; ++layer) {
    for (int64_t b = 0; b < shape.batch; ++b)
      made.state_->at(layer, b) = state_->at(layer, sequences[size_t(b)]);
  }
  return made;
}

}  // namespace tilewright

// Arrays whose neighbours on both sides are pages that nobody may touch: one element too far is a
// segmentation fault, in plain builds too.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>

#include "core/dtype.h"
#include "cpu/isa.h"
#include "tilewright/view.h"

namespace test {

using tilewright::DType;
using tilewright::View;

enum class Against { end, start };  // which end of the array meets the guard

class Guarded {
 public:
  explicit Guarded(int64_t bytes, Against against = Against::end) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t inner = (bytes + page - 1) / page * page;
    size_ = size_t(inner + 2 * page);
    map_ = static_cast<char*>(
        mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (map_ == MAP_FAILED) throw std::bad_alloc();
    if (inner) mprotect(map_ + page, size_t(inner), PROT_READ | PROT_WRITE);
    data_ = map_ + page + (against == Against::end ? inner - bytes : 0);
  }
  ~Guarded() { munmap(map_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char* map_;
  char* data_;
  size_t size_;
};

// Small integers: exact in every dtype, and so are their short sums of products.
inline int small(int64_t i, int seed) {
  return int((i * 7 + seed * 5 + i / 11) % 9) - 4;
}

inline void set_element(void* p, int64_t i, DType t, float value) {
  switch (t) {
    case DType::s8:
      static_cast<int8_t*>(p)[i] = int8_t(value);
      break;
    case DType::u8:
      static_cast<uint8_t*>(p)[i] = uint8_t(value);
      break;
    case DType::s32:
      static_cast<int32_t*>(p)[i] = int32_t(value);
      break;
    case DType::s64:
      static_cast<int64_t*>(p)[i] = int64_t(value);
      break;
    default:
      tilewright::store_float(p, i, t, value);
  }
}

inline float element(const void* p, int64_t i, DType t) {
  switch (t) {
    case DType::s8:
      return static_cast<const int8_t*>(p)[i];
    case DType::u8:
      return static_cast<const uint8_t*>(p)[i];
    case DType::s32:
      return float(static_cast<const int32_t*>(p)[i]);
    case DType::s64:
      return float(static_cast<const int64_t*>(p)[i]);
    default:
      return tilewright::load_float(p, i, t);
  }
}

// A C-contiguous array that ends at a guard page, or one with every axis reversed that begins at
// one: its last element comes first in memory.
class Operand {
 public:
  Operand(DType dtype, std::initializer_list<int64_t> shape, Against against = Against::end,
          int seed = 1) {
    view.dtype = dtype;
    view.present = view.writable = true;
    view.rank = int(shape.size());
    int64_t n = 1;
    for (int64_t extent : shape) n *= extent;
    memory_ = std::make_unique<Guarded>(n * dtype_size(dtype), against);
    int64_t stride = n;
    const int64_t* extent = shape.begin();
    for (int d = 0; d < view.rank; ++d) {
      view.shape[d] = extent[d];
      stride = extent[d] ? stride / extent[d] : 0;
      view.stride[d] = against == Against::end ? stride : -stride;
    }
    const int64_t first = against == Against::end || n == 0 ? 0 : n - 1;
    view.data = memory_->as<char>() + first * dtype_size(dtype);
    for (int64_t i = 0; i < n; ++i) {
      const int value = small(i, seed);
      set_element(memory_->as<void>(), i, dtype, float(dtype == DType::u8 ? value + 4 : value));
    }
  }
  View view;

 private:
  std::unique_ptr<Guarded> memory_;
};

// Runs f(table) with every level that this CPU supports.
template <class F>
void for_each_level(const F& f) {
  for (const tilewright::IsaLevel& level : tilewright::isa_levels()) {
    if (!level.supported) continue;
    tilewright::set_isa(level.name);
    f(tilewright::kernels());
  }
  tilewright::set_isa("");
}

}  // namespace test

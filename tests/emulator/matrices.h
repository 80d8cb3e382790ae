// Arrays of any dtype and layout in device memory, with margins that no kernel may write.
#pragma once
#include <bit>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <vector>

#include "core/dtype.h"
#include "device.h"
#include "tilewright/view.h"

// Of the last two axes: by rows; transposed; rows of an odd length, from an odd start; backwards.
enum class Layout { rows, columns, odd, reversed };

class Array {
 public:
  // Numbers of both signs; a dtype of integers takes its whole range.
  Array(const std::vector<std::int64_t>& shape, tilewright::DType type, Layout layout,
        unsigned seed)
      : view_(strided(shape, type, layout)),
        size_(static_cast<std::size_t>(bytes_ + 2 * kMargin)),
        memory_(size_, std::uint8_t{0xab}) {
    char* const base = reinterpret_cast<char*>(memory_.get()) + kMargin;
    view_.data = base + start_ * tilewright::dtype_size(type);
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> unit(-1.0f, 1.0f);
    each([&](std::int64_t at) {
      used_.push_back(static_cast<char*>(view_.data) + at * tilewright::dtype_size(type) -
                      reinterpret_cast<char*>(memory_.get()));
      if (tilewright::is_float(type)) {
        tilewright::store_float(view_.data, at, type, unit(random));
      } else if (type == tilewright::DType::s32) {
        static_cast<std::int32_t*>(view_.data)[at] = static_cast<std::int32_t>(random());
      } else {
        static_cast<std::uint8_t*>(view_.data)[at] = static_cast<std::uint8_t>(random());
      }
    });
  }

  const tilewright::View& view() const { return view_; }

  std::int64_t offset(std::initializer_list<std::int64_t> index) const {
    std::int64_t at = 0;
    int d = 0;
    for (const std::int64_t i : index) at += i * view_.stride[d++];
    return at;
  }
  float at(std::initializer_list<std::int64_t> index) const {
    return tilewright::load_float(view_.data, offset(index), view_.dtype);
  }
  std::int32_t integer(std::initializer_list<std::int64_t> index) const {
    const std::int64_t i = offset(index);
    if (view_.dtype == tilewright::DType::s32) return static_cast<std::int32_t*>(view_.data)[i];
    if (view_.dtype == tilewright::DType::u8) return static_cast<std::uint8_t*>(view_.data)[i];
    return static_cast<std::int8_t*>(view_.data)[i];
  }

  // What is around and between the elements is as it was.
  void check_margins(const char* file, int line) const {
    std::vector<bool> used(size_);
    for (const std::int64_t at : used_) {
      for (int b = 0; b < tilewright::dtype_size(view_.dtype); ++b)
        used[std::size_t(at + b)] = true;
    }
    for (std::size_t i = 0; i < size_; ++i) {
      if (!used[i] && memory_[i] != 0xab) return test::fail(file, line, "wrote beside its output");
    }
  }

 private:
  static constexpr std::int64_t kMargin = 256;

  tilewright::View strided(const std::vector<std::int64_t>& shape, tilewright::DType type,
                           Layout layout) {
    tilewright::View v;
    v.dtype = type, v.present = v.writable = true;
    v.rank = static_cast<int>(shape.size());
    std::vector<int> order;  // from the densest axis
    for (int d = v.rank - 1; d >= 0; --d) order.push_back(d);
    if (layout == Layout::columns && v.rank > 1) std::swap(order[0], order[1]);
    std::int64_t step = 1;
    for (std::size_t i = 0; i < order.size(); ++i) {
      const auto d = static_cast<std::size_t>(order[i]);
      v.shape[d] = shape[d];
      v.stride[d] = step;
      step *= shape[d] + (layout == Layout::odd && i == 0 ? 1 + shape[d] % 2 : 0);
    }
    start_ = layout == Layout::odd;
    if (layout == Layout::reversed) {
      for (int d = 0; d < v.rank; ++d) {
        start_ += (v.shape[d] - 1) * v.stride[d];
        v.stride[d] = -v.stride[d];
      }
    }
    bytes_ = (step + 1) * tilewright::dtype_size(type);
    return v;
  }
  template <class F>
  void each(const F& f) const {
    for (std::int64_t i = 0; i < view_.size(); ++i) {
      std::int64_t at = 0, rest = i;
      for (int d = view_.rank - 1; d >= 0; --d) {
        at += rest % view_.shape[d] * view_.stride[d];
        rest /= view_.shape[d];
      }
      f(at);
    }
  }

  std::int64_t start_ = 0, bytes_ = 0;  // set by strided(), hence before the view
  tilewright::View view_;
  std::size_t size_;
  Device<std::uint8_t> memory_;
  std::vector<std::int64_t> used_;  // first bytes of the elements
};

inline tilewright::View view_of(float* data, std::initializer_list<std::int64_t> shape) {
  tilewright::View v;
  v.data = data, v.dtype = tilewright::DType::f32, v.present = v.writable = true;
  for (const std::int64_t n : shape) v.shape[v.rank++] = n;
  std::int64_t step = 1;
  for (int d = v.rank - 1; d >= 0; --d) v.stride[d] = step, step *= v.shape[d];
  return v;
}

// A view: somebody else's array, described. tilewright never owns array memory.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace tilewright {

// The last two are named so that an error can say what came; no kernel takes them.
enum class DType : uint8_t { f32, bf16, s8, u8, s32, s64, boolean, f16, f64, other };

// Elements of the 16-bit floats: storage only, arithmetic is float32.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

constexpr int64_t dtype_size(DType t) {
  switch (t) {
    case DType::f32:
    case DType::s32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::s64:
    case DType::f64:
      return 8;
    default:
      return 1;
  }
}

constexpr const char* dtype_name(DType t) {
  switch (t) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::s8:
      return "int8";
    case DType::u8:
      return "uint8";
    case DType::s32:
      return "int32";
    case DType::s64:
      return "int64";
    case DType::boolean:
      return "bool";
    case DType::f16:
      return "float16";
    case DType::f64:
      return "float64; use x.astype(np.float32)";
    default:
      return "a dtype without kernels";
  }
}

// Where a view's memory is: pointers of one are not for the other.
enum class Device : uint8_t { cpu, gpu };

constexpr int kMaxRank = 8;

// Non-owning: pointer, dtype, shape and strides in elements (never bytes; they may be 0 or
// negative). A default-constructed view is "absent": optional arguments are passed that way.
struct View {
  void* data = nullptr;
  DType dtype = DType::other;
  bool present = false;
  bool writable = false;
  Device device = Device::cpu;
  int rank = 0;
  const char* note = nullptr;  // why no kernel can take this object; every dtype check reports it
  int64_t shape[kMaxRank];
  int64_t stride[kMaxRank];

  explicit operator bool() const { return present; }
  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
  int64_t size() const {
    int64_t n = 1;
    for (int d = 0; d < rank; ++d) n *= shape[d];
    return n;
  }
  int64_t last() const { return rank ? shape[rank - 1] : 1; }  // extent of the last axis
  bool contiguous() const {
    int64_t expected = 1;
    for (int d = rank - 1; d >= 0; --d) {
      if (shape[d] != 1 && stride[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }
};

}  // namespace tilewright

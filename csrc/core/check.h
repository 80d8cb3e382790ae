// Argument checks that word their own messages: op, argument, what is required and why, what came.
//
//     const Check check{"layernorm"};
//     check.dtype("x", op.x, kFloats);
//     check.shape("gamma", op.gamma, {C}, "to match the last axis of x", op.x);
//
// -> ShapeError: layernorm: gamma must have shape (768,) to match the last axis of x (8, 512, 768),
// got (512,)
//
// A passing check costs a comparison; strings are built only for the error.
#pragma once
#include <initializer_list>
#include <string>

#include "tilewright/errors.h"
#include "tilewright/view.h"

namespace tilewright {

std::string format_shape(const int64_t* shape, int rank);
inline std::string format_shape(const View& v) {
  return format_shape(v.shape, v.rank);
}

struct Check {
  static constexpr bool on_gpu_too = true;

  const char* op;
  bool has_cuda = false;  // else arrays of a GPU are refused

  void present(const char* arg, const View& v) const;
  void dtype(const char* arg, const View& v, std::initializer_list<DType> allowed) const;
  void rank(const char* arg, const View& v, int at_least, const char* meaning) const;
  // v has exactly this shape. `why` completes "must have shape S ..."; the shape of `like` is
  // appended when given.
  void shape(const char* arg, const View& v, std::initializer_list<int64_t> want, const char* why,
             const View* like = nullptr) const;
  void shape(const char* arg, const View& v, const int64_t* want, int rank, const char* why,
             const View* like = nullptr) const;
  void same_shape(const char* arg, const View& v, const View& like, const char* like_name) const;
  // v can be written, and no two of its elements are the same memory.
  void output(const char* arg, const View& v, std::initializer_list<DType> allowed) const;
  // out shares no memory with an input (core/overlap.h), except as exactly the same array where that
  // is allowed.
  void no_overlap(const char* arg, const View& out, const char* other, const View& input,
                  bool same_array_allowed = false) const;

  [[noreturn]] void shape_error(const std::string& message) const;
  [[noreturn]] void dtype_error(const std::string& message) const;
  [[noreturn]] void unsupported(const std::string& message) const;
};

}  // namespace tilewright

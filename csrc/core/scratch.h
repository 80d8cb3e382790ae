// Scratch memory for one call: 64-byte aligned, uninitialised, taken from a small cache that each
// thread keeps.
//
// Fresh pages from the system cost more than the packing that fills them, so blocks are kept, up to
// kKeepBytes a thread.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace tilewright {

class Scratch {
 public:
  // Of 0 bytes: none, as() is null. std::bad_alloc, also above kMostBytes (core/size.h).
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_;
};

}  // namespace tilewright

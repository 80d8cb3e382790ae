// What the emulator's tests share: arrays in device memory, launches, and what a launch found.
#pragma once
#include <cstddef>
#include <initializer_list>
#include <string>

#include "cuda/gpu/gpu.h"
#include "test.h"

// Device memory; host code may use it like any other.
template <class T>
class Device {
 public:
  explicit Device(std::size_t n)
      : data_(static_cast<T*>(tilewright::emulator::allocate(n * sizeof(T)))), size_(n) {}
  Device(std::size_t n, T value) : Device(n) {
    for (std::size_t i = 0; i < n; ++i) data_[i] = value;
  }
  ~Device() { tilewright::emulator::release(data_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  T* get() const { return data_; }
  T& operator[](std::size_t i) const { return data_[i]; }
  std::size_t size() const { return size_; }

 private:
  T* data_;
  std::size_t size_;
};

// "" or what a launch found.
template <class... P, class... A>
std::string outcome(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
                    A... args) {
  try {
    tilewright::gpu::launch("kernel", kernel, grid, block, shared_bytes, nullptr, args...);
  } catch (const tilewright::emulator::Fault& fault) {
    return fault.what();
  }
  return "";
}

inline void check_found(const char* file, int line, const std::string& got,
                        const std::string& wanted) {
  if (wanted.empty() ? got.empty() : got.find(wanted) != std::string::npos) return;
  test::fail(file, line, "wanted '" + wanted + "', found '" + got + "'");
}

// The kernel is right / has this finding in both modes / in checked mode, where fast has no eyes.
#define IS_RIGHT(found) check_found(__FILE__, __LINE__, found, "")
#define FINDS(text, found) check_found(__FILE__, __LINE__, found, text)
#define FINDS_CHECKED(text, found)                          \
  if (const std::string got = found; emulator::checked()) { \
    check_found(__FILE__, __LINE__, got, text);             \
  }

// A schedule for the rest of the scope.
struct Scheduled {
  explicit Scheduled(tilewright::emulator::Order order, unsigned seed = 0) {
    tilewright::emulator::set_schedule(order, seed);
  }
  ~Scheduled() { tilewright::emulator::set_schedule(tilewright::emulator::Order::in_order); }
  Scheduled(const Scheduled&) = delete;
};

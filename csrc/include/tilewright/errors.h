// What every op throws when its arguments are wrong. A message names the op, the argument, what is
// required and why, and what came: "layernorm: gamma must have shape (768,) to match the last axis
// of x (8, 512, 768), got (512,)". Shapes and dtypes are checked before
// anything is written.
#pragma once
#include <exception>
#include <stdexcept>

namespace tilewright {

// A shape, stride, overlap or number that doesn't fit.
struct ShapeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
// An array that is missing, or of a dtype the op has no kernel for.
struct DtypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// What exists in the interface but not, or not yet, for these arguments or on this machine.
struct UnsupportedError : std::logic_error {
  using std::logic_error::logic_error;
};
// The poll (runtime.h) ended a running kernel; its outputs are incomplete.
struct Interrupted : std::exception {
  const char* what() const noexcept override { return "interrupted"; }
};

}  // namespace tilewright

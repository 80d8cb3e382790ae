// The DLPack ABI: what the capsules of __dlpack__ point to.
//
//     "dltensor"             Managed: no version, no flags; the older of the two
//     "dltensor_versioned"   ManagedVersioned: version first, so that any reader can tell
//
// A reader renames the capsule to "used_..." and from then on owes one call of the deleter; a
// capsule that dies under its first name calls it itself.
// Source: the DLPack specification 1.x, https://dmlc.github.io/dlpack/latest/
#pragma once
#include <stdint.h>

namespace tilewright::python::dlpack {

// Memory that the CPU reads and writes: its own, and that pinned for CUDA or ROCm.
enum DeviceType : int32_t { kCpu = 1, kCudaHost = 3, kRocmHost = 11 };

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

constexpr uint64_t kReadOnly = 1, kCopied = 2;  // flags

struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; nullptr: contiguous
  uint64_t byte_offset;
};

struct Managed {
  static constexpr const char* kName = "dltensor";
  static constexpr const char* kUsedName = "used_dltensor";
  Tensor tensor;
  void* manager;
  void (*deleter)(Managed*);
};

struct Version {
  uint32_t major, minor;
};
struct ManagedVersioned {
  static constexpr const char* kName = "dltensor_versioned";
  static constexpr const char* kUsedName = "used_dltensor_versioned";
  Version version;
  void* manager;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};

}  // namespace tilewright::python::dlpack

// The part of DLPack's C interface (dlmc/dlpack, version 1.3) through which a tensor shows its memory without a call into
// Python. Layouts and names are the standard's; functions that are not called here are kept as plain pointers.
#pragma once
#include <cstdint>

namespace spectral {

constexpr uint32_t kDLPackMajor = 1;  // another major version may lay these structs out otherwise
constexpr const char* kDLPackCapsule = "dlpack_exchange_api";

struct DLDevice {
  int32_t device_type, device_id;
};

struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void *managed_tensor_allocator, *managed_tensor_from_py_object_no_sync, *managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);  // borrowed; may be null. 0, or -1 and a Python error
  void* current_work_stream;
};

}  // namespace spectral

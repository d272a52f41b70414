// What every .cu file needs around its launches.
#pragma once
#include <cuda_runtime.h>

namespace spectral {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&saved_);
    if (error_ == cudaSuccess && saved_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(saved_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int saved_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

// cudaLaunchKernel and not <<<>>>: it returns this launch's own error, where cudaGetLastError could hand us somebody
// else's. An error that we return is not left behind for the next caller to find as well.
inline cudaError_t launch(const void* kernel, int blocks, int threads, void** arguments, void* stream) {
  const cudaError_t error = cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), arguments, 0, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

}  // namespace spectral

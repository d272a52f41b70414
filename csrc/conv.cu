// The step of conv operators on CUDA: three launches, in each of which a block does one unit of conv_block_step.h. Nothing
// is allocated, no launch waits for the host, and counters are left at 0, so that a CUDA graph may hold them.
#include <cuda_runtime.h>

#include "conv_block_step.h"
#include "conv_blocks.h"
#include "cuda_launch.h"

namespace spectral {
namespace {

// 32 sums, the operands of 32 multiply-adds and 20 loads under way: up to 128 registers of a thread.
constexpr int kBlocksPerSm = 4;

class DeviceBlock {
 public:
  template <class T>
  class PerThread {
   public:
    __device__ T& operator[](int) { return own_; }

   private:
    T own_;
  };

  // Declared where they are used, and not handed over as pointers, these are known to lie in shared memory.
  __device__ __forceinline__ BlockShared& shared() {
    __shared__ BlockShared all;
    return all;
  }
  template <class Use>
  __device__ __forceinline__ void each(Use use) {
    use(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  template <class Use>
  __device__ __forceinline__ double sum(Use use) {
    return reduce(use(static_cast<int>(threadIdx.x)), [](double a, double b) { return a + b; });
  }
  template <class Use>
  __device__ __forceinline__ double largest(Use use) {
    return reduce(use(static_cast<int>(threadIdx.x)), [](double a, double b) { return a != a || a >= b ? a : b; });
  }
  // Whether this block is the last of `count` that come here; what the others have written is then to be seen (`fresh`).
  __device__ bool is_last(int32_t* counter, int count) {
    __shared__ int last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomicAdd(counter, 1) == count - 1;
      if (last) *counter = 0;
    }
    __syncthreads();
    __threadfence();
    return last != 0;
  }
  // The same address, of which the compiler does not know what it was the sum of, and so does not add it up at every load.
  template <class T>
  __device__ __forceinline__ T* settled(T* p) const {
    asm("" : "+l"(p));
    __builtin_assume(__isGlobal(p));
    return p;
  }
  // Past the L1 cache, which may hold what was there before.
  template <class T>
  __device__ T fresh(const T* p) const {
    return __ldcg(p);
  }
  __device__ BlockFour fresh(const BlockFour* p) const {
    const float4 four = __ldcg(reinterpret_cast<const float4*>(p));
    return {{four.x, four.y, four.z, four.w}};
  }

 private:
  __device__ __forceinline__ double* reduced() {  // not in `reduce`, each of whose kinds would have its own
    __shared__ double all[kBlockThreads];
    return all;
  }
  template <class Join>
  __device__ __forceinline__ double reduce(double own, Join join) {
    double* reduced = this->reduced();
    const int thread = static_cast<int>(threadIdx.x);
    reduced[thread] = own;
    __syncthreads();
    for (int half = kBlockThreads / 2; half > 0; half /= 2) {
      if (thread < half) reduced[thread] = join(reduced[thread], reduced[thread + half]);
      __syncthreads();
    }
    const double result = reduced[0];
    __syncthreads();
    return result;
  }
};

enum Launch { kFirst, kSecond, kThird };

template <int LAUNCH>
__global__ void __launch_bounds__(kBlockThreads, kBlocksPerSm) conv_kernel(const __grid_constant__ BlockArguments a) {
  DeviceBlock block;
  const auto index = static_cast<int>(blockIdx.x);
  if constexpr (LAUNCH == kFirst)
    first_block(block, a, index);
  else if constexpr (LAUNCH == kSecond)
    second_block(block, a, index);
  else
    third_block(block, a, index);
}

cudaError_t launch_kernel(void (*kernel)(BlockArguments), int blocks, const BlockArguments& a, void* stream) {
  if (blocks == 0) return cudaSuccess;
  void* arguments[] = {const_cast<BlockArguments*>(&a)};
  return launch(reinterpret_cast<const void*>(kernel), blocks, kBlockThreads, arguments, stream);
}

}  // namespace

int conv_step_cuda(const BlockArguments& a, bool backward, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (backward) return launch_kernel(conv_kernel<kThird>, a.gradient_count, a, stream);
  cudaError_t error = launch_kernel(conv_kernel<kFirst>, a.first_count, a, stream);
  if (error == cudaSuccess) error = launch_kernel(conv_kernel<kSecond>, a.second_count, a, stream);
  if (error == cudaSuccess) error = launch_kernel(conv_kernel<kThird>, a.gradient_count + a.write_count, a, stream);
  return error;
}

int multiprocessors_cuda(int device, int* count) { return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device); }

}  // namespace spectral

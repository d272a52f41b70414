// Functions that nvcc compiles for the device too.
#pragma once

#if defined(__CUDACC__)
#define SPECTRAL_HD __host__ __device__ __forceinline__
#else
#define SPECTRAL_HD inline
#endif

// The inner loops, one set per instruction set. C is the type vectors and sums are kept in: float, or double for f64.
#pragma once
#include <cstddef>
#include <cstdint>

#include "adamw_kernels.h"
#include "conv_kernels.h"

namespace spectral {

// Vectors in the workspace are padded to this many bytes, so that a kernel may store whole registers at their end.
constexpr size_t kPadBytes = 64;

template <class C>
struct RowKernels {
  // y_r = w_r . v, then z = sum_r (y_r 2^shift) w_r, for `rows` dense rows of n elements, each row touched once from
  // memory. v need not be padded; z must be; z is overwritten, or added to (accumulate).
  void (*read_rows)(const void* w, ptrdiff_t row_stride, size_t rows, size_t n, const C* v, int shift, C* y, C* z,
                    bool accumulate);
  // z = y w for one dense row, or z += that.
  void (*add_row)(const void* w, size_t n, C y, C* z, bool accumulate);
  // g_r = a_r v (overwrite) or g_r += a_r v, rounded once to the storage type.
  void (*rank_one)(void* g, ptrdiff_t row_stride, size_t rows, size_t n, const C* a, const C* v, bool overwrite);
  // max |w|; NaN where any element is not finite.
  double (*max_abs)(const void* w, ptrdiff_t row_stride, size_t rows, size_t n);
  // out[r * out_stride + j] = w[r * row_stride + offset[j]]: rows whose columns lie anywhere, made dense.
  void (*pack_rows)(const void* w, ptrdiff_t row_stride, size_t rows, size_t n, const int64_t* offset, C* out, size_t out_stride);
  // g[r * row_stride + offset[j]] (+)= a_r v_j
  void (*rank_one_strided)(void* g, ptrdiff_t row_stride, size_t rows, size_t n, const int64_t* offset, const C* a,
                           const C* v, bool overwrite);
  double (*load)(const void* p, ptrdiff_t i);
  void (*store)(void* p, ptrdiff_t i, double x);
};

struct KernelSet {
  const char* isa;
  RowKernels<float> f32, bf16, f16;
  RowKernels<double> f64;
  // z_j = sum_t parts[t * stride + j] in the order of t; returns sum_j z_j^2.
  double (*combine_f32)(const float* parts, size_t stride, size_t count, size_t n, float* z);
  double (*combine_f64)(const double* parts, size_t stride, size_t count, size_t n, double* z);
  // What floor.cpp times: a checksum of the bytes; the bytes rewritten as they were (mask = 0).
  uint64_t (*floor_read)(const char* p, size_t bytes);
  void (*floor_rewrite)(char* p, size_t bytes, uint32_t mask);
  const ConvKernelSet& (*conv)();
  const AdamWKernelSet& (*adamw)();
};

const KernelSet& kernels_baseline();
#if defined(SPECTRAL_X86)
const KernelSet& kernels_avx2();
const KernelSet& kernels_avx512();
#endif

// The set chosen for this processor, or by select_isa / the environment variable SPECTRAL_OPS_ISA.
const KernelSet& kernels();
// Switches every later call to the named set; false if this processor or build lacks it.
bool select_isa(const char* name);
bool isa_supported(const char* name);

}  // namespace spectral

// The inner loops of conv operators, one set per instruction set. Offsets in elements.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dtypes.h"

namespace spectral {

// Lanes are grouped in 64 bytes, whatever the width of a register, so that a table does not depend on the processor.
template <class C>
constexpr size_t kConvLanes = 64 / sizeof(C);

// What one product sums over: `channels` times `taps` terms, the same for every row and lane.
template <class C>
struct ConvProduct {
  const C* a;  // element (row, channel, tap) at row * a_row + channel * a_channel + a_tap[tap]
  ptrdiff_t a_row, a_channel;
  const ptrdiff_t* a_tap;
  const C* b;  // a group of lanes at channel * b_channel + b_tap[tap], a second one b_second after it
  ptrdiff_t b_channel, b_second;
  const ptrdiff_t* b_tap;
  size_t channels, taps;
};

template <class C>
struct ConvKernels {
  // tile[row * width + lane] (+)= sum over channel and tap of a times b, for the lanes of 1 or 2 groups.
  void (*multiply)(const ConvProduct<C>& product, size_t rows, size_t groups, bool accumulate, C* tile, size_t width);
  // panel[channel][tap][lane] = source[channel * channel_stride + tap_at[tap] + lane_at[lane]].
  void (*pack)(const C* source, size_t channels, ptrdiff_t channel_stride, const ptrdiff_t* tap_at, size_t taps,
               const ptrdiff_t* lane_at, size_t width, C* panel);
  // g[row * row_stride + lane_at[lane]] (+)= factor * tile[row * width + lane], rounded once; lanes side by side where dense.
  void (*add_tile[4])(void* g, ptrdiff_t row_stride, size_t rows, const ptrdiff_t* lane_at, bool dense, size_t count,
                      const C* tile, size_t width, C factor, bool overwrite);  // by DType
};

struct ConvKernelSet {
  ConvKernels<float> f32;
  ConvKernels<double> f64;
};

const ConvKernelSet& conv_kernels_baseline();
#if defined(SPECTRAL_X86)
const ConvKernelSet& conv_kernels_avx2();
const ConvKernelSet& conv_kernels_avx512();
#endif

}  // namespace spectral

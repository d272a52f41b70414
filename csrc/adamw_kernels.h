// The inner loop of the optimizer step, one set per instruction set. C: the type of moments, vectors and arithmetic.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dtypes.h"

namespace spectral {

// What is the same for all elements of a parameter at one step.
template <class C>
struct AdamWFactors {
  C gradient_scale;    // 1 / grad_scale; negative where the task's objective is to grow
  C decay;             // 1 - lr * weight_decay
  C lr;
  C beta1_rest;        // 1 - beta1
  C beta2, beta2_rest;
  C inverse_sqrt_bias2;  // 1 / sqrt(1 - beta2^step)
  C eps;
  C step_size;         // lr / (1 - beta1^step)
  bool decoupled;
  bool stochastic;     // bfloat16 weights are rounded up or down by chance
  uint32_t key;        // of that chance, for this parameter and step
};

// Elements side by side, of one parameter. g: null where there is no gradient, which counts as zero.
template <class C>
struct AdamWRun {
  void* w;
  const void* g;
  C *exp_avg, *exp_avg_sq;
  C* max_exp_avg_sq;  // null without amsgrad
  C* master;          // null where w itself is what is updated
};

// What is read of a row while it is updated, and of the two rows before it, whose y is known: in the time in which the
// next row comes from memory. Two at once, at every second row: z is read and written half as often.
template <class C>
struct AdamWRead {
  const C* v;          // null: nothing is read
  const void* before[2];  // null: none this time
  C y_before[2];          // in the units of z
  C* z;                   // z += y_before before, or stored the first time (overwrite); padded
  bool overwrite;
};

// One step of `n` elements, the penalty's gradient a x_j (x null: none); counter: of the first element, see draw().
// Returns the dot product of the new, stored weights with v.
template <class C>
using AdamWUpdate = C (*)(const AdamWRun<C>& run, size_t n, C a, const C* x, const AdamWRead<C>& read, const AdamWFactors<C>& factors,
                          uint32_t counter);

struct AdamWKernelSet {
  AdamWUpdate<float> f32[4][4];  // by DType of the weight, then of the gradient; null where there is none
  AdamWUpdate<double> f64;
};

const AdamWKernelSet& adamw_kernels_baseline();
#if defined(SPECTRAL_X86)
const AdamWKernelSet& adamw_kernels_avx2();
const AdamWKernelSet& adamw_kernels_avx512();
#endif

}  // namespace spectral

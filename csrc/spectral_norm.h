// Converged sigma_1 of many matrices.
#pragma once
#include <cstdint>

#include "conv_table.h"
#include "table.h"

namespace spectral {

template <class C>
struct NormArguments {
  const void* const* weights;
  C* sigma;
  C* bound;  // sigma <= sigma_1 <= sigma + bound, if the start vector was not orthogonal to the top space
  C *u, *v;  // a unit pair with sigma = ||W'u||, v = W'u / sigma
  int32_t* exponents;
  double tolerance;  // relative, of sigma
  int max_iterations;
  int threads;
};

// Returns the number of matrices that had not reached the tolerance after max_iterations reads.
template <class C>
int64_t spectral_norm(Table& table, const NormArguments<C>& arguments);
template <class C>
int64_t spectral_norm(ConvTable& table, const NormArguments<C>& arguments);

}  // namespace spectral

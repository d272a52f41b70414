// One warm step of the penalty over a table of layers, and its gradient. Formulas: docs/design.md, section 2.
#pragma once
#include <cstdint>
#include <vector>

#include "table.h"

namespace spectral {

template <class C>
struct StepArguments {
  const void* const* weights;
  void* const* gradients;  // null: value only; an entry may be null
  const C* v;              // read
  C* v_out;                // written; may be v
  const int32_t* exponents;
  int32_t* exponents_out;  // may be exponents
  C* sigma;
  C* u;      // null: not wanted
  C* value;  // null: not wanted. strength * R
  double exponent, strength;
  double gradient_factor;  // what dR/dW is multiplied by: strength, times the loss scale where there is one
  int threads;
};

// Reads every weight once: sigma, u, the next v, the value; then adds strength * dR/dW into the gradients.
template <class C>
void step(Table& table, const StepArguments<C>& arguments);

template <class C>
struct BackwardArguments {
  const void* const* weights;  // read for vector parameters only
  void* const* gradients;      // overwritten, or added to; an entry may be null
  const C *sigma, *u, *v;      // v: the one the step returned
  double exponent, upstream;   // dL/dR
  bool accumulate;
  int threads;
};
// The gradient alone, from what a step returned.
template <class C>
void backward(Table& table, const BackwardArguments<C>& arguments);

// ---- pieces shared with the converged iteration (spectral_norm.cpp) ----

// Rows [begin, end) of one part: y and this strip's z, or z added to. v in the order of the view's dense rows.
template <class C>
void read_part_rows(const Item& item, const char* part, int64_t begin, int64_t end, const C* v, int shift, C* y, C* z, bool accumulate);
// max |w| of rows [begin, end) of one part; NaN where any element is not finite.
template <class C>
double part_max_abs(const Item& item, const char* part, int64_t begin, int64_t end);
// The unit vector that replaces v when W v = 0: hash of the column and of v[0], so that it differs from v, from run to
// run never. The same formula as spectral_ops/ops/power_iteration.py: _another_unit_vector.
template <class C>
void another_unit_vector(const C* v, int64_t n, C* out);
// Powers of two for v and y that keep W (2^a v) and W'(2^b y) in range when sigma is about 2^exponent.
struct Shifts {
  int v, y;
};
template <class C>
Shifts shifts_for(int exponent);
template <class C>
double sum_of_squares(const C* x, int64_t n);

inline const char* part_address(const void* base, const View& view, int64_t part) {
  return static_cast<const char*>(base) + part * view.part_stride * static_cast<int64_t>(element_size(view.dtype));
}

}  // namespace spectral

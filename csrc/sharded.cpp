#include "sharded.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "penalty_terms.h"
#include "step.h"
#include "threads.h"

namespace spectral {

template <class C>
void pack(const PackArguments<C>& a) {
  const auto task = [&a](int64_t i) {
    const ShardedMatrix& matrix = a.matrices[i];
    const C *v = a.v + matrix.v_at, *next = a.local_v + matrix.v_at;
    const double sigma = a.local_sigma[i];
    double cosine = 0;
    for (int64_t j = 0; j < matrix.n; ++j) cosine += static_cast<double>(v[j]) * static_cast<double>(next[j]);
    const double y_norm = std::ldexp(std::fabs(sigma * cosine), -a.exponents[i]);  // by rounding it may be negative
    a.sums.y_norms[i] = y_norm;
    a.sums.squares[i] = matrix.y_counts ? y_norm * y_norm : 0.0;
    const double factor = matrix.z_counts ? y_norm * std::ldexp(sigma, -a.exponents[i]) : 0.0;
    double* z = a.sums.z + matrix.v_at;
    for (int64_t j = 0; j < matrix.n; ++j) z[j] = static_cast<double>(next[j]) * factor;
  };
  run_phases({{a.count, task}}, a.threads);
}

template <class C>
void finish(const FinishArguments<C>& a) {
  const auto task = [&a](int64_t i) {
    const ShardedMatrix& matrix = a.matrices[i];
    const double* z = a.sums.z + matrix.v_at;
    C *v = a.v + matrix.v_at, *u = a.u + matrix.u_at;
    const double y_norm = std::sqrt(a.sums.squares[i]);
    const double inverse = y_norm > 0 ? 1.0 / y_norm : 1.0;
    double squares = 0;
    for (int64_t j = 0; j < matrix.n; ++j) squares += square(z[j] * inverse);
    const double scaled = std::sqrt(squares);
    const bool finite = std::isfinite(y_norm) && std::isfinite(scaled), live = y_norm > 0 && scaled > 0;
    double sigma = std::numeric_limits<double>::quiet_NaN(), share = sigma;
    if (finite) {
      sigma = live ? std::ldexp(scaled, a.exponents[i]) : 0.0;
      share = live ? a.sums.y_norms[i] * inverse : 0.0;
    }
    a.sigma[i] = static_cast<C>(sigma);
    a.terms[i] = matrix.is_empty ? 0.0 : a.scales[i] * matrix_term(static_cast<double>(a.sigma[i]), a.targets[i], a.exponent);
    if (finite && live) {
      if (a.sigma[i] > 0) a.exponents[i] = std::ilogb(a.sigma[i]);
      const double factor = inverse / scaled;
      for (int64_t j = 0; j < matrix.n; ++j) v[j] = static_cast<C>(z[j] * factor);
    } else if (finite && !matrix.is_empty) {
      std::vector<C> other(static_cast<size_t>(matrix.n));
      another_unit_vector(v, matrix.n, other.data());
      std::copy(other.begin(), other.end(), v);
    }
    for (int64_t r = 0; r < matrix.rows; ++r) u[r] = static_cast<C>(static_cast<double>(a.local_u[matrix.u_at + r]) * share);
  };
  run_phases({{a.count, task}}, a.threads);
}

template void pack<float>(const PackArguments<float>&);
template void pack<double>(const PackArguments<double>&);
template void finish<float>(const FinishArguments<float>&);
template void finish<double>(const FinishArguments<double>&);

}  // namespace spectral

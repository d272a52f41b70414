// The Lanczos iteration on W'W of one map: what happens between two products z = W'(W q), with full reorthogonalisation.
// Golub and Van Loan, Matrix Computations, 4th ed., 10.1-10.3.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "step.h"
#include "tridiagonal.h"

namespace spectral {

enum class LanczosStage { krylov, polish, done };

// What one more step from the Ritz vector x gives: a value that is never above sigma_1, and how far above it that may be.
struct Polished {
  double sigma, bound, inverse_y, inverse_z;
};

template <class C>
class Lanczos {
 public:
  LanczosStage stage = LanczosStage::krylov;
  bool converged = false;
  Shifts shifts{0, 0};  // powers of two that q and W q are multiplied by

  // From a fixed random vector of n elements; vectors lie `padded` elements apart.
  void start(int64_t n, int64_t padded) {
    n_ = n;
    padded_ = padded;
    basis_.assign(static_cast<size_t>(padded), C(0));
    if (n == 1) {
      basis_[0] = C(1);
    } else if (n > 1) {
      const C seed = C(0);
      another_unit_vector(&seed, n, basis_.data());
    }
  }

  // The vector whose product is wanted next.
  const C* wanted() const { return basis_.data() + (stage == LanczosStage::polish ? 0 : projected_.size() * static_cast<size_t>(padded_)); }

  // Takes z = W'(W q), shifted, of the last wanted vector and spoils it.
  void advance(C* z, double tolerance, int max_iterations) {
    const auto padded = static_cast<size_t>(padded_), n = static_cast<size_t>(n_);
    const size_t k = projected_.size() + 1;
    // The two terms that are there in exact arithmetic first, then once the whole space: together "twice is enough".
    double alpha = remove(z, k - 1, dot(vector(k - 1), z));
    if (k > 1) remove(z, k - 2, projected_.off[k - 2]);
    alpha += remove_projection(z, k);
    projected_.diagonal.push_back(alpha);
    const double beta = std::sqrt(sum_of_squares(z, n_));
    projected_.off.push_back(beta);
    const bool last = static_cast<int>(k) >= max_iterations;
    // Nothing is left of z but rounding: the space is invariant.
    const double scale = *std::max_element(projected_.diagonal.begin(), projected_.diagonal.end());
    const bool invariant = beta <= 4 * std::numeric_limits<C>::epsilon() * scale || k >= n;
    if (invariant || last || k == 2 || k % kCheckEvery == 0) {
      theta_ = projected_.eigenvalue(1, theta_, kThetaWidth);
      const std::vector<double> s = projected_.top_vector(theta_);
      // By the residual alone: sigma_1^2 is within it of theta. residual^2 / gap promises more, but two close values look
      // like one until the iteration tells them apart, and then the promise is wrong by the distance between them.
      converged = invariant || beta * std::fabs(s.back()) <= 2 * tolerance * theta_;
      if (converged || last) {
        to_ritz_vector(s);
        return;
      }
    }
    basis_.resize((k + 1) * padded);
    C* next = vector(k);
    for (size_t j = 0; j < n; ++j) next[j] = static_cast<C>(z[j] / beta);
  }

  // From y = W x and z = W'y, shifted, and their norms, of the Ritz vector x. All 0 where every element that counts is
  // subnormal even after scaling.
  Polished polish(const C* z, double y_norm, double z_norm) const {
    if (y_norm == 0 || z_norm == 0) return {0, 0, 0, 1};
    const C* x = basis_.data();
    double theta = 0, residual = 0;
    for (int64_t j = 0; j < n_; ++j) theta += static_cast<double>(x[j]) * static_cast<double>(z[j]);
    for (int64_t j = 0; j < n_; ++j) {
      const double r = static_cast<double>(z[j]) - theta * static_cast<double>(x[j]);
      residual += r * r;
    }
    const double sigma = std::ldexp(z_norm / y_norm, -shifts.y);
    // sigma_1^2 <= theta + residual, all of it scaled by 2^(shifts.v + shifts.y).
    const double above = std::sqrt(theta + std::sqrt(residual)) * std::exp2(-0.5 * (shifts.v + shifts.y));
    return {sigma, std::max(above - sigma, 0.0) + 4 * std::numeric_limits<C>::epsilon() * sigma, 1.0 / y_norm, 1.0 / z_norm};
  }

  void finish() {
    stage = LanczosStage::done;
    std::vector<C>().swap(basis_);
  }

 private:
  // The small eigenproblem is solved only every so many products.
  static constexpr size_t kCheckEvery = 3;
  // To which theta is found: far below what the products resolve.
  static constexpr double kThetaWidth = sizeof(C) == 8 ? 1e-15 : 1e-10;

  int64_t n_ = 0, padded_ = 0;
  std::vector<C> basis_;  // rows are the Lanczos vectors; at last the Ritz vector alone
  Tridiagonal projected_;
  double theta_ = 0;

  C* vector(size_t k) { return basis_.data() + k * static_cast<size_t>(padded_); }

  double dot(const C* x, const C* y) const {
    double sums[8] = {};
    int64_t j = 0;
    for (; j + 8 <= n_; j += 8)
      for (int i = 0; i < 8; ++i) sums[i] += static_cast<double>(x[j + i]) * static_cast<double>(y[j + i]);
    for (; j < n_; ++j) sums[0] += static_cast<double>(x[j]) * static_cast<double>(y[j]);
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
  }

  // z -= coefficient q_k
  double remove(C* z, size_t k, double coefficient) {
    const C* q = vector(k);
    for (int64_t j = 0; j < n_; ++j) z[j] -= static_cast<C>(coefficient) * q[j];
    return coefficient;
  }

  // z -= Q'(Q z) for the first k Lanczos vectors; returns the coefficient of the last. Q is read as any matrix is.
  double remove_projection(C* z, size_t k) {
    thread_local std::vector<C> coefficients, projection;
    coefficients.resize(k);
    projection.resize(static_cast<size_t>(padded_));
    constexpr DType type = sizeof(C) == 8 ? DType::f64 : DType::f32;
    row_kernels<C>(type).read_rows(basis_.data(), padded_, k, static_cast<size_t>(n_), z, 0, coefficients.data(), projection.data(), false);
    for (int64_t j = 0; j < n_; ++j) z[j] -= projection[static_cast<size_t>(j)];
    return coefficients[k - 1];
  }

  void to_ritz_vector(const std::vector<double>& s) {
    const auto n = static_cast<size_t>(n_), padded = static_cast<size_t>(padded_);
    std::vector<double> x(n, 0.0);
    for (size_t k = 0; k < s.size(); ++k)
      for (size_t j = 0; j < n; ++j) x[j] += s[k] * static_cast<double>(basis_[k * padded + j]);
    const double inverse = 1.0 / std::sqrt(sum_of_squares(x.data(), n_));
    basis_.resize(padded);
    basis_.shrink_to_fit();
    for (size_t j = 0; j < n; ++j) basis_[j] = static_cast<C>(x[j] * inverse);
    stage = LanczosStage::polish;
  }
};

}  // namespace spectral

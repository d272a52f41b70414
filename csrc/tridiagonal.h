// The top of a small symmetric tridiagonal matrix: all that a Lanczos iteration asks of its projection.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace spectral {

struct Tridiagonal {
  std::vector<double> diagonal, off;  // off[i] couples i and i + 1; off.size() may exceed the couplings in use

  size_t size() const { return diagonal.size(); }

  // Eigenvalues above x: positive pivots of T - x I (Sylvester's law of inertia).
  size_t count_above(double x) const {
    size_t count = 0;
    double pivot = 1;
    for (size_t i = 0; i < size(); ++i) {
      pivot = diagonal[i] - x - (i > 0 ? off[i - 1] * off[i - 1] / pivot : 0.0);
      if (pivot == 0) pivot = 1e-300;
      count += pivot > 0;
    }
    return count;
  }

  // The rank-th largest eigenvalue to a relative width, by bisection from [low, Gershgorin's bound].
  double eigenvalue(size_t rank, double low, double width) const {
    double high = low;
    for (size_t i = 0; i < size(); ++i)
      high = std::max(high, diagonal[i] + (i > 0 ? std::fabs(off[i - 1]) : 0.0) + (i + 1 < size() ? std::fabs(off[i]) : 0.0));
    for (int step = 0; step < 100 && high - low > width * high; ++step) {
      const double middle = 0.5 * (low + high);
      (count_above(middle) >= rank ? low : high) = middle;
    }
    return 0.5 * (low + high);
  }

  // Unit eigenvector of the largest eigenvalue theta: 1 at the row where T - theta I is closest to singular, the others
  // by recurrences that run away from it, in the direction in which rounding shrinks. A fixed row would give another
  // eigenvector once the component there is below the square root of theta's error (Dhillon and Parlett 2004, section 3).
  std::vector<double> top_vector(double theta) const {
    const size_t k = size();
    const double least = -std::numeric_limits<double>::epsilon() * std::fabs(theta);  // in place of a pivot that is 0
    std::vector<double> down(k), up(k), x(k);
    for (size_t i = 0; i < k; ++i) {
      down[i] = diagonal[i] - theta - (i > 0 ? off[i - 1] * off[i - 1] / down[i - 1] : 0.0);
      if (down[i] == 0) down[i] = least;
    }
    for (size_t i = k; i-- > 0;) {
      up[i] = diagonal[i] - theta - (i + 1 < k ? off[i] * off[i] / up[i + 1] : 0.0);
      if (up[i] == 0) up[i] = least;
    }
    const auto closeness = [&](size_t i) { return std::fabs(down[i] + up[i] - (diagonal[i] - theta)); };
    size_t row = 0;
    for (size_t i = 1; i < k; ++i)
      if (closeness(i) < closeness(row)) row = i;
    x[row] = 1;
    double squares = 1;
    for (size_t i = row; i-- > 0;) {
      x[i] = -off[i] * x[i + 1] / down[i];
      squares += x[i] * x[i];
    }
    for (size_t i = row + 1; i < k; ++i) {
      x[i] = -off[i - 1] * x[i - 1] / up[i];
      squares += x[i] * x[i];
    }
    for (double& value : x) value /= std::sqrt(squares);
    return x;
  }
};

}  // namespace spectral

// The top of a small symmetric tridiagonal matrix: all that a Lanczos iteration asks of its projection.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
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

  // Unit eigenvector of the largest eigenvalue theta. All pivots of T - theta I but the last are negative, and the
  // recurrence from the last component upwards runs in the direction in which the components grow.
  std::vector<double> top_vector(double theta) const {
    const size_t k = size();
    std::vector<double> pivots(k), x(k);
    for (size_t i = 0; i < k; ++i) {
      pivots[i] = diagonal[i] - theta - (i > 0 ? off[i - 1] * off[i - 1] / pivots[i - 1] : 0.0);
      if (pivots[i] == 0) pivots[i] = -1e-300;
    }
    x[k - 1] = 1;
    double squares = 1;
    for (size_t i = k - 1; i-- > 0;) {
      x[i] = -off[i] * x[i + 1] / pivots[i];
      squares += x[i] * x[i];
    }
    for (double& value : x) value /= std::sqrt(squares);
    return x;
  }
};

}  // namespace spectral

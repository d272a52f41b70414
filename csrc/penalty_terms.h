// The term of one singular value, (s^k - t^k)^2, and its derivative; for host and device.
#pragma once
#include <cmath>

#include "host_device.h"

namespace spectral {

SPECTRAL_HD double power(double x, double k) { return k == 2.0 ? x * x : k == 1.0 ? x : pow(x, k); }
SPECTRAL_HD double square(double x) { return x * x; }

SPECTRAL_HD double matrix_term(double s, double t, double k) { return square(power(s, k) - power(t, k)); }

// k = 1 at s = 0: u and v+ do not exist there, and the caller sets the product to zero.
SPECTRAL_HD double matrix_slope(double s, double t, double k) { return 2.0 * k * power(s, k - 1.0) * (power(s, k) - power(t, k)); }

}  // namespace spectral

// The unit vector that replaces v where W v = 0, for host and device: a hash of the column, seeded by the bits of v[0], so
// that it differs from v, from run to run never. The same formula as spectral_ops/ops/power_iteration.py.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace spectral {

SPECTRAL_HD uint32_t mix(uint32_t x) {  // lowbias32, C. Wellons, https://nullprogram.com/blog/2018/07/31/
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// Element j before it is divided by the norm of all.
SPECTRAL_HD double hashed_element(int64_t j, uint32_t seed) {
  return static_cast<double>(mix(static_cast<uint32_t>(j) * 0x9e3779b9u + seed) >> 8) * 0x1p-23 - 1.0;
}

}  // namespace spectral

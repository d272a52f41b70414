// The four storage types of a weight and their scalar conversions. `static` on purpose: this header is compiled
// with several instruction sets, and an external inline function could be taken from the widest one by the linker.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace spectral {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static SPECTRAL_HD uint32_t float_bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
static SPECTRAL_HD float bits_float(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

static SPECTRAL_HD float widen(float x) { return x; }
static SPECTRAL_HD double widen(double x) { return x; }
static SPECTRAL_HD float widen(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
static SPECTRAL_HD float widen(f16 x) {
  // Shift exponent and mantissa into place and rescale by 2^112: exact for normal and subnormal numbers alike.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  if ((x.bits & 0x7c00u) == 0x7c00u) return bits_float(sign | magnitude | 0x7f800000u);  // inf, nan
  return bits_float(sign | float_bits(bits_float(magnitude) * 0x1p112f));
}

// Round to nearest, ties to even; NaN stays NaN.
static SPECTRAL_HD void narrow(float x, float* out) { *out = x; }
static SPECTRAL_HD void narrow(double x, double* out) { *out = x; }
static SPECTRAL_HD void narrow(float x, bf16* out) {
  const uint32_t u = float_bits(x);
  if (x != x) {
    out->bits = static_cast<uint16_t>((u >> 16) | 0x40u);
    return;
  }
  out->bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
static SPECTRAL_HD void narrow(float x, f16* out) {
  const uint32_t sign = (float_bits(x) >> 16) & 0x8000u;
  float a = bits_float(float_bits(x) & 0x7fffffffu);
  uint32_t h;
  if (x != x) {
    h = 0x7e00u;
  } else if (a >= 65520.0f) {
    h = 0x7c00u;
  } else if (a < 0x1p-14f) {
    // Adding 2^-1 * 2^-13 aligns the last place of a subnormal half with the last place of the sum, which rounds it.
    h = float_bits(a + 0.5f) - float_bits(0.5f);
  } else {
    const uint32_t u = float_bits(a);
    h = (u + 0xfffu + ((u >> 13) & 1u) - (112u << 23)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | h);
}

}  // namespace spectral

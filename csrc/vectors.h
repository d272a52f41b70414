// One register of each storage type, widened to the type of the sums and back, for the files that are compiled once per
// instruction set (*kernels.cpp, see CMakeLists.txt) and for no other: everything here has internal linkage.
#pragma once
#include "dtypes.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif
#include <cstddef>
#include <cstdint>

namespace spectral {
namespace {

#if defined(__AVX512F__)
constexpr size_t kBytes = 64;
#elif defined(__AVX__)
constexpr size_t kBytes = 32;
#else
constexpr size_t kBytes = 16;
#endif

constexpr size_t kFloats = kBytes / 4;
typedef float FloatVec __attribute__((vector_size(kBytes)));
typedef double DoubleVec __attribute__((vector_size(kBytes)));
typedef uint32_t WordVec __attribute__((vector_size(kBytes)));
typedef int32_t SignedVec __attribute__((vector_size(kBytes)));
typedef uint16_t HalfWordVec __attribute__((vector_size(kBytes / 2)));

template <class C>
struct VecOf;
template <>
struct VecOf<float> {
  using type = FloatVec;
};
template <>
struct VecOf<double> {
  using type = DoubleVec;
};
template <class C>
using Vec = typename VecOf<C>::type;
template <class C>
constexpr size_t lanes = kBytes / sizeof(C);

template <class To, class From>
inline To bit_cast(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To out;
  __builtin_memcpy(&out, &x, sizeof(To));
  return out;
}
template <class V, class T>
inline V load_bits(const T* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof(V));
  return x;
}

// ---- one register of each storage type, widened to the type of the sums, and back ----

inline FloatVec load(const float* p) { return load_bits<FloatVec>(p); }
inline DoubleVec load(const double* p) { return load_bits<DoubleVec>(p); }
inline FloatVec load(const bf16* p) {
  return bit_cast<FloatVec>(__builtin_convertvector(load_bits<HalfWordVec>(p), WordVec) << 16);
}
inline FloatVec load(const f16* p) {
#if defined(__AVX512F__)
  return bit_cast<FloatVec>(_mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(p)));
#elif defined(__F16C__)
  return bit_cast<FloatVec>(_mm256_cvtph_ps(load_bits<__m128i>(p)));
#else
  FloatVec x;
  for (size_t i = 0; i < kFloats; ++i) x[i] = widen(p[i]);
  return x;
#endif
}

inline void store(float* p, FloatVec x) { __builtin_memcpy(p, &x, kBytes); }
inline void store(double* p, DoubleVec x) { __builtin_memcpy(p, &x, kBytes); }
inline void store(bf16* p, FloatVec x) {
  const WordVec u = bit_cast<WordVec>(x);
  const WordVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const WordVec quiet = (u >> 16) | 0x40u;
  const SignedVec is_nan = x != x;
  const HalfWordVec h = __builtin_convertvector(is_nan ? quiet : rounded, HalfWordVec);
  __builtin_memcpy(p, &h, kBytes / 2);
}
inline void store(f16* p, FloatVec x) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(p, &h, 32);
#elif defined(__F16C__)
  const __m128i h = _mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(p, &h, 16);
#else
  for (size_t i = 0; i < kFloats; ++i) narrow(x[i], p + i);
#endif
}

// The last `count` < lanes elements of a row, zeros behind them; nothing past the row is touched.
template <class C, class T>
inline Vec<C> load_tail(const T* p, size_t count) {
  T buffer[lanes<C>] = {};
  for (size_t i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}
#if defined(__AVX512F__)
template <>
inline FloatVec load_tail<float, float>(const float* p, size_t count) {
  return bit_cast<FloatVec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p));
}
template <>
inline DoubleVec load_tail<double, double>(const double* p, size_t count) {
  return bit_cast<DoubleVec>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1u), p));
}
#endif
template <class C, class T>
inline void store_tail(T* p, Vec<C> x, size_t count) {
  T buffer[lanes<C>];
  store(buffer, x);
  for (size_t i = 0; i < count; ++i) p[i] = buffer[i];
}

template <class C>
inline C sum_lanes(Vec<C> x) {
  // Halves folded onto each other: the same order on every run, and the rounding of a balanced tree.
  for (size_t half = lanes<C> / 2; half > 0; half /= 2)
    for (size_t i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

}  // namespace
}  // namespace spectral

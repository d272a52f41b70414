// Pieces of one power iteration: reading rows once, ranges, the way out of W v = 0.
#include <algorithm>
#include <cmath>
#include <limits>

#include "step.h"
#include "unit_vector.h"

namespace spectral {
namespace {

// Rows packed at a time where columns are strided: one cache line of a transposed float weight.
constexpr int64_t kPackRows = 16;

template <class C>
C* scratch(size_t size) {
  thread_local std::vector<C> buffer;
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

// Calls use(first_row, rows, dense rows, stride) over chunks of a strided view made dense.
template <class C, class Use>
void for_packed_rows(const Item& item, const char* part, int64_t begin, int64_t end, Use use) {
  const RowKernels<C>& kernels = row_kernels<C>(item.w.dtype);
  const auto size = static_cast<int64_t>(element_size(item.w.dtype));
  C* packed = scratch<C>(static_cast<size_t>(kPackRows * item.padded));
  for (int64_t row = begin; row < end; row += kPackRows) {
    const int64_t rows = std::min(kPackRows, end - row);
    kernels.pack_rows(part + row * item.w.row_stride * size, item.w.row_stride, static_cast<size_t>(rows),
                      static_cast<size_t>(item.n), item.w.offset.data(), packed, static_cast<size_t>(item.padded));
    use(row, rows, packed);
  }
}

template <class C>
constexpr DType compute_dtype = sizeof(C) == 8 ? DType::f64 : DType::f32;

}  // namespace

template <class C>
void read_part_rows(const Item& item, const char* part, int64_t begin, int64_t end, const C* v, int shift, C* y, C* z, bool accumulate) {
  const auto n = static_cast<size_t>(item.n);
  if (item.w.dense) {
    const auto size = static_cast<int64_t>(element_size(item.w.dtype));
    row_kernels<C>(item.w.dtype).read_rows(part + begin * item.w.row_stride * size, item.w.row_stride,
                                           static_cast<size_t>(end - begin), n, v, shift, y, z, accumulate);
    return;
  }
  for_packed_rows<C>(item, part, begin, end, [&](int64_t row, int64_t rows, const C* packed) {
    row_kernels<C>(compute_dtype<C>).read_rows(packed, item.padded, static_cast<size_t>(rows), n, v, shift, y + (row - begin), z, accumulate || row > begin);
  });
}

template <class C>
double part_max_abs(const Item& item, const char* part, int64_t begin, int64_t end) {
  const auto n = static_cast<size_t>(item.n);
  if (item.w.dense) {
    const auto size = static_cast<int64_t>(element_size(item.w.dtype));
    return row_kernels<C>(item.w.dtype).max_abs(part + begin * item.w.row_stride * size, item.w.row_stride, static_cast<size_t>(end - begin), n);
  }
  double top = 0;
  for_packed_rows<C>(item, part, begin, end, [&](int64_t, int64_t rows, const C* packed) {
    const double here = row_kernels<C>(compute_dtype<C>).max_abs(packed, item.padded, static_cast<size_t>(rows), n);
    if (!(here <= top)) top = std::isnan(top) ? top : here;  // a NaN, once seen, stays
  });
  return top;
}

template <class C>
void another_unit_vector(const C* v, int64_t n, C* out) {
  if (n == 1) {
    out[0] = -v[0];
    return;
  }
  const uint32_t seed = float_bits(static_cast<float>(v[0]));
  const auto element = [seed](int64_t j) { return hashed_element(j, seed); };
  double squares = 0;
  for (int64_t j = 0; j < n; ++j) squares += element(j) * element(j);
  const double inverse = 1.0 / std::sqrt(squares);
  for (int64_t j = 0; j < n; ++j) out[j] = static_cast<C>(element(j) * inverse);
}

template <class C>
Shifts shifts_for(int exponent) {
  // Norms are taken in double, so for float y ~ sigma and z ~ sigma^2 are safe without scaling over a wide middle. For
  // double ||z||^2 ~ sigma^4 sets the limit. Beyond it v is scaled as far as its small elements stay normal numbers.
  constexpr int kFree = sizeof(C) == 8 ? 200 : 24;
  constexpr int kMost = sizeof(C) == 8 ? 900 : 100;
  if (exponent >= -kFree && exponent <= kFree) return {0, 0};
  return {-std::clamp(exponent, -kMost, kMost), -exponent};
}

template <class C>
double sum_of_squares(const C* x, int64_t n) {
  double sums[8] = {};
  int64_t j = 0;
  for (; j + 8 <= n; j += 8)
    for (int i = 0; i < 8; ++i) sums[i] += static_cast<double>(x[j + i]) * static_cast<double>(x[j + i]);
  for (; j < n; ++j) sums[0] += static_cast<double>(x[j]) * static_cast<double>(x[j]);
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

#define SPECTRAL_INSTANTIATE(C)                                                                          \
  template void read_part_rows<C>(const Item&, const char*, int64_t, int64_t, const C*, int, C*, C*, bool); \
  template double part_max_abs<C>(const Item&, const char*, int64_t, int64_t);                                         \
  template void another_unit_vector<C>(const C*, int64_t, C*);                                           \
  template Shifts shifts_for<C>(int);                                                                    \
  template double sum_of_squares<C>(const C*, int64_t);
SPECTRAL_INSTANTIATE(float)
SPECTRAL_INSTANTIATE(double)
#undef SPECTRAL_INSTANTIATE

}  // namespace spectral

// Compiled once per instruction set (see CMakeLists.txt) with SPECTRAL_ISA naming it. Everything but the one accessor at
// the end has internal linkage, and no standard library template is used: an inline function compiled here with AVX-512
// must never be the copy the linker keeps for an older processor.
#include "kernels.h"

#include "vectors.h"

namespace spectral {
namespace {

inline double scale_by_power(double x, int shift) { return shift == 0 ? x : __builtin_ldexp(x, shift); }

// ---- the one-read step: rows in memory order once for y, then the strip of them, still in cache, for z ----

// One row after the other, not several side by side: the hardware prefetcher follows one long stream at the full rate of
// memory, and loses it over several short ones (EPYC 9004, one thread, 384 columns, 2026-11: 4.5 ms for what a plain read
// takes 4.6 ms, against 8.9 ms for four rows at a time, whatever the software prefetch).
// Still, that prefetcher keeps too few lines under way: into the L2 cache, this far ahead, reads at 30 GB/s in place of 27
// (a plain sum, two threads, the same machine), and takes 0-10 % off a step.
constexpr ptrdiff_t kBytesAhead = 8192;
template <class T, class C>
inline C dot_row(const T* w, size_t n, const C* v) {
  constexpr size_t L = lanes<C>;
  Vec<C> sums[4] = {};  // four, to hide the latency of the multiply-add
  size_t j = 0;
  for (; j + 4 * L <= n; j += 4 * L)
    for (size_t i = 0; i < 4; ++i) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + j + i * L) + kBytesAhead, 0, 2);
      sums[i] += load(w + j + i * L) * load(v + j + i * L);
    }
  for (size_t i = 0; j + L <= n; j += L, ++i) sums[i] += load(w + j) * load(v + j);
  if (j < n) sums[3] += load_tail<C>(w + j, n - j) * load_tail<C>(v + j, n - j);
  return sum_lanes<C>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// z (+)= sum_r y_r w_r over R rows just read: summed among themselves first, so that z of a strip is rounded once for all
// of them. One by one, columns of 1000 equal numbers cost up to 1e-5 of sigma.
template <class T, class C, size_t R>
inline void add_rows(const T* w, ptrdiff_t row_stride, size_t n, const C* y, C* z, bool overwrite) {
  constexpr size_t L = lanes<C>;
  const char* next = reinterpret_cast<const char*>(w + static_cast<ptrdiff_t>(R) * row_stride);
  size_t j = 0;
  for (; j + L <= n; j += L) {
    Vec<C> sum = {};
    for (size_t r = 0; r < R; ++r) sum += y[r] * load(w + static_cast<ptrdiff_t>(r) * row_stride + j);
    if (!overwrite) sum += load(z + j);
    store(z + j, sum);
    // Memory would idle while this runs from cache: the start of the next strip is asked for (3-5 % at 1536 columns and more).
    __builtin_prefetch(next + j / L * 128, 0, 2);
    __builtin_prefetch(next + j / L * 128 + 64, 0, 2);
  }
  if (j < n) {
    Vec<C> sum = {};
    for (size_t r = 0; r < R; ++r) sum += y[r] * load_tail<C>(w + static_cast<ptrdiff_t>(r) * row_stride + j, n - j);
    if (!overwrite) sum += load(z + j);
    store(z + j, sum);
  }
}

template <class T, class C, size_t R>
inline void read_strip(const T* w, ptrdiff_t row_stride, size_t n, const C* v, int shift, C* y, C* z, bool overwrite) {
  C scaled[R];
  for (size_t r = 0; r < R; ++r) {
    y[r] = dot_row(w + static_cast<ptrdiff_t>(r) * row_stride, n, v);
    scaled[r] = static_cast<C>(scale_by_power(y[r], shift));
  }
  add_rows<T, C, R>(w, row_stride, n, scaled, z, overwrite);
}

template <class T, class C>
void read_rows(const void* base, ptrdiff_t row_stride, size_t rows, size_t n, const C* v, int shift, C* y, C* z,
               bool accumulate) {
  const T* w = static_cast<const T*>(base);
  bool overwrite = !accumulate;
  const auto strip = [&](auto read, size_t count) {
    read(w, row_stride, n, v, shift, y, z, overwrite);
    w += static_cast<ptrdiff_t>(count) * row_stride;
    y += count;
    rows -= count;
    overwrite = false;
  };
  while (rows >= 8) strip(read_strip<T, C, 8>, 8);  // 8 rows: z is read and written once for eight rows of w
  if (rows >= 4) strip(read_strip<T, C, 4>, 4);
  while (rows > 0) strip(read_strip<T, C, 1>, 1);
}

template <class T, class C>
void add_row(const void* w, size_t n, C y, C* z, bool accumulate) {
  add_rows<T, C, 1>(static_cast<const T*>(w), 0, n, &y, z, !accumulate);
}

template <class T, class C, bool OVERWRITE>
inline void rank_one_row(T* g, size_t n, C a, const C* v) {
  constexpr size_t L = lanes<C>;
  const Vec<C> zero = {};
  const Vec<C> scale = zero + a;
  size_t j = 0;
  for (; j + L <= n; j += L) {
    Vec<C> x = scale * load(v + j);
    if (!OVERWRITE) x += load(g + j);
    store(g + j, x);
  }
  if (j < n) {
    Vec<C> x = scale * load_tail<C>(v + j, n - j);
    if (!OVERWRITE) x += load_tail<C>(g + j, n - j);
    store_tail<C>(g + j, x, n - j);
  }
}

template <class T, class C>
void rank_one(void* base, ptrdiff_t row_stride, size_t rows, size_t n, const C* a, const C* v, bool overwrite) {
  T* g = static_cast<T*>(base);
  for (size_t r = 0; r < rows; ++r, g += row_stride) {
    if (overwrite)
      rank_one_row<T, C, true>(g, n, a[r], v);
    else
      rank_one_row<T, C, false>(g, n, a[r], v);
  }
}

template <class T, class C>
double max_abs(const void* base, ptrdiff_t row_stride, size_t rows, size_t n) {
  constexpr size_t L = lanes<C>;
  const T* w = static_cast<const T*>(base);
  Vec<C> largest = {}, poison = {};  // x * 0 is 0 for every finite x and NaN otherwise
  for (size_t r = 0; r < rows; ++r, w += row_stride) {
    size_t j = 0;
    for (; j < n; j += L) {
      const Vec<C> x = j + L <= n ? load(w + j) : load_tail<C>(w + j, n - j);
      const Vec<C> a = x < 0 ? -x : x;
      largest = a > largest ? a : largest;
      poison += x * 0;
    }
  }
  C top = 0, bad = 0;
  for (size_t i = 0; i < L; ++i) {
    top = largest[i] > top ? largest[i] : top;
    bad += poison[i];
  }
  return static_cast<double>(top) + static_cast<double>(bad);
}

template <class T, class C>
void pack_rows(const void* base, ptrdiff_t row_stride, size_t rows, size_t n, const int64_t* offset, C* out,
               size_t out_stride) {
  const T* w = static_cast<const T*>(base);
  for (size_t j = 0; j < n; ++j)  // columns outside: a transposed weight is then read along its cache lines
    for (size_t r = 0; r < rows; ++r) out[r * out_stride + j] = widen(w[static_cast<ptrdiff_t>(r) * row_stride + offset[j]]);
}

template <class T, class C>
void rank_one_strided(void* base, ptrdiff_t row_stride, size_t rows, size_t n, const int64_t* offset, const C* a,
                      const C* v, bool overwrite) {
  T* g = static_cast<T*>(base);
  if (row_stride == 1) {  // transposed: the product is symmetric in its factors, so columns take the part of rows
    for (size_t j = 0; j < n; ++j) {
      if (overwrite)
        rank_one_row<T, C, true>(g + offset[j], rows, v[j], a);
      else
        rank_one_row<T, C, false>(g + offset[j], rows, v[j], a);
    }
    return;
  }
  for (size_t r = 0; r < rows; ++r, g += row_stride)
    for (size_t j = 0; j < n; ++j) {
      C x = a[r] * v[j];
      if (!overwrite) x += widen(g[offset[j]]);
      narrow(x, g + offset[j]);
    }
}

template <class T>
double load_one(const void* p, ptrdiff_t i) {
  return static_cast<double>(widen(static_cast<const T*>(p)[i]));
}
template <class T, class C>
void store_one(void* p, ptrdiff_t i, double x) {
  narrow(static_cast<C>(x), static_cast<T*>(p) + i);
}

template <class C>
double combine(const C* parts, size_t stride, size_t count, size_t n, C* z) {
  // In double: up to some hundred partial sums meet here, and the cost is one part in the rows of a tile.
  constexpr size_t kBlock = 128;
  double squares[8] = {};
  for (size_t start = 0; start < n; start += kBlock) {
    const size_t width = n - start < kBlock ? n - start : kBlock;
    double sum[kBlock] = {};
    for (size_t t = 0; t < count; ++t) {
      const C* part = parts + t * stride + start;
      for (size_t j = 0; j < width; ++j) sum[j] += static_cast<double>(part[j]);
    }
    for (size_t j = 0; j < width; ++j) z[start + j] = static_cast<C>(sum[j]);
    for (size_t j = 0; j < kBlock; j += 8)  // sum is zero past width
      for (size_t i = 0; i < 8; ++i) squares[i] += sum[j + i] * sum[j + i];
  }
  return ((squares[0] + squares[4]) + (squares[1] + squares[5])) + ((squares[2] + squares[6]) + (squares[3] + squares[7]));
}

// ---- the memory floor: the same bytes moved, nothing computed (floor.h) ----

// Independent registers, so that the loop waits for memory and nothing else. Integers: no bit pattern is slow or changed.
constexpr size_t kFloorWords = 8;

uint64_t floor_read(const char* p, size_t bytes) {
  constexpr size_t kStep = kFloorWords * kBytes;
  WordVec sums[kFloorWords] = {};
  size_t i = 0;
  for (; i + kStep <= bytes; i += kStep)
    for (size_t k = 0; k < kFloorWords; ++k) sums[k] += load_bits<WordVec>(p + i + k * kBytes);
  uint64_t sum = 0;
  for (const WordVec& x : sums)
    for (size_t lane = 0; lane < kFloats; ++lane) sum += x[lane];
  for (; i < bytes; ++i) sum += static_cast<unsigned char>(p[i]);
  return sum;
}

// p ^= mask, where the caller passes zero in a way that the compiler cannot see.
void floor_rewrite(char* p, size_t bytes, uint32_t mask) {
  const WordVec masks = WordVec{} + mask;
  size_t i = 0;
  for (; i + 4 * kBytes <= bytes; i += 4 * kBytes)
    for (size_t k = 0; k < 4; ++k) {
      const WordVec x = load_bits<WordVec>(p + i + k * kBytes) ^ masks;
      __builtin_memcpy(p + i + k * kBytes, &x, kBytes);
    }
  for (; i < bytes; ++i) p[i] = static_cast<char>(p[i] ^ static_cast<char>(mask));
}

template <class T, class C>
constexpr RowKernels<C> row_kernels() {
  return {read_rows<T, C>, add_row<T, C>, rank_one<T, C>, max_abs<T, C>, pack_rows<T, C>, rank_one_strided<T, C>, load_one<T>, store_one<T, C>};
}

#define SPECTRAL_STRING_(x) #x
#define SPECTRAL_STRING(x) SPECTRAL_STRING_(x)
#define SPECTRAL_JOIN_(a, b) a##b
#define SPECTRAL_JOIN(a, b) SPECTRAL_JOIN_(a, b)

constexpr KernelSet kSet = {SPECTRAL_STRING(SPECTRAL_ISA), row_kernels<float, float>(), row_kernels<bf16, float>(),
                            row_kernels<f16, float>(), row_kernels<double, double>(), combine<float>, combine<double>, floor_read, floor_rewrite,
                            SPECTRAL_JOIN(conv_kernels_, SPECTRAL_ISA), SPECTRAL_JOIN(adamw_kernels_, SPECTRAL_ISA)};

}  // namespace

const KernelSet& SPECTRAL_JOIN(kernels_, SPECTRAL_ISA)() { return kSet; }

}  // namespace spectral

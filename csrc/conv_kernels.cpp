// Compiled once per instruction set, under the rules of kernels.cpp.
#include "conv_kernels.h"

#include "vectors.h"

namespace spectral {
namespace {

// Sums held at a time: enough to hide the latency of the multiply-add, and no more than there are registers beside those
// for lanes and for a weight. Of 16 registers, 12 sums leave room for the lanes of one group of floats.
#if defined(__AVX512F__)
constexpr size_t kSums = 16, kGroupsTogether = 2;
#elif defined(__AVX__)
constexpr size_t kSums = 12, kGroupsTogether = 1;
#else
constexpr size_t kSums = 8, kGroupsTogether = 1;
#endif
// A weight is read in more streams, or shorter pieces, than processors foresee: what is fetched ahead, and from how many
// multiplications a fetch on.
constexpr ptrdiff_t kChannelsAhead = 4;
constexpr size_t kFetchTaps = 4;
// Registers to a group of lanes.
template <class C>
constexpr size_t kPerGroup = kConvLanes<C> / lanes<C>;

template <class C, size_t R, size_t V>
inline void multiply_rows(const ConvProduct<C>& p, const C* a, const C* b, bool accumulate, C* tile, size_t width) {
  constexpr size_t L = lanes<C>;
  Vec<C> sum[R][V];
  for (size_t r = 0; r < R; ++r)
    for (size_t i = 0; i < V; ++i) {
      if (accumulate)
        sum[r][i] = load(tile + r * width + i * L);
      else
        sum[r][i] = Vec<C>{};
    }
  for (size_t channel = 0; channel < p.channels; ++channel, a += p.a_channel, b += p.b_channel) {
    if (p.taps >= kFetchTaps) {
#pragma GCC unroll 16
      for (size_t r = 0; r < R; ++r) __builtin_prefetch(a + static_cast<ptrdiff_t>(r) * p.a_row + kChannelsAhead * p.a_channel);
    }
    for (size_t tap = 0; tap < p.taps; ++tap) {
      const C* x = b + p.b_tap[tap];
      const C* w = a + p.a_tap[tap];
      Vec<C> lane[V];
#pragma GCC unroll 8
      for (size_t i = 0; i < V; ++i) {
        constexpr size_t G = kPerGroup<C>;
        lane[i] = load(x + (i < G ? 0 : p.b_second) + (i % G) * L);
      }
#pragma GCC unroll 16
      for (size_t r = 0; r < R; ++r) {
        const C factor = w[static_cast<ptrdiff_t>(r) * p.a_row];
#pragma GCC unroll 8
        for (size_t i = 0; i < V; ++i) sum[r][i] += factor * lane[i];
      }
    }
  }
  for (size_t r = 0; r < R; ++r)
    for (size_t i = 0; i < V; ++i) store(tile + r * width + i * L, sum[r][i]);
}

// R rows at a time, of TOGETHER groups; the rest by the next smaller power of two: 16, 8, 4, 2, 1 or 6, 4, 2, 1.
template <class C, size_t R, size_t TOGETHER>
inline void multiply_all(const ConvProduct<C>& p, const C* a, size_t rows, size_t groups, bool accumulate, C* tile, size_t width) {
  for (; rows >= R; rows -= R, a += static_cast<ptrdiff_t>(R) * p.a_row, tile += R * width)
    for (size_t group = 0; group < groups; group += TOGETHER)  // the rows are still in the L1 cache for the second
      multiply_rows<C, R, TOGETHER * kPerGroup<C>>(p, a, p.b + static_cast<ptrdiff_t>(group) * p.b_second, accumulate, tile + group * kConvLanes<C>, width);
  if constexpr (R > 1) {
    constexpr size_t kFewer = R > 8 ? 8 : R > 4 ? 4 : R / 2;
    if (rows > 0) multiply_all<C, kFewer, TOGETHER>(p, a, rows, groups, accumulate, tile, width);
  }
}

template <class C>
void multiply(const ConvProduct<C>& p, size_t rows, size_t groups, bool accumulate, C* tile, size_t width) {
  constexpr size_t G = kPerGroup<C>;
  if (groups == 1 || kGroupsTogether == 1)
    multiply_all<C, kSums / G, 1>(p, p.a, rows, groups, accumulate, tile, width);
  else
    multiply_all<C, kSums / (2 * G), 2>(p, p.a, rows, groups, accumulate, tile, width);
}

// Lanes that lie side by side are copied together: 4, 8 or 16 of them are a row of a small image.
template <class C, size_t N>
inline void pack_runs(const C* source, size_t channels, ptrdiff_t channel_stride, const ptrdiff_t* tap_at, size_t taps,
                      const ptrdiff_t* lane_at, size_t width, C* panel) {
  for (size_t channel = 0; channel < channels; ++channel, source += channel_stride)
    for (size_t tap = 0; tap < taps; ++tap, panel += width)
      for (size_t lane = 0; lane < width; lane += N) __builtin_memcpy(panel + lane, source + tap_at[tap] + lane_at[lane], N * sizeof(C));
}

// Four elements; for a double, as many as a register of AVX holds.
template <class C>
using Four __attribute__((vector_size(4 * sizeof(C)))) = C;
// {a0, b0, a1, b1} and {a2, b2, a3, b3}.
template <class V>
inline V zip_low(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#else
  return __builtin_shuffle(a, b, decltype(a == b){0, 4, 1, 5});
#endif
}
template <class V>
inline V zip_high(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
  return __builtin_shuffle(a, b, decltype(a == b){2, 6, 3, 7});
#endif
}

// panel[term * width + lane] = source[term + lane_at[lane]], four by four.
template <class C>
inline void transpose(const C* source, const ptrdiff_t* lane_at, C* panel, size_t width) {
  using V = Four<C>;
  const V a = load_bits<V>(source + lane_at[0]), b = load_bits<V>(source + lane_at[1]);
  const V c = load_bits<V>(source + lane_at[2]), d = load_bits<V>(source + lane_at[3]);
  const V ac = zip_low(a, c), bd = zip_low(b, d), ac_high = zip_high(a, c), bd_high = zip_high(b, d);
  const V out[4] = {zip_low(ac, bd), zip_high(ac, bd), zip_low(ac_high, bd_high), zip_high(ac_high, bd_high)};
  for (size_t term = 0; term < 4; ++term) __builtin_memcpy(panel + term * width, &out[term], sizeof(V));
}

template <class C>
void pack(const C* source, size_t channels, ptrdiff_t channel_stride, const ptrdiff_t* tap_at, size_t taps, const ptrdiff_t* lane_at,
          size_t width, C* panel) {
  const auto in_runs = [&](size_t length) {
    for (size_t lane = 0; lane < width; ++lane)
      if (lane_at[lane] != lane_at[lane / length * length] + static_cast<ptrdiff_t>(lane % length)) return false;
    return true;
  };
  if (in_runs(8)) return pack_runs<C, 8>(source, channels, channel_stride, tap_at, taps, lane_at, width, panel);
  if (in_runs(4)) return pack_runs<C, 4>(source, channels, channel_stride, tap_at, taps, lane_at, width, panel);
  // A gradient's terms are positions side by side. A kernel's taps need not rise: the grid is split by the strides.
  const auto side_by_side = [&](size_t tap) {
    if (tap + 4 > taps) return false;
    for (ptrdiff_t i = 1; i < 4; ++i)
      if (tap_at[tap + static_cast<size_t>(i)] != tap_at[tap] + i) return false;
    return true;
  };
  for (size_t channel = 0; channel < channels; ++channel, source += channel_stride)
    for (size_t tap = 0; tap < taps;) {
      const C* at = source + tap_at[tap];
      if (side_by_side(tap)) {
        for (size_t lane = 0; lane < width; lane += 4) transpose(at, lane_at + lane, panel + lane, width);
        tap += 4;
        panel += 4 * width;
      } else {
        for (size_t lane = 0; lane < width; ++lane) panel[lane] = at[lane_at[lane]];
        tap += 1;
        panel += width;
      }
    }
}

template <class T, class C>
void add_tile(void* base, ptrdiff_t row_stride, size_t rows, const ptrdiff_t* lane_at, bool dense, size_t count, const C* tile,
              size_t width, C factor, bool overwrite) {
  constexpr size_t L = lanes<C>;
  T* g = static_cast<T*>(base);
  const Vec<C> zero = {};
  const Vec<C> scale = zero + factor;
  for (size_t r = 0; r < rows; ++r, g += row_stride, tile += width) {
    if (!dense) {
      for (size_t lane = 0; lane < count; ++lane) {
        C x = factor * tile[lane];
        if (!overwrite) x += static_cast<C>(widen(g[lane_at[lane]]));
        narrow(x, g + lane_at[lane]);
      }
      continue;
    }
    T* row = g + lane_at[0];
    size_t lane = 0;
    for (; lane + L <= count; lane += L) {
      Vec<C> x = scale * load(tile + lane);
      if (!overwrite) x += load(row + lane);
      store(row + lane, x);
    }
    if (lane < count) {
      Vec<C> x = scale * load(tile + lane);  // the tile is as wide as whole registers
      if (!overwrite) x += load_tail<C>(row + lane, count - lane);
      store_tail<C>(row + lane, x, count - lane);
    }
  }
}

// In the order of DType: f32, f64, bf16, f16.
constexpr ConvKernelSet kSet = {
    {multiply<float>, pack<float>, {add_tile<float, float>, nullptr, add_tile<bf16, float>, add_tile<f16, float>}},
    {multiply<double>, pack<double>, {nullptr, add_tile<double, double>, nullptr, nullptr}}};

#define SPECTRAL_JOIN_(a, b) a##b
#define SPECTRAL_JOIN(a, b) SPECTRAL_JOIN_(a, b)

}  // namespace

const ConvKernelSet& SPECTRAL_JOIN(conv_kernels_, SPECTRAL_ISA)() { return kSet; }

}  // namespace spectral

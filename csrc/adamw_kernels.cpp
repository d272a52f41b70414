// Compiled once per instruction set, under the rules of kernels.cpp.
//
// For each element, in this order, as torch's fused AdamW up to rounding (it divides by sqrt(1 - beta2^t), we multiply by
// the inverse); p = a x_j is the gradient of strength * R:
//
//     g = g / grad_scale, negated where the task's objective is maximized     the penalty is made smaller in both cases
//     g = g + p                                                               unless decoupled
//     w = w (1 - lr weight_decay)                                             w: the master weight where there is one
//     w = w - lr p                                                            where decoupled
//     m = m + (1 - beta1) (g - m)
//     s = beta2 s + (1 - beta2) g g            with amsgrad: top = max(top, s), else top = s
//     w = w - lr / (1 - beta1^t) m / (sqrt(top) / sqrt(1 - beta2^t) + eps)
#include "adamw_kernels.h"

#include "vectors.h"

namespace spectral {
namespace {

inline DoubleVec square_root(DoubleVec x) {
#if defined(__AVX512F__)
  return bit_cast<DoubleVec>(_mm512_sqrt_pd(bit_cast<__m512d>(x)));
#else
  for (size_t i = 0; i < lanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}
inline FloatVec square_root(FloatVec x) {
#if defined(__AVX512F__)
  return bit_cast<FloatVec>(_mm512_sqrt_ps(bit_cast<__m512>(x)));
#elif defined(__AVX__)
  return bit_cast<FloatVec>(_mm256_sqrt_ps(bit_cast<__m256>(x)));
#elif defined(__SSE2__)
  return bit_cast<FloatVec>(__builtin_ia32_sqrtps(x));
#else
  for (size_t i = 0; i < kFloats; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// x / (sqrt(y) factor + eps)
template <class C>
inline Vec<C> over_root(Vec<C> x, Vec<C> y, C factor, C eps) {
  return x / (square_root(y) * factor + eps);
}
#if defined(__AVX512F__)
// By 14 bits of either inverse and a step of Newton's for each, to an ulp or two: the exact instructions take 20 cycles for
// 16 elements, as long as half of what memory takes.
template <>
inline FloatVec over_root<float>(FloatVec x, FloatVec y, float factor, float eps) {
  const __m512 square = bit_cast<__m512>(y), least = _mm512_set1_ps(0x1p-126f), most = _mm512_set1_ps(0x1p126f);
  const __mmask16 usual = _mm512_cmp_ps_mask(square, least, _CMP_GE_OQ) & _mm512_cmp_ps_mask(square, most, _CMP_LE_OQ);
  if (usual != 0xffff || !(eps < 0x1p100f)) return x / (square_root(y) * factor + eps);
  const __m512 inverse = _mm512_rsqrt14_ps(square);
  __m512 root = _mm512_mul_ps(square, inverse);
  root = _mm512_fmadd_ps(_mm512_fnmadd_ps(root, root, square), _mm512_mul_ps(inverse, _mm512_set1_ps(0.5f)), root);
  const __m512 below = _mm512_fmadd_ps(root, _mm512_set1_ps(factor), _mm512_set1_ps(eps)), above = bit_cast<__m512>(x);
  __m512 over = _mm512_rcp14_ps(below);
  over = _mm512_fmadd_ps(over, _mm512_fnmadd_ps(below, over, _mm512_set1_ps(1.0f)), over);
  return bit_cast<FloatVec>(_mm512_mul_ps(above, over));
}
#endif

// The random bits of the elements from `counter` on: lowbias32 of element number and key, as ops/adamw_ref.py has it.
inline WordVec draw(uint32_t counter, uint32_t key) {
  WordVec x;
  for (size_t i = 0; i < kFloats; ++i) x[i] = counter + static_cast<uint32_t>(i);
  x = x * 0x9e3779b9u + key;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// Rounded up with the probability that it lies that far up: 16 random bits added below the mantissa, the rest cut off. A
// finite number stays finite, infinities and NaN stay what they are.
inline FloatVec round_by_chance(FloatVec x, WordVec random) {
  const WordVec u = bit_cast<WordVec>(x);
  const WordVec sum = u + (random >> 16);
  const SignedVec is_nan = x != x;
  const SignedVec overflows = (sum & 0x7f800000u) == 0x7f800000u;
  const WordVec cut = (is_nan | overflows) ? u : sum;
  const WordVec quiet = is_nan ? (WordVec{} + 0x400000u) : WordVec{};
  return bit_cast<FloatVec>((cut | quiet) & 0xffff0000u);
}

template <class T, class C>
inline Vec<C> rounded(Vec<C> w, const AdamWFactors<C>& f, uint32_t counter) {
  if constexpr (sizeof(T) == 2 && sizeof(C) == 4) {
    if (f.stochastic) return round_by_chance(w, draw(counter, f.key));
  }
  (void)f;
  (void)counter;
  return w;
}

template <class C>
struct Element {
  Vec<C> w, g, m, s, top;
};

template <class C>
inline void advance(Element<C>& e, Vec<C> penalty, const AdamWFactors<C>& f, bool amsgrad, bool decoupled) {
  e.g *= f.gradient_scale;
  if (!decoupled) e.g += penalty;
  e.w *= f.decay;
  if (decoupled) e.w -= f.lr * penalty;
  e.m += f.beta1_rest * (e.g - e.m);
  e.s = f.beta2 * e.s + f.beta2_rest * e.g * e.g;
  Vec<C> top = e.s;
  if (amsgrad) top = e.top = e.top > e.s ? e.top : e.s;
  e.w -= over_root<C>(f.step_size * e.m, top, f.inverse_sqrt_bias2, f.eps);
}

// Four streams are read. The processor's own prefetcher follows them, and gets going again at every page.
constexpr ptrdiff_t kBytesAhead = 2048;
template <class T>
inline void fetch(const T* p) {
  if (p != nullptr) __builtin_prefetch(reinterpret_cast<const char*>(p) + kBytesAhead, 0, 2);
}

// What is known of a call's vectors when its loop is compiled. A core that shares its front end with another is bound by
// the number of instructions, and the tests for what is not there, with what they kept out of registers, were a third.
enum class Reads {
  any,      // nothing is known
  nothing,  // x and v are null
  row,      // x is v, no rows are waiting
  store,    // x is v, the two rows before are the first that go to z
  add,      // x is v, the two rows before are added to z
};

// USUAL: with a gradient and without any of the options.
template <class T, class G, class C, bool USUAL, Reads READS>
C update_as(const AdamWRun<C>& run_of, size_t n, C a, const C* x, const AdamWRead<C>& read_of, const AdamWFactors<C>& factors, uint32_t counter) {
  constexpr size_t L = lanes<C>;
  // Copies: what is stored might, for all the compiler knows, change the originals, and they would be loaded every time.
  AdamWRun<C> run = run_of;
  if (USUAL) run.master = nullptr;
  const AdamWRead<C> read = read_of;
  AdamWFactors<C> f = factors;
  f.stochastic = !USUAL && f.stochastic;
  T* w = static_cast<T*>(run.w);
  const G* g = static_cast<const G*>(run.g);
  const T *before = static_cast<const T*>(read.before[0]), *second = static_cast<const T*>(read.before[1]);
  const C* v = read.v;
  C* z = read.z;
  const bool amsgrad = !USUAL && run.max_exp_avg_sq != nullptr, decoupled = !USUAL && f.decoupled;
  constexpr bool KNOWN = READS != Reads::any;
  const bool has_x = KNOWN ? READS != Reads::nothing : x != nullptr, has_v = KNOWN ? has_x : v != nullptr;
  const bool has_before = KNOWN ? READS == Reads::store || READS == Reads::add : before != nullptr;
  const bool overwrite = KNOWN ? READS == Reads::store : read.overwrite;
  Vec<C> sums[2] = {};
  // first: of the two of an iteration, which together are a line of the cache or less. Where nothing but the four streams
  // is read, asking for a line twice is 8 % faster from memory (AVX2), and slower everywhere else.
  const auto whole = [&](size_t j, Vec<C>& sum, bool first) __attribute__((always_inline)) {
    Element<C> e{};
    e.w = run.master == nullptr ? load(w + j) : load(run.master + j);
    if (USUAL || g != nullptr) e.g = load(g + j);
    e.m = load(run.exp_avg + j);
    e.s = load(run.exp_avg_sq + j);
    if (amsgrad) e.top = load(run.max_exp_avg_sq + j);
    if (first || READS == Reads::nothing || L * sizeof(C) == 64) {
      fetch(w + j);
      fetch(g == nullptr ? g : g + j);
      fetch(run.exp_avg + j);
      fetch(run.exp_avg_sq + j);
    }
    Vec<C> penalty = {}, vs = {};
    if (has_x) penalty = a * (vs = load(x + j));
    if (!KNOWN && v != x && v != nullptr) vs = load(v + j);
    advance<C>(e, penalty, f, amsgrad, decoupled);
    store(run.exp_avg + j, e.m);
    store(run.exp_avg_sq + j, e.s);
    if (amsgrad) store(run.max_exp_avg_sq + j, e.top);
    if (run.master != nullptr) store(run.master + j, e.w);
    const Vec<C> after = rounded<T, C>(e.w, f, counter + static_cast<uint32_t>(j));
    store(w + j, after);
    if (has_v) sum += (sizeof(T) == sizeof(C) ? after : load(w + j)) * vs;
    if (has_before) {
      Vec<C> total = {};
      if (!overwrite) total = load(z + j);
      store(z + j, total + read.y_before[0] * load(before + j) + read.y_before[1] * load(second + j));
    }
  };
  size_t j = 0;
  for (; j + 2 * L <= n; j += 2 * L) {
    whole(j, sums[0], true);
    whole(j + L, sums[1], false);
  }
  if (j + L <= n) {
    whole(j, sums[0], true);
    j += L;
  }
  if (j < n) {
    const size_t rest = n - j;
    Element<C> e{};
    e.w = run.master == nullptr ? load_tail<C>(w + j, rest) : load_tail<C>(run.master + j, rest);
    if (USUAL || g != nullptr) e.g = load_tail<C>(g + j, rest);
    e.m = load_tail<C>(run.exp_avg + j, rest);
    e.s = load_tail<C>(run.exp_avg_sq + j, rest);
    if (amsgrad) e.top = load_tail<C>(run.max_exp_avg_sq + j, rest);
    Vec<C> penalty = {};
    if (has_x) penalty = a * load_tail<C>(x + j, rest);
    advance<C>(e, penalty, f, amsgrad, decoupled);
    store_tail<C>(run.exp_avg + j, e.m, rest);
    store_tail<C>(run.exp_avg_sq + j, e.s, rest);
    if (amsgrad) store_tail<C>(run.max_exp_avg_sq + j, e.top, rest);
    if (run.master != nullptr) store_tail<C>(run.master + j, e.w, rest);
    store_tail<C>(w + j, rounded<T, C>(e.w, f, counter + static_cast<uint32_t>(j)), rest);
    // Read back: lanes past the end hold 0 / 0 where eps is 0.
    if (has_v) sums[1] += load_tail<C>(w + j, rest) * load_tail<C>(v + j, rest);
    if (has_before) {
      Vec<C> total = {};
      if (!overwrite) total = load(z + j);
      store(z + j, total + read.y_before[0] * load_tail<C>(before + j, rest) + read.y_before[1] * load_tail<C>(second + j, rest));
    }
  }
  return sum_lanes<C>(sums[0] + sums[1]);
}

template <class T, class G, class C>
C update(const AdamWRun<C>& run, size_t n, C a, const C* x, const AdamWRead<C>& read, const AdamWFactors<C>& f, uint32_t counter) {
  const bool usual = run.g != nullptr && run.max_exp_avg_sq == nullptr && run.master == nullptr && !f.decoupled && !f.stochastic;
  AdamWUpdate<C> as = update_as<T, G, C, false, Reads::any>;
  if (usual) {
    as = update_as<T, G, C, true, Reads::any>;
    if (x == nullptr && read.v == nullptr)
      as = update_as<T, G, C, true, Reads::nothing>;
    else if (x == read.v)
      as = read.before[0] == nullptr ? update_as<T, G, C, true, Reads::row>
           : read.overwrite          ? update_as<T, G, C, true, Reads::store>
                                     : update_as<T, G, C, true, Reads::add>;
  }
  return as(run, n, a, x, read, f, counter);
}

// In the order of DType: f32, f64, bf16, f16.
#define SPECTRAL_BY_GRADIENT(T) {update<T, float, float>, nullptr, update<T, bf16, float>, update<T, f16, float>}
constexpr AdamWKernelSet kSet = {
    {SPECTRAL_BY_GRADIENT(float), {nullptr, nullptr, nullptr, nullptr}, SPECTRAL_BY_GRADIENT(bf16), SPECTRAL_BY_GRADIENT(f16)},
    update<double, double, double>};
#undef SPECTRAL_BY_GRADIENT

#define SPECTRAL_JOIN_(a, b) a##b
#define SPECTRAL_JOIN(a, b) SPECTRAL_JOIN_(a, b)

}  // namespace

const AdamWKernelSet& SPECTRAL_JOIN(adamw_kernels_, SPECTRAL_ISA)() { return kSet; }

}  // namespace spectral

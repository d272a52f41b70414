// Converged sigma_1: Lanczos on W'W from a fixed random vector, every product W'(W q) one read of W, with full
// reorthogonalisation; then one step of the penalty's iteration from the Ritz vector, which gives a value that is never
// above sigma_1, a unit pair (u, v) and a residual bound. Golub and Van Loan, Matrix Computations, 4th ed., 10.1-10.3.
//
// What happens to a matrix depends on that matrix alone, however the work is shared.
#include "spectral_norm.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>

#include "step.h"
#include "threads.h"
#include "tridiagonal.h"

namespace spectral {
namespace {

// The small eigenproblem is solved only every so many reads.
constexpr size_t kCheckEvery = 3;

// To which theta is found: far below what the reads resolve.
template <class C>
constexpr double kThetaWidth = sizeof(C) == 8 ? 1e-15 : 1e-10;

enum class Stage { krylov, polish, done };

template <class C>
struct Run {
  const Item* item;
  int64_t part;
  const char* weight;
  Stage stage = Stage::krylov;
  Shifts shifts{0, 0};
  double largest = 0;
  std::vector<C> basis;  // rows are the Lanczos vectors, `padded` apart
  Tridiagonal projected;
  double theta = 0;
  bool converged = false;
};

template <class C>
class SpectralNorm {
 public:
  SpectralNorm(Table& table, Table::Workspace<C>& space, const NormArguments<C>& arguments)
      : table_(table), space_(space), a_(arguments) {}

  int64_t run() {
    std::vector<Run<C>> runs;
    int64_t bytes = 0, largest = 0;
    for (size_t i = 0; i < table_.items.size(); ++i) {
      const Item& item = table_.items[i];
      if (item.kind != Kind::matrix) continue;
      for (int64_t part = 0; part < item.parts; ++part) {
        Run<C> run;
        run.item = &item;
        run.part = part;
        run.weight = part_address(a_.weights[i], item.w, part);
        runs.push_back(std::move(run));
      }
      bytes += item.parts * item.bytes;
      largest = std::max(largest, item.bytes);
    }
    // Many matrices: each stays with one thread, in its cache, and nobody waits. Few: their strips are shared.
    if (largest * 2 * a_.threads <= bytes || a_.threads == 1)
      run_phases({{static_cast<int64_t>(runs.size()), [&](int64_t i) { run_alone(runs[static_cast<size_t>(i)]); }}}, a_.threads);
    else
      run_together(runs);
    return std::count_if(runs.begin(), runs.end(), [](const Run<C>& run) { return !run.converged; });
  }

 private:
  struct Strip {
    size_t run;
    int64_t strip;
  };

  Table& table_;
  Table::Workspace<C>& space_;
  const NormArguments<C>& a_;

  C* partial(const Run<C>& run) const {
    return space_.partial.data() + run.item->partial_at + run.part * run.item->tiles * run.item->padded;
  }
  C* rows(const Run<C>& run) const { return space_.y.data() + run.item->y_at + run.part * run.item->rows; }
  C* columns(const Run<C>& run) const { return space_.columns.data() + run.item->column_at + run.part * run.item->padded; }
  C* prepared(const Run<C>& run) const { return space_.prepared.data() + run.item->prepared_at + run.part * run.item->padded; }
  static C* vector(Run<C>& run, size_t k) { return run.basis.data() + k * static_cast<size_t>(run.item->padded); }
  static size_t steps(const Run<C>& run) { return run.projected.size(); }

  void run_alone(Run<C>& run) {
    for (int64_t strip = 0; strip < run.item->tiles; ++strip) run.largest = larger(run.largest, strip_max_abs(run, strip));
    start(run);
    // To and fro: what a read left in the L2 cache is what the next one begins with.
    const int64_t tiles = run.item->tiles;
    for (bool back = true; run.stage != Stage::done; back = !back) {
      for (int64_t i = 0; i < tiles; ++i) read(run, back ? tiles - 1 - i : i);
      advance(run);
    }
  }

  void run_together(std::vector<Run<C>>& runs) {
    std::vector<Strip> strips;
    const auto list_strips = [&] {
      strips.clear();
      for (size_t r = 0; r < runs.size(); ++r)
        for (int64_t s = 0; runs[r].stage != Stage::done && s < runs[r].item->tiles; ++s) strips.push_back({r, s});
      return static_cast<int64_t>(strips.size());
    };
    const auto over_strips = [&](auto use) { return [&strips, &runs, use](int64_t i) { use(static_cast<size_t>(i), runs[strips[static_cast<size_t>(i)].run], strips[static_cast<size_t>(i)].strip); }; };
    const auto over_runs = [&](auto use) { return [&runs, use](int64_t i) { use(runs[static_cast<size_t>(i)]); }; };
    const auto count = static_cast<int64_t>(runs.size());
    std::vector<double> largest(static_cast<size_t>(list_strips()));
    run_phases({{static_cast<int64_t>(largest.size()), over_strips([&](size_t i, const Run<C>& run, int64_t strip) { largest[i] = strip_max_abs(run, strip); })}}, a_.threads);
    for (size_t i = 0; i < strips.size(); ++i) runs[strips[i].run].largest = larger(runs[strips[i].run].largest, largest[i]);
    run_phases({{count, over_runs([this](Run<C>& run) { start(run); })}}, a_.threads);
    while (const int64_t active = list_strips()) {
      run_phases({{active, over_strips([this](size_t, Run<C>& run, int64_t strip) { read(run, strip); })},
                  {count, over_runs([this](Run<C>& run) { advance(run); })}},
                 a_.threads);
    }
  }

  static double strip_max_abs(const Run<C>& run, int64_t strip) {
    const int64_t begin = strip * run.item->tile_rows;
    return part_max_abs<C>(*run.item, run.weight, begin, std::min(run.item->rows, begin + run.item->tile_rows));
  }
  // A NaN, once seen, stays.
  static double larger(double top, double x) { return x <= top || std::isnan(top) ? top : x; }

  void start(Run<C>& run) {
    const Item& item = *run.item;
    const auto padded = static_cast<size_t>(item.padded);
    const bool finite = std::isfinite(run.largest);
    run.basis.assign(padded, C(0));
    if (item.n > 0) {
      const C seed = C(0);
      if (item.n == 1)
        run.basis[0] = C(1);
      else
        another_unit_vector(&seed, item.n, run.basis.data());
    }
    if (item.rows == 0 || item.n == 0 || run.largest == 0 || !finite) {
      const double value = finite ? 0.0 : std::numeric_limits<double>::quiet_NaN();
      finish(run, value, value, 0.0, run.basis.data(), 1.0);
      run.converged = true;  // as far as this matrix can
      return;
    }
    // Here max|W| is 1 up to a power of two, so sigma <= sqrt(rows * n) and no product leaves its range.
    run.shifts = shifts_for<C>(std::ilogb(run.largest));
    scale_vector(run, vector(run, 0));
  }

  void scale_vector(Run<C>& run, const C* q) {
    if (run.shifts.v == 0) return;
    for (int64_t j = 0; j < run.item->n; ++j) prepared(run)[j] = std::ldexp(q[j], run.shifts.v);
  }

  void read(Run<C>& run, int64_t strip) {
    const Item& item = *run.item;
    const int64_t begin = strip * item.tile_rows, end = std::min(item.rows, begin + item.tile_rows);
    const C* v = run.shifts.v == 0 ? vector(run, run.stage == Stage::polish ? 0 : steps(run)) : prepared(run);
    read_part_rows(item, run.weight, begin, end, v, run.shifts.y, rows(run) + begin, partial(run) + strip * item.padded);
  }

  void advance(Run<C>& run) {
    if (run.stage == Stage::done) return;
    const Item& item = *run.item;
    const auto padded = static_cast<size_t>(item.padded), n = static_cast<size_t>(item.n);
    C* z = columns(run);
    double squares;
    if constexpr (sizeof(C) == 8)
      squares = kernels().combine_f64(partial(run), padded, static_cast<size_t>(item.tiles), n, z);
    else
      squares = kernels().combine_f32(partial(run), padded, static_cast<size_t>(item.tiles), n, z);
    if (run.stage == Stage::polish) {
      polish(run, z, std::sqrt(squares));
      return;
    }
    const size_t k = steps(run) + 1;
    // The two terms that are there in exact arithmetic first, then once the whole space: together "twice is enough".
    double alpha = remove(run, z, k - 1, dot(vector(run, k - 1), z, item.n));
    if (k > 1) remove(run, z, k - 2, run.projected.off[k - 2]);
    alpha += remove_projection(run, z, k);
    run.projected.diagonal.push_back(alpha);
    const double beta = std::sqrt(sum_of_squares(z, item.n));
    run.projected.off.push_back(beta);
    const bool last = static_cast<int>(k) >= a_.max_iterations;
    // Nothing is left of z but rounding: the space is invariant.
    const double scale = *std::max_element(run.projected.diagonal.begin(), run.projected.diagonal.end());
    const bool invariant = beta <= 4 * std::numeric_limits<C>::epsilon() * scale || k >= n;
    if (invariant || last || k == 2 || k % kCheckEvery == 0) {
      run.theta = run.projected.eigenvalue(1, run.theta, kThetaWidth<C>);
      const std::vector<double> s = run.projected.top_vector(run.theta);
      // By the residual alone: sigma_1^2 is within it of theta. residual^2 / gap promises more, but two close values look
      // like one until the iteration tells them apart, and then the promise is wrong by the distance between them.
      run.converged = invariant || beta * std::fabs(s.back()) <= 2 * a_.tolerance * run.theta;
      if (run.converged || last) {
        to_ritz_vector(run, s);
        return;
      }
    }
    run.basis.resize((k + 1) * padded);
    C* next = vector(run, k);
    for (size_t j = 0; j < n; ++j) next[j] = static_cast<C>(z[j] / beta);
    scale_vector(run, next);
  }

  static double dot(const C* x, const C* y, int64_t n) {
    double sums[8] = {};
    int64_t j = 0;
    for (; j + 8 <= n; j += 8)
      for (int i = 0; i < 8; ++i) sums[i] += static_cast<double>(x[j + i]) * static_cast<double>(y[j + i]);
    for (; j < n; ++j) sums[0] += static_cast<double>(x[j]) * static_cast<double>(y[j]);
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
  }

  // z -= coefficient q_k
  static double remove(Run<C>& run, C* z, size_t k, double coefficient) {
    const C* q = vector(run, k);
    for (int64_t j = 0; j < run.item->n; ++j) z[j] -= static_cast<C>(coefficient) * q[j];
    return coefficient;
  }

  // z -= Q'(Q z) for the first k Lanczos vectors; returns the coefficient of the last. Q is read as any matrix is.
  double remove_projection(Run<C>& run, C* z, size_t k) {
    thread_local std::vector<C> coefficients, projection;
    const auto padded = static_cast<size_t>(run.item->padded), n = static_cast<size_t>(run.item->n);
    coefficients.resize(k);
    projection.resize(padded);
    constexpr DType type = sizeof(C) == 8 ? DType::f64 : DType::f32;
    row_kernels<C>(type).read_rows(run.basis.data(), run.item->padded, k, n, z, 0, coefficients.data(), projection.data(), false);
    for (size_t j = 0; j < n; ++j) z[j] -= projection[j];
    return coefficients[k - 1];
  }

  void to_ritz_vector(Run<C>& run, const std::vector<double>& s) {
    const auto n = static_cast<size_t>(run.item->n), padded = static_cast<size_t>(run.item->padded);
    std::vector<double> x(n, 0.0);
    for (size_t k = 0; k < s.size(); ++k)
      for (size_t j = 0; j < n; ++j) x[j] += s[k] * static_cast<double>(run.basis[k * padded + j]);
    const double inverse = 1.0 / std::sqrt(sum_of_squares(x.data(), run.item->n));
    run.basis.resize(padded);
    run.basis.shrink_to_fit();
    for (size_t j = 0; j < n; ++j) run.basis[j] = static_cast<C>(x[j] * inverse);
    scale_vector(run, run.basis.data());
    run.stage = Stage::polish;
  }

  void polish(Run<C>& run, const C* z, double z_norm) {
    const Item& item = *run.item;
    const C* x = run.basis.data();
    const double y_norm = std::sqrt(sum_of_squares(rows(run), item.rows));
    if (y_norm == 0 || z_norm == 0) {  // every element that counts is subnormal even after scaling
      finish(run, 0.0, 0.0, 0.0, x, 1.0);
      return;
    }
    double theta = 0, residual = 0;
    for (int64_t j = 0; j < item.n; ++j) theta += static_cast<double>(x[j]) * static_cast<double>(z[j]);
    for (int64_t j = 0; j < item.n; ++j) {
      const double r = static_cast<double>(z[j]) - theta * static_cast<double>(x[j]);
      residual += r * r;
    }
    const double sigma = std::ldexp(z_norm / y_norm, -run.shifts.y);
    // sigma_1^2 <= theta + residual, all of it scaled by 2^(shift_v + shift_y).
    const double above = std::sqrt(theta + std::sqrt(residual)) * std::exp2(-0.5 * (run.shifts.v + run.shifts.y));
    const double rounding = 4 * std::numeric_limits<C>::epsilon() * sigma;
    finish(run, sigma, std::max(above - sigma, 0.0) + rounding, 1.0 / y_norm, z, 1.0 / z_norm);
  }

  void finish(Run<C>& run, double sigma, double bound, double inverse_y, const C* v, double scale) {
    const Item& item = *run.item;
    const int64_t matrix = item.index + run.part;
    a_.sigma[matrix] = static_cast<C>(sigma);
    a_.bound[matrix] = static_cast<C>(bound);
    a_.exponents[matrix] = sigma > 0 ? std::ilogb(sigma) : 0;
    C* u = a_.u + item.u_at + run.part * item.rows;
    for (int64_t r = 0; r < item.rows; ++r) u[r] = inverse_y == 0 ? C(0) : static_cast<C>(rows(run)[r] * inverse_y);
    C* out = a_.v + item.v_at + run.part * item.n;
    for (int64_t p = 0; p < item.n; ++p)
      out[item.w.order.empty() ? p : item.w.order[static_cast<size_t>(p)]] = static_cast<C>(v[p] * scale);
    run.stage = Stage::done;
    std::vector<C>().swap(run.basis);
  }
};

}  // namespace

template <>
int64_t spectral_norm<float>(Table& table, const NormArguments<float>& arguments) {
  const std::lock_guard<std::mutex> hold(table.lock);
  return SpectralNorm<float>(table, table.f32, arguments).run();
}
template <>
int64_t spectral_norm<double>(Table& table, const NormArguments<double>& arguments) {
  const std::lock_guard<std::mutex> hold(table.lock);
  return SpectralNorm<double>(table, table.f64, arguments).run();
}

}  // namespace spectral

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

#include "lanczos.h"
#include "threads.h"

namespace spectral {
namespace {

template <class C>
struct Run {
  const Item* item;
  int64_t part;
  const char* weight;
  double largest = 0;
  Lanczos<C> lanczos;
  bool done() const { return lanczos.stage == LanczosStage::done; }
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
    return std::count_if(runs.begin(), runs.end(), [](const Run<C>& run) { return !run.lanczos.converged; });
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

  void run_alone(Run<C>& run) {
    for (int64_t strip = 0; strip < run.item->tiles; ++strip) run.largest = larger(run.largest, strip_max_abs(run, strip));
    start(run);
    // To and fro: what a read left in the L2 cache is what the next one begins with.
    const int64_t tiles = run.item->tiles;
    for (bool back = true; !run.done(); back = !back) {
      for (int64_t i = 0; i < tiles; ++i) read(run, back ? tiles - 1 - i : i);
      advance(run);
    }
  }

  void run_together(std::vector<Run<C>>& runs) {
    std::vector<Strip> strips;
    const auto list_strips = [&] {
      strips.clear();
      for (size_t r = 0; r < runs.size(); ++r)
        for (int64_t s = 0; !runs[r].done() && s < runs[r].item->tiles; ++s) strips.push_back({r, s});
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
    const bool finite = std::isfinite(run.largest);
    run.lanczos.start(item.n, item.padded);
    if (item.rows == 0 || item.n == 0 || run.largest == 0 || !finite) {
      const double value = finite ? 0.0 : std::numeric_limits<double>::quiet_NaN();
      finish(run, {value, value, 0, 1}, run.lanczos.wanted());
      run.lanczos.converged = true;  // as far as this matrix can
      return;
    }
    // Here max|W| is 1 up to a power of two, so sigma <= sqrt(rows * n) and no product leaves its range.
    run.lanczos.shifts = shifts_for<C>(std::ilogb(run.largest));
    scale_wanted(run);
  }

  void scale_wanted(Run<C>& run) {
    const int shift = run.lanczos.shifts.v;
    if (shift == 0) return;
    const C* q = run.lanczos.wanted();
    for (int64_t j = 0; j < run.item->n; ++j) prepared(run)[j] = std::ldexp(q[j], shift);
  }

  void read(Run<C>& run, int64_t strip) {
    const Item& item = *run.item;
    const int64_t begin = strip * item.tile_rows, end = std::min(item.rows, begin + item.tile_rows);
    const Shifts& shifts = run.lanczos.shifts;
    const C* v = shifts.v == 0 ? run.lanczos.wanted() : prepared(run);
    read_part_rows(item, run.weight, begin, end, v, shifts.y, rows(run) + begin, partial(run) + strip * item.padded, false);
  }

  void advance(Run<C>& run) {
    if (run.done()) return;
    const Item& item = *run.item;
    const auto padded = static_cast<size_t>(item.padded), n = static_cast<size_t>(item.n);
    C* z = columns(run);
    double squares;
    if constexpr (sizeof(C) == 8)
      squares = kernels().combine_f64(partial(run), padded, static_cast<size_t>(item.tiles), n, z);
    else
      squares = kernels().combine_f32(partial(run), padded, static_cast<size_t>(item.tiles), n, z);
    if (run.lanczos.stage == LanczosStage::polish) {
      const Polished polished = run.lanczos.polish(z, std::sqrt(sum_of_squares(rows(run), item.rows)), std::sqrt(squares));
      finish(run, polished, polished.inverse_y == 0 ? run.lanczos.wanted() : z);
      return;
    }
    run.lanczos.advance(z, a_.tolerance, a_.max_iterations);
    scale_wanted(run);
  }

  void finish(Run<C>& run, const Polished& found, const C* v) {
    const Item& item = *run.item;
    const int64_t matrix = item.index + run.part;
    a_.sigma[matrix] = static_cast<C>(found.sigma);
    a_.bound[matrix] = static_cast<C>(found.bound);
    a_.exponents[matrix] = found.sigma > 0 ? std::ilogb(found.sigma) : 0;
    C* u = a_.u + item.u_at + run.part * item.rows;
    for (int64_t r = 0; r < item.rows; ++r) u[r] = found.inverse_y == 0 ? C(0) : static_cast<C>(rows(run)[r] * found.inverse_y);
    C* out = a_.v + item.v_at + run.part * item.n;
    for (int64_t p = 0; p < item.n; ++p)
      out[item.w.order.empty() ? p : item.w.order[static_cast<size_t>(p)]] = static_cast<C>(v[p] * found.inverse_z);
    run.lanczos.finish();
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

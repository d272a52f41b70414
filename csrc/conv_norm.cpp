// Converged sigma_1 of conv operators: Lanczos, every product W'(W q) as in a step. All of them advance together; the
// units of those that are not done yet are shared by the threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>

#include "conv_step.h"
#include "lanczos.h"
#include "spectral_norm.h"
#include "threads.h"

namespace spectral {
namespace {

template <class C>
class ConvNorm {
 public:
  ConvNorm(ConvTable& table, ConvTable::Workspace<C>& space, const NormArguments<C>& arguments)
      : table_(table), a_(arguments), do_(table, space.elements.data(), arguments.weights), runs_(table.parts.size()) {}

  int64_t run() {
    std::vector<size_t> active(runs_.size());
    for (size_t i = 0; i < active.size(); ++i) active[i] = i;
    std::vector<const ConvUnit*> first, second;
    const auto each = [&](auto use) { return Phase{static_cast<int64_t>(active.size()), [&active, use](int64_t i) { use(active[static_cast<size_t>(i)]); }}; };
    run_phases({each([this](size_t term) { start(term); })}, a_.threads);
    for (;;) {
      active.erase(std::remove_if(active.begin(), active.end(), [this](size_t term) { return runs_[term].stage == LanczosStage::done; }), active.end());
      if (active.empty()) break;
      first.clear();
      second.clear();
      for (const size_t term : active) {
        for (int64_t i = table_.first_at[term]; i < table_.first_at[term + 1]; ++i) first.push_back(&table_.first[static_cast<size_t>(i)]);
        for (int64_t i = table_.second_at[term]; i < table_.second_at[term + 1]; ++i) second.push_back(&table_.second[static_cast<size_t>(i)]);
      }
      run_phases({each([this](size_t term) { load_wanted(term); }),
                  {static_cast<int64_t>(first.size()), [&](int64_t i) { do_.run(*first[static_cast<size_t>(i)], false); }},
                  each([this](size_t term) { load_product(term); }),
                  {static_cast<int64_t>(second.size()), [&](int64_t i) { do_.run(*second[static_cast<size_t>(i)], true); }},
                  each([this](size_t term) { advance(term); })},
                 a_.threads);
    }
    return std::count_if(runs_.begin(), runs_.end(), [](const Lanczos<C>& run) { return !run.converged; });
  }

 private:
  ConvTable& table_;
  const NormArguments<C>& a_;
  ConvParts<C> do_;
  std::vector<Lanczos<C>> runs_;

  const ConvItem& item_of(size_t term) const { return table_.items[static_cast<size_t>(table_.parts[term].first)]; }
  int64_t part_of(size_t term) const { return table_.parts[term].second; }
  static C power_of_two(int exponent) { return std::ldexp(C(1), exponent); }

  void start(size_t term) {
    const ConvItem& item = item_of(term);
    const int64_t n = item.shape.columns(), padded = (n + kConvLanes<C> - 1) / kConvLanes<C> * kConvLanes<C>;
    const double largest = do_.largest(item, part_of(term));
    runs_[term].start(n, padded);
    if (largest > 0 && table_.first_at[term] < table_.first_at[term + 1]) {
      // Here max|W| is 1 up to a power of two, so that no product leaves its range; or less, where a factor that
      // makes it 1 is none of C's.
      runs_[term].shifts = shifts_for<C>(std::ilogb(largest));
      runs_[term].shifts.y = std::min(runs_[term].shifts.y, std::numeric_limits<C>::max_exponent - 1);
      return;
    }
    const double value = std::isnan(largest) ? largest : 0.0;
    finish(term, {value, value, 0, 1}, runs_[term].wanted());
    runs_[term].converged = true;  // as far as this one can
  }

  void load_wanted(size_t term) {
    do_.load_input(item_of(term), part_of(term), runs_[term].wanted(), power_of_two(runs_[term].shifts.v));
  }
  void load_product(size_t term) {
    const ConvItem& item = item_of(term);
    do_.merge(item, part_of(term), false);
    do_.load_output(item, part_of(term), do_.output(item, part_of(term)), power_of_two(runs_[term].shifts.y));
  }

  void advance(size_t term) {
    const ConvItem& item = item_of(term);
    Lanczos<C>& run = runs_[term];
    do_.merge(item, part_of(term), true);
    C* z = do_.input(item, part_of(term));
    if (run.stage != LanczosStage::polish) {
      run.advance(z, a_.tolerance, a_.max_iterations);
      return;
    }
    const double y_norm = std::sqrt(sum_of_squares(do_.output(item, part_of(term)), item.shape.rows()));
    const Polished found = run.polish(z, y_norm, std::sqrt(sum_of_squares(z, item.shape.columns())));
    finish(term, found, found.inverse_y == 0 ? run.wanted() : z);
  }

  void finish(size_t term, const Polished& found, const C* v) {
    const ConvItem& item = item_of(term);
    const int64_t part = part_of(term), matrix = item.index + part, rows = item.shape.rows(), n = item.shape.columns();
    a_.sigma[matrix] = static_cast<C>(found.sigma);
    a_.bound[matrix] = static_cast<C>(found.bound);
    a_.exponents[matrix] = found.sigma > 0 ? std::ilogb(found.sigma) : 0;
    const C* y = do_.output(item, part);
    C* u = a_.u + item.u_at + part * rows;
    for (int64_t r = 0; r < rows; ++r) u[r] = found.inverse_y == 0 ? C(0) : static_cast<C>(y[r] * found.inverse_y);
    C* out = a_.v + item.v_at + part * n;
    for (int64_t j = 0; j < n; ++j) out[j] = static_cast<C>(v[j] * found.inverse_z);
    runs_[term].finish();
  }
};

}  // namespace

template <>
int64_t spectral_norm<float>(ConvTable& table, const NormArguments<float>& arguments) {
  const std::lock_guard<std::mutex> hold(table.lock);
  return ConvNorm<float>(table, table.f32, arguments).run();
}
template <>
int64_t spectral_norm<double>(ConvTable& table, const NormArguments<double>& arguments) {
  const std::lock_guard<std::mutex> hold(table.lock);
  return ConvNorm<double>(table, table.f64, arguments).run();
}

}  // namespace spectral

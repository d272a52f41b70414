// The penalty of all conv operators in one call. Phases, all threads waiting between them:
//   prepare   v where the first product reads it
//   first     y = W v, cut into units; whoever does a part's last unit takes its norm and puts u where the second reads it
//   second    z = W'u in the same way; the last one's sigma, next v, and coefficient of the gradient
//   gradient  grad += c times the correlation of u and v+
// Elements are summed by one unit in one order, so that the result is the same bits for any number of threads.
#include "conv_step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>

#include "penalty_terms.h"
#include "threads.h"

namespace spectral {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <class C>
class ConvStep {
 public:
  ConvStep(ConvTable& table, ConvTable::Workspace<C>& space, const StepArguments<C>& arguments)
      : table_(table), space_(space), a_(arguments), do_(table, space.elements.data(), arguments.weights) {}

  void run() {
    const auto count = [](const auto& list) { return static_cast<int64_t>(list.size()); };
    std::vector<Phase> phases{{count(table_.parts), [this](int64_t term) { prepare(term); }},
                              {count(table_.first), [this](int64_t i) { first(table_.first[static_cast<size_t>(i)]); }},
                              // backwards: the weights that were read last are still in the cache
                              {count(table_.second), [this](int64_t i) { second(table_.second[table_.second.size() - 1 - static_cast<size_t>(i)]); }}};
    if (a_.gradients != nullptr)
      phases.push_back({count(table_.gradient), [this](int64_t i) { add_gradient(table_.gradient[static_cast<size_t>(i)]); }});
    run_phases(phases, a_.threads);
    if (a_.value == nullptr) return;
    double sum = 0;
    for (size_t term = 0; term < table_.parts.size(); ++term) sum += item_of(term).scale * space_.terms[term];
    *a_.value = static_cast<C>(a_.strength * sum);
  }

 private:
  ConvTable& table_;
  ConvTable::Workspace<C>& space_;
  const StepArguments<C>& a_;
  ConvParts<C> do_;

  const ConvItem& item_of(size_t term) const { return table_.items[static_cast<size_t>(table_.parts[term].first)]; }
  const C* old_v(const ConvItem& item, int64_t part) const { return a_.v + item.v_at + part * item.shape.columns(); }
  C* new_v(const ConvItem& item, int64_t part) const { return a_.v_out + item.v_at + part * item.shape.columns(); }
  int64_t units(const std::vector<int64_t>& at, int64_t term) const { return at[static_cast<size_t>(term) + 1] - at[static_cast<size_t>(term)]; }

  void prepare(int64_t term) {
    const auto id = static_cast<size_t>(term);
    const ConvItem& item = item_of(id);
    const int64_t part = table_.parts[id].second, matrix = item.index + part;
    a_.exponents_out[matrix] = a_.exponents[matrix];
    space_.unfinished[id] = static_cast<int32_t>(units(table_.first_at, term));
    if (units(table_.first_at, term) == 0) {
      const bool counts = !item.shape.is_empty();  // else for nothing
      space_.coefficient[id] = counts && !std::isfinite(do_.largest(item, part)) ? kNaN : 0.0;
      const auto value = static_cast<C>(space_.coefficient[id]);
      if (a_.u != nullptr) std::fill_n(a_.u + item.u_at + part * item.shape.rows(), item.shape.rows(), value);
      if (counts) return give_up(item, part, id);  // no window meets the grid
      keep_v(item, part);
      a_.sigma[matrix] = C(0);
      space_.terms[id] = 0;
      return;
    }
    space_.shift[id] = shift_for(a_.exponents[matrix]);
    do_.load_input(item, part, old_v(item, part), power_of_two(space_.shift[id]));
  }

  // Sums and products are safe in the middle of the range; beyond it v and u are scaled to give elements of about one.
  static int shift_for(int exponent) {
    constexpr int kFree = sizeof(C) == 8 ? 400 : 40, kMost = sizeof(C) == 8 ? 900 : 110;
    return exponent >= -kFree && exponent <= kFree ? 0 : -std::clamp(exponent, -kMost, kMost);
  }
  static C power_of_two(int exponent) { return std::ldexp(C(1), exponent); }
  static bool in_range(double norm) {
    constexpr double kLeast = sizeof(C) == 8 ? 0x1p-800 : 0x1p-80;
    return norm > kLeast && norm < 1 / kLeast;
  }

  bool is_last(size_t term) { return --space_.unfinished[term] == 0; }

  void first(const ConvUnit& unit) {
    const ConvItem& item = table_.items[static_cast<size_t>(unit.item)];
    const auto term = static_cast<size_t>(item.term_at + unit.part);
    do_.run(unit, false);
    if (is_last(term)) take_u(item, unit.part, term);
  }

  void take_u(const ConvItem& item, int64_t part, size_t term) {
    do_.merge(item, part, false);
    C* y = do_.output(item, part);
    double norm = std::sqrt(sum_of_squares(y, item.shape.rows()));
    space_.unfinished[term] = static_cast<int32_t>(units(table_.second_at, static_cast<int64_t>(term)));
    space_.given_up[term] = false;
    if (!in_range(norm)) {
      const double largest = do_.largest(item, part);
      if (largest > 0) {
        // The exponent was out of date by more than the range allows: renewed from max|W|, and this product taken again.
        space_.shift[term] = shift_for(std::ilogb(largest));
        do_.load_input(item, part, old_v(item, part), power_of_two(space_.shift[term]));
        for (int64_t i = table_.first_at[term]; i < table_.first_at[term + 1]; ++i) do_.run(table_.first[static_cast<size_t>(i)], false);
        do_.merge(item, part, false);
        norm = std::sqrt(sum_of_squares(y, item.shape.rows()));
      }
      if (!(norm > 0) || !std::isfinite(norm) || !std::isfinite(largest)) {
        space_.coefficient[term] = std::isfinite(largest) ? 0.0 : kNaN;
        space_.given_up[term] = true;
        std::fill_n(y, item.shape.rows(), std::isfinite(largest) ? C(0) : static_cast<C>(kNaN));
      }
    }
    if (!space_.given_up[term]) {
      const double inverse = 1.0 / norm;
      for (int64_t i = 0; i < item.shape.rows(); ++i) y[i] = static_cast<C>(y[i] * inverse);
    }
    if (a_.u != nullptr) std::copy_n(y, item.shape.rows(), a_.u + item.u_at + part * item.shape.rows());
    do_.load_output(item, part, y, power_of_two(space_.shift[term]));
    if (space_.unfinished[term] == 0) give_up(item, part, term);  // no window meets the grid, so y = 0
  }

  void second(const ConvUnit& unit) {
    const ConvItem& item = table_.items[static_cast<size_t>(unit.item)];
    const auto term = static_cast<size_t>(item.term_at + unit.part);
    const bool given_up = space_.given_up[term];
    if (!given_up) do_.run(unit, true);
    if (is_last(term)) given_up ? give_up(item, unit.part, term) : take_v(item, unit.part, term);
  }

  void take_v(const ConvItem& item, int64_t part, size_t term) {
    do_.merge(item, part, true);
    C* z = do_.input(item, part);
    const int64_t n = item.shape.columns();
    const double norm = std::sqrt(sum_of_squares(z, n));
    if (!(norm > 0)) {
      space_.coefficient[term] = std::isnan(norm) ? kNaN : 0.0;
      if (a_.u != nullptr && norm == 0) std::fill_n(a_.u + item.u_at + part * item.shape.rows(), item.shape.rows(), C(0));
      give_up(item, part, term);
      return;
    }
    const double sigma = std::ldexp(norm, -space_.shift[term]), inverse = 1.0 / norm;
    C* v = new_v(item, part);
    for (int64_t j = 0; j < n; ++j) z[j] = v[j] = static_cast<C>(z[j] * inverse);
    const int64_t matrix = item.index + part;
    a_.sigma[matrix] = static_cast<C>(sigma);
    a_.exponents_out[matrix] = std::ilogb(sigma);
    space_.terms[term] = matrix_term(sigma, item.target, a_.exponent);
    const double slope = matrix_slope(sigma, item.target, a_.exponent);
    space_.coefficient[term] = a_.gradient_factor * item.scale * slope;
    if (a_.gradients == nullptr) return;
    // A transposed layer's u lies where the gradient reads it, times 2^shift.
    if (!item.shape.transposed)
      do_.load_fine(item, part, v, C(1));
    else if (space_.shift[term] != 0)
      do_.load_fine(item, part, do_.output(item, part), C(1));
  }

  // W v = 0, or an element of W is not finite: the coefficient says which.
  void give_up(const ConvItem& item, int64_t part, size_t term) {
    const double value = space_.coefficient[term];
    const int64_t matrix = item.index + part;
    a_.sigma[matrix] = static_cast<C>(value);
    if (std::isnan(value)) {
      keep_v(item, part);
    } else {
      std::vector<C> other(static_cast<size_t>(item.shape.columns()));
      another_unit_vector(old_v(item, part), item.shape.columns(), other.data());
      std::copy(other.begin(), other.end(), new_v(item, part));
    }
    space_.terms[term] = std::isnan(value) ? kNaN : matrix_term(0.0, item.target, a_.exponent);
  }

  void keep_v(const ConvItem& item, int64_t part) {
    if (new_v(item, part) != old_v(item, part)) std::copy_n(old_v(item, part), item.shape.columns(), new_v(item, part));
  }

  void add_gradient(const ConvUnit& unit) {
    const ConvItem& item = table_.items[static_cast<size_t>(unit.item)];
    void* gradient = a_.gradients[unit.item];
    const double coefficient = space_.coefficient[static_cast<size_t>(item.term_at + unit.part)];
    if (gradient == nullptr || coefficient == 0) return;
    do_.add_gradient(unit, do_.coarse(item, unit.part), gradient, coefficient, false);
  }
};

template <class C>
ConvTable::Workspace<C>& workspace(ConvTable& table) {
  if constexpr (sizeof(C) == 8)
    return table.f64;
  else
    return table.f32;
}

}  // namespace

template <class C>
void step(ConvTable& table, const StepArguments<C>& arguments) {
  const std::lock_guard<std::mutex> hold(table.lock);
  ConvStep<C>(table, workspace<C>(table), arguments).run();
}

template <class C>
void backward(ConvTable& table, const BackwardArguments<C>& a) {
  const std::lock_guard<std::mutex> hold(table.lock);
  const ConvParts<C> parts(table, workspace<C>(table).elements.data(), a.weights);
  const auto prepare = [&](int64_t term) {
    const auto& [i, part] = table.parts[static_cast<size_t>(term)];
    const ConvItem& item = table.items[static_cast<size_t>(i)];
    const C* u = a.u + item.u_at + part * item.shape.rows();
    const C* v = a.v + item.v_at + part * item.shape.columns();
    parts.load_fine(item, part, item.shape.transposed ? u : v, C(1));
  };
  const auto add = [&](int64_t i) {
    const ConvUnit& unit = table.gradient[static_cast<size_t>(i)];
    const ConvItem& item = table.items[static_cast<size_t>(unit.item)];
    void* gradient = a.gradients[unit.item];
    if (gradient == nullptr) return;
    const double sigma = a.sigma[item.index + unit.part];
    const double slope = sigma == 0 ? 0.0 : matrix_slope(sigma, item.target, a.exponent);
    const C* u = a.u + item.u_at + unit.part * item.shape.rows();
    const C* v = a.v + item.v_at + unit.part * item.shape.columns();
    parts.add_gradient(unit, item.shape.transposed ? v : u, gradient, a.upstream * item.scale * slope, !a.accumulate);
  };
  run_phases({{static_cast<int64_t>(table.parts.size()), prepare}, {static_cast<int64_t>(table.gradient.size()), add}}, a.threads);
}

template void step<float>(ConvTable&, const StepArguments<float>&);
template void step<double>(ConvTable&, const StepArguments<double>&);
template void backward<float>(ConvTable&, const BackwardArguments<float>&);
template void backward<double>(ConvTable&, const BackwardArguments<double>&);

}  // namespace spectral

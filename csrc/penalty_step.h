// The step of a table of layers, shared by the penalty (spectral_penalty.cpp) and the optimizer (adamw.cpp), which changes a
// strip before it reads it. Phases, all threads waiting between them:
//   read      every strip of rows of every matrix, once: y = W v and this strip's part of z = W'y; vector parameters whole.
//             Whoever reads the last strip of a matrix combines it: z summed over strips in their order, sigma, u, the
//             next v, the coefficient of the gradient
//   combine   the same for matrices with so many columns that it is worth several threads
//   gradient  strips again: grad += c u v'
// What a task computes depends on its number alone and sums are taken in a fixed order, so the result is the same bits for
// any number of threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "penalty_terms.h"
#include "step.h"
#include "threads.h"

namespace spectral {

// Not finite weights: what is recorded of them.
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <class C>
std::vector<C>& step_scratch() {
  thread_local std::vector<C> buffer;
  return buffer;
}

template <class C>
class Step {
 public:
  Step(Table& table, Table::Workspace<C>& space, const StepArguments<C>& arguments)
      : table_(table), space_(space), a_(arguments) {}
  virtual ~Step() = default;

  void run() {
    bool prepare = table_.any_reordered;
    for (const Item& item : table_.items) {
      if (item.kind != Kind::matrix) continue;
      for (int64_t part = 0; part < item.parts; ++part) {
        const Shifts shifts = shifts_for<C>(a_.exponents[item.index + part]);
        space_.shift_v[at(item, part)] = shifts.v;
        space_.shift_y[at(item, part)] = shifts.y;
        space_.unread[at(item, part)].store(static_cast<int32_t>(item.tiles), std::memory_order_relaxed);
        prepare = prepare || shifts.v != 0;
      }
    }
    const auto &combine = table_.combine_tiles, &wide = table_.wide_tiles;
    std::vector<Phase> phases;
    if (prepare) phases.push_back(over(combine, [this](const Tile& t) { prepare_vectors(t); }));
    const Shares* shares = &table_.read_shares(a_.threads);
    phases.push_back(over(table_.read_tiles, [this](const Tile& t) { read(t); }, shares));
    // What nobody reads a strip of, and wide matrices, whose norm is known only when all blocks of columns are done.
    if (!table_.unread_tiles.empty()) phases.push_back(over(table_.unread_tiles, [this](const Tile& t) { finish(t); }));
    if (!wide.empty()) {
      phases.push_back(over(wide, [this](const Tile& t) { combine_columns(t); }));
      phases.push_back(over(wide, [this](const Tile& t) { finish(t); }));
    }
    if (a_.gradients != nullptr) phases.push_back(over(table_.read_tiles, [this](const Tile& t) { add_gradient(t); }, shares));
    run_phases(phases, a_.threads);
    if (a_.value != nullptr) {
      double value = 0;
      for (size_t i = 0; i < table_.items.size(); ++i) {
        const Item& item = table_.items[i];
        if (item.kind == Kind::plain) continue;  // without a term
        for (int64_t part = 0; part < item.parts; ++part) value += strength_of(i) * item.scale * space_.terms[at(item, part)];
      }
      *a_.value = static_cast<C>(value);
    }
  }

 protected:
  Table& table_;
  Table::Workspace<C>& space_;
  const StepArguments<C>& a_;

  static size_t at(const Item& item, int64_t part) { return static_cast<size_t>(item.term_at + part); }

  template <class F>
  Phase over(const std::vector<Tile>& tiles, F task, const Shares* shares = nullptr) {
    return {static_cast<int64_t>(tiles.size()), [&tiles, task](int64_t i) { task(tiles[static_cast<size_t>(i)]); }, shares};
  }

  const char* weight(const Tile& tile, const Item& item, int64_t part) const {
    return part_address(a_.weights[tile.item], item.w, part);
  }
  const C* old_v(const Item& item, int64_t part) const { return a_.v + item.v_at + part * item.n; }
  C* prepared(const Item& item, int64_t part) { return space_.prepared.data() + item.prepared_at + part * item.padded; }
  C* columns(const Item& item, int64_t part) { return space_.columns.data() + item.column_at + part * item.padded; }
  C* rows(const Item& item, int64_t part) { return space_.y.data() + item.y_at + part * item.rows; }

  bool needs_preparing(const Item& item, int64_t part) const {
    return !item.w.order.empty() || space_.shift_v[at(item, part)] != 0;
  }

  void prepare_part(const Item& item, int64_t part) {
    const C* v = old_v(item, part);
    C* out = prepared(item, part);
    const int shift = space_.shift_v[at(item, part)];
    for (int64_t j = 0; j < item.n; ++j) {
      const C x = v[item.w.order.empty() ? j : item.w.order[static_cast<size_t>(j)]];
      out[j] = shift == 0 ? x : std::ldexp(x, shift);
    }
  }

  void prepare_vectors(const Tile& tile) {
    const Item& item = table_.items[static_cast<size_t>(tile.item)];
    if (tile.strip > 0) return;  // further column blocks of the same parts
    for (int64_t part = tile.part_begin; part < tile.part_end; ++part)
      if (needs_preparing(item, part)) prepare_part(item, part);
  }

  virtual double strength_of(size_t) const { return a_.strength; }

  // y and z of one strip. v as the rows lie in memory, scaled.
  virtual void read_strip(const Tile& tile, const Item& item, int64_t part, const C* v, C* z) {
    read_part_rows(item, weight(tile, item, part), tile.row_begin, tile.row_end, v, space_.shift_y[at(item, part)],
                   rows(item, part) + tile.row_begin, z, false);
  }

  void read(const Tile& tile) {
    const Item& item = table_.items[static_cast<size_t>(tile.item)];
    if (item.kind != Kind::matrix) {
      read_vector(tile, item);
      return;
    }
    for (int64_t part = tile.part_begin; part < tile.part_end; ++part) {
      const C* v = needs_preparing(item, part) ? prepared(item, part) : old_v(item, part);
      C* z = space_.partial.data() + item.partial_at + (part * item.tiles + tile.strip) * item.padded;
      read_strip(tile, item, part, v, z);
      // Acquire: the last one reads what the others have written. Release: so that it can.
      if (item.n > Table::kColumnBlock || space_.unread[at(item, part)].fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
      space_.squares[at(item, part)] = combine_part(item, part, 0, item.n);
      finish_part(tile, item, part);
    }
  }

  void combine_columns(const Tile& tile) {
    const Item& item = table_.items[static_cast<size_t>(tile.item)];
    const int64_t begin = tile.strip * Table::kColumnBlock, end = std::min(item.n, begin + Table::kColumnBlock);
    for (int64_t part = tile.part_begin; part < tile.part_end; ++part) combine_part(item, part, begin, end);
  }

  double combine_part(const Item& item, int64_t part, int64_t begin, int64_t end) {
    const C* partial = space_.partial.data() + item.partial_at + part * item.tiles * item.padded + begin;
    const auto stride = static_cast<size_t>(item.padded), count = static_cast<size_t>(item.tiles);
    const auto n = static_cast<size_t>(end - begin);
    C* out = columns(item, part) + begin;
    if constexpr (sizeof(C) == 8)
      return kernels().combine_f64(partial, stride, count, n, out);
    else
      return kernels().combine_f32(partial, stride, count, n, out);
  }

  void finish(const Tile& tile) {
    const Item& item = table_.items[static_cast<size_t>(tile.item)];
    if (tile.strip > 0) return;
    for (int64_t part = tile.part_begin; part < tile.part_end; ++part) finish_part(tile, item, part);
  }

  void finish_part(const Tile& tile, const Item& item, int64_t part) {
    const size_t id = at(item, part);
    const int64_t matrix = item.index + part;
    C* v_out = a_.v_out + item.v_at + part * item.n;
    a_.exponents_out[matrix] = a_.exponents[matrix];
    if (item.rows == 0 || item.n == 0) {
      keep_v(item, part);
      a_.sigma[matrix] = 0;
      if (a_.u != nullptr) std::fill_n(a_.u + item.u_at + part * item.rows, item.rows, C(0));
      space_.terms[id] = 0;
      return;
    }
    const auto norm_of_z = [&] {
      return std::sqrt(item.n > Table::kColumnBlock ? sum_of_squares(columns(item, part), item.n) : space_.squares[id]);
    };
    double y_norm = std::sqrt(sum_of_squares(rows(item, part), item.rows));
    double z_norm = norm_of_z();
    if (!in_range(y_norm, z_norm)) {
      const double largest = part_max_abs<C>(item, weight(tile, item, part), 0, item.rows);
      if (!std::isfinite(largest)) {
        keep_v(item, part);
        record(item, part, kNaN, kNaN, kNaN);
        return;
      }
      if (largest > 0) {
        read_again(tile, item, part, largest);
        y_norm = std::sqrt(sum_of_squares(rows(item, part), item.rows));
        z_norm = norm_of_z();
      }
      if (largest == 0 || y_norm == 0 || z_norm == 0) {
        another_unit_vector(old_v(item, part), item.n, scratch_vector(item.n));
        std::copy_n(scratch_vector(item.n), item.n, v_out);
        record(item, part, 0.0, 0.0, 0.0);
        return;
      }
    }
    const double sigma = std::ldexp(z_norm / y_norm, -space_.shift_y[id]);
    const double inverse = 1.0 / z_norm;
    const C* z = columns(item, part);
    if (item.w.order.empty())
      for (int64_t j = 0; j < item.n; ++j) v_out[j] = static_cast<C>(z[j] * inverse);
    else
      for (int64_t p = 0; p < item.n; ++p) v_out[item.w.order[static_cast<size_t>(p)]] = static_cast<C>(z[p] * inverse);
    record(item, part, sigma, matrix_slope(sigma, item.target, a_.exponent), 1.0 / y_norm);
    a_.exponents_out[matrix] = std::ilogb(sigma);
  }

  static bool in_range(double y_norm, double z_norm) {
    // Below kLeast an element that still matters to 2^-24 of a norm (2^-53 for double) would be subnormal; above kMost
    // sums of strips, in float, may overflow though the norm, in double, does not.
    constexpr double kLeast = sizeof(C) == 8 ? 0x1p-400 : 0x1p-80;
    constexpr double kMost = sizeof(C) == 8 ? std::numeric_limits<double>::infinity() : 0x1p120;
    return y_norm > kLeast && z_norm > kLeast && y_norm < kMost && z_norm < kMost;  // false for NaN
  }

  C* scratch_vector(int64_t n) {
    std::vector<C>& buffer = step_scratch<C>();
    if (buffer.size() < static_cast<size_t>(n)) buffer.resize(static_cast<size_t>(n));
    return buffer.data();
  }

  void keep_v(const Item& item, int64_t part) {
    C* v_out = a_.v_out + item.v_at + part * item.n;
    if (v_out != old_v(item, part)) std::copy_n(old_v(item, part), item.n, v_out);
  }

  // The exponent was out of date by more than the range allows: renewed from max|W|, and this part read once more.
  void read_again(const Tile& tile, const Item& item, int64_t part, double largest) {
    const size_t id = at(item, part);
    const int exponent = std::ilogb(largest) + (std::ilogb(static_cast<double>(item.rows)) + std::ilogb(static_cast<double>(item.n))) / 4;
    const Shifts shifts = shifts_for<C>(exponent);
    space_.shift_v[id] = shifts.v;
    space_.shift_y[id] = shifts.y;
    const C* v = old_v(item, part);
    if (needs_preparing(item, part)) {
      prepare_part(item, part);
      v = prepared(item, part);
    }
    for (int64_t strip = 0; strip < item.tiles; ++strip) {
      const int64_t begin = strip * item.tile_rows, end = std::min(item.rows, begin + item.tile_rows);
      read_part_rows(item, weight(tile, item, part), begin, end, v, shifts.y, rows(item, part) + begin,
                     space_.partial.data() + item.partial_at + (part * item.tiles + strip) * item.padded, false);
    }
    space_.squares[id] = combine_part(item, part, 0, item.n);
  }

  void record(const Item& item, int64_t part, double sigma, double slope, double inverse_y) {
    const size_t id = at(item, part);
    a_.sigma[item.index + part] = static_cast<C>(sigma);
    space_.terms[id] = matrix_term(sigma, item.target, a_.exponent);
    // The gradient's rows are coefficient * y_r: u is never formed unless asked for.
    space_.coefficient[id] = sigma == 0 ? 0.0 : a_.gradient_factor * item.scale * slope * inverse_y;
    if (a_.u == nullptr) return;
    const C* y = rows(item, part);
    C* u = a_.u + item.u_at + part * item.rows;
    for (int64_t r = 0; r < item.rows; ++r) u[r] = sigma == 0 ? C(0) : static_cast<C>(y[r] * inverse_y);
  }

  void add_gradient(const Tile& tile) {
    const Item& item = table_.items[static_cast<size_t>(tile.item)];
    void* gradient = a_.gradients[tile.item];
    if (item.kind != Kind::matrix || gradient == nullptr) return;
    for (int64_t part = tile.part_begin; part < tile.part_end; ++part) {
      const double coefficient = space_.coefficient[at(item, part)];
      if (coefficient == 0) continue;
      add_outer(item, part, gradient, tile.row_begin, tile.row_end, coefficient, rows(item, part),
                a_.v_out + item.v_at + part * item.n, false);
    }
  }

  // Vector parameters: value and gradient in one task.
  virtual void read_vector(const Tile& tile, const Item& item) {
    const bool add = a_.gradients != nullptr && a_.gradients[tile.item] != nullptr;
    for (int64_t part = tile.part_begin; part < tile.part_end; ++part)
      space_.terms[at(item, part)] = vector_term(item, part, a_.weights[tile.item], a_.exponent,
                                                 add ? a_.gradients[tile.item] : nullptr, a_.gradient_factor, false);
  }

 public:
  static int64_t element(const View& view, int64_t part, int64_t j) {
    return part * view.part_stride + (view.dense ? j : view.offset[static_cast<size_t>(j)]);
  }

  // The derivative of its vector's term by the element x; squares: the sum of them all, of a bias.
  static double vector_slope(const Item& item, double x, double squares, double k) {
    if (item.kind == Kind::bias) return 2.0 * k * power(squares, k - 1.0) * x;
    if (item.kind == Kind::shift) return 2.0 * k * power(x * x, k - 1.0) * x;
    const double size = std::fabs(x);
    return x == 0 ? 0.0 : 2.0 * k * (power(size, k) - power(item.target, k)) * power(size, k - 1.0) * std::copysign(1.0, x);
  }

  // The term of one vector; where a gradient is given, upstream * its derivative is added (or stored: overwrite).
  static double vector_term(const Item& item, int64_t part, const void* w, double k, void* gradient, double upstream, bool overwrite) {
    const auto load = row_kernels<C>(item.w.dtype).load;
    const auto position = [part](const View& view, int64_t j) { return element(view, part, j); };
    double squares = 0, term = 0;
    if (item.kind == Kind::bias) {
      for (int64_t j = 0; j < item.n; ++j) squares += square(load(w, position(item.w, j)));
      term = power(squares, k);
    }
    for (int64_t j = 0; j < item.n; ++j) {
      const double x = load(w, position(item.w, j));
      if (item.kind == Kind::shift)
        term += power(x * x, k);
      else if (item.kind == Kind::scale)
        term += square(power(std::fabs(x), k) - power(item.target, k));
      if (gradient == nullptr) continue;
      const RowKernels<C>& kernels = row_kernels<C>(item.g.dtype);
      const int64_t place = position(item.g, j);
      const double added = upstream * item.scale * vector_slope(item, x, squares, k);
      kernels.store(gradient, place, overwrite ? added : kernels.load(gradient, place) + added);
    }
    return term;
  }

  // gradient[part][begin:end] (+)= coefficient * left v'
  static void add_outer(const Item& item, int64_t part, void* gradient, int64_t begin, int64_t end, double coefficient,
                        const C* left, const C* v, bool overwrite) {
    const RowKernels<C>& kernels = row_kernels<C>(item.g.dtype);
    std::vector<C>& buffer = step_scratch<C>();
    const auto count = static_cast<size_t>(end - begin);
    const size_t reordered = item.g.order.size();
    if (buffer.size() < count + reordered) buffer.resize(count + reordered);
    C* a = buffer.data();
    for (int64_t r = begin; r < end; ++r) a[r - begin] = static_cast<C>(coefficient * static_cast<double>(left[r]));
    if (reordered > 0) {
      C* in_order = buffer.data() + count;
      for (size_t p = 0; p < reordered; ++p) in_order[p] = v[item.g.order[p]];
      v = in_order;
    }
    char* rows = const_cast<char*>(part_address(gradient, item.g, part)) +
                 begin * item.g.row_stride * static_cast<int64_t>(element_size(item.g.dtype));
    const auto n = static_cast<size_t>(item.n);
    if (item.g.dense)
      kernels.rank_one(rows, item.g.row_stride, count, n, a, v, overwrite);
    else
      kernels.rank_one_strided(rows, item.g.row_stride, count, n, item.g.offset.data(), a, v, overwrite);
  }
};

template <class C>
Table::Workspace<C>& workspace(Table& table) {
  if constexpr (sizeof(C) == 8)
    return table.f64;
  else
    return table.f32;
}

}  // namespace spectral

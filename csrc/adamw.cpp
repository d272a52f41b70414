#include "adamw.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "penalty_step.h"
#include "unit_vector.h"

namespace spectral {
namespace {

// Rows whose columns lie apart are packed to be read, and read in eights.
constexpr int64_t kPackedTogether = 8;
// Elements of a vector parameter whose slopes are taken at a time.
constexpr int64_t kSlopes = 1024;

// Calls use(j, place, count) for the columns of a row, in runs that lie side by side.
template <class Use>
void for_runs(const View& view, int64_t begin, int64_t end, Use use) {
  if (view.dense) {
    use(begin, begin, end - begin);
    return;
  }
  const int64_t* offset = view.offset.data();
  for (int64_t j = begin; j < end;) {
    int64_t next = j + 1;
    while (next < end && offset[next] == offset[j] + (next - j)) ++next;
    use(j, offset[j], next - j);
    j = next;
  }
}

template <class C>
class AdamWStep final : public Step<C> {
 public:
  AdamWStep(Table& table, Table::Workspace<C>& space, const StepArguments<C>& step, const AdamWArguments<C>& arguments)
      : Step<C>(table, space, step), o_(arguments), factors_(table.items.size()) {
    const std::vector<Item>& items = table.items;
    for (size_t i = 0; i < items.size(); ++i) {
      if (!updated(i)) continue;
      const AdamWHyper& h = hyper(i);
      const double t = count_step(i);
      AdamWFactors<C>& f = factors_[i];
      f.gradient_scale = static_cast<C>((o_.maximize ? -1.0 : 1.0) / o_.grad_scale);
      f.decay = static_cast<C>(1.0 - h.lr * h.weight_decay);
      f.lr = static_cast<C>(h.lr);
      f.beta1_rest = static_cast<C>(1.0 - h.beta1);
      f.beta2 = static_cast<C>(h.beta2);
      f.beta2_rest = static_cast<C>(1.0 - h.beta2);
      f.inverse_sqrt_bias2 = static_cast<C>(1.0 / std::sqrt(1.0 - std::pow(h.beta2, t)));
      f.eps = static_cast<C>(h.eps);
      f.step_size = static_cast<C>(h.lr / (1.0 - std::pow(h.beta1, t)));
      f.decoupled = o_.decoupled;
      f.stochastic = o_.stochastic && items[i].w.dtype == DType::bf16 && master(i) == nullptr;
      f.key = mix(mix(o_.seed + static_cast<uint32_t>(i)) + static_cast<uint32_t>(static_cast<int64_t>(t)));
      // The slopes of sigma as it is now: the first matrix that is finished replaces its own.
      if (items[i].kind != Kind::matrix) continue;
      for (int64_t part = 0; part < items[i].parts; ++part) {
        const double sigma = o_.sigma[items[i].index + part];
        this->space_.coefficient[this->at(items[i], part)] =
            sigma == 0 ? 0.0 : h.strength * items[i].scale * matrix_slope(sigma, items[i].target, o_.exponent);
      }
    }
  }

 protected:
  double strength_of(size_t i) const override { return hyper(i).strength; }

  void read_strip(const Tile& tile, const Item& item, int64_t part, const C* v, C* z) override {
    const double c = this->space_.coefficient[this->at(item, part)];
    const C* u = o_.u + item.u_at + part * item.rows;
    const int shift = this->space_.shift_y[this->at(item, part)];
    const char* w = this->weight(tile, item, part);
    C* y = this->rows(item, part);
    const int64_t at = part * item.w.part_stride, begin = tile.row_begin, end = tile.row_end;
    // The strip's c u, and v as the rows lie in memory.
    std::vector<C>& buffer = step_scratch<C>();
    const size_t reordered = item.w.order.size(), count = static_cast<size_t>(end - begin);
    if (buffer.size() < count + reordered) buffer.resize(count + reordered);
    C* left = buffer.data();
    for (int64_t r = begin; r < end; ++r) left[r - begin] = static_cast<C>(c * static_cast<double>(u[r]));
    const C* x = this->old_v(item, part);
    if (reordered > 0) {
      C* in_order = left + count;
      for (size_t p = 0; p < reordered; ++p) in_order[p] = x[item.w.order[p]];
      x = in_order;
    }
    if (!item.w.dense && item.w.row_stride == 1) {  // transposed: columns take the part of rows
      for (int64_t j = 0; j < item.n; ++j) update(tile.item, at + begin + item.w.offset[static_cast<size_t>(j)], end - begin, x[j], left);
      read_part_rows(item, w, begin, end, v, shift, y + begin, z, false);
      return;
    }
    if (!item.w.dense) {
      for (int64_t row = begin; row < end; row += kPackedTogether) {
        const int64_t last = std::min(end, row + kPackedTogether);
        for (int64_t r = row; r < last; ++r)
          for_runs(item.w, 0, item.n, [&](int64_t j, int64_t place, int64_t length) {
            update(tile.item, at + r * item.w.row_stride + place, length, left[r - begin], x + j);
          });
        read_part_rows(item, w, row, last, v, shift, y + row, z, row > begin);
      }
      return;
    }
    const auto row_bytes = item.w.row_stride * static_cast<int64_t>(element_size(item.w.dtype));
    AdamWRead<C> read{v, {nullptr, nullptr}, {}, z, true};
    int waiting = 0;  // rows that are not in z yet
    for (int64_t r = begin; r < end; ++r) {
      AdamWRead<C> now = read;
      if (waiting < 2) now.before[0] = now.before[1] = nullptr;
      y[r] = update(tile.item, at + r * item.w.row_stride, item.n, left[r - begin], x, now);
      if (waiting == 2) read.overwrite = false, waiting = 0;
      read.before[waiting] = w + r * row_bytes;
      read.y_before[waiting++] = shift == 0 ? y[r] : static_cast<C>(std::ldexp(static_cast<double>(y[r]), shift));
    }
    for (int i = 0; i < waiting; ++i) {
      row_kernels<C>(item.w.dtype).add_row(read.before[i], static_cast<size_t>(item.n), read.y_before[i], z, !read.overwrite);
      read.overwrite = false;
    }
  }

  void read_vector(const Tile& tile, const Item& item) override {
    if (item.kind == Kind::plain) {
      if (!updated(static_cast<size_t>(tile.item))) return;
      for_runs(item.w, tile.row_begin, tile.row_end, [&](int64_t, int64_t place, int64_t length) { update(tile.item, place, length, C(0), nullptr); });
      return;
    }
    const double strength = strength_of(static_cast<size_t>(tile.item)) * item.scale;
    const void* w = o_.weights[tile.item];
    const auto load = row_kernels<C>(item.w.dtype).load;
    C slopes[kSlopes];
    for (int64_t part = tile.part_begin; part < tile.part_end; ++part) {
      const auto value = [&](int64_t j) { return load(w, this->element(item.w, part, j)); };
      double squares = 0;
      if (item.kind == Kind::bias)
        for (int64_t j = 0; j < item.n; ++j) squares += square(value(j));
      for (int64_t begin = 0; begin < item.n; begin += kSlopes) {
        const int64_t end = std::min(item.n, begin + kSlopes);
        for (int64_t j = begin; j < end; ++j) slopes[j - begin] = static_cast<C>(strength * this->vector_slope(item, value(j), squares, o_.exponent));
        for_runs(item.w, begin, end, [&](int64_t j, int64_t place, int64_t length) {
          update(tile.item, part * item.w.part_stride + place, length, C(1), slopes + (j - begin));
        });
      }
      this->space_.terms[this->at(item, part)] = this->vector_term(item, part, w, o_.exponent, nullptr, 0.0, false);
    }
  }

 private:
  const AdamWArguments<C>& o_;
  std::vector<AdamWFactors<C>> factors_;

  const AdamWHyper& hyper(size_t i) const { return o_.hyper[o_.group_of[i]]; }
  C* master(size_t i) const { return o_.masters == nullptr ? nullptr : static_cast<C*>(o_.masters[i]); }
  bool updated(size_t i) const { return this->table_.items[i].kind != Kind::plain || o_.gradients[i] != nullptr; }

  double count_step(size_t i) const {
    if (o_.step_is_double[i]) return ++*static_cast<double*>(o_.steps[i]);
    return ++*static_cast<float*>(o_.steps[i]);
  }

  // `count` elements of the item from `place` on.
  C update(int32_t id, int64_t place, int64_t count, C a, const C* x, const AdamWRead<C>& read = {}) const {
    const auto i = static_cast<size_t>(id);
    const Item& item = this->table_.items[i];
    const auto moved = [place](C* p) { return p == nullptr ? p : p + place; };
    const auto bytes = [place](DType dtype) { return place * static_cast<int64_t>(element_size(dtype)); };
    AdamWRun<C> run;
    run.w = static_cast<char*>(o_.weights[i]) + bytes(item.w.dtype);
    run.g = o_.gradients[i] == nullptr ? nullptr : static_cast<const char*>(o_.gradients[i]) + bytes(item.g.dtype);
    run.exp_avg = moved(static_cast<C*>(o_.exp_avgs[i]));
    run.exp_avg_sq = moved(static_cast<C*>(o_.exp_avg_sqs[i]));
    run.max_exp_avg_sq = o_.max_exp_avg_sqs == nullptr ? nullptr : moved(static_cast<C*>(o_.max_exp_avg_sqs[i]));
    run.master = moved(master(i));
    return kernel(item)(run, static_cast<size_t>(count), a, x, read, factors_[i], static_cast<uint32_t>(place));
  }

  static AdamWUpdate<C> kernel(const Item& item) {
    if constexpr (sizeof(C) == 8)
      return kernels().adamw().f64;
    else
      return kernels().adamw().f32[static_cast<int>(item.w.dtype)][static_cast<int>(item.g.dtype)];
  }
};

}  // namespace

template <class C>
void adamw_step(Table& table, const AdamWArguments<C>& o) {
  StepArguments<C> a{};
  a.weights = const_cast<const void* const*>(o.weights);
  a.v = a.v_out = o.v;
  a.exponents = a.exponents_out = o.exponents;
  a.sigma = o.sigma;
  a.u = o.u;
  a.value = o.value;
  a.exponent = o.exponent;
  a.threads = o.threads;
  const std::lock_guard<std::mutex> hold(table.lock);
  AdamWStep<C>(table, workspace<C>(table), a, o).run();
}

template void adamw_step<float>(Table&, const AdamWArguments<float>&);
template void adamw_step<double>(Table&, const AdamWArguments<double>&);

}  // namespace spectral

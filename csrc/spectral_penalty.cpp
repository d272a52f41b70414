// The penalty of all layers in one call, and its gradient alone.
#include <mutex>

#include "penalty_step.h"

namespace spectral {

template <class C>
void step(Table& table, const StepArguments<C>& arguments) {
  const std::lock_guard<std::mutex> hold(table.lock);
  Step<C>(table, workspace<C>(table), arguments).run();
}

template <class C>
void backward(Table& table, const BackwardArguments<C>& a) {
  const auto task = [&](int64_t i) {
    const Tile& tile = table.read_tiles[static_cast<size_t>(i)];
    const Item& item = table.items[static_cast<size_t>(tile.item)];
    void* gradient = a.gradients[tile.item];
    if (gradient == nullptr) return;
    for (int64_t part = tile.part_begin; part < tile.part_end; ++part) {
      if (item.kind != Kind::matrix) {
        Step<C>::vector_term(item, part, a.weights[tile.item], a.exponent, gradient, a.upstream, !a.accumulate);
        continue;
      }
      const double sigma = a.sigma[item.index + part];
      const double slope = sigma == 0 ? 0.0 : matrix_slope(sigma, item.target, a.exponent);
      Step<C>::add_outer(item, part, gradient, tile.row_begin, tile.row_end, a.upstream * item.scale * slope,
                         a.u + item.u_at + part * item.rows, a.v + item.v_at + part * item.n, !a.accumulate);
    }
  };
  run_phases({{static_cast<int64_t>(table.read_tiles.size()), task}}, a.threads);
}

template void step<float>(Table&, const StepArguments<float>&);
template void step<double>(Table&, const StepArguments<double>&);
template void backward<float>(Table&, const BackwardArguments<float>&);
template void backward<double>(Table&, const BackwardArguments<double>&);

}  // namespace spectral

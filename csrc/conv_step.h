// One warm step of the penalty over a table of conv operators, and its gradient. Formulas: docs/design.md, section 2.
#pragma once
#include "conv_table.h"
#include "step.h"

namespace spectral {

template <class C>
void step(ConvTable& table, const StepArguments<C>& arguments);
template <class C>
void backward(ConvTable& table, const BackwardArguments<C>& arguments);

// One table and the addresses of one call; what one part's products are made of. `elements` is the workspace.
template <class C>
class ConvParts {
 public:
  ConvParts(const ConvTable& table, C* elements, const void* const* weights) : table_(table), elements_(elements), weights_(weights) {}

  C* coarse(const ConvItem& item, int64_t part) const { return elements_ + item.coarse_at + part * item.coarse_part; }
  C* fine(const ConvItem& item, int64_t part) const { return elements_ + item.fine_at + part * item.fine_part; }
  // What W v reads, and where W v and W'u are left: dense, channel by channel.
  C* output(const ConvItem& item, int64_t part) const { return item.shape.transposed ? fine(item, part) : coarse(item, part); }
  C* input(const ConvItem& item, int64_t part) const { return item.shape.transposed ? coarse(item, part) : fine(item, part); }

  // A dense vector, times a factor, where the products read it.
  void load_fine(const ConvItem& item, int64_t part, const C* x, C factor) const;
  void load_coarse(const ConvItem& item, int64_t part, const C* x, C factor) const;
  void load_input(const ConvItem& item, int64_t part, const C* x, C factor) const {
    item.shape.transposed ? load_coarse(item, part, x, factor) : load_fine(item, part, x, factor);
  }
  void load_output(const ConvItem& item, int64_t part, const C* x, C factor) const {
    item.shape.transposed ? load_fine(item, part, x, factor) : load_coarse(item, part, x, factor);
  }
  // A unit of a product; then, once all units of a part are done, its result made dense (`merge`).
  void run(const ConvUnit& unit, bool second) const;
  void merge(const ConvItem& item, int64_t part, bool second) const;
  // gradient (+)= factor * correlation of `coarse_side`, dense, and what load_fine left.
  void add_gradient(const ConvUnit& unit, const C* coarse_side, void* gradient, double factor, bool overwrite) const;
  double largest(const ConvItem& item, int64_t part) const;  // max |w|; NaN where any element is not finite

 private:
  const char* weight(int32_t item, int64_t part) const;

  const ConvTable& table_;
  C* elements_;
  const void* const* weights_;
};

inline const ConvKernels<float>& conv_kernels(float) { return kernels().conv().f32; }
inline const ConvKernels<double>& conv_kernels(double) { return kernels().conv().f64; }

}  // namespace spectral

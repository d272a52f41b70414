// What a block does in each of the three launches of a step, on the pieces of conv_block_units.h:
//   first     y = W v; the last unit of a part takes |y|
//   second    z = W'u, u = y / |y|; the last unit of a part takes sigma and the coefficient of its gradient, the last of
//             all the value
//   gradient  grad += c times the correlation of u and v+; v+ and u are written
// Sums are taken in an order that depends on the table alone, so that the result is the same bits at every launch.
#pragma once
#include "conv_block_units.h"

namespace spectral {

// As csrc/conv_step.cpp has them.
SPECTRAL_BLOCK int block_shift(int exponent) {
  if (exponent >= -40 && exponent <= 40) return 0;
  return exponent > 110 ? -110 : exponent < -110 ? 110 : -exponent;
}
SPECTRAL_BLOCK bool block_in_range(double norm) { return norm > 0x1p-80 && norm < 0x1p80; }
SPECTRAL_BLOCK double block_nan() { return static_cast<double>(bits_float(0x7fc00000u)); }
SPECTRAL_BLOCK bool block_finite(double x) { return x - x == 0; }

template <class Block>
SPECTRAL_BLOCK double norm_of_tiles(Block& block, const BlockArguments& a, const BlockPart& part, int second) {
  const double squares = block.sum([&](int thread) {
    double own = 0;
    for (int i = thread; i < part.tiles[second]; i += kBlockThreads) own += block.fresh(a.squares + part.tile_begin[second] + i);
    return own;
  });
  return sqrt(squares);
}

// max |w| of a part, NaN where an element is not finite.
template <class Block>
SPECTRAL_BLOCK double largest_of_part(Block& block, const BlockArguments& a, const BlockPart& part) {
  const int type = a.weight_type[part.item];
  const void* left = static_cast<const char*>(a.weights[part.item]) + part.left_at * (type == static_cast<int>(DType::f32) ? 4 : 2);
  return block.largest([&](int thread) {
    double own = 0;
    // All passes together see every element, some several times.
    for (int unit = part.first_begin; unit < part.first_end; ++unit) {
      const BlockPass& here = a.passes[a.first[unit].pass];
      if (a.first[unit].slice != 0 || a.first[unit].row != 0 || a.first[unit].lane != 0) continue;
      for (int64_t i = thread; i < static_cast<int64_t>(here.rows) * here.terms; i += kBlockThreads) {
        const float x = load_as_float(left, i / here.terms * here.left_row + a.points[here.term_at + i % here.terms].at, type);
        const double size = x < 0 ? -static_cast<double>(x) : static_cast<double>(x);
        if (!(size <= own)) own = block_finite(size) ? size : block_nan();
        if (own != own) return own;
      }
    }
    return own;
  });
}

// W v of a part once more, by this block alone. Called, as it is rare and would take registers from what is not.
template <class Block>
SPECTRAL_BLOCK_CALLED void multiply_again(Block& block, const BlockArguments& a, const BlockPart& part, float factor) {
  for (int i = part.first_begin; i < part.first_end; ++i) {
    BlockUnit unit = a.first[i];
    if (unit.slice != 0) continue;
    unit.slices = 1;
    unit.term_begin = 0;
    unit.term_end = a.passes[unit.pass].terms;
    product_unit(block, a, unit, 0, factor);
  }
}

template <class Block>
SPECTRAL_BLOCK void take_y(Block& block, const BlockArguments& a, int index) {
  const BlockPart& part = a.parts[index];
  double norm = norm_of_tiles(block, a, part, 0);
  int shift = block_shift(a.exponents[part.matrix]), status = 0;
  if (!block_in_range(norm)) {
    const double largest = largest_of_part(block, a, part);
    if (largest > 0) {
      // The exponent was out of date by more than the range allows: renewed from max|W|, and this product taken again.
      shift = block_shift(ilogb(largest));
      multiply_again(block, a, part, static_cast<float>(ldexp(1.0, shift)));
      norm = norm_of_tiles(block, a, part, 0);
    }
    if (!block_finite(largest) || !block_finite(norm))
      status = 2;
    else if (!(norm > 0))
      status = 1;
  }
  block.each([&](int thread) {
    if (thread != 0) return;
    BlockState& state = a.states[index];
    state.y_norm = norm;
    state.shift = shift;
    state.status = status;
    state.y_factor = static_cast<float>(ldexp(1.0 / norm, shift));
    state.seed = float_bits(a.v[part.v_at]);
  });
}

template <class Block>
SPECTRAL_BLOCK void take_z(Block& block, const BlockArguments& a, int index) {
  const BlockPart& part = a.parts[index];
  int status = a.states[index].status;
  double norm = status == 0 ? norm_of_tiles(block, a, part, 1) : 0.0;
  if (status == 0 && !(norm > 0)) status = norm != norm ? 2 : 1;
  if (status == 1) {  // of the hashed vector that replaces v
    norm = sqrt(block.sum([&](int thread) {
      double own = 0;
      for (int64_t j = thread; j < part.columns; j += kBlockThreads) own += square(hashed_element(j, a.states[index].seed));
      return own;
    }));
  }
  const bool skip = scalar(a.found_inf_at, a.found_inf_type, 0.0) != 0.0;
  block.each([&](int thread) {
    if (thread != 0) return;
    BlockState& state = a.states[index];
    const double sigma = status == 0 ? ldexp(norm, -state.shift) : status == 1 ? 0.0 : block_nan();
    state.status = status;
    state.z_norm = norm;
    state.term = part.scale * matrix_term(sigma, part.target, a.exponent);
    const double factor = scalar(a.strength_at, a.strength_type, a.strength) * scalar(a.grad_scale_at, a.grad_scale_type, a.grad_scale);
    state.coefficient = status == 1 || skip ? 0.0 : factor * part.scale * matrix_slope(sigma, part.target, a.exponent);
    if (skip) return;
    a.sigma[part.matrix] = static_cast<float>(sigma);
    a.exponents_out[part.matrix] = status == 0 ? ilogb(sigma) : a.exponents[part.matrix];
  });
}

template <class Block>
SPECTRAL_BLOCK void first_block(Block& block, const BlockArguments& a, int index) {
  const BlockUnit unit = a.first[index];
  const BlockPart& part = a.parts[unit.part];
  const auto factor = static_cast<float>(ldexp(1.0, block_shift(a.exponents[part.matrix])));
  if (!product_unit(block, a, unit, 0, factor)) return;
  if (block.is_last(a.counters + a.join_count + 2 * unit.part, part.tiles[0])) take_y(block, a, unit.part);
}

template <class Block>
SPECTRAL_BLOCK void second_block(Block& block, const BlockArguments& a, int index) {
  const BlockUnit unit = a.second[index];
  const BlockPart& part = a.parts[unit.part];
  const BlockState& state = a.states[unit.part];
  // A part given up is not multiplied, but its tiles count.
  if (state.status == 0 ? !product_unit(block, a, unit, 1, state.y_factor) : unit.slice != 0) return;
  if (!block.is_last(a.counters + a.join_count + 2 * unit.part + 1, part.tiles[1])) return;
  take_z(block, a, unit.part);
  if (!block.is_last(a.counters + a.join_count + 2 * a.part_count, a.part_count) || a.value == nullptr) return;
  const double total = block.sum([&](int thread) {
    double own = 0;
    for (int i = thread; i < a.part_count; i += kBlockThreads) own += block.fresh(&a.states[i].term);
    return own;
  });
  block.each([&](int thread) {
    if (thread == 0) *a.value = static_cast<float>(scalar(a.strength_at, a.strength_type, a.strength) * total);
  });
}

template <class Block>
SPECTRAL_BLOCK void write_block(Block& block, const BlockArguments& a, const BlockWrite& write) {
  if (write.of_u && a.u == nullptr) return;
  const BlockPart& part = a.parts[write.part];
  const BlockState& state = a.states[write.part];
  const bool skip = scalar(a.found_inf_at, a.found_inf_type, 0.0) != 0.0;
  block.each([&](int thread) {
    for (int64_t j = write.begin + thread; j < write.end; j += kBlockThreads) {
      if (write.of_u) {
        const auto nan = static_cast<float>(block_nan());
        a.u[part.u_at + j] = state.status == 0 ? static_cast<float>(a.y[part.y_at + j] / state.y_norm) : state.status == 1 ? 0.0f : nan;
      } else if (skip || state.status == 2) {
        if (a.v_out != a.v) a.v_out[part.v_at + j] = a.v[part.v_at + j];
      } else if (state.status == 1) {
        const float flipped = -bits_float(state.seed);
        a.v_out[part.v_at + j] = part.columns == 1 ? flipped : static_cast<float>(hashed_element(j, state.seed) / state.z_norm);
      } else {
        a.v_out[part.v_at + j] = static_cast<float>(a.z[part.z_at + j] / state.z_norm);
      }
    }
  });
}

template <class Block>
SPECTRAL_BLOCK void third_block(Block& block, const BlockArguments& a, int index) {
  if (index >= a.gradient_count) {
    write_block(block, a, a.writes[index - a.gradient_count]);
    return;
  }
  const BlockUnit unit = a.gradient[index];
  if (a.given_sigma == nullptr && a.states[unit.part].coefficient == 0.0) return;
  gradient_unit(block, a, unit);
}

}  // namespace spectral

// What becomes of a unit's sums: elements of W v or W'u, or additions to a gradient.
#pragma once
#include "conv_block_sums.h"

namespace spectral {

// Where a thread's lanes lie in a row of the target; -1 beyond the last.
template <class V>
SPECTRAL_BLOCK void lanes_in_target(const BlockPoint* points, const BlockPass& pass, const BlockUnit& unit, int thread, int64_t (&at)[V::TN]) {
  SPECTRAL_UNROLL
  for (int j = 0; j < V::TN; ++j) {
    const int lane = unit.lane + V::lane(thread, j);
    at[j] = lane < pass.lanes ? points[pass.lane_at + lane].at : -1;
  }
}

// A unit of W v or of W'u: its elements and the sum of their squares. True for the last of its tile.
template <class V, class Block>
SPECTRAL_BLOCK bool product_as(Block& block, const BlockArguments& a, const BlockPass& pass, const BlockUnit& unit, int second, float factor) {
  const BlockPart& part = a.parts[unit.part];
  const int type = a.weight_type[pass.item];
  const int64_t size = type == static_cast<int>(DType::f32) ? 4 : 2;
  const void* left = static_cast<const char*>(a.weights[pass.item]) + part.left_at * size;
  typename Block::template PerThread<BlockSums<V>> sums;
  sum_unit<V>(block, a.points, pass, unit, left, type, second ? a.y + part.y_at : a.v + part.v_at, factor, sums);
  if (!join_slices<V>(block, a, unit, sums)) return false;
  float* target = second ? a.z + part.z_at : a.y + part.y_at;
  const double squares = block.sum([&](int thread) {
    int64_t at[V::TN];
    lanes_in_target<V>(a.points, pass, unit, thread, at);
    double own = 0;
    SPECTRAL_UNROLL
    for (int i = 0; i < V::TM; ++i) {
      const int row = unit.row + V::row(thread, i);
      SPECTRAL_UNROLL
      for (int j = 0; j < V::TN; ++j) {
        if (row >= pass.rows || at[j] < 0) continue;
        const float x = sums[thread].x[i][j];
        own += static_cast<double>(x) * static_cast<double>(x);
        target[row * pass.target_row + at[j]] = x;
      }
    }
    return own;
  });
  block.each([&](int thread) {
    if (thread == 0) a.squares[unit.tile] = squares;
  });
  return true;
}

// Adds a thread's sums, times a factor, to a gradient. Everything is read before anything is written, so that the reads
// are under way together.
template <class V, class T>
SPECTRAL_BLOCK void add_sums(T* gradient, const BlockPass& pass, const BlockUnit& unit, int thread, const int64_t (&at)[V::TN], const BlockSums<V>& sums,
                             float factor, bool overwrite) {
  float x[V::TM][V::TN];
  const auto everywhere = [&](auto use) {
    SPECTRAL_UNROLL
    for (int i = 0; i < V::TM; ++i) {
      const int row = unit.row + V::row(thread, i);
      T* to = gradient + row * pass.target_row;
      SPECTRAL_UNROLL
      for (int j = 0; j < V::TN; ++j)
        if (row < pass.rows && at[j] >= 0) use(to + at[j], i, j);
    }
  };
  SPECTRAL_UNROLL
  for (int i = 0; i < V::TM; ++i)
    SPECTRAL_UNROLL
    for (int j = 0; j < V::TN; ++j) x[i][j] = 0.0f;
  if (!overwrite) everywhere([&](const T* from, int i, int j) { x[i][j] = widen(*from); });
  everywhere([&](T* to, int i, int j) { narrow(x[i][j] + factor * sums.x[i][j], to); });
}

// The same where each run of 4 lanes lies together and aligned: a quarter of the accesses.
template <class V>
SPECTRAL_BLOCK void add_runs(float* gradient, const BlockPass& pass, const BlockUnit& unit, int thread, const int64_t (&at)[V::TN], const BlockSums<V>& sums,
                             float factor, bool overwrite) {
  BlockFour x[V::TM][V::TN / 4];
  const auto everywhere = [&](auto use) {
    SPECTRAL_UNROLL
    for (int i = 0; i < V::TM; ++i) {
      const int row = unit.row + V::row(thread, i);
      SPECTRAL_UNROLL
      for (int run = 0; run < V::TN / 4; ++run)
        if (row < pass.rows && at[4 * run] >= 0) use(reinterpret_cast<BlockFour*>(gradient + row * pass.target_row + at[4 * run]), i, run);
    }
  };
  SPECTRAL_UNROLL
  for (int i = 0; i < V::TM; ++i)
    SPECTRAL_UNROLL
    for (int run = 0; run < V::TN / 4; ++run) x[i][run] = {};
  if (!overwrite) everywhere([&](const BlockFour* from, int i, int run) { x[i][run] = *from; });
  everywhere([&](BlockFour* to, int i, int run) {
    SPECTRAL_UNROLL
    for (int j = 0; j < 4; ++j) x[i][run].x[j] += factor * sums.x[i][4 * run + j];
    *to = x[i][run];
  });
}

template <class V, class Block>
SPECTRAL_BLOCK void gradient_as(Block& block, const BlockArguments& a, const BlockPass& pass, const BlockUnit& unit) {
  const BlockPart& part = a.parts[unit.part];
  // Of u = y / |y| and v+ = z / |z| the one on the coarse grid is the left side.
  const bool given = a.given_sigma != nullptr;
  const float* y = given ? a.given_u + part.u_at : a.y + part.y_at;
  const float* z = given ? a.given_v + part.v_at : a.z + part.z_at;
  const double of_y = given ? 1.0 : 1.0 / a.states[unit.part].y_norm, of_z = given ? 1.0 : 1.0 / a.states[unit.part].z_norm;
  typename Block::template PerThread<BlockSums<V>> sums;
  sum_unit<V>(block, a.points, pass, unit, part.transposed ? z : y, static_cast<int>(DType::f32), part.transposed ? y : z,
              static_cast<float>(part.transposed ? of_y : of_z), sums);
  if (!join_slices<V>(block, a, unit, sums)) return;
  double coefficient;
  if (given) {
    const double sigma = a.given_sigma[part.matrix];
    const double slope = sigma == 0 ? 0.0 : matrix_slope(sigma, part.target, a.exponent);
    coefficient = scalar(a.strength_at, a.strength_type, a.strength) * part.scale * slope;
  } else {
    coefficient = a.states[unit.part].coefficient;
  }
  const auto factor = static_cast<float>(coefficient * (part.transposed ? of_z : of_y));
  const auto type = static_cast<DType>(a.gradient_type[pass.item]);
  const bool overwrite = a.overwrite != 0;
  void* gradient = static_cast<char*>(a.gradients[pass.item]) + part.gradient_at * (type == DType::f32 ? 4 : 2);
  block.each([&](int thread) {
    int64_t at[V::TN];
    lanes_in_target<V>(a.points, pass, unit, thread, at);
    bool runs = reinterpret_cast<uintptr_t>(gradient) % 16 == 0 && pass.target_row % 4 == 0;
    SPECTRAL_UNROLL
    for (int j = 0; j < V::TN; j += 4)
      runs &= at[j] < 0 || (at[j] % 4 == 0 && at[j + 1] == at[j] + 1 && at[j + 2] == at[j] + 2 && at[j + 3] == at[j] + 3);
    if (type == DType::f32 && runs)
      add_runs<V>(static_cast<float*>(gradient), pass, unit, thread, at, sums[thread], factor, overwrite);
    else if (type == DType::f32)
      add_sums<V>(static_cast<float*>(gradient), pass, unit, thread, at, sums[thread], factor, overwrite);
    else if (type == DType::bf16)
      add_sums<V>(static_cast<bf16*>(gradient), pass, unit, thread, at, sums[thread], factor, overwrite);
    else
      add_sums<V>(static_cast<f16*>(gradient), pass, unit, thread, at, sums[thread], factor, overwrite);
  });
}

template <class Block>
SPECTRAL_BLOCK bool product_unit(Block& block, const BlockArguments& a, const BlockUnit& unit, int second, float factor) {
  const BlockPass pass = a.passes[unit.pass];
  switch (pass.variant) {
    case 0: return product_as<BlockWide>(block, a, pass, unit, second, factor);
    case 1: return product_as<BlockTall>(block, a, pass, unit, second, factor);
    case 2: return product_as<BlockNarrow>(block, a, pass, unit, second, factor);
    case 3: return product_as<BlockFlat>(block, a, pass, unit, second, factor);
    default: return product_as<BlockRow>(block, a, pass, unit, second, factor);
  }
}

template <class Block>
SPECTRAL_BLOCK void gradient_unit(Block& block, const BlockArguments& a, const BlockUnit& unit) {
  const BlockPass pass = a.passes[unit.pass];
  switch (pass.variant) {
    case 0: gradient_as<BlockWide>(block, a, pass, unit); break;
    case 1: gradient_as<BlockTall>(block, a, pass, unit); break;
    case 2: gradient_as<BlockNarrow>(block, a, pass, unit); break;
    case 3: gradient_as<BlockFlat>(block, a, pass, unit); break;
    default: gradient_as<BlockRow>(block, a, pass, unit); break;
  }
}

}  // namespace spectral

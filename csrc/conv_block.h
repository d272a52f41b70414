// What one block of threads does with conv operators, compiled by nvcc for the device (conv.cu) and by the C++ compiler for
// tests without one (conv_emulated.cpp): the same tables, index maps and arithmetic, thread by thread. Between two
// barriers a step is a lambda that `Block::each` calls for every thread.
//
// Every product is one form, sums[row][lane] = sum over terms of left[row][term] * source(lane, term), where a lane and a
// term each name a place on the source's grid and their sum is what is read; 0 outside. A convolution's lanes are its
// outputs and its terms (channel, tap); its adjoint's are the fine positions of one remainder by the strides; the
// gradient's lanes are (channel, tap) and its terms the coarse positions.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dtypes.h"
#include "penalty_terms.h"
#include "unit_vector.h"

namespace spectral {

constexpr int kBlockThreads = 128;
constexpr int kBlockItems = 768;        // addresses go along as kernel arguments: 12 KB of the 32 KB there are
constexpr int kWriteElements = 1 << 13;  // of v or u that one unit writes

struct BlockPoint {
  int32_t x[3];
  int32_t channel;  // in elements of the source
  int64_t at;       // of a term in a row of the left side, of a lane in a row of the target
};

struct BlockPass {
  int32_t item, rows, lanes, terms, variant;
  int32_t extent[3], wrap[3];  // of the source's grid; where wrap, places outside are those inside, modulo the extent
  int64_t left_row, target_row;
  int64_t term_at, lane_at;  // first of its points
};

struct BlockUnit {
  int32_t pass, part;  // part: its number among all
  int32_t row, lane, term_begin, term_end;
  int32_t slice, slices;  // of one tile's terms; the last of them to come sums them all, in their order
  int32_t tile;           // among all tiles: its counter, its sum of squares
  int64_t partial_at;     // of the tile's first slice
};

struct BlockPart {
  int32_t item, transposed;
  int64_t left_at, gradient_at;  // of the part in its weight and gradient, in elements
  int64_t matrix, columns, rows, v_at, u_at, y_at, z_at;
  int32_t first_begin, first_end;           // its units of W v
  int32_t tile_begin[2], tiles[2];  // of W v, of W'u
  double target, scale;
};

struct BlockWrite {
  int32_t part, of_u;
  int64_t begin, end;
};

// What is known of a part during a step.
struct BlockState {
  double y_norm, z_norm, coefficient, term;
  float y_factor;  // what y is multiplied by to be u, shifted
  int32_t shift, status;  // 0: sigma is known, 1: W v = 0, 2: not finite
  uint32_t seed;
};

struct BlockArguments {
  const BlockPoint* points;
  const BlockPass* passes;
  const BlockUnit *first, *second, *gradient;
  const BlockPart* parts;
  const BlockWrite* writes;
  int32_t part_count, first_count, second_count, gradient_count, write_count;
  float *y, *z, *partial;
  double* squares;
  BlockState* states;
  int32_t* counters;  // of every tile, then two of every part, then one; all 0 between launches
  int32_t tile_count;
  const float* v;
  float* v_out;
  const int32_t* exponents;
  int32_t* exponents_out;
  float *sigma, *u, *value;  // u and value: null where not wanted
  double exponent, strength, grad_scale;
  const void *strength_at, *grad_scale_at, *found_inf_at;  // on the device; null: the numbers above, and none
  int32_t strength_type, grad_scale_type, found_inf_type;  // DType
  int32_t overwrite;
  const float *given_sigma, *given_u, *given_v;  // of a step before: the gradient alone is wanted; else null
  int8_t weight_type[kBlockItems], gradient_type[kBlockItems];
  const void* weights[kBlockItems];
  void* gradients[kBlockItems];
};

// Rows and lanes of a tile, of one thread, and terms in shared memory at a time.
template <int BM_, int BN_, int TM_, int TN_, int BK_>
struct BlockVariant {
  static constexpr int BM = BM_, BN = BN_, TM = TM_, TN = TN_, BK = BK_;
  static constexpr int threads_of_rows = BM / TM, threads_of_lanes = BN / TN;
  static_assert(threads_of_rows * threads_of_lanes == kBlockThreads, "every thread has its sums");
  static constexpr int left_pitch = BM + 4, source_pitch = BN + 4;  // 16-byte aligned, and off the banks' period
  static constexpr int left_loads = (BM * BK + kBlockThreads - 1) / kBlockThreads, source_loads = BN * BK / kBlockThreads;
  static constexpr int shared_floats = BK * (left_pitch + source_pitch);
  // Which row (lane) a thread's i-th one is: in runs of 4, as they are read from shared memory.
  SPECTRAL_HD static int row(int thread, int i) {
    const int t = thread / threads_of_lanes;
    return TM < 4 ? t * TM + i : i / 4 * (threads_of_rows * 4) + t * 4 + i % 4;
  }
  SPECTRAL_HD static int lane(int thread, int i) {
    const int t = thread % threads_of_lanes;
    return TN < 4 ? t * TN + i : i / 4 * (threads_of_lanes * 4) + t * 4 + i % 4;
  }
};
using BlockWide = BlockVariant<64, 64, 8, 4, 16>;
using BlockTall = BlockVariant<128, 32, 8, 4, 16>;
using BlockNarrow = BlockVariant<256, 16, 8, 4, 16>;
using BlockFlat = BlockVariant<16, 256, 4, 8, 8>;
using BlockRow = BlockVariant<1, 512, 1, 4, 8>;
constexpr int kBlockVariants = 5;
constexpr int kBlockRows[kBlockVariants] = {64, 128, 256, 16, 1}, kBlockLanes[kBlockVariants] = {64, 32, 16, 256, 512};
constexpr int kBlockSharedFloats = BlockNarrow::shared_floats;
static_assert(BlockWide::shared_floats <= kBlockSharedFloats && BlockTall::shared_floats <= kBlockSharedFloats &&
              BlockFlat::shared_floats <= kBlockSharedFloats && BlockRow::shared_floats <= kBlockSharedFloats, "one buffer serves all");

#if defined(__CUDACC__)
#define SPECTRAL_BLOCK __device__ __forceinline__
#define SPECTRAL_BLOCK_CALLED static __device__ __noinline__
#define SPECTRAL_UNROLL _Pragma("unroll")
#define SPECTRAL_UNROLL_LOADS _Pragma("unroll 4")
#else
#define SPECTRAL_BLOCK inline
#define SPECTRAL_BLOCK_CALLED inline
#define SPECTRAL_UNROLL
#define SPECTRAL_UNROLL_LOADS
#endif

SPECTRAL_BLOCK float load_as_float(const void* p, int64_t i, int type) {
  switch (static_cast<DType>(type)) {
    case DType::f32: return static_cast<const float*>(p)[i];
    case DType::bf16: return widen(static_cast<const bf16*>(p)[i]);
    case DType::f16: return widen(static_cast<const f16*>(p)[i]);
    default: return static_cast<float>(static_cast<const double*>(p)[i]);
  }
}
SPECTRAL_BLOCK void add_as(void* p, int64_t i, int type, float x, bool overwrite) {
  if (!overwrite) x += load_as_float(p, i, type);
  switch (static_cast<DType>(type)) {
    case DType::f32: static_cast<float*>(p)[i] = x; break;
    case DType::bf16: narrow(x, static_cast<bf16*>(p) + i); break;
    default: narrow(x, static_cast<f16*>(p) + i); break;
  }
}
SPECTRAL_BLOCK double scalar(const void* p, int type, double otherwise) {
  if (p == nullptr) return otherwise;
  return static_cast<DType>(type) == DType::f64 ? *static_cast<const double*>(p) : load_as_float(p, 0, type);
}

SPECTRAL_BLOCK_CALLED int wrapped(int x, int extent) {  // called, as a division takes many instructions and is rare
  x %= extent;
  return x < 0 ? x + extent : x;
}

// The source at the sum of two points, or 0.
SPECTRAL_BLOCK float source_at(const float* source, const BlockPass& pass, const BlockPoint& lane, const BlockPoint& term) {
  int x[3];
  SPECTRAL_UNROLL
  for (int i = 0; i < 3; ++i) {
    x[i] = lane.x[i] + term.x[i];
    if (x[i] < 0 || x[i] >= pass.extent[i]) {
      if (!pass.wrap[i]) return 0.0f;
      x[i] = wrapped(x[i], pass.extent[i]);
    }
  }
  const int64_t place = (static_cast<int64_t>(x[0]) * pass.extent[1] + x[1]) * pass.extent[2] + x[2];
  return source[static_cast<int64_t>(lane.channel) + term.channel + place];
}

template <class V>
struct BlockSums {
  float x[V::TM][V::TN];
};
// The sums of one unit, over its own terms.
template <class V, class Block>
SPECTRAL_BLOCK void sum_unit(Block& block, const BlockArguments& a, const BlockPass& pass, const BlockUnit& unit, const void* left,
                             int left_type, const float* source, float factor, typename Block::template PerThread<BlockSums<V>>& sums) {
  float *left_tile = block.shared(), *source_tile = left_tile + V::BK * V::left_pitch;
  const BlockPoint* terms = a.points + pass.term_at;
  const BlockPoint* lanes = a.points + pass.lane_at;
  block.each([&](int thread) {
    SPECTRAL_UNROLL
    for (int i = 0; i < V::TM; ++i)
      SPECTRAL_UNROLL
      for (int j = 0; j < V::TN; ++j) sums[thread].x[i][j] = 0.0f;
  });
  // Not ahead of time into registers: that took all there are and more. Other blocks of the multiprocessor work meanwhile.
  for (int begin = unit.term_begin; begin < unit.term_end; begin += V::BK) {
    block.each([&](int thread) {
      SPECTRAL_UNROLL_LOADS
      for (int i = 0; i < V::left_loads; ++i) {
        const int at = i * kBlockThreads + thread, k = at % V::BK, r = at / V::BK, term = begin + k, row = unit.row + r;
        if (at >= V::BM * V::BK) break;
        const bool there = term < unit.term_end && row < pass.rows;
        left_tile[k * V::left_pitch + r] = there ? load_as_float(left, row * pass.left_row + terms[term].at, left_type) : 0.0f;
      }
      SPECTRAL_UNROLL_LOADS
      for (int i = 0; i < V::source_loads; ++i) {
        const int at = i * kBlockThreads + thread, k = at / V::BN, l = at % V::BN, term = begin + k, lane = unit.lane + l;
        const bool there = term < unit.term_end && lane < pass.lanes;
        source_tile[k * V::source_pitch + l] = there ? factor * source_at(source, pass, lanes[lane], terms[term]) : 0.0f;
      }
    });
    block.each([&](int thread) {
      BlockSums<V>& own = sums[thread];
      SPECTRAL_UNROLL
      for (int k = 0; k < V::BK; ++k) {
        float x[V::TM], y[V::TN];
        SPECTRAL_UNROLL
        for (int i = 0; i < V::TM; ++i) x[i] = left_tile[k * V::left_pitch + V::row(thread, i)];
        SPECTRAL_UNROLL
        for (int j = 0; j < V::TN; ++j) y[j] = source_tile[k * V::source_pitch + V::lane(thread, j)];
        SPECTRAL_UNROLL
        for (int i = 0; i < V::TM; ++i)
          SPECTRAL_UNROLL
          for (int j = 0; j < V::TN; ++j) own.x[i][j] += x[i] * y[j];
      }
    });
  }
}

// False where other slices of the tile are still to come; else `sums` are those of all of them.
template <class V, class Block>
SPECTRAL_BLOCK bool join_slices(Block& block, const BlockArguments& a, const BlockUnit& unit, typename Block::template PerThread<BlockSums<V>>& sums) {
  if (unit.slices == 1) return true;
  constexpr int64_t kTile = V::BM * V::BN;
  const auto place = [](int thread, int i, int j) { return (i * V::TN + j) * kBlockThreads + thread; };
  block.each([&](int thread) {
    SPECTRAL_UNROLL
    for (int i = 0; i < V::TM; ++i)
      SPECTRAL_UNROLL
      for (int j = 0; j < V::TN; ++j) a.partial[unit.partial_at + unit.slice * kTile + place(thread, i, j)] = sums[thread].x[i][j];
  });
  if (!block.is_last(a.counters + unit.tile, unit.slices)) return false;
  block.each([&](int thread) {
    SPECTRAL_UNROLL
    for (int i = 0; i < V::TM; ++i)
      SPECTRAL_UNROLL
      for (int j = 0; j < V::TN; ++j) {
        float sum = 0.0f;
        for (int slice = 0; slice < unit.slices; ++slice) sum += block.fresh(a.partial + unit.partial_at + slice * kTile + place(thread, i, j));
        sums[thread].x[i][j] = sum;
      }
  });
  return true;
}

// A unit of W v or of W'u: its elements and the sum of their squares. True for the last of its tile.
template <class V, class Block>
SPECTRAL_BLOCK bool product_as(Block& block, const BlockArguments& a, const BlockUnit& unit, int second, float factor) {
  const BlockPass& pass = a.passes[unit.pass];
  const BlockPart& part = a.parts[unit.part];
  const int type = a.weight_type[pass.item];
  const int64_t size = type == static_cast<int>(DType::f32) ? 4 : 2;
  const void* left = static_cast<const char*>(a.weights[pass.item]) + part.left_at * size;
  typename Block::template PerThread<BlockSums<V>> sums;
  sum_unit<V>(block, a, pass, unit, left, type, second ? a.y + part.y_at : a.v + part.v_at, factor, sums);
  if (!join_slices<V>(block, a, unit, sums)) return false;
  float* target = second ? a.z + part.z_at : a.y + part.y_at;
  const double squares = block.sum([&](int thread) {
    double own = 0;
    SPECTRAL_UNROLL
    for (int i = 0; i < V::TM; ++i) {
      const int row = unit.row + V::row(thread, i);
      SPECTRAL_UNROLL
      for (int j = 0; j < V::TN; ++j) {
        const int lane = unit.lane + V::lane(thread, j);
        if (row >= pass.rows || lane >= pass.lanes) continue;
        const float x = sums[thread].x[i][j];
        own += static_cast<double>(x) * static_cast<double>(x);
        target[row * pass.target_row + a.points[pass.lane_at + lane].at] = x;
      }
    }
    return own;
  });
  block.each([&](int thread) {
    if (thread == 0) a.squares[unit.tile] = squares;
  });
  return true;
}

template <class V, class Block>
SPECTRAL_BLOCK void gradient_as(Block& block, const BlockArguments& a, const BlockUnit& unit) {
  const BlockPass& pass = a.passes[unit.pass];
  const BlockPart& part = a.parts[unit.part];
  // Of u = y / |y| and v+ = z / |z| the one on the coarse grid is the left side.
  const bool given = a.given_sigma != nullptr;
  const float* y = given ? a.given_u + part.u_at : a.y + part.y_at;
  const float* z = given ? a.given_v + part.v_at : a.z + part.z_at;
  const double of_y = given ? 1.0 : 1.0 / a.states[unit.part].y_norm, of_z = given ? 1.0 : 1.0 / a.states[unit.part].z_norm;
  typename Block::template PerThread<BlockSums<V>> sums;
  sum_unit<V>(block, a, pass, unit, part.transposed ? z : y, static_cast<int>(DType::f32), part.transposed ? y : z,
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
  block.each([&](int thread) {
    SPECTRAL_UNROLL
    for (int i = 0; i < V::TM; ++i) {
      const int row = unit.row + V::row(thread, i);
      SPECTRAL_UNROLL
      for (int j = 0; j < V::TN; ++j) {
        const int lane = unit.lane + V::lane(thread, j);
        if (row >= pass.rows || lane >= pass.lanes) continue;
        const int64_t at = part.gradient_at + row * pass.target_row + a.points[pass.lane_at + lane].at;
        add_as(a.gradients[pass.item], at, a.gradient_type[pass.item], factor * sums[thread].x[i][j], a.overwrite != 0);
      }
    }
  });
}

template <class Block>
SPECTRAL_BLOCK_CALLED bool product_unit(Block& block, const BlockArguments& a, const BlockUnit& unit, int second, float factor) {
  switch (a.passes[unit.pass].variant) {
    case 0: return product_as<BlockWide>(block, a, unit, second, factor);
    case 1: return product_as<BlockTall>(block, a, unit, second, factor);
    case 2: return product_as<BlockNarrow>(block, a, unit, second, factor);
    case 3: return product_as<BlockFlat>(block, a, unit, second, factor);
    default: return product_as<BlockRow>(block, a, unit, second, factor);
  }
}

template <class Block>
SPECTRAL_BLOCK_CALLED void gradient_unit(Block& block, const BlockArguments& a, const BlockUnit& unit) {
  switch (a.passes[unit.pass].variant) {
    case 0: gradient_as<BlockWide>(block, a, unit); break;
    case 1: gradient_as<BlockTall>(block, a, unit); break;
    case 2: gradient_as<BlockNarrow>(block, a, unit); break;
    case 3: gradient_as<BlockFlat>(block, a, unit); break;
    default: gradient_as<BlockRow>(block, a, unit); break;
  }
}

}  // namespace spectral

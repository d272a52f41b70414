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
constexpr int kWriteElements = 1 << 10;  // of v or u that one unit writes

// A place on the source's grid; `place` is where it lies in the source, its channel included. Both are sums of a term's and
// a lane's, modulo 2^32: one of the two may lie outside.
struct alignas(16) BlockWhere {
  int32_t x[3];
  uint32_t place;
};
constexpr int32_t kNowhere = INT32_MIN / 2;  // x[0] of a term that reads 0

struct BlockPoint {
  BlockWhere where;
  int64_t at;  // of a term in a row of the left side, of a lane in a row of the target
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
  int32_t slice, slices;  // of one tile's terms; `join_slices` sums them
  int32_t tile;           // among all tiles: its sum of squares
  int32_t counter;        // first of those that join its slices
  int64_t partial_at;     // of the tile's first slice, a multiple of 4
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
  int32_t* counters;  // of joins, then two of every part, then one; all 0 between launches
  int32_t join_count;
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
  static_assert(TM * TN % 4 == 0 && TN % 4 == 0 && kBlockThreads % BK == 0, "runs of 4; a thread loads one term of the left side");
  static constexpr int left_pitch = BM + 4, source_pitch = BN + 4;  // 16-byte aligned, and off the banks' period
  static constexpr int source_at = BK * left_pitch, tile_floats = source_at + BK * source_pitch;
  // A thread loads rows of one term, `left_step` apart; lanes of terms, `lane_step` and `term_step` apart.
  static constexpr int left_step = kBlockThreads / BK, left_loads = BM < left_step ? 1 : BM / left_step;
  static constexpr int lane_step = BN < kBlockThreads ? BN : kBlockThreads, lane_loads = BN / lane_step;
  static constexpr int term_step = kBlockThreads / lane_step, term_loads = BK / term_step;
  // Which row (lane) a thread's i-th one is: in runs of 4, as they are read from shared memory.
  static constexpr int row_step = threads_of_rows * 4, lane_run_step = threads_of_lanes * 4;
  SPECTRAL_HD static int row(int thread, int i) {
    const int t = thread / threads_of_lanes;
    return TM < 4 ? t * TM + i : i / 4 * row_step + t * 4 + i % 4;
  }
  SPECTRAL_HD static int lane(int thread, int i) { return i / 4 * lane_run_step + thread % threads_of_lanes * 4 + i % 4; }
};
using BlockWide = BlockVariant<64, 64, 8, 4, 16>;
using BlockTall = BlockVariant<128, 32, 8, 4, 16>;
using BlockNarrow = BlockVariant<256, 16, 8, 4, 8>;
using BlockFlat = BlockVariant<16, 256, 4, 8, 8>;
using BlockRow = BlockVariant<1, 512, 1, 4, 4>;
constexpr int kBlockVariants = 5;
constexpr int kBlockRows[kBlockVariants] = {64, 128, 256, 16, 1}, kBlockLanes[kBlockVariants] = {64, 32, 16, 256, 512};

constexpr int kBlockTileFloats = BlockTall::tile_floats;
static_assert(BlockWide::tile_floats <= kBlockTileFloats && BlockNarrow::tile_floats <= kBlockTileFloats &&
              BlockFlat::tile_floats <= kBlockTileFloats && BlockRow::tile_floats <= kBlockTileFloats, "one buffer serves all");
constexpr int kStagedTerms = kBlockThreads;
struct BlockShared {
  BlockWhere where[kStagedTerms];  // of the unit's next terms
  int64_t at[kStagedTerms];
  alignas(16) float tiles[2][kBlockTileFloats];  // one is filled while the other is multiplied
};

#if defined(__CUDACC__)
#define SPECTRAL_BLOCK __device__ __forceinline__
#define SPECTRAL_BLOCK_CALLED static __device__ __noinline__
#define SPECTRAL_UNROLL _Pragma("unroll")
#else
#define SPECTRAL_BLOCK inline
#define SPECTRAL_BLOCK_CALLED inline
#define SPECTRAL_UNROLL
#endif

SPECTRAL_BLOCK float load_as_float(const void* p, int64_t i, int type) {
  switch (static_cast<DType>(type)) {
    case DType::f32: return static_cast<const float*>(p)[i];
    case DType::bf16: return widen(static_cast<const bf16*>(p)[i]);
    case DType::f16: return widen(static_cast<const f16*>(p)[i]);
    default: return static_cast<float>(static_cast<const double*>(p)[i]);
  }
}
SPECTRAL_BLOCK double scalar(const void* p, int type, double otherwise) {
  if (p == nullptr) return otherwise;
  return static_cast<DType>(type) == DType::f64 ? *static_cast<const double*>(p) : load_as_float(p, 0, type);
}

}  // namespace spectral

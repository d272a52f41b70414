// The sums of a unit, and those of a tile's slices. What keeps the multiplying busy: everything that a thread reads of a
// chunk of terms is under way at once, and while the chunk before it is multiplied.
#pragma once
#include "conv_block.h"

namespace spectral {

// Sums of so many slices are joined at a time: one block that reads the 36 of a layer with a small grid would come last by
// far, and does not if it reads 6 sums of 6.
constexpr int kJoinedSlices = 6;

struct alignas(16) BlockFour {
  float x[4];
};

template <class V>
struct BlockSums {
  float x[V::TM][V::TN];
};

// What a thread reads, where it lies and what is on its way from there.
template <class V>
struct BlockReads {
  const char* row;  // first of its rows
  BlockWhere lane[V::lane_loads];
  float left[V::left_loads];  // elements of 16 bits: these bits
  float source[V::term_loads][V::lane_loads];
};

SPECTRAL_BLOCK float raw(float x) { return x; }
SPECTRAL_BLOCK float raw(bf16 x) { return bits_float(x.bits); }

template <class V, class T>
SPECTRAL_BLOCK void read_left(const char* p, int64_t step, int rows, float (&out)[V::left_loads]) {
  SPECTRAL_UNROLL
  for (int i = 0; i < V::left_loads; ++i, p += step) out[i] = i * V::left_step < rows ? raw(*reinterpret_cast<const T*>(p)) : 0.0f;
}

// The source at the sum of a lane and a term, or 0.
template <bool WRAPS>
SPECTRAL_BLOCK float source_at(const float* source, const BlockPass& pass, const BlockWhere& lane, const BlockWhere& term) {
  int x[3];
  uint32_t place = lane.place + term.place;
  SPECTRAL_UNROLL
  for (int i = 0; i < 3; ++i) x[i] = lane.x[i] + term.x[i];
  if constexpr (WRAPS) {
    if (term.x[0] == kNowhere) return 0.0f;
    uint32_t pitch = 1;
    SPECTRAL_UNROLL
    for (int i = 2; i >= 0; --i) {
      if (pass.wrap[i]) {  // no division: padding goes round a few times at most
        int moved = x[i];
        while (moved < 0) moved += pass.extent[i];
        while (moved >= pass.extent[i]) moved -= pass.extent[i];
        place += static_cast<uint32_t>(moved - x[i]) * pitch;
        x[i] = moved;
      }
      pitch *= static_cast<uint32_t>(pass.extent[i]);
    }
  }
  const auto within = [&](int i) { return static_cast<uint32_t>(x[i]) < static_cast<uint32_t>(pass.extent[i]); };
  return within(0) & within(1) & within(2) ? source[place] : 0.0f;
}

template <class V, bool WRAPS>
SPECTRAL_BLOCK void read_source(const float* source, const BlockPass& pass, const BlockWhere* terms, BlockReads<V>& reads) {
  SPECTRAL_UNROLL
  for (int i = 0; i < V::term_loads; ++i) {
    const BlockWhere term = terms[i * V::term_step];
    SPECTRAL_UNROLL
    for (int j = 0; j < V::lane_loads; ++j) reads.source[i][j] = source_at<WRAPS>(source, pass, reads.lane[j], term);
  }
}

template <int N>
SPECTRAL_BLOCK void read_runs(const float* from, int step, float (&out)[N]) {
  if constexpr (N < 4) {
    for (int i = 0; i < N; ++i) out[i] = from[i];
  } else {
    SPECTRAL_UNROLL
    for (int i = 0; i < N; i += 4) {
      const BlockFour four = *reinterpret_cast<const BlockFour*>(from + i / 4 * step);
      SPECTRAL_UNROLL
      for (int j = 0; j < 4; ++j) out[i + j] = four.x[j];
    }
  }
}

// The sums of one unit, over its own terms.
template <class V, class Block>
SPECTRAL_BLOCK void sum_unit(Block& block, const BlockPoint* points, const BlockPass& pass, const BlockUnit& unit, const void* left,
                             int left_type, const float* source, float factor, typename Block::template PerThread<BlockSums<V>>& sums) {
  constexpr int BK = V::BK;
  const bool wide = left_type == static_cast<int>(DType::f32), wraps = pass.wrap[0] || pass.wrap[1] || pass.wrap[2];
  const int count = unit.term_end - unit.term_begin, rows = pass.rows - unit.row < V::BM ? pass.rows - unit.row : V::BM;
  const int64_t size = wide ? 4 : 2, left_step = V::left_step * pass.left_row * size;
  BlockShared& shared = block.shared();
  source = block.settled(source);
  typename Block::template PerThread<BlockReads<V>> all_reads;

  const auto stage = [&](int thread, int done) {
    const bool there = done + thread < count;
    const BlockPoint term = points[pass.term_at + unit.term_begin + (there ? done + thread : 0)];
    shared.where[thread] = there ? term.where : BlockWhere{{kNowhere, 0, 0}, 0};
    shared.at[thread] = term.at;
  };
  const auto read = [&](int thread, int done) {
    BlockReads<V>& reads = all_reads[thread];
    const int k = thread % BK, there = done + k < count ? rows - thread / BK : 0;
    const int64_t at = shared.at[done % kStagedTerms + k];
    if (wide)
      read_left<V, float>(reads.row + at * size, left_step, there, reads.left);
    else
      read_left<V, bf16>(reads.row + at * size, left_step, there, reads.left);
    const BlockWhere* terms = shared.where + done % kStagedTerms + thread / V::lane_step;
    if (wraps)
      read_source<V, true>(source, pass, terms, reads);
    else
      read_source<V, false>(source, pass, terms, reads);
  };
  const auto keep = [&](int thread, float* tile) {
    const BlockReads<V>& reads = all_reads[thread];
    const auto keep_left = [&](auto widened) {
      float* to = tile + thread % BK * V::left_pitch + thread / BK;
      if (V::BM < V::left_step && thread / BK >= V::BM) return;
      SPECTRAL_UNROLL
      for (int i = 0; i < V::left_loads; ++i) to[i * V::left_step] = widened(reads.left[i]);
    };
    if (wide)
      keep_left([](float x) { return x; });
    else if (left_type == static_cast<int>(DType::bf16))
      keep_left([](float x) { return widen(bf16{static_cast<uint16_t>(float_bits(x))}); });
    else
      keep_left([](float x) { return widen(f16{static_cast<uint16_t>(float_bits(x))}); });
    float* to = tile + V::source_at + thread / V::lane_step * V::source_pitch + thread % V::lane_step;
    SPECTRAL_UNROLL
    for (int i = 0; i < V::term_loads; ++i)
      SPECTRAL_UNROLL
      for (int j = 0; j < V::lane_loads; ++j) to[i * V::term_step * V::source_pitch + j * V::lane_step] = factor * reads.source[i][j];
  };
  const auto multiply = [&](int thread, const float* tile) {
    const float *rows_at = tile + V::row(thread, 0), *lanes_at = tile + V::source_at + V::lane(thread, 0);
    BlockSums<V>& own = sums[thread];
    SPECTRAL_UNROLL
    for (int k = 0; k < BK; ++k) {
      float x[V::TM], y[V::TN];
      read_runs(rows_at + k * V::left_pitch, V::row_step, x);
      read_runs(lanes_at + k * V::source_pitch, V::lane_run_step, y);
      SPECTRAL_UNROLL
      for (int i = 0; i < V::TM; ++i)
        SPECTRAL_UNROLL
        for (int j = 0; j < V::TN; ++j) own.x[i][j] += x[i] * y[j];
    }
  };

  block.each([&](int thread) {
    SPECTRAL_UNROLL
    for (int i = 0; i < V::TM; ++i)
      SPECTRAL_UNROLL
      for (int j = 0; j < V::TN; ++j) sums[thread].x[i][j] = 0.0f;
    BlockReads<V>& reads = all_reads[thread];
    reads.row = static_cast<const char*>(left) + (unit.row + thread / BK) * pass.left_row * size;
    SPECTRAL_UNROLL
    for (int j = 0; j < V::lane_loads; ++j) {  // beyond the last lane: that one again, whose sums nobody reads
      const int lane = unit.lane + thread % V::lane_step + j * V::lane_step;
      reads.lane[j] = points[pass.lane_at + (lane < pass.lanes ? lane : pass.lanes - 1)].where;
    }
    stage(thread, 0);
  });
  block.each([&](int thread) {
    read(thread, 0);
    keep(thread, shared.tiles[0]);
  });
  for (int done = 0; done < count; done += BK) {
    const int next = done + BK, tile = done / BK % 2;
    const bool more = next < count;
    if (more && next % kStagedTerms == 0) block.each([&](int thread) { stage(thread, next); });
    block.each([&](int thread) {
      if (more) read(thread, next);
      multiply(thread, shared.tiles[tile]);
      if (more) keep(thread, shared.tiles[1 - tile]);
    });
  }
}

// Whether `sums` are those of all the tile's slices now. Whoever comes last to a join sums its slices, in their order, and
// goes on as one slice of the next.
template <class V, class Block>
SPECTRAL_BLOCK bool join_slices(Block& block, const BlockArguments& a, const BlockUnit& unit, typename Block::template PerThread<BlockSums<V>>& sums) {
  constexpr int kRuns = V::TM * V::TN / 4;
  BlockFour* partial = reinterpret_cast<BlockFour*>(a.partial + unit.partial_at);
  int32_t* counter = a.counters + unit.counter;
  int64_t apart = kRuns * kBlockThreads;
  for (int slice = unit.slice, slices = unit.slices; slices > 1; apart *= kJoinedSlices) {
    block.each([&](int thread) {
      SPECTRAL_UNROLL
      for (int run = 0; run < kRuns; ++run) {
        const float* from = &sums[thread].x[run * 4 / V::TN][run * 4 % V::TN];
        partial[slice * apart + run * kBlockThreads + thread] = {{from[0], from[1], from[2], from[3]}};
      }
    });
    const int join = slice / kJoinedSlices, first = join * kJoinedSlices;
    const int joined = slices - first < kJoinedSlices ? slices - first : kJoinedSlices;
    if (!block.is_last(counter + join, joined)) return false;
    block.each([&](int thread) {
      SPECTRAL_UNROLL
      for (int run = 0; run < kRuns; ++run)
        SPECTRAL_UNROLL
        for (int i = 0; i < 4; ++i) sums[thread].x[run * 4 / V::TN][run * 4 % V::TN + i] = 0.0f;
      for (int s = first; s < first + joined; ++s) {
        BlockFour read[kRuns];
        SPECTRAL_UNROLL
        for (int run = 0; run < kRuns; ++run) read[run] = block.fresh(partial + s * apart + run * kBlockThreads + thread);
        SPECTRAL_UNROLL
        for (int run = 0; run < kRuns; ++run)
          SPECTRAL_UNROLL
          for (int i = 0; i < 4; ++i) sums[thread].x[run * 4 / V::TN][run * 4 % V::TN + i] += read[run].x[i];
      }
    });
    slice = join;
    slices = (slices + kJoinedSlices - 1) / kJoinedSlices;
    counter += slices;
  }
  return true;
}

}  // namespace spectral

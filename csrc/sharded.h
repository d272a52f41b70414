// What the step of sharded weights adds around its all-reduce, matrix by matrix (spectral_ops/sharding/read.py).
//   pack      ||y|| = s (v . v+) and z = ||y|| s v+ of this rank's rows, in units of 2^exponent, into what is summed
//   finish    of the sums: sigma = ||z|| / ||y||, v = z / ||z||, this rank's u = y / ||y||, the term of R
#pragma once
#include <cstdint>

namespace spectral {

// As Python lays it out, for kernels/sharded.py too.
struct ShardedMatrix {
  int64_t v_at, n, u_at, rows;  // rows: on this rank
  int64_t z_counts, y_counts;   // whether this rank's share enters the sums: of what several ranks hold, one speaks
  int64_t is_empty;             // on all ranks together: counts for nothing
};

struct ShardedSums {
  double *z, *squares, *y_norms;  // y_norms: of this rank's rows
};

template <class C>
struct PackArguments {
  const ShardedMatrix* matrices;
  int64_t count;
  const C* v;
  const int32_t* exponents;
  const C *local_sigma, *local_v;  // what the read of the shard with v gave
  ShardedSums sums;
  int threads;
};
template <class C>
void pack(const PackArguments<C>& arguments);

template <class C>
struct FinishArguments {
  const ShardedMatrix* matrices;
  int64_t count;
  ShardedSums sums;
  const double *targets, *scales;
  double exponent;
  C* v;  // the next vectors, in place
  int32_t* exponents;
  C *sigma, *u;
  const C* local_u;
  double* terms;
  int threads;
};
template <class C>
void finish(const FinishArguments<C>& arguments);

}  // namespace spectral

// The table of layers: what is read as which matrices, where, and how the work is cut. Built once for a set of shapes,
// strides and types; the addresses of weights and gradients come with every call.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "dtypes.h"
#include "kernels.h"
#include "threads.h"

namespace spectral {

enum class Kind : int { matrix = 0, bias = 1, scale = 2, shift = 3, plain = 4 };  // spectral_ops/ops/layout.py: Kind

// parts x rows x n elements anywhere in memory. Strides in elements.
struct View {
  DType dtype;
  int64_t part_stride = 0, row_stride = 0;
  bool dense = true;            // the n elements of a row lie side by side, in the order `order`
  std::vector<int32_t> order;   // position p of a dense row holds logical column order[p]; empty where p = column
  std::vector<int64_t> offset;  // not dense: where logical column j lies in its row
};

struct Item {
  Kind kind;
  int64_t parts, rows, n;  // a vector parameter has rows = 1
  double target, scale;    // t, and this parameter's share of the strength
  View w;
  View g;                  // of its gradient; meaningful where has_gradient
  bool has_gradient;
  int64_t v_at, u_at, index;   // first element in v, in u, first matrix in sigma and exponents
  int64_t tile_rows = 1, tiles = 0;  // a part is read in `tiles` strips of `tile_rows` rows
  int64_t padded = 0;              // n rounded up to whole registers
  int64_t partial_at = 0, y_at = 0, prepared_at = 0, column_at = 0, term_at = 0;  // in the workspace, see Table::lay_out
  int64_t bytes;               // of one part
};

// A unit of work: rows of one part, several whole small parts, a vector parameter, or elements of a plain one.
struct Tile {
  int32_t item;
  int64_t part_begin, part_end, row_begin, row_end, strip;
};

struct ItemSpec {
  int kind, dtype;
  double target, scale;
  std::vector<int64_t> sizes, strides;  // (parts, rows, columns...) of a matrix, (parts, n...) of a vector
  int gradient_dtype;
  std::vector<int64_t> gradient_strides;  // empty: no gradient is asked for
  int64_t v_at, u_at, index;
};

class Table {
 public:
  explicit Table(const std::vector<ItemSpec>& specs);

  std::vector<Item> items;
  std::vector<Tile> read_tiles;     // strips of matrices, pieces of plain parameters, then vector parameters
  // Of read_tiles: to each thread a range of every parameter's rows, as torch's own operations have it, whose gradients
  // then lie in that core's cache. Cores that share none pay for every row that changes hands. Only under `lock`.
  const Shares& read_shares(int threads);
  std::vector<Tile> combine_tiles;  // whole parts (strip = block of columns of wide ones)
  std::vector<Tile> wide_tiles, unread_tiles;  // of these: the wide ones; those without a row or column
  bool is_double = false;           // vectors and sums in double
  bool any_reordered = false;       // some dense row is in another order than its logical columns
  int64_t matrices = 0, u_size = 0, terms = 0;

  // Scratch for one running call; calls that overlap wait for one another.
  std::mutex lock;
  template <class C>
  struct Workspace {
    std::vector<C> partial, y, prepared, columns;
    std::vector<double> terms, coefficient;
    std::vector<int> shift_v, shift_y;  // powers of two applied to v and to y, of each part
    std::vector<double> squares;  // ||z||^2 of each part that is not wide
    std::vector<std::atomic<int32_t>> unread;  // strips of each part that are still to be read
  };
  Workspace<float> f32;
  Workspace<double> f64;

  // Columns are combined in blocks of this many, so that one wide matrix keeps every thread busy.
  static constexpr int64_t kColumnBlock = 4096;

 private:
  Shares read_shares_;

  void lay_out();
};

template <class C>
const RowKernels<C>& row_kernels(DType dtype);
template <>
inline const RowKernels<float>& row_kernels<float>(DType dtype) {
  return dtype == DType::f32 ? kernels().f32 : dtype == DType::bf16 ? kernels().bf16 : kernels().f16;
}
template <>
inline const RowKernels<double>& row_kernels<double>(DType) {
  return kernels().f64;
}

inline size_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

}  // namespace spectral

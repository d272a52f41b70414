// The table of conv operators: for every layer its two products with a vector and how they are cut into units of work.
// Built once for a set of shapes, strides, types and input sizes; addresses come with every call.
//
// A convolution takes the fine grid to the coarse one: coarse[c][o] = sum over f, t of w[c][f][t] fine[f][o*s + t*d - before].
// Its adjoint goes the other way; a transposed layer is the adjoint of the convolution with its weight.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "conv_kernels.h"
#include "dtypes.h"

namespace spectral {

constexpr int kConvDims = 3;  // grids of fewer dimensions have leading ones

// Plain numbers, the same for host and device.
struct ConvShape {
  int64_t parts, coarse_channels, fine_channels;  // channels of one part (group)
  int32_t kernel[kConvDims], coarse[kConvDims], fine[kConvDims];
  int32_t stride[kConvDims], dilation[kConvDims], before[kConvDims];
  bool circular, transposed;

  int64_t taps() const { return int64_t{kernel[0]} * kernel[1] * kernel[2]; }
  int64_t coarse_size() const { return int64_t{coarse[0]} * coarse[1] * coarse[2]; }
  int64_t fine_size() const { return int64_t{fine[0]} * fine[1] * fine[2]; }
  int64_t rows() const { return transposed ? fine_channels * fine_size() : coarse_channels * coarse_size(); }
  // Without a channel or tap, so that there is no map; one that sees nothing but padding is the zero map.
  bool is_empty() const { return coarse_channels == 0 || fine_channels == 0 || taps() == 0 || coarse_size() == 0; }
  int64_t columns() const { return transposed ? coarse_channels * coarse_size() : fine_channels * fine_size(); }
};

// Where the elements of a weight or gradient lie, in elements.
struct ConvStrides {
  DType dtype;
  int64_t part, coarse, fine;
  std::vector<ptrdiff_t> tap;
};

// One of the products: every row of output channels against `groups` groups of output positions. A convolution is one pass;
// its adjoint is one for every remainder that a position leaves by the strides, since each meets other taps.
struct ConvPass {
  bool to_coarse;
  std::vector<ptrdiff_t> tap_weight, tap_source, tap_panel[2];  // panel: where a tap's lanes lie, packed, of 1 or 2 groups
  std::vector<ptrdiff_t> lane_source, lane_target;              // of every lane; of an idle one, those of the first
  std::vector<int32_t> lanes;                                   // of a group that are not idle
  std::vector<bool> source_dense, target_dense;
  int64_t groups() const { return static_cast<int64_t>(lanes.size()); }
};

// Elements at, at + 1, ... of one grid are elements from, from + step, ... of another.
struct ConvRun {
  int32_t at, from, step, count;
};

struct ConvItem {
  ConvShape shape;
  ConvStrides w, g;
  bool has_gradient;
  double target, scale;
  int64_t v_at, u_at, index, term_at;
  std::vector<ConvPass> to_coarse, to_fine;
  // The fine grid with its padding, stored one remainder by the strides after the other ("split"), so that neighbouring
  // windows read neighbouring elements: what of it is what element of the grid, for all that windows see.
  int64_t split_size;
  std::vector<ConvRun> split;
  int64_t padded_size;  // the coarse grid with a margin wide enough for the adjoint's reach
  std::vector<ConvRun> padded;
  std::vector<ptrdiff_t> lane_column;  // of the gradient's lanes, (fine channel, tap): where they lie in a split grid
  std::vector<ptrdiff_t> lane_gradient;  // and in the gradient
  bool gradient_dense;                   // lane_gradient counts 0, 1, 2, ...
  std::vector<ptrdiff_t> position_split, position_panel[2];  // of coarse positions
  // Of part 0 in the workspace, and how many elements a part has there.
  int64_t coarse_at, padded_at, fine_at, split_at, target_at;
  int64_t coarse_part, padded_part, fine_part, split_part;
};

// Rows of output channels times groups of lanes of one pass of one part.
struct ConvUnit {
  int32_t item, pass;
  int64_t part, row_begin, row_end, group_begin, group_end;
};

struct ConvSpec {
  int dtype;
  double target, scale;
  std::vector<int64_t> sizes, strides;  // (parts, coarse channels, fine channels, kernel...)
  int gradient_dtype;
  std::vector<int64_t> gradient_strides;  // empty: no gradient is asked for
  int64_t v_at, u_at, index;
  std::vector<int64_t> coarse, fine, stride, dilation, before;
  bool circular, transposed;
};

class ConvTable {
 public:
  explicit ConvTable(const std::vector<ConvSpec>& specs);

  std::vector<ConvItem> items;
  std::vector<std::pair<int32_t, int64_t>> parts;  // (item, part) of every term
  std::vector<ConvUnit> first, second, gradient;   // of W v, of W'u, of the gradient
  std::vector<int64_t> first_at, second_at;        // where a term's units begin in them; one more for the end
  bool is_double = false;
  int64_t terms = 0, workspace_size = 0;

  // Scratch for one running call; calls that overlap wait for one another.
  std::mutex lock;
  template <class C>
  struct Workspace {
    std::vector<C> elements;
    std::vector<double> terms, coefficient;
    std::vector<char> given_up;                    // W v = 0, or an element of W is not finite
    std::vector<int> shift;                        // power of two that v and u are multiplied by, of each part
    std::vector<std::atomic<int32_t>> unfinished;  // units of a part that are still to be done
  };
  Workspace<float> f32;
  Workspace<double> f64;

 private:
  void lay_out(ConvItem& item, int32_t id);
};

}  // namespace spectral

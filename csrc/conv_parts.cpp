// Products of one conv operator with one vector.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "conv_step.h"
#include "table.h"

namespace spectral {
namespace {

// Terms of a product that are summed before the next rows are begun: their lanes, packed, stay in the L1 cache.
constexpr int64_t kBlockTerms = 256;
// Where a weight's element meets one group of lanes only, memory is the limit, and long pieces of its rows are quicker to
// read: packed lanes in the L2 cache.
constexpr int64_t kLongBlockTerms = 4096;
// Rows of a gradient that are multiplied before they are added.
constexpr int64_t kRowsTogether = 32;

template <class C>
C* scratch(std::vector<C>& buffer, int64_t size) {
  if (buffer.size() < static_cast<size_t>(size)) buffer.resize(static_cast<size_t>(size));
  return buffer.data();
}

const ptrdiff_t* counting(int64_t count) {  // 0, 1, 2, ...
  thread_local std::vector<ptrdiff_t> numbers;
  if (numbers.size() < static_cast<size_t>(count)) {
    numbers.resize(static_cast<size_t>(count));
    std::iota(numbers.begin(), numbers.end(), ptrdiff_t{0});
  }
  return numbers.data();
}

// out[at...] = factor * x[from...]
template <class C>
void copy_runs(const std::vector<ConvRun>& runs, const C* x, C factor, C* out) {
  for (const ConvRun& run : runs) {
    C* __restrict to = out + run.at;
    const C* __restrict from = x + run.from;
    if (run.step == 1)
      for (int32_t i = 0; i < run.count; ++i) to[i] = factor * from[i];
    else
      for (int32_t i = 0; i < run.count; ++i) to[i] = factor * from[run.step * i];
  }
}

template <class C>
struct Buffers {
  std::vector<C> tile, panel, widened;
  std::vector<int64_t> offset;
};
template <class C>
Buffers<C>& buffers() {
  thread_local Buffers<C> own;
  return own;
}

template <class C>
constexpr DType own_dtype = sizeof(C) == 8 ? DType::f64 : DType::f32;

}  // namespace

template <class C>
const char* ConvParts<C>::weight(int32_t item, int64_t part) const {
  const ConvItem& it = table_.items[static_cast<size_t>(item)];
  return static_cast<const char*>(weights_[item]) + part * it.w.part * static_cast<int64_t>(element_size(it.w.dtype));
}

template <class C>
void ConvParts<C>::load_fine(const ConvItem& item, int64_t part, const C* x, C factor) const {
  C* out = elements_ + item.split_at + part * item.split_part;
  for (int64_t f = 0; f < item.shape.fine_channels; ++f, out += item.split_size, x += item.shape.fine_size())
    copy_runs(item.split, x, factor, out);
}

template <class C>
void ConvParts<C>::load_coarse(const ConvItem& item, int64_t part, const C* x, C factor) const {
  C* out = elements_ + item.padded_at + part * item.padded_part;
  const int64_t size = item.shape.coarse_size();
  for (int64_t c = 0; c < item.shape.coarse_channels; ++c, out += item.padded_size, x += size)
    copy_runs(item.padded, x, factor, out);
}

template <class C>
void ConvParts<C>::merge(const ConvItem& item, int64_t part, bool second) const {
  if (item.shape.transposed == second) return;  // the product with the convolution itself is dense already
  const C* from = elements_ + item.target_at + part * item.split_part;
  C* out = fine(item, part);
  const int64_t size = item.shape.fine_size();
  std::fill_n(out, item.shape.fine_channels * size, C(0));
  for (int64_t f = 0; f < item.shape.fine_channels; ++f, from += item.split_size, out += size)
    for (const ConvRun& run : item.split)
      for (int32_t i = 0; i < run.count; ++i) out[run.from + run.step * i] += from[run.at + i];
}

template <class C>
void ConvParts<C>::run(const ConvUnit& unit, bool second) const {
  constexpr int64_t L = kConvLanes<C>;
  const ConvItem& item = table_.items[static_cast<size_t>(unit.item)];
  const bool forward = item.shape.transposed == second;
  const ConvPass& pass = (forward ? item.to_coarse : item.to_fine)[static_cast<size_t>(unit.pass)];
  const ConvKernels<C>& kernels = conv_kernels(C());
  const C* source = elements_ + (forward ? item.split_at + unit.part * item.split_part : item.padded_at + unit.part * item.padded_part);
  const int64_t source_channel = forward ? item.split_size : item.padded_size;
  C* target = forward ? coarse(item, unit.part) : elements_ + item.target_at + unit.part * item.split_part;
  const int64_t target_row = forward ? item.shape.coarse_size() : item.split_size;
  const int64_t channels = forward ? item.shape.fine_channels : item.shape.coarse_channels;
  const auto taps = static_cast<int64_t>(pass.tap_source.size());
  const int64_t row_stride = forward ? item.w.coarse : item.w.fine, channel_stride = forward ? item.w.fine : item.w.coarse;
  const int64_t rows = unit.row_end - unit.row_begin;
  const int64_t block = std::max<int64_t>(1, (pass.groups() == 1 ? kLongBlockTerms : kBlockTerms) / std::max<int64_t>(1, taps));
  const bool as_it_is = item.w.dtype == own_dtype<C>;
  const auto size = static_cast<int64_t>(element_size(item.w.dtype));
  const char* w = weight(unit.item, unit.part) + unit.row_begin * row_stride * size;
  Buffers<C>& own = buffers<C>();
  C* tile = scratch(own.tile, rows * 2 * L);
  if (!as_it_is) {
    own.offset.clear();
    for (int64_t channel = 0; channel < block; ++channel)
      for (const ptrdiff_t tap : pass.tap_weight) own.offset.push_back(channel * channel_stride + tap);
  }
  for (int64_t group = unit.group_begin; group < unit.group_end; group += 2) {
    const int64_t groups = std::min<int64_t>(2, unit.group_end - group);
    const auto g = static_cast<size_t>(group);
    const ptrdiff_t* lane_source = pass.lane_source.data() + group * L;
    const bool dense = pass.source_dense[g] && (groups == 1 || pass.source_dense[g + 1]);
    for (int64_t channel = 0; channel < channels; channel += block) {
      const int64_t count = std::min(block, channels - channel);
      ConvProduct<C> p;
      p.channels = static_cast<size_t>(count);
      p.taps = static_cast<size_t>(taps);
      const C* from = source + channel * source_channel;
      if (dense) {
        p.b = from + lane_source[0];
        p.b_channel = source_channel;
        p.b_tap = pass.tap_source.data();
        p.b_second = groups == 2 ? lane_source[L] - lane_source[0] : 0;
      } else {
        C* panel = scratch(own.panel, count * taps * groups * L);
        kernels.pack(from, p.channels, source_channel, pass.tap_source.data(), p.taps, lane_source, static_cast<size_t>(groups * L), panel);
        p.b = panel;
        p.b_channel = taps * groups * L;
        p.b_tap = pass.tap_panel[groups - 1].data();
        p.b_second = L;
      }
      const char* block_of_w = w + channel * channel_stride * size;
      if (as_it_is) {
        p.a = reinterpret_cast<const C*>(block_of_w);
        p.a_row = row_stride;
        p.a_channel = channel_stride;
        p.a_tap = pass.tap_weight.data();
      } else {
        const int64_t terms = count * taps;
        C* widened = scratch(own.widened, rows * terms);
        row_kernels<C>(item.w.dtype).pack_rows(block_of_w, row_stride, static_cast<size_t>(rows), static_cast<size_t>(terms), own.offset.data(), widened, static_cast<size_t>(terms));
        p.a = widened;
        p.a_row = terms;
        p.a_channel = taps;
        p.a_tap = counting(taps);
      }
      kernels.multiply(p, static_cast<size_t>(rows), static_cast<size_t>(groups), channel > 0, tile, static_cast<size_t>(groups * L));
    }
    if (channels == 0 || taps == 0) std::fill_n(tile, rows * groups * L, C(0));
    for (int64_t i = 0; i < groups; ++i) {
      const ptrdiff_t* to = pass.lane_target.data() + (group + i) * L;
      const auto lanes = static_cast<int64_t>(pass.lanes[g + static_cast<size_t>(i)]);
      const bool target_dense = pass.target_dense[g + static_cast<size_t>(i)];
      for (int64_t r = 0; r < rows; ++r) {
        const C* x = tile + (r * groups + i) * L;
        C* out = target + (unit.row_begin + r) * target_row;
        if (target_dense && lanes == L)
          std::copy_n(x, L, out + to[0]);  // of a known length: no call
        else if (target_dense)
          std::copy_n(x, lanes, out + to[0]);
        else
          for (int64_t lane = 0; lane < lanes; ++lane) out[to[lane]] = x[lane];
      }
    }
  }
}

template <class C>
void ConvParts<C>::add_gradient(const ConvUnit& unit, const C* coarse_side, void* gradient, double factor, bool overwrite) const {
  constexpr int64_t L = kConvLanes<C>;
  const ConvItem& item = table_.items[static_cast<size_t>(unit.item)];
  const ConvKernels<C>& kernels = conv_kernels(C());
  const C* source = elements_ + item.split_at + unit.part * item.split_part;
  const int64_t positions = item.shape.coarse_size(), rows = unit.row_end - unit.row_begin;
  const auto columns = static_cast<int64_t>(item.lane_column.size());
  const auto size = static_cast<int64_t>(element_size(item.g.dtype));
  char* g = static_cast<char*>(gradient) + (unit.part * item.g.part + unit.row_begin * item.g.coarse) * size;
  const int64_t first = unit.group_begin * L, width = unit.group_end * L - first, count = std::min(width, columns - first);
  const int64_t together = positions <= kBlockTerms ? std::min(kRowsTogether, rows) : rows;  // else sums wait for the next block
  Buffers<C>& own = buffers<C>();
  C* tile = scratch(own.tile, together * width);
  C* panel = scratch(own.panel, std::min(positions, kBlockTerms) * width);
  for (int64_t begin = 0; begin < positions; begin += kBlockTerms) {
    const int64_t terms = std::min(kBlockTerms, positions - begin);
    for (int64_t lane = 0; lane < width; lane += 2 * L) {
      ptrdiff_t lane_at[2 * L];
      const int64_t lanes = std::min(2 * L, width - lane);
      for (int64_t i = 0; i < lanes; ++i) lane_at[i] = item.lane_column[static_cast<size_t>(std::min(first + lane + i, columns - 1))];
      kernels.pack(source, 1, 0, item.position_split.data() + begin, static_cast<size_t>(terms), lane_at, static_cast<size_t>(lanes), panel + lane * terms);
    }
    for (int64_t row = 0; row < rows; row += together) {
      const auto some = static_cast<size_t>(std::min(together, rows - row));
      for (int64_t lane = 0; lane < width; lane += 2 * L) {
        const int64_t groups = std::min<int64_t>(2, (width - lane) / L);
        ConvProduct<C> p;
        p.a = coarse_side + (unit.row_begin + row) * positions + begin;
        p.a_row = positions;
        p.a_channel = 0;
        p.a_tap = counting(terms);
        p.b = panel + lane * terms;
        p.b_channel = 0;
        p.b_second = L;
        p.b_tap = item.position_panel[groups - 1].data();
        p.channels = 1;
        p.taps = static_cast<size_t>(terms);
        kernels.multiply(p, some, static_cast<size_t>(groups), begin > 0, tile + lane, static_cast<size_t>(width));
      }
      if (begin + terms == positions)
        kernels.add_tile[static_cast<int>(item.g.dtype)](g + row * item.g.coarse * size, item.g.coarse, some, item.lane_gradient.data() + first,
                                                         item.gradient_dense, static_cast<size_t>(count), tile, static_cast<size_t>(width),
                                                         static_cast<C>(factor), overwrite);
    }
  }
}

template <class C>
double ConvParts<C>::largest(const ConvItem& item, int64_t part) const {
  const char* w = weight(static_cast<int32_t>(&item - table_.items.data()), part);
  const auto load = row_kernels<C>(item.w.dtype).load;
  double top = 0;
  for (int64_t c = 0; c < item.shape.coarse_channels; ++c)
    for (int64_t f = 0; f < item.shape.fine_channels; ++f)
      for (const ptrdiff_t tap : item.w.tap) {
        const double x = std::fabs(load(w, c * item.w.coarse + f * item.w.fine + tap));
        if (!std::isfinite(x)) return std::nan("");
        top = std::max(top, x);
      }
  return top;
}

template class ConvParts<float>;
template class ConvParts<double>;

}  // namespace spectral

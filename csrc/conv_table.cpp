#include "conv_table.h"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>

namespace spectral {
namespace {

// A unit of this many multiply-adds is a few ten microseconds, long beside claiming it and short beside a thread's share.
constexpr int64_t kUnitWork = 2 << 20;
// Below this many rows a unit's packing of its lanes is no longer little beside its products.
constexpr int64_t kMinRows = 64;
// Rows of a gradient lie far apart, and memory wants each written over a length: lanes of a gradient that are packed and
// added together, up to so many elements packed, half of a usual L2 cache.
constexpr int64_t kMostLanes = 512, kPanelElements = 1 << 15;
// Lanes may be left idle at the ends of rows, where that spares the packing, up to this share.
constexpr double kMostIdle = 0.25;

using Triple = std::array<int64_t, kConvDims>;

Triple triple(const std::vector<int64_t>& numbers, int64_t missing) {
  if (numbers.empty() || numbers.size() > kConvDims) throw std::invalid_argument("ConvTable: expected 1 to 3 dimensions");
  Triple out;
  out.fill(missing);
  std::copy(numbers.rbegin(), numbers.rend(), out.rbegin());
  return out;
}

int64_t product(const Triple& x) { return x[0] * x[1] * x[2]; }
Triple row_major(const Triple& sizes) { return {sizes[1] * sizes[2], sizes[2], 1}; }
int64_t dot(const Triple& x, const Triple& y) { return x[0] * y[0] + x[1] * y[1] + x[2] * y[2]; }
Triple of(const int32_t (&x)[kConvDims]) { return {x[0], x[1], x[2]}; }

// Calls use(index) for every index of a grid, the last dimension innermost.
template <class Use>
void for_grid(const Triple& sizes, Use use) {
  Triple i;
  for (i[0] = 0; i[0] < sizes[0]; ++i[0])
    for (i[1] = 0; i[1] < sizes[1]; ++i[1])
      for (i[2] = 0; i[2] < sizes[2]; ++i[2]) use(i);
}

bool counts_up(const ptrdiff_t* x, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    if (x[i] != x[0] + i) return false;
  return true;
}

// Positions of a grid as groups of lanes: row by row where few lanes stay idle then, else one run.
void set_lanes(ConvPass& pass, const Triple& sizes, int64_t width, const std::vector<ptrdiff_t>& source, const std::vector<ptrdiff_t>& target) {
  const auto positions = static_cast<int64_t>(source.size());
  const int64_t row = sizes[2], in_rows = (row + width - 1) / width * width;
  const int64_t run = static_cast<double>(in_rows) <= static_cast<double>(row) / (1 - kMostIdle) ? row : positions;
  for (int64_t start = 0; start < positions; start += run)
    for (int64_t first = start; first < start + run; first += width) {
      const int64_t count = std::min(width, start + run - first);
      for (int64_t lane = 0; lane < width; ++lane) {
        const auto at = static_cast<size_t>(lane < count ? first + lane : first);
        pass.lane_source.push_back(source[at]);
        pass.lane_target.push_back(target[at]);
      }
      pass.lanes.push_back(static_cast<int32_t>(count));
      pass.source_dense.push_back(counts_up(source.data() + first, count));
      pass.target_dense.push_back(counts_up(target.data() + first, count));
    }
}

// Pairs (element of one grid, element of another) as runs.
std::vector<ConvRun> to_runs(std::vector<std::pair<int32_t, int32_t>> pairs) {
  std::sort(pairs.begin(), pairs.end());
  std::vector<ConvRun> runs;
  for (const auto& [at, from] : pairs) {
    ConvRun* last = runs.empty() ? nullptr : &runs.back();
    if (last != nullptr && at == last->at + last->count && (last->count == 1 || from == last->from + last->step * last->count)) {
      if (last->count == 1) last->step = from - last->from;
      ++last->count;
    } else {
      runs.push_back({at, from, 1, 1});
    }
  }
  return runs;
}

void set_panel(std::vector<ptrdiff_t> (&panel)[2], int64_t terms, int64_t width) {
  for (int64_t i = 0; i < 2; ++i)
    for (int64_t t = 0; t < terms; ++t) panel[i].push_back(t * width * (i + 1));
}

ConvStrides strides_of(int dtype, const std::vector<int64_t>& strides, const Triple& kernel) {
  ConvStrides out;
  out.dtype = static_cast<DType>(dtype);
  out.part = strides[0];
  out.coarse = strides[1];
  out.fine = strides[2];
  const Triple tap = triple({strides.begin() + 3, strides.end()}, 0);
  for_grid(kernel, [&](const Triple& t) { out.tap.push_back(dot(t, tap)); });
  return out;
}

ConvShape shape_of(const ConvSpec& spec) {
  ConvShape shape;
  shape.parts = spec.sizes[0];
  shape.coarse_channels = spec.sizes[1];
  shape.fine_channels = spec.sizes[2];
  const auto set = [](int32_t (&out)[kConvDims], const std::vector<int64_t>& numbers, int64_t missing) {
    const Triple x = triple(numbers, missing);
    for (int i = 0; i < kConvDims; ++i) {
      if (x[static_cast<size_t>(i)] > INT32_MAX) throw std::invalid_argument("ConvTable: expected sizes below 2^31");
      out[i] = static_cast<int32_t>(x[static_cast<size_t>(i)]);
    }
  };
  set(shape.kernel, {spec.sizes.begin() + 3, spec.sizes.end()}, 1);
  set(shape.coarse, spec.coarse, 1);
  set(shape.fine, spec.fine, 1);
  set(shape.stride, spec.stride, 1);
  set(shape.dilation, spec.dilation, 1);
  set(shape.before, spec.before, 0);
  shape.circular = spec.circular;
  shape.transposed = spec.transposed;
  return shape;
}

int64_t floor_mod(int64_t x, int64_t n) { return (x % n + n) % n; }

}  // namespace

ConvTable::ConvTable(const std::vector<ConvSpec>& specs) {
  for (const ConvSpec& spec : specs) {
    if (spec.sizes.size() < 4 || spec.strides.size() != spec.sizes.size() ||
        (!spec.gradient_strides.empty() && spec.gradient_strides.size() != spec.sizes.size()))
      throw std::invalid_argument("ConvTable: expected sizes and strides of (parts, coarse channels, fine channels, kernel...)");
    ConvItem item{};
    item.shape = shape_of(spec);
    item.w = strides_of(spec.dtype, spec.strides, of(item.shape.kernel));
    item.has_gradient = !spec.gradient_strides.empty();
    if (item.has_gradient) item.g = strides_of(spec.gradient_dtype, spec.gradient_strides, of(item.shape.kernel));
    item.target = spec.target;
    item.scale = spec.scale;
    item.v_at = spec.v_at;
    item.u_at = spec.u_at;
    item.index = spec.index;
    const bool item_double = item.w.dtype == DType::f64;
    if (!items.empty() && is_double != item_double) throw std::invalid_argument("ConvTable: expected all float64 or none, got both");
    is_double = item_double;
    items.push_back(std::move(item));
  }
  for (size_t i = 0; i < items.size(); ++i) lay_out(items[i], static_cast<int32_t>(i));
  first_at.push_back(static_cast<int64_t>(first.size()));
  second_at.push_back(static_cast<int64_t>(second.size()));
  const auto size_workspace = [&](auto& space) {
    space.elements.resize(static_cast<size_t>(workspace_size) + 64);  // groups of lanes may be read past the last element
    space.terms.resize(static_cast<size_t>(terms));
    space.coefficient.resize(static_cast<size_t>(terms));
    space.given_up.resize(static_cast<size_t>(terms));
    space.shift.resize(static_cast<size_t>(terms));
    space.unfinished = std::vector<std::atomic<int32_t>>(static_cast<size_t>(terms));
  };
  if (is_double)
    size_workspace(f64);
  else
    size_workspace(f32);
}

void ConvTable::lay_out(ConvItem& item, int32_t id) {
  const ConvShape& shape = item.shape;
  const Triple kernel = of(shape.kernel), coarse = of(shape.coarse), fine = of(shape.fine);
  const Triple stride = of(shape.stride), dilation = of(shape.dilation), before = of(shape.before);
  const int64_t width = is_double ? kConvLanes<double> : kConvLanes<float>;
  item.term_at = terms;
  terms += shape.parts;

  // The fine grid, padded so that it holds every window and no more, split by what positions leave by the strides.
  Triple length, seen;  // of it in each dimension: of one remainder, and in all
  for (size_t i = 0; i < kConvDims; ++i) {
    seen[i] = (coarse[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1;
    length[i] = (seen[i] + stride[i] - 1) / stride[i];
  }
  const Triple plane = row_major(length), remainders = row_major(stride);
  const auto place = [&](const Triple& q) {  // of a padded position in the split grid
    Triple quotient, rest;
    for (size_t i = 0; i < kConvDims; ++i) {
      quotient[i] = q[i] / stride[i];
      rest[i] = q[i] % stride[i];
    }
    return dot(rest, remainders) * product(length) + dot(quotient, plane);
  };
  item.split_size = product(length) * product(stride);
  if (item.split_size > INT32_MAX || shape.fine_size() > INT32_MAX || shape.coarse_size() > INT32_MAX)
    throw std::invalid_argument("ConvTable: expected grids of fewer than 2^31 positions");
  std::vector<std::pair<int32_t, int32_t>> pairs;
  for_grid(seen, [&](const Triple& q) {
    Triple inside;
    for (size_t i = 0; i < kConvDims; ++i) {
      inside[i] = q[i] - before[i];
      if (shape.circular) inside[i] = floor_mod(inside[i], fine[i]);
      if (inside[i] < 0 || inside[i] >= fine[i]) return;
    }
    pairs.emplace_back(static_cast<int32_t>(place(q)), static_cast<int32_t>(dot(inside, row_major(fine))));
  });
  item.split = to_runs(std::move(pairs));

  // A convolution: window o sees place(o*s + t*d) = place(t*d) + o in the plane.
  ConvPass forward{};
  forward.to_coarse = true;
  for_grid(kernel, [&](const Triple& t) {
    Triple q;
    for (size_t i = 0; i < kConvDims; ++i) q[i] = t[i] * dilation[i];
    forward.tap_source.push_back(place(q));
  });
  forward.tap_weight = item.w.tap;
  set_panel(forward.tap_panel, shape.taps(), width);
  std::vector<ptrdiff_t> source, target;
  for_grid(coarse, [&](const Triple& o) {
    source.push_back(dot(o, plane));
    target.push_back(static_cast<ptrdiff_t>(target.size()));
  });
  set_lanes(forward, coarse, width, source, target);
  item.position_split = source;
  set_panel(item.position_panel, static_cast<int64_t>(source.size()), width);
  for (int64_t f = 0; f < shape.fine_channels; ++f)
    for (size_t t = 0; t < forward.tap_source.size(); ++t) {
      item.lane_column.push_back(f * item.split_size + forward.tap_source[t]);
      if (item.has_gradient) item.lane_gradient.push_back(f * item.g.fine + item.g.tap[t]);
    }
  item.gradient_dense = counts_up(item.lane_gradient.data(), static_cast<int64_t>(item.lane_gradient.size()));
  item.to_coarse.push_back(std::move(forward));

  // Its adjoint: position J of remainder r gets w[t] of every tap with t*d = r mod s, from o = J - (t*d - r) / s.
  Triple margin, margined;
  for (size_t i = 0; i < kConvDims; ++i) {
    margin[i] = dilation[i] * (kernel[i] - 1) / stride[i];
    margined[i] = margin[i] + length[i];
  }
  const Triple pitch = row_major(margined);
  item.padded_size = product(margined);
  pairs.clear();
  for_grid(coarse, [&](const Triple& o) {
    const int64_t at = dot({o[0] + margin[0], o[1] + margin[1], o[2] + margin[2]}, pitch);
    pairs.emplace_back(static_cast<int32_t>(at), static_cast<int32_t>(dot(o, row_major(coarse))));
  });
  item.padded = to_runs(std::move(pairs));
  for_grid(stride, [&](const Triple& rest) {
    ConvPass pass{};
    pass.to_coarse = false;
    size_t number = 0;
    for_grid(kernel, [&](const Triple& t) {
      const size_t tap = number++;
      ptrdiff_t at = 0;
      for (size_t i = 0; i < kConvDims; ++i) {
        if (t[i] * dilation[i] % stride[i] != rest[i]) return;
        at -= (t[i] * dilation[i] - rest[i]) / stride[i] * pitch[i];
      }
      pass.tap_source.push_back(at);
      pass.tap_weight.push_back(item.w.tap[tap]);
    });
    set_panel(pass.tap_panel, static_cast<int64_t>(pass.tap_source.size()), width);
    // Of the padded grid's positions those that lie in the grid; all of them where padding wraps around.
    Triple low, count;
    for (size_t i = 0; i < kConvDims; ++i) {
      const int64_t begin = shape.circular ? 0 : before[i], end = shape.circular ? seen[i] : std::min(seen[i], before[i] + fine[i]);
      low[i] = std::max<int64_t>(0, begin - rest[i] + stride[i] - 1) / stride[i];
      count[i] = std::max<int64_t>(0, (end - rest[i] + stride[i] - 1) / stride[i] - low[i]);
      if (end <= rest[i]) count[i] = 0;
    }
    std::vector<ptrdiff_t> from, to;
    for_grid(count, [&](const Triple& j) {
      const Triple at = {low[0] + j[0], low[1] + j[1], low[2] + j[2]};
      from.push_back(dot({at[0] + margin[0], at[1] + margin[1], at[2] + margin[2]}, pitch));
      to.push_back(dot(rest, remainders) * product(length) + dot(at, plane));
    });
    if (from.empty()) return;
    set_lanes(pass, count, width, from, to);
    item.to_fine.push_back(std::move(pass));
  });

  const auto reserve = [&](int64_t& at, int64_t& part, int64_t size) {
    part = (size + width - 1) / width * width;
    at = workspace_size;
    workspace_size += part * shape.parts;
  };
  reserve(item.coarse_at, item.coarse_part, shape.coarse_channels * shape.coarse_size());
  reserve(item.padded_at, item.padded_part, shape.coarse_channels * item.padded_size);
  reserve(item.fine_at, item.fine_part, shape.fine_channels * shape.fine_size());
  reserve(item.split_at, item.split_part, shape.fine_channels * item.split_size);
  reserve(item.target_at, item.split_part, shape.fine_channels * item.split_size);

  const auto cut = [&](std::vector<ConvUnit>& units, int32_t pass, int64_t part, int64_t rows, int64_t groups, int64_t terms_per_lane) {
    const int64_t per_group = std::max<int64_t>(1, rows * terms_per_lane * width);
    int64_t step = std::max<int64_t>(1, kUnitWork / per_group), row_step = rows;
    if (step > 1) step = step / 2 * 2;
    if (step == 1 && groups > 1) step = 2;  // two groups share what is read of the weight
    if (step >= groups && rows > kMinRows) row_step = std::max(kMinRows, kUnitWork / std::max<int64_t>(1, groups * terms_per_lane * width) / 16 * 16);
    for (int64_t group = 0; group < groups; group += step)
      for (int64_t row = 0; row < rows; row += row_step)
        units.push_back({id, pass, part, row, std::min(rows, row + row_step), group, std::min(groups, group + step)});
  };
  for (int64_t part = 0; part < shape.parts; ++part) {
    parts.emplace_back(id, part);
    first_at.push_back(static_cast<int64_t>(first.size()));
    second_at.push_back(static_cast<int64_t>(second.size()));
    if (shape.is_empty()) continue;
    auto& coarse_units = shape.transposed ? second : first;
    auto& fine_units = shape.transposed ? first : second;
    for (size_t p = 0; p < item.to_coarse.size(); ++p)
      cut(coarse_units, static_cast<int32_t>(p), part, shape.coarse_channels, item.to_coarse[p].groups(), shape.fine_channels * shape.taps());
    for (size_t p = 0; p < item.to_fine.size(); ++p)
      cut(fine_units, static_cast<int32_t>(p), part, shape.fine_channels, item.to_fine[p].groups(),
          shape.coarse_channels * static_cast<int64_t>(item.to_fine[p].tap_source.size()));
    const auto groups = (static_cast<int64_t>(item.lane_column.size()) + width - 1) / width;
    const int64_t lanes = std::clamp(kPanelElements / shape.coarse_size(), 2 * width, kMostLanes), step = lanes / width / 2 * 2;
    const int64_t per_row = std::min(step, groups) * width * shape.coarse_size();
    const int64_t row_step = std::max(kMinRows, kUnitWork / per_row / 16 * 16);
    for (int64_t group = 0; group < groups; group += step)
      for (int64_t row = 0; row < shape.coarse_channels; row += row_step)
        gradient.push_back({id, 0, part, row, std::min(shape.coarse_channels, row + row_step), group, std::min(groups, group + step)});
  }
}

}  // namespace spectral

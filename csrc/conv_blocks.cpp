#include "conv_blocks.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "conv_block_sums.h"

namespace spectral {
namespace {

// So many units for every multiprocessor, where 4 run at a time: less than two rounds of them, since few that are left over
// for a third would have the device to themselves.
constexpr double kUnitsPerMultiprocessor = 6;
// Fewer terms than this to a slice, and writing and reading its sums is no longer little beside taking them.
constexpr int64_t kMinTerms = 128;
// Instructions that a thread takes for a term, counted in sm_90 code: multiply-adds, reads of shared memory and, most of
// what differs between the shapes of tile, 12 for each element of the source that it loads.
constexpr double kCost[kBlockVariants] = {47, 47, 52, 63, 60};

using Triple = std::array<int64_t, kConvDims>;
Triple of(const int32_t (&x)[kConvDims]) { return {x[0], x[1], x[2]}; }

template <class Use>
void for_grid(const Triple& sizes, Use use) {
  Triple i;
  for (i[0] = 0; i[0] < sizes[0]; ++i[0])
    for (i[1] = 0; i[1] < sizes[1]; ++i[1])
      for (i[2] = 0; i[2] < sizes[2]; ++i[2]) use(i);
}

int32_t narrow_index(int64_t x) {
  if (x > std::numeric_limits<int32_t>::max() || x < std::numeric_limits<int32_t>::min())
    throw std::invalid_argument("ConvBlocks: expected fewer than 2^31 elements to a layer's input and output");
  return static_cast<int32_t>(x);
}

// channel: in elements of the source
BlockPoint point(const Triple& x, const Triple& extent, int64_t channel, int64_t at) {
  const int64_t place = narrow_index(channel) + (x[0] * extent[1] + x[1]) * extent[2] + x[2];
  return {{{narrow_index(x[0]), narrow_index(x[1]), narrow_index(x[2])}, static_cast<uint32_t>(place)}, at};
}

// The shape of tile that takes the least time.
int variant_for(int64_t rows, int64_t lanes) {
  int best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kBlockVariants; ++i) {
    const auto tiles = static_cast<double>((rows + kBlockRows[i] - 1) / kBlockRows[i] * ((lanes + kBlockLanes[i] - 1) / kBlockLanes[i]));
    const double cost = tiles * kCost[i];
    if (cost < least) {
      least = cost;
      best = i;
    }
  }
  return best;
}

}  // namespace

ConvBlocks::ConvBlocks(const ConvTable& table, int multiprocessors) {
  if (table.is_double) throw std::invalid_argument("ConvBlocks: expected float32, bfloat16 or float16 weights, got float64");
  if (table.items.size() > static_cast<size_t>(kBlockItems)) throw std::invalid_argument("ConvBlocks: expected at most 768 conv layers in one call, got more. Use one regularizer for each half of them.");
  double work = 0;  // terms of full tiles of the first shape
  for (const ConvItem& item : table.items)
    work += static_cast<double>(item.shape.parts * item.shape.coarse_channels * item.shape.fine_channels * item.shape.taps()) * static_cast<double>(item.shape.coarse_size()) / (kBlockRows[0] * kBlockLanes[0]);
  const auto terms_per_unit = std::max(kMinTerms, static_cast<int64_t>(work / (kUnitsPerMultiprocessor * multiprocessors)));
  Tables out;
  for (size_t i = 0; i < table.items.size(); ++i) {
    add_item(out, table.items[i], static_cast<int32_t>(i), terms_per_unit);
    weight_type_.push_back(static_cast<int8_t>(table.items[i].w.dtype));
    gradient_type_.push_back(static_cast<int8_t>(table.items[i].g.dtype));
  }
  start_longest_first(out);
  const auto keep = [this](int number, const auto& list) {
    bytes.resize((bytes.size() + 15) / 16 * 16);
    at_[number] = bytes.size();
    const size_t size = list.size() * sizeof(list[0]);
    bytes.resize(bytes.size() + size);
    if (size > 0) std::memcpy(bytes.data() + at_[number], list.data(), size);
  };
  keep(0, out.points);
  keep(1, out.passes);
  keep(2, out.first);
  keep(3, out.second);
  keep(4, out.gradient);
  keep(5, out.parts);
  keep(6, out.writes);
  const auto count = [](const auto& list) { return narrow_index(static_cast<int64_t>(list.size())); };
  counts_[0] = count(out.parts);
  counts_[1] = count(out.first);
  counts_[2] = count(out.second);
  counts_[3] = count(out.gradient);
  counts_[4] = count(out.writes);
  workspace_bytes = static_cast<size_t>(y_size_ + z_size_ + partial_size_) * 4 + static_cast<size_t>(tiles_) * 8 +
                    out.parts.size() * sizeof(BlockState) + static_cast<size_t>(joins_ + 2 * counts_[0] + 1) * 4 + 64;
}

BlockArguments ConvBlocks::arguments(const char* base, char* workspace) const {
  BlockArguments a{};
  a.points = reinterpret_cast<const BlockPoint*>(base + at_[0]);
  a.passes = reinterpret_cast<const BlockPass*>(base + at_[1]);
  a.first = reinterpret_cast<const BlockUnit*>(base + at_[2]);
  a.second = reinterpret_cast<const BlockUnit*>(base + at_[3]);
  a.gradient = reinterpret_cast<const BlockUnit*>(base + at_[4]);
  a.parts = reinterpret_cast<const BlockPart*>(base + at_[5]);
  a.writes = reinterpret_cast<const BlockWrite*>(base + at_[6]);
  a.part_count = counts_[0];
  a.first_count = counts_[1];
  a.second_count = counts_[2];
  a.gradient_count = counts_[3];
  a.write_count = counts_[4];
  // Widest elements first, so that all are aligned.
  const auto take = [&workspace](int64_t size) {
    char* at = workspace;
    workspace += size;
    return at;
  };
  a.partial = reinterpret_cast<float*>(take(partial_size_ * 4));
  a.squares = reinterpret_cast<double*>(take(tiles_ * 8));
  a.states = reinterpret_cast<BlockState*>(take(int64_t{counts_[0]} * static_cast<int64_t>(sizeof(BlockState))));
  a.y = reinterpret_cast<float*>(take(y_size_ * 4));
  a.z = reinterpret_cast<float*>(take(z_size_ * 4));
  a.counters = reinterpret_cast<int32_t*>(take((joins_ + 2 * counts_[0] + 1) * 4));
  a.join_count = narrow_index(joins_);
  std::copy(weight_type_.begin(), weight_type_.end(), a.weight_type);
  std::copy(gradient_type_.begin(), gradient_type_.end(), a.gradient_type);
  return a;
}

// Parts with most terms first: their tiles have most slices, and the last of these to come has sums to join.
void ConvBlocks::start_longest_first(Tables& out) {
  for (std::vector<BlockUnit>* units : {&out.first, &out.second, &out.gradient}) {
    std::vector<int32_t> most(out.parts.size());
    for (const BlockUnit& unit : *units) {
      int32_t& own = most[static_cast<size_t>(unit.part)];
      own = std::max(own, out.passes[static_cast<size_t>(unit.pass)].terms);
    }
    // Stable, and all of a part's alike: they stay together.
    std::stable_sort(units->begin(), units->end(), [&](const BlockUnit& a, const BlockUnit& b) {
      return most[static_cast<size_t>(a.part)] > most[static_cast<size_t>(b.part)];
    });
  }
  for (size_t i = 0; i < out.first.size(); ++i) {
    BlockPart& part = out.parts[static_cast<size_t>(out.first[i].part)];
    if (i == 0 || out.first[i].part != out.first[i - 1].part) part.first_begin = static_cast<int32_t>(i);
    part.first_end = static_cast<int32_t>(i) + 1;
  }
}

void ConvBlocks::add_item(Tables& out, const ConvItem& item, int32_t id, int64_t terms_per_unit) {
  const ConvShape& shape = item.shape;
  const Triple kernel = of(shape.kernel), coarse = of(shape.coarse), fine = of(shape.fine);
  const Triple stride = of(shape.stride), dilation = of(shape.dilation), before = of(shape.before);
  const int64_t P = shape.coarse_size(), Q = shape.fine_size(), taps = shape.taps();
  const bool empty = shape.coarse_channels == 0 || shape.fine_channels == 0 || taps == 0;
  if (empty) throw std::invalid_argument("ConvBlocks: expected layers with channels");  // the Python side leaves these out

  const auto begin_pass = [&](int64_t rows, const Triple& extent, int64_t left_row, int64_t target_row) {
    BlockPass pass{};
    pass.item = id;
    pass.rows = narrow_index(rows);
    for (size_t i = 0; i < kConvDims; ++i) pass.extent[i] = narrow_index(extent[i]);
    pass.left_row = left_row;
    pass.target_row = target_row;
    return pass;
  };
  const auto end_pass = [&](BlockPass pass, const std::vector<BlockPoint>& terms, const std::vector<BlockPoint>& lanes) {
    pass.terms = narrow_index(static_cast<int64_t>(terms.size()));
    pass.lanes = narrow_index(static_cast<int64_t>(lanes.size()));
    pass.term_at = static_cast<int64_t>(out.points.size());
    out.points.insert(out.points.end(), terms.begin(), terms.end());
    pass.lane_at = static_cast<int64_t>(out.points.size());
    out.points.insert(out.points.end(), lanes.begin(), lanes.end());
    pass.variant = variant_for(pass.rows, pass.lanes);
    out.passes.push_back(pass);
    return narrow_index(static_cast<int64_t>(out.passes.size()) - 1);
  };
  const auto each_tap = [&](auto use) {
    size_t number = 0;
    for_grid(kernel, [&](const Triple& t) { use({t[0] * dilation[0], t[1] * dilation[1], t[2] * dilation[2]}, number++); });
  };

  std::vector<int32_t> to_coarse, to_fine;
  {  // coarse[c][o] = sum over (f, t) of w[c][f][t] fine[f][o*s - before + t*d]
    BlockPass pass = begin_pass(shape.coarse_channels, fine, item.w.coarse, P);
    std::fill_n(pass.wrap, kConvDims, shape.circular);
    std::vector<BlockPoint> terms, lanes;
    for (int64_t f = 0; f < shape.fine_channels; ++f)
      each_tap([&](const Triple& t, size_t tap) { terms.push_back(point(t, fine, f * Q, f * item.w.fine + item.w.tap[tap])); });
    for_grid(coarse, [&](const Triple& o) {
      Triple x;
      for (size_t i = 0; i < kConvDims; ++i) x[i] = o[i] * stride[i] - before[i];
      lanes.push_back(point(x, fine, 0, static_cast<int64_t>(lanes.size())));
    });
    to_coarse.push_back(end_pass(pass, terms, lanes));
  }
  // fine[f][q], q = r + J*s: sum over (c, t) of w[c][f][t] coarse[c][J + e], e = (r + before + m*N - t*d) / s where that is
  // whole. m counts how often circular padding has gone round; where the coarse grid goes round with it, that is a modulus.
  bool whole_turns[kConvDims];
  int64_t turns[kConvDims];
  for (size_t i = 0; i < kConvDims; ++i) {
    whole_turns[i] = shape.circular && coarse[i] * stride[i] == fine[i];
    turns[i] = shape.circular && !whole_turns[i] ? ((coarse[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1)) / fine[i] + 1 : 0;
  }
  for_grid(stride, [&](const Triple& rest) {
    std::vector<BlockPoint> terms, lanes;
    Triple count;
    for (size_t i = 0; i < kConvDims; ++i) count[i] = rest[i] < fine[i] ? (fine[i] - rest[i] + stride[i] - 1) / stride[i] : 0;
    for_grid(count, [&](const Triple& j) {
      Triple q;
      for (size_t i = 0; i < kConvDims; ++i) q[i] = rest[i] + j[i] * stride[i];
      lanes.push_back(point(j, coarse, 0, (q[0] * fine[1] + q[1]) * fine[2] + q[2]));
    });
    if (lanes.empty()) return;
    std::vector<std::pair<Triple, size_t>> of_channel;
    each_tap([&](const Triple& t, size_t tap) {
      for_grid({turns[0] + 2, turns[1] + 2, turns[2] + 2}, [&](const Triple& turn) {
        Triple e;
        for (size_t i = 0; i < kConvDims; ++i) {
          const int64_t m = turn[i] - 1;
          if (turns[i] == 0 && m != 0) return;
          const int64_t sum = rest[i] + before[i] + m * fine[i] - t[i];
          if (sum % stride[i] != 0) return;
          e[i] = sum / stride[i];
        }
        of_channel.emplace_back(e, tap);
      });
    });
    for (int64_t c = 0; c < shape.coarse_channels; ++c)
      for (const auto& [e, tap] : of_channel) terms.push_back(point(e, coarse, c * P, c * item.w.coarse + item.w.tap[tap]));
    BlockPass pass = begin_pass(shape.fine_channels, coarse, item.w.fine, Q);
    std::copy(whole_turns, whole_turns + kConvDims, pass.wrap);
    to_fine.push_back(end_pass(pass, terms, lanes));
  });
  int32_t gradient = -1;
  if (item.has_gradient) {  // g[c][(f, t)] = sum over o of coarse[c][o] fine[f][o*s - before + t*d]
    BlockPass pass = begin_pass(shape.coarse_channels, fine, P, item.g.coarse);
    std::fill_n(pass.wrap, kConvDims, shape.circular);
    std::vector<BlockPoint> terms, lanes;
    for_grid(coarse, [&](const Triple& o) {
      Triple x;
      for (size_t i = 0; i < kConvDims; ++i) x[i] = o[i] * stride[i] - before[i];
      terms.push_back(point(x, fine, 0, static_cast<int64_t>(terms.size())));
    });
    for (int64_t f = 0; f < shape.fine_channels; ++f)
      each_tap([&](const Triple& t, size_t tap) { lanes.push_back(point(t, fine, f * Q, f * item.g.fine + item.g.tap[tap])); });
    gradient = end_pass(pass, terms, lanes);
  }

  const auto cut = [&](std::vector<BlockUnit>& units, int32_t number, int32_t part, int64_t first_terms) {
    const BlockPass& pass = out.passes[static_cast<size_t>(number)];
    const auto most_terms = static_cast<int64_t>(static_cast<double>(first_terms) * kCost[0] / kCost[pass.variant]);
    const int rows = kBlockRows[pass.variant], lanes = kBlockLanes[pass.variant];
    const int64_t slices = std::max<int64_t>(1, (pass.terms + most_terms - 1) / most_terms);
    const int64_t terms = slices == 1 ? pass.terms : ((pass.terms + slices - 1) / slices + 15) / 16 * 16;
    const int64_t used = std::max<int64_t>(1, terms == 0 ? 1 : (pass.terms + terms - 1) / terms);
    for (int32_t row = 0; row < pass.rows; row += rows)
      for (int32_t lane = 0; lane < pass.lanes; lane += lanes) {
        for (int64_t s = 0; s < used; ++s)
          units.push_back({number, part, row, lane, narrow_index(s * terms), narrow_index(std::min<int64_t>(pass.terms, (s + 1) * terms)),
                           narrow_index(s), narrow_index(used), narrow_index(tiles_), narrow_index(joins_), partial_size_});
        if (used > 1) partial_size_ += used * rows * lanes;
        for (int64_t left = used; left > 1; joins_ += left) left = (left + kJoinedSlices - 1) / kJoinedSlices;
        ++tiles_;
      }
  };
  for (int64_t p = 0; p < shape.parts; ++p) {
    const int32_t number = narrow_index(static_cast<int64_t>(out.parts.size()));
    BlockPart part{};
    part.item = id;
    part.transposed = shape.transposed;
    part.left_at = p * item.w.part;
    part.gradient_at = item.has_gradient ? p * item.g.part : 0;
    part.matrix = item.index + p;
    part.columns = shape.columns();
    part.rows = shape.rows();
    part.v_at = item.v_at + p * part.columns;
    part.u_at = item.u_at + p * part.rows;
    part.y_at = y_size_;
    part.z_at = z_size_;
    y_size_ += part.rows;
    z_size_ += part.columns;
    part.target = item.target;
    part.scale = item.scale;
    const auto cut_all = [&](std::vector<BlockUnit>& units, const std::vector<int32_t>& passes, int second) {
      part.tile_begin[second] = narrow_index(tiles_);
      for (const int32_t pass : passes) cut(units, pass, number, terms_per_unit);
      part.tiles[second] = narrow_index(tiles_ - part.tile_begin[second]);
    };
    cut_all(out.first, shape.transposed ? to_fine : to_coarse, 0);
    cut_all(out.second, shape.transposed ? to_coarse : to_fine, 1);
    // Its tiles are many, and those of layers with few positions short enough to come at the end.
    if (gradient >= 0) cut(out.gradient, gradient, number, 2 * terms_per_unit);
    out.parts.push_back(part);
    for (int of_u = 0; of_u < 2; ++of_u)
      for (int64_t at = 0, size = of_u ? part.rows : part.columns; at < size; at += kWriteElements)
        out.writes.push_back({number, of_u, at, std::min<int64_t>(size, at + kWriteElements)});
  }
}

}  // namespace spectral

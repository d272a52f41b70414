#include "table.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace spectral {
namespace {

// A strip of this size is a few hundred microseconds of memory traffic less than a thread's share of any model worth
// threads, and writing its partial z costs at most one row in kMinTileRows.
constexpr int64_t kTileBytes = 128 * 1024;
constexpr int64_t kMinTileRows = 32;
// Columns of a strip are summed in the vectors' type, strips in double: no more rows than this, however short they are.
constexpr int64_t kMaxTileRows = 1024;
// Small parts (depthwise filters) are taken together until a task is worth claiming.
constexpr int64_t kTaskBytes = 16 * 1024;
// A parameter without a term of R is cut anywhere: an embedding keeps every thread busy. As many elements as a strip of
// float32 has.
constexpr int64_t kPlainElements = kTileBytes / 4;

// Columns of sizes/strides (innermost last) as one dense run, possibly in another order, or as a list of offsets.
View make_view(int dtype, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, size_t column_dim, int64_t n) {
  View view;
  view.dtype = static_cast<DType>(dtype);
  view.part_stride = strides[0];
  view.row_stride = column_dim == 2 ? strides[1] : 0;
  std::vector<size_t> dims;
  for (size_t d = column_dim; d < sizes.size(); ++d)
    if (sizes[d] != 1) dims.push_back(d);
  std::vector<size_t> by_stride = dims;
  std::stable_sort(by_stride.begin(), by_stride.end(), [&](size_t a, size_t b) { return strides[a] > strides[b]; });
  int64_t expected = 1;
  for (size_t i = by_stride.size(); i-- > 0;) {
    if (strides[by_stride[i]] != expected) view.dense = false;
    expected *= sizes[by_stride[i]];
  }
  if (n == 0 || (view.dense && by_stride == dims)) return view;
  // Offset of logical column j: its index in mixed radix times the strides.
  std::vector<int64_t> offset(static_cast<size_t>(n));
  for (int64_t j = 0; j < n; ++j) {
    int64_t rest = j, at = 0;
    for (size_t i = dims.size(); i-- > 0;) {
      at += rest % sizes[dims[i]] * strides[dims[i]];
      rest /= sizes[dims[i]];
    }
    offset[static_cast<size_t>(j)] = at;
  }
  if (view.dense && column_dim == 2) {
    view.order.resize(static_cast<size_t>(n));
    for (int64_t j = 0; j < n; ++j) view.order[static_cast<size_t>(offset[static_cast<size_t>(j)])] = static_cast<int32_t>(j);
  } else {  // vector parameters are walked by logical element, so that weight and gradient may lie differently
    view.dense = false;
    view.offset = std::move(offset);
  }
  return view;
}

int64_t product(const std::vector<int64_t>& sizes, size_t from) {
  return std::accumulate(sizes.begin() + static_cast<std::ptrdiff_t>(from), sizes.end(), int64_t{1}, std::multiplies<int64_t>());
}

}  // namespace

Table::Table(const std::vector<ItemSpec>& specs) {
  for (const ItemSpec& spec : specs) {
    Item item;
    item.kind = static_cast<Kind>(spec.kind);
    const bool matrix = item.kind == Kind::matrix;
    const size_t column_dim = matrix ? 2 : 1;
    if (spec.sizes.size() < column_dim || spec.strides.size() != spec.sizes.size() ||
        (!spec.gradient_strides.empty() && spec.gradient_strides.size() != spec.sizes.size()))
      throw std::invalid_argument("Table: expected sizes and strides of one length, (parts, rows, columns...) or (parts, n...)");
    item.parts = spec.sizes[0];
    item.rows = matrix ? spec.sizes[1] : 1;
    item.n = product(spec.sizes, column_dim);
    if (item.n > INT32_MAX && item.kind != Kind::plain) throw std::invalid_argument("Table: expected fewer than 2^31 columns");
    item.target = spec.target;
    item.scale = spec.scale;
    item.has_gradient = !spec.gradient_strides.empty();
    item.g.dtype = static_cast<DType>(spec.gradient_dtype);  // of an optimizer step's gradient, which lies as its weight does
    item.w = make_view(spec.dtype, spec.sizes, spec.strides, column_dim, item.n);
    if (item.has_gradient) item.g = make_view(spec.gradient_dtype, spec.sizes, spec.gradient_strides, column_dim, item.n);
    item.v_at = spec.v_at;
    item.u_at = spec.u_at;
    item.index = spec.index;
    item.bytes = item.rows * item.n * static_cast<int64_t>(element_size(item.w.dtype));
    const bool item_double = item.w.dtype == DType::f64;
    if (items.empty())
      is_double = item_double;
    else if (is_double != item_double)
      throw std::invalid_argument("Table: expected all float64 or none, got both");
    items.push_back(std::move(item));
  }
  lay_out();
}

void Table::lay_out() {
  const int64_t pad = static_cast<int64_t>(kPadBytes) / (is_double ? 8 : 4);
  int64_t partial = 0, y = 0, prepared = 0, columns = 0;
  std::vector<Tile> vectors;
  for (size_t i = 0; i < items.size(); ++i) {
    Item& item = items[i];
    item.term_at = terms;
    terms += item.parts;
    item.padded = (item.n + pad - 1) / pad * pad;
    const auto id = static_cast<int32_t>(i);
    if (item.kind == Kind::plain) {
      for (int64_t begin = 0; begin < item.n; begin += kPlainElements)
        read_tiles.push_back({id, 0, 1, begin, std::min(item.n, begin + kPlainElements), 0});
      continue;
    }
    if (item.kind != Kind::matrix) {
      vectors.push_back({id, 0, item.parts, 0, 1, 0});
      continue;
    }
    const int64_t row_bytes = std::max<int64_t>(item.n * static_cast<int64_t>(element_size(item.w.dtype)), 1);
    item.tile_rows = std::clamp(kTileBytes / row_bytes / 4 * 4, kMinTileRows, kMaxTileRows);
    item.tiles = item.n == 0 ? 0 : (item.rows + item.tile_rows - 1) / item.tile_rows;
    item.partial_at = partial;
    item.y_at = y;
    item.prepared_at = prepared;
    item.column_at = columns;
    partial += item.parts * item.tiles * item.padded;
    y += item.parts * item.rows;
    prepared += item.parts * item.padded;
    columns += item.parts * item.padded;
    matrices += item.parts;
    u_size += item.parts * item.rows;
    any_reordered = any_reordered || !item.w.order.empty();
    const int64_t together = item.tiles > 1 ? 1 : std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(item.bytes, 64));
    for (int64_t part = 0; part < item.parts; part += together) {
      const int64_t end = std::min(item.parts, part + together);
      for (int64_t strip = 0; strip < item.tiles; ++strip)
        read_tiles.push_back({id, part, end, strip * item.tile_rows, std::min(item.rows, (strip + 1) * item.tile_rows), strip});
      const int64_t blocks = std::max<int64_t>(1, (item.n + kColumnBlock - 1) / kColumnBlock);
      for (int64_t block = 0; block < blocks; ++block) {
        const Tile tile{id, part, end, 0, item.rows, block};
        combine_tiles.push_back(tile);
        if (item.n > kColumnBlock) wide_tiles.push_back(tile);
        if (item.n == 0 || item.rows == 0) unread_tiles.push_back(tile);
      }
    }
  }
  // Vectors last: they are short, and fill the time in which other threads finish their strips.
  read_tiles.insert(read_tiles.end(), vectors.begin(), vectors.end());
  const auto size_workspace = [&](auto& space) {
    space.partial.resize(static_cast<size_t>(partial));
    space.y.resize(static_cast<size_t>(y));
    space.prepared.resize(static_cast<size_t>(prepared));
    space.columns.resize(static_cast<size_t>(columns));
    space.terms.resize(static_cast<size_t>(terms));
    space.coefficient.resize(static_cast<size_t>(terms));
    space.shift_v.resize(static_cast<size_t>(terms));
    space.shift_y.resize(static_cast<size_t>(terms));
    space.squares.resize(static_cast<size_t>(terms));
    space.unread = std::vector<std::atomic<int32_t>>(static_cast<size_t>(terms));
  };
  if (is_double)
    size_workspace(f64);
  else
    size_workspace(f32);
}

const Shares& Table::read_shares(int threads) {
  if (read_shares_.threads != threads) {
    std::vector<int64_t> starts;
    for (size_t i = 0; i <= read_tiles.size(); ++i)
      if (i == 0 || i == read_tiles.size() || read_tiles[i].item != read_tiles[i - 1].item) starts.push_back(static_cast<int64_t>(i));
    read_shares_ = Shares::of_runs(starts, threads);
  }
  return read_shares_;
}

// ---- which instruction set ----

namespace {

const char* const kIsaNames[] = {"avx512", "avx2", "baseline"};

const KernelSet* find_isa(const char* name) {
  if (std::strcmp(name, "baseline") == 0) return &kernels_baseline();
#if defined(SPECTRAL_X86)
  __builtin_cpu_init();
  if (std::strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return &kernels_avx2();
  if (std::strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return &kernels_avx512();
#endif
  return nullptr;
}

const KernelSet* choose_isa() {
  const char* wanted = std::getenv("SPECTRAL_OPS_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    const KernelSet* set = find_isa(wanted);
    if (set == nullptr)
      throw std::runtime_error(std::string("spectral_ops: expected SPECTRAL_OPS_ISA to name an instruction set of this processor "
                                           "(avx512, avx2, baseline), got '") + wanted + "'. Unset it to have the best one chosen.");
    return set;
  }
  for (const char* name : kIsaNames)
    if (const KernelSet* set = find_isa(name)) return set;
  return &kernels_baseline();
}

const KernelSet*& current() {
  static const KernelSet* set = choose_isa();
  return set;
}

}  // namespace

const KernelSet& kernels() { return *current(); }
bool isa_supported(const char* name) { return find_isa(name) != nullptr; }
bool select_isa(const char* name) {
  const KernelSet* set = find_isa(name);
  if (set != nullptr) current() = set;
  return set != nullptr;
}

}  // namespace spectral

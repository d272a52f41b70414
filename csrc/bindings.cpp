// With lookups.cpp the only file that knows pybind11. Addresses come as integers: the Python side owns every tensor and has checked
// shapes, types and devices; the GIL is released while the loops run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "adamw.h"
#include "conv_blocks.h"
#include "conv_step.h"
#include "floor.h"
#include "lookups.h"
#include "spectral_norm.h"
#include "sharded.h"
#include "step.h"
#include "threads.h"

namespace py = pybind11;
using namespace spectral;
using Address = uintptr_t;

namespace {

// Of a list of integers, or of the bytes that Snapshot::addresses returns.
std::vector<void*> pointers(const py::object& addresses) {
  std::vector<void*> out;
  if (PyBytes_Check(addresses.ptr())) {
    const auto size = static_cast<size_t>(PyBytes_GET_SIZE(addresses.ptr()));
    out.resize(size / sizeof(void*));
    if (size > 0) std::memcpy(out.data(), PyBytes_AS_STRING(addresses.ptr()), size);
  } else {
    for (const py::handle a : addresses) out.push_back(reinterpret_cast<void*>(a.cast<Address>()));
  }
  return out;
}

template <class C>
C* at(Address a) {
  return reinterpret_cast<C*>(a);
}

template <class AnyTable>
void check_count(const AnyTable& table, const std::vector<void*>& addresses) {
  if (addresses.size() != table.items.size()) throw std::invalid_argument("Table: expected one address per item");
}

ItemSpec to_spec(const py::tuple& t) {
  return {t[0].cast<int>(), t[1].cast<int>(), t[2].cast<double>(), t[3].cast<double>(),
          t[4].cast<std::vector<int64_t>>(), t[5].cast<std::vector<int64_t>>(), t[6].cast<int>(),
          t[7].cast<std::vector<int64_t>>(), t[8].cast<int64_t>(), t[9].cast<int64_t>(), t[10].cast<int64_t>()};
}

std::shared_ptr<Table> make_table(const std::vector<py::tuple>& rows) {
  std::vector<ItemSpec> specs;
  for (const py::tuple& row : rows) specs.push_back(to_spec(row));
  return std::make_shared<Table>(specs);
}

std::shared_ptr<ConvTable> make_conv_table(const std::vector<py::tuple>& rows) {
  using Numbers = std::vector<int64_t>;
  std::vector<ConvSpec> specs;
  for (const py::tuple& t : rows)
    specs.push_back({t[0].cast<int>(), t[1].cast<double>(), t[2].cast<double>(), t[3].cast<Numbers>(), t[4].cast<Numbers>(),
                     t[5].cast<int>(), t[6].cast<Numbers>(), t[7].cast<int64_t>(), t[8].cast<int64_t>(), t[9].cast<int64_t>(),
                     t[10].cast<Numbers>(), t[11].cast<Numbers>(), t[12].cast<Numbers>(), t[13].cast<Numbers>(), t[14].cast<Numbers>(),
                     t[15].cast<bool>(), t[16].cast<bool>()});
  return std::make_shared<ConvTable>(specs);
}

template <class C, class AnyTable>
void step_as(AnyTable& table, const std::vector<void*>& weights, const std::vector<void*>& gradients, Address v, Address v_out,
             Address exponents, Address exponents_out, Address sigma, Address u, Address value, double exponent,
             double strength, double gradient_factor, int iterations, int threads) {
  StepArguments<C> a{};
  a.weights = weights.data();
  a.v = at<const C>(v);
  a.v_out = at<C>(v_out);
  a.exponents = at<const int32_t>(exponents);
  a.exponents_out = at<int32_t>(exponents_out);
  a.sigma = at<C>(sigma);
  a.u = at<C>(u);
  a.value = at<C>(value);
  a.exponent = exponent;
  a.strength = strength;
  a.gradient_factor = gradient_factor;
  a.threads = threads;
  for (int i = 0; i < iterations; ++i) {
    if (i + 1 == iterations && !gradients.empty()) a.gradients = gradients.data();
    step(table, a);
    a.v = a.v_out;
    a.exponents = a.exponents_out;
  }
}

template <class AnyTable>
void py_step(AnyTable& table, const py::object& weights, const py::object& gradients, Address v, Address v_out,
             Address exponents, Address exponents_out, Address sigma, Address u, Address value, double exponent,
             double strength, double gradient_factor, int iterations, int threads) {
  const std::vector<void*> w = pointers(weights), g = pointers(gradients);
  check_count(table, w);
  if (!g.empty()) check_count(table, g);
  const py::gil_scoped_release release;
  const auto run = table.is_double ? step_as<double, AnyTable> : step_as<float, AnyTable>;
  run(table, w, g, v, v_out, exponents, exponents_out, sigma, u, value, exponent, strength, gradient_factor, iterations, threads);
}

// The k-th row of a block of addresses, one for each item; null where the row holds none at all.
void* const* row_of(const std::vector<void*>& block, size_t k, size_t items) {
  const auto begin = block.begin() + static_cast<std::ptrdiff_t>(k * items);
  const bool any = std::any_of(begin, begin + static_cast<std::ptrdiff_t>(items), [](void* p) { return p != nullptr; });
  return any ? block.data() + k * items : nullptr;
}

struct AdamWCall {
  std::vector<void*> addresses;  // weights, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps
  std::string step_is_double;
  std::vector<int32_t> group_of;
  std::vector<AdamWHyper> hyper;
  Address v, u, exponents, sigma, value;
  double exponent, grad_scale;
  bool maximize, decoupled, stochastic;
  uint32_t seed;
  int threads;
};

template <class C>
void adamw_as(Table& table, const AdamWCall& call) {
  AdamWArguments<C> a{};
  const size_t items = table.items.size();
  a.weights = call.addresses.data();
  a.gradients = call.addresses.data() + items;
  a.exp_avgs = call.addresses.data() + 2 * items;
  a.exp_avg_sqs = call.addresses.data() + 3 * items;
  a.max_exp_avg_sqs = row_of(call.addresses, 4, items);
  a.masters = row_of(call.addresses, 5, items);
  a.steps = call.addresses.data() + 6 * items;
  a.step_is_double = reinterpret_cast<const uint8_t*>(call.step_is_double.data());
  a.group_of = call.group_of.data();
  a.hyper = call.hyper.data();
  a.v = at<C>(call.v);
  a.u = at<C>(call.u);
  a.sigma = at<C>(call.sigma);
  a.exponents = at<int32_t>(call.exponents);
  a.value = at<C>(call.value);
  a.exponent = call.exponent;
  a.grad_scale = call.grad_scale;
  a.maximize = call.maximize;
  a.decoupled = call.decoupled;
  a.stochastic = call.stochastic;
  a.seed = call.seed;
  a.threads = call.threads;
  adamw_step(table, a);
}

// addresses: rows of one for each item, 0 where there is none: weights, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs,
// masters, steps. hyper: (lr, beta1, beta2, eps, weight_decay, strength) by group.
void py_adamw(Table& table, const py::bytes& addresses, const py::bytes& step_is_double, const std::vector<int32_t>& group_of,
              const std::vector<std::tuple<double, double, double, double, double, double>>& hyper, Address v, Address u, Address exponents,
              Address sigma, Address value, double exponent, double grad_scale, bool maximize, bool decoupled, bool stochastic, uint32_t seed,
              int threads) {
  const size_t items = table.items.size();
  AdamWCall call{pointers(addresses), static_cast<std::string>(step_is_double), group_of, {}, v, u, exponents,
                 sigma, value, exponent, grad_scale, maximize, decoupled, stochastic, seed, threads};
  for (const auto& [lr, beta1, beta2, eps, weight_decay, strength] : hyper) call.hyper.push_back({lr, beta1, beta2, eps, weight_decay, strength});
  if (call.addresses.size() != 7 * items) throw std::invalid_argument("Table: expected seven addresses per item");
  const auto groups = static_cast<int32_t>(hyper.size());
  if (call.step_is_double.size() != items || group_of.size() != items ||
      std::any_of(group_of.begin(), group_of.end(), [groups](int32_t group) { return group < 0 || group >= groups; }))
    throw std::invalid_argument("Table: expected a step's type and a group of those given for every item");
  const py::gil_scoped_release release;
  const auto run = table.is_double ? adamw_as<double> : adamw_as<float>;
  run(table, call);
}

template <class C, class AnyTable>
void backward_as(AnyTable& table, const std::vector<void*>& weights, const std::vector<void*>& gradients, Address sigma, Address u,
                 Address v, double exponent, double upstream, bool accumulate, int threads) {
  backward(table, BackwardArguments<C>{weights.data(), gradients.data(), at<const C>(sigma), at<const C>(u), at<const C>(v),
                                       exponent, upstream, accumulate, threads});
}

template <class AnyTable>
void py_backward(AnyTable& table, const py::object& weights, const py::object& gradients, Address sigma, Address u,
                 Address v, double exponent, double upstream, bool accumulate, int threads) {
  const std::vector<void*> w = pointers(weights), g = pointers(gradients);
  check_count(table, w);
  check_count(table, g);
  const py::gil_scoped_release release;
  const auto run = table.is_double ? backward_as<double, AnyTable> : backward_as<float, AnyTable>;
  run(table, w, g, sigma, u, v, exponent, upstream, accumulate, threads);
}

// ---- the sums of sharded weights ----

ShardedSums sums_at(const std::vector<Address>& sums) {
  if (sums.size() != 3) throw std::invalid_argument("sharded: expected the addresses of z, squares and y_norms");
  return {at<double>(sums[0]), at<double>(sums[1]), at<double>(sums[2])};
}

template <class C>
void pack_as(Address matrices, int64_t count, Address v, Address exponents, Address local_sigma, Address local_v,
             const std::vector<Address>& sums, int threads) {
  const ShardedSums found = sums_at(sums);
  const py::gil_scoped_release release;
  pack(PackArguments<C>{at<const ShardedMatrix>(matrices), count, at<const C>(v), at<const int32_t>(exponents),
                        at<const C>(local_sigma), at<const C>(local_v), found, threads});
}

template <class C>
void finish_as(Address matrices, int64_t count, const std::vector<Address>& sums, Address targets, Address scales, double exponent,
               Address v, Address exponents, Address sigma, Address u, Address local_u, Address terms, int threads) {
  const ShardedSums found = sums_at(sums);
  const py::gil_scoped_release release;
  finish(FinishArguments<C>{at<const ShardedMatrix>(matrices), count, found, at<const double>(targets), at<const double>(scales),
                            exponent, at<C>(v), at<int32_t>(exponents), at<C>(sigma), at<C>(u), at<const C>(local_u), at<double>(terms),
                            threads});
}

template <class C, class AnyTable>
int64_t norm_as(AnyTable& table, const std::vector<void*>& weights, Address sigma, Address bound, Address u, Address v,
                Address exponents, double tolerance, int max_iterations, int threads) {
  return spectral_norm(table, NormArguments<C>{weights.data(), at<C>(sigma), at<C>(bound), at<C>(u), at<C>(v),
                                               at<int32_t>(exponents), tolerance, max_iterations, threads});
}

template <class AnyTable>
int64_t py_norm(AnyTable& table, const py::object& weights, Address sigma, Address bound, Address u, Address v,
                Address exponents, double tolerance, int max_iterations, int threads) {
  const std::vector<void*> w = pointers(weights);
  check_count(table, w);
  const py::gil_scoped_release release;
  const auto run = table.is_double ? norm_as<double, AnyTable> : norm_as<float, AnyTable>;
  return run(table, w, sigma, bound, u, v, exponents, tolerance, max_iterations, threads);
}

// A number, or where it lies on the device and its DType.
struct Scalar {
  double number = 0;
  Address at = 0;
  int type = 0;
};
Scalar to_scalar(const py::tuple& t) { return {t[0].cast<double>(), t[1].cast<Address>(), t[2].cast<int>()}; }

// The step of conv operators by blocks: on the device (stream), or emulated on the host where device < 0 (seed).
int py_blocks(const ConvBlocks& blocks, Address base, Address workspace, const py::object& weights, const py::object& gradients, Address v,
              Address v_out, Address exponents, Address exponents_out, Address sigma, Address u, Address value, double exponent,
              const py::tuple& strength, const py::tuple& grad_scale, Address found_inf, int found_inf_type, const py::object& given, int device,
              Address stream) {
  BlockArguments a = blocks.arguments(at<const char>(base), at<char>(workspace));
  const std::vector<void*> w = pointers(weights), g = pointers(gradients);
  std::copy(w.begin(), w.end(), a.weights);
  std::copy(g.begin(), g.end(), a.gradients);
  a.v = at<const float>(v);
  a.v_out = at<float>(v_out);
  a.exponents = at<const int32_t>(exponents);
  a.exponents_out = at<int32_t>(exponents_out);
  a.sigma = at<float>(sigma);
  a.u = at<float>(u);
  a.value = at<float>(value);
  a.exponent = exponent;
  const Scalar s = to_scalar(strength), scale = to_scalar(grad_scale);
  a.strength = s.number;
  a.strength_at = at<const void>(s.at);
  a.strength_type = s.type;
  a.grad_scale = scale.number;
  a.grad_scale_at = at<const void>(scale.at);
  a.grad_scale_type = scale.type;
  a.found_inf_at = at<const void>(found_inf);
  a.found_inf_type = found_inf_type;
  const bool backward = !given.is_none();
  if (backward) {
    const auto [s_at, u_at, v_at] = given.cast<std::tuple<Address, Address, Address>>();
    a.given_sigma = at<const float>(s_at);
    a.given_u = at<const float>(u_at);
    a.given_v = at<const float>(v_at);
    a.overwrite = 1;
  }
  const py::gil_scoped_release release;
  if (device < 0) {
    conv_step_emulated(a, backward, stream);
    return 0;
  }
#if defined(SPECTRAL_OPS_WITH_CUDA)
  return conv_step_cuda(a, backward, device, reinterpret_cast<void*>(stream));
#else
  throw std::runtime_error("ConvBlocks: expected a module built with CUDA, got one without. Install nvcc, then spectral_ops again.");
#endif
}

// [(address, bytes), ...] as two arrays.
std::pair<std::vector<void*>, std::vector<size_t>> memory(const std::vector<std::pair<Address, size_t>>& blocks) {
  std::pair<std::vector<void*>, std::vector<size_t>> out;
  for (const auto& [address, bytes] : blocks) {
    out.first.push_back(reinterpret_cast<void*>(address));
    out.second.push_back(bytes);
  }
  return out;
}

uint64_t py_floor(const std::vector<std::pair<Address, size_t>>& read, const std::vector<std::pair<Address, size_t>>& update, int threads) {
  const auto src = memory(read), dst = memory(update);
  const py::gil_scoped_release release;
  return floor_cpu(src.first.data(), src.second.data(), src.first.size(), dst.first.data(), dst.second.data(), dst.first.size(), threads);
}

py::dict built_with() {
  py::dict out;
  out["compiler"] = SPECTRAL_BUILD_COMPILER;
  out["cuda"] = SPECTRAL_BUILD_CUDA;
#if defined(_OPENMP)
  out["openmp"] = _OPENMP;
#else
  out["openmp"] = 0;
#endif
  return out;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Torch-free loops of spectral_ops. Use spectral_ops' public functions; nothing here checks its addresses.";
  py::class_<Table, std::shared_ptr<Table>>(m, "Table")
      .def(py::init(&make_table))
      .def_property_readonly("is_double", [](const Table& t) { return t.is_double; })
      .def_property_readonly("read_tiles", [](const Table& t) { return t.read_tiles.size(); })
      .def_property_readonly("combine_tiles", [](const Table& t) { return t.combine_tiles.size(); })
      .def("step", &py_step<Table>)
      .def("backward", &py_backward<Table>)
      .def("adamw", &py_adamw)
      .def("spectral_norm", &py_norm<Table>);
  py::class_<ConvTable, std::shared_ptr<ConvTable>>(m, "ConvTable")
      .def(py::init(&make_conv_table))
      .def_property_readonly("is_double", [](const ConvTable& t) { return t.is_double; })
      .def("step", &py_step<ConvTable>)
      .def("backward", &py_backward<ConvTable>)
      .def("spectral_norm", &py_norm<ConvTable>)
      .def("blocks", [](const ConvTable& t, int multiprocessors) { return std::make_unique<ConvBlocks>(t, multiprocessors); });
  py::class_<ConvBlocks>(m, "ConvBlocks")
      .def_property_readonly("bytes", [](const ConvBlocks& b) { return py::bytes(b.bytes.data(), b.bytes.size()); })
      .def_readonly("workspace_bytes", &ConvBlocks::workspace_bytes)
      .def("step", &py_blocks);
  bind_lookups(m);
  m.def("sharded_pack", [](bool is_double, Address matrices, int64_t count, Address v, Address exponents, Address local_sigma,
                           Address local_v, const std::vector<Address>& sums, int threads) {
    (is_double ? pack_as<double> : pack_as<float>)(matrices, count, v, exponents, local_sigma, local_v, sums, threads);
  });
  m.def("sharded_finish", [](bool is_double, Address matrices, int64_t count, const std::vector<Address>& sums, Address targets,
                             Address scales, double exponent, Address v, Address exponents, Address sigma, Address u, Address local_u,
                             Address terms, int threads) {
    (is_double ? finish_as<double> : finish_as<float>)(matrices, count, sums, targets, scales, exponent, v, exponents, sigma, u, local_u,
                                                       terms, threads);
  });
  // os.environ writes through to it; a variable that is not set costs os.environ.get two exceptions, at every step.
  m.def("getenv", [](const char* name) { return std::getenv(name); });
  m.def("isa", [] { return std::string(kernels().isa); });
  m.def("select_isa", [](const std::string& name) { return select_isa(name.c_str()); });
  m.def("isa_supported", [](const std::string& name) { return isa_supported(name.c_str()); });
  m.def("threads_allowed", &threads_allowed);
  m.def("built_with", &built_with);
  m.def("floor", &py_floor, "Reads every block of `read` and reads and writes every block of `update`, unchanged: the memory floor of an op.");
#if defined(SPECTRAL_OPS_WITH_CUDA)
  m.def("cuda_versions", [] {
    int driver = 0, runtime = 0, devices = 0;
    const int error = cuda_versions(&driver, &runtime, &devices);
    return py::make_tuple(error, driver, runtime, devices);
  });
  m.def("cuda_error_text", &cuda_error_text);
  m.def("floor_cuda", [](Address chunks, int64_t count, Address sink, int device, Address stream) {
    return floor_cuda(reinterpret_cast<const FloorChunk*>(chunks), count, reinterpret_cast<uint32_t*>(sink), device, reinterpret_cast<void*>(stream));
  });
  m.def("copy_cuda", [](Address dst, Address src, size_t bytes, int device, Address stream) {
    return copy_cuda(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), bytes, device, reinterpret_cast<void*>(stream));
  });
#endif
}

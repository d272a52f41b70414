// The only file that knows pybind11. Addresses come as integers: the Python side owns every tensor and has checked
// shapes, types and devices; the GIL is released while the loops run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "floor.h"
#include "spectral_norm.h"
#include "step.h"
#include "threads.h"

namespace py = pybind11;
using namespace spectral;
using Address = uintptr_t;

namespace {

std::vector<void*> pointers(const std::vector<Address>& addresses) {
  std::vector<void*> out;
  out.reserve(addresses.size());
  for (const Address a : addresses) out.push_back(reinterpret_cast<void*>(a));
  return out;
}

template <class C>
C* at(Address a) {
  return reinterpret_cast<C*>(a);
}

void check_count(const Table& table, const std::vector<Address>& addresses) {
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

template <class C>
void step_as(Table& table, const std::vector<void*>& weights, const std::vector<void*>& gradients, Address v, Address v_out,
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

void py_step(Table& table, const std::vector<Address>& weights, const std::vector<Address>& gradients, Address v, Address v_out,
             Address exponents, Address exponents_out, Address sigma, Address u, Address value, double exponent,
             double strength, double gradient_factor, int iterations, int threads) {
  check_count(table, weights);
  if (!gradients.empty()) check_count(table, gradients);
  const std::vector<void*> w = pointers(weights), g = pointers(gradients);
  const py::gil_scoped_release release;
  const auto run = table.is_double ? step_as<double> : step_as<float>;
  run(table, w, g, v, v_out, exponents, exponents_out, sigma, u, value, exponent, strength, gradient_factor, iterations, threads);
}

template <class C>
void backward_as(Table& table, const std::vector<void*>& weights, const std::vector<void*>& gradients, Address sigma, Address u,
                 Address v, double exponent, double upstream, int threads) {
  backward(table, BackwardArguments<C>{weights.data(), gradients.data(), at<const C>(sigma), at<const C>(u), at<const C>(v),
                                       exponent, upstream, threads});
}

void py_backward(Table& table, const std::vector<Address>& weights, const std::vector<Address>& gradients, Address sigma, Address u,
                 Address v, double exponent, double upstream, int threads) {
  check_count(table, weights);
  check_count(table, gradients);
  const std::vector<void*> w = pointers(weights), g = pointers(gradients);
  const py::gil_scoped_release release;
  const auto run = table.is_double ? backward_as<double> : backward_as<float>;
  run(table, w, g, sigma, u, v, exponent, upstream, threads);
}

template <class C>
int64_t norm_as(Table& table, const std::vector<void*>& weights, Address sigma, Address bound, Address u, Address v,
                Address exponents, double tolerance, int max_iterations, int threads) {
  return spectral_norm(table, NormArguments<C>{weights.data(), at<C>(sigma), at<C>(bound), at<C>(u), at<C>(v),
                                               at<int32_t>(exponents), tolerance, max_iterations, threads});
}

int64_t py_norm(Table& table, const std::vector<Address>& weights, Address sigma, Address bound, Address u, Address v,
                Address exponents, double tolerance, int max_iterations, int threads) {
  check_count(table, weights);
  const std::vector<void*> w = pointers(weights);
  const py::gil_scoped_release release;
  const auto run = table.is_double ? norm_as<double> : norm_as<float>;
  return run(table, w, sigma, bound, u, v, exponents, tolerance, max_iterations, threads);
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
      .def("step", &py_step)
      .def("backward", &py_backward)
      .def("spectral_norm", &py_norm);
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

#include "lookups.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <unordered_map>

#include "dlpack.h"

namespace py = pybind11;
using namespace spectral;

namespace {

template <class T>
T* constructed(PyObject* self) {
  const auto made = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return made.holder_constructed() ? static_cast<T*>(made.value_ptr()) : nullptr;  // the collector may come before __init__
}

// Shows Python's garbage collector what objects of T hold, by T::held(see) and T::clear(): a model that holds its regularizer
// is held by the look-up of that, and would never be freed.
template <class T>
py::custom_type_setup collected() {
  return py::custom_type_setup([](PyHeapTypeObject* heap) {
    PyTypeObject& type = heap->ht_type;
    type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      const T* made = constructed<T>(self);
      return made == nullptr ? 0 : made->held([visit, arg](const py::object& x) { return x ? visit(x.ptr(), arg) : 0; });
    };
    type.tp_clear = [](PyObject* self) {
      if (T* made = constructed<T>(self)) made->clear();
      return 0;
    };
  });
}

// How tensors looked: type, dtype, device, shape and strides of each, or that there was none (None).
class Looks {
 public:
  explicit Looks(const py::capsule& exchange) {
    const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange.ptr(), kDLPackCapsule));
    if (api == nullptr) throw py::error_already_set();
    if (api->version.major != kDLPackMajor || api->dltensor_from_py_object_no_sync == nullptr)
      throw py::type_error("Snapshot: expected version 1 of DLPack's exchange interface, got another. Compare in Python.");
    look_at_ = api->dltensor_from_py_object_no_sync;
  }

  void add(PyObject* tensor) {
    if (tensor == Py_None) {
      seen_.push_back({Py_TYPE(tensor), {}, {}, 0, 0, sizes_.size()});
      return;
    }
    DLTensor t;
    if (look_at_(tensor, &t) != 0) throw py::error_already_set();
    seen_.push_back({Py_TYPE(tensor), t.device, t.dtype, t.ndim, place(t) % kAlignment, sizes_.size()});
    sizes_.insert(sizes_.end(), t.shape, t.shape + t.ndim);
    sizes_.insert(sizes_.end(), t.strides, t.strides + t.ndim);
  }

  // Whether it looks as the i-th did, and then its address; 0 of None.
  bool same(size_t i, PyObject* tensor, bool aligned, uintptr_t* address) const {
    const Look& look = seen_[i];
    if (Py_TYPE(tensor) != look.type) return false;  // before anything is asked of it
    *address = 0;
    if (tensor == Py_None) return true;
    DLTensor t;
    if (look_at_(tensor, &t) != 0) {
      PyErr_Clear();
      return false;
    }
    const auto ndim = static_cast<size_t>(look.ndim);
    const int64_t* sizes = sizes_.data() + look.at;
    *address = place(t);
    return t.ndim == look.ndim && t.dtype.code == look.dtype.code && t.dtype.bits == look.dtype.bits && t.dtype.lanes == look.dtype.lanes &&
           t.device.device_type == look.device.device_type && t.device.device_id == look.device.device_id &&
           (!aligned || *address % kAlignment == look.offset) && std::equal(t.shape, t.shape + ndim, sizes) &&
           std::equal(t.strides, t.strides + ndim, sizes + ndim);
  }

  size_t size() const { return seen_.size(); }

 private:
  static constexpr uintptr_t kAlignment = 16;  // what kernels ask for where they read vectors

  struct Look {
    PyTypeObject* type;  // not held: compared, never followed
    DLDevice device;
    DLDataType dtype;
    int32_t ndim;
    uintptr_t offset;  // of its address from a multiple of kAlignment
    size_t at;         // of its shape, then its strides, in sizes_
  };

  static uintptr_t place(const DLTensor& t) { return reinterpret_cast<uintptr_t>(t.data) + t.byte_offset; }

  int (*look_at_)(void*, DLTensor*);
  std::vector<Look> seen_;
  std::vector<int64_t> sizes_;
};

py::object as_bytes(const std::vector<uintptr_t>& addresses) {
  return py::bytes(reinterpret_cast<const char*>(addresses.data()), addresses.size() * sizeof(uintptr_t));
}

// What a list of tensors looked like, to compare another list with.
class Snapshot {
 public:
  Snapshot(const py::capsule& exchange, const py::sequence& tensors) : looks_(exchange) {
    for (const py::handle tensor : tensors) looks_.add(tensor.ptr());
  }

  // Addresses of tensors that look the same, as bytes; None where anything differs or shows no memory.
  py::object addresses(const py::object& list_or_tuple) const {
    const auto tensors = py::reinterpret_steal<py::object>(PySequence_Fast(list_or_tuple.ptr(), "Snapshot: expected a list of tensors"));
    if (!tensors) throw py::error_already_set();
    if (static_cast<size_t>(PySequence_Fast_GET_SIZE(tensors.ptr())) != looks_.size()) return py::none();
    std::vector<uintptr_t> out(looks_.size());
    for (size_t i = 0; i < out.size(); ++i)
      if (!looks_.same(i, PySequence_Fast_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i)), false, &out[i])) return py::none();
    return as_bytes(out);
  }

 private:
  Looks looks_;
};

// Where a model keeps its parameters and layers, looked up afresh at every step, module by module.
class ModelLookup {
 public:
  // owners: (module, name) of every parameter; layers: (module, name, child) of every entry of every _modules; ties:
  // (module, name, number of the owner) of everywhere else that has a parameter.
  ModelLookup(const std::vector<std::pair<py::object, py::str>>& owners, const std::vector<std::tuple<py::object, py::str, py::object>>& layers,
              const std::vector<std::tuple<py::object, py::str, size_t>>& ties)
      : count_(owners.size()), ties_(ties), parameters_name_(interned("_parameters")), modules_name_(interned("_modules")) {
    std::unordered_map<PyObject*, size_t> places;
    const auto place_of = [this, &places](const py::object& module) -> Place& {
      const auto [at, is_new] = places.try_emplace(module.ptr(), places_.size());
      if (is_new) places_.push_back({module, {}, {}, {}});
      return places_[at->second];
    };
    for (const auto& [module, name, child] : layers) {
      place_of(module).children.emplace_back(name, child);
      if (!child.is_none()) place_of(child);
    }
    for (size_t i = 0; i < count_; ++i) place_of(owners[i].first).owned.emplace_back(owners[i].second, i);
    for (Place& place : places_) {
      const py::object held = dictionary(place.module);
      each_parameter(table(held, parameters_name_), [&place](PyObject* name) {
        place.names.push_back(py::reinterpret_borrow<py::object>(name));
        return true;
      });
    }
  }

  // The parameters as they are now; None where one is gone, there twice or tied no more, a layer is not the one it was, or
  // a module has a layer or parameter that it had not.
  py::object parameters() {
    py::list out(count_);
    for (const Place& place : places_) {
      const py::object held = dictionary(place.module);
      PyObject* const modules = table(held, modules_name_);
      if (modules == nullptr || static_cast<size_t>(PyDict_GET_SIZE(modules)) != place.children.size()) return py::none();
      for (const auto& [name, child] : place.children)
        if (in(modules, name) != child.ptr()) return py::none();
      PyObject* const parameters = table(held, parameters_name_);
      size_t seen = 0;
      const bool same = each_parameter(parameters, [&place, &seen](PyObject* name) {
        return seen < place.names.size() && name == place.names[seen++].ptr();
      });
      if (!same || seen != place.names.size()) return py::none();
      for (const auto& [name, i] : place.owned) {
        PyObject* const found = in(parameters, name);
        if (found == nullptr || found == Py_None) return py::none();
        Py_INCREF(found);
        PyList_SET_ITEM(out.ptr(), static_cast<Py_ssize_t>(i), found);
      }
    }
    for (const auto& [module, name, owner] : ties_) {
      PyObject* const parameters = table(dictionary(module), parameters_name_);
      if (parameters == nullptr || in(parameters, name) != PyList_GET_ITEM(out.ptr(), static_cast<Py_ssize_t>(owner))) return py::none();
    }
    return all_distinct(out) ? py::object(std::move(out)) : py::none();
  }

  // What it keeps alive, but for names; until see() returns something else than 0, and that.
  template <class See>
  int held(See see) const {
    for (const Place& place : places_) {
      if (const int stop = see(place.module)) return stop;
      for (const auto& [name, child] : place.children)
        if (const int stop = see(child)) return stop;
    }
    for (const auto& [module, name, owner] : ties_)
      if (const int stop = see(module)) return stop;
    return 0;
  }

  // What is dropped runs Python code, which shall find nothing half cleared.
  void clear() {
    const auto places = std::move(places_);
    const auto ties = std::move(ties_);
    places_.clear(), ties_.clear(), distinct_.clear();
    count_ = 0;
  }

 private:
  // A module with what it had: children by name, numbers of the owners that are its parameters by name, and the names of
  // all that are not None, in their order.
  struct Place {
    py::object module;
    std::vector<std::pair<py::str, py::object>> children;
    std::vector<std::pair<py::str, size_t>> owned;
    std::vector<py::object> names;
  };

  // The object that Python's attributes have for a name, found without comparing letters.
  static py::str interned(const char* name) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name)); }

  // Sorted only where they are not those of the last call.
  bool all_distinct(const py::list& parameters) {
    PyObject* const* found = PySequence_Fast_ITEMS(parameters.ptr());
    if (std::equal(distinct_.begin(), distinct_.end(), found, found + count_)) return true;
    std::vector<PyObject*> sorted(found, found + count_);
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) return false;
    distinct_.assign(found, found + count_);
    return true;
  }

  // module.__dict__, or nothing: a third of what its attributes cost, which nn.Module.__getattr__ makes slow.
  static py::object dictionary(const py::object& module) {
    auto held = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
    if (!held) PyErr_Clear();
    return held;
  }

  // Borrowed, as what `in` returns: nothing that is called here runs Python code.
  static PyObject* table(const py::object& held, const py::str& name) {
    PyObject* const found = held ? in(held.ptr(), name) : nullptr;
    return found != nullptr && PyDict_Check(found) ? found : nullptr;
  }
  static PyObject* in(PyObject* dict, const py::str& name) {
    PyObject* const found = PyDict_GetItemWithError(dict, name.ptr());
    if (found == nullptr) PyErr_Clear();
    return found;
  }

  // Calls see(name) of each that is not None until it returns false; false, too, without a table.
  template <class See>
  static bool each_parameter(PyObject* table, See see) {
    if (table == nullptr) return false;
    Py_ssize_t at = 0;
    PyObject *name, *value;
    while (PyDict_Next(table, &at, &name, &value))
      if (value != Py_None && !see(name)) return false;
    return true;
  }

  size_t count_;
  std::vector<Place> places_;
  std::vector<std::tuple<py::object, py::str, size_t>> ties_;
  std::vector<PyObject*> distinct_;  // of the last call; not held: compared, never followed
  py::str parameters_name_, modules_name_;
};

py::object attribute(PyObject* tensor, PyObject* name) {
  auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name));
  if (!value) throw py::error_already_set();
  return value;
}

// Never freed, as attribute names are.
PyObject* grad_name() {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  return name;
}
PyObject* requires_grad_name() {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  return name;
}
PyObject* version_name() {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  return name;
}

// What an optimizer's step is about: its parameters, their gradients and states, and how all of them looked.
class StepLookup {
 public:
  // keys: of the states; one of a parameter may be missing.
  StepLookup(const py::capsule& exchange, const std::vector<py::object>& parameters, const py::dict& state, const std::vector<py::str>& keys)
      : looks_(exchange), parameters_(parameters), keys_(keys) {
    const bool complete = visit(state, [this](size_t, PyObject* tensor) {
      looks_.add(tensor);
      return true;
    });
    if (!complete) throw py::value_error("StepLookup: expected the state of every parameter, got one without.");
    for (const py::object& p : parameters_) requires_grad_.push_back(attribute(p.ptr(), requires_grad_name()));
  }

  // Addresses of the parameters, of their gradients, and of each key's states, as bytes; 0 where there is none. None where
  // anything looks otherwise, requires a gradient otherwise, or lies aligned otherwise.
  py::object addresses(const py::dict& state) const {
    if (parameters_.size() != requires_grad_.size()) return py::none();  // cleared
    for (size_t i = 0; i < parameters_.size(); ++i)
      if (!attribute(parameters_[i].ptr(), requires_grad_name()).is(requires_grad_[i])) return py::none();
    std::vector<uintptr_t> out(looks_.size());
    const bool same = visit(state, [this, &out](size_t i, PyObject* tensor) { return looks_.same(i, tensor, true, &out[i]); });
    return same ? as_bytes(out) : py::none();
  }

  template <class See>
  int held(See see) const {
    for (const py::object& p : parameters_)
      if (const int stop = see(p)) return stop;
    return 0;
  }

  void clear() {
    const auto parameters = std::move(parameters_);
    parameters_.clear();
  }

 private:
  // Calls see(number, tensor or None) in the order of `addresses`, until it returns false; false, too, without a state.
  template <class See>
  bool visit(const py::dict& state, See see) const {
    const size_t count = parameters_.size();
    for (size_t i = 0; i < count; ++i)
      if (!see(i, parameters_[i].ptr())) return false;
    for (size_t i = 0; i < count; ++i)
      if (!see(count + i, attribute(parameters_[i].ptr(), grad_name()).ptr())) return false;
    std::vector<PyObject*> states(count);  // borrowed: nothing below runs Python code
    if (!find(state, states)) return false;
    for (size_t k = 0; k < keys_.size(); ++k)
      for (size_t i = 0; i < count; ++i) {
        PyObject* tensor = PyDict_GetItemWithError(states[i], keys_[k].ptr());
        if (tensor == nullptr && PyErr_Occurred()) throw py::error_already_set();
        if (!see((2 + k) * count + i, tensor == nullptr ? Py_None : tensor)) return false;
      }
    return true;
  }

  // By walking through the states, which lie in the parameters' order as a rule: a tensor's hash is a call of Python's.
  bool find(const py::dict& state, std::vector<PyObject*>& states) const {
    Py_ssize_t place = 0;
    PyObject *key, *value;
    size_t next = 0;
    while (next < states.size() && PyDict_Next(state.ptr(), &place, &key, &value))
      if (key == parameters_[next].ptr()) states[next++] = value;
    for (; next < states.size(); ++next) {
      states[next] = PyDict_GetItemWithError(state.ptr(), parameters_[next].ptr());
      if (states[next] == nullptr && PyErr_Occurred()) throw py::error_already_set();
    }
    return std::all_of(states.begin(), states.end(), [](PyObject* s) { return s != nullptr && PyDict_Check(s); });
  }

  Looks looks_;
  std::vector<py::object> parameters_, requires_grad_;
  std::vector<py::str> keys_;
};

// .grad of every tensor of a list; None where one has none.
py::object gradients_of(const py::list& tensors) {
  const Py_ssize_t count = PyList_GET_SIZE(tensors.ptr());
  py::list out(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    py::object grad = attribute(PyList_GET_ITEM(tensors.ptr(), i), grad_name());
    if (grad.is_none()) return py::none();
    PyList_SET_ITEM(out.ptr(), i, grad.release().ptr());
  }
  return std::move(out);
}

// ._version of every tensor of a list.
py::list versions_of(const py::list& tensors) {
  const Py_ssize_t count = PyList_GET_SIZE(tensors.ptr());
  py::list out(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i)
    PyList_SET_ITEM(out.ptr(), i, attribute(PyList_GET_ITEM(tensors.ptr(), i), version_name()).release().ptr());
  return out;
}

}  // namespace

void bind_lookups(py::module_& m) {
  py::class_<Snapshot>(m, "Snapshot").def(py::init<const py::capsule&, const py::sequence&>()).def("addresses", &Snapshot::addresses);
  py::class_<ModelLookup>(m, "ModelLookup", collected<ModelLookup>())
      .def(py::init<const std::vector<std::pair<py::object, py::str>>&, const std::vector<std::tuple<py::object, py::str, py::object>>&,
                    const std::vector<std::tuple<py::object, py::str, size_t>>&>())
      .def("parameters", &ModelLookup::parameters);
  py::class_<StepLookup>(m, "StepLookup", collected<StepLookup>())
      .def(py::init<const py::capsule&, const std::vector<py::object>&, const py::dict&, const std::vector<py::str>&>())
      .def("addresses", &StepLookup::addresses);
  m.def("gradients_of", &gradients_of);
  m.def("versions_of", &versions_of);
}

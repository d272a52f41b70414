// What Python's side looks up at every step: models' parameters, optimizers' states, how tensors look. In Python ~0.3 to
// 0.7 us each with warm caches and several times that after other code has run, here ~0.05.
#pragma once
#include <pybind11/pybind11.h>

void bind_lookups(pybind11::module_& m);

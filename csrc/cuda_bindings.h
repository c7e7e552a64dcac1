// The CUDA part of the module _C.
#pragma once
#include <pybind11/pybind11.h>

namespace stf {
void bind_cuda(pybind11::module_& module);  // as the submodule `cuda`
}

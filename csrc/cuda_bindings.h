// The CUDA part of the extension.
#pragma once
#include <pybind11/pybind11.h>

namespace stf {
void bind_cuda(pybind11::module_& m);  // adds the functions of cuda_stages.h
}

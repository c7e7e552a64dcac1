// How Python's arguments reach C++: tensors as addresses, structs as tuples of their fields.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

#include "coefficients.h"
#include "logit_call.h"

namespace stf {

namespace py = pybind11;

using Address = uintptr_t;  // Tensor.data_ptr(), 0 for none

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
T* at(py::handle address) {
  return at<T>(address.cast<Address>());
}

inline Levels levels(py::tuple fields) {
  return {at<const double>(fields[0]), at<const double>(fields[1]),
          at<const double>(fields[2]), static_cast<Kind>(fields[3].cast<int>()),
          at<const double>(fields[4]), at<const double>(fields[5]),
          at<const double>(fields[6]), at<const double>(fields[7]),
          at<double>(fields[8]),       fields[9].cast<int>()};
}

inline LogitCall logit_call(py::tuple fields) {
  const auto samples = fields[0].cast<py::tuple>(), refs = fields[1].cast<py::tuple>(),
             out = fields[2].cast<py::tuple>();
  return {{at<const double>(samples[0]), at<const double>(samples[1]), at<const double>(samples[2]),
           at<const double>(samples[3]), at<const int64_t>(samples[4])},
          {at<const double>(refs[0]), at<const double>(refs[1]), at<const int64_t>(refs[2])},
          {out[0].cast<int64_t>(), at<float>(out[1]), at<double>(out[2])}};
}

}  // namespace stf

// The module _cuda_on_host: the CUDA backend's functions as in _C, the machine's controls, and the
// faulty kernels, which take addresses of int32 [768].
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "cuda_bindings.h"
#include "faults.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda_on_host, m) {
  stf::bind_cuda(m);

  m.def("seed", host::seed, "the order of what follows");
  m.def("take_launches", [] {  // (blocks, threads, shared, cluster, device, stream) since the last
    py::list taken;
    for (const host::Launch& l : host::launches())
      taken.append(py::make_tuple(l.blocks, l.threads, l.shared, l.cluster, l.device,
                                  reinterpret_cast<uintptr_t>(l.stream)));
    host::launches().clear();
    return taken;
  });
  m.def("set_device",
        [](int processors, int major, int minor) { host::device = {processors, major, minor}; });
  m.def("current_device", [] { return host::current_device; });

  py::dict faulty;
  for (const host::Faulty& one : host::faulty_kernels())
    faulty[one.name] = py::cpp_function([one](uintptr_t in, uintptr_t out, bool fault) {
      host::run_faulty(one, reinterpret_cast<const int32_t*>(in), reinterpret_cast<int32_t*>(out),
                       fault);
    });
  m.attr("faulty") = faulty;
}

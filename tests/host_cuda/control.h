// What the tests ask of the machine, for a module that holds kernels.
#pragma once
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

namespace host {

inline void bind_control(pybind11::module_& m) {
  m.def("seed", &seed, "the order of what follows");
  m.def("take_launches", [] {  // (blocks, threads, shared, cluster, device, stream) since the last
    pybind11::list taken;
    for (const Launch& l : launches())
      taken.append(pybind11::make_tuple(l.blocks, l.threads, l.shared, l.cluster, l.device,
                                        reinterpret_cast<uintptr_t>(l.stream)));
    launches().clear();
    return taken;
  });
  m.def("set_device",
        [](int processors, int major, int minor) { device = {processors, major, minor}; });
  m.def("current_device", [] { return current_device; });
}

}  // namespace host

// The CUDA stages for Python: a place is (device, stream); arguments are checked by the callers.
#include "cuda_bindings.h"

#include "bindings.h"
#include "cuda_stages.h"

namespace stf {
namespace {

cuda::Place place(py::tuple fields) { return {fields[0].cast<int>(), at<void>(fields[1])}; }

cuda::Matrix matrix(py::tuple fields) {
  return {at<const int8_t>(fields[0]), fields[1].cast<int64_t>(), fields[2].cast<int64_t>(),
          fields[3].cast<int64_t>(), fields[4].cast<int64_t>()};
}

cuda::Digits digits(py::tuple fields) {
  return {at<const int8_t>(fields[0]), fields[1].cast<int64_t>(), fields[2].cast<int64_t>()};
}

cuda::Survivors survivors(py::tuple fields) {
  return {at<int32_t>(fields[0]), at<int32_t>(fields[1]), at<int32_t>(fields[2]),
          at<int8_t>(fields[3]),  at<int32_t>(fields[4]), at<int32_t>(fields[5])};
}

cuda::Sums sums(py::tuple fields) {
  return {at<int64_t>(fields[0]), at<int64_t>(fields[1]), at<int64_t>(fields[2]),
          at<int64_t>(fields[3]), at<int64_t>(fields[4])};
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("CAPACITY") = cuda::kCapacity;

  m.def("quantize", [](Address x, bool wide, int64_t rows, int64_t dim, int limbs, Address out,
                       Address step, py::tuple where) {
    cuda::quantize(at<const void>(x), wide, rows, dim, limbs, at<int8_t>(out), at<double>(step),
                   place(where));
  });

  m.def("coefficients", [](py::tuple of, py::tuple q, int64_t dim, py::tuple where) {
    cuda::coefficients(levels(of), digits(q), dim, place(where));
  });

  m.def("weights", [](Address relative, Address anchors, Address peak, int64_t rows, int64_t n,
                      int limbs, py::tuple into, py::tuple totals, py::tuple where) {
    cuda::weights(at<const float>(relative), at<const double>(anchors), at<const double>(peak),
                  rows, n, limbs, survivors(into), sums(totals), place(where));
  });

  m.def("gather",
        [](py::tuple from, int64_t rows, py::tuple references, Address num, py::tuple where) {
          cuda::gather(survivors(from), rows, matrix(references), at<int64_t>(num), place(where));
        });

  m.def("finish",
        [](Address num, Address total, Address affine, Address c_D, Address c_x, Address x,
           bool wide, int64_t rows, int64_t ref_limbs, int64_t dim, Address out, py::tuple where) {
          cuda::finish(at<const int64_t>(num), at<const int64_t>(total), at<const double>(affine),
                       at<const double>(c_D), at<const double>(c_x), at<const void>(x), wide, rows,
                       ref_limbs, dim, at<void>(out), place(where));
        });

  m.def("magnitude", [](Address data, bool wide, int64_t size, Address largest, py::tuple where) {
    cuda::magnitude(at<const void>(data), wide, size, at<int64_t>(largest), place(where));
  });

  m.def("fix", [](Address data, bool wide, int64_t size, Address largest, int limbs, Address values,
                  Address scale, py::tuple where) {
    cuda::fix(at<const void>(data), wide, size, at<const int64_t>(largest), limbs,
              at<int8_t>(values), at<double>(scale), place(where));
  });

  m.def("norms", [](py::tuple references, double twice_offset, Address out, py::tuple where) {
    cuda::norms(matrix(references), twice_offset, at<double>(out), place(where));
  });

  m.def("transpose", [](py::tuple references, Address columns, py::tuple where) {
    cuda::transpose(matrix(references), at<int8_t>(columns), place(where));
  });

  m.def("exp2", [](Address e, Address p, int64_t count, py::tuple where) {
    cuda::exp2(at<const double>(e), at<double>(p), count, place(where));
  });

  m.def("processors", cuda::processors);

  m.def("hopper_built", cuda::hopper::built);
  m.def("hopper_takes_logits", [](py::tuple q, py::tuple references) {
    return cuda::hopper::takes_logits(digits(q), matrix(references));
  });
  m.def("hopper_takes_dense", [](py::tuple from, int64_t rows, int limbs, py::tuple columns) {
    return cuda::hopper::takes_dense(survivors(from), rows, limbs, matrix(columns));
  });

  m.def("logits",
        [](bool hopper, py::tuple q, py::tuple references, py::tuple fields, py::tuple where) {
          const auto compute = hopper ? cuda::hopper::logits : cuda::portable::logits;
          compute(digits(q), matrix(references), logit_call(fields), place(where));
        });

  m.def("multiply_dense", [](bool hopper, py::tuple from, int64_t rows, int limbs,
                             py::tuple columns, Address num, py::tuple where) {
    const auto compute = hopper ? cuda::hopper::multiply_dense : cuda::portable::multiply_dense;
    compute(survivors(from), rows, limbs, matrix(columns), at<int64_t>(num), place(where));
  });
}

}  // namespace stf

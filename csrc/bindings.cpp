// The module _C: addresses and sizes in, nothing of torch. Arguments are checked by its callers.
#include "bindings.h"

#include "arithmetic.h"
#include "cpu_stages.h"
#include "cuda_bindings.h"

namespace py = stf::py;

namespace {

using stf::Address, stf::at, stf::logit_call;

stf::Digits digits(py::tuple fields) {
  return {at<const void>(fields[0]), fields[1].cast<int64_t>(), fields[2].cast<int64_t>(),
          fields[3].cast<int64_t>(), fields[4].cast<bool>()};
}

stf::Quantized quantized(py::tuple fields) {
  return {at<const int8_t>(fields[0]), fields[1].cast<int64_t>(), fields[2].cast<int64_t>()};
}

stf::Peaks peaks(py::tuple fields) {
  return {at<double>(fields[0]), at<double>(fields[1]), at<int64_t>(fields[2])};
}

stf::Survivors survivors(py::tuple fields) {
  return {fields[0].cast<int64_t>(), at<int64_t>(fields[1]), at<int32_t>(fields[2]),
          at<int32_t>(fields[3]),    at<int8_t>(fields[4]),  at<int64_t>(fields[5])};
}

stf::Statistics statistics(py::tuple fields) {
  return {at<int64_t>(fields[0]), at<int64_t>(fields[1]), at<int64_t>(fields[2]),
          at<int64_t>(fields[3])};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  static stf::CpuStages cpu = *stf::cpu_stages().front();
  m.def("isa", [] { return cpu.isa; });
  m.def("isas", [] {
    py::list names;
    for (const auto* stages : stf::cpu_stages()) names.append(stages->isa);
    return names;
  });
  m.def("use_isa", [](const std::string& isa) {  // for tests: the bits are the same in each
    for (const auto* stages : stf::cpu_stages())
      if (isa == stages->isa) return void(cpu = *stages);
    throw py::value_error("isa must be one this processor has, got " + isa);
  });

  // The CUDA part: the architectures it was built for, or why it was not.
  m.attr("cuda_architectures") = STF_CUDA_ARCHITECTURES;
  m.attr("cuda_absent") = STF_CUDA_ABSENT;
#ifdef STF_WITH_CUDA
  auto cuda = m.def_submodule("cuda");
  stf::bind_cuda(cuda);
#endif
  m.def("exp2", [](Address e, Address p, int64_t count) {
    for (int64_t i = 0; i < count; ++i) at<double>(p)[i] = stf::exp2_spec(at<double>(e)[i]);
  });

  m.def("quantize",
        [](Address x, bool wide, int64_t rows, int64_t dim, int limbs, Address out,
           int64_t row_stride, int64_t limb_stride, Address step, Address exponent, int threads) {
          py::gil_scoped_release unlocked;
          cpu.quantize(at<const void>(x), wide, rows, dim, limbs, at<int8_t>(out), row_stride,
                       limb_stride, at<double>(step), at<const int64_t>(exponent), threads);
        });

  m.def("norms", [](Address values, int64_t limbs, int64_t count, int64_t dim, double twice_offset,
                    Address out, int threads) {
    py::gil_scoped_release unlocked;
    cpu.norms(at<const int8_t>(values), limbs, count, dim, twice_offset, at<double>(out), threads);
  });

  m.def("coefficients", [](py::tuple fields, int64_t rows, py::tuple q, int threads) {
    const auto of = stf::levels(fields);
    const auto from = quantized(q);
    py::gil_scoped_release unlocked;
    cpu.coefficients(of, rows, from, threads);
  });

  m.def("halve", [](py::tuple q, int64_t rows, Address halves, int threads) {
    const auto from = quantized(q);
    py::gil_scoped_release unlocked;
    cpu.halve(from, rows, at<int16_t>(halves), threads);
  });

  m.def("multiply",
        [](Address left, int64_t rows, int64_t terms, py::tuple right, Address sums, int threads) {
          const stf::Int8Matrix matrix{at<const int8_t>(right[0].cast<Address>()),
                                       right[1].cast<int64_t>(), right[2].cast<int64_t>(),
                                       right[3].cast<int64_t>()};
          py::gil_scoped_release unlocked;
          cpu.multiply(at<const int16_t>(left), rows, terms, matrix, at<int64_t>(sums), threads);
        });

  m.def("seen",
        [](Address labels, int64_t rows, Address ref_labels, int64_t n, Address out, int threads) {
          py::gil_scoped_release unlocked;
          cpu.logits->seen(at<const int64_t>(labels), rows, at<const int64_t>(ref_labels), n,
                           at<uint8_t>(out), threads);
        });

  m.def("logits", [](py::tuple dots, Address index, int64_t count, int64_t ref_limbs,
                     py::tuple fields, int64_t first, int threads) {
    const auto sums = digits(dots);
    const auto call = logit_call(fields);
    py::gil_scoped_release unlocked;
    cpu.logits->logits(sums, at<const int64_t>(index), count, ref_limbs, call, first, threads);
  });

  m.def("bound", [](py::tuple tops, Address index, int64_t count, py::tuple q, double offset,
                    py::tuple fields, int64_t first, py::tuple of_rows, int threads) {
    const auto sums = digits(tops);
    const auto from = quantized(q);
    const auto call = logit_call(fields);
    const auto known = peaks(of_rows);
    py::gil_scoped_release unlocked;
    cpu.logits->bound(sums, at<const int64_t>(index), count, from, offset, call, first, known,
                      threads);
  });

  m.def("settle", [](Address index, int64_t count, Address halves, int64_t dim, Address values,
                     py::tuple fields, py::tuple of_rows, Address candidates, int threads) {
    const auto call = logit_call(fields);
    const auto known = peaks(of_rows);
    py::gil_scoped_release unlocked;
    cpu.logits->settle(at<const int64_t>(index), count, at<const int16_t>(halves), dim,
                       at<const int8_t>(values), call, known, at<int64_t>(candidates), threads);
  });

  m.def("refine", [](Address index, int64_t count, Address halves, int64_t dim, Address values,
                     py::tuple fields, Address floor, int threads) {
    const auto call = logit_call(fields);
    py::gil_scoped_release unlocked;
    cpu.logits->refine(at<const int64_t>(index), count, at<const int16_t>(halves), dim,
                       at<const int8_t>(values), call, at<const double>(floor), threads);
  });

  m.def("weights",
        [](Address relative, Address anchors, int64_t rows, int64_t n, int limbs, double scale,
           Address peak, Address total, py::tuple lists, py::tuple sums, int threads) {
          const auto into = survivors(lists);
          const auto stats = statistics(sums);
          py::gil_scoped_release unlocked;
          cpu.weights(at<const float>(relative), at<const double>(anchors), rows, n, limbs, scale,
                      at<const double>(peak), at<int64_t>(total), into, stats, threads);
        });

  m.def("gather", [](py::tuple lists, int64_t rows, Address values, int64_t ref_limbs, int64_t n,
                     int64_t dim, Address num, int threads) {
    const auto from = survivors(lists);
    py::gil_scoped_release unlocked;
    cpu.gather(from, rows, at<const int8_t>(values), ref_limbs, n, dim, at<int64_t>(num), threads);
  });

  m.def("add_dense", [](py::tuple sums, py::tuple lists, int64_t rows, int64_t ref_limbs,
                        int64_t limb, int64_t first, int64_t dim, Address num, int threads) {
    const auto from = digits(sums);
    const auto slots = survivors(lists);
    py::gil_scoped_release unlocked;
    cpu.add_dense(from, slots, rows, ref_limbs, limb, first, dim, at<int64_t>(num), threads);
  });

  m.def("finish",
        [](Address num, Address total, Address affine, Address c_D, Address c_x, Address x,
           bool wide, int64_t rows, int64_t ref_limbs, int64_t dim, Address out, int threads) {
          py::gil_scoped_release unlocked;
          cpu.finish(at<const int64_t>(num), at<const int64_t>(total), at<const double>(affine),
                     at<const double>(c_D), at<const double>(c_x), at<const void>(x), wide, rows,
                     ref_limbs, dim, at<void>(out), threads);
        });
}

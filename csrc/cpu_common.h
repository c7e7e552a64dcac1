// What the sources of the CPU stages share. Everything has internal linkage but what lies in
// STF_ISA, the namespace of one instruction set: each source is compiled once for every one of
// them.
#pragma once
#include "arithmetic.h"
#include "cpu_stages.h"

namespace stf {
namespace {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// The exact sum over the digits of one row, at column c: least significant digit first.
template <class Sum, int Count>
STF_HD int64_t join(const Sum* sums, int64_t columns, int64_t c) {
  constexpr int kBits = sizeof(Sum) == 4 ? 8 : 16;
  int64_t out = static_cast<int64_t>(sums[c]);
  for (int l = 1; l < Count; ++l)
    out += static_cast<int64_t>(sums[l * columns + c]) * (int64_t{1} << (kBits * l));
  return out;
}

}  // namespace

namespace STF_ISA {
extern const CpuLogits logit_stages;
}
}  // namespace stf

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

// static_cast<double>(x), which compilers vectorise only where there is an instruction for it: the
// upper half in the mantissa of 2^84 + 2^63, the lower one in that of 2^52; one sum rounds.
inline double to_double(int64_t x) {
#if defined(__SSE2__) && !defined(__AVX512DQ__)
  const uint64_t word = static_cast<uint64_t>(x);
  const double high = bits<double>((word >> 32) ^ 0x4530000080000000) - 0x1.00000801p84;
  return high + bits<double>((word & 0xffffffff) | 0x4330000000000000);
#else
  return static_cast<double>(x);
#endif
}

inline double to_double(int32_t x) { return x; }

constexpr int64_t kTerms = 384;  // of an int32 sum of products of halves and digits, 2^22 each
constexpr int64_t kTile = 512;   // values worked on at a time, in the first-level cache

// Row i as 256^below high + low, values j0, ..., j0 + width - 1: the low part is the digits below,
// or what int16 holds of the number for halves, below = 2.
inline void split(const Quantized& q, int64_t i, int64_t below, bool halves, int64_t j0,
                  int64_t width, int32_t* low, int32_t* high) {
  const int8_t* digits = q.digits + i * q.limbs * q.dim + j0;
  for (int64_t j = 0; j < width; ++j) low[j] = high[j] = 0;
  for (int64_t l = q.limbs - 1; l >= below; --l)
    for (int64_t j = 0; j < width; ++j) high[j] = high[j] * 256 + digits[l * q.dim + j];
  for (int64_t l = below - 1; l >= 0; --l)
    for (int64_t j = 0; j < width; ++j) low[j] = low[j] * 256 + digits[l * q.dim + j];
  if (!halves) return;
  for (int64_t j = 0; j < width; ++j) {
    high[j] += (low[j] + 32768) >> 16;
    low[j] = static_cast<int16_t>(low[j]);
  }
}

}  // namespace

namespace STF_ISA {
extern const CpuLogits logit_stages;
void halve(Quantized q, int64_t rows, int16_t* halves, int threads);
void multiply(const int16_t* left, int64_t rows, int64_t terms, Int8Matrix right, int64_t* sums,
              int threads);
}  // namespace STF_ISA
}  // namespace stf

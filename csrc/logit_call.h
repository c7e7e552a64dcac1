// What stage 2 needs besides the digits it multiplies, and where it writes: on every device.
#pragma once
#include <cstdint>

namespace stf {

struct LogitRows {          // of the samples
  const double* slope;      // [B] A step
  const double* curvature;  // [B] C
  const double* offset;     // [B] G of Student-t noise, or null
  const double* exponent;   // [B] K of Student-t noise, or null
  const int64_t* labels;    // [B], or null
};

struct LogitColumns {     // of the references
  const double* norms;    // [n]
  const double* bias;     // [n], or null
  const int64_t* labels;  // [n], or null
};

struct LogitOutputs {
  int64_t n;
  float* relative;  // [B, n], on CUDA devices [B, n padded to 128]
  double* anchors;  // [B, ceil(n / 128)]
};

struct LogitCall {
  LogitRows samples;
  LogitColumns refs;
  LogitOutputs out;
};

}  // namespace stf

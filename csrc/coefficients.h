// What a row is multiplied by in stages 2 and 5 (MATH.md, sections 1 and 4), for host and device.
#pragma once
#include <cmath>

#include "arithmetic.h"

namespace stf {

enum class Kind { score, denoised, epsilon, v, velocity, edm };  // as parameterization.KINDS

struct Levels {          // of the samples, and what is asked of them
  const double* sigma;   // [B]
  const double* alpha;   // [B]
  const double* D;       // [B] of Student-t noise, or null
  Kind kind;             // of the target
  const double* first;   // [B] the parameters of its kind, or null
  const double* second;  // [B]
  const double* affine;  // [2] a, b of the references
  const double* step;    // [B] as stage 1 leaves it
  double* numbers;       // [count, B]: slope, curvature, c_D, c_x, distance, offset, exponent
  int count;             // 4, 5, or with D all 7
};

namespace {

struct OfTarget {
  double c_D, c_x;
};

// Whether stage 1's digits are summed up for them.
STF_HD bool has_distances(const Levels& of) { return of.count > 4; }

STF_HD OfTarget of_target(const Levels& of, int64_t i) {
  const double sigma = of.sigma[i], alpha = of.alpha[i], variance = sigma * sigma;
  switch (of.kind) {
    case Kind::score: return {alpha / variance, -1.0 / variance};
    case Kind::epsilon: return {-alpha / sigma, 1.0 / sigma};
    case Kind::v: return {-(alpha * alpha / sigma + sigma), alpha / sigma};
    case Kind::velocity: {
      const double rate = of.second[i] / sigma;
      return {of.first[i] - rate * alpha, rate};
    }
    case Kind::edm: {
      const double data = of.first[i], total = variance + data * data;
      const double c_skip = data * data / total, c_out = sigma * data / sqrt(total);
      return {1.0 / c_out, -c_skip / c_out};
    }
    case Kind::denoised: break;
  }
  return {1.0, 0.0};
}

// The numbers of row i, of `rows`; q are the sums over its `dim` values, if it has distances.
STF_HD void write_coefficients(const Levels& of, int64_t rows, int64_t i, const HalfSums& q,
                               int64_t dim) {
  double* out = of.numbers + i;
  const double sigma = of.sigma[i] > 0 ? of.sigma[i] : kNaN, variance = sigma * sigma;
  const double slope = of.alpha[i] * of.affine[0], step = of.step[i];
  const OfTarget target = of_target(of, i);
  out[2 * rows] = target.c_D;
  out[3 * rows] = target.c_x;
  double distance = 0;
  if (has_distances(of)) {
    distance = squared_distance(q, step, of.alpha[i] * of.affine[1], dim);
    out[4 * rows] = distance;
  }
  if (of.D) {
    const double freedom = of.D[i], spread = variance * (freedom > 0 ? freedom : kNaN);
    out[0] = 2.0 * slope / spread * step;
    out[rows] = slope * slope / spread;
    out[5 * rows] = distance / spread;
    out[6 * rows] = 0.5 * (static_cast<double>(dim) + freedom);
  } else {
    out[0] = kLog2E * slope / variance * step;
    out[rows] = 0.5 * kLog2E * slope * slope / variance;
  }
}

}  // namespace
}  // namespace stf

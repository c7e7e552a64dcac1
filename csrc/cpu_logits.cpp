#include "cpu_common.h"
#include "parallel.h"

namespace stf {
namespace {

void seen(const int64_t* labels, int64_t rows, const int64_t* ref_labels, int64_t n, uint8_t* seen,
          int threads) {
  parallel_for(ceil_div(n, kBlock), threads, [=](int64_t b) {
    const int64_t* block = ref_labels + b * kBlock;
    const int64_t width = min(kBlock, n - b * kBlock);
    for (int64_t i = 0; i < rows; ++i) {
      bool any = labels[i] == -1;
      for (int64_t k = 0; k < width; ++k) any |= block[k] == labels[i];
      seen[b * rows + i] = any;
    }
  });
}

// From A dot - C N to the logits of row i with references k0, ..., k0 + width - 1. No value falls
// where the one it is made of rises.
void to_logits(const LogitRows& samples, const LogitColumns& refs, int64_t i, int64_t k0,
               int64_t width, double* logit) {
  if (samples.offset) {
    const double offset = samples.offset[i], exponent = samples.exponent[i];
    for (int64_t k = 0; k < width; ++k) {
      const double u = offset - logit[k];
      logit[k] = -exponent * log2_1p(u < 0 ? 0 : u);
    }
  }
  if (refs.bias)
    for (int64_t k = 0; k < width; ++k) logit[k] += refs.bias[k0 + k];
  if (samples.labels && samples.labels[i] != -1)
    for (int64_t k = 0; k < width; ++k)
      logit[k] = refs.labels[k0 + k] == samples.labels[i] ? logit[k] : -kInfinity;
}

// The largest of `top` and kBlock values, those that are NaN left out: in lanes, because compilers
// keep the order of a floating-point reduction.
double largest(const double* values, double top) {
  constexpr int kLanes = 16;
  double lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = top;
  for (int k = 0; k < kBlock; k += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] = values[k + l] > lanes[l] ? values[k + l] : lanes[l];
  for (int l = 0; l < kLanes; ++l) top = lanes[l] > top ? lanes[l] : top;
  return top;
}

// The anchor of a block of logits: NaN if any is, beyond `width` they do not count.
double anchor_of(double* logit, int64_t width) {
  for (int64_t k = width; k < kBlock; ++k) logit[k] = -kInfinity;
  int64_t unordered = 0;  // as wide as the values, or it is not vectorised
  for (int k = 0; k < kBlock; ++k) unordered |= logit[k] == logit[k] ? 0 : 1;
  return unordered ? kNaN : largest(logit, -kInfinity);
}

// ---- all logits

struct Plain {
  Digits dots;
  const int64_t* index;
  int64_t count, ref_limbs;
  LogitCall call;
  int64_t first;

  template <class Sum, int Count>
  void run(int threads) const {
    const Plain self = *this;
    parallel_for(count, threads, [=](int64_t row) {
      for (int64_t c = 0; c < self.dots.columns; c += kBlock)
        self.block<Sum, Count>(row, c, min(kBlock, self.dots.columns - c));
    });
  }

  // The exact product with one reference limb, in float64.
  template <class Sum, int Count>
  void dot(int64_t r, int64_t row, int64_t c, int64_t width, double* to) const {
    int64_t exact[kBlock] = {0};
    for (int64_t span = 0; span < dots.spans; ++span) {
      const int64_t from = ((r * dots.spans + span) * count + row) * Count;
      const Sum* sums = static_cast<const Sum*>(dots.sums) + from * dots.columns + c;
      for (int64_t k = 0; k < width; ++k) exact[k] += join<Sum, Count>(sums, dots.columns, k);
    }
    for (int64_t k = 0; k < width; ++k) to[k] = to_double(exact[k]);
  }

  template <class Sum, int Count>
  void block(int64_t row, int64_t c, int64_t width) const {
    double logit[kBlock], next[kBlock];
    dot<Sum, Count>(ref_limbs - 1, row, c, width, logit);
    for (int64_t r = ref_limbs - 2; r >= 0; --r) {
      dot<Sum, Count>(r, row, c, width, next);
      for (int64_t k = 0; k < width; ++k) logit[k] = logit[k] * 256.0 + next[k];
    }
    const auto& [samples, refs, out] = call;
    const int64_t i = index[row], k0 = first + c;
    const double slope = samples.slope[i], curvature = samples.curvature[i];
    for (int64_t k = 0; k < width; ++k)
      logit[k] = slope * logit[k] - curvature * refs.norms[k0 + k];
    to_logits(samples, refs, i, k0, width, logit);
    const double anchor = anchor_of(logit, width);
    out.anchors[i * ceil_div(out.n, kBlock) + k0 / kBlock] = anchor;
    const double anchored = anchor == -kInfinity ? 0 : anchor;
    float* relative = out.relative + i * out.n + k0;
    for (int64_t k = 0; k < width; ++k) relative[k] = static_cast<float>(logit[k] - anchored);
  }
};

void logits(Digits dots, const int64_t* index, int64_t count, int64_t ref_limbs,
            const LogitCall& call, int64_t first, int threads) {
  const Plain stage{dots, index, count, ref_limbs, call, first};
  if (dots.halves)
    stage.run<int64_t, 2>(threads);
  else if (dots.count == 3)
    stage.run<int32_t, 3>(threads);
  else
    stage.run<int32_t, 4>(threads);
}

// ---- bounds of all logits by products of the most significant digits

// Of q = P t + res, t its upper half or its most significant digit, only t . v_k is known. With z_k
// = v_k + b/a and any mu,
//
//   q . v_k = P t . v_k + (mu res . t - (b/a) sum res) + res . (z_k - mu t),
//
// and the last term is at most ||res|| ||z_k - mu t||, whose square is N_k + d (b/a)^2 less
// 2 mu (t . v_k + (b/a) sum t) plus mu^2 ||t||^2. The best mu makes mu t the likely z: t in the
// references' units, P h t with h = A / 2C, times the share of ||x||^2 that is not noise.
struct Bound {
  double slope, curvature, centre, reach, slack, twice_mu, square;

  Bound(const Quantized& q, bool halves, double offset, const LogitRows& samples, int64_t i) {
    const int64_t below = halves ? 2 : q.limbs - 1;
    int64_t t_sum = 0, t_t = 0, res_sum = 0, res_t = 0, res_res = 0;
    for (int64_t j0 = 0; j0 < q.dim; j0 += kTile) {
      const int64_t width = min(kTile, q.dim - j0);
      int32_t top[kTile], rest[kTile];
      split(q, i, below, halves, j0, width, rest, top);
      for (int64_t j = 0; j < width; ++j) {
        const int32_t t = top[j], res = rest[j];
        t_sum += t;
        t_t += t * t;
        res_sum += res;
        res_t += int64_t{res} * t;
        res_res += int64_t{res} * res;
      }
    }
    const double dim = static_cast<double>(q.dim), place = power_of_two(8 * below);
    const double a = samples.slope[i], c = samples.curvature[i];
    const double noise = samples.offset ? 1 / (c * (2 * samples.exponent[i] - dim))
                                        : kLog2E / (2 * c);  // (sigma / (alpha a))^2
    const double scale = place * a / (2 * c), length = scale * scale * t_t;
    const double signal = 1 - dim * noise / length;
    const double mu = scale * (signal > 0 ? signal : 0);
    const double norm = __builtin_sqrt(static_cast<double>(res_res));
    slope = a * place;
    curvature = c;
    centre = a * (mu * res_t - offset * res_sum);
    reach = __builtin_fabs(a) * norm;
    twice_mu = 2 * mu;
    // Rounding here, in the logits bounded and in log2_1p is below 2^-45 of these sizes.
    const double farthest =
        __builtin_sqrt(dim) * (128 + __builtin_fabs(offset)) +  // of z_k and mu t
        __builtin_fabs(mu) * __builtin_sqrt(static_cast<double>(t_t));
    const double all =
        __builtin_fabs(a) * (place * __builtin_sqrt(static_cast<double>(t_t)) + norm);
    const double sizes =
        (all + c * farthest) * farthest + (samples.offset ? __builtin_fabs(samples.offset[i]) : 0);
    slack = sizes < 0x1p100 ? 0x1p-40 * sizes : kNaN;  // all are candidates: log2_1p ends
    square = dim * offset * offset - twice_mu * offset * t_sum + mu * mu * t_t +
             0x1p-40 * farthest * farthest;
  }

  template <class Sum>
  void apply(const Sum* tops, const double* norms, int64_t width, double* lower,
             double* upper) const {
    for (int64_t k = 0; k < width; ++k) {
      const double dot = to_double(tops[k]), distance = (norms[k] - twice_mu * dot) + square;
      const double middle = (slope * dot - curvature * norms[k]) + centre;
      const double around = reach * __builtin_sqrt(distance > 0 ? distance : 0) + slack;
      lower[k] = middle - around;
      upper[k] = middle + around;
    }
  }
};

// A float that is not below x, and -inf for -inf alone.
float round_up(double x) {
  const double scaled = x * (x > 0 ? 1 + 0x1p-23 : 1 - 0x1p-23);
  constexpr double lowest = std::numeric_limits<float>::lowest();
  return static_cast<float>(scaled < lowest && x != -kInfinity ? lowest : scaled);
}

template <class Sum>
void bound_rows(Digits tops, const int64_t* index, int64_t count, Quantized q, double offset,
                const LogitCall& call, int64_t first, Peaks peaks, int threads) {
  parallel_for(count, threads, [=](int64_t row) {
    const auto& [samples, refs, out] = call;
    const int64_t i = index[row];
    const Sum* dots = static_cast<const Sum*>(tops.sums) + row * tops.columns;
    const Bound bound(q, tops.halves, offset, samples, i);
    for (int64_t c = 0; c < tops.columns; c += kBlock) {
      const int64_t k0 = first + c, width = min(kBlock, tops.columns - c);
      double lower[kBlock], upper[kBlock];
      bound.apply(dots + c, refs.norms + k0, width, lower, upper);
      to_logits(samples, refs, i, k0, width, lower);
      to_logits(samples, refs, i, k0, width, upper);
      float* relative = out.relative + i * out.n + k0;
      for (int64_t k = 0; k < width; ++k) relative[k] = round_up(upper[k]);
      out.anchors[i * ceil_div(out.n, kBlock) + k0 / kBlock] = anchor_of(upper, width);
      for (int64_t k = width; k < kBlock; ++k) lower[k] = -kInfinity;
      const double best = largest(lower, peaks.lower[i]);
      if (!(best > peaks.lower[i])) continue;
      peaks.lower[i] = best;
      for (int64_t k = 0; k < width; ++k)
        if (lower[k] == best) peaks.where[i] = k0 + k;
    }
  });
}

void bound(Digits tops, const int64_t* index, int64_t count, Quantized q, double offset,
           const LogitCall& call, int64_t first, Peaks peaks, int threads) {
  if (tops.halves)
    bound_rows<int64_t>(tops, index, count, q, offset, call, first, peaks, threads);
  else
    bound_rows<int32_t>(tops, index, count, q, offset, call, first, peaks, threads);
}

// ---- exact logits of the references whose bound reaches the peak

constexpr double kAway = 1 - kExp2Floor;  // so far below its row's peak nothing adds to any sum

// Whether a logit of at most `upper` may come within kAway of a peak of at least `floor`.
bool is_candidate(double upper, double floor) {
  return !(upper < floor - kAway) && upper != -kInfinity;
}

int64_t dot(const int16_t* halves, const int8_t* v, int64_t dim) {
  const int16_t *low = halves, *high = halves + dim;
  int64_t out = 0;
  for (int64_t j0 = 0; j0 < dim; j0 += kTerms) {
    const int64_t end = min(j0 + kTerms, dim);
    int32_t low_sum = 0, high_sum = 0;
    for (int64_t j = j0; j < end; ++j) {
      const int16_t value = v[j];
      low_sum += int32_t{low[j]} * value;
      high_sum += int32_t{high[j]} * value;
    }
    out += low_sum + int64_t{high_sum} * 65536;
  }
  return out;
}

void settle(const int64_t* index, int64_t count, const int16_t* halves, int64_t dim,
            const int8_t* values, const LogitCall& call, Peaks peaks, int64_t* candidates,
            int threads) {
  parallel_for(count, threads, [=](int64_t row) {
    const auto& [samples, refs, bounds] = call;
    const int64_t i = index[row], where = peaks.where[i];
    if (where >= 0) {
      const double exact =
          static_cast<double>(dot(halves + 2 * i * dim, values + where * dim, dim));
      double logit = samples.slope[i] * exact - samples.curvature[i] * refs.norms[where];
      to_logits(samples, refs, i, where, 1, &logit);
      if (logit > peaks.floor[i]) peaks.floor[i] = logit;
    }
    const double floor = peaks.floor[i];
    int64_t found = 0;
    for (int64_t k0 = 0; k0 < bounds.n; k0 += kBlock) {
      const double anchor = bounds.anchors[i * ceil_div(bounds.n, kBlock) + k0 / kBlock];
      if (!is_candidate(anchor, floor)) continue;
      const float* upper = bounds.relative + i * bounds.n + k0;
      int32_t here = 0;
      for (int64_t k = 0; k < min(kBlock, bounds.n - k0); ++k)
        here += is_candidate(upper[k], floor);
      found += here;
    }
    candidates[row] = found;
  });
}

// A third of the time where the references are in memory: 332 to 216 ns for 3072 values.
void prefetch(const int8_t* v, int64_t dim) {
  for (int64_t j = 0; j < dim; j += 64) __builtin_prefetch(v + j);
}

// Row i with the references of block b: bounds are replaced by logits.
void refine_block(int64_t i, int64_t b, const int16_t* halves, int64_t dim, const int8_t* values,
                  const LogitCall& call, double floor) {
  const auto& [samples, refs, out] = call;
  double& anchor = out.anchors[i * ceil_div(out.n, kBlock) + b];
  if (!is_candidate(anchor, floor)) {
    anchor = -kInfinity;
    return;
  }
  const int64_t k0 = b * kBlock, width = min(kBlock, out.n - k0);
  float* relative = out.relative + i * out.n + k0;
  double logit[kBlock];
  int64_t found[kBlock], count = 0;
  for (int64_t k = 0; k < width; ++k) {
    logit[k] = 0;
    if (is_candidate(relative[k], floor)) found[count++] = k0 + k;
  }
  for (int64_t c = 0; c < count; ++c) {
    const int64_t k = found[c];
    if (c + 1 < count) prefetch(values + found[c + 1] * dim, dim);
    const double exact = static_cast<double>(dot(halves + 2 * i * dim, values + k * dim, dim));
    logit[k - k0] = samples.slope[i] * exact - samples.curvature[i] * refs.norms[k];
  }
  to_logits(samples, refs, i, k0, width, logit);
  for (int64_t k = 0; k < width; ++k)
    logit[k] = is_candidate(relative[k], floor) ? logit[k] : -kInfinity;
  anchor = anchor_of(logit, width);
  if (!is_candidate(anchor, floor)) anchor = -kInfinity;
  const double anchored = anchor == -kInfinity ? 0 : anchor;
  for (int64_t k = 0; k < width; ++k) relative[k] = static_cast<float>(logit[k] - anchored);
}

void refine(const int64_t* index, int64_t count, const int16_t* halves, int64_t dim,
            const int8_t* values, const LogitCall& call, const double* floor, int threads) {
  const int64_t blocks = ceil_div(call.out.n, kBlock);
  parallel_for(blocks, threads, [=](int64_t b) {  // rows turn to the same values one by one
    for (int64_t row = 0; row < count; ++row)
      refine_block(index[row], b, halves, dim, values, call, floor[index[row]]);
  });
}

}  // namespace

namespace STF_ISA {
const CpuLogits logit_stages = {seen, logits, bound, settle, refine};
}  // namespace STF_ISA
}  // namespace stf

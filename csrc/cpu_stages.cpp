#include "cpu_common.h"
#include "parallel.h"

namespace stf {
namespace {

// ---- quantize

template <class T>
double largest_magnitude(const T* x, int64_t dim) {
  Word<T> largest = 0;
  for (int64_t j = 0; j < dim; ++j) {
    const Word<T> magnitude = magnitude_word(x[j]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return bits<T>(largest);
}

template <class T, int L>
void digits_of_row(const T* x, int64_t dim, double inverse, int8_t* digits, int64_t limb_stride) {
  for (int64_t j = 0; j < dim; ++j) {
    int32_t q = static_cast<int32_t>(round_to_int(static_cast<double>(x[j]) * inverse));
    for (int l = 0; l < L; ++l) digits[l * limb_stride + j] = take_digit(q);
  }
}

template <class T>
void quantize_rows(const T* x, int64_t rows, int64_t dim, int limbs, int8_t* digits,
                   int64_t row_stride, int64_t limb_stride, double* step, const int64_t* exponent,
                   int threads) {
  const auto write_digits = limbs == 1   ? digits_of_row<T, 1>
                            : limbs == 2 ? digits_of_row<T, 2>
                            : limbs == 3 ? digits_of_row<T, 3>
                                         : digits_of_row<T, 4>;
  parallel_for(rows, threads, [=](int64_t i) {
    const T* row = x + i * dim;
    int8_t* out = digits + i * row_stride;
    const double largest = exponent ? 0 : largest_magnitude(row, dim);
    const bool finite = largest < kInfinity;
    const int64_t e = exponent ? *exponent : fixed_point_exponent(largest, limbs);
    if (step) step[i] = finite ? power_of_two(e) : kNaN;
    if (!finite) {
      for (int l = 0; l < limbs; ++l) memset(out + l * limb_stride, 0, dim);
      return;
    }
    write_digits(row, dim, power_of_two(-e), out, limb_stride);
  });
}

void quantize(const void* x, bool wide, int64_t rows, int64_t dim, int limbs, int8_t* digits,
              int64_t row_stride, int64_t limb_stride, double* step, const int64_t* exponent,
              int threads) {
  if (wide)
    quantize_rows(static_cast<const double*>(x), rows, dim, limbs, digits, row_stride, limb_stride,
                  step, exponent, threads);
  else
    quantize_rows(static_cast<const float*>(x), rows, dim, limbs, digits, row_stride, limb_stride,
                  step, exponent, threads);
}

// ---- norms

// The sums over a row of digits, `stride` bytes from limb to limb.
template <int Limbs, bool Balanced>
HalfSums sums_of_row(const int8_t* digits, int64_t stride, int64_t dim) {
  HalfSums sums{};
  for (int64_t j = 0; j < dim; ++j) {
    int8_t digit[Limbs];
    for (int l = 0; l < Limbs; ++l) digit[l] = digits[l * stride + j];
    sums.add<Balanced>(digit);
  }
  return sums;
}

void norms(const int8_t* values, int64_t limbs, int64_t count, int64_t dim, double twice_offset,
           double* out, int threads) {
  const auto sums = limbs == 1   ? sums_of_row<1, false>
                    : limbs == 2 ? sums_of_row<2, false>
                    : limbs == 3 ? sums_of_row<3, false>
                                 : sums_of_row<4, false>;
  parallel_for(count, threads, [=](int64_t k) {
    out[k] = norm(sums(values + k * dim, count * dim, dim), twice_offset);
  });
}

// ---- coefficients

void coefficients(Levels of, int64_t rows, Quantized q, int threads) {
  const auto sums = q.limbs == 3 ? sums_of_row<3, true> : sums_of_row<4, true>;
  parallel_for(rows, has_distances(of) ? threads : 1, [=](int64_t i) {
    const int8_t* digits = q.digits + i * q.limbs * q.dim;
    const HalfSums found = has_distances(of) ? sums(digits, q.dim, q.dim) : HalfSums{};
    write_coefficients(of, rows, i, found, q.dim);
  });
}

// ---- weights

constexpr double kSurvives = -32;  // below 2^-32 a weight rounds to zero in every precision

struct Row {  // one row on its way through stage 3
  const float* relative;
  const double* anchors;
  int64_t n;
  double peak, scale, floor;

  int64_t width(int64_t b) const { return min(kBlock, n - b * kBlock); }

  // How many weights may survive: at most a few more than do.
  int64_t candidates() const {
    int64_t count = 0;
    for (int64_t b = 0; b < ceil_div(n, kBlock); ++b) {
      const double shift = anchors[b] - peak;
      if (!(shift >= kSurvives)) continue;
      const float* r = relative + b * kBlock;
      int32_t here = 0;
      for (int64_t k = 0; k < width(b); ++k) here += static_cast<double>(r[k]) + shift >= kSurvives;
      count += here;
    }
    return count;
  }

  // e, p and P of one block, e = -1 and P = 0 beyond n; false if the block is below the floor.
  bool block(int64_t b, double* e, double* p, double* weight) const {
    const double shift = anchors[b] - peak;
    if (!(shift >= floor)) return false;
    const float* r = relative + b * kBlock;
    for (int64_t k = 0; k < width(b); ++k) {
      const double exact = static_cast<double>(r[k]) + shift;
      const bool alive = exact >= kExp2Floor;
      e[k] = alive ? exact : 0;
      const double value = exp2_spec(e[k]);
      p[k] = alive ? value : 0;
      weight[k] = round_to_even(p[k] * scale);
    }
    for (int64_t k = width(b); k < kBlock; ++k) e[k] = -1, p[k] = weight[k] = 0;
    return true;
  }
};

void add_statistics(const double* e, const double* p, const double* weight, int64_t first,
                    int64_t i, Statistics statistics) {
  int64_t square = 0, bits = 0, lost = 0;
  for (int k = 0; k < kBlock; ++k) {
    square += square_term(weight[k]);
    bits += bits_term(weight[k], e[k]);
    lost += lost_term(weight[k], p[k]);
  }
  statistics.square[i] += square;
  statistics.bits[i] += bits;
  statistics.lost[i] += lost;
  for (int k = 0; k < kBlock && statistics.argmax[i] < 0; ++k)
    if (e[k] == 0 && weight[k] > 0) statistics.argmax[i] = first + k;
}

void weights(const float* relative, const double* anchors, int64_t rows, int64_t n, int limbs,
             double scale, const double* peak, int64_t* total, Survivors survivors,
             Statistics statistics, int threads) {
  const int64_t blocks = ceil_div(n, kBlock);
  parallel_for(rows, threads, [=](int64_t i) {
    total[i] = survivors.count[i] = 0;
    if (statistics.argmax) {
      statistics.square[i] = statistics.bits[i] = statistics.lost[i] = 0;
      statistics.argmax[i] = -1;
    }
    if (!(peak[i] - peak[i] == 0)) return;  // not finite: a NaN row

    const double floor = statistics.argmax ? kExp2Floor : kSurvives;
    const Row row{relative + i * n, anchors + i * blocks, n, peak[i], scale, floor};
    const bool dense = row.candidates() > survivors.capacity;
    const int64_t slot = dense ? __atomic_fetch_add(survivors.slots, 1, __ATOMIC_RELAXED) : 0;
    int8_t* digits = survivors.digits + slot * limbs * n;
    int32_t* index = survivors.index + i * survivors.capacity;
    int32_t* list = survivors.weight + i * survivors.capacity;
    int64_t count = 0, sum = 0;
    double e[kBlock], p[kBlock], weight[kBlock];
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * kBlock, width = row.width(b);
      if (!row.block(b, e, p, weight)) {
        for (int l = 0; dense && l < limbs; ++l) memset(digits + l * n + first, 0, width);
        continue;
      }
      if (statistics.argmax) add_statistics(e, p, weight, first, i, statistics);
      for (int64_t k = 0; k < width; ++k) sum += round_to_int(weight[k]);
      if (dense) {
        for (int64_t k = 0; k < width; ++k) {
          int32_t q = static_cast<int32_t>(round_to_int(weight[k]));
          for (int l = 0; l < limbs; ++l) digits[l * n + first + k] = take_digit(q);
        }
      } else {
        for (int64_t k = 0; k < width; ++k) {
          if (weight[k] == 0) continue;
          index[count] = static_cast<int32_t>(first + k);
          list[count++] = static_cast<int32_t>(round_to_int(weight[k]));
        }
      }
    }
    total[i] = sum;
    survivors.count[i] = dense ? -1 - slot : count;
  });
}

// ---- weighted sum

void gather(Survivors survivors, int64_t rows, const int8_t* values, int64_t ref_limbs, int64_t n,
            int64_t dim, int64_t* num, int threads) {
  const int64_t tiles = ceil_div(dim, kTile);
  parallel_for(rows, threads, [=](int64_t i) {
    const int64_t count = survivors.count[i];
    const int32_t* index = survivors.index + i * survivors.capacity;
    const int32_t* weight = survivors.weight + i * survivors.capacity;
    for (int64_t r = 0; r < ref_limbs; ++r)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t j0 = t * kTile, width = min(kTile, dim - j0);
        double sum[kTile] = {0};  // exact: |P v| < 2^38, and fewer than 2^15 of them
        const int8_t* plane = values + r * n * dim + j0;
        int64_t s = 0;
        for (; s + 4 <= count; s += 4) {  // four at a time: a quarter of the traffic on sum
          const double w0 = weight[s], w1 = weight[s + 1], w2 = weight[s + 2], w3 = weight[s + 3];
          const int8_t *v0 = plane + index[s] * dim, *v1 = plane + index[s + 1] * dim;
          const int8_t *v2 = plane + index[s + 2] * dim, *v3 = plane + index[s + 3] * dim;
          for (int64_t j = 0; j < width; ++j)
            sum[j] += (w0 * v0[j] + w1 * v1[j]) + (w2 * v2[j] + w3 * v3[j]);
        }
        for (; s < count; ++s) {
          const double w = weight[s];
          const int8_t* v = plane + index[s] * dim;
          for (int64_t j = 0; j < width; ++j) sum[j] += w * v[j];
        }
        int64_t* out = num + (i * ref_limbs + r) * dim + j0;
        for (int64_t j = 0; j < width; ++j) out[j] = static_cast<int64_t>(sum[j]);
      }
  });
}

template <class Sum, int Count>
void add_dense_rows(Digits sums, Survivors survivors, int64_t rows, int64_t stride, int64_t offset,
                    int64_t* num, int threads) {
  parallel_for(rows, threads, [=](int64_t i) {
    if (survivors.count[i] >= 0) return;
    const int64_t slot = -1 - survivors.count[i];
    const Sum* row = static_cast<const Sum*>(sums.sums) + slot * Count * sums.columns;
    int64_t* out = num + i * stride + offset;
    for (int64_t j = 0; j < sums.columns; ++j) out[j] += join<Sum, Count>(row, sums.columns, j);
  });
}

void add_dense(Digits sums, Survivors survivors, int64_t rows, int64_t ref_limbs, int64_t limb,
               int64_t first, int64_t dim, int64_t* num, int threads) {
  const auto add = sums.halves       ? add_dense_rows<int64_t, 2>
                   : sums.count == 3 ? add_dense_rows<int32_t, 3>
                                     : add_dense_rows<int32_t, 4>;
  add(sums, survivors, rows, ref_limbs * dim, limb * dim + first, num, threads);
}

// ---- finish

template <class T>
void finish_rows(const int64_t* num, const int64_t* total, const double* affine, const double* c_D,
                 const double* c_x, const T* x, int64_t rows, int64_t ref_limbs, int64_t dim,
                 T* out, int threads) {
  parallel_for(rows, threads, [=](int64_t i) {
    const double a = affine[0], b = affine[1], sum = static_cast<double>(total[i]);
    const double d_factor = c_D[i], x_factor = c_x[i];
    for (int64_t j = 0; j < dim; ++j) {
      const int64_t* part = num + i * ref_limbs * dim + j;
      double value = to_double(part[(ref_limbs - 1) * dim]);
      for (int64_t r = ref_limbs - 2; r >= 0; --r) value = value * 256.0 + to_double(part[r * dim]);
      const double denoised = a * (value / sum) + b;
      out[i * dim + j] =
          static_cast<T>(d_factor * denoised + x_factor * static_cast<double>(x[i * dim + j]));
    }
  });
}

void finish(const int64_t* num, const int64_t* total, const double* affine, const double* c_D,
            const double* c_x, const void* x, bool wide, int64_t rows, int64_t ref_limbs,
            int64_t dim, void* out, int threads) {
  if (wide)
    finish_rows(num, total, affine, c_D, c_x, static_cast<const double*>(x), rows, ref_limbs, dim,
                static_cast<double*>(out), threads);
  else
    finish_rows(num, total, affine, c_D, c_x, static_cast<const float*>(x), rows, ref_limbs, dim,
                static_cast<float*>(out), threads);
}

}  // namespace

#define STF_QUOTE(name) #name
#define STF_NAME(name) STF_QUOTE(name)

namespace STF_ISA {
extern const CpuStages stages;
const CpuStages stages = {STF_NAME(STF_ISA), quantize, norms,  coefficients, halve, multiply,
                          &logit_stages,     weights,  gather, add_dense,    finish};
}  // namespace STF_ISA
}  // namespace stf

#include "cpu_common.h"
#include "parallel.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace stf {
namespace {

int32_t word(const int16_t* pair) {
  int32_t out;
  memcpy(&out, pair, sizeof out);
  return out;
}

// Lanes of int32. `add_products` multiplies pairs of int16 and adds both products of each pair.
#if defined(__AVX512BW__)
using Lanes = __m512i;
constexpr int kRegisters = 32;
Lanes load(const int16_t* pairs) { return _mm512_loadu_si512(pairs); }
Lanes broadcast(int32_t pair) { return _mm512_set1_epi32(pair); }
Lanes add_products(Lanes sums, Lanes a, Lanes b) {
  return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
}
#elif defined(__AVX2__)
using Lanes = __m256i;
constexpr int kRegisters = 16;
Lanes load(const int16_t* pairs) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
}
Lanes broadcast(int32_t pair) { return _mm256_set1_epi32(pair); }
Lanes add_products(Lanes sums, Lanes a, Lanes b) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
}
#elif defined(__SSE2__)
using Lanes = __m128i;
constexpr int kRegisters = 16;
Lanes load(const int16_t* pairs) { return _mm_loadu_si128(reinterpret_cast<const Lanes*>(pairs)); }
Lanes broadcast(int32_t pair) { return _mm_set1_epi32(pair); }
Lanes add_products(Lanes sums, Lanes a, Lanes b) {
  return _mm_add_epi32(sums, _mm_madd_epi16(a, b));
}
#else
struct Lanes {
  int32_t lane[4];
};
constexpr int kRegisters = 16;
Lanes load(const int16_t* pairs) {
  Lanes out;
  memcpy(&out, pairs, sizeof out);
  return out;
}
Lanes broadcast(int32_t pair) { return {{pair, pair, pair, pair}}; }
Lanes add_products(Lanes sums, Lanes a, Lanes b) {
  int16_t left[8], right[8];
  memcpy(left, &a, sizeof left);
  memcpy(right, &b, sizeof right);
  for (int l = 0; l < 4; ++l)
    sums.lane[l] += left[2 * l] * right[2 * l] + left[2 * l + 1] * right[2 * l + 1];
  return sums;
}
#endif

constexpr int kLanes = sizeof(Lanes) / sizeof(int32_t);
constexpr int kVectors = 2;  // of columns, in registers at a time
constexpr int kWidth = kVectors * kLanes;
constexpr int kRows = (kRegisters - 8) / kVectors;  // likewise
constexpr int64_t kTask = 64;                       // columns, a cache line of them

#if defined(__SSE2__)
// 16 terms of four columns as eight rows of pairs.
void pack_16x4(const int8_t* from, int64_t column_stride, int16_t* to) {
  __m128i low[4], high[4];
  for (int c = 0; c < 4; ++c) {
    const __m128i bytes =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c * column_stride));
    low[c] = _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
    high[c] = _mm_srai_epi16(_mm_unpackhi_epi8(bytes, bytes), 8);
  }
  const auto store = [to](int pair, __m128i four) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * kWidth * pair), four);
  };
  const auto transpose = [store](int pair, const __m128i* of) {
    const __m128i a = _mm_unpacklo_epi32(of[0], of[1]), b = _mm_unpacklo_epi32(of[2], of[3]),
                  c = _mm_unpackhi_epi32(of[0], of[1]), d = _mm_unpackhi_epi32(of[2], of[3]);
    store(pair, _mm_unpacklo_epi64(a, b));
    store(pair + 1, _mm_unpackhi_epi64(a, b));
    store(pair + 2, _mm_unpacklo_epi64(c, d));
    store(pair + 3, _mm_unpackhi_epi64(c, d));
  };
  transpose(0, low);
  transpose(4, high);
}
#endif

// Terms k0, ..., k0 + depth - 1 of kWidth columns from c0 on, as to[pair of terms][column][2], zero
// beyond the matrix.
void pack(const Int8Matrix& right, int64_t k0, int64_t depth, int64_t c0, int16_t* to) {
  const int64_t width = min(kWidth, right.columns - c0);
  const int8_t* from = right.values + k0 * right.term_stride + c0 * right.column_stride;
  const auto place = [=](int64_t k, int64_t c) {
    to[(k / 2 * kWidth + c) * 2 + k % 2] = from[k * right.term_stride + c * right.column_stride];
  };
  int64_t k = 0;
#if defined(__SSE2__)
  if (right.term_stride == 1 && width == kWidth)
    for (; k + 16 <= depth; k += 16)
      for (int64_t c = 0; c < kWidth; c += 4)
        pack_16x4(from + k + c * right.column_stride, right.column_stride, to + k * kWidth + 2 * c);
#endif
  memset(to + k * kWidth, 0, sizeof(int16_t) * 2 * kWidth * ceil_div(depth - k, 2));
  for (; k < depth; ++k)
    for (int64_t c = 0; c < width; ++c) place(k, c);
}

// kRows rows of the left side from `from` on, zero beyond `rows` and `depth`.
void copy_rows(const int16_t* from, int64_t stride, int64_t rows, int64_t depth,
               int16_t (*to)[kTerms]) {
  memset(to, 0, sizeof(int16_t) * kRows * kTerms);
  for (int64_t m = 0; m < min(kRows, rows); ++m)
    memcpy(to[m], from + m * stride, sizeof(int16_t) * depth);
}

// out[m][c] = sum over pairs of terms of kRows rows, `stride` apart, and the packed columns.
void multiply_packed(const int16_t* rows, int64_t stride, int64_t pairs, const int16_t* packed,
                     int32_t (*out)[kWidth]) {
  Lanes sums[kRows][kVectors];
  for (auto& row : sums)
    for (Lanes& lanes : row) lanes = broadcast(0);
#pragma GCC unroll 4
  for (int64_t p = 0; p < pairs; ++p, rows += 2, packed += 2 * kWidth) {
    Lanes right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(packed + 2 * v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Lanes left = broadcast(word(rows + m * stride));
      for (int v = 0; v < kVectors; ++v) sums[m][v] = add_products(sums[m][v], left, right[v]);
    }
  }
  memcpy(out, sums, sizeof sums);
}

// All rows times columns c0, ..., c0 + width - 1, at most kTask of them.
void multiply_columns(const int16_t* left, int64_t rows, int64_t terms, const Int8Matrix& right,
                      int64_t c0, int64_t width, int64_t* sums) {
  int16_t packed[kTask * kTerms], copy[kRows][kTerms];
  for (int64_t k0 = 0; k0 < terms; k0 += kTerms) {
    const int64_t depth = min(kTerms, terms - k0), pairs = ceil_div(depth, 2);
    for (int64_t c = 0; c < width; c += kWidth)
      pack(right, k0, depth, c0 + c, packed + 2 * c * pairs);
    for (int64_t c = 0; c < width; c += kWidth) {
      const int64_t here = min(kWidth, width - c);
      for (int64_t row = 0; row < rows; row += kRows) {
        const int16_t* from = left + row * terms + k0;
        const bool whole = rows - row >= kRows && depth % 2 == 0;
        if (!whole) copy_rows(from, terms, rows - row, depth, copy);
        int32_t part[kRows][kWidth];
        multiply_packed(whole ? from : copy[0], whole ? terms : kTerms, pairs,
                        packed + 2 * c * pairs, part);
        for (int64_t m = 0; m < min(kRows, rows - row); ++m) {
          int64_t* to = sums + (row + m) * right.columns + c0 + c;
          for (int64_t j = 0; j < here; ++j) to[j] = part[m][j] + (k0 == 0 ? 0 : to[j]);
        }
      }
    }
  }
}

}  // namespace

namespace STF_ISA {

void halve(Quantized q, int64_t rows, int16_t* halves, int threads) {
  parallel_for(rows, threads, [=](int64_t i) {
    int16_t *low = halves + 2 * i * q.dim, *high = low + q.dim;
    for (int64_t j0 = 0; j0 < q.dim; j0 += kTile) {
      const int64_t width = min(kTile, q.dim - j0);
      int32_t low_part[kTile], high_part[kTile];
      split(q, i, 2, true, j0, width, low_part, high_part);
      for (int64_t j = 0; j < width; ++j) {
        low[j0 + j] = static_cast<int16_t>(low_part[j]);
        high[j0 + j] = static_cast<int16_t>(high_part[j]);
      }
    }
  });
}

void multiply(const int16_t* left, int64_t rows, int64_t terms, Int8Matrix right, int64_t* sums,
              int threads) {
  const int64_t share = ceil_div(ceil_div(right.columns, threads), kWidth) * kWidth;
  const int64_t task = min(share, kTask);
  parallel_for(ceil_div(right.columns, task), threads, [=](int64_t t) {
    const int64_t c0 = t * task, width = min(task, right.columns - c0);
    multiply_columns(left, rows, terms, right, c0, width, sums);
  });
}

}  // namespace STF_ISA
}  // namespace stf

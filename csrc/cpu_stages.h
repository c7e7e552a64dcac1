// The CPU backend's stages, compiled once for each instruction set and picked at run time.
//
// B rows, n references, d values a row, L limbs of a sample or weight, R limbs of a reference.
// A limb product arrives as int32 sums of base-256 digits, or as int64 sums of base-65536 digits,
// halves, where the machine has no exact int8 product.
#pragma once
#include <cstdint>
#include <vector>

#include "coefficients.h"
#include "logit_call.h"

namespace stf {

struct Digits {      // the sums of one limb product
  const void* sums;  // [R, spans, rows, count, columns] int32, or int64 of halves
  int64_t spans;     // parts of a sum too long for int32, to be added
  int64_t count;     // digits of a sample or weight
  int64_t columns;   // references or values
  bool halves;       // base-65536 digits
};

struct Int8Matrix {      // the right side of a product
  const int8_t* values;  // term k of column c at k term_stride + c column_stride
  int64_t columns;
  int64_t term_stride;
  int64_t column_stride;
};

struct Statistics {  // integer sums of each row, MATH.md section 7; null if not asked for
  int64_t* square;   // [B]
  int64_t* bits;     // [B]
  int64_t* lost;     // [B]
  int64_t* argmax;   // [B]
};

struct Survivors {   // the weights of a row: a short list, or digits for the matrix product
  int64_t capacity;  // a row with more survivors is dense
  int64_t* count;    // [B] survivors, or -1 - slot for a dense row
  int32_t* index;    // [B, capacity]
  int32_t* weight;   // [B, capacity]
  int8_t* digits;    // [slots, L, n]
  int64_t* slots;    // [1] dense rows so far
};

struct Quantized {       // samples as stage 1 left them
  const int8_t* digits;  // [B, L, d]
  int64_t dim;
  int64_t limbs;
};

struct Peaks {     // what is known of the rows' largest logits
  double* floor;   // [B] none is smaller
  double* lower;   // [B] the largest lower bound of a logit
  int64_t* where;  // [B] the reference it belongs to, or -1
};

struct CpuLogits {  // stage 2; `index` names the rows to work on, [count]
  // Input   labels [rows], -1 for a row that sees every reference, ref_labels [n]
  // Output  seen [ceil(n / 128), rows]: 1 if the block has a reference that the row sees, or 0
  void (*seen)(const int64_t* labels, int64_t rows, const int64_t* ref_labels, int64_t n,
               uint8_t* seen, int threads);

  // Input   the products of those rows with references first, ..., first + columns - 1
  // Output  relative and anchors of those rows at those references
  // Math    l = A dot - C N, of Student-t noise -K log2(1 + (G - l)), + bias;
  //         m = max of l over a block of 128; r = float(l - m)
  // Presumes first is a multiple of 128
  void (*logits)(Digits dots, const int64_t* index, int64_t count, int64_t ref_limbs,
                 const LogitCall& call, int64_t first, int threads);

  // Input   the products of those rows' most significant digits, or upper halves, alone: one span
  // Output  relative and anchors: no logit is above its `relative`, nor a block's above its anchor;
  //         peaks: lower raised, and where
  // Math    |res . z_k - mu res . t| <= ||res|| ||z_k - mu t||
  // Presumes one reference limb, offset = b / a, d <= 65 536; first is a multiple of 128
  void (*bound)(Digits tops, const int64_t* index, int64_t count, Quantized q, double offset,
                const LogitCall& call, int64_t first, Peaks peaks, int threads);

  // Input   upper bounds and peaks as `bound` left them, halves [B, 2, d], values [n, d]
  // Output  floor: raised to the exact logit at `where`;
  //         candidates [count]: how many references of a row may come within 64 of its peak
  void (*settle)(const int64_t* index, int64_t count, const int16_t* halves, int64_t dim,
                 const int8_t* values, const LogitCall& call, Peaks peaks, int64_t* candidates,
                 int threads);

  // Input   upper bounds and floor as `settle` left them, halves [B, 2, d], values [n, d]
  // Output  relative and anchors: exact for candidates, -inf for the rest, and an anchor of -inf
  //         for a block without a logit that comes within 64 of the peak
  void (*refine)(const int64_t* index, int64_t count, const int16_t* halves, int64_t dim,
                 const int8_t* values, const LogitCall& call, const double* floor, int threads);
};

struct CpuStages {
  const char* isa;

  // Input   x [B, d] float32 or float64
  // Output  digits int8 at row_stride and limb_stride, step [B], NaN for a row that is not finite
  // Math    q = rint(x / step), step the smallest power of two with max |q| <= limit(L)
  // Shared  one step for all rows if exponent is not null
  void (*quantize)(const void* x, bool wide, int64_t rows, int64_t dim, int limbs, int8_t* digits,
                   int64_t row_stride, int64_t limb_stride, double* step, const int64_t* exponent,
                   int threads);

  // Input   values [R, n, d] int8
  // Output  norms [n]
  // Math    N_k = sum_j v^2 + twice_offset sum_j v
  void (*norms)(const int8_t* values, int64_t limbs, int64_t count, int64_t dim,
                double twice_offset, double* norms, int threads);

  // Input   levels of the samples, and their digits
  // Output  numbers of levels
  // Math    slope A step, curvature C, c_D and c_x; distance S, offset G and exponent K
  void (*coefficients)(Levels levels, int64_t rows, Quantized q, int threads);

  // Input   digits of [rows] samples or weights
  // Output  halves [rows, 2, d]: q = 2^16 high + low, low first
  void (*halve)(Quantized q, int64_t rows, int16_t* halves, int threads);

  // Input   left [rows, terms], right [terms, columns]
  // Output  sums [rows, columns]
  // Math    their product
  void (*multiply)(const int16_t* left, int64_t rows, int64_t terms, Int8Matrix right,
                   int64_t* sums, int threads);

  const CpuLogits* logits;

  // Input   relative [rows, n], anchors [rows, ceil(n / 128)], peak M [rows]
  // Output  total [rows], survivors, statistics
  // Math    P = rint(2^(r + (m - M)) scale)
  void (*weights)(const float* relative, const double* anchors, int64_t rows, int64_t n, int limbs,
                  double scale, const double* peak, int64_t* total, Survivors survivors,
                  Statistics statistics, int threads);

  // Input   the survivor lists, values [R, n, d]
  // Output  num [rows, R, d] of the sparse rows, zero for dense ones
  // Math    num = sum_k P_k v_k
  void (*gather)(Survivors survivors, int64_t rows, const int8_t* values, int64_t ref_limbs,
                 int64_t n, int64_t dim, int64_t* num, int threads);

  // Input   products of the dense rows' digits with values first, ... of one limb
  // Output  added to num [rows, R, d] at that limb and those values
  void (*add_dense)(Digits sums, Survivors survivors, int64_t rows, int64_t ref_limbs, int64_t limb,
                    int64_t first, int64_t dim, int64_t* num, int threads);

  // Input   num [rows, R, d], total [rows], x [rows, d]
  // Output  out [rows, d] of x's type
  // Math    D = a num / total + b; out = c_D D + c_x x
  void (*finish)(const int64_t* num, const int64_t* total, const double* affine, const double* c_D,
                 const double* c_x, const void* x, bool wide, int64_t rows, int64_t ref_limbs,
                 int64_t dim, void* out, int threads);
};

// The stages this processor can run, for the best instruction set first.
std::vector<const CpuStages*> cpu_stages();

}  // namespace stf

// The CUDA backend's stages as the host calls them; nothing of CUDA but a stream without its type.
//
// B rows, n references, d values a row, L limbs of a sample or weight, R limbs of a reference.
// Pointers are to memory of the device. Every function enqueues on the caller's stream and returns:
// nothing waits, nothing is allocated, and a call can be captured in a graph. What CUDA refuses is
// a std::runtime_error that names the call and the shape.
#pragma once
#include <cstdint>

#include "coefficients.h"
#include "logit_call.h"

namespace stf::cuda {

constexpr int kCapacity = 128;  // a row with more survivors is dense

struct Place {
  int device;
  void* stream;  // cudaStream_t
};

struct Matrix {  // int8 [limbs, rows, terms]: references, or the transposed copy of them
  const int8_t* values;
  int64_t limbs;
  int64_t rows;
  int64_t terms;
  int64_t pitch;  // rows from limb to limb
};

struct Digits {  // int8 [rows, limbs, terms padded to 128], zero in the padding: samples, weights
  const int8_t* digits;
  int64_t rows;
  int64_t limbs;  // 3 or 4
};

struct Survivors {      // the weights of a row: a short list, or digits for the matrix product
  int32_t* count;       // [B] survivors, or -1 - slot for a dense row
  int32_t* index;       // [B, kCapacity], in any order
  int32_t* weight;      // [B, kCapacity]
  int8_t* digits;       // [B, L, n padded to 128]: by slot, of which the first `dense` are written
  int32_t* dense;       // [1] dense rows; the caller clears it
  int32_t* dense_rows;  // [B] the row of each slot, of which the first `dense` are written
};

struct Sums {  // integer sums of each row, MATH.md section 7; all but total null if not asked for
  int64_t* total;   // [B]
  int64_t* square;  // [B]
  int64_t* bits;    // [B]
  int64_t* lost;    // [B]
  int64_t* argmax;  // [B]
};

// Stage 1.
// Input   x [rows, dim] float32, or float64 if wide
// Output  digits int8 [rows, limbs, dim padded to 128], zero in the padding; step [rows], NaN for a
//         row that is not finite
// Math    q = rint(x / step), step the smallest power of two with max |q| <= limit(limbs)
void quantize(const void* x, bool wide, int64_t rows, int64_t dim, int limbs, int8_t* digits,
              double* step, Place place);

// The coefficients of stages 2 and 5.
// Input   levels of the samples, and their digits
// Output  numbers of levels
// Math    slope A step, curvature C, c_D and c_x; distance S, offset G and exponent K
void coefficients(Levels levels, Digits q, int64_t dim, Place place);

// Stage 3.
// Input   relative [rows, n padded to 128] and anchors [rows, ceil(n / 128)] as stage 2 leaves
//         them; peak M [rows]
// Output  survivors, sums
// Math    P = rint(2^(r + (m - M)) limit(limbs))
void weights(const float* relative, const double* anchors, const double* peak, int64_t rows,
             int64_t n, int limbs, Survivors survivors, Sums sums, Place place);

// Stage 4 for the rows with few survivors.
// Input   the lists; references [R, n, d], of up to 6 limbs when they are the norms' digits
// Output  num int64 [rows, R, d]: zeros for dense rows, to which multiply_dense may add
// Math    num = sum_k P_k v_k
void gather(Survivors survivors, int64_t rows, Matrix references, int64_t* num, Place place);

// Stage 5.
// Input   num [rows, R, dim], total, c_D, c_x [rows], affine [2], x [rows, dim] float32, or
//         float64 if wide
// Output  out [rows, dim] of x's type
// Math    D = a num / total + b; out = c_D D + c_x x
void finish(const int64_t* num, const int64_t* total, const double* affine, const double* c_D,
            const double* c_x, const void* x, bool wide, int64_t rows, int64_t ref_limbs,
            int64_t dim, void* out, Place place);

// References in fixed point.
// Input   data [size] float32, or float64 if wide
// Output  largest [1], which the caller clears: the word of max |data|, infinity above all finite
//         ones, NaN on top
void magnitude(const void* data, bool wide, int64_t size, int64_t* largest, Place place);

// Input   data [size] float32, or float64 if wide; largest as `magnitude` leaves it
// Output  values int8 [limbs, size]; scale a [1], NaN and values 0 for data that are not finite
// Math    v = rint(y / a), a the smallest power of two with max |v| <= limit(limbs)
void fix(const void* data, bool wide, int64_t size, const int64_t* largest, int limbs,
         int8_t* values, double* scale, Place place);

// Input   references [R, n, d], R <= 4
// Output  norms [n]
// Math    N_k = sum_j v^2 + twice_offset sum_j v
void norms(Matrix references, double twice_offset, double* norms, Place place);

// Input   references [R, n, d]
// Output  columns int8 [R, d, n padded to 128], zero in the padding
void transpose(Matrix references, int8_t* columns, Place place);

// Input   e [count], -63 <= e <= 0
// Output  p [count]: 2^e, for stf_kernels.env to compare with the host's
void exp2(const double* e, double* p, int64_t count, Place place);

// The multiprocessors of a device; throws what CUDA has against it, such as an old driver.
int processors(int device);

// The two products, for every device of compute capability 8.0 and later.
namespace portable {

// Stage 2.
// Input   q [B, L, d padded to 128]; references [R, n, d], R <= 4; what the logits need
// Output  relative, anchors
// Math    l = A dot - C N, of Student-t noise -K log2(1 + (G - l)), + bias;
//         m = max of l over a block of 128; r = float(l - m)
void logits(Digits q, Matrix references, LogitCall call, Place place);

// Stage 4 for the rows with many survivors.
// Input   survivors' digits, L limbs of each; columns [R, d, n padded to 128], R <= 6
// Output  num int64 [rows, R, d] of the dense rows, which `gather` has set to zero
// Math    num = sum_k P_k v_k
void multiply_dense(Survivors survivors, int64_t rows, int limbs, Matrix columns, int64_t* num,
                    Place place);

}  // namespace portable

// The same two for compute capability 9.0, on its own matrix instructions.
namespace hopper {

bool built();  // for sm_90a

// Whether the tensor memory accelerator can read the operands: by shape and address alone.
bool takes_logits(Digits q, Matrix references);
bool takes_dense(Survivors survivors, int64_t rows, int limbs, Matrix columns);

void logits(Digits q, Matrix references, LogitCall call, Place place);
void multiply_dense(Survivors survivors, int64_t rows, int limbs, Matrix columns, int64_t* num,
                    Place place);

}  // namespace hopper
}  // namespace stf::cuda

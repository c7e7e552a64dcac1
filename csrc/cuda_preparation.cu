// References in fixed point, their norms, and the transposed copy that stage 4 multiplies.
#include "cuda_common.cuh"
#include "cuda_launch.h"
#include "cuda_stages.h"

namespace stf::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / kWarp;
constexpr int kEach = 4;  // values of a thread at a time
constexpr int kSpan = kEach * kThreads;
constexpr int64_t kMostBlocks = 4096;  // of `magnitude`, which ends with an atomic maximum
constexpr int kChunk = 16;             // bytes of one access
constexpr int kTile = 128;             // of `transpose`, references and values
constexpr int kChunks = kTile / kChunk;

// The largest magnitude of a set.
// Input     data, floats [size]
// Output    largest [1], raised to the magnitude word of max |data| in float64
// Math      the words' order is the order of magnitudes, infinity above them, NaN on top
// Presumes  largest starts at 0
// Tiles     four values a thread, as far apart as all blocks reach
template <class T>
__global__ void __launch_bounds__(kThreads)
    magnitude_of_all(const T* data, int64_t size, bool aligned, unsigned long long* largest) {
  Word<T> word = 0;
  const int64_t stride = int64_t{gridDim.x} * kSpan;
  for (int64_t j = int64_t{blockIdx.x} * kSpan + kEach * threadIdx.x; j < size; j += stride) {
    const auto values = load<kEach>(data + j, size - j, aligned);
#pragma unroll
    for (const T value : values.at) word = Most()(word, magnitude_word(value));
  }
  word = block_reduce<kThreads>(word, Most());
  if (threadIdx.x == 0)
    atomicMax(largest, bits<unsigned long long>(static_cast<double>(bits<T>(word))));
}

// Float references in fixed point.
// Input     data, floats [size]; largest int64 [1], as `magnitude_of_all` leaves it
// Output    values int8 [R, size]; scale float64 [1]
// Math      v = rint(y / a), a = 2^e the smallest with max |y| <= a limit(R)
// Presumes  nothing: a set that is not finite has v = 0 and a = NaN
// Tiles     four values a thread
template <class T>
__global__ void __launch_bounds__(kThreads)
    fix_values(const T* __restrict__ data, int64_t size, bool aligned, const int64_t* largest,
               int limbs, int8_t* __restrict__ values, double* scale) {
  const double magnitude = bits<double>(*largest);
  const bool finite = magnitude < kInfinity;
  const int exponent = fixed_point_exponent(magnitude, limbs);
  const int64_t j = int64_t{blockIdx.x} * kSpan + kEach * threadIdx.x;
  if (j < size) {
    const auto y = load<kEach>(data + j, finite ? size - j : 0, aligned);
    store_digits(values + j, size, limbs, fixed_point(y, power_of_two(-exponent)), size - j,
                 aligned);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *scale = finite ? power_of_two(exponent) : kNaN;
}

// What of ||x - alpha y||^2 belongs to the reference alone.
// Input     references int8 [R, n, d], limbs `pitch` references apart
// Output    norms float64 [n]
// Math      N = sum v^2 + 2 b / a sum v, with v = 2^16 high + low
// Presumes  nothing
// Tiles     one reference a warp, 16 values a lane at a time
template <int R>
__global__ void __launch_bounds__(kThreads)
    norms_of_rows(Matrix references, bool aligned, double twice_offset, double* norms) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp, dim = references.terms;
  if (row >= references.rows) return;
  const HalfSums sums =
      sums_of_row<R, false>(references.values + row * dim, references.pitch * dim, dim, aligned);
  if (lane_id() == 0) norms[row] = norm(sums, twice_offset);
}

// Byte i of word k becomes byte k of word i.
STF_DEVICE void transpose_bytes(uint32_t (&w)[4]) {
  constexpr uint32_t even = 0x00ff00ff, low = 0x0000ffff;
  uint32_t pairs[4];  // of bytes 0 and 2, then of 1 and 3, of the words two by two
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    pairs[i] = (w[i] & even) | (w[i + 1] & even) << 8;
    pairs[i + 1] = (w[i] >> 8 & even) | (w[i + 1] & ~even);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    w[i] = (pairs[i] & low) | pairs[i + 2] << 16;
    w[i + 2] = pairs[i] >> 16 | (pairs[i + 2] & ~low);
  }
}

// The copy of the references in which a value's n references lie side by side.
// Input     references int8 [R, n, d], limbs `pitch` references apart
// Output    columns int8 [R, d, n padded to 128], zero in the padding
// Math      columns_rjk = values_rkj
// Presumes  nothing
// Tiles     128 references by 128 values of one limb, in shared memory with its words interchanged
//           (word w of reference k at w ^ 4 (k / 16)) so that neither way has conflicts of banks
__global__ void __launch_bounds__(kThreads)
    transpose_tiles(Matrix references, bool aligned, int8_t* columns) {
  struct Shared {
    alignas(16) uint32_t words[kTile][kTile / 4];
  };
  Shared& shared = shared_memory<Shared>();
  const int64_t n = references.rows, dim = references.terms, width = padded(n);
  const unsigned value_tiles = ceil_div(dim, kTile), limbs = references.limbs;
  const unsigned limb = blockIdx.x % limbs;
  const int64_t first_value = int64_t{blockIdx.x / limbs % value_tiles} * kTile;
  const int64_t first_row = int64_t{blockIdx.x / limbs / value_tiles} * kTile;

  for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int64_t j = first_value + kChunk * chunk, k = first_row + row;
    const auto values = load<kChunk>(references.values + (limb * references.pitch + k) * dim + j,
                                     k < n ? dim - j : 0, aligned);
    *reinterpret_cast<Vector<int8_t, kChunk>*>(&shared.words[row][4 * chunk ^ 4 * (row / kChunk)]) =
        values;
  }
  __syncthreads();

  const int group = threadIdx.x % kChunks, word = threadIdx.x / kChunks;  // 16 references, 4 values
  Vector<uint32_t, 4> out[4];                                             // of a value
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      w[i] = shared.words[kChunk * group + 4 * part + i][word ^ 4 * group];
    transpose_bytes(w);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i].at[part] = w[i];
  }
  columns += (limb * dim + first_value + 4 * word) * width + first_row + kChunk * group;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (first_value + 4 * word + i < dim)
      *reinterpret_cast<Vector<uint32_t, 4>*>(columns + i * width) = out[i];
}

// 2^e, for the host to compare with its own.
// Input     e float64 [count]
// Output    p float64 [count]
// Math      p = 2^e by the polynomial of MATH.md, stage 3
// Presumes  -63 <= e <= 0
// Tiles     one value a thread
__global__ void __launch_bounds__(kThreads) powers(const double* e, double* p, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) p[i] = exp2_spec(e[i]);
}

template <class T>
void magnitude_of(const T* data, int64_t size, int64_t* largest, Place place) {
  const Call call{"cuda magnitude", {{"values", size}}};
  const DeviceGuard guard(place.device, call);
  const int64_t blocks = ceil_div(size, kSpan);
  launch(magnitude_of_all<T>, call, {blocks < kMostBlocks ? blocks : kMostBlocks, kThreads},
         place.stream, data, size, holds_vectors<kEach>(data, kEach),
         reinterpret_cast<unsigned long long*>(largest));
}

template <class T>
void fix_of(const T* data, int64_t size, const int64_t* largest, int limbs, int8_t* values,
            double* scale, Place place) {
  const Call call{"cuda fix", {{"values", size}, {"limbs", limbs}}};
  const DeviceGuard guard(place.device, call);
  const bool aligned = holds_vectors<kEach>(data, size) && holds_vectors<kEach>(values, size);
  launch(fix_values<T>, call, {ceil_div(size, kSpan), kThreads}, place.stream, data, size, aligned,
         largest, limbs, values, scale);
}

Call call_of(const char* name, const Matrix& references) {
  return {
      name,
      {{"references", references.rows}, {"values", references.terms}, {"limbs", references.limbs}}};
}

}  // namespace

void magnitude(const void* data, bool wide, int64_t size, int64_t* largest, Place place) {
  if (wide)
    magnitude_of(static_cast<const double*>(data), size, largest, place);
  else
    magnitude_of(static_cast<const float*>(data), size, largest, place);
}

void fix(const void* data, bool wide, int64_t size, const int64_t* largest, int limbs,
         int8_t* values, double* scale, Place place) {
  if (wide)
    fix_of(static_cast<const double*>(data), size, largest, limbs, values, scale, place);
  else
    fix_of(static_cast<const float*>(data), size, largest, limbs, values, scale, place);
}

void norms(Matrix references, double twice_offset, double* norms, Place place) {
  const Call call = call_of("cuda norms", references);
  const DeviceGuard guard(place.device, call);
  const auto kernel = references.limbs == 1   ? norms_of_rows<1>
                      : references.limbs == 2 ? norms_of_rows<2>
                      : references.limbs == 3 ? norms_of_rows<3>
                                              : norms_of_rows<4>;
  launch(kernel, call, {ceil_div(references.rows, kWarps), kThreads}, place.stream, references,
         holds_vectors<kChunk>(references.values, references.terms), twice_offset, norms);
}

void transpose(Matrix references, int8_t* columns, Place place) {
  const Call call = call_of("cuda transpose", references);
  const DeviceGuard guard(place.device, call);
  const int64_t tiles = ceil_div(references.rows, kTile) * ceil_div(references.terms, kTile);
  launch(transpose_tiles, call, {references.limbs * tiles, kThreads}, place.stream, references,
         holds_vectors<kChunk>(references.values, references.terms), columns);
}

void exp2(const double* e, double* p, int64_t count, Place place) {
  const Call call{"cuda exp2", {{"values", count}}};
  const DeviceGuard guard(place.device, call);
  launch(powers, call, {ceil_div(count, kThreads), kThreads}, place.stream, e, p, count);
}

int processors(int device) {
  const Call call{"cuda processors", {{"device", device}}};
  return attribute(cudaDevAttrMultiProcessorCount, device, call);
}

}  // namespace stf::cuda

// Stages 1, 3, 5 and the gather of stage 4: everything that goes row by row.
#include "cuda_common.cuh"
#include "cuda_launch.h"
#include "cuda_stages.h"

namespace stf::cuda {
namespace {

constexpr unsigned kRowThreads = 512;  // of a block that has a whole row
constexpr unsigned kThreads = 256;     // of the others
constexpr unsigned kWarps = kRowThreads / kWarp;
constexpr int kEach = 4;                 // values of a thread at a time
constexpr int kSpan = kEach * kThreads;  // values of a block of `finish`
constexpr int kInFlight = 4;             // survivors of a thread of `gather` at a time
constexpr int kMostLanes = 64;           // of a block of `gather`
constexpr unsigned long long kNowhere = ~0ull >> 1;

// Stage 1.
// Input     x float32 or float64 [B, d]
// Output    digits int8 [B, L, d padded to 128], zero in the padding; step float64 [B]
// Math      q = rint(x / step), step = 2^e the smallest with max_j |x_j| <= step limit(L)
// Presumes  nothing: a row that is not finite has q = 0 and step = NaN
// Tiles     one row, four values a thread, twice
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    quantize_rows(const T* __restrict__ x, int64_t dim, bool aligned, int limbs,
                  int8_t* __restrict__ digits, double* step) {
  const int64_t row = blockIdx.x, width = padded(dim);
  x += row * dim;
  digits += row * limbs * width;
  Word<T> word = 0;
  for (int64_t j = kEach * threadIdx.x; j < dim; j += kEach * kRowThreads) {
    const auto values = load<kEach>(x + j, dim - j, aligned);
#pragma unroll
    for (const T value : values.at) word = Most()(word, magnitude_word(value));
  }
  const double largest = bits<T>(block_reduce<kRowThreads>(word, Most()));
  const bool finite = largest < kInfinity;
  const int exponent = fixed_point_exponent(largest, limbs);
  const double scale = power_of_two(-exponent);
  const int64_t seen = finite ? dim : 0;
  for (int64_t j = kEach * threadIdx.x; j < width; j += kEach * kRowThreads)
    store_digits(digits + j, width, limbs,
                 fixed_point(load<kEach>(x + j, seen - j, aligned), scale), kEach, true);
  if (threadIdx.x == 0) step[row] = finite ? power_of_two(exponent) : kNaN;
}

// What the rows are multiplied by in stages 2 and 5.
// Input     levels; digits int8 [B, L, d padded to 128], zero in the padding
// Output    numbers of levels
// Math      csrc/coefficients.h
// Presumes  nothing
// Tiles     one row a warp; of its digits 16 a lane at a time
template <int L>
__global__ void __launch_bounds__(kThreads)
    coefficients_of_rows(Levels levels, int64_t rows, const int8_t* digits, int64_t dim) {
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t width = padded(dim);
  if (row >= rows) return;
  HalfSums sums{};
  if (has_distances(levels))
    sums = sums_of_row<L, true>(digits + row * L * width, width, width, true);
  if (lane_id() == 0) write_coefficients(levels, rows, row, sums, dim);
}

// Hands `use` each block of references of this warp, and how far its anchor is from the peak.
template <class Use>
STF_DEVICE void for_each_block(const double* anchors, int64_t blocks, double peak, const Use& use) {
  const int64_t stride = kWarps * kWarp;
  for (int64_t first = threadIdx.x / kWarp; first < blocks; first += stride) {
    const int64_t ours = first + lane_id() * kWarps;  // a lane reads one of the next 32 anchors
    const double shift = ours < blocks ? anchors[ours] - peak : -kInfinity;
    for (unsigned i = 0; i < kWarp && first + i * kWarps < blocks; ++i)
      use(first + i * kWarps, __shfl_sync(kAllLanes, shift, i));
  }
}

// Stage 3.
// Input     relative float32 [B, n padded to 128], anchors float64 [B, blocks], peak float64 [B]
// Output    survivors: lists of rows with at most kCapacity candidates, digits of the others,
//           compact by slot; sums int64 [B] each
// Math      e = relative + (anchor - peak), P = rint(2^e limit(L)), zero for e < -63
// Presumes  relative <= 0; survivors.dense starts at 0; a row whose peak is not finite has no
// weight Tiles     one row, 128 references a warp, twice; the order of lists and slots is chance,
// no sum
//           is
template <bool Statistics>
__global__ void __launch_bounds__(kRowThreads)
    weigh_rows(const float* __restrict__ relative, const double* __restrict__ anchors,
               const double* peak, int64_t n, int limbs, Survivors survivors, Sums sums) {
  struct Shared {
    int32_t slot, found;
  };
  Shared& shared = shared_memory<Shared>();
  const int64_t row = blockIdx.x, blocks = ceil_div(n, kBlock), width = blocks * kBlock;
  relative += row * width;
  anchors += row * blocks;
  const double top = peak[row], limit_of_weight = limit(limbs);
  const bool finite = top - top == 0;

  // P = 1 asks for e > -1 - log2(limit), a few thousandths above this: room for rounding in float.
  const double survives = -8 * limbs;
  int32_t candidates = 0;
  if (finite)
    for_each_block(anchors, blocks, top, [&](int64_t b, double shift) {
      if (!(shift >= survives)) return;
      const float least = static_cast<float>(survives - shift);
      const int64_t k = b * kBlock + kEach * lane_id();
      const auto r = load<kEach>(relative + k, kEach, true);
#pragma unroll
      for (int i = 0; i < kEach; ++i) candidates += k + i < n && r.at[i] >= least;
    });
  if (threadIdx.x == 0) shared.found = 0;
  candidates = block_reduce<kRowThreads>(candidates, Plus());
  const bool dense = candidates > kCapacity;
  if (dense) {
    if (threadIdx.x == 0) shared.slot = atomicAdd(survivors.dense, 1);
    __syncthreads();
  }
  int8_t* digits = dense ? survivors.digits + shared.slot * limbs * width : nullptr;

  const double floor = Statistics ? kExp2Floor : survives;
  int64_t total = 0, square = 0, entropy = 0, lost = 0;
  unsigned long long first = kNowhere;
  if (finite)
    for_each_block(anchors, blocks, top, [&](int64_t b, double shift) {
      const int64_t k = b * kBlock + kEach * lane_id();
      Vector<int32_t, kEach> weight{};
      if (shift >= floor) {
        const auto r = load<kEach>(relative + k, kEach, true);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const double e = static_cast<double>(r.at[i]) + shift;
          if (!(k + i < n && e >= floor)) continue;
          const double p = exp2_spec(e), w = round_to_even(p * limit_of_weight);
          weight.at[i] = static_cast<int32_t>(w);
          total += weight.at[i];
          if (Statistics) {
            square += square_term(w);
            entropy += bits_term(w, e);
            lost += lost_term(w, p);
            if (e == 0) first = Least()(first, static_cast<unsigned long long>(k + i));
          }
        }
      }
      if (dense) {
        store_digits(digits + k, width, limbs, weight, kEach, true);
        return;
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (weight.at[i] == 0) continue;
        const int64_t at = row * kCapacity + atomicAdd(&shared.found, 1);
        survivors.index[at] = static_cast<int32_t>(k + i);
        survivors.weight[at] = weight.at[i];
      }
    });

  total = block_reduce<kRowThreads>(total, Plus());
  if (threadIdx.x == 0) {
    sums.total[row] = total;
    survivors.count[row] = dense ? -1 - shared.slot : shared.found;
    if (dense) survivors.dense_rows[shared.slot] = static_cast<int32_t>(row);
  }
  if (Statistics) {
    square = block_reduce<kRowThreads>(square, Plus());
    entropy = block_reduce<kRowThreads>(entropy, Plus());
    lost = block_reduce<kRowThreads>(lost, Plus());
    first = block_reduce<kRowThreads>(first, Least());
    if (threadIdx.x == 0) {
      sums.square[row] = square;
      sums.bits[row] = entropy;
      sums.lost[row] = lost;
      sums.argmax[row] = first == kNowhere ? -1 : static_cast<int64_t>(first);
    }
  }
}

// Stage 4 for the rows with few survivors.
// Input     the survivors' lists; values int8 [R, n, d], limbs `pitch` references apart
// Output    num int64 [B, R, d]: zeros for a dense row
// Math      num_ij = sum over the survivors k of P_ik v_kj
// Presumes  N values in one access, or N = 1; `lanes`, a power of two, divides kThreads
// Tiles     `lanes` times N of the d values of one row and limb; groups of so many threads share
//           out the survivors, and their sums meet in shared memory; two blocks at least on a
//           processor, or the compiler saves registers and has one load in flight
template <int N>
__global__ void __launch_bounds__(kThreads, 2)
    gather_rows(Survivors survivors, Matrix values, unsigned lanes, int64_t* num) {
  struct Shared {
    int32_t index[kCapacity], weight[kCapacity];
    int64_t sums[kThreads][N + 1];  // one more, against conflicts of banks
  };
  Shared& shared = shared_memory<Shared>();
  const unsigned tiles = ceil_div(values.terms, lanes * N), limbs = values.limbs;
  const unsigned limb = blockIdx.x / tiles % limbs;
  const int64_t row = blockIdx.x / tiles / limbs;
  const int64_t begin = int64_t{blockIdx.x % tiles} * (lanes * N);
  const int64_t left = values.terms - begin;
  num += (row * limbs + limb) * values.terms + begin;
  const int count = survivors.count[row];
  if (count < 0) {
    for (unsigned j = threadIdx.x; j < lanes * N && j < left; j += kThreads) num[j] = 0;
    return;
  }
  for (int s = threadIdx.x; s < count; s += kThreads) {
    shared.index[s] = survivors.index[row * kCapacity + s];
    shared.weight[s] = survivors.weight[row * kCapacity + s];
  }
  __syncthreads();

  const unsigned groups = kThreads / lanes;
  const int64_t j = threadIdx.x % lanes * N;
  int64_t sums[N] = {};
  if (j < left) {
    const int8_t* v = values.values + limb * values.pitch * values.terms + begin + j;
    for (int s = threadIdx.x / lanes; s < count; s += kInFlight * groups) {
      Vector<int8_t, N> value[kInFlight];
      int64_t weight[kInFlight];
#pragma unroll
      for (int f = 0; f < kInFlight; ++f) {
        const int at = s + f * groups;
        weight[f] = at < count ? shared.weight[at] : 0;
        value[f] = load<N>(v + shared.index[at < count ? at : s] * values.terms, N, true);
      }
#pragma unroll
      for (int f = 0; f < kInFlight; ++f)
#pragma unroll
        for (int i = 0; i < N; ++i) sums[i] += weight[f] * value[f].at[i];
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) shared.sums[threadIdx.x][i] = sums[i];
  __syncthreads();
  for (unsigned o = threadIdx.x; o < lanes * N && o < left; o += kThreads) {
    int64_t sum = 0;
    for (unsigned g = 0; g < groups; ++g) sum += shared.sums[g * lanes + o / N][o % N];
    num[o] = sum;
  }
}

// Stage 5.
// Input     num int64 [B, R, d]; total int64 [B]; affine float64 [2]: a, b; c_D, c_x float64 [B];
//           x float32 or float64 [B, d]
// Output    out, like x
// Math      out = c_D (a num / total + b) + c_x x
// Presumes  nothing: total = 0 makes a NaN row
// Tiles     kSpan of the d values of one row, four a thread
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_rows(const int64_t* __restrict__ num, const int64_t* total, const double* affine,
                const double* c_D, const double* c_x, const T* __restrict__ x, int ref_limbs,
                int64_t dim, bool aligned, T* __restrict__ out) {
  const unsigned tiles = ceil_div(dim, kSpan);
  const int64_t row = blockIdx.x / tiles;
  const int64_t j = int64_t{blockIdx.x % tiles} * kSpan + kEach * threadIdx.x;
  if (j >= dim) return;
  num += row * ref_limbs * dim + j;
  double value[kEach] = {};
  for (int r = ref_limbs - 1; r >= 0; --r) {
    const auto limb = load<kEach>(num + r * dim, dim - j, aligned);
#pragma unroll
    for (int i = 0; i < kEach; ++i) value[i] = value[i] * 256.0 + static_cast<double>(limb.at[i]);
  }
  const double sum = static_cast<double>(total[row]), a = affine[0], b = affine[1];
  const double of_mean = c_D[row], of_x = c_x[row];
  const auto sample = load<kEach>(x + row * dim + j, dim - j, aligned);
  Vector<T, kEach> target;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const double mean = a * (value[i] / sum) + b;
    target.at[i] = static_cast<T>(of_mean * mean + of_x * static_cast<double>(sample.at[i]));
  }
  store<kEach>(out + row * dim + j, target, dim - j, aligned);
}

template <class T>
void quantize_of(const T* x, int64_t rows, int64_t dim, int limbs, int8_t* digits, double* step,
                 Place place) {
  const Call call{"cuda quantize", {{"samples", rows}, {"values", dim}, {"limbs", limbs}}};
  const DeviceGuard guard(place.device, call);
  launch(quantize_rows<T>, call, {rows, kRowThreads}, place.stream, x, dim,
         holds_vectors<kEach>(x, dim), limbs, digits, step);
}

template <class T>
void finish_of(const int64_t* num, const int64_t* total, const double* affine, const double* c_D,
               const double* c_x, const T* x, int64_t rows, int64_t ref_limbs, int64_t dim, T* out,
               Place place) {
  const Call call{"cuda finish", {{"samples", rows}, {"values", dim}, {"limbs", ref_limbs}}};
  const DeviceGuard guard(place.device, call);
  const bool aligned = holds_vectors<kEach>(num, dim) && holds_vectors<kEach>(x, dim) &&
                       holds_vectors<kEach>(out, dim);
  launch(finish_rows<T>, call, {rows * ceil_div(dim, kSpan), kThreads}, place.stream, num, total,
         affine, c_D, c_x, x, ref_limbs, dim, aligned, out);
}

template <int N>
void gather_of(const Survivors& survivors, int64_t rows, const Matrix& references, int64_t* num,
               Place place) {
  const Call call{"cuda gather",
                  {{"samples", rows},
                   {"references", references.rows},
                   {"values", references.terms},
                   {"limbs", references.limbs}}};
  const DeviceGuard guard(place.device, call);
  unsigned lanes = 1;
  while (lanes < kMostLanes && lanes * N < references.terms) lanes *= 2;
  const int64_t tiles = ceil_div(references.terms, lanes * N);
  launch(gather_rows<N>, call, {rows * references.limbs * tiles, kThreads}, place.stream, survivors,
         references, lanes, num);
}

}  // namespace

void quantize(const void* x, bool wide, int64_t rows, int64_t dim, int limbs, int8_t* digits,
              double* step, Place place) {
  if (wide)
    quantize_of(static_cast<const double*>(x), rows, dim, limbs, digits, step, place);
  else
    quantize_of(static_cast<const float*>(x), rows, dim, limbs, digits, step, place);
}

void coefficients(Levels levels, Digits q, int64_t dim, Place place) {
  const Call call{"cuda coefficients", {{"samples", q.rows}, {"values", dim}, {"limbs", q.limbs}}};
  const DeviceGuard guard(place.device, call);
  launch(q.limbs == 3 ? coefficients_of_rows<3> : coefficients_of_rows<4>, call,
         {ceil_div(q.rows, kThreads / kWarp), kThreads}, place.stream, levels, q.rows, q.digits,
         dim);
}

void weights(const float* relative, const double* anchors, const double* peak, int64_t rows,
             int64_t n, int limbs, Survivors survivors, Sums sums, Place place) {
  const Call call{"cuda weights", {{"samples", rows}, {"references", n}, {"limbs", limbs}}};
  const DeviceGuard guard(place.device, call);
  launch(sums.argmax ? weigh_rows<true> : weigh_rows<false>, call, {rows, kRowThreads},
         place.stream, relative, anchors, peak, n, limbs, survivors, sums);
}

void gather(Survivors survivors, int64_t rows, Matrix references, int64_t* num, Place place) {
  if (holds_vectors<16>(references.values, references.terms))
    gather_of<16>(survivors, rows, references, num, place);
  else
    gather_of<1>(survivors, rows, references, num, place);
}

void finish(const int64_t* num, const int64_t* total, const double* affine, const double* c_D,
            const double* c_x, const void* x, bool wide, int64_t rows, int64_t ref_limbs,
            int64_t dim, void* out, Place place) {
  if (wide)
    finish_of(num, total, affine, c_D, c_x, static_cast<const double*>(x), rows, ref_limbs, dim,
              static_cast<double*>(out), place);
  else
    finish_of(num, total, affine, c_D, c_x, static_cast<const float*>(x), rows, ref_limbs, dim,
              static_cast<float*>(out), place);
}

}  // namespace stf::cuda

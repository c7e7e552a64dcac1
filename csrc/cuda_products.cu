// Stages 2 and 4 as products of int8 digits by mma.sync: every compute capability from 8.0 on.
//
// A tile is 128 rows of the wide operand by S samples with all their L digits, so that one read of
// the wide operand serves every digit. Operands pass through a ring of cp.async stages of 64 terms.
#include <algorithm>
#include <type_traits>

#include "cuda_fragment.cuh"
#include "cuda_launch.h"
#include "cuda_stages.h"

namespace stf::cuda::portable {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpRows = 64;  // of a warp: two warps beside each other, four for the samples
constexpr int kMT = kWarpRows / 16;
constexpr int kTerms = 64;  // of a stage
constexpr int kCopy = 16;   // bytes of one cp.async
constexpr int kStages = 4;  // 96 KB at four digits of 64 samples: what compute capability 8.6 has
constexpr int kPartTerms = 512;  // stage 4 cuts n into parts no shorter

// Digits of S = 32 NT samples.
template <int L, int NT>
struct Shape {
  static constexpr int kSamples = 4 * 8 * NT;
  static constexpr int kWideBytes = kTileRows * kTerms;
  static constexpr int kStageBytes = kWideBytes + L * kSamples * kTerms;
  static constexpr size_t kBytes = kStages * kStageBytes;
};

// Where 16 terms of a row lie: any eight rows' share no bank.
STF_DEVICE int swizzled(int row, int chunk) {
  return row * kTerms + (chunk ^ (row / 2 % 4)) * kCopy;
}

struct Operands {        // of a tile
  const int8_t* wide;    // its first row at its first term
  int64_t wide_pitch;    // bytes from row to row
  int64_t next_limb;     // bytes from limb to limb
  int wide_rows;         // that there are; more are zero
  bool aligned;          // to 16 bytes, all of it
  const int8_t* digits;  // the lowest digit of its first sample at its first term
  int64_t digit_pitch;   // bytes from digit to digit, of which a sample has L
  int samples;           // that there are; more are zero
  int terms;             // of a limb
  int limbs;
};

// Fills stages, one after the other: a thread copies 16 terms of every 64th row.
template <int L, int NT>
class Loader {
  using Size = Shape<L, NT>;
  static constexpr int kChunks = kTerms / kCopy, kRows = kThreads / kChunks;

 public:
  STF_DEVICE explicit Loader(const Operands& from)
      : from_(from), row_(threadIdx.x / kChunks), first_(threadIdx.x % kChunks * kCopy) {
    const int sample = row_ % Size::kSamples, digit = row_ / Size::kSamples;
    wide_ = from.wide + row_ * from.wide_pitch + first_;
    digits_ = from.digits + (sample * L + digit) * from.digit_pitch + first_;
    digit_bytes_ = sample < from.samples ? kCopy : 0;
  }

  STF_DEVICE void load(int stage) {
    const int to = stage * Size::kStageBytes + swizzled(row_, first_ / kCopy);
    const int left = max(0, min(from_.terms - first_ - done_, kCopy));
#pragma unroll
    for (int i = 0; i < kTileRows; i += kRows)
      copy(to + i * kTerms, wide_ + i * from_.wide_pitch, row_ + i < from_.wide_rows ? left : 0);
    const SharedAddress digits = shared_address(dynamic_shared_memory()) + to + Size::kWideBytes;
#pragma unroll
    for (int i = 0; i < L * Size::kSamples; i += kRows)
      if (row_ + i < L * Size::kSamples)
        cp_async_16(digits + i * kTerms, digits_ + i / Size::kSamples * from_.digit_pitch,
                    digit_bytes_);
    wide_ += kTerms;
    digits_ += kTerms;
    done_ += kTerms;
    if (done_ >= from_.terms) {
      wide_ += from_.next_limb - done_;
      digits_ -= done_;
      done_ = 0;
    }
  }

 private:
  STF_DEVICE void copy(int to, const int8_t* at, int bytes) const {
    if (from_.aligned) return cp_async_16(shared_address(dynamic_shared_memory()) + to, at, bytes);
    uint32_t words[kCopy / 4] = {};
#pragma unroll
    for (int b = 0; b < kCopy; ++b)
      if (b < bytes)
        words[b / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(at[b])) << b % 4 * 8;
    *reinterpret_cast<uint4*>(dynamic_shared_memory() + to) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }

  const Operands from_;
  const int row_, first_;
  int done_ = 0;  // terms of this limb
  const int8_t *wide_, *digits_;
  int digit_bytes_;
};

// The place of this thread's warp in the tile.
template <int NT>
struct Warp {
  int row = threadIdx.x / kWarp % 2 * kWarpRows;
  int sample = threadIdx.x / kWarp / 2 * (8 * NT);
};

// sums += the products of one stage.
template <int L, int NT>
STF_DEVICE void multiply(Fragment<L, kMT, NT>& sums, int stage) {
  using Size = Shape<L, NT>;
  const Warp<NT> warp;
  const int lane = lane_id();
  const SharedAddress wide = shared_address(dynamic_shared_memory()) + stage * Size::kStageBytes;
  const SharedAddress digits = wide + Size::kWideBytes;

  uint32_t a[kTerms / 32][kMT][4];
#pragma unroll
  for (int k = 0; k < kTerms / 32; ++k)
#pragma unroll
    for (int m = 0; m < kMT; ++m)
      ldmatrix(a[k][m], wide + swizzled(warp.row + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
  for (int l = 0; l < L; ++l)
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      uint32_t b[4];  // all 64 terms
      ldmatrix(b, digits + swizzled(l * Size::kSamples + warp.sample + 8 * j + lane % 8, lane / 8));
#pragma unroll
      for (int k = 0; k < kTerms / 32; ++k)
#pragma unroll
        for (int m = 0; m < kMT; ++m) mma(sums.sums[l][m][j], a[k][m], b[2 * k], b[2 * k + 1]);
    }
}

// The main loop of both products.
// Input    operands; fold(sums) after every stage
// Output   sums
// Math     sums_l += wide digits_l, limb after limb
// Presumes no int32 sum grows beyond kSafeTerms terms before fold clears it
// Tiles    a stage is filled while the kStages - 1 before it are multiplied
template <int L, int NT, class Fold>
STF_DEVICE void accumulate(const Operands& from, Fragment<L, kMT, NT>& sums, const Fold& fold) {
  const int steps = from.limbs * ((from.terms + kTerms - 1) / kTerms);
  Loader<L, NT> loader(from);
  sums.clear();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) loader.load(s);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // everyone's copies are there, and the stage before this one is free
    if (step + kStages - 1 < steps) loader.load((step + kStages - 1) % kStages);
    cp_async_commit();
    multiply<L, NT>(sums, step % kStages);
    fold(sums);
  }
}

// Stage 2.
// Input    q [B, L, d padded to 128]; references [R, n, d]; what the logits need
// Output   relative, anchors
// Math     dot = Horner by 256 over the limbs of float64(exact limb product); then MATH.md stage 2
// Presumes Short: one limb and no more than kSafeTerms values
// Tiles    128 references by 64 samples, or by 32 where sums are folded; samples fastest, so that
//          the references of a block are read from memory once
template <int L, bool Short>
__global__ void __launch_bounds__(kThreads, 1)
    logits_kernel(Digits q, Matrix references, LogitCall call) {
  constexpr int NT = Short ? 2 : 1, kSamples = Shape<L, NT>::kSamples;
  const unsigned sample_tiles = static_cast<unsigned>(ceil_div(q.rows, kSamples));
  const LogitTile tile{call, q.rows, int64_t{blockIdx.x % sample_tiles} * kSamples,
                       blockIdx.x / sample_tiles};
  const int64_t d = references.terms, width = padded(d);
  const int64_t limb = references.pitch * d, first_ref = tile.block * kBlock;
  const Operands from{references.values + (references.limbs - 1) * limb + first_ref * d,
                      d,
                      -limb,
                      static_cast<int>(min(references.rows - first_ref, int64_t{kTileRows})),
                      d % kCopy == 0 && reinterpret_cast<uintptr_t>(references.values) % kCopy == 0,
                      q.digits + tile.first_sample * L * width,
                      width,
                      static_cast<int>(min(q.rows - tile.first_sample, int64_t{kSamples})),
                      static_cast<int>(d),
                      static_cast<int>(references.limbs)};

  const Warp<NT> warp;
  const Corner corner(warp.row, warp.sample);
  Fragment<L, kMT, NT> sums;
  Elements<double, kMT, NT> dot = {};
  if constexpr (Short) {
    accumulate<L, NT>(from, sums, [](auto&) {});
    for_each<kMT, NT>(
        [&](int m, int j, int i) { dot.of[m][j][i] = static_cast<double>(sums.total(m, j, i)); });
  } else {
    Elements<int64_t, kMT, NT> spans = {};  // of the limb, together
    int terms = 0;
    accumulate<L, NT>(from, sums, [&](auto& sums) {
      terms += kTerms;
      const bool whole = terms >= from.terms;
      if (!whole && terms % kSafeTerms != 0) return;
      for_each<kMT, NT>([&](int m, int j, int i) { spans.of[m][j][i] += sums.total(m, j, i); });
      sums.clear();
      if (!whole) return;
      for_each<kMT, NT>([&](int m, int j, int i) {
        dot.of[m][j][i] = dot.of[m][j][i] * 256.0 + static_cast<double>(spans.of[m][j][i]);
      });
      spans = {};
      terms = 0;
    });
  }

  struct Maxima {
    double of[kTileRows / kWarpRows][kSamples];
  };
  make_logits(dot, corner, tile);
  write_logits<kThreads>(dot, corner, tile, shared_memory<Maxima>().of, [] { __syncthreads(); });
}

// Stage 4 for the rows with many survivors.
// Input    digits by slot, dense and dense_rows; columns [R d, n padded to 128]
// Output   num of those rows
// Math     num = sum_k P_k v_k
// Presumes num is zero; the grid has a block for each tile and part, were all rows dense
// Tiles    128 of the R d values by 64 slots, slots fastest; n is cut into as many parts as int32
//          sums ask for, or as keep all processors busy with a small product
template <int L>
__global__ void __launch_bounds__(kThreads, 1)
    dense_kernel(Survivors survivors, Matrix columns, int64_t* num, unsigned processors) {
  constexpr int NT = 2, kSamples = Shape<L, NT>::kSamples;
  const unsigned dense = *survivors.dense, width = static_cast<unsigned>(columns.terms);
  const unsigned slot_tiles = ceil_div(dense, kSamples);
  const unsigned tiles = slot_tiles * static_cast<unsigned>(ceil_div(columns.rows, kTileRows));
  if (tiles == 0) return;
  const unsigned parts =
      max(min(processors / tiles, width / kPartTerms), unsigned(ceil_div(width, kSafeTerms)));
  const unsigned part_terms = padded(ceil_div(width, parts));
  const unsigned part = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t first_term = int64_t{part} * part_terms;
  if (part >= parts || first_term >= width) return;

  const int64_t first_slot = int64_t{tile % slot_tiles} * kSamples;
  const int64_t first_value = int64_t{tile / slot_tiles} * kTileRows;
  const int slots = static_cast<int>(min(dense - first_slot, int64_t{kSamples}));
  const Operands from{columns.values + first_value * width + first_term,
                      width,
                      0,
                      static_cast<int>(min(columns.rows - first_value, int64_t{kTileRows})),
                      true,
                      survivors.digits + first_slot * L * width + first_term,
                      width,
                      slots,
                      static_cast<int>(min(width - first_term, int64_t{part_terms})),
                      1};

  const Warp<NT> warp;
  Fragment<L, kMT, NT> sums;
  accumulate<L, NT>(from, sums, [](auto&) {});
  write_num(
      sums, Corner(warp.row, warp.sample),
      NumTile{num, survivors.dense_rows + first_slot, slots, columns.rows, first_value, parts > 1});
}

// f(std::integral_constant<int, L>) for the L that a precision has.
template <class F>
void with_limbs(int64_t limbs, const Call& call, const F& f) {
  if (limbs == 3) return f(std::integral_constant<int, 3>());
  if (limbs == 4) return f(std::integral_constant<int, 4>());
  fail(call, "limbs must be 3 or 4, got " + std::to_string(limbs));
}

}  // namespace

void logits(Digits q, Matrix references, LogitCall call, Place place) {
  const Call name{"cuda logits",
                  {{"samples", q.rows},
                   {"references", references.rows},
                   {"values", references.terms},
                   {"limbs", references.limbs}}};
  const DeviceGuard guard(place.device, name);
  const int64_t blocks = ceil_div(references.rows, kBlock);
  with_limbs(q.limbs, name, [&](auto limbs) {
    constexpr int L = decltype(limbs)::value;
    const auto start = [&](auto kernel, auto size) {
      launch(kernel, name, Grid{ceil_div(q.rows, size.kSamples) * blocks, kThreads, size.kBytes},
             place.stream, q, references, call);
    };
    if (references.limbs == 1 && references.terms <= kSafeTerms)
      start(logits_kernel<L, true>, Shape<L, 2>());
    else
      start(logits_kernel<L, false>, Shape<L, 1>());
  });
}

void multiply_dense(Survivors survivors, int64_t rows, int limbs, Matrix columns, int64_t* num,
                    Place place) {
  const Call name{"cuda multiply_dense",
                  {{"samples", rows},
                   {"values", columns.rows},
                   {"references", columns.terms},
                   {"limbs", columns.limbs}}};
  const DeviceGuard guard(place.device, name);
  const int processors = attribute(cudaDevAttrMultiProcessorCount, place.device, name);
  const int64_t values = columns.limbs * columns.rows, terms = padded(columns.terms);
  const Matrix flat{columns.values, 1, values, terms, values};
  with_limbs(limbs, name, [&](auto limbs) {
    constexpr int L = decltype(limbs)::value;
    using Size = Shape<L, 2>;
    const int64_t blocks =
        ceil_div(rows, Size::kSamples) * ceil_div(values, kTileRows) * ceil_div(terms, kSafeTerms);
    launch(dense_kernel<L>, name,
           Grid{std::max(blocks, int64_t{processors}), kThreads, Size::kBytes}, place.stream,
           survivors, flat, num, static_cast<unsigned>(processors));
  });
}

}  // namespace stf::cuda::portable

// The two products on the matrix instructions of compute capability 9.0, compiled and not yet run.
//
// Both multiply the rows of a wide operand (references, or the columns' values) by the digits of
// samples (or of weights). A block makes tiles of 128 rows by 64 samples with all L digits at once:
// the digits are L times 64 columns of one wgmma, so that the wide operand passes once for all of
// them and a thread holds all digits of its elements. The two blocks of a cluster take neighbouring
// rows and the same samples: each fetches half of these for both.
//
// A stage is 128 terms of k, 16 KB of the wide operand and 8 L KB of digits. One thread feeds a
// ring of stages by the TMA; two warpgroups of 64 rows each multiply. At L = 4 and the documented
// rate of 4096 products a clock a stage lasts 1024 clocks, in which shared memory, of 128 bytes a
// clock, takes in 48 KB and gives 80 KB, and the L2 cache gives 32 KB to each block.
#include <cuda.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda_fragment.cuh"
#include "cuda_hopper.cuh"
#include "cuda_launch.h"
#include "cuda_stages.h"

namespace stf::cuda::hopper {
namespace {

constexpr unsigned kConsumers = 256;  // threads that multiply; one warpgroup more feeds them
constexpr unsigned kThreads = kConsumers + 128;
constexpr int kRows = kTileRows;  // of the wide operand in a tile
constexpr int kWarpRows = 16, kGroupRows = 64;
constexpr int kSamples = 64;  // in a tile
constexpr int kShare = 32;    // of them that one block of the cluster fetches
constexpr unsigned kCluster = 2;
constexpr int kTerms = kSwizzleBytes;  // of a stage
constexpr int kSafeStages = kSafeTerms / kTerms;
constexpr size_t kSharedBytes = 227 << 10;  // of a block

template <int L>
struct Stage {
  int8_t wide[kRows][kTerms];
  int8_t digits[L][kSamples][kTerms];
};

template <int L, int Stages>
struct Ring {
  Stage<L> stages[Stages];
  uint64_t full[Stages];   // this block's stage has landed
  uint64_t empty[Stages];  // the warps of both blocks are done with it
};

template <int Stages>
struct Cursor {  // where a thread is in the ring
  int stage = 0;
  uint32_t parity = 0;  // of the phase in which `full` ends here
  STF_DEVICE void advance() {
    if (++stage < Stages) return;
    stage = 0;
    parity ^= 1;
  }
};

template <int L>
using Products = Fragment<L, 1, kSamples / 8>;  // of a warp's 16 rows

struct Shape {           // of a product
  const int32_t* dense;  // how many samples there are, or null if the host knows
  int64_t samples;
  int64_t rows;  // of the wide operand
  int limbs;     // of it; if more than one, stages <= kSafeStages
  int stages;    // of 128 terms
};

struct Tile {
  int row, sample;
  int first, end;  // stages
};

// The cluster's tiles: pairs of blocks of 128 rows by 64 samples by parts of the terms. Samples
// come first, so that all of them meet the wide operand while it is in the L2 cache.
struct Tiles {
  int64_t all_samples;
  uint32_t samples, pairs, parts, count;
  int stages, per_part;

  STF_DEVICE void make(const Shape& shape, bool may_cut) {
    all_samples = shape.dense ? *shape.dense : shape.samples;
    stages = shape.stages;
    samples = static_cast<uint32_t>(ceil_div(all_samples, kSamples));
    pairs = static_cast<uint32_t>(ceil_div(shape.rows, kCluster * kRows));
    parts = may_cut ? best_parts() : 1;
    per_part = static_cast<int>(ceil_div(stages, parts));
    count = samples * pairs * parts;
  }

  STF_DEVICE Tile operator[](uint32_t i) const {
    const uint32_t pair = i / samples % pairs, part = i / samples / pairs;
    const int first = static_cast<int>(part) * per_part;
    return {static_cast<int>(pair * kCluster + cluster_rank()) * kRows,
            static_cast<int>(i % samples) * kSamples, first, min(stages, first + per_part)};
  }

 private:
  // The parts with which the clusters end soonest, if adding up a tile takes as long as 4 stages.
  STF_DEVICE uint32_t best_parts() const {
    constexpr uint32_t kMost = 16, kLeastStages = 4, kAdding = 4;
    const uint32_t clusters = gridDim.x / kCluster, terms = static_cast<uint32_t>(stages);
    uint32_t best = 1, least = ~0u;
    for (uint32_t n = 1; n == 1 || (n <= kMost && n * kLeastStages <= terms); ++n) {
      const uint32_t rounds = (samples * pairs * n + clusters - 1) / clusters;
      const uint32_t time = rounds * ((terms + n - 1) / n + kAdding);
      if (time < least) best = n;
      least = min(least, time);
    }
    return best;
  }
};

// f(limb, first stage, stages) for each int32 sum of a tile: limbs from the highest.
template <class F>
STF_DEVICE void for_each_pass(const Shape& shape, const Tile& tile, const F& f) {
  for (int limb = shape.limbs - 1; limb >= 0; --limb)
    for (int first = tile.first; first < tile.end; first += kSafeStages)
      f(limb, first, min(tile.end - first, kSafeStages));
}

// One thread fetches, ahead of the warps that multiply.
template <int L, int Stages>
STF_DEVICE void fetch(Ring<L, Stages>& ring, const CUtensorMap& wide, const CUtensorMap& digits,
                      const Shape& shape, const Tiles& tiles) {
  constexpr uint16_t kBoth = 3;
  const int share = static_cast<int>(cluster_rank()) * kShare;
  Cursor<Stages> at;
  tma_prefetch(&wide);
  tma_prefetch(&digits);
  for (uint32_t i = blockIdx.x / kCluster; i < tiles.count; i += gridDim.x / kCluster) {
    const Tile tile = tiles[i];
    for_each_pass(shape, tile, [&](int limb, int first, int stages) {
#pragma unroll 1
      for (int k = first * kTerms; k < (first + stages) * kTerms; k += kTerms) {
        Stage<L>& stage = ring.stages[at.stage];
        uint64_t* full = &ring.full[at.stage];
        barrier_wait(&ring.empty[at.stage], at.parity ^ 1);
        barrier_expect(full, sizeof stage);
        tma_load(stage.wide, &wide, k, tile.row, limb, full);
#pragma unroll
        for (int l = 0; l < L; ++l)
          tma_multicast(stage.digits[l][share], &digits, k, l, tile.sample + share, full, kBoth);
        at.advance();
      }
    });
  }
}

// The products of this warp's 16 rows in the next stages. A stage is released when its products
// have ended, while those of the next run.
template <int L, int Stages>
STF_DEVICE void multiply(Products<L>& products, Ring<L, Stages>& ring, Cursor<Stages>& at,
                         int stages, int group) {
  constexpr int kColumns = L * kSamples;
  auto& sums = reinterpret_cast<int32_t (&)[kColumns / 2]>(products.sums);
  const auto release = [&](int stage) {
    if (lane_id() < kCluster) barrier_arrive(&ring.empty[stage], lane_id());
  };
  int last = 0;
#pragma unroll 1
  for (int i = 0; i < stages; ++i) {
    const Stage<L>& stage = ring.stages[at.stage];
    const uint64_t rows = operand(stage.wide[group * kGroupRows]);
    const uint64_t columns = operand(stage.digits);
    barrier_wait(&ring.full[at.stage], at.parity);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTerms / kProductTerms; ++k)
      wgmma<kColumns>(sums, advanced(rows, k), advanced(columns, k), i > 0 || k > 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (i > 0) release(last);
    last = at.stage;
    at.advance();
  }
  wgmma_wait<0>();
  release(last);
}

STF_DEVICE void consumers_sync() { named_barrier(1, kConsumers); }

// What a tile's logits need, and their maxima over each warp's references.
struct LogitMemory {
  double slope[kSamples], curvature[kSamples], offset[kSamples], exponent[kSamples];
  int64_t labels[kSamples];
  double norms[kRows], bias[kRows];
  int64_t ref_labels[kRows];
  double maxima[kRows / kWarpRows][kSamples];

  // Begins to copy what belongs to the tile's samples and references, zero beyond them.
  STF_DEVICE void load(const LogitCall& call, const Shape& shape, const Tile& tile) {
    const int i = static_cast<int>(threadIdx.x);
    const auto copy = [&](auto& to, const auto* from, int first, int64_t end) {
      if (from == nullptr || i >= static_cast<int>(sizeof to / sizeof to[0])) return;
      const bool there = first + i < end;
      cp_async_8(shared_address(to + i), there ? from + first + i : from, there ? sizeof *from : 0);
    };
    copy(slope, call.samples.slope, tile.sample, shape.samples);
    copy(curvature, call.samples.curvature, tile.sample, shape.samples);
    copy(offset, call.samples.offset, tile.sample, shape.samples);
    copy(exponent, call.samples.exponent, tile.sample, shape.samples);
    copy(labels, call.samples.labels, tile.sample, shape.samples);
    copy(norms, call.refs.norms, tile.row, shape.rows);
    copy(bias, call.refs.bias, tile.row, shape.rows);
    copy(ref_labels, call.refs.labels, tile.row, shape.rows);
    cp_async_commit();
  }

  // The copies are there, for all; and nobody still reads the maxima of the tile before.
  static STF_DEVICE void wait() {
    cp_async_wait<0>();
    consumers_sync();
  }

  // The tile with these as all samples and references there are.
  STF_DEVICE LogitTile tile(const LogitCall& call, int64_t refs) const {
    LogitTile tile{{}, kSamples, 0, 0};
    tile.call.samples = {slope, curvature, call.samples.offset ? offset : nullptr, exponent,
                         call.samples.labels ? labels : nullptr};
    tile.call.refs = {norms, call.refs.bias ? bias : nullptr, ref_labels};
    tile.call.out.n = min(refs, int64_t{kRows});
    return tile;
  }
};

struct LogitAndSumMemory : LogitMemory {
  int64_t sums[kSamples / 2 * kConsumers];  // of the passes so far, int64 or float64's bits
};

// The consumers' work on a tile of stage 2; OnePass: one limb of no more than kSafeTerms values.
template <bool OnePass>
struct Logits {
  using Memory = std::conditional_t<OnePass, LogitMemory, LogitAndSumMemory>;
  static constexpr bool kCut = false;  // a logit needs all terms
  LogitCall call;

  template <class Multiply>
  STF_DEVICE void operator()(const Shape& shape, const Tiles&, const Tile& tile, Memory& memory,
                             Corner corner, const Multiply& multiply) const {
    const bool there = tile.row < shape.rows;  // the last pair may have one block
    if (there) memory.load(call, shape, tile);
    Elements<double, 1, kSamples / 8> logits;
    if constexpr (OnePass) {
      const auto products = multiply(shape.stages);
      if (!there) return;
      memory.wait();
      make(logits, corner, memory.tile(call, shape.rows - tile.row),
           [&](int j, int i) { return static_cast<double>(products.total(0, j, i)); });
    } else {
      // Horner's rule over limbs in float64, or one limb's exact sum over the passes.
      const bool one_limb = shape.limbs == 1;
      volatile int64_t* const sums = memory.sums + threadIdx.x;
      for (int i = 0; i < kSamples / 2; ++i) sums[i * kConsumers] = 0;
      for_each_pass(shape, tile, [&](int, int, int stages) {
        const auto products = multiply(stages);
        // Volatile, or all of them would be read before the first is written, into registers that
        // there are not.
#pragma unroll
        for (int j = 0; j < kSamples / 8; ++j) {
          int64_t some[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) some[i] = sums[(4 * j + i) * kConsumers];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int64_t total = products.total(0, j, i);
            const double all = bits<double>(some[i]) * 256.0 + static_cast<double>(total);
            sums[(4 * j + i) * kConsumers] = one_limb ? some[i] + total : bits<int64_t>(all);
          }
        }
      });
      if (!there) return;
      memory.wait();
      make(logits, corner, memory.tile(call, shape.rows - tile.row), [&](int j, int i) {
        const int64_t sum = sums[(4 * j + i) * kConsumers];
        return one_limb ? static_cast<double>(sum) : bits<double>(sum);
      });
    }
    write_logits<kConsumers>(logits, corner,
                             LogitTile{call, shape.samples, tile.sample, tile.row / kBlock},
                             memory.maxima, consumers_sync);
  }

 private:
  // Eight samples after the other, for the sake of registers.
  template <class Dot>
  static STF_DEVICE void make(Elements<double, 1, kSamples / 8>& logits, Corner corner,
                              const LogitTile& tile, const Dot& dot) {
#pragma unroll
    for (int j = 0; j < kSamples / 8; ++j, corner.sample += 8) {
      Elements<double, 1, 1> some;
#pragma unroll
      for (int i = 0; i < 4; ++i) some.of[0][0][i] = dot(j, i);
      make_logits(some, corner, tile);
#pragma unroll
      for (int i = 0; i < 4; ++i) logits.of[0][j][i] = some.of[0][0][i];
    }
  }
};

// The same of stage 4.
struct WeightedSum {
  struct Memory {};
  static constexpr bool kCut = true;
  int64_t* num;  // [rows, values of all limbs]
  const int32_t* dense_rows;

  template <class Multiply>
  STF_DEVICE void operator()(const Shape& shape, const Tiles& tiles, const Tile& tile, Memory&,
                             Corner corner, const Multiply& multiply) const {
    const int64_t slots = min(tiles.all_samples - tile.sample, int64_t{kSamples});
    const bool several = tiles.parts > 1 || shape.stages > kSafeStages;
    const NumTile out{
        num, dense_rows + tile.sample, static_cast<int>(slots), shape.rows, tile.row, several};
    for_each_pass(shape, tile,
                  [&](int, int, int stages) { write_num(multiply(stages), corner, out); });
  }
};

template <int L, class Work>
struct Memory {  // of a block
  static constexpr int kStages = (kSharedBytes - sizeof(Tiles) - sizeof(typename Work::Memory)) /
                                 (sizeof(Stage<L>) + 2 * sizeof(uint64_t));
  Ring<L, kStages> ring;
  Tiles tiles;
  typename Work::Memory work;
};

// Input    wide int8 [limbs, rows, terms] and digits int8 [samples, L, terms] as tensor maps, of
//          boxes of 128 bytes by 128 rows and by 32 samples
// Output   what Work makes of them
// Math     dot = sum_l 256^l sum_k digit_lk wide_k for each sample, row and limb
// Presumes clusters of two blocks
// Tiles    `Tiles`, each cluster taking every so many
template <int L, class Work>
__global__ void __launch_bounds__(kThreads, 1)
    product(const __grid_constant__ CUtensorMap wide, const __grid_constant__ CUtensorMap digits,
            const Shape shape, const Work work) {
  static_assert(sizeof(Memory<L, Work>) <= kSharedBytes, "a block has no more");
  auto& memory = *reinterpret_cast<Memory<L, Work>*>(dynamic_shared_memory());
  auto& ring = memory.ring;
  Tiles& tiles = memory.tiles;
  constexpr int kStages = Memory<L, Work>::kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&ring.full[i], 1);
      barrier_init(&ring.empty[i], kCluster * kConsumers / kWarp);
    }
    barrier_init_fence();
    tiles.make(shape, Work::kCut);
  }
  cluster_sync();
  if (threadIdx.x >= kConsumers) {
    registers_lower<40>();
    if (threadIdx.x == kConsumers) fetch(ring, wide, digits, shape, tiles);
  } else {
    registers_raise<232>();
    const int warp = static_cast<int>(__shfl_sync(kAllLanes, threadIdx.x / kWarp, 0));
    const Corner corner(warp * kWarpRows, 0);
    Cursor<kStages> at;
    for (uint32_t i = blockIdx.x / kCluster; i < tiles.count; i += gridDim.x / kCluster)
      work(shape, tiles, tiles[i], memory.work, corner, [&](int stages) {
        Products<L> products;
        multiply(products, ring, at, stages, warp * kWarpRows / kGroupRows);
        return products;
      });
  }
  cluster_sync();  // nobody leaves while the other may still signal to its barriers
}

// A matrix int8 [z, y, x] in memory, and the box of it that the TMA takes at once.
CUtensorMap encode(const int8_t* values, cuuint64_t x, cuuint64_t y, cuuint64_t z,
                   cuuint64_t y_stride, cuuint64_t z_stride, cuuint32_t box_y, cuuint32_t box_z,
                   const Call& call) {
  static const auto encode_tiled = [&] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &result),
          call);
    if (result != cudaDriverEntryPointSuccess) fail(call, "the driver has no tensor maps");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const cuuint64_t sizes[] = {x, y, z}, strides[] = {y_stride, z_stride};
  const cuuint32_t box[] = {kTerms, box_y, box_z}, steps[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult status =
      encode_tiled(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<int8_t*>(values), sizes,
                   strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) fail(call, "no tensor map, CUresult " + std::to_string(status));
  return map;
}

bool fits(const void* values, int64_t rows, int64_t terms, int64_t pitch) {
  constexpr int64_t kMostRows = 1 << 30, kMostBytes = int64_t{1} << 40;
  return reinterpret_cast<uintptr_t>(values) % 16 == 0 && terms % 16 == 0 && rows >= 1 &&
         terms >= 1 && rows <= kMostRows && terms <= kMostRows && pitch * terms < kMostBytes;
}

// Whether all coordinates, strides and counts are in range: `wide` [limbs, rows, terms].
bool takes(Digits digits, Matrix wide) {
  const int64_t tiles = ceil_div(digits.rows, kSamples) * ceil_div(wide.rows, kCluster * kRows);
  return built() && fits(digits.digits, digits.rows, padded(wide.terms), digits.limbs) &&
         fits(wide.values, wide.rows, wide.terms, wide.pitch) && tiles < int64_t{1} << 28;
}

template <int L, class Work>
void multiply(Digits digits, Matrix wide, const int32_t* dense, const Work& work, Place place,
              const Call& call) {
  const DeviceGuard guard(place.device, call);
  const int64_t padded_terms = padded(wide.terms);
  const CUtensorMap wide_map = encode(wide.values, wide.terms, wide.rows, wide.limbs, wide.terms,
                                      std::max(wide.pitch, wide.rows) * wide.terms, kRows, 1, call);
  const CUtensorMap digits_map = encode(digits.digits, padded_terms, L, digits.rows, padded_terms,
                                        L * padded_terms, 1, kShare, call);
  const Shape shape{dense, digits.rows, wide.rows, static_cast<int>(wide.limbs),
                    static_cast<int>(padded_terms / kTerms)};
  const int processors = attribute(cudaDevAttrMultiProcessorCount, place.device, call);
  const Grid grid{processors / kCluster * kCluster, kThreads, sizeof(Memory<L, Work>), kCluster};
  launch(product<L, Work>, call, grid, place.stream, wide_map, digits_map, shape, work);
}

template <class Work>
void multiply(Digits digits, Matrix wide, const int32_t* dense, const Work& work, Place place,
              const Call& call) {
  if (digits.limbs != 3 && digits.limbs != 4)
    fail(call, "digits must be 3 or 4, got " + std::to_string(digits.limbs));
  const auto with_digits = digits.limbs == 3 ? multiply<3, Work> : multiply<4, Work>;
  with_digits(digits, wide, dense, work, place, call);
}

// All limbs' rows as those of one.
Matrix joined(Matrix columns) {
  const int64_t rows = columns.limbs * columns.rows;
  return {columns.values, 1, rows, padded(columns.terms), rows};
}

}  // namespace

bool built() { return true; }

bool takes_logits(Digits q, Matrix references) {
  // With several limbs the memory between passes is taken by Horner's sum over them.
  const bool one_sum = references.limbs == 1 || references.terms <= kSafeTerms;
  return one_sum && takes(q, references);
}

bool takes_dense(Survivors survivors, int64_t rows, int limbs, Matrix columns) {
  const bool contiguous = columns.limbs == 1 || columns.pitch == columns.rows;
  return contiguous && takes({survivors.digits, rows, limbs}, joined(columns));
}

void logits(Digits q, Matrix references, LogitCall call, Place place) {
  const Call name{"cuda logits on sm_90a",
                  {{"samples", q.rows},
                   {"references", references.rows},
                   {"values", references.terms},
                   {"digits", q.limbs},
                   {"limbs", references.limbs}}};
  if (references.limbs == 1 && references.terms <= kSafeTerms)
    multiply(q, references, nullptr, Logits<true>{call}, place, name);
  else
    multiply(q, references, nullptr, Logits<false>{call}, place, name);
}

void multiply_dense(Survivors survivors, int64_t rows, int limbs, Matrix columns, int64_t* num,
                    Place place) {
  multiply({survivors.digits, rows, limbs}, joined(columns), survivors.dense,
           WeightedSum{num, survivors.dense_rows}, place,
           {"cuda multiply_dense on sm_90a",
            {{"samples", rows},
             {"values", columns.rows},
             {"references", columns.terms},
             {"digits", limbs},
             {"limbs", columns.limbs}}});
}

}  // namespace stf::cuda::hopper

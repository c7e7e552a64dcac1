// The part of a product's tile that lies in one thread, and what is made of it.
//
// A tile is rows of the wide operand (references in stage 2, values in stage 4) by samples. Its
// sums over int8 digits come in mma's order: a warp holds blocks of 16 rows by 8 samples, of which
// lane 4 r + c has rows r and r + 8 at samples 2 c and 2 c + 1. All digits of an element lie in one
// thread.
#pragma once
#include <limits>

#include "arithmetic.h"
#include "cuda_device.cuh"
#include "logit_call.h"

namespace stf::cuda {

constexpr int kTileRows = kBlock;  // so that a tile's maxima are the anchors of its references
#ifndef STF_SAFE_TERMS             // tests cut sums shorter
#define STF_SAFE_TERMS 131071
#endif
constexpr int kSafeTerms = STF_SAFE_TERMS / 128 * 128;  // of an int32 sum, in steps of any tile
static_assert(int64_t{128} * 128 * kSafeTerms <= std::numeric_limits<int32_t>::max());
constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// f(m, j, i) for each element of a thread: MT blocks of rows, NT of samples.
template <int MT, int NT, class F>
STF_DEVICE void for_each(const F& f) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(m, j, i);
}

template <class T, int MT, int NT>
struct Elements {
  T of[MT][NT][4];
};

template <int L, int MT, int NT>
struct Fragment {
  int32_t sums[L][MT][NT][4];

  STF_DEVICE void clear() {
#pragma unroll
    for (int l = 0; l < L; ++l)
      for_each<MT, NT>([&](int m, int j, int i) { sums[l][m][j][i] = 0; });
  }

  STF_DEVICE int64_t total(int m, int j, int i) const {
    int64_t total = sums[L - 1][m][j][i];
#pragma unroll
    for (int l = L - 2; l >= 0; --l) total = total * 256 + sums[l][m][j][i];
    return total;
  }
};

struct Corner {  // the place of a thread's first element in its tile
  int row, sample;

  // For the warp whose blocks start at this row and sample.
  STF_DEVICE Corner(int warp_row, int warp_sample)
      : row(warp_row + static_cast<int>(lane_id()) / 4),
        sample(warp_sample + static_cast<int>(lane_id()) % 4 * 2) {}
};

// The same with the element's place in the tile, samples slowest.
template <int MT, int NT, class F>
STF_DEVICE void for_each_element(Corner corner, const F& f) {
#pragma unroll
  for (int j = 0; j < NT; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          f(m, j, 2 * h + e, corner.row + 16 * m + 8 * h, corner.sample + 8 * j + e);
}

struct LogitTile {
  LogitCall call;
  int64_t samples;       // B
  int64_t first_sample;  // of the tile
  int64_t block;         // of 128 references: the tile's
};

// The larger of two, NaN if one is.
STF_DEVICE double larger(double a, double b) { return a != a || a > b ? a : b; }

// Stage 2 from the exact products on.
// Input    dot: this thread's elements of the tile
// Output   dot: their logits; -inf for what is beyond the references
template <int MT, int NT>
STF_DEVICE void make_logits(Elements<double, MT, NT>& dot, Corner corner, const LogitTile& tile) {
  const LogitRows of = tile.call.samples;
  const LogitColumns refs = tile.call.refs;
  const int64_t n = tile.call.out.n;
  const auto each = [&](const auto& change) {
    for_each_element<MT, NT>(corner, [&](int m, int j, int i, int row, int sample) {
      const int64_t s = tile.first_sample + sample, k = tile.block * kBlock + row;
      double& l = dot.of[m][j][i];
      l = change(l, s < tile.samples ? s : tile.samples - 1, k < n ? k : n - 1);
    });
  };
  each([&](double dot, int64_t s, int64_t k) {
    return of.slope[s] * dot - of.curvature[s] * refs.norms[k];
  });
  if (of.offset)
    each([&](double l, int64_t s, int64_t) {
      const double u = of.offset[s] - l;
      return -of.exponent[s] * log2_1p(u < 0 ? 0.0 : u);
    });
  if (refs.bias) each([&](double l, int64_t, int64_t k) { return l + refs.bias[k]; });
  if (of.labels)
    each([&](double l, int64_t s, int64_t k) {
      return of.labels[s] == -1 || of.labels[s] == refs.labels[k] ? l : kMinusInfinity;
    });
  for_each_element<MT, NT>(corner, [&](int m, int j, int i, int row, int) {
    if (tile.block * kBlock + row >= n) dot.of[m][j][i] = kMinusInfinity;
  });
}

// The maxima of `Count` samples over the lanes that hold a part of them: at every step two lanes
// trade halves of their samples. What is left begins with the sample that is returned.
template <int Count, unsigned Step = 4>
STF_DEVICE int trade_maxima(double* largest) {
  if constexpr (Step == kWarp) {
    return 0;
  } else if constexpr (Count == 1) {
    largest[0] = larger(largest[0], __shfl_xor_sync(kAllLanes, largest[0], Step));
    return trade_maxima<1, 2 * Step>(largest);
  } else {
    constexpr int kHalf = Count / 2;
    const bool upper = lane_id() & Step;
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const double kept = upper ? largest[kHalf + k] : largest[k];
      const double given = upper ? largest[k] : largest[kHalf + k];
      largest[k] = larger(kept, __shfl_xor_sync(kAllLanes, given, Step));
    }
    return (upper ? kHalf : 0) + trade_maxima<kHalf, 2 * Step>(largest);
  }
}

// The largest logit of each sample over a warp's rows, to out[Samples].
template <int MT, int NT>
STF_DEVICE void warp_maxima(const Elements<double, MT, NT>& logits, Corner corner, double* out) {
  constexpr int kCount = 2 * NT, kLeft = kCount > 8 ? kCount / 8 : 1;
  double largest[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    largest[k] = kMinusInfinity;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        largest[k] = larger(largest[k], logits.of[m][k / 2][2 * h + k % 2]);
  }
  const int first = trade_maxima<kCount>(largest);
#pragma unroll
  for (int k = 0; k < kLeft; ++k)
    out[corner.sample + (first + k) / 2 * 8 + (first + k) % 2] = largest[k];
}

// The end of stage 2.
// Input    logits: this thread's elements of the tile
// Output   relative, for the padding beyond n too; anchors
// Math     m = max of l over the tile's references, NaN if one is; r = float(l - m), l for m = -inf
// Presumes all Threads threads of the tile are here, and sync() is a barrier for them; a warp has
//          16 MT rows; nobody still reads `maxima`, which they share
// Tiles    a sample's maximum goes by shuffles over the rows of a warp, by `maxima` over the warps
template <unsigned Threads, int MT, int NT, int Samples, class Sync>
STF_DEVICE void write_logits(const Elements<double, MT, NT>& logits, Corner corner,
                             const LogitTile& tile,
                             double (&maxima)[kTileRows / (16 * MT)][Samples], const Sync& sync) {
  constexpr int kWarps = kTileRows / (16 * MT);
  const int64_t n = tile.call.out.n, blocks = ceil_div(n, kBlock);
  warp_maxima(logits, corner, maxima[corner.row / (16 * MT)]);
  sync();

  constexpr unsigned kLanes = Threads / Samples;  // for each sample
  const unsigned own = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  double anchor = kMinusInfinity;
#pragma unroll
  for (unsigned warp = 0; warp < kWarps; warp += kLanes)
    if (warp + lane < kWarps) anchor = larger(anchor, maxima[warp + lane][own]);
  anchor = warp_reduce<kLanes>(anchor, larger);
  if (lane == 0) {
    maxima[0][own] = anchor;
    if (tile.first_sample + own < tile.samples)
      tile.call.out.anchors[(tile.first_sample + own) * blocks + tile.block] = anchor;
  }
  sync();

#pragma unroll
  for (int j = 0; j < NT; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t s = tile.first_sample + corner.sample + 8 * j + e;
      if (s >= tile.samples) continue;
      const double anchor = maxima[0][corner.sample + 8 * j + e];
      const double anchored = anchor == kMinusInfinity ? 0 : anchor;  // -inf - 0, not -inf - -inf
      float* relative = tile.call.out.relative + (s * blocks + tile.block) * kBlock + corner.row;
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          relative[16 * m + 8 * h] = static_cast<float>(logits.of[m][j][2 * h + e] - anchored);
    }
}

struct NumTile {
  int64_t* num;         // [B, R d]
  const int32_t* rows;  // of the slots: the tile's first and those after it
  int slots;            // that there are, from the tile's first on
  int64_t values;       // R d
  int64_t first_value;  // of the tile
  bool add;             // to what other parts of the sum bring
};

// The end of stage 4.
// Input    sums: this thread's elements of the tile
// Output   num, stored or added to
template <int L, int MT, int NT>
STF_DEVICE void write_num(const Fragment<L, MT, NT>& sums, Corner corner, const NumTile& tile) {
  Elements<int64_t, MT, NT> totals;  // all of them first: that sets the sums' registers free
  for_each<MT, NT>([&](int m, int j, int i) { totals.of[m][j][i] = sums.total(m, j, i); });
  const auto each = [&](const auto& put) {
    for_each_element<MT, NT>(corner, [&](int m, int j, int i, int row, int sample) {
      const int64_t value = tile.first_value + row;
      if (sample < tile.slots && value < tile.values)
        put(tile.num + tile.rows[sample] * tile.values + value, totals.of[m][j][i]);
    });
  };
  if (tile.add)
    each([](int64_t* num, int64_t total) { atomic_add(num, total); });
  else
    each([](int64_t* num, int64_t total) { *num = total; });
}

}  // namespace stf::cuda

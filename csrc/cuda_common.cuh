// What the kernels that are no products share: several values in one access of up to 16 bytes where
// the address allows it, digits, and what reductions do.
#pragma once
#include "arithmetic.h"
#include "cuda_device.cuh"

namespace stf {

struct Plus {
  template <class T>
  STF_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

struct Most {
  template <class T>
  STF_DEVICE T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

struct Least {
  template <class T>
  STF_DEVICE T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T at[N];
};

// Whether vectors of N may be read at every N-th value of rows of `size` values each.
template <int N, class T>
bool holds_vectors(const T* rows, int64_t size) {
  return reinterpret_cast<uintptr_t>(rows) % alignof(Vector<T, N>) == 0 && size % N == 0;
}

// The next N values, zeros from the `left`-th on.
template <int N, class T>
STF_DEVICE Vector<T, N> load(const T* from, int64_t left, bool aligned) {
  Vector<T, N> out;
  if (aligned && left >= N) {
    out = *reinterpret_cast<const Vector<T, N>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out.at[i] = i < left ? from[i] : T(0);
  }
  return out;
}

// Writes those of the N values that come before the `left`-th.
template <int N, class T>
STF_DEVICE void store(T* to, const Vector<T, N>& values, int64_t left, bool aligned) {
  if (aligned && left >= N) {
    *reinterpret_cast<Vector<T, N>*>(to) = values;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < left) to[i] = values.at[i];
  }
}

// The balanced base-256 digits of four integers, least significant first, `limb` bytes apart.
STF_DEVICE void store_digits(int8_t* to, int64_t limb, int limbs, Vector<int32_t, 4> q,
                             int64_t left, bool aligned) {
  for (int l = 0; l < limbs; ++l) {
    Vector<int8_t, 4> digits;
#pragma unroll
    for (int i = 0; i < 4; ++i) digits.at[i] = take_digit(q.at[i]);
    store<4>(to + l * limb, digits, left, aligned);
  }
}

// The sums over a row of digits, `limb` bytes apart, by one warp.
template <int Limbs, bool Balanced>
STF_DEVICE HalfSums sums_of_row(const int8_t* row, int64_t limb, int64_t dim, bool aligned) {
  constexpr int kEach = 16;  // values of a lane at a time
  HalfSums sums{};
  for (int64_t j = kEach * lane_id(); j < dim; j += kEach * kWarp) {
    Vector<int8_t, kEach> digits[Limbs];
#pragma unroll
    for (int l = 0; l < Limbs; ++l) digits[l] = load<kEach>(row + l * limb + j, dim - j, aligned);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      int8_t digit[Limbs];
#pragma unroll
      for (int l = 0; l < Limbs; ++l) digit[l] = digits[l].at[i];
      sums.add<Balanced>(digit);
    }
  }
  for (int64_t* sum : {&sums.low, &sums.low_low, &sums.high, &sums.high_low, &sums.high_high})
    *sum = warp_reduce(*sum, Plus());
  return sums;
}

// rint(x scale) for four values.
template <class T>
STF_DEVICE Vector<int32_t, 4> fixed_point(const Vector<T, 4>& x, double scale) {
  Vector<int32_t, 4> q;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    q.at[i] = static_cast<int32_t>(round_to_int(static_cast<double>(x.at[i]) * scale));
  return q;
}

}  // namespace stf

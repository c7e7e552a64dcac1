// The arithmetic of stf_kernels/MATH.md that is not a matrix product, for host and device.
//
// Every product and sum rounds on its own: compile with contraction off (-ffp-contract=off,
// -fmad=false). Everything has internal linkage, because one source is compiled for several
// instruction sets and the linker must not merge what they inline.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __CUDACC__
#define STF_HD __host__ __device__ __forceinline__
#else
#define STF_HD inline __attribute__((always_inline))
#endif

namespace stf {
namespace {

constexpr int kBlock = 128;         // references that share an anchor
constexpr double kExp2Floor = -63;  // below this a weight is zero in every precision
constexpr double kMagic = 0x1.8p52;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLog2E = 0x1.71547652b82fep+0;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

STF_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest multiple of kBlock that is not below `size`.
STF_HD constexpr int64_t padded(int64_t size) { return ceil_div(size, kBlock) * kBlock; }

template <class To, class From>
STF_HD To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits() reinterprets equal sizes");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// rint(x) as an integer, ties to even, for |x| < 2^51: the sum's low bits are the integer's.
STF_HD int64_t round_to_int(double x) { return bits<int64_t>(x + kMagic) - bits<int64_t>(kMagic); }

STF_HD double round_to_even(double x) { return (x + kMagic) - kMagic; }  // |x| < 2^51

STF_HD double power_of_two(int64_t k) {
  return bits<double>(static_cast<uint64_t>(k + 1023) << 52);
}

// 2^e for kExp2Floor <= e <= 0: a degree-8 polynomial in e - rint(e), relative error 1.1e-12.
STF_HD double exp2_spec(double e) {
  const int64_t k = round_to_int(e);
  const double f = e - round_to_even(e);
  double p = 0x1.63d12d5a78103p-20;
  p = p * f + 0x1.00dc4b47df585p-16;
  p = p * f + 0x1.4308ac96142bep-13;
  p = p * f + 0x1.5d8745a56b832p-10;
  p = p * f + 0x1.3b2ab71811a68p-7;
  p = p * f + 0x1.c6b08dd6ff15bp-5;
  p = p * f + 0x1.ebfbdff823d3dp-3;
  p = p * f + 0x1.62e42fef84cdep-1;
  p = p * f + 0x1.0p+0;
  return p * power_of_two(k);
}

// log2(1 + u) for u >= 0: k + t P(t^2) with 1 + u = 2^k (1 + f), t = f / (2 + f), relative error of
// a few 2^-53; NaN for NaN and for infinity.
STF_HD double log2_1p(double u) {
  const uint64_t round_up = 0x3ff0000000000000 - 0x3fe6a09e667f3bcd;  // from sqrt(1/2) to 1
  const int64_t k = static_cast<int64_t>((bits<uint64_t>(1.0 + u) + round_up) >> 52) - 1023;
  const double f = (u - (power_of_two(k) - 1.0)) * power_of_two(-k);
  const double t = f / (2.0 + f);
  const double z = t * t;
  double p = 0x1.b592d3c48c41cp-3;
  p = p * z + 0x1.c46e1440404d7p-3;
  p = p * z + 0x1.0ca160627dbfcp-2;
  p = p * z + 0x1.484afb7a67652p-2;
  p = p * z + 0x1.a61762d693934p-2;
  p = p * z + 0x1.2776c50ee39dcp-1;
  p = p * z + 0x1.ec709dc3a047dp-1;
  p = p * z + 0x1.71547652b82fep+1;
  return (bits<double>(bits<int64_t>(kMagic) + k) - kMagic) + t * p;  // double(k), vectorised
}

// The lowest balanced base-256 digit of q, and q without it.
STF_HD int8_t take_digit(int32_t& q) {
  const int8_t digit = static_cast<int8_t>(q);
  q = (q - digit) >> 8;
  return digit;
}

// The largest q that `limbs` balanced digits hold: 127 (1 + 256 + ... ).
STF_HD double limit(int limbs) {
  double out = 0;
  for (int l = 0; l < limbs; ++l) out = out * 256 + 127;
  return out;
}

template <class T>
using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// |x| as a word: ordered like the magnitudes, infinity above them, NaN on top.
template <class T>
STF_HD Word<T> magnitude_word(T x) {
  return bits<Word<T>>(x) & (~Word<T>{0} >> 1);
}

// The smallest e >= -1022 with largest <= 2^e limit(limbs); 0 if largest is 0 or not finite.
STF_HD int fixed_point_exponent(double largest, int limbs) {
  if (!(largest > 0 && largest < kInfinity)) return 0;
  const double scaled = largest < 0x1p-1000 ? largest * 0x1p64 : largest;  // no subnormals
  const int shift = largest < 0x1p-1000 ? 64 : 0;
  const int64_t word = bits<int64_t>(scaled);
  const int exponent = static_cast<int>(word >> 52) - 1022 - shift;
  const double mantissa = bits<double>((word & 0xfffffffffffff) | (int64_t{1022} << 52));
  const int digits = 8 * limbs - 1;
  const int e = exponent - digits + (mantissa * power_of_two(digits) > limit(limbs));
  return e < -1022 ? -1022 : e;
}

// Sums over the numbers q = 2^16 high + low of a row.
struct HalfSums {
  int64_t low, low_low, high, high_low, high_high;

  STF_HD void add(int32_t l, int32_t h) {
    low += l;
    low_low += l * l;
    high += h;
    high_low += h * l;
    high_high += h * h;
  }

  // A number by its digits; Balanced: with a low half that int16 holds.
  template <bool Balanced, int Limbs>
  STF_HD void add(const int8_t (&digit)[Limbs]) {
    int32_t l = digit[0], h = 0;
    if constexpr (Limbs > 1) l += 256 * digit[1];
    if constexpr (Limbs > 2) h += digit[2];
    if constexpr (Limbs > 3) h += 256 * digit[3];
    if constexpr (Balanced) {
      h += (l + 32768) >> 16;
      l = static_cast<int16_t>(l);
    }
    add(l, h);
  }

  STF_HD double square() const {  // sum q^2
    const double upper = static_cast<double>(high_high) * 0x1p32;
    return (upper + static_cast<double>(high_low) * 0x1p17) + static_cast<double>(low_low);
  }
};

// sum v^2 + twice_offset sum v of a reference.
STF_HD double norm(const HalfSums& v, double twice_offset) {
  const double sum = static_cast<double>(v.high) * 0x1p16 + static_cast<double>(v.low);
  return v.square() + twice_offset * sum;
}

// sum (step q - offset)^2 of a sample of `dim` values.
STF_HD double squared_distance(const HalfSums& q, double step, double offset, int64_t dim) {
  const double linear = static_cast<double>(q.high * 65536 + q.low), mean = offset / step;
  const double rest = static_cast<double>(dim) * (mean * mean);
  return step * step * (q.square() - 2.0 * mean * linear + rest);
}

// What a reference of weight P = rint(p lim) and logit e adds to the statistics' sums.
STF_HD int64_t square_term(double weight) { return round_to_int(weight * weight * 0x1p-24); }
STF_HD int64_t bits_term(double weight, double e) { return round_to_int(weight * -e * 0x1p10); }
STF_HD int64_t lost_term(double weight, double p) {
  return weight == 0 ? round_to_int(p * 0x1p62) : 0;
}

}  // namespace
}  // namespace stf

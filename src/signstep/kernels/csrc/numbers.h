// Conversions between stored numbers and the type that the step computes in. Branch-free, so that loops vectorise.
// Included once per instruction set, inside its namespace: an inline function shared between them could be taken by the
// linker from the one that this machine does not have.

static inline uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}

static inline float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

// Enumerations, not structures: the compiler vectorises copies of scalars only.
enum class Bfloat16 : uint16_t {};
enum class Float16 : uint16_t {};

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(Bfloat16 x) { return float_of(static_cast<uint32_t>(x) << 16); }

static inline float widen(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x) & 0x7FFFu;
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;  // subnormal: multiples of 2^-24
  const uint32_t rebias = magnitude >= 0x7C00u ? 224u << 23 : 112u << 23;               // inf and NaN keep exponent 255
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t chosen = magnitude < 0x0400u ? bits_of(small) : normal;
  return float_of(chosen | (static_cast<uint32_t>(x) & 0x8000u) << 16);
}

template <class T, class W>
static inline T narrow(W x);

template <>
inline float narrow<float, float>(float x) {
  return x;
}
template <>
inline double narrow<double, double>(double x) {
  return x;
}
template <>
inline float narrow<float, double>(double x) {
  return static_cast<float>(x);
}

// At random, with a number below 2^16: the upper half of the bits, which a carry from the lower half makes larger.
static inline Bfloat16 to_bfloat16(float x, uint32_t random) {
  const uint32_t rounded = (bits_of(x) + random) >> 16;
  return static_cast<Bfloat16>(x != x ? 0x7FC0u : rounded);
}

// To the nearest, ties to even.
template <>
inline Bfloat16 narrow<Bfloat16, float>(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7FFFu + (u >> 16 & 1u)) >> 16;
  return static_cast<Bfloat16>(x != x ? 0x7FC0u : rounded);
}

template <>
inline Float16 narrow<Float16, float>(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t magnitude = u & 0x7FFFFFFFu;
  // Below 2^-14 a float16 counts multiples of 2^-24, the unit in the last place of floats in [0.5, 1).
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t normal = (magnitude + 0x0FFFu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  uint32_t half = magnitude < 113u << 23 ? small : normal;
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return static_cast<Float16>(half | (u >> 16 & 0x8000u));
}

// fma, where the machine has it; else through double, whose product of two floats is exact, and whose sum is rounded twice:
// a bit may differ then, once in 2^29.
static inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return static_cast<float>(static_cast<double>(a) * b + c);
#endif
}
static inline double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

// The step that draws no noise, of what is kept in fewer bits than it is computed with, where registers are wide: float32
// parameters with 16- or 8-bit momentum, and bfloat16 parameters with bfloat16 momentum. As in straight.h one loop over the
// tensors, in which numbers are converted in registers. The bits are those of the tiles. Included inside an instruction set's
// namespace.

using Words = Vector<uint32_t>;
using Truncated = Vector<int32_t>;
constexpr int PER_PAIR = 2 * PER_REGISTER<float>;
constexpr uint32_t UPPER = 0xFFFF0000u;

// Elements i to i + PER_PAIR: of bfloat16 those with even i and those with odd i, which takes two instructions.
struct Pair {
  Vector<float> part[2];
};

static INLINE Pair read(const float* from) { return {{load(from), load(from + PER_PAIR / 2)}}; }
static INLINE Pair read(const Bfloat16* from) {
  const Words both = load(reinterpret_cast<const uint32_t*>(from));
  return {{(Vector<float>)(both << 16), (Vector<float>)(both & UPPER)}};
}
static INLINE void write(float* to, Pair x) { store(to, x.part[0]), store(to + PER_PAIR / 2, x.part[1]); }
static INLINE void write(Bfloat16* to, Pair x) {
  store(reinterpret_cast<uint32_t*>(to), ((Words)x.part[0] >> 16) | ((Words)x.part[1] & UPPER));
}

#if defined(__AVX512F__)
typedef __m256i HalfRegister;
typedef __m128i QuarterRegister;
static INLINE Words of_shorts(__m256i x) { return (Words)_mm512_cvtepu16_epi32(x); }
static INLINE Words of_bytes(__m128i x) { return (Words)_mm512_cvtepu8_epi32(x); }
static INLINE Vector<float> of_codes(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }
static INLINE Words larger(Words a, Words b) { return (Words)_mm512_max_epu32((__m512i)a, (__m512i)b); }
static INLINE Vector<float> converted(Words x) { return _mm512_cvtepi32_ps((__m512i)x); }
static INLINE Truncated truncated(Vector<float> x) { return (Truncated)_mm512_cvttps_epi32(x); }
static INLINE bool any_nan(Pair x) { return _mm512_cmp_ps_mask(x.part[0], x.part[1], _CMP_UNORD_Q) != 0; }
static INLINE void write_upper(Bfloat16* to, Words low, Words high) {
  const __m512i mixed = _mm512_packus_epi32((__m512i)(low >> 16), (__m512i)(high >> 16));
  _mm512_storeu_si512(to, _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), mixed));
}
// To 8 bits, saturating.
static INLINE void write_codes(int8_t* to, const Truncated* x) {
  const __m512i low = _mm512_packs_epi32((__m512i)x[0], (__m512i)x[1]), high = _mm512_packs_epi32((__m512i)x[2], (__m512i)x[3]);
  const __m512i mixed = _mm512_packs_epi16(low, high);
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, mixed));
}
#else
typedef __m128i HalfRegister;
typedef int64_t QuarterRegister;
static INLINE Words of_shorts(__m128i x) { return (Words)_mm256_cvtepu16_epi32(x); }
static INLINE Words of_bytes(int64_t x) { return (Words)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(x)); }
static INLINE Vector<float> of_codes(int64_t x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(x))); }
static INLINE Words larger(Words a, Words b) { return (Words)_mm256_max_epu32((__m256i)a, (__m256i)b); }
static INLINE Vector<float> converted(Words x) { return _mm256_cvtepi32_ps((__m256i)x); }
static INLINE Truncated truncated(Vector<float> x) { return (Truncated)_mm256_cvttps_epi32(x); }
static INLINE bool any_nan(Pair x) { return _mm256_movemask_ps(_mm256_cmp_ps(x.part[0], x.part[1], _CMP_UNORD_Q)) != 0; }
static INLINE void write_upper(Bfloat16* to, Words low, Words high) {
  const __m256i mixed = _mm256_packus_epi32((__m256i)(low >> 16), (__m256i)(high >> 16));
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(mixed, 0xD8));
}
static INLINE void write_codes(int8_t* to, const Truncated* x) {
  const __m256i low = _mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]), high = _mm256_packs_epi32((__m256i)x[2], (__m256i)x[3]);
  const __m256i mixed = _mm256_packs_epi16(low, high);
  _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(mixed, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0)));
}
#endif

template <class Register>
static INLINE Register loaded(const void* from) {
  Register x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

// As narrow<Bfloat16, float>, in the upper half, but for NaN.
static INLINE Words to_nearest(Vector<float> x) { return (Words)x + 0x7FFFu + ((Words)x >> 16 & 1u); }
static INLINE Words without_nan(Words rounded, Vector<float> x) {
  const Words nan = (Words)(x != x);
  return (rounded & ~nan) | (0x7FC00000u & nan);
}

// What follows PER_PAIR elements some tiles later. The processor's own prefetching does not keep up: without this a step takes
// a tenth to a third longer.
template <class Number>
static INLINE void fetch(const Number* from) {
  const char* const at = reinterpret_cast<const char*>(from + DISTANCE * TILE * 4 / (sizeof(Number) < 2 ? 2 : sizeof(Number)));
  for (size_t byte = 0; byte < PER_PAIR * sizeof(Number); byte += 64) __builtin_prefetch(at + byte);
}

struct Narrow {
  const bool interpolates;
  const Vector<float> weight, direction_weight, rate, decay;

  explicit Narrow(const Options& o)
      : interpolates(o.direction_weight != 0),
        weight(Vector<float>{} + float(o.gradient_weight)),
        direction_weight(Vector<float>{} + float(o.direction_weight)),
        rate(Vector<float>{} + float(-o.rate)),
        decay(Vector<float>{} + float(o.decay)) {}

  INLINE Vector<float> directed(Vector<float> old, Vector<float> g, Vector<float> m) const {
    return interpolates ? fused(direction_weight, g - old, old) : m;
  }

  // As unit_step and apply in a tile.
  INLINE Vector<float> moved(Vector<float> p, Vector<float> m) const {
    const Vector<float> direction = fused(m, Vector<float>{}, signed_as(Vector<float>{} + 1.0f, m));
    return fused(rate, direction, p * decay);
  }
};

template <class Kernel, class Param, class Number>
static INLINE void tile_of_pairs(const Kernel& kernel, Param* param, const Param* grad, Bfloat16* exp_avg, const Number* random) {
  for (int i = 0; i < TILE; i += PER_PAIR) {
    fetch(param + i), fetch(grad + i), fetch(exp_avg + i);
    kernel.group(param + i, grad + i, exp_avg + i, random + i);
  }
}

// bfloat16 parameters and momentum, which decides as it is kept.
template <bool RANDOM>
struct AllBfloat16 : Narrow {
  using Param = Bfloat16;
  using Kept = Bfloat16;
  using Random = PerElement<uint16_t>;
  using Number = uint16_t;
  static constexpr bool DRAWS = RANDOM;
  static constexpr int STREAM = PARAM_ROUNDING;
  using Narrow::Narrow;

  INLINE void group(Bfloat16* param, const Bfloat16* grad, Bfloat16* exp_avg, const uint16_t* random) const {
    const Pair p = read(param), g = read(grad), old = read(exp_avg);
    Pair m, after;
    Words kept[2], rounded[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      m.part[j] = fused(weight, g.part[j] - old.part[j], old.part[j]);
      // That of a NaN is one: its lower half is 0, as in what it came from.
      kept[j] = to_nearest(m.part[j]) & UPPER;
      after.part[j] = moved(p.part[j], directed(old.part[j], g.part[j], (Vector<float>)kept[j]));
    }
    if (RANDOM) {
      const Words numbers = load(reinterpret_cast<const uint32_t*>(random));
      rounded[0] = (Words)after.part[0] + (numbers & 0xFFFFu);
      rounded[1] = (Words)after.part[1] + (numbers >> 16);
    } else {
      rounded[0] = to_nearest(after.part[0]);
      rounded[1] = to_nearest(after.part[1]);
    }
    if (__builtin_expect(any_nan(after), false)) {
      for (int j = 0; j < 2; ++j) {
        kept[j] = without_nan(kept[j], m.part[j]);
        rounded[j] = without_nan(rounded[j], after.part[j]);
      }
    }
    write(exp_avg, {{(Vector<float>)kept[0], (Vector<float>)kept[1]}});
    write(param, {{(Vector<float>)rounded[0], (Vector<float>)rounded[1]}});
  }

  INLINE void tile(Bfloat16* param, const Bfloat16* grad, Bfloat16* exp_avg, float*, const uint16_t* random) const {
    tile_of_pairs(*this, param, grad, exp_avg, random);
  }
};

// float32 parameters, whose momentum is rounded at random.
struct RoundedMomentum : Narrow {
  using Param = float;
  using Random = Bytes;
  using Number = uint8_t;
  static constexpr bool DRAWS = true;
  static constexpr int STREAM = ROUNDING;
  using Narrow::Narrow;
};

struct MomentumInBfloat16 : RoundedMomentum {
  using Kept = Bfloat16;
  using RoundedMomentum::RoundedMomentum;

  INLINE void group(float* param, const float* grad, Bfloat16* exp_avg, const uint8_t* random) const {
    const Pair p = read(param), g = read(grad);
    Pair m, after;
    Words kept[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const int at = j * PER_REGISTER<float>;
      const Vector<float> old = (Vector<float>)(of_shorts(loaded<HalfRegister>(exp_avg + at)) << 16);
      m.part[j] = fused(weight, g.part[j] - old, old);
      after.part[j] = moved(p.part[j], directed(old, g.part[j], m.part[j]));
      kept[j] = (Words)m.part[j] + (of_bytes(loaded<QuarterRegister>(random + at)) << 8 | 0x80u);
    }
    if (__builtin_expect(any_nan(after), false)) {
      for (int j = 0; j < 2; ++j) kept[j] = without_nan(kept[j], m.part[j]);
    }
    write_upper(exp_avg, kept[0], kept[1]);
    write(param, after);
  }

  INLINE void tile(float* param, const float* grad, Bfloat16* exp_avg, float*, const uint8_t* random) const {
    tile_of_pairs(*this, param, grad, exp_avg, random);
  }
};

// What a block's scale is taken of waits in the first-level cache.
struct MomentumInInt8 : RoundedMomentum {
  using Kept = int8_t;
  using RoundedMomentum::RoundedMomentum;

  INLINE void tile(float* param, const float* grad, int8_t* exp_avg, float* scale, const uint8_t* random) const {
    constexpr int SIZE = PER_REGISTER<float>;
    alignas(64) float m[TILE];
    const Vector<float> old_scale = Vector<float>{} + *scale;
    Words most = {};
    for (int i = 0; i < TILE; i += SIZE) {
      if (i % PER_PAIR == 0) fetch(param + i), fetch(grad + i), fetch(exp_avg + i);
      const Vector<float> old = of_codes(loaded<QuarterRegister>(exp_avg + i)) * old_scale, g = load(grad + i);
      const Vector<float> mi = fused(weight, g - old, old);
      store(m + i, mi);
      most = larger(most, (Words)mi & 0x7FFFFFFFu);
      store(param + i, moved(load(param + i), directed(old, g, mi)));
    }
    uint32_t largest = 0;
    for (int i = 0; i < SIZE; ++i) largest = most[i] > largest ? most[i] : largest;
    *scale = scale_of(largest);
    const float inverse = inverse_of(*scale);
    if (__builtin_expect(largest >= 0x7F800000u, false)) return code(m, TILE, inverse, random, exp_avg);
    for (int i = 0; i < TILE; i += 4 * SIZE) {
      Truncated codes[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Words number = of_bytes(loaded<QuarterRegister>(random + i + j * SIZE));
        // (number + 1/2) / 256, which is exact.
        const Vector<float> part = fused(converted(number), Vector<float>{} + 0x1p-8f, Vector<float>{} + 0x1p-9f);
        codes[j] = truncated(load(m + i + j * SIZE) * inverse + part + 128.0f) - 128;
      }
      write_codes(exp_avg + i, codes);
    }
  }
};

template <class Kernel>
void narrow_by(const signstep_tensor& t, const Options& o, int64_t begin, int64_t end) {
  using Param = typename Kernel::Param;
  using Kept = typename Kernel::Kept;
  const Kernel kernel(o);
  const Key key = {uint32_t(o.seed), uint32_t(o.seed >> 32), uint32_t(o.step), uint32_t(t.ordinal)};
  typename Kernel::Random numbers;
  for (int64_t at = begin; at < end; at += TILE) {
    const int n = int(end - at < TILE ? end - at : TILE);
    Param* param = reinterpret_cast<Param*>(t.param) + at;
    const Param* grad = reinterpret_cast<const Param*>(t.grad) + at;
    Kept* exp_avg = reinterpret_cast<Kept*>(t.exp_avg) + at;
    float* scale = reinterpret_cast<float*>(t.scale) + at / TILE;
    const typename Kernel::Number* random = nullptr;
    if (Kernel::DRAWS) random = numbers.fill(uint64_t(t.offset + at), n, key, Kernel::STREAM, {0, 0});
    if (n == TILE) {
      kernel.tile(param, grad, exp_avg, scale, random);
    } else {
      // What is beyond the end is 0, and does not count for a scale.
      alignas(64) Param rest[2][TILE] = {};
      alignas(64) Kept kept[TILE] = {};
      __builtin_memcpy(rest[0], param, size_t(n) * sizeof(Param));
      __builtin_memcpy(rest[1], grad, size_t(n) * sizeof(Param));
      __builtin_memcpy(kept, exp_avg, size_t(n) * sizeof(Kept));
      kernel.tile(rest[0], rest[1], kept, scale, random);
      __builtin_memcpy(param, rest[0], size_t(n) * sizeof(Param));
      __builtin_memcpy(exp_avg, kept, size_t(n) * sizeof(Kept));
    }
  }
}

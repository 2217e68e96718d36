// The first 8 bits of U against 256 Phi(m / sigma), or for uniform noise 128 (1 + m / Delta), 64 elements at a time. Included
// inside an instruction set's namespace.
//
// decide() writes, per element, whether sign(m + xi) is up (>= 0) or down (< 0), and returns the ties as bits, that of element
// element_at(bit): those for which 8 bits and an approximate Phi do not tell. That is all that it may get wrong, so
// instruction sets need not approximate alike.
//
// Phi(z) - 1/2 = z h(z^2) in 16-bit fixed point, where a vector holds most elements. z is in units of 2^-13, so that it ends
// at 4 as Phi nearly does; beyond, only the bytes 0 and 255 can tie, and the last bytes' bounds are made to do so. h is a
// minimax polynomial of degree 5 in z^2 / 16 - 1/2, its coefficients times 2^12. For uniform noise the chance less 1/2 is z / 2.

constexpr int GROUP = 64;
template <bool UNIFORM>
constexpr float UNITS_OF_Z = UNIFORM ? 4096.0f : 8192.0f;  // so that PER_BYTE are a 256th of what z / 2 is when it is linear
constexpr int16_t H[6] = {5770, -5508, 6898, -9784, 16968, -15568};
constexpr int PER_BYTE = 32;  // units of the difference between Phi and a byte
template <bool UNIFORM>
constexpr int SLACK = UNIFORM ? 1 : 6;  // more than the approximation is wrong by: checked for all 2^16 z by the tests
constexpr int16_t MIDDLE = 128 * PER_BYTE - PER_BYTE / 2;  // byte 128 begins where the chance is 1/2

#if defined(__AVX512BW__) || defined(__AVX2__)

#if defined(__AVX512BW__)
constexpr int SHORTS = 32;
typedef int16_t Short __attribute__((vector_size(64)));
typedef uint16_t Unsigned __attribute__((vector_size(64)));

static inline Short product(Short a, Short b) { return (Short)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b); }
static inline Short difference(Short a, Short b) { return (Short)_mm512_subs_epi16((__m512i)a, (__m512i)b); }  // saturates

// The numbers of a Short are in the order in which instructions put two Floats into one: four by four of each by turns.
static inline Short packed(Floats low, Floats high) {
  return (Short)_mm512_packs_epi32(_mm512_cvtps_epi32(low), _mm512_cvtps_epi32(high));
}
static inline Floats unpacked_low(Short x) { return (Floats)_mm512_unpacklo_epi16((__m512i)x, (__m512i)x); }
static inline Floats unpacked_high(Short x) { return (Floats)_mm512_unpackhi_epi16((__m512i)x, (__m512i)x); }
static inline int element_at(int bit) { return (bit & 3) | (bit >> 2 & 12) | (bit << 2 & 48); }
static inline Short in_order(Short x) {
  return (Short)_mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), (__m512i)x);
}

static inline Short bytes(const uint8_t* from) {
  const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
  return (Short)_mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)from), order)) * PER_BYTE;
}

static inline Floats smaller(Floats x, float most) { return _mm512_min_ps(x, _mm512_set1_ps(most)); }

// Where a number of 64 is near 0, less than 128, as bits: that of element_at(bit).
static inline uint64_t near_0(const Short* x, int near) {
  const __m512i bytes = _mm512_packs_epi16((__m512i)x[0], (__m512i)x[1]);
  return _mm512_cmplt_epu8_mask(_mm512_abs_epi8(bytes), _mm512_set1_epi8((char)near));
}
#else
constexpr int SHORTS = 16;
typedef int16_t Short __attribute__((vector_size(32)));
typedef uint16_t Unsigned __attribute__((vector_size(32)));

static inline Short product(Short a, Short b) { return (Short)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b); }
static inline Short difference(Short a, Short b) { return (Short)_mm256_subs_epi16((__m256i)a, (__m256i)b); }

static inline Short packed(Floats low, Floats high) {
  return (Short)_mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high));
}
static inline Floats unpacked_low(Short x) { return (Floats)_mm256_unpacklo_epi16((__m256i)x, (__m256i)x); }
static inline Floats unpacked_high(Short x) { return (Floats)_mm256_unpackhi_epi16((__m256i)x, (__m256i)x); }
static inline int element_at(int bit) { return (bit & 35) | (bit >> 2 & 4) | (bit << 1 & 24); }
static inline Short in_order(Short x) { return (Short)_mm256_permute4x64_epi64((__m256i)x, 0xD8); }

static inline Short bytes(const uint8_t* from) {
  const __m256i sixteen = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
  const __m256i upper = _mm256_set_epi8(15, -1, 14, -1, 13, -1, 12, -1, 7, -1, 6, -1, 5, -1, 4, -1,  //
                                        11, -1, 10, -1, 9, -1, 8, -1, 3, -1, 2, -1, 1, -1, 0, -1);
  return (Short)((Unsigned)_mm256_shuffle_epi8(sixteen, upper) / (256 / PER_BYTE));
}

static inline Floats smaller(Floats x, float most) { return _mm256_min_ps(x, _mm256_set1_ps(most)); }

static inline uint64_t near_0(const Short* x, int near) {
  uint64_t bits = 0;
  for (int i = 0; i < GROUP / SHORTS; i += 2) {
    const __m256i distance = _mm256_abs_epi8(_mm256_packs_epi16((__m256i)x[i], (__m256i)x[i + 1]));
    const __m256i is_near = _mm256_cmpeq_epi8(_mm256_min_epu8(distance, _mm256_set1_epi8((char)(near - 1))), distance);
    bits |= uint64_t((uint32_t)_mm256_movemask_epi8(is_near)) << 16 * i;
  }
  return bits;
}
#endif

// The chance less the middle of the byte's 256th, of SHORTS elements: up where it is not negative, a tie where it is near 0.
template <bool UNIFORM>
static inline Short above(Floats low, Floats high, Floats unit, const uint8_t* top) {
  // To 16 bits, saturating: what is too small converts to the smallest integer, what is too large and NaN is made smaller.
  const Short z = packed(smaller(low * unit, 32767.0f), smaller(high * unit, 32767.0f));
  if (UNIFORM) return difference(z, bytes(top) - MIDDLE);
  const Short t = (Short)((Unsigned)product(z, z) - 16384);  // wraps for the smallest z, to the right value
  Short h = product(H[5] + (z ^ z), t) + H[4];
  for (int k = 3; k >= 0; --k) h = product(h, t) + H[k];
  return product(h, z) - bytes(top) + MIDDLE;  // Phi - 1/2 is product(h, z)
}

template <bool UNIFORM>
static inline uint64_t ties(const Short* above) {
  return near_0(above, PER_BYTE / 2 + SLACK<UNIFORM> + 1);
}

template <bool UNIFORM>
static inline uint64_t decide(const float* m, const uint8_t* top, float inverse_sigma, int16_t* up) {
  const Floats unit = Floats{} + UNITS_OF_Z<UNIFORM> * inverse_sigma;
  Short groups[GROUP / SHORTS];
  for (int i = 0; i < GROUP / SHORTS; ++i) {
    const float* at = m + i * SHORTS;
    groups[i] = above<UNIFORM>(load(at), load(at + SHORTS / 2), unit, top + i * SHORTS);
    store(up + i * SHORTS, in_order(groups[i]));
  }
  return ties<UNIFORM>(groups);
}

#else

template <bool UNIFORM>
static inline uint64_t decide(const float* m, const uint8_t* top, float inverse_sigma, int16_t* up) {
  uint8_t tie[GROUP];
  if (UNIFORM) {
    for (int i = 0; i < GROUP; ++i) {
      const float above = 128.0f * (m[i] * inverse_sigma) - (float(top[i]) - 127.5f);
      tie[i] = __builtin_fabsf(above) < 0.51f ? 1 : 0;
      up[i] = above > 0 ? 1 : -1;
    }
    return gathered(tie);
  }
  const float inverse = 0.70710678f * inverse_sigma;
  for (int i = 0; i < GROUP; ++i) {
    // Q to 5e-4 (Abramowitz and Stegun 7.1.27).
    const float x = __builtin_fabsf(m[i] * inverse);
    float q = (((0.078108f * x + 0.000972f) * x + 0.230389f) * x + 0.278393f) * x + 1.0f;
    q *= q;
    q *= q;
    // (byte + 1/2) / 256 - Phi, times 256 q, with Phi = 1 / 2q, for m < 0; mirrored for m > 0: no division.
    const float byte = float(top[i]) - 127.5f;
    const float distance = (128.0f + (m[i] > 0 ? -byte : byte)) * q - 128.0f;
    tie[i] = __builtin_fabsf(distance) < (0.5f + 256 * 2.6e-4f) * q ? 1 : 0;
    up[i] = (distance > 0) == (m[i] > 0) ? 1 : -1;
  }
  return gathered(tie);
}

static inline int element_at(int bit) { return bit; }

#endif

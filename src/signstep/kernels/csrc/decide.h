// The first 8 bits of U against 256 Phi(m / sigma), 64 elements at a time. Included inside an instruction set's namespace.
//
// decide() writes, per element, whether sign(m + xi) is up (>= 0) or down (< 0), and returns the ties as bits: the elements
// for which 8 bits and an approximate Phi do not tell. That is all that it may get wrong, so instruction sets need not
// approximate alike.
//
// Phi(z) - 1/2 = z h(z^2) in 16-bit fixed point, where a vector holds most elements. z is in units of 2^-13, so that it ends
// at 4 as Phi nearly does; beyond, only the bytes 0 and 255 can tie, and the last bytes' bounds are made to do so. h is a
// minimax polynomial of degree 5 in z^2 / 16 - 1/2, its coefficients times 2^12.

constexpr int GROUP = 64;
constexpr float UNITS_OF_Z = 8192.0f;
constexpr int16_t H[6] = {5770, -5508, 6898, -9784, 16968, -15568};
constexpr int PER_BYTE = 32;  // units of the difference between Phi and a byte
constexpr int SLACK = 6;      // more than the approximation is wrong by: checked for all 2^16 z by the tests

#if defined(__AVX512BW__) || defined(__AVX2__)

#if defined(__AVX512BW__)
constexpr int SHORTS = 32;
typedef int16_t Short __attribute__((vector_size(64)));
typedef uint16_t Unsigned __attribute__((vector_size(64)));

static inline Short product(Short a, Short b) { return (Short)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b); }

static inline Short bytes(const uint8_t* from) {
  return (Short)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
}

// To 16 bits, saturating: a number too small and NaN convert to the smallest integer, one too large is made smaller first.
static inline Short shorts(const float* from, float unit) {
  const __m512 units = _mm512_set1_ps(unit), most = _mm512_set1_ps(32767.0f);
  const __m512i low = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_mul_ps(_mm512_loadu_ps(from), units), most));
  const __m512i high = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_mul_ps(_mm512_loadu_ps(from + 16), units), most));
  const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
  return (Short)_mm512_permutexvar_epi64(order, _mm512_packs_epi32(low, high));
}

static inline uint64_t below(Unsigned first, Unsigned second, int bound) {
  const __m512i bounds = _mm512_set1_epi16((int16_t)bound);
  return _mm512_cmplt_epu16_mask((__m512i)first, bounds) |
         (uint64_t)_mm512_cmplt_epu16_mask((__m512i)second, bounds) << 32;
}
#else
constexpr int SHORTS = 16;
typedef int16_t Short __attribute__((vector_size(32)));
typedef uint16_t Unsigned __attribute__((vector_size(32)));

static inline Short product(Short a, Short b) { return (Short)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b); }

static inline Short bytes(const uint8_t* from) {
  return (Short)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
}

static inline Short shorts(const float* from, float unit) {
  const __m256 units = _mm256_set1_ps(unit), most = _mm256_set1_ps(32767.0f);
  const __m256i low = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_mul_ps(_mm256_loadu_ps(from), units), most));
  const __m256i high = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_mul_ps(_mm256_loadu_ps(from + 8), units), most));
  return (Short)_mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
}

static inline uint64_t below(Unsigned first, Unsigned second, int bound) {
  const Short low = first < (uint16_t)bound, high = second < (uint16_t)bound;
  const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi16((__m256i)low, (__m256i)high), 0xD8);
  return (uint32_t)_mm256_movemask_epi8(both);
}
#endif

static inline uint64_t decide(const float* m, const uint8_t* top, float inverse_sigma, int16_t* up) {
  uint64_t ties = 0;
  for (int i = 0; i < GROUP; i += 2 * SHORTS) {
    Unsigned window[2];
    for (int half = 0; half < 2; ++half) {
      const int first = i + half * SHORTS;
      const Short z = shorts(m + first, UNITS_OF_Z * inverse_sigma);
      const Short t = (Short)((Unsigned)product(z, z) - 16384);  // wraps for the smallest z, to the right value
      Short h = product(H[5] + (z ^ z), t) + H[4];
      for (int k = 3; k >= 0; --k) h = product(h, t) + H[k];
      // Phi less the middle of the byte's 256th: Phi - 1/2 is product(h, z), and byte 128 begins at 1/2.
      const Short above = product(h, z) + (128 * PER_BYTE - PER_BYTE / 2) - bytes(top + first) * PER_BYTE;
      __builtin_memcpy(up + first, &above, sizeof above);
      window[half] = (Unsigned)(above + (PER_BYTE / 2 + SLACK));
    }
    ties |= below(window[0], window[1], PER_BYTE + 2 * SLACK) << i;
  }
  return ties;
}

#else

static inline uint64_t decide(const float* m, const uint8_t* top, float inverse_sigma, int16_t* up) {
  uint8_t tie[GROUP];
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

#endif

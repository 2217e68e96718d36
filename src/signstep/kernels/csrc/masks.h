// What 64 numbers are, as bits. Included inside an instruction set's namespace.

enum class Is { ZERO, POSITIVE, FINITE };

#if defined(__AVX512BW__) || defined(__AVX2__)

#if defined(__AVX512BW__)
typedef __m512 Floats;
typedef __m512d Doubles;

template <int OPERATION>
static inline uint64_t compared_with_0(Floats x) {
  return _mm512_cmp_ps_mask(x, Floats{}, OPERATION);
}
template <int OPERATION>
static inline uint64_t compared_with_0(Doubles x) {
  return _mm512_cmp_pd_mask(x, Doubles{}, OPERATION);
}

static inline uint64_t not_negative(const int16_t* x) {
  const uint64_t low = _mm512_movepi16_mask(_mm512_loadu_si512(x)), high = _mm512_movepi16_mask(_mm512_loadu_si512(x + 32));
  return ~(low | high << 32);
}
#else
typedef __m256 Floats;
typedef __m256d Doubles;

template <int OPERATION>
static inline uint64_t compared_with_0(Floats x) {
  return uint64_t(_mm256_movemask_ps(_mm256_cmp_ps(x, Floats{}, OPERATION)));
}
template <int OPERATION>
static inline uint64_t compared_with_0(Doubles x) {
  return uint64_t(_mm256_movemask_pd(_mm256_cmp_pd(x, Doubles{}, OPERATION)));
}

static inline uint64_t not_negative(const int16_t* x) {
  uint64_t negative = 0;
  for (int i = 0; i < 64; i += 32) {
    const __m256i low = _mm256_loadu_si256((const __m256i*)(x + i)), high = _mm256_loadu_si256((const __m256i*)(x + i + 16));
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8);
    negative |= uint64_t(uint32_t(_mm256_movemask_epi8(bytes))) << i;
  }
  return ~negative;
}
#endif

template <Is IS, class Vector, class W>
static inline uint64_t where_vectors(const W* x) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += int(sizeof(Vector) / sizeof(W))) {
    Vector v;
    __builtin_memcpy(&v, x + i, sizeof v);
    bits |= compared_with_0<IS == Is::POSITIVE ? _CMP_GT_OQ : _CMP_EQ_OQ>(IS == Is::FINITE ? v - v : v) << i;
  }
  return bits;
}
template <Is IS>
static inline uint64_t where(const float* x) {
  return where_vectors<IS, Floats>(x);
}
template <Is IS>
static inline uint64_t where(const double* x) {
  return where_vectors<IS, Doubles>(x);
}

#else

// Bytes of 0 or 1 as bits.
static inline uint64_t gathered(const uint8_t* bytes) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += 8) {
    uint64_t eight;
    __builtin_memcpy(&eight, bytes + i, 8);
    bits |= (eight * 0x0102040810204080u >> 56) << i;  // bit 8 j goes to bit 56 + j
  }
  return bits;
}

template <Is IS, class W>
static inline uint64_t where(const W* x) {
  uint8_t is[64];
  for (int i = 0; i < 64; ++i) is[i] = IS == Is::POSITIVE ? x[i] > 0 : (IS == Is::FINITE ? x[i] - x[i] : x[i]) == 0;
  return gathered(is);
}

static inline uint64_t not_negative(const int16_t* x) {
  uint8_t is[64];
  for (int i = 0; i < 64; ++i) is[i] = x[i] >= 0;
  return gathered(is);
}

#endif

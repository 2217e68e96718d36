// The counter-based noise of kernels/philox.py and kernels/reference.py. Included inside an instruction set's namespace.

struct Key {
  uint32_t low, high, step, ordinal;
};

enum { TOP_BITS, LOW_BITS, ROUNDING, ZERO_COINS, TIE_COINS, PARAM_ROUNDING };  // streams, the last word of the counter

// Counters are worked on WIDTH at a time, each word in a lane of 64 bits whose upper half is never read.
#if defined(__AVX512F__)
constexpr int WIDTH = 8;
typedef uint64_t Lanes __attribute__((vector_size(64)));
#elif defined(__AVX2__)
constexpr int WIDTH = 4;
typedef uint64_t Lanes __attribute__((vector_size(32)));
#else
constexpr int WIDTH = 2;
typedef uint64_t Lanes __attribute__((vector_size(16)));
#endif

// The products of the lanes' lower halves; compilers do not find the instruction by themselves.
static inline Lanes product(Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Memory that a later tile will need, asked for in parts between computations: asked for at once it would fill the core's
// few line buffers, and computing would wait for memory and memory for computing.
struct Ahead {
  uintptr_t next;
  int bytes;  // per element; 0: nothing to fetch

  template <int LINES>
  void lines() {
    for (int i = 0; i < LINES; ++i) __builtin_prefetch(reinterpret_cast<const void*>(next + 64 * i));
    next += 64 * LINES;
  }

  // Written out per size, as this is called every few dozen instructions.
  template <int ELEMENTS>
  void fetch() {
    constexpr int GROUPS = ELEMENTS / 64;
    switch (bytes) {
      case 1: return lines<GROUPS>();
      case 2: return lines<2 * GROUPS>();
      case 4: return lines<4 * GROUPS>();
      case 8: return lines<8 * GROUPS>();
    }
  }
};

// Philox4x32-10 (Salmon et al. 2011) on N vectors of blocks, which hide each other's latency. Words 0, 1 and 2, 3 of block
// i, of all in sequence, are words[2 * i] and words[2 * i + 1].
template <int N>
static inline void philox(const Lanes* block, const Key& key, uint32_t stream, uint64_t* words) {
  const Lanes zero = {}, multiplier0 = zero + 0xD2511F53u, multiplier1 = zero + 0xCD9E8D57u;
  Lanes c0[N], c1[N], c2[N], c3[N];
  for (int j = 0; j < N; ++j) c0[j] = block[j], c1[j] = zero + key.step, c2[j] = zero + key.ordinal, c3[j] = zero + stream;
  uint32_t k0 = key.low, k1 = key.high;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const Lanes p0 = product(c0[j], multiplier0), p1 = product(c2[j], multiplier1);
      c0[j] = (p1 >> 32) ^ c1[j] ^ k0;
      c2[j] = (p0 >> 32) ^ c3[j] ^ k1;
      c1[j] = p1;
      c3[j] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int j = 0; j < N; ++j) {
    const Lanes first = (c0[j] & 0xFFFFFFFFu) | c1[j] << 32, second = (c2[j] & 0xFFFFFFFFu) | c3[j] << 32;
    for (int i = 0; i < WIDTH; ++i) {
      words[2 * (WIDTH * j + i)] = first[i];
      words[2 * (WIDTH * j + i) + 1] = second[i];
    }
  }
}

// Consecutive blocks. `blocks` is rounded up to PAIR, and `words` has room for that many. Meanwhile, memory fetches for 16
// elements per block.
constexpr int PAIR = 2 * WIDTH;
static inline void philox_blocks(uint64_t first, int blocks, const Key& key, uint32_t stream, uint64_t* words,
                                 Ahead ahead) {
  Lanes pair[2];
  for (int i = 0; i < PAIR; ++i) pair[i / WIDTH][i % WIDTH] = first + i;
  for (int b = 0; b < blocks; b += PAIR) {
    ahead.fetch<PAIR * 16>();
    philox<2>(pair, key, stream, words + 2 * b);
    pair[0] += PAIR;
    pair[1] += PAIR;
  }
}

// A byte, a half-word or a word per element: number e % PER_BLOCK of block e / PER_BLOCK.
template <class Number>
struct PerElement {
  static constexpr int PER_BLOCK = 16 / sizeof(Number);
  alignas(64) uint64_t words[2 * (TILE / PER_BLOCK + PAIR)];

  const Number* fill(uint64_t element, int n, const Key& key, uint32_t stream, Ahead ahead) {
    const int skip = static_cast<int>(element % PER_BLOCK);
    philox_blocks(element / PER_BLOCK, (skip + n + PER_BLOCK - 1) / PER_BLOCK, key, stream, words, ahead);
    return reinterpret_cast<const Number*>(words) + skip;
  }
};
using Bytes = PerElement<uint8_t>;

// One bit per element, of up to WORDS words of 64: bit e % 128 of block e / 128.
template <int WORDS>
struct Coins {
  alignas(64) uint64_t words[2 * (WORDS / 2 + 1 + PAIR)];
  int skip, shift;

  void fill(uint64_t element, int n, const Key& key, uint32_t stream) {
    skip = static_cast<int>(element / 64 % 2);
    shift = static_cast<int>(element % 64);
    philox_blocks(element / 128, (skip + n + (shift != 0) + 1) / 2, key, stream, words, {0, 0});
  }

  uint64_t operator[](int i) const {
    const uint64_t* at = words + skip + i;
    return shift == 0 ? at[0] : at[0] >> shift | at[1] << (64 - shift);
  }
};

// Q, whose reciprocal is erfc(|x|) to 3e-7 (Abramowitz and Stegun 7.1.28). May be infinite.
static inline float reciprocal_erfc(float x) {
  x = __builtin_fabsf(x);
  float q = 0.0000430638f;
  q = fused(q, x, 0.0002765672f);
  q = fused(q, x, 0.0001520143f);
  q = fused(q, x, 0.0092705272f);
  q = fused(q, x, 0.0422820123f);
  q = fused(q, x, 0.0705230784f);
  q = fused(q, x, 1.0f);
  q *= q;
  q *= q;
  q *= q;
  return q * q;
}

// E sign(m + xi), 0 where m is 0: erf(m / (sigma sqrt 2)) to 6e-7 of itself, or of uniform noise on +-sigma the line m / sigma
// between -1 and 1.
template <bool UNIFORM>
static inline float expected_sign(float m, float sigma) {
  float mean;
  if (UNIFORM) {
    const float z = m / sigma, most = z > 1.0f ? 1.0f : z;
    mean = most < -1.0f ? -1.0f : most;
  } else {
    const float x = m * (0.70710678f / sigma), t = x * x, far = 1.0f - 1.0f / reciprocal_erfc(x);
    // A minimax polynomial in x^2, where 1 - erfc would cancel.
    float near = -0.00056314189f;
    near = fused(near, t, 0.00491755083f);
    near = fused(near, t, -0.0267113112f);
    near = fused(near, t, 0.112801798f);
    near = fused(near, t, -0.37612325f);
    near = fused(near, t, 1.12837911f);
    const float size = t < 1.0f ? __builtin_fabsf(x) * near : far;
    mean = x < 0 ? -size : size;
  }
  return m == 0 ? 0.0f : mean;
}

// The inverse of the normal distribution function: Wichura 1988, algorithm AS 241 (PPND16).
static inline double inverse_normal(double u) {
  const double q = u - 0.5;
  if (q > -0.425 && q < 0.425) {
    const double r = 0.180625 - q * q;
    return q *
           (((((((2.5090809287301226727e3 * r + 3.3430575583588128105e4) * r + 6.7265770927008700853e4) * r +
                4.5921953931549871457e4) * r + 1.3731693765509461125e4) * r + 1.9715909503065514427e3) * r +
             1.3314166789178437745e2) * r + 3.3871328727963666080e0) /
           (((((((5.2264952788528545610e3 * r + 2.8729085735721942674e4) * r + 3.9307895800092710610e4) * r +
                2.1213794301586595867e4) * r + 5.3941960214247511077e3) * r + 6.8718700749205790830e2) * r +
             4.2313330701600911252e1) * r + 1.0);
  }
  double r = __builtin_sqrt(-__builtin_log(q < 0 ? u : 1.0 - u));
  double x;
  if (r <= 5.0) {
    r -= 1.6;
    x = (((((((7.74545014278341407640e-4 * r + 2.27238449892691845833e-2) * r + 2.41780725177450611770e-1) * r +
             1.27045825245236838258e0) * r + 3.64784832476320460504e0) * r + 5.76949722146069140550e0) * r +
          4.63033784615654529590e0) * r + 1.42343711074968357734e0) /
        (((((((1.05075007164441684324e-9 * r + 5.47593808499534494600e-4) * r + 1.51986665636164571966e-2) * r +
             1.48103976427480074590e-1) * r + 6.89767334985100004550e-1) * r + 1.67638483018380384940e0) * r +
          2.05319162663775882187e0) * r + 1.0);
  } else {
    r -= 5.0;
    x = (((((((2.01033439929228813265e-7 * r + 2.71155556874348757815e-5) * r + 1.24266094738807843860e-3) * r +
             2.65321895265761230930e-2) * r + 2.96560571828504891230e-1) * r + 1.78482653991729133580e0) * r +
          5.46378491116411436990e0) * r + 6.65790464350110377720e0) /
        (((((((2.04426310338993978564e-15 * r + 1.42151175831644588870e-7) * r + 1.84631831751005468180e-5) * r +
             7.86869131145613259100e-4) * r + 1.48753612908506148525e-2) * r + 1.36929880922735805310e-1) * r +
          5.99832206555887937690e-1) * r + 1.0);
  }
  return q < 0 ? -x : x;
}

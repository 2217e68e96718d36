// As many numbers as a register holds, and the lanes of a sum. Included inside an instruction set's namespace.

#if defined(__AVX512F__)
constexpr int REGISTER = 64;  // bytes
#elif defined(__AVX2__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif

template <class W>
struct VectorOf {
  typedef W Type __attribute__((vector_size(REGISTER)));
};
template <class W>
using Vector = typename VectorOf<W>::Type;

// A sum is formed in so many lanes, whatever a register holds, so that its rounding is the same for every instruction set.
constexpr int LANES = 16;
template <class W>
constexpr int PER_REGISTER = REGISTER / int(sizeof(W));
template <class W>
constexpr int REGISTERS = LANES / PER_REGISTER<W>;

template <class W>
static inline Vector<W> load(const W* from) {
  Vector<W> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
template <class W>
static inline void store(W* to, Vector<W> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// x with its sign changed where m is negative, and 0 where m is 0.
template <class V>
static inline V signed_as(V x, V m) {
  using Bits = decltype(V{} != V{});
  const Bits sign_bit = (Bits)(-V{});
  return (V)(((Bits)x ^ ((Bits)m & sign_bit)) & (m != V{}));
}

#if defined(__AVX512F__)
static inline __m512 fused(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
static inline __m512d fused(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
static inline __m256 fused(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
static inline __m256d fused(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__aarch64__)
static inline Vector<float> fused(Vector<float> a, Vector<float> b, Vector<float> c) { return vfmaq_f32(c, a, b); }
static inline Vector<double> fused(Vector<double> a, Vector<double> b, Vector<double> c) { return vfmaq_f64(c, a, b); }
#else
static inline Vector<float> fused(Vector<float> a, Vector<float> b, Vector<float> c) {
  typedef double Wide __attribute__((vector_size(2 * REGISTER)));
  const Wide exact = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
  return __builtin_convertvector(exact + __builtin_convertvector(c, Wide), Vector<float>);
}
static inline Vector<double> fused(Vector<double> a, Vector<double> b, Vector<double> c) {
  for (int i = 0; i < PER_REGISTER<double>; ++i) c[i] = fused(a[i], b[i], c[i]);
  return c;
}
#endif

// Ballots counted, and votes as numbers: words of 64 bits, one per element. Compiled once per instruction set, under the name
// SIGNSTEP_ISA.

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "chunk.h"

namespace signstep {
namespace SIGNSTEP_ISA {

#include "numbers.h"
#include "noise.h"

namespace {

constexpr int VECTOR = int(sizeof(Lanes));  // bytes
constexpr int VECTORS = STRIP / WIDTH;

// n words; the others of the vector are 0.
inline Lanes load(const uint64_t* from, int n) {
  Lanes v = {};
  if (n >= WIDTH) {
    __builtin_memcpy(&v, from, sizeof v);
  } else {
    for (int i = 0; i < n; ++i) v[i] = from[i];
  }
  return v;
}

// Carry-save addition, in each bit: sum + x + y = sum' + 2 carry.
inline Lanes add(Lanes& sum, Lanes x, Lanes y) {
  const Lanes either = sum ^ x, carry = (sum & x) | (either & y);
  sum = either ^ y;
  return carry;
}

// Adds eight bits to ones + 2 twos + 4 fours; returns the eights (Harley and Seal's tree).
inline Lanes add_eight(Lanes* plane, const Lanes* x) {
  const Lanes two = add(plane[0], x[0], x[1]), another = add(plane[0], x[2], x[3]);
  const Lanes four = add(plane[1], two, another);
  const Lanes third = add(plane[0], x[4], x[5]), fourth = add(plane[0], x[6], x[7]);
  return add(plane[2], four, add(plane[1], third, fourth));
}

// Where the sum in the planes exceeds the threshold, and where it equals it.
template <class Planes>
inline void compare(Planes plane, int planes, uint64_t threshold, Lanes& above, Lanes& equal) {
  const Lanes none = {};
  above = none, equal = ~none;
  for (int i = planes - 1; i >= 0; --i) {
    const Lanes bit = none - (threshold >> i & 1);
    above |= equal & plane(i) & ~bit;
    equal &= ~(plane(i) ^ bit);
  }
}

// The counts of one strip, [0, n) of its words, against a threshold.
struct Strip {
  alignas(64) uint64_t above[STRIP];
  alignas(64) uint64_t equal[STRIP];

  void put(int i, Lanes a, Lanes e) {
    __builtin_memcpy(above + i, &a, sizeof a);
    __builtin_memcpy(equal + i, &e, sizeof e);
  }

  template <int ROWS>
  void few(const uint64_t* first, int64_t stride, int n, uint64_t threshold) {
    for (int i = 0; i < n; i += WIDTH) {
      Lanes row[8] = {}, plane[4] = {}, a, e;
      for (int r = 0; r < ROWS; ++r) row[r] = load(first + r * stride + i, n - i);
      plane[3] = add_eight(plane, row);
      compare([&plane](int k) { return plane[k]; }, ROWS == 1 ? 1 : ROWS < 4 ? 2 : ROWS < 8 ? 3 : 4, threshold, a, e);
      put(i, a, e);
    }
  }

  void many(const uint64_t* first, int64_t rows, int64_t stride, int n, uint64_t threshold) {
    static const uint64_t nobody[STRIP] = {};
    Lanes plane[17][VECTORS];
    int planes = 4;
    for (int i = 0; i < VECTORS; ++i) plane[0][i] = plane[1][i] = plane[2][i] = plane[3][i] = Lanes{};
    for (int64_t r = 0; r < rows; r += 8) {
      if ((r + 8) >> planes != 0) {
        for (int i = 0; i < VECTORS; ++i) plane[planes][i] = Lanes{};
        ++planes;
      }
      const uint64_t* row[8];
      for (int k = 0; k < 8; ++k) row[k] = r + k < rows ? first + (r + k) * stride : nobody;
      for (int i = 0; i < n; i += WIDTH) {
        Lanes x[8], low[3];
        for (int k = 0; k < 8; ++k) x[k] = load(row[k] + i, n - i);
        for (int k = 0; k < 3; ++k) low[k] = plane[k][i / WIDTH];
        Lanes carry = add_eight(low, x);
        for (int k = 0; k < 3; ++k) plane[k][i / WIDTH] = low[k];
        for (int k = 3; k < planes; ++k) {
          const Lanes old = plane[k][i / WIDTH];
          plane[k][i / WIDTH] = old ^ carry;
          carry &= old;
        }
      }
    }
    for (int i = 0; i < n; i += WIDTH) {
      Lanes a, e;
      compare([&plane, i](int k) { return plane[k][i / WIDTH]; }, planes, threshold, a, e);
      put(i, a, e);
    }
  }

  void fill(const uint64_t* first, int64_t rows, int64_t stride, int n, uint64_t threshold) {
    switch (rows) {
      case 1: return few<1>(first, stride, n, threshold);
      case 2: return few<2>(first, stride, n, threshold);
      case 3: return few<3>(first, stride, n, threshold);
      case 4: return few<4>(first, stride, n, threshold);
      case 5: return few<5>(first, stride, n, threshold);
      case 6: return few<6>(first, stride, n, threshold);
      case 7: return few<7>(first, stride, n, threshold);
      case 8: return few<8>(first, stride, n, threshold);
      default: return many(first, rows, stride, n, threshold);
    }
  }
};

// The bits of a number, U, where those of 1 are ONE: +1 where a vote is 1, -1 where it is 0, and 0 where a tie is marked.
template <class U, U ONE>
inline void vote(uint64_t up, uint64_t ties, void* out) {
  constexpr int LANES = VECTOR / int(sizeof(U)) < 16 ? VECTOR / int(sizeof(U)) : 16;
  typedef U Vector __attribute__((vector_size(LANES * sizeof(U))));
  Vector bit;
  for (int i = 0; i < LANES; ++i) bit[i] = U(1) << i;
  const Vector none = {};
#if defined(__AVX512F__)
  if constexpr (sizeof(U) == 4) {  // a bit of a mask for each number
    const Vector plus = none + ONE, minus = plus | U(1) << 31;
    for (int i = 0; i < 64; i += 16) {
      const __m512i either = _mm512_mask_blend_epi32(__mmask16(up >> i), (__m512i)minus, (__m512i)plus);
      _mm512_storeu_si512(static_cast<U*>(out) + i, _mm512_maskz_mov_epi32(__mmask16(~(ties >> i)), either));
    }
    return;
  }
#endif
  for (int i = 0; i < 64; i += LANES) {
    const U up_here = U(up >> i), tied_here = U(ties >> i);
    const Vector down = (Vector)(((none + up_here) & bit) == none), clear = (Vector)(((none + tied_here) & bit) == none);
    const Vector votes = (ONE | (down & U(1) << (8 * sizeof(U) - 1))) & clear;
    __builtin_memcpy(static_cast<U*>(out) + i, &votes, sizeof votes);
  }
}
inline void vote(uint64_t up, uint64_t ties, float* out) { vote<uint32_t, 0x3F800000u>(up, ties, out); }
inline void vote(uint64_t up, uint64_t ties, Bfloat16* out) { vote<uint16_t, 0x3F80u>(up, ties, out); }
inline void vote(uint64_t up, uint64_t ties, Float16* out) { vote<uint16_t, 0x3C00u>(up, ties, out); }
inline void vote(uint64_t up, uint64_t ties, double* out) {
  alignas(64) float votes[64];
  vote(up, ties, votes);
  for (int i = 0; i < 64; ++i) out[i] = votes[i];
}

// [<v, g>, ||g||^2] in 16 lanes of float64, whatever the instruction set.
struct Sums {
  static constexpr int LANES = VECTOR / int(sizeof(double));
  typedef double Vector __attribute__((vector_size(VECTOR)));
  Vector inner[16 / LANES] = {}, square[16 / LANES] = {};

  template <class X>
  static Vector load(const X* from) {
    typedef X Narrow __attribute__((vector_size(LANES * sizeof(X))));
    Narrow x;
    __builtin_memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, Vector);
  }

  template <class T>
  void add(uint64_t up, uint64_t ties, const T* from) {
    alignas(64) float v[64];
    alignas(64) decltype(widen(T())) g[64];
    vote(up, ties, v);
    for (int i = 0; i < 64; ++i) g[i] = widen(from[i]);
#pragma GCC unroll 32
    for (int i = 0; i < 64; i += LANES) {
      const Vector gi = load(g + i);
      inner[i % 16 / LANES] += load(v + i) * gi;
      square[i % 16 / LANES] += gi * gi;
    }
  }

  void write(double* sums) const {
    for (int i = 0; i < 16; ++i) sums[0] += inner[i / LANES][i % LANES], sums[1] += square[i / LANES][i % LANES];
  }
};

template <class T>
void spread_as(const uint64_t* words, const uint64_t* ties, const signstep_spread& s, int64_t begin, int64_t end,
               double* sums) {
  Sums total;
  for (int64_t w = begin; w < end; ++w) {
    const uint64_t up = words[s.word + w], tied = ties == nullptr ? 0 : ties[s.word + w];
    T* out = reinterpret_cast<T*>(s.out) + 64 * w;
    const int64_t n = s.size - 64 * w;
    if (n >= 64) {
      if (sums != nullptr) total.add(up, tied, out);
      vote(up, tied, out);
    } else {
      T last[64] = {};
      __builtin_memcpy(last, out, sizeof(T) * uint64_t(n));
      if (sums != nullptr) total.add(up, tied, last);
      vote(up, tied, last);
      __builtin_memcpy(out, last, sizeof(T) * uint64_t(n));
    }
  }
  if (sums != nullptr) total.write(sums);
}

}  // namespace

void count(const Ballots& ballots, const signstep_slot& slot, const signstep_options& o, int64_t begin, int64_t end) {
  Strip strip;
  Coins<STRIP> coins;
  const Key key = {uint32_t(o.seed), uint32_t(o.seed >> 32), uint32_t(o.step), uint32_t(slot.ordinal)};
  for (int64_t w = begin; w < end; w += STRIP) {
    const int n = int(end - w < STRIP ? end - w : STRIP);
    const int64_t at = slot.word + w;
    strip.fill(ballots.words + at, ballots.rows, ballots.stride, n, uint64_t(slot.voters) / 2);
    if (slot.voters % 2 == 0) {
      uint64_t any = 0;
      const int64_t left = slot.size - 64 * (w + n);
      if (left < 0) strip.equal[n - 1] &= ~uint64_t(0) >> -left;
      for (int i = 0; i < n; ++i) any |= strip.equal[i];
      if (ballots.ties != nullptr) {
        __builtin_memcpy(ballots.ties + at, strip.equal, n * sizeof(uint64_t));
      } else if (any != 0) {
        coins.fill(uint64_t(slot.offset + 64 * w), n, key, TIE_COINS);
        for (int i = 0; i < n; ++i) strip.above[i] |= strip.equal[i] & coins[i];
      }
    }
    __builtin_memcpy(ballots.majority + at, strip.above, n * sizeof(uint64_t));
  }
}

void spread(const uint64_t* words, const uint64_t* ties, const signstep_spread& s, int64_t begin, int64_t end,
            double* sums) {
  switch (s.dtype) {
    case SIGNSTEP_FLOAT32: return spread_as<float>(words, ties, s, begin, end, sums);
    case SIGNSTEP_FLOAT64: return spread_as<double>(words, ties, s, begin, end, sums);
    case SIGNSTEP_BFLOAT16: return spread_as<Bfloat16>(words, ties, s, begin, end, sums);
    case SIGNSTEP_FLOAT16: return spread_as<Float16>(words, ties, s, begin, end, sums);
  }
}

}  // namespace SIGNSTEP_ISA
}  // namespace signstep

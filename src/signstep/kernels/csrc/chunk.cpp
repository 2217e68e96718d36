// One chunk of one tensor, tile by tile, so that what a tile computes stays in the first-level cache and the only
// traffic with memory is each tensor once. Compiled once per instruction set, under the name SIGNSTEP_ISA; the loops are
// plain, for the compiler to vectorise.

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstddef>

#include "chunk.h"

namespace signstep {
namespace SIGNSTEP_ISA {

#include "numbers.h"
#include "noise.h"
#include "masks.h"
#include "vectors.h"
#include "decide.h"

namespace {

// Of what is called once per tile by more than one caller, which would else not be compiled for each.
#define INLINE __attribute__((always_inline)) inline

using Options = signstep_options;

constexpr float SQRT_HALF = 0.70710678f;

#include "momentum.h"
#include "rounding.h"
#include "sums.h"
#include "straight.h"

// More than the error of Phi by reciprocal_erfc in float32: a comparison that is not clear by that much is made exactly.
constexpr float CLOSE = 2e-6f;

template <class W>
struct Tile {
  alignas(64) W g[TILE];
  alignas(64) W m[TILE];
  alignas(64) W c[TILE];
  alignas(64) W noise[TILE];
  alignas(64) int16_t up[TILE];
  Bytes top;
  Bytes rounding;
  PerElement<uint32_t> low;
};

// A pointer to a tensor's own elements where they are what is computed with, null where they must be converted first.
template <class W>
inline const W* in_place(const W* x) {
  return x;
}
template <class W>
inline const W* in_place(const void*) {
  return nullptr;
}

template <class T, class W>
void load_gradient(const T* grad, const T* param, int n, const Options& o, W* g) {
  const W sign = o.maximize ? W(-1) : W(1);
  for (int i = 0; i < n; ++i) g[i] = sign * W(widen(grad[i]));
  if (o.coupled_decay == 0) return;
  const W decay = W(o.coupled_decay);
  for (int i = 0; i < n; ++i) g[i] = fused(decay, W(widen(param[i])), g[i]);
}

// 1 with the sign bit of `signed_as`; 0 where m is 0, and NaN where it is not finite, as m * 0 is.
template <class W>
inline W unit_step(uint32_t signed_as, W m) {
  const float sign = float_of((signed_as & 0x80000000u) | 0x3F800000u);
  return fused(m, W(0), m == 0 ? W(0) : W(sign));
}

// The exact decision U < floor(2^32 Phi(m / sigma)), and that of uniform noise, U < 2^31 + floor(2^31 m / sigma), both as the
// reference computes them.
inline bool exactly_up(uint32_t u, float m, float sigma) {
  const double z = m / sigma;
  const double t = __builtin_floor(__builtin_erfc(z * -0.70710678118654752440) * 0.5 * 4294967296.0);
  return double(u) < t;
}
inline bool linearly_up(uint32_t u, float m, float sigma) {
  return double(int32_t(u ^ 0x80000000u)) + 1 <= double(m / sigma) * 0x1p31;
}

template <class W>
inline W moved(W param, W direction, const Options& o) {
  return fused(W(-o.rate), direction, param * W(o.decay));
}

// Where the decisions of a tensor go: its parameters, which each moves ...
template <class T, class W, class Rounding>
struct Moves {
  struct Place : Rounding::Random {
    T* param;
    T before;
  };
  const Options& o;
  const Rounding& rounding;
  T* param;  // of the tile

  Place place(int i) const { return {rounding.random(i), param + i, param[i]}; }

  void settle(const Place& place, float m, bool up) const {
    // No branch, which would be foretold half of the times.
    const W direction = W(float_of(0x3F800000u | uint32_t(!up) << 31)) + W(m - m);
    *place.param = Rounding::round(moved(W(widen(place.before)), direction, o), place);
  }
};

// ... or bits, 0 where m is not finite.
struct Bits {
  struct Place {
    uint64_t* word;
    int bit;
  };
  uint64_t* words;  // of the tile

  Place place(int i) const { return {words + i / 64, i % 64}; }

  void settle(const Place& place, float m, bool up) const {
    const uint64_t bit = uint64_t(1) << place.bit;
    *place.word = (*place.word & ~bit) | (up && m - m == 0 ? bit : 0);
  }
};

// Elements whose top 8 bits tie with the threshold's wait here until there are enough for a vector: 24 more bits decide,
// and what was decided is set once more.
template <class Target>
struct Ties {
  Target target;
  const Key& key;
  float sigma;
  bool uniform;
  int count = 0;
  static constexpr int ROOM = LANES + TILE + LANES;
  typename Target::Place place[ROOM];
  float m[ROOM];
  uint8_t top[ROOM];
  uint64_t element[ROOM];

  // Of the elements first + element_at(bit) those whose bits are set. Which groups have a tie cannot be foretold, so the first
  // goes through no branch: what comes after would wait for the decision. An element may wait twice, and without need.
  INLINE void add(uint64_t bits, int first, int n, const float* all, const uint8_t* bytes, uint64_t index) {
    do {
      int i = first + element_at(__builtin_ctzll(bits | uint64_t(1) << 63));
      i = i < n ? i : n - 1;
      place[count] = target.place(i);
      m[count] = all[i];
      top[count] = bytes[i];
      element[count] = index + i;
      count += bits != 0 ? 1 : 0;
      bits &= bits - 1;
    } while (bits != 0);
  }

  // All full vectors of those that wait; at the end of a chunk all.
  void resolve(bool end) {
    int first = 0;
    for (; first + LANES <= count || (end && first < count); first += LANES) vector(first);
    if (first == 0) return;
    for (int i = first; i < count; ++i) {
      place[i - first] = place[i], m[i - first] = m[i], top[i - first] = top[i], element[i - first] = element[i];
    }
    count = count > first ? count - first : 0;
  }

  __attribute__((noinline)) void vector(int first) {
    const int size = count - first < LANES ? count - first : LANES;
    for (int i = first + size; i < first + LANES; ++i) element[i] = 0, top[i] = 0, m[i] = 0;
    alignas(64) uint64_t words[2 * LANES];
    for (int lane = 0; lane < LANES; lane += WIDTH) {
      Lanes block;
      for (int i = 0; i < WIDTH; ++i) block[i] = element[first + lane + i] / 4;
      philox<1>(&block, key, LOW_BITS, words + 2 * lane);
    }
    const float inverse = SQRT_HALF / sigma;
    uint32_t u[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      const int word = int(element[first + lane] % 4);
      u[lane] = uint32_t(top[first + lane]) << 24 | (uint32_t(words[2 * lane + word / 2] >> 32 * (word % 2)) & 0xFFFFFFu);
    }
    if (uniform) {
      for (int lane = 0; lane < size; ++lane) {
        const int i = first + lane;
        if (m[i] != 0) target.settle(place[i], m[i], linearly_up(u[lane], m[i], sigma));
      }
      return;
    }
    float difference[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      const float x = m[first + lane] * inverse;
      const float tail = 0.5f / reciprocal_erfc(x);
      difference[lane] = (x > 0 ? 1.0f - tail : tail) - float(u[lane]) * 0x1p-32f;
    }
    for (int lane = 0; lane < size; ++lane) {
      const int i = first + lane;
      if (m[i] == 0) continue;
      const bool clear = __builtin_fabsf(difference[lane]) > CLOSE;
      target.settle(place[i], m[i], clear ? difference[lane] > 0 : exactly_up(u[lane], m[i], sigma));
    }
  }
};

inline const float* as_float(const float* m, int, float*) { return m; }
inline const float* as_float(const double* m, int n, float* buffer) {
  for (int i = 0; i < n; ++i) buffer[i] = float(m[i]);
  return buffer;
}

inline uint64_t lowest(int n) { return n < 64 ? (uint64_t(1) << n) - 1 : ~uint64_t(0); }

// sign(m + xi), +1 exactly when U < T: the sign of up. What ties has none worth the name yet.
template <class Target>
INLINE void decide_tile(const float* m, int n, uint64_t element, Bytes& random, int16_t* up, Ties<Target>& ties, Ahead* ahead) {
  const uint8_t* top = random.fill(element, n, ties.key, TOP_BITS, ahead[0]);
  const float inverse = 1.0f / ties.sigma;
  uint64_t tied[TILE / GROUP];
  for (int first = 0; first < n; first += GROUP) {
    ahead[1].template fetch<GROUP>();
    ahead[2].template fetch<GROUP>();
    // To the end of the group, also beyond n: what is there is not used.
    tied[first / GROUP] = ties.uniform ? decide<true>(m + first, top + first, inverse, up + first)
                                       : decide<false>(m + first, top + first, inverse, up + first);
  }
  for (int first = 0; first < n; first += GROUP) ties.add(tied[first / GROUP], first, n, m, top, element);
}

// xi = sigma Phi^-1((U + 1/2) / 2^32), or that of uniform noise, sigma (2 (U + 1/2) / 2^32 - 1).
template <class W>
void draw_noise(Tile<W>& tile, int n, uint64_t element, const Key& key, float sigma, bool uniform) {
  const uint8_t* top = tile.top.fill(element, n, key, TOP_BITS, {0, 0});
  const uint32_t* low = tile.low.fill(element, n, key, LOW_BITS, {0, 0});
  for (int i = 0; i < n; ++i) {
    const uint32_t u = uint32_t(top[i]) << 24 | (low[i] & 0xFFFFFFu);
    const double unit = uniform ? (double(int32_t(u ^ 0x80000000u)) + 0.5) * 0x1p-31 : inverse_normal((double(u) + 0.5) * 0x1p-32);
    tile.noise[i] = W(sigma * float(unit));
  }
}

// E sign(m + xi), NaN where m is not finite.
template <bool UNIFORM, class W>
void expect(const W* __restrict m, int n, float sigma, W* __restrict mean) {
  for (int i = 0; i < n; ++i) {
    const float narrow = float(m[i]);
    mean[i] = W(expected_sign<UNIFORM>(narrow, sigma) + (narrow - narrow));
  }
}

// sign(m) + xi.
template <class W>
inline W post_direction(W m, W noise) {
  return (m == 0 ? W(0) : W(float(m > 0 ? 1.0f : -1.0f) + float(noise))) + (m - m);
}

template <class T, class W, class Rounding, class Direction>
void apply(T* __restrict param, int n, const Options& o, const Rounding& rounding, Direction direction) {
  const W rate = W(-o.rate), decay = W(o.decay);
  if (decay == 1) {
    for (int i = 0; i < n; ++i) {
      param[i] = rounding.round(fused(rate, direction(i), W(widen(param[i]))), rounding.random(i));
    }
  } else {
    for (int i = 0; i < n; ++i) {
      param[i] = rounding.round(fused(rate, direction(i), W(widen(param[i])) * decay), rounding.random(i));
    }
  }
}

// The average of momentum and gradient that is not kept, in c: before the momentum is updated.
template <class T, class W>
INLINE void interpolate(const signstep_tensor& t, int64_t first, int n, const W* g, W weight, W* c) {
  if (t.state_dtype == t.dtype) return interpolate(reinterpret_cast<const T*>(t.exp_avg) + first, g, n, weight, c);
  switch (t.state_dtype) {
    case SIGNSTEP_FLOAT32: return interpolate(reinterpret_cast<const float*>(t.exp_avg) + first, g, n, weight, c);
    case SIGNSTEP_BFLOAT16_STOCHASTIC: return interpolate(reinterpret_cast<const Bfloat16*>(t.exp_avg) + first, g, n, weight, c);
    case SIGNSTEP_INT8: {
      const float scale = reinterpret_cast<const float*>(t.scale)[first / TILE];
      return interpolate_int8(reinterpret_cast<const int8_t*>(t.exp_avg) + first, scale, g, n, weight, c);
    }
  }
}

// Momentum, in the form in which it is kept, and as m.
template <class T, class W>
INLINE const W* update(const signstep_tensor& t, int64_t first, int n, const W* g, W weight, uint64_t element, const Key& key,
                Tile<W>& tile) {
  if (t.exp_avg == 0) return g;
  if (t.state_dtype == t.dtype) {
    T* exp_avg = reinterpret_cast<T*>(t.exp_avg) + first;
    if (n == TILE && in_place<W>(exp_avg) != nullptr) {
      W* kept = reinterpret_cast<W*>(t.exp_avg) + first;
      update_momentum_in_place(kept, g, n, weight);
      return kept;
    }
    update_momentum(exp_avg, g, n, weight, tile.m);
  } else if (t.state_dtype == SIGNSTEP_FLOAT32) {
    update_momentum(reinterpret_cast<float*>(t.exp_avg) + first, g, n, weight, tile.m);
  } else {
    const uint8_t* random = tile.rounding.fill(element, n, key, ROUNDING, {0, 0});
    if (t.state_dtype == SIGNSTEP_INT8) {
      float* scale = reinterpret_cast<float*>(t.scale) + first / TILE;
      update_int8(reinterpret_cast<int8_t*>(t.exp_avg) + first, scale, g, n, weight, random, tile.m);
    } else {
      update_bfloat16_stochastic(reinterpret_cast<Bfloat16*>(t.exp_avg) + first, g, n, weight, random, tile.m);
    }
  }
  return tile.m;
}

// Tiles between the one that is worked on and the one whose lines are fetched.
constexpr int DISTANCE = 2;

inline Ahead ahead_of(int64_t base, int64_t first, int bytes) {
  return {uintptr_t(base) + uintptr_t(first + DISTANCE * TILE * 4 / (bytes < 2 ? 2 : bytes)) * bytes, base == 0 ? 0 : bytes};
}

inline int bytes_of_state(int64_t state_dtype, int otherwise) {
  switch (state_dtype) {
    case SIGNSTEP_INT8: return 1;
    case SIGNSTEP_BFLOAT16_STOCHASTIC: return 2;
    case SIGNSTEP_FLOAT32: return 4;
    default: return otherwise;
  }
}

// What the direction of a tile is taken of. sums: null, or to which this tile's are added.
template <class T, class W>
INLINE const W* advance(const signstep_tensor& t, const Options& o, int64_t first, int n, float sigma, const Key& key,
                        Tile<W>& tile, Sums<W>* sums) {
  const T* grad = reinterpret_cast<const T*>(t.grad) + first;
  const W* g = n == TILE && !o.maximize && o.coupled_decay == 0 ? in_place<W>(grad) : nullptr;
  if (g == nullptr) {
    const int64_t param = t.param + first * int64_t(sizeof(T));  // no pointer before it is known to be one
    load_gradient(grad, reinterpret_cast<const T*>(param), n, o, tile.g);
    g = tile.g;
  }
  const bool interpolates = t.exp_avg != 0 && o.direction_weight != 0;
  if (interpolates) interpolate<T>(t, first, n, g, W(o.direction_weight), tile.c);
  const W* m = update<T>(t, first, n, g, W(o.gradient_weight), uint64_t(t.offset + first), key, tile);
  if (interpolates) m = tile.c;
  if (sums != nullptr) {
    // What is not full is in the tile.
    for (int i = n; i < TILE; ++i) tile.g[i] = tile.m[i] = tile.c[i] = 0;
    if (o.sums == SIGNSTEP_SUMS_OF_EXPECTED_SIGN && (o.direction == SIGNSTEP_PRE || o.direction == SIGNSTEP_EXPECTED)) {
      sums->add_expected_calibration(m, g, sigma, o.law == SIGNSTEP_UNIFORM);
    } else if (o.sums == SIGNSTEP_SUMS_OF_SIGN || o.sums == SIGNSTEP_SUMS_OF_EXPECTED_SIGN) {
      sums->add_calibration(m, g);
    }
    if (t.mean_square != 0 || o.sums == SIGNSTEP_SUMS_OF_MOMENTUM) sums->add_moment(m);
  }
  return m;
}

template <class T, class W, class Rounding>
void step(const signstep_tensor& t, const Options& o, int64_t begin, int64_t end, float sigma, double* sums) {
  Tile<W> tile;
  Rounding rounding;
  Sums<W> total;
  const Key key = {uint32_t(o.seed), uint32_t(o.seed >> 32), uint32_t(o.step), uint32_t(t.ordinal)};
  Ties<Moves<T, W, Rounding>> ties = {{o, rounding, nullptr}, key, sigma, o.law == SIGNSTEP_UNIFORM};
  float narrowed[sizeof(W) == sizeof(float) ? 1 : TILE];
  const int state_bytes = bytes_of_state(t.state_dtype, sizeof(T));
  for (int64_t first = begin; first < end; first += TILE) {
    const int n = int(end - first < TILE ? end - first : TILE);
    const uint64_t element = uint64_t(t.offset + first);
    T* param = ties.target.param = reinterpret_cast<T*>(t.param) + first;
    Ahead ahead[3] = {ahead_of(t.grad, first, sizeof(T)), ahead_of(t.param, first, sizeof(T)),
                      ahead_of(t.exp_avg, first, state_bytes)};
    if (o.direction != SIGNSTEP_PRE) {
      for (Ahead& stream : ahead) stream.fetch<TILE>();
    }
    const W* m = advance<T>(t, o, first, n, sigma, key, tile, sums == nullptr ? nullptr : &total);
    rounding.draw(element, n, key);
    if (o.direction == SIGNSTEP_SIGN) {
      apply<T, W>(param, n, o, rounding, [m](int i) { return unit_step(bits_of(float(m[i])), m[i]); });
    } else if (o.direction == SIGNSTEP_MOMENTUM) {
      apply<T, W>(param, n, o, rounding, [m](int i) { return m[i]; });
    } else if (sigma != sigma) {  // the rms of a tensor with elements that are not finite
      // From here on m is a float, also that of a double parameter, as in the reference.
      apply<T, W>(param, n, o, rounding, [m, sigma](int i) { return float(m[i]) == 0 ? W(0) : W(sigma); });
    } else if (o.direction == SIGNSTEP_EXPECTED) {
      ties.uniform ? expect<true>(m, n, sigma, tile.noise) : expect<false>(m, n, sigma, tile.noise);
      apply<T, W>(param, n, o, rounding, [&tile](int i) { return tile.noise[i]; });
    } else if (o.direction == SIGNSTEP_POST) {
      draw_noise(tile, n, element, key, sigma, ties.uniform);
      apply<T, W>(param, n, o, rounding, [m, &tile](int i) { return W(post_direction(float(m[i]), float(tile.noise[i]))); });
    } else {
      decide_tile(as_float(m, n, narrowed), n, element, tile.top, tile.up, ties, ahead);
      apply<T, W>(param, n, o, rounding, [m, up = tile.up](int i) { return W(unit_step(uint32_t(int32_t(up[i])), float(m[i]))); });
      ties.resolve(first + TILE >= end);
    }
  }
  if (sums != nullptr) total.write(sums);
}

#if defined(SIGNSTEP_DITHERED) && defined(__AVX2__)
#include "dithered.h"
#endif
#if defined(SIGNSTEP_NARROW) && defined(__AVX2__)
#include "narrow.h"
#endif

// The signs of a tile as words: up(first) says which of 64 elements are up, and a coin where m is 0.
template <class W, class Up>
void pack(const W* m, int n, uint64_t element, const Key& key, uint64_t* words, Up up) {
  uint64_t zeros[TILE / 64], any = 0;
  for (int i = 0; i < n; i += 64) {
    zeros[i / 64] = where<Is::ZERO>(m + i) & lowest(n - i);
    any |= zeros[i / 64];
    words[i / 64] = up(i) & ~zeros[i / 64] & lowest(n - i);
  }
  if (any == 0) return;
  Coins<TILE / 64> coins;
  coins.fill(element, (n + 63) / 64, key, ZERO_COINS);
  for (int i = 0; i < n; i += 64) words[i / 64] |= coins[i / 64] & zeros[i / 64];
}

// The worker's side of Algorithm 1: what would move a parameter is a bit.
template <class T, class W>
void cast(const signstep_tensor& t, const Options& o, int64_t begin, int64_t end, float sigma, double* sums) {
  Tile<W> tile;
  Sums<W> total;
  const Key key = {uint32_t(o.seed), uint32_t(o.seed >> 32), uint32_t(o.step), uint32_t(t.ordinal)};
  Ties<Bits> ties = {{nullptr}, key, sigma, o.law == SIGNSTEP_UNIFORM};
  float narrowed[sizeof(W) == sizeof(float) ? 1 : TILE];
  const int state_bytes = bytes_of_state(t.state_dtype, sizeof(T));
  for (int64_t first = begin; first < end; first += TILE) {
    const int n = int(end - first < TILE ? end - first : TILE);
    const uint64_t element = uint64_t(t.offset + first);
    uint64_t* words = ties.target.words = reinterpret_cast<uint64_t*>(t.bits) + first / 64;
    Ahead ahead[3] = {ahead_of(t.grad, first, sizeof(T)), ahead_of(t.param, first, sizeof(T)),
                      ahead_of(t.exp_avg, first, state_bytes)};
    if (o.direction != SIGNSTEP_PRE) {
      for (Ahead& stream : ahead) stream.fetch<TILE>();
    }
    const W* m = advance<T>(t, o, first, n, sigma, key, tile, sums == nullptr ? nullptr : &total);
    if (o.direction == SIGNSTEP_SIGN) {
      pack(m, n, element, key, words, [m](int i) { return where<Is::POSITIVE>(m + i); });
      continue;
    }
    const float* mf = as_float(m, n, narrowed);
    if (sigma != sigma) {
      pack(mf, n, element, key, words, [](int) { return uint64_t(0); });
    } else {
      decide_tile(mf, n, element, tile.top, tile.up, ties, ahead);
      pack(mf, n, element, key, words,
           [mf, up = tile.up](int i) { return not_negative(up + i) & where<Is::FINITE>(mf + i); });
      ties.resolve(first + TILE >= end);
    }
  }
  if (sums != nullptr) total.write(sums);
}

template <class T, class W>
void step_or_cast(const signstep_tensor& t, const Options& o, int64_t begin, int64_t end, float sigma, double* sums) {
  return t.bits == 0 ? step<T, W, ToNearest<T, W>>(t, o, begin, end, sigma, sums) : cast<T, W>(t, o, begin, end, sigma, sums);
}

// Whether step_dithered takes it.
inline bool is_dithered(const signstep_tensor& t, const Options& o, float sigma) {
  return o.direction == SIGNSTEP_PRE && t.exp_avg != 0 && t.state_dtype == t.dtype &&
         (o.sums == SIGNSTEP_NO_SUMS || o.sums == SIGNSTEP_SUMS_OF_MOMENTUM) && !o.maximize && o.coupled_decay == 0 &&
         float(o.gradient_weight) < 0.5f && float(o.direction_weight) < 0.5f && sigma == sigma;
}

#if defined(__AVX2__)
// Whether step_narrow takes it.
inline bool is_narrow(const signstep_tensor& t, const Options& o, const double* sums) {
  const bool kept = t.dtype == SIGNSTEP_FLOAT32    ? t.state_dtype == SIGNSTEP_BFLOAT16_STOCHASTIC || t.state_dtype == SIGNSTEP_INT8
                    : t.dtype == SIGNSTEP_BFLOAT16 ? t.state_dtype == SIGNSTEP_BFLOAT16
                                                   : false;
  return kept && t.bits == 0 && t.exp_avg != 0 && o.direction == SIGNSTEP_SIGN && sums == nullptr && !o.maximize &&
         o.coupled_decay == 0 && float(o.gradient_weight) < 0.5f && float(o.direction_weight) < 0.5f;
}
#endif

// Of float32 and float64.
template <class W>
void step_or_cast_unconverted(const signstep_tensor& t, const Options& o, int64_t begin, int64_t end, float sigma, double* sums) {
  if (t.bits == 0 && is_straight(t, o)) return step_straight<W>(t, o, begin, end, sums);
#if defined(__AVX2__)
  if (sizeof(W) == sizeof(float) && t.bits == 0 && is_dithered(t, o, sigma)) {
    return step_dithered(t, o, begin, end, sigma, sums);
  }
#endif
  return step_or_cast<W, W>(t, o, begin, end, sigma, sums);
}

}  // namespace

#if defined(SIGNSTEP_AT_RANDOM)

void step_at_random(const signstep_tensor& t, const signstep_options& o, int64_t begin, int64_t end, float sigma, double* sums) {
  return step<Bfloat16, float, AtRandom>(t, o, begin, end, sigma, sums);
}

#elif defined(SIGNSTEP_DITHERED)

#if defined(__AVX2__)
void step_dithered(const signstep_tensor& t, const signstep_options& o, int64_t begin, int64_t end, float sigma, double* sums) {
  if (o.direction_weight != 0) return dithered<true>(t, o, begin, end, sigma, sums);
  return dithered<false>(t, o, begin, end, sigma, sums);
}
#endif

#elif defined(SIGNSTEP_NARROW)

#if defined(__AVX2__)
void step_narrow(const signstep_tensor& t, const signstep_options& o, int64_t begin, int64_t end, float, double*) {
  if (t.state_dtype == SIGNSTEP_INT8) return narrow_by<MomentumInInt8>(t, o, begin, end);
  if (t.state_dtype == SIGNSTEP_BFLOAT16_STOCHASTIC) return narrow_by<MomentumInBfloat16>(t, o, begin, end);
  if (o.stochastic_params) return narrow_by<AllBfloat16<true>>(t, o, begin, end);
  return narrow_by<AllBfloat16<false>>(t, o, begin, end);
}
#endif

#else

void chunk(const signstep_tensor& t, const signstep_options& o, int64_t begin, int64_t end, float sigma, double* sums) {
#if defined(__AVX2__)
  if (is_narrow(t, o, sums)) return step_narrow(t, o, begin, end, sigma, sums);
#endif
  switch (t.dtype) {
    case SIGNSTEP_FLOAT32: return step_or_cast_unconverted<float>(t, o, begin, end, sigma, sums);
    case SIGNSTEP_FLOAT64: return step_or_cast_unconverted<double>(t, o, begin, end, sigma, sums);
    case SIGNSTEP_BFLOAT16:
      if (o.stochastic_params && t.bits == 0) return step_at_random(t, o, begin, end, sigma, sums);
      return step_or_cast<Bfloat16, float>(t, o, begin, end, sigma, sums);
    case SIGNSTEP_FLOAT16: return step_or_cast<Float16, float>(t, o, begin, end, sigma, sums);
  }
}

#endif

}  // namespace SIGNSTEP_ISA
}  // namespace signstep

// The dithered step of float32 parameters with float32 momentum, where registers are wide: as in straight.h one loop over the
// tensors, in which numbers go from memory to registers and back. Only what a tie needs waits in memory. Other dithered steps
// go tile by tile. Included inside an instruction set's namespace.

template <bool UNIFORM, bool MOMENT, bool DECAY, bool INTERPOLATES>
struct Dithered {
  const Options& o;
  const Vector<float> weight, direction_weight, rate, decay, unit;

  Dithered(const Options& o, float sigma)
      : o(o),
        weight(Vector<float>{} + float(o.gradient_weight)),
        direction_weight(Vector<float>{} + float(o.direction_weight)),
        rate(Vector<float>{} + float(-o.rate)),
        decay(Vector<float>{} + float(o.decay)),
        unit(Vector<float>{} + UNITS_OF_Z<UNIFORM> * (1.0f / sigma)) {}

  // What the direction is taken of: m or, in its own place, the average that is not kept.
  INLINE Vector<float> advance(const float* grad, float* exp_avg, float* average) const {
    const Vector<float> old = load(exp_avg), change = load(grad) - old, m = fused(weight, change, old);
    store(exp_avg, m);
    if (!INTERPOLATES) return m;
    const Vector<float> c = fused(direction_weight, change, old);
    store(average, c);
    return c;
  }

  // up: by its sign bits. As unit_step in a tile.
  INLINE void move(float* param, Vector<float> m, Vector<float> up) const {
    const Vector<float> one = (Vector<float>)(((Vector<int32_t>)up & INT32_MIN) | (Vector<int32_t>)(Vector<float>{} + 1.0f));
    const Vector<float> direction = fused(m, Vector<float>{}, (Vector<float>)((Vector<int32_t>)one & (m != Vector<float>{})));
    store(param, fused(rate, direction, DECAY ? load(param) * decay : load(param)));
  }

  template <class Waiting>
  INLINE void tile(float* param, const float* grad, float* exp_avg, uint64_t element, const uint8_t* top, Waiting& waiting,
                   Lanewise<float>& moment) const {
    constexpr int HALF = SHORTS / 2, LINE = 16;
    alignas(64) float averages[INTERPOLATES ? TILE : 1];
    float* const decides = INTERPOLATES ? averages : exp_avg;
    for (int first = 0; first < TILE; first += GROUP) {
      // The processor's own prefetching does not keep up with the decisions: without this a step takes a quarter longer on
      // AVX-512, and a ninth on AVX2.
      for (int line = first + DISTANCE * TILE; line < first + DISTANCE * TILE + GROUP; line += LINE) {
        __builtin_prefetch(grad + line);
        __builtin_prefetch(exp_avg + line);
        __builtin_prefetch(param + line);
      }
      Short up[GROUP / SHORTS];
#pragma GCC unroll 4
      for (int j = 0; j < GROUP / SHORTS; ++j) {
        const int i = first + j * SHORTS;
        const Vector<float> low = advance(grad + i, exp_avg + i, decides + i);
        const Vector<float> high = advance(grad + i + HALF, exp_avg + i + HALF, decides + i + HALF);
        up[j] = above<UNIFORM>(low, high, unit, top + i);
        if (MOMENT) {
          moment.part[0] += low * low;
          moment.part[REGISTERS<float> - 1] += high * high;
        }
      }
      waiting.add(ties<UNIFORM>(up), first, TILE, decides, top, element);
#pragma GCC unroll 4
      for (int j = 0; j < GROUP / SHORTS; ++j) {
        const int i = first + j * SHORTS;
        move(param + i, load(decides + i), unpacked_low(up[j]));
        move(param + i + HALF, load(decides + i + HALF), unpacked_high(up[j]));
      }
    }
  }

  static void run(const signstep_tensor& t, const Options& o, int64_t begin, int64_t end, float sigma, double* sums) {
    const Dithered self(o, sigma);
    const ToNearest<float, float> rounding;
    const Key key = {uint32_t(o.seed), uint32_t(o.seed >> 32), uint32_t(o.step), uint32_t(t.ordinal)};
    Ties<Moves<float, float, ToNearest<float, float>>> waiting = {{o, rounding, nullptr}, key, sigma, UNIFORM};
    Sums<float> total;
    Bytes random;
    for (int64_t at = begin; at < end; at += TILE) {
      const int n = int(end - at < TILE ? end - at : TILE);
      float* param = waiting.target.param = reinterpret_cast<float*>(t.param) + at;
      const float* grad = reinterpret_cast<const float*>(t.grad) + at;
      float* exp_avg = reinterpret_cast<float*>(t.exp_avg) + at;
      const uint64_t element = uint64_t(t.offset + at);
      const uint8_t* top = random.fill(element, n, key, TOP_BITS, {0, 0});
      Lanewise<float> moment;
      if (n == TILE) {
        self.tile(param, grad, exp_avg, element, top, waiting, moment);
        waiting.resolve(at + TILE == end);
      } else {
        // What is beyond the end is 0: it moves nothing, and adds nothing.
        alignas(64) float rest[3][TILE] = {};
        const size_t size = size_t(n) * sizeof(float);
        __builtin_memcpy(rest[0], param, size);
        __builtin_memcpy(rest[1], grad, size);
        __builtin_memcpy(rest[2], exp_avg, size);
        waiting.target.param = rest[0];
        self.tile(rest[0], rest[1], rest[2], element, top, waiting, moment);
        waiting.resolve(true);
        __builtin_memcpy(param, rest[0], size);
        __builtin_memcpy(exp_avg, rest[2], size);
      }
      if (MOMENT) total.add(2, moment);
    }
    if (MOMENT) total.write(sums);
  }
};

template <bool UNIFORM, bool INTERPOLATES>
void dithered_by(const signstep_tensor& t, const Options& o, int64_t begin, int64_t end, float sigma, double* sums) {
  if (t.mean_square != 0 || o.sums == SIGNSTEP_SUMS_OF_MOMENTUM) {
    if (o.decay == 1) return Dithered<UNIFORM, true, false, INTERPOLATES>::run(t, o, begin, end, sigma, sums);
    return Dithered<UNIFORM, true, true, INTERPOLATES>::run(t, o, begin, end, sigma, sums);
  }
  if (o.decay == 1) return Dithered<UNIFORM, false, false, INTERPOLATES>::run(t, o, begin, end, sigma, sums);
  return Dithered<UNIFORM, false, true, INTERPOLATES>::run(t, o, begin, end, sigma, sums);
}

template <bool INTERPOLATES>
void dithered(const signstep_tensor& t, const Options& o, int64_t begin, int64_t end, float sigma, double* sums) {
  if (o.law == SIGNSTEP_UNIFORM) return dithered_by<true, INTERPOLATES>(t, o, begin, end, sigma, sums);
  return dithered_by<false, INTERPOLATES>(t, o, begin, end, sigma, sums);
}

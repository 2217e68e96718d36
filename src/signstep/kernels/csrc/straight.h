// The step that draws no noise, of parameters and momentum that are kept as they are computed with: one loop over the
// tensors, in which every number goes from memory to registers and back. Included inside an instruction set's namespace.

// As average, of as many elements as a register holds.
template <class W>
struct Average {
  const bool small;
  const Vector<W> weight;

  explicit Average(W gradient) : small(gradient < W(0.5)), weight(Vector<W>{} + (gradient - W(small ? 0 : 1))) {}

  INLINE Vector<W> of(Vector<W> m, Vector<W> g) const { return fused(weight, g - m, small ? m : g); }
};

template <class W>
struct Straight {
  const bool coupled, interpolates;
  const Vector<W> sign, coupled_decay, rate, decay;
  const Average<W> kept, directed;

  explicit Straight(const Options& o)
      : coupled(o.coupled_decay != 0),
        interpolates(o.direction_weight != 0),
        sign(Vector<W>{} + W(o.maximize ? -1 : 1)),
        coupled_decay(Vector<W>{} + W(o.coupled_decay)),
        rate(Vector<W>{} + W(-o.rate)),
        decay(Vector<W>{} + W(o.decay)),
        kept(W(o.gradient_weight)),
        directed(W(o.direction_weight)) {}

  // Of as many elements as a register holds. inner, square: to which <sign(m), g> and ||g||^2, or 0 and ||m||^2, are added.
  template <bool KEPT, bool SIGN, int SUMS>
  INLINE void advance(W* param, const W* grad, W* exp_avg, Vector<W>& inner, Vector<W>& square) const {
    const Vector<W> p = load(param);
    Vector<W> g = load(grad) * sign;
    if (coupled) g = fused(coupled_decay, p, g);
    Vector<W> m = g;
    if (KEPT) {
      const Vector<W> old = load(exp_avg);
      m = kept.of(old, g);
      store(exp_avg, m);
      if (interpolates) m = directed.of(old, g);
    }
    if (SUMS == SIGNSTEP_SUMS_OF_MOMENTUM) {
      square += m * m;
    } else if (SUMS != SIGNSTEP_NO_SUMS) {
      inner += signed_as(g, m);
      square += g * g;
    }
    // As unit_step in a tile.
    const Vector<W> direction = SIGN ? fused(m, Vector<W>{}, signed_as(Vector<W>{} + W(1), m)) : m;
    store(param, fused(rate, direction, p * decay));
  }

  template <bool KEPT, bool SIGN, int SUMS>
  INLINE void sixteen(W* param, const W* grad, W* exp_avg, Lanewise<W>& inner, Lanewise<W>& square) const {
#pragma GCC unroll 8
    for (int j = 0; j < REGISTERS<W>; ++j) {
      const int i = j * PER_REGISTER<W>;
      advance<KEPT, SIGN, SUMS>(param + i, grad + i, exp_avg + i, inner.part[j], square.part[j]);
    }
  }

  template <bool KEPT, bool SIGN, int SUMS>
  static void run(W* __restrict param, const W* __restrict grad, W* __restrict exp_avg, int64_t n, const Options& o, double* sums) {
    const Straight self(o);
    Sums<W> total;
    for (int64_t tile = 0; tile < n; tile += TILE) {
      const int64_t end = tile + TILE < n ? tile + TILE : n;
      Lanewise<W> inner, square;
      int64_t i = tile;
      for (; i + LANES <= end; i += LANES) {
        self.template sixteen<KEPT, SIGN, SUMS>(param + i, grad + i, exp_avg + i, inner, square);
      }
      if (i < end) {
        // What is beyond the end is 0, and adds nothing.
        alignas(64) W rest[3][LANES] = {};
        const size_t size = size_t(end - i) * sizeof(W);
        __builtin_memcpy(rest[0], param + i, size);
        __builtin_memcpy(rest[1], grad + i, size);
        if (KEPT) __builtin_memcpy(rest[2], exp_avg + i, size);
        self.template sixteen<KEPT, SIGN, SUMS>(rest[0], rest[1], rest[2], inner, square);
        __builtin_memcpy(param + i, rest[0], size);
        if (KEPT) __builtin_memcpy(exp_avg + i, rest[2], size);
      }
      if (SUMS == SIGNSTEP_SUMS_OF_MOMENTUM) {
        total.add(2, square);
      } else if (SUMS != SIGNSTEP_NO_SUMS) {
        total.add(0, inner), total.add(1, square);
      }
    }
    if (SUMS != SIGNSTEP_NO_SUMS) total.write(sums);
  }
};

template <class W, bool KEPT, bool SIGN>
void step_straight(const signstep_tensor& t, const Options& o, int64_t begin, int64_t end, double* sums) {
  W* const param = reinterpret_cast<W*>(t.param) + begin;
  const W* const grad = reinterpret_cast<const W*>(t.grad) + begin;
  W* const exp_avg = KEPT ? reinterpret_cast<W*>(t.exp_avg) + begin : nullptr;
  const int64_t n = end - begin;
  if (sums == nullptr || o.sums == SIGNSTEP_NO_SUMS) {
    Straight<W>::template run<KEPT, SIGN, SIGNSTEP_NO_SUMS>(param, grad, exp_avg, n, o, sums);
  } else if (o.sums == SIGNSTEP_SUMS_OF_MOMENTUM) {
    Straight<W>::template run<KEPT, SIGN, SIGNSTEP_SUMS_OF_MOMENTUM>(param, grad, exp_avg, n, o, sums);
  } else {
    Straight<W>::template run<KEPT, SIGN, SIGNSTEP_SUMS_OF_SIGN>(param, grad, exp_avg, n, o, sums);
  }
}

inline bool is_straight(const signstep_tensor& t, const Options& o) {
  const bool kept_as_computed = t.exp_avg == 0 || t.state_dtype == t.dtype;
  return kept_as_computed && t.mean_square == 0 && (o.direction == SIGNSTEP_SIGN || o.direction == SIGNSTEP_MOMENTUM);
}

template <class W>
void step_straight(const signstep_tensor& t, const Options& o, int64_t begin, int64_t end, double* sums) {
  if (t.exp_avg == 0) {
    if (o.direction == SIGNSTEP_SIGN) return step_straight<W, false, true>(t, o, begin, end, sums);
    return step_straight<W, false, false>(t, o, begin, end, sums);
  }
  if (o.direction == SIGNSTEP_SIGN) return step_straight<W, true, true>(t, o, begin, end, sums);
  return step_straight<W, true, false>(t, o, begin, end, sums);
}

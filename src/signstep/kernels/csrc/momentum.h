// How a gradient enters the momentum, and how that is kept: see kernels/momentum.py. Included inside an instruction set's
// namespace.

// m <- m + (1 - beta) (g - m), in the form that torch.lerp rounds.
template <class W>
inline W average(W m, W g, W weight) {
  const bool small = weight < W(0.5);
  return fused(small ? weight : weight - W(1), g - m, small ? m : g);
}

// An average that is not kept, of the momentum before its update.
template <class S, class W>
void interpolate(const S* __restrict exp_avg, const W* __restrict g, int n, W weight, W* __restrict c) {
  for (int i = 0; i < n; ++i) c[i] = average(W(widen(exp_avg[i])), g[i], weight);
}
template <class W>
void interpolate_int8(const int8_t* exp_avg, float scale, const W* g, int n, W weight, W* c) {
  for (int i = 0; i < n; ++i) c[i] = average(W(float(exp_avg[i]) * scale), g[i], weight);
}

// Momentum that is kept to the nearest: what decides is what is kept.
template <class S, class W>
void update_momentum(S* __restrict exp_avg, const W* __restrict g, int n, W weight, W* __restrict m) {
  for (int i = 0; i < n; ++i) {
    const S kept = narrow<S, W>(average(W(widen(exp_avg[i])), g[i], weight));
    exp_avg[i] = kept;
    m[i] = W(widen(kept));
  }
}
template <class W>
void update_momentum_in_place(W* __restrict exp_avg, const W* __restrict g, int n, W weight) {
  for (int i = 0; i < n; ++i) exp_avg[i] = average(exp_avg[i], g[i], weight);
}

template <class W>
void update_bfloat16_stochastic(Bfloat16* exp_avg, const W* g, int n, W weight, const uint8_t* random, W* m) {
  for (int i = 0; i < n; ++i) {
    m[i] = average(W(widen(exp_avg[i])), g[i], weight);
    exp_avg[i] = to_bfloat16(float(m[i]), uint32_t(random[i]) << 8 | 0x80u);
  }
}

// Of a block, by the bits of its largest number without sign: a NaN is larger than infinity, and that than all numbers.
inline float scale_of(uint32_t largest) { return float_of(largest) / 127.0f; }
inline float inverse_of(float scale) { return scale < 0x1p-120f ? 0.0f : 1.0f / scale; }

template <class W>
void code(const W* m, int n, float inverse, const uint8_t* random, int8_t* exp_avg) {
  for (int i = 0; i < n; ++i) {
    float x = float(m[i]) * inverse;
    x = x == x ? x : 0.0f;
    // floor, for what lies above -128: truncation of a positive number.
    const int32_t q = int32_t(x + (float(random[i]) + 0.5f) * 0x1p-8f + 128.0f) - 128;
    exp_avg[i] = int8_t(q > 127 ? 127 : q);
  }
}

// A tile is one block, with one scale.
template <class W>
void update_int8(int8_t* exp_avg, float* scale, const W* g, int n, W weight, const uint8_t* random, W* m) {
  const float old = *scale;
  uint32_t largest = 0;
  for (int i = 0; i < n; ++i) {
    m[i] = average(W(float(exp_avg[i]) * old), g[i], weight);
    const uint32_t magnitude = bits_of(float(m[i])) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  *scale = scale_of(largest);
  code(m, n, inverse_of(*scale), random, exp_avg);
}

// How what the step computes becomes a parameter: to the nearest, or at random, see kernels/rounding.py. Included inside an
// instruction set's namespace.
//
// draw() is called once per tile; random() is what an element of the tile then needs for its rounding.

template <class T, class W>
struct ToNearest {
  void draw(uint64_t, int, const Key&) {}
  uint16_t random(int) const { return 0; }
  static T round(W x, uint16_t) { return narrow<T, W>(x); }
};

struct AtRandom {
  PerElement<uint16_t> halves;
  const uint16_t* drawn;

  void draw(uint64_t element, int n, const Key& key) { drawn = halves.fill(element, n, key, PARAM_ROUNDING, {0, 0}); }
  uint16_t random(int i) const { return drawn[i]; }
  static Bfloat16 round(float x, uint16_t random) { return to_bfloat16(x, random); }
};

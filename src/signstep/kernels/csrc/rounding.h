// How what the step computes becomes a parameter: to the nearest, or at random, see kernels/rounding.py. Included inside an
// instruction set's namespace.
//
// draw() is called once per tile; random() is what an element of the tile then needs for its rounding. What waits for a
// decision keeps that, as a base, which takes no room where it is empty.

template <class T, class W>
struct ToNearest {
  struct Random {};

  void draw(uint64_t, int, const Key&) {}
  Random random(int) const { return {}; }
  static T round(W x, Random) { return narrow<T, W>(x); }
};

struct AtRandom {
  struct Random {
    uint16_t number;
  };
  PerElement<uint16_t> halves;
  const uint16_t* drawn;

  void draw(uint64_t element, int n, const Key& key) { drawn = halves.fill(element, n, key, PARAM_ROUNDING, {0, 0}); }
  Random random(int i) const { return {drawn[i]}; }
  static Bfloat16 round(float x, Random random) { return to_bfloat16(x, random.number); }
};

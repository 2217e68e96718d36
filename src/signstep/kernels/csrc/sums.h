// [<s, g>, ||g||^2, sum m^2]: of a tile in LANES lanes of W, so that their rounding is the same whatever the instruction set,
// and of all in as many of float64. Included inside an instruction set's namespace.

// The lanes of a tile's sum, in as many registers as they need.
template <class W>
struct Lanewise {
  Vector<W> part[REGISTERS<W>] = {};
};

template <class W>
struct Sums {
  typedef double Wide __attribute__((vector_size(PER_REGISTER<W> * sizeof(double))));
  Wide total[3][REGISTERS<W>] = {};

  void add(int which, const Lanewise<W>& tile) {
    for (int j = 0; j < REGISTERS<W>; ++j) total[which][j] += __builtin_convertvector(tile.part[j], Wide);
  }

  // term(i, j): what elements i and following add to register j.
  template <class Term>
  INLINE static void each(Term term) {
    for (int i = 0; i < TILE; i += LANES) {
#pragma GCC unroll 8
      for (int j = 0; j < REGISTERS<W>; ++j) term(i + j * PER_REGISTER<W>, j);
    }
  }

  // The following are of full tiles; what is beyond a tensor's end is 0.

  void add_moment(const W* m) {
    Lanewise<W> moment;
    each([&](int i, int j) { moment.part[j] += load(m + i) * load(m + i); });
    add(2, moment);
  }

  // s = sign(m): g with the sign of m, none where m is 0.
  void add_calibration(const W* m, const W* g) {
    Lanewise<W> inner, square;
    each([&](int i, int j) {
      const Vector<W> gi = load(g + i);
      inner.part[j] += signed_as(gi, load(m + i));
      square.part[j] += gi * gi;
    });
    add(0, inner), add(1, square);
  }

  // s = E sign(m + xi).
  void add_expected_calibration(const W* m, const W* g, float sigma, bool uniform) {
    alignas(64) W s[TILE];
    if (uniform) {
      for (int i = 0; i < TILE; ++i) s[i] = W(expected_sign<true>(float(m[i]), sigma));
    } else {
      for (int i = 0; i < TILE; ++i) s[i] = W(expected_sign<false>(float(m[i]), sigma));
    }
    Lanewise<W> inner, square;
    each([&](int i, int j) {
      const Vector<W> gi = load(g + i);
      inner.part[j] += load(s + i) * gi;
      square.part[j] += gi * gi;
    });
    add(0, inner), add(1, square);
  }

  void write(double* sums) const {
    for (int which = 0; which < 3; ++which) {
      for (int lane = 0; lane < LANES; ++lane) {
        sums[which] += total[which][lane / PER_REGISTER<W>][lane % PER_REGISTER<W>];
      }
    }
  }
};

// The C interface: picks the instruction set, cuts tensors and slots into pieces and gives them to threads.

#include <cmath>
#include <exception>
#include <vector>

#include "chunk.h"
#include "parallel.h"

namespace signstep {
namespace {

// Work is handed out, and sums are formed, piece by piece: constants, so that no result depends on the threads.
constexpr int64_t CHUNK = 256 * TILE;  // elements
constexpr int64_t WORDS = 8 * STRIP;

template <class Of>
struct Piece {
  const Of* of;
  int64_t begin, end;
  float sigma;
  double sums[3];
};

template <class Of>
void cut(std::vector<Piece<Of>>& pieces, const Of& of, int64_t size, int64_t length, float sigma = 0) {
  for (int64_t begin = 0; begin < size; begin += length) {
    pieces.push_back({&of, begin, size - begin < length ? size : begin + length, sigma, {0, 0, 0}});
  }
}

// Adds up the sums of each object's pieces, in their order: done(object, sums).
template <class Of, class F>
void total(const std::vector<Piece<Of>>& pieces, const F& done) {
  for (size_t i = 0; i < pieces.size();) {
    const Of& of = *pieces[i].of;
    double sums[3] = {0, 0, 0};
    for (; i < pieces.size() && pieces[i].of == &of; ++i) {
      for (int j = 0; j < 3; ++j) sums[j] += pieces[i].sums[j];
    }
    done(of, sums);
  }
}

// A thread is woken for as much as a chunk only: for less, others are done before it is there, and where all cores are busy it
// may come milliseconds late.
int threads_for(int64_t elements, int threads) {
  const int64_t worth = elements / CHUNK + 1;
  return worth < threads ? int(worth) : threads;
}

int64_t words_of(int64_t size) { return (size + 63) / 64; }

Kernels kernels_for(int isa) {
  switch (isa == SIGNSTEP_BEST ? signstep_best_isa() : isa) {
#if defined(SIGNSTEP_X86)
    case SIGNSTEP_AVX512: return {avx512::chunk, avx512::count, avx512::spread};
    case SIGNSTEP_AVX2: return {avx2::chunk, avx2::count, avx2::spread};
#endif
    default: return {portable::chunk, portable::count, portable::spread};
  }
}

}  // namespace
}  // namespace signstep

using namespace signstep;

int signstep_abi() { return SIGNSTEP_ABI; }

int signstep_best_isa() {
#if defined(SIGNSTEP_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return SIGNSTEP_AVX512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return SIGNSTEP_AVX2;
#endif
  return SIGNSTEP_PORTABLE;
}

int signstep_step(const signstep_tensor* tensors, int64_t count, const signstep_options* options, double* sums) try {
  std::vector<Piece<signstep_tensor>> pieces;
  int64_t elements = 0;
  for (int64_t i = 0; i < count; ++i) {
    const signstep_tensor& t = tensors[i];
    elements += t.size;
    float sigma = static_cast<float>(options->sigma);
    if (t.mean_square != 0) sigma *= std::sqrt(*reinterpret_cast<const float*>(t.mean_square));
    if (options->law == SIGNSTEP_UNIFORM) sigma *= 1.7320508f;  // the noise's half-width, which takes sigma's place
    cut(pieces, t, t.size, CHUNK, sigma);
  }
  Chunk* const chunk = kernels_for(options->isa).chunk;
  const int threads = threads_for(elements, options->threads);
  parallel_for(pieces.size(), threads, options->parallel, [&](size_t i) {
    Piece<signstep_tensor>& piece = pieces[i];
    const bool wanted = sums != nullptr || piece.of->mean_square != 0;
    signstep_options own = *options;
    if (own.rates != nullptr) own.rate = own.rates[piece.of - tensors];
    chunk(*piece.of, own, piece.begin, piece.end, piece.sigma, wanted ? piece.sums : nullptr);
  });
  if (sums != nullptr) {
    for (int64_t i = 0; i < 3 * count; ++i) sums[i] = 0;
  }
  total(pieces, [&](const signstep_tensor& t, const double* mine) {
    if (sums != nullptr) {
      for (int j = 0; j < 3; ++j) sums[3 * (&t - tensors) + j] = mine[j];
    }
    if (t.mean_square != 0) {
      *reinterpret_cast<float*>(t.mean_square) = static_cast<float>(mine[2] / static_cast<double>(t.size));
    }
  });
  return 0;
} catch (const std::exception&) {
  return 1;
}

int signstep_count(const uint64_t* ballots, int64_t rows, int64_t stride, const signstep_slot* slots, int64_t count,
                   const signstep_options* options, uint64_t* majority, uint64_t* ties) try {
  std::vector<Piece<signstep_slot>> pieces;
  for (int64_t i = 0; i < count; ++i) {
    if (slots[i].voters > 0) cut(pieces, slots[i], words_of(slots[i].size), WORDS);
  }
  Count* const count_words = kernels_for(options->isa).count;
  const Ballots all = {ballots, rows, stride, majority, ties};
  parallel_for(pieces.size(), options->threads, options->parallel,
               [&](size_t i) { count_words(all, *pieces[i].of, *options, pieces[i].begin, pieces[i].end); });
  return 0;
} catch (const std::exception&) {
  return 1;
}

int signstep_spread_votes(const uint64_t* words, const uint64_t* ties, const signstep_spread* outs, int64_t count,
                          const signstep_options* options, double* sums) try {
  std::vector<Piece<signstep_spread>> pieces;
  for (int64_t i = 0; i < count; ++i) cut(pieces, outs[i], words_of(outs[i].size), WORDS);
  Spread* const spread = kernels_for(options->isa).spread;
  parallel_for(pieces.size(), options->threads, options->parallel, [&](size_t i) {
    spread(words, ties, *pieces[i].of, pieces[i].begin, pieces[i].end, sums == nullptr ? nullptr : pieces[i].sums);
  });
  if (sums == nullptr) return 0;
  for (int64_t i = 0; i < 2 * count; ++i) sums[i] = 0;
  total(pieces, [&](const signstep_spread& out, const double* mine) {
    for (int j = 0; j < 2; ++j) sums[2 * (&out - outs) + j] = mine[j];
  });
  return 0;
} catch (const std::exception&) {
  return 1;
}

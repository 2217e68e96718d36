// What the instruction sets have in common: the sizes of what they work on, and the signatures of what each compiles.
#pragma once

#include "signstep.h"

namespace signstep {

constexpr int TILE = 256;  // elements: the block of 8-bit momentum, and small enough that memory never waits for long

// One step, or the bits of one, on elements [begin, end) of a tensor, begin a multiple of TILE, with the tensor's sigma, or
// the half-width of its uniform noise.
// sums: null, or [<s, g>, ||g||^2, sum m^2], to which the chunk's are added.
using Chunk = void(const signstep_tensor&, const signstep_options&, int64_t begin, int64_t end, float sigma,
                   double* sums);

// Ballots are counted so many words of each at a time, which stay in the first-level cache.
constexpr int STRIP = 128;

struct Ballots {
  const uint64_t* words;
  int64_t rows, stride;
  uint64_t* majority;
  uint64_t* ties;
};

// The majority in words [begin, end) of a slot.
using Count = void(const Ballots&, const signstep_slot&, const signstep_options&, int64_t begin, int64_t end);

// The votes of words [begin, end) of a slot. sums: null, or [<v, g>, ||g||^2], to which these are added.
using Spread = void(const uint64_t* words, const uint64_t* ties, const signstep_spread&, int64_t begin, int64_t end,
                    double* sums);

namespace portable { Chunk chunk, step_at_random, step_dithered, step_narrow; Count count; Spread spread; }
namespace avx2 { Chunk chunk, step_at_random, step_dithered, step_narrow; Count count; Spread spread; }
namespace avx512 { Chunk chunk, step_at_random, step_dithered, step_narrow; Count count; Spread spread; }

struct Kernels {
  Chunk* chunk;
  Count* count;
  Spread* spread;
};

}  // namespace signstep

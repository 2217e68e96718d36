// What the instruction sets have in common: a tile's size and the signature of the function that each compiles.
#pragma once

#include "signstep.h"

namespace signstep {

constexpr int TILE = 256;  // elements: the block of 8-bit momentum, and small enough that memory never waits for long

// One step on elements [begin, end) of a tensor, begin a multiple of TILE, with the tensor's sigma. sums: null, or
// [<s, g>, ||g||^2, sum m^2], to which the chunk's are added.
using Chunk = void(const signstep_tensor&, const signstep_options&, int64_t begin, int64_t end, float sigma,
                   double* sums);

namespace portable { Chunk chunk; }
namespace avx2 { Chunk chunk; }
namespace avx512 { Chunk chunk; }

}  // namespace signstep

// The step of narrow.h, in a file of its own for the reason that chunk_at_random.cpp gives.

#define SIGNSTEP_NARROW
#include "chunk.cpp"

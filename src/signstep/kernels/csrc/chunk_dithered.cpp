// The dithered step of dithered.h, in a file of its own for the reason that chunk_at_random.cpp gives.

#define SIGNSTEP_DITHERED
#include "chunk.cpp"

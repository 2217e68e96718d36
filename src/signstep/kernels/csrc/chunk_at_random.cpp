// The step that rounds bfloat16 parameters at random. In a file of its own: beside the others it would use up what the
// compiler is ready to inline in a file, and they would be slower by up to a tenth.

#define SIGNSTEP_AT_RANDOM
#include "chunk.cpp"

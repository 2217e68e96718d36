// The C interface of signstep's native engine. Nothing here needs torch: tensors arrive as addresses and sizes.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define SIGNSTEP_API extern "C" __declspec(dllexport)
#else
#define SIGNSTEP_API extern "C" __attribute__((visibility("default")))
#endif

// Raised whenever a structure below changes; native.py refuses a library that answers another number.
#define SIGNSTEP_ABI 6

enum {
  SIGNSTEP_FLOAT32,
  SIGNSTEP_FLOAT64,
  SIGNSTEP_BFLOAT16,
  SIGNSTEP_FLOAT16,
  SIGNSTEP_BFLOAT16_STOCHASTIC,  // of a momentum buffer only
  SIGNSTEP_INT8,                 // of a momentum buffer only: blocks of 256, one float32 scale each
};

// What a parameter moves along: sign(m), sign(m + noise), sign(m) + noise, m itself, or E sign(m + noise). engine.py has the
// same numbers.
enum { SIGNSTEP_SIGN, SIGNSTEP_PRE, SIGNSTEP_POST, SIGNSTEP_MOMENTUM, SIGNSTEP_EXPECTED };
enum { SIGNSTEP_GAUSSIAN, SIGNSTEP_UNIFORM };  // the law of the noise
enum { SIGNSTEP_NO_SUMS, SIGNSTEP_SUMS_OF_SIGN, SIGNSTEP_SUMS_OF_EXPECTED_SIGN, SIGNSTEP_SUMS_OF_MOMENTUM };
enum { SIGNSTEP_BEST, SIGNSTEP_PORTABLE, SIGNSTEP_AVX2, SIGNSTEP_AVX512 };

// One dense tensor, elements in row-major order. Addresses are 0 where there is nothing.
struct signstep_tensor {
  int64_t param;        // updated; only read, for coupled decay, if there are bits
  int64_t grad;         // of the parameter's dtype, read only
  int64_t exp_avg;      // updated; 0: no momentum
  int64_t scale;        // float32 per 256 elements, for int8 momentum, updated
  int64_t mean_square;  // float32, read as the last step's and replaced by this one's; 0: dither is absolute
  int64_t bits;         // if not 0, the signs go here, (size + 63) / 64 words written, and no parameter is
  int64_t size;
  int64_t offset;   // index of the first element in the whole parameter
  int64_t ordinal;  // of the parameter, in the noise's counter
  int64_t dtype;
  int64_t state_dtype;
};

struct signstep_options {
  double rate;             // each coordinate moves by -rate * direction
  double decay;            // the parameter is multiplied by this first: 1 - lr * weight_decay, or 1
  double coupled_decay;    // the gradient becomes gradient + coupled_decay * parameter
  double gradient_weight;  // 1 - beta
  // 1 - beta of the average, of the gradient and the momentum before the step, that the direction is taken of, and dither and
  // sums; 0: they are taken of the new momentum.
  double direction_weight;
  double sigma;            // of the dither, as float32; times the rms where mean_square is given
  uint64_t seed;
  uint64_t step;
  int32_t maximize;
  int32_t direction;  // SIGNSTEP_SIGN, _PRE, _POST, _MOMENTUM or _EXPECTED
  int32_t sums;       // which s enters <s, g>, or that sum m^2 alone is wanted
  int32_t isa;       // SIGNSTEP_BEST, or one by name for tests
  int32_t threads;
  int32_t stochastic_params;  // bfloat16 parameters are rounded at random
  int32_t law;                // SIGNSTEP_GAUSSIAN, or _UNIFORM on +-sqrt(3) sigma
  void* parallel;  // GOMP_parallel of the OpenMP runtime that torch uses, or null for threads of our own
  const double* rates;  // null, or a rate per tensor in place of `rate`
};

// Bit e % 64 of word e / 64 belongs to element e of a slot, 1 for up; a slot begins at a word.

// A run of a parameter's elements whose votes are counted.
struct signstep_slot {
  int64_t word;  // the first
  int64_t size;  // elements
  int64_t offset;
  int64_t ordinal;
  int64_t voters;
};

// Votes as numbers.
struct signstep_spread {
  int64_t word;
  int64_t size;
  int64_t out;    // overwritten
  int64_t dtype;  // of out
};

SIGNSTEP_API int signstep_abi(void);

// The instruction set that SIGNSTEP_BEST stands for on this machine.
SIGNSTEP_API int signstep_best_isa(void);

// One step of Algorithm 1 on all tensors. sums: null, or per tensor [<s, g>, ||g||^2, sum m^2 if it is wanted or mean_square is
// given], 0 what is not wanted, written. A tensor with bits is not stepped: its signs, with a coin for each 0, are kept.
// This and the following return 0, or 1 if memory ran out (then nothing has been changed).
SIGNSTEP_API int signstep_step(const struct signstep_tensor* tensors, int64_t count,
                               const struct signstep_options* options, double* sums);

// The majority of 1 to 65535 ballots, one each `stride` words, in the words of the slots that have voters. A tie is decided
// by a coin, or marked in `ties`, if that is not null. Of the options only seed, step, isa and threads matter.
SIGNSTEP_API int signstep_count(const uint64_t* ballots, int64_t rows, int64_t stride, const struct signstep_slot* slots,
                                int64_t count, const struct signstep_options* options, uint64_t* majority,
                                uint64_t* ties);

// +1 for a bit of 1, -1 for 0, 0 for a tie (ties may be null). sums: null, or per slot [<v, g>, ||g||^2], written, of the
// votes v and what `out` held before. Of the options only isa and threads matter.
SIGNSTEP_API int signstep_spread_votes(const uint64_t* words, const uint64_t* ties, const struct signstep_spread* outs,
                                       int64_t count, const struct signstep_options* options, double* sums);

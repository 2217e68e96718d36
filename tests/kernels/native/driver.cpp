// Steps random tensors with every option, several times each, and casts, counts and spreads ballots: under ASan to find wrong
// addresses, under TSan with threads of the library's own to find races. Every buffer is a heap block of exactly the tensor's
// size, so that one byte too far is an error; and every instruction set and number of threads must give the same bytes.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "signstep.h"

namespace {

using Bytes = std::vector<unsigned char>;

struct Case {
  int dtype, state_dtype;  // state_dtype -1: no momentum
  bool relative;
  bool ballot;  // signs as bits instead of steps
  signstep_options options;
  std::vector<int64_t> sizes;
};

int bytes_of(int dtype) {
  switch (dtype) {
    case SIGNSTEP_FLOAT64: return 8;
    case SIGNSTEP_FLOAT32: return 4;
    case SIGNSTEP_INT8: return 1;
    default: return 2;
  }
}

// Finite numbers around 1 in any float format: the upper bytes of an exponent near its middle.
Bytes numbers(std::mt19937_64& random, int64_t size, int dtype) {
  Bytes out;
  for (int64_t i = 0; i < size; ++i) {
    const double value = std::ldexp(double(int64_t(random() % 2001) - 1000), -10);
    unsigned char bytes[8];
    if (dtype == SIGNSTEP_FLOAT64) {
      std::memcpy(bytes, &value, 8);
    } else if (dtype == SIGNSTEP_FLOAT16) {
      const uint16_t half = uint16_t(random() % 0x3C00 | (random() % 2) << 15);
      std::memcpy(bytes, &half, 2);
    } else {
      const float narrow = float(value);
      std::memcpy(bytes, reinterpret_cast<const unsigned char*>(&narrow) + (dtype == SIGNSTEP_FLOAT32 ? 0 : 2),
                  size_t(bytes_of(dtype)));
    }
    out.insert(out.end(), bytes, bytes + bytes_of(dtype));
  }
  out.shrink_to_fit();
  return out;
}

// All that three steps write.
Bytes run(const Case& c, int isa, int threads) {
  std::mt19937_64 random(7);
  const size_t count = c.sizes.size();
  std::vector<Bytes> params, grads, exp_avgs;
  std::vector<std::vector<float>> scales;
  std::vector<std::vector<uint64_t>> words;
  std::vector<float> mean_squares(count, 0.5f);
  std::vector<signstep_tensor> tensors;
  for (const int64_t size : c.sizes) {
    params.push_back(numbers(random, c.ballot && c.options.coupled_decay == 0 ? 0 : size, c.dtype));
    grads.push_back(numbers(random, size, c.dtype));
    exp_avgs.emplace_back(c.state_dtype < 0 ? 0 : size_t(size * bytes_of(c.state_dtype)));
    scales.emplace_back(c.state_dtype == SIGNSTEP_INT8 ? size_t((size + 255) / 256) : 0);
    words.emplace_back(c.ballot ? size_t((size + 63) / 64) : 0);
  }
  const auto address = [](const auto& v) { return v.empty() ? 0 : int64_t(reinterpret_cast<uintptr_t>(v.data())); };
  for (size_t i = 0; i < count; ++i) {
    tensors.push_back({address(params[i]), address(grads[i]), address(exp_avgs[i]), address(scales[i]),
                       c.relative ? int64_t(reinterpret_cast<uintptr_t>(&mean_squares[i])) : 0, address(words[i]), c.sizes[i],
                       int64_t(i) * 37, int64_t(i), c.dtype, c.state_dtype < 0 ? c.dtype : c.state_dtype});
  }
  signstep_options options = c.options;
  options.isa = isa;
  options.threads = threads;
  std::vector<double> sums(3 * count);
  for (int step = 0; step < 3; ++step) {
    options.step = uint64_t(step);
    if (signstep_step(tensors.data(), int64_t(count), &options, c.options.sums ? sums.data() : nullptr)) std::abort();
  }
  Bytes out;
  const auto keep = [&](const void* from, size_t size) {
    const auto* bytes = static_cast<const unsigned char*>(from);
    out.insert(out.end(), bytes, bytes + size);
  };
  for (size_t i = 0; i < count; ++i) {
    keep(params[i].data(), params[i].size());
    keep(exp_avgs[i].data(), exp_avgs[i].size());
    keep(scales[i].data(), scales[i].size() * sizeof(float));
    keep(words[i].data(), words[i].size() * sizeof(uint64_t));
  }
  // Sums of approximations of erf, and of products that an instruction set may fuse, agree but for rounding.
  if (c.options.sums != SIGNSTEP_SUMS_OF_EXPECTED_SIGN) keep(sums.data(), sums.size() * sizeof(double));
  keep(mean_squares.data(), mean_squares.size() * sizeof(float));
  return out;
}

// The majority of so many ballots, ties by coins and marked, and votes with their sums in every dtype.
Bytes count_and_spread(int64_t rows, int isa, int threads) {
  std::mt19937_64 random(8);
  const std::vector<int64_t> sizes = {0, 1, 64, 65, 1000, 8192 + 63, 65536 + 4097};
  std::vector<signstep_slot> slots;
  int64_t width = 0;
  for (const int64_t size : sizes) {
    const int64_t ordinal = int64_t(slots.size());
    slots.push_back({width, size, ordinal * 37, ordinal, rows - (ordinal == 1 ? rows : ordinal % 2)});
    width += (size + 63) / 64;
  }
  // Rows that are not adjacent, the last of them ending with the block.
  const size_t words = size_t(width);
  std::vector<uint64_t> ballots(size_t(rows * width + (rows - 1) * 3)), majority(words), ties(words);
  for (uint64_t& word : ballots) word = random();
  signstep_options options = {};
  options.seed = 0xFEDCBA9876543210u;
  options.step = 5;
  options.isa = isa;
  options.threads = threads;
  Bytes out;
  const auto keep = [&out](const void* from, size_t size) {
    const auto* bytes = static_cast<const unsigned char*>(from);
    out.insert(out.end(), bytes, bytes + size);
  };
  for (uint64_t* const marks : {static_cast<uint64_t*>(nullptr), ties.data()}) {
    if (signstep_count(ballots.data(), rows, width + 3, slots.data(), int64_t(slots.size()), &options, majority.data(),
                       marks)) {
      std::abort();
    }
    keep(majority.data(), majority.size() * sizeof(uint64_t));
  }
  keep(ties.data(), ties.size() * sizeof(uint64_t));
  for (int dtype = SIGNSTEP_FLOAT32; dtype <= SIGNSTEP_FLOAT16; ++dtype) {
    std::vector<Bytes> tensors;
    std::vector<signstep_spread> outs;
    for (const signstep_slot& slot : slots) tensors.push_back(numbers(random, slot.size, dtype));
    for (size_t i = 0; i < slots.size(); ++i) {
      outs.push_back({slots[i].word, slots[i].size, int64_t(reinterpret_cast<uintptr_t>(tensors[i].data())), dtype});
    }
    std::vector<double> sums(2 * slots.size());
    for (double* const wanted : {sums.data(), static_cast<double*>(nullptr)}) {
      const uint64_t* marks = wanted == nullptr ? nullptr : ties.data();
      if (signstep_spread_votes(majority.data(), marks, outs.data(), int64_t(outs.size()), &options, wanted)) std::abort();
      for (const Bytes& tensor : tensors) keep(tensor.data(), tensor.size());
    }
    keep(sums.data(), sums.size() * sizeof(double));
  }
  return out;
}

// FNV-1a of the bytes of all cases, which machines of different kinds compare.
void mix(uint64_t& fingerprint, const Bytes& bytes) {
  for (const unsigned char byte : bytes) fingerprint = (fingerprint ^ byte) * 0x100000001B3u;
}

}  // namespace

// Arguments: how many of the dtypes, because threads do not depend on them; and n for every n-th case of a step, for a short
// run, where a prime n meets every dtype, state, direction and variant.
int main(int argc, char** argv) {
  std::vector<int> isas = {SIGNSTEP_PORTABLE};
  for (int isa = SIGNSTEP_AVX2; isa <= signstep_best_isa(); ++isa) isas.push_back(isa);
  int cases = 0, seen = 0;
  uint64_t fingerprint = 0xCBF29CE484222325u;
  const int dtypes = argc > 1 ? std::atoi(argv[1]) : SIGNSTEP_FLOAT16 + 1;
  const int stride = argc > 2 ? std::atoi(argv[2]) : 1;
  for (int dtype = SIGNSTEP_FLOAT32; dtype < dtypes; ++dtype) {
    for (int state : {-1, dtype, int(SIGNSTEP_FLOAT32), int(SIGNSTEP_BFLOAT16_STOCHASTIC), int(SIGNSTEP_INT8)}) {
      for (int direction = SIGNSTEP_SIGN; direction <= SIGNSTEP_EXPECTED; ++direction) {
        for (int variant = 0; variant < 12; ++variant) {
          const bool ballot = variant / 4 == 1 || variant == 10;
          if (ballot && (direction > SIGNSTEP_PRE || variant % 3 != 1)) continue;
          if (seen++ % stride != 0) continue;
          Case c{dtype, state, variant % 2 == 1, ballot, {}, {0, 1, 255, 257, 1031, 65536 + 257}};
          c.options.rate = 0.01;
          c.options.decay = variant % 4 == 2 ? 0.9 : 1;
          c.options.coupled_decay = variant % 4 == 3 ? 0.1 : 0;
          c.options.gradient_weight = variant % 4 == 3 ? 0.7 : 0.1;
          c.options.direction_weight = variant < 8 ? 0 : variant == 11 ? 0.6 : 0.2;
          c.options.sigma = 0.3;
          c.options.seed = 0xFEDCBA9876543210u;
          c.options.maximize = variant % 4 == 1;
          c.options.direction = direction;
          c.options.stochastic_params = variant / 2 % 2;
          c.options.law = (variant + direction) / 2 % 2;
          c.options.sums = ballot ? int(SIGNSTEP_NO_SUMS) : variant % 4;
          const Bytes first = run(c, isas[0], 1);
          mix(fingerprint, first);
          for (const int isa : isas) {
            for (const int threads : {1, 4}) {
              if (run(c, isa, threads) != first) {
                std::printf("dtype %d, state %d, direction %d, variant %d: instruction set %d with %d threads differs\n",
                            dtype, state, direction, variant, isa, threads);
                return 1;
              }
            }
          }
          ++cases;
        }
      }
    }
  }
  for (const int64_t rows : {1, 4, 7, 8, 9, 70}) {
    const Bytes first = count_and_spread(rows, isas[0], 1);
    mix(fingerprint, first);
    for (const int isa : isas) {
      for (const int threads : {1, 4}) {
        if (count_and_spread(rows, isa, threads) != first) {
          std::printf("%d ballots: instruction set %d with %d threads differs\n", int(rows), isa, threads);
          return 1;
        }
      }
    }
    ++cases;
  }
  // Two callers at once, as two optimizers in two Python threads.
  Case c{SIGNSTEP_FLOAT32, SIGNSTEP_FLOAT32, true, false, {}, {200000, 77}};
  c.options.rate = c.options.sigma = 0.1;
  c.options.decay = 1;
  c.options.gradient_weight = 0.1;
  c.options.direction = SIGNSTEP_PRE;
  std::thread other([&] { run(c, SIGNSTEP_BEST, 3); });
  run(c, SIGNSTEP_BEST, 3);
  other.join();
  std::printf("%d cases, %zu instruction sets: equal\nfingerprint %016llx\n", cases, isas.size(),
              static_cast<unsigned long long>(fingerprint));
}

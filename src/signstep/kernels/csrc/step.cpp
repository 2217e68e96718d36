// Picks the instruction set, cuts the tensors into chunks and gives them to threads.

#include <atomic>
#include <cmath>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

#include "chunk.h"

namespace signstep {
namespace {

// Work is handed out, and sums are formed, chunk by chunk: a constant, so that no result depends on the threads.
constexpr int64_t CHUNK = 256 * TILE;

struct Piece {
  const signstep_tensor* tensor;
  int64_t begin, end;
  float sigma;
  double sums[3];
};

struct Work {
  const signstep_options* options;
  Chunk* chunk;
  bool sums;
  std::vector<Piece> pieces;
  std::atomic<size_t> next{0};
};

void worker(void* data) {
  Work& work = *static_cast<Work*>(data);
  for (;;) {
    const size_t i = work.next.fetch_add(1, std::memory_order_relaxed);
    if (i >= work.pieces.size()) return;
    Piece& piece = work.pieces[i];
    const bool sums = work.sums || piece.tensor->mean_square != 0;
    work.chunk(*piece.tensor, *work.options, piece.begin, piece.end, piece.sigma, sums ? piece.sums : nullptr);
  }
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Threads that could not be had are done without: the caller works too.
void run(Work& work, int threads, void* parallel) {
  if (static_cast<size_t>(threads) > work.pieces.size()) threads = static_cast<int>(work.pieces.size());
  if (threads <= 1) return worker(&work);
  if (parallel != nullptr) {
    return reinterpret_cast<GompParallel>(parallel)(worker, &work, static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> team;
  try {
    for (int i = 1; i < threads; ++i) team.emplace_back(worker, &work);
  } catch (const std::exception&) {
  }
  worker(&work);
  for (std::thread& thread : team) thread.join();
}

Chunk* chunk_for(int isa) {
  switch (isa == SIGNSTEP_BEST ? signstep_best_isa() : isa) {
#if defined(SIGNSTEP_X86)
    case SIGNSTEP_AVX512: return avx512::chunk;
    case SIGNSTEP_AVX2: return avx2::chunk;
#endif
    default: return portable::chunk;
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

int signstep_step(const signstep_tensor* tensors, int64_t count, const signstep_options* options, double* sums) {
  try {
    Work work;
    work.options = options;
    work.chunk = chunk_for(options->isa);
    work.sums = sums != nullptr;
    for (int64_t i = 0; i < count; ++i) {
      const signstep_tensor& t = tensors[i];
      float sigma = static_cast<float>(options->sigma);
      if (t.mean_square != 0) sigma *= std::sqrt(*reinterpret_cast<const float*>(t.mean_square));
      for (int64_t begin = 0; begin < t.size; begin += CHUNK) {
        work.pieces.push_back({&t, begin, t.size - begin < CHUNK ? t.size : begin + CHUNK, sigma, {0, 0, 0}});
      }
    }
    run(work, options->threads, options->parallel);

    if (sums != nullptr) {
      for (int64_t i = 0; i < 3 * count; ++i) sums[i] = 0;
    }
    for (size_t i = 0; i < work.pieces.size();) {
      const signstep_tensor& t = *work.pieces[i].tensor;
      double total[3] = {0, 0, 0};
      for (; i < work.pieces.size() && work.pieces[i].tensor == &t; ++i) {
        for (int j = 0; j < 3; ++j) total[j] += work.pieces[i].sums[j];
      }
      if (sums != nullptr) {
        for (int j = 0; j < 3; ++j) sums[3 * (&t - tensors) + j] = total[j];
      }
      if (t.mean_square != 0) {
        *reinterpret_cast<float*>(t.mean_square) = static_cast<float>(total[2] / static_cast<double>(t.size));
      }
    }
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

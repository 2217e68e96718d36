// Work handed out to threads, those of torch's OpenMP pool or our own.
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

namespace signstep {

template <class F>
struct Work {
  const F& piece;
  size_t count;
  std::atomic<size_t> next{0};
};

template <class F>
void worker(void* data) {
  Work<F>& work = *static_cast<Work<F>*>(data);
  for (size_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.count;) work.piece(i);
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// piece(i) for i < count, in any order, on up to so many threads. Threads that could not be had are done without: the caller
// works too.
template <class F>
void parallel_for(size_t count, int threads, void* parallel, const F& piece) {
  Work<F> work{piece, count};
  if (static_cast<size_t>(threads) > count) threads = static_cast<int>(count);
  if (threads <= 1) return worker<F>(&work);
  if (parallel != nullptr) {
    return reinterpret_cast<GompParallel>(parallel)(worker<F>, &work, static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> team;
  try {
    for (int i = 1; i < threads; ++i) team.emplace_back(worker<F>, &work);
  } catch (const std::exception&) {
  }
  worker<F>(&work);
  for (std::thread& thread : team) thread.join();
}

}  // namespace signstep

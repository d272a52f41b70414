#include "threads.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <dirent.h>
#include <pthread.h>
#define SPECTRAL_HAVE_FORK 1
#endif

namespace spectral {
namespace {

std::atomic<bool> forked_with_threads{false};

#if defined(SPECTRAL_HAVE_FORK)
std::atomic<bool> parent_had_threads{false};

// Whether this process has more than one thread; true where that cannot be read. libgomp keeps one pool for everyone in
// the process (torch uses the same library), so our own parallel regions are not the only ones that count.
bool process_has_threads() {
  DIR* tasks = opendir("/proc/self/task");
  if (tasks == nullptr) return true;
  int entries = 0;
  while (entries < 4 && readdir(tasks) != nullptr) ++entries;  // ".", "..", and one per thread
  closedir(tasks);
  return entries > 3;
}

void before_fork() { parent_had_threads = process_has_threads(); }
void in_child() {
  if (parent_had_threads) forked_with_threads = true;
}

const int registered = pthread_atfork(before_fork, nullptr, in_child);
#endif

// Of one thread in one phase: how many of its tasks have been claimed. A cache line each.
struct alignas(64) Claimed {
  std::atomic<int64_t> tasks{0};
};

void run_serial(const std::vector<Phase>& phases) {
  for (const Phase& phase : phases)
    for (int64_t i = 0; i < phase.count; ++i) phase.task(i);
}

}  // namespace

bool threads_allowed() { return !forked_with_threads.load(); }

void run_phases(const std::vector<Phase>& phases, int threads) {
#if defined(_OPENMP)
  const bool divisible = std::any_of(phases.begin(), phases.end(), [](const Phase& phase) { return phase.count > 1; });
  if (threads > 1 && divisible && threads_allowed() && !omp_in_parallel()) {
    std::vector<Claimed> claimed(phases.size() * static_cast<size_t>(threads));
    std::exception_ptr failure;
    std::mutex failure_lock;
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(threads)
    {
      const int team = omp_get_num_threads(), self = omp_get_thread_num();  // a team may be smaller than asked for
      for (size_t p = 0; p < phases.size(); ++p) {
        if (p > 0) {
#pragma omp barrier
        }
        try {
          for (int k = 0; k < team; ++k) {
            const int owner = (self + k) % team;
            std::atomic<int64_t>& next = claimed[p * static_cast<size_t>(threads) + static_cast<size_t>(owner)].tasks;
            for (int64_t i = owner + team * next++; i < phases[p].count && !failed; i = owner + team * next++) phases[p].task(i);
          }
        } catch (...) {  // an exception must not leave a parallel region
          const std::lock_guard<std::mutex> hold(failure_lock);
          if (!failed.exchange(true)) failure = std::current_exception();
        }
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#else
  (void)threads;
#endif
  run_serial(phases);
}

}  // namespace spectral

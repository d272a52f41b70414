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

// The k-th task of a thread, of a team; -1: it has no more.
int64_t task_of(const Phase& phase, int team, int owner, int64_t k) {
  if (phase.shares == nullptr || phase.shares->threads != team) {
    const int64_t i = owner + team * k;
    return i < phase.count ? i : -1;
  }
  const int64_t i = phase.shares->begin[static_cast<size_t>(owner)] + k;
  return i < phase.shares->begin[static_cast<size_t>(owner) + 1] ? phase.shares->order[static_cast<size_t>(i)] : -1;
}

void run_serial(const std::vector<Phase>& phases) {
  for (const Phase& phase : phases)
    for (int64_t i = 0; i < phase.count; ++i) phase.task(i);
}

}  // namespace

Shares Shares::of_runs(const std::vector<int64_t>& starts, int threads) {
  std::vector<std::vector<int64_t>> own(static_cast<size_t>(threads));
  for (size_t run = 0; run + 1 < starts.size(); ++run) {
    const int64_t count = starts[run + 1] - starts[run];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = count < threads ? (static_cast<int64_t>(run) + i) % threads : i * threads / count;
      own[static_cast<size_t>(t)].push_back(starts[run] + i);
    }
  }
  Shares shares{threads, {}, {0}};
  for (const std::vector<int64_t>& tasks : own) {
    shares.order.insert(shares.order.end(), tasks.begin(), tasks.end());
    shares.begin.push_back(static_cast<int64_t>(shares.order.size()));
  }
  return shares;
}

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
            for (int64_t i; !failed && (i = task_of(phases[p], team, owner, next++)) >= 0;) phases[p].task(i);
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

// Parallel loops on OpenMP, safe in forked children.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

namespace spectral {

// Which of a loop's tasks each of `threads` threads has: order[begin[t]], ..., order[begin[t + 1] - 1].
struct Shares {
  int threads = 0;
  std::vector<int64_t> order, begin;

  // Of every run of tasks (run r is starts[r], ..., starts[r + 1] - 1) the first part to the first thread, and so on; runs
  // of fewer tasks than threads begin with another thread each.
  static Shares of_runs(const std::vector<int64_t>& starts, int threads);
};

// One loop of `count` independent tasks. A thread does its own in their order, then takes what others have left: the same
// task comes back to the same core, phase after phase and call after call, and finds its memory in that core's cache.
// Without shares thread t of T has tasks t, t + T, ... What a task computes must depend on its number alone, so that
// results do not depend on the number of threads.
struct Phase {
  int64_t count;
  std::function<void(int64_t)> task;
  const Shares* shares = nullptr;
};

// Runs the phases one after another, all threads waiting between them. With one thread, or in a child forked from a
// process that had threads (whose OpenMP pool did not survive the fork and would hang), no parallel region is opened.
void run_phases(const std::vector<Phase>& phases, int threads);

// False in a child forked from a process that had threads.
bool threads_allowed();

}  // namespace spectral

// Parallel loops on OpenMP, safe in forked children.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

namespace spectral {

// One loop of `count` independent tasks. Thread t of T does tasks t, t + T, ... in order, then takes what others have left:
// the same task comes back to the same core, phase after phase and call after call, and finds its memory in that core's
// cache. What a task computes must depend on its number alone, so that results do not depend on the number of threads.
struct Phase {
  int64_t count;
  std::function<void(int64_t)> task;
};

// Runs the phases one after another, all threads waiting between them. With one thread, or in a child forked from a
// process that had threads (whose OpenMP pool did not survive the fork and would hang), no parallel region is opened.
void run_phases(const std::vector<Phase>& phases, int threads);

// False in a child forked from a process that had threads.
bool threads_allowed();

}  // namespace spectral

// The blocks of conv.cu on the host, for tests: a block's threads one after the other between barriers, blocks one after
// the other in any order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "conv_block_step.h"
#include "conv_blocks.h"

namespace spectral {
namespace {

class HostBlock {
 public:
  template <class T>
  class PerThread {
   public:
    T& operator[](int thread) { return own_[static_cast<size_t>(thread)]; }

   private:
    std::vector<T> own_ = std::vector<T>(kBlockThreads);
  };

  HostBlock() { std::memset(static_cast<void*>(shared_.get()), 0xff, sizeof(BlockShared)); }
  BlockShared& shared() { return *shared_; }
  template <class Use>
  void each(Use use) {
    for (int thread = 0; thread < kBlockThreads; ++thread) use(thread);
  }
  template <class Use>
  double sum(Use use) {
    double own[kBlockThreads];
    each([&](int thread) { own[thread] = use(thread); });
    for (int half = kBlockThreads / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) own[i] += own[i + half];
    return own[0];
  }
  template <class Use>
  double largest(Use use) {
    double top = 0;
    each([&](int thread) {
      const double own = use(thread);
      if (!(own <= top)) top = std::isnan(top) ? top : own;
    });
    return top;
  }
  bool is_last(int32_t* counter, int count) {
    if (++*counter < count) return false;
    *counter = 0;
    return true;
  }
  template <class T>
  T* settled(T* p) const {
    return p;
  }
  template <class T>
  T fresh(const T* p) const {
    return *p;
  }

 private:
  // Whatever a launch finds there: a place that is read before it was written shows as NaN.
  std::unique_ptr<BlockShared> shared_ = std::make_unique<BlockShared>();
};

template <class Use>
void launch(int count, std::mt19937_64& random, Use use) {
  std::vector<int> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (const int index : order) {
    HostBlock block;
    use(block, index);
  }
}

}  // namespace

void conv_step_emulated(const BlockArguments& a, bool backward, uint64_t seed) {
  std::mt19937_64 random(seed);
  if (backward) {
    launch(a.gradient_count, random, [&](HostBlock& block, int index) { third_block(block, a, index); });
    return;
  }
  launch(a.first_count, random, [&](HostBlock& block, int index) { first_block(block, a, index); });
  launch(a.second_count, random, [&](HostBlock& block, int index) { second_block(block, a, index); });
  launch(a.gradient_count + a.write_count, random, [&](HostBlock& block, int index) { third_block(block, a, index); });
}

}  // namespace spectral

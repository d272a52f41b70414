// The table of conv operators as blocks of threads work through it: plain arrays in one piece of memory, which is uploaded.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "conv_block.h"
#include "conv_table.h"

namespace spectral {

class ConvBlocks {
 public:
  // multiprocessors: of the device; decides how finely the work is cut.
  ConvBlocks(const ConvTable& table, int multiprocessors);

  std::vector<char> bytes;   // to be uploaded
  size_t workspace_bytes;    // zeroed before the first launch
  // Arguments with pointers into what was uploaded to `base` and into `workspace`; the rest is the caller's.
  BlockArguments arguments(const char* base, char* workspace) const;

 private:
  struct Tables {
    std::vector<BlockPoint> points;
    std::vector<BlockPass> passes;
    std::vector<BlockUnit> first, second, gradient;
    std::vector<BlockPart> parts;
    std::vector<BlockWrite> writes;
  };
  size_t at_[7] = {};                                             // of each in `bytes`
  int64_t y_size_ = 0, z_size_ = 0, partial_size_ = 0, tiles_ = 0, joins_ = 0;
  int32_t counts_[5] = {};                                        // parts, units of first, second, gradient, writes
  std::vector<int8_t> weight_type_, gradient_type_;

  // terms_per_unit: of the first shape of tile
  void add_item(Tables& out, const ConvItem& item, int32_t id, int64_t terms_per_unit);
  static void start_longest_first(Tables& out);
};

#if defined(SPECTRAL_OPS_WITH_CUDA)
// All return a cudaError_t. The three launches of a step, or the last one alone.
int conv_step_cuda(const BlockArguments& arguments, bool backward, int device, void* stream);
int multiprocessors_cuda(int device, int* count);
#endif
// The same on the host, thread by thread, blocks in an order drawn from `seed`: what tests run where there is no device.
void conv_step_emulated(const BlockArguments& arguments, bool backward, uint64_t seed);

}  // namespace spectral

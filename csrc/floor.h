// The floor that benchmarks measure against: the fastest plain loop over the same memory an op has to move. It reads
// every `src` byte once, and reads and writes every `dst` byte once, leaving it as it was; it computes nothing.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace spectral {

// A piece of memory small enough that many of them balance over threads or blocks. Laid out as three int64, so that a
// table can come from, and go to the device as, an int64 tensor of shape (chunks, 3).
struct FloorChunk {
  int64_t address, bytes, write;
};

std::vector<FloorChunk> floor_chunks(const void* const* src, const size_t* src_bytes, size_t src_count, void* const* dst,
                                     const size_t* dst_bytes, size_t dst_count, size_t chunk_bytes);

// Returns a checksum of all bytes, whose only purpose is that the reads happen.
uint64_t floor_cpu(const void* const* src, const size_t* src_bytes, size_t src_count, void* const* dst,
                   const size_t* dst_bytes, size_t dst_count, int threads);

// For floor_cuda: what a block has in flight at once. On 132 SMs one bf16 read of ViT-L is then ~35 chunks a block, so
// that the last, partly filled round costs ~1.5 %.
constexpr size_t kCudaChunkBytes = 32 << 10;

#if defined(SPECTRAL_OPS_WITH_CUDA)
// All return a cudaError_t, 0 for success, and leave the current device as it was.

// One launch over `count` chunks. `chunks`, with addresses on the device, and `sink`, one word of scratch, lie there too.
int floor_cuda(const FloorChunk* chunks, int64_t count, uint32_t* sink, int device, void* stream);
// A plain device-to-device copy, by a kernel: its rate counts 2 * bytes.
int copy_cuda(void* dst, const void* src, size_t bytes, int device, void* stream);
// driver: the newest CUDA the driver serves, runtime: the one linked in, both as 1000 * major + 10 * minor. driver = 0
// where there is no driver; devices = 0 then, and also where it is asked for and fails.
int cuda_versions(int* driver, int* runtime, int* devices);
const char* cuda_error_text(int error);
#endif

}  // namespace spectral

#include "floor.h"

#include <atomic>

#include "kernels.h"
#include "threads.h"

namespace spectral {
namespace {

// Small enough to balance the last ones over the threads, large enough that claiming one (~50 ns) is nothing beside
// moving it (~10 us at 10-20 GB/s a thread).
constexpr size_t kChunkBytes = 128 << 10;

}  // namespace

std::vector<FloorChunk> floor_chunks(const void* const* src, const size_t* src_bytes, size_t src_count, void* const* dst,
                                     const size_t* dst_bytes, size_t dst_count, size_t chunk_bytes) {
  std::vector<FloorChunk> chunks;
  const auto cut = [&](const void* base, size_t bytes, bool write) {
    for (size_t at = 0; at < bytes; at += chunk_bytes) {
      const size_t length = bytes - at < chunk_bytes ? bytes - at : chunk_bytes;
      chunks.push_back({static_cast<int64_t>(reinterpret_cast<uintptr_t>(base) + at), static_cast<int64_t>(length), write});
    }
  };
  for (size_t i = 0; i < src_count; ++i) cut(src[i], src_bytes[i], false);
  for (size_t i = 0; i < dst_count; ++i) cut(dst[i], dst_bytes[i], true);
  return chunks;
}

uint64_t floor_cpu(const void* const* src, const size_t* src_bytes, size_t src_count, void* const* dst,
                   const size_t* dst_bytes, size_t dst_count, int threads) {
  static volatile uint32_t zero = 0;
  const uint32_t mask = zero;
  const std::vector<FloorChunk> chunks =
      floor_chunks(src, src_bytes, src_count, dst, dst_bytes, dst_count, kChunkBytes);
  std::atomic<uint64_t> sum{0};
  const auto move = [&](int64_t i) {
    const FloorChunk& chunk = chunks[static_cast<size_t>(i)];
    char* p = reinterpret_cast<char*>(static_cast<uintptr_t>(chunk.address));
    if (chunk.write)
      kernels().floor_rewrite(p, static_cast<size_t>(chunk.bytes), mask);
    else
      sum.fetch_add(kernels().floor_read(p, static_cast<size_t>(chunk.bytes)), std::memory_order_relaxed);
  };
  run_phases({{static_cast<int64_t>(chunks.size()), move}}, threads);
  return sum;
}

}  // namespace spectral

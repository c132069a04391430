// Memory in which the blocks of a product with split tiles signal each other.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "cuda/launch_context.h"

namespace bitnet_ext::cuda {

// Flags that blocks raise for each other (sm90_gemm.cu, norm_pair_backward.cu). They have to be zero before a
// launch and are zero after it, so they are zeroed once, when a slot is made. Launches of one stream follow
// each other and share a slot. A launch that is captured may later run beside anything, so it gets a slot of
// its own for good.
class FlagSlots {
 public:
  // Of at least `flags` flags. Null when a capture would need memory that was not allocated before it began.
  uint32_t* slot(const char* op, int32_t device, cudaStream_t stream, int64_t flags = kSlotFlags) {
    const int64_t slots = (flags + kSlotFlags - 1) / kSlotFlags;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check_status(op, cudaStreamIsCapturing(stream, &status));
    const bool captured = status != cudaStreamCaptureStatusNone;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!captured) {
      auto& mine = of_stream_[{device, stream}];
      if (mine.second < slots) mine = {take(op, device, slots, true), slots};
      return mine.first;
    }
    return take(op, device, slots, false);
  }

 private:
  static constexpr int64_t kSlotFlags = 1024;  // two for each of up to 512 blocks
  static constexpr int64_t kSlotsPerChunk = 4096;

  // Neighbouring slots.
  uint32_t* take(const char* op, int32_t device, int64_t slots, bool may_allocate) {
    auto& free = free_[device];
    if (free.second < slots) {
      if (!may_allocate || slots > kSlotsPerChunk) return nullptr;
      void* chunk = nullptr;
      const size_t bytes = sizeof(uint32_t) * kSlotFlags * kSlotsPerChunk;
      check_status(op, cudaMalloc(&chunk, bytes));
      check_status(op, cudaMemset(chunk, 0, bytes));
      check_status(op, cudaDeviceSynchronize());
      free = {static_cast<uint32_t*>(chunk), kSlotsPerChunk};
    }
    uint32_t* taken = free.first;
    free.first += slots * kSlotFlags;
    free.second -= slots;
    return taken;
  }

  std::mutex mutex_;
  std::map<std::pair<int32_t, cudaStream_t>, std::pair<uint32_t*, int64_t>> of_stream_;  // slots, how many
  std::map<int32_t, std::pair<uint32_t*, int64_t>> free_;  // of a device: next slot, how many are left
};

inline FlagSlots& flag_slots() {
  static FlagSlots slots;
  return slots;
}

}  // namespace bitnet_ext::cuda

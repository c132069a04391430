// fp32 products of few tokens with a tall matrix, as an output layer needs them: skinny_nt.cu, skinny_nn.cu
// and skinny_tn.cu for sm_80, sm90_skinny_*.cu for sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bitnet_ext::cuda {

constexpr int64_t kSkinnyMaxHidden = 256;                    // H of one launch
constexpr int64_t kSkinnyTokens = 128;                       // a block's share of T
constexpr int kSkinnyNnChunk = 32, kSm90SkinnyNnChunk = 64;  // of V, which nn splits

// Sizes: T tokens, H a multiple of 8, at most kSkinnyMaxHidden; V anything. All pointers 16-byte aligned,
// rows of hidden and weight contiguous. Rows of grad are `stride` apart, a multiple of 4, those of nt's out a
// multiple of 32, all of whose columns are written.
struct SkinnyArgs {
  const float* hidden;  // [T, H]; nn: not read
  const float* weight;  // [V, H]; tn: not read
  const float* grad;    // [T, V], nn and tn
  int64_t stride;       // of grad, or of out in nt
  int T, H, V;
  float* out;       // nt: [T, V]; nn: [T, H]; tn: [V, H]
  float* partials;  // nn: [num_splits, T, H]
  int num_splits;   // nn
  bool accumulate;  // tn: add to out
  bool dependent_launch;
};

// Shares of V, whole chunks, that fill the device once.
inline int skinny_nn_splits(const SkinnyArgs& args, int chunk, int num_sms) {
  const int tiles = ((args.H + 127) / 128) * static_cast<int>((args.T + kSkinnyTokens - 1) / kSkinnyTokens);
  const int chunks = (args.V + chunk - 1) / chunk;
  const int splits = tiles == 0 || num_sms < tiles ? 1 : num_sms / tiles;
  return splits < chunks ? splits : chunks;
}

// out = hidden * weight^T
cudaError_t launch_skinny_nt(const SkinnyArgs& args, int num_sms, cudaStream_t stream);
// out = grad * weight, by num_splits shares of V and their sum
cudaError_t launch_skinny_nn(const SkinnyArgs& args, cudaStream_t stream);
// out (+)= grad^T * hidden, by at most max_blocks blocks, each of which takes a multiprocessor for itself
cudaError_t launch_skinny_tn(const SkinnyArgs& args, int max_blocks, cudaStream_t stream);

cudaError_t launch_sm90_skinny_nt(const SkinnyArgs& args, int num_sms, cudaStream_t stream);
cudaError_t launch_sm90_skinny_nn(const SkinnyArgs& args, cudaStream_t stream);
cudaError_t launch_sm90_skinny_tn(const SkinnyArgs& args, int max_blocks, cudaStream_t stream);

// out = the sum of args.partials, in an order that depends on num_splits only
cudaError_t launch_skinny_sum(const SkinnyArgs& args, cudaStream_t stream);

}  // namespace bitnet_ext::cuda

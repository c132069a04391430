// Causal attention with rotary embedding over short sequences (T <= 128, T D <= 8192), forward.
//
//   q, k: rows of qkv [B, T, (Hq + 2 Hkv) D], rotated and rounded to its type
//   s_ij = q_i . k_j / sqrt(D),  j <= i
//   p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp s_ij,  out_i = sum_j p_ij v_j
//
// At 4 rows x 32 tokens x 4 heads x 64 all of it is 2 MFLOP and 0.5 MB, and what bounds it is the latency of
// one launch, one trip to memory and one pass through shared memory. So a head is cut into blocks of few
// queries, a warp owns a query, every load of a block is in flight before the first is used, and there is one
// barrier. Each block turns the keys it needs itself: 2.3 us in all (H200), about what a second launch costs.
//
// fp32 arithmetic, sums in a fixed order: equal inputs give equal bits. What lies beyond the causal mask is
// never touched: a NaN in a later token does not reach an earlier one.
#include "cuda/common/launch.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/short_attention.h"
#include "cuda/short_attention_rows.cuh"

namespace bitnet_ext::cuda {
namespace {

constexpr int kForwardThreads = 128;

// The largest of a warp's values by the order of their bits: sm_80 reduces integers in one instruction. A NaN
// may or may not be the largest; the sum that follows meets it either way.
__device__ __forceinline__ float warp_max(float v) {
  const int bits = __float_as_int(v);
  const int most = __reduce_max_sync(kFullWarp, bits >= 0 ? bits : bits ^ 0x7fffffff);
  return __int_as_float(most >= 0 ? most : most ^ 0x7fffffff);
}

// kKeys: keys a lane scores, ceil(T / 32).
template <typename scalar_t, int kDim, int kKeys>
__global__ void __launch_bounds__(kForwardThreads)
    short_attention_kernel(const ShortAttentionArgs args, int own_rows, float scale) {
  constexpr int kPer = kDim / 32, kWarps = kForwardThreads / 32;
  extern __shared__ __align__(16) float shared[];
  const int T = static_cast<int>(args.shape.T);
  const int heads = args.shape.num_heads, kv_heads = args.shape.num_kv_heads;
  const int64_t batch = blockIdx.x;  // no divisions: they would stand before the first load
  const int head = blockIdx.y, kv_head = heads == kv_heads ? head : head / (heads / kv_heads);
  const int first = static_cast<int>(blockIdx.z) * own_rows,
            end = min(first + own_rows, T);  // queries; they see the keys before `end`

  float* keys = shared;
  float* values = keys + T * kPitch<kDim>;
  float* queries = values + T * kPitch<kDim>;
  float* weights = queries + own_rows * kPitch<kDim>;

  const int pitch = (heads + 2 * kv_heads) * kDim;
  const scalar_t* tokens = static_cast<const scalar_t*>(args.qkv) + batch * (T * pitch);

  wait_for_previous_kernel();
  allow_next_kernel();
  load_rows<kForwardThreads, kInFlight<kForwardThreads, scalar_t>, kDim, false, scalar_t>(
      end + end - first, args.cos, args.sin, [&](int i) {
        const bool own = i >= end;
        const int position = own ? i - end + first : i;
        const scalar_t* token = tokens + position * pitch;
        Row<scalar_t> row;
        row.turned = token + (own ? head : heads + kv_head) * kDim;
        row.plain = own ? nullptr : token + (heads + kv_heads + kv_head) * kDim;
        row.out = nullptr;
        row.position = position;
        row.turned_to = own ? queries + (i - end) * kPitch<kDim> : keys + i * kPitch<kDim>;
        row.plain_to = values + i * kPitch<kDim>;
        row.dot_to = nullptr;
        return row;
      });
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* mine = weights + warp * (32 * kKeys);
  for (int i = first + warp; i < end; i += kWarps) {
    const float* query = queries + (i - first) * kPitch<kDim>;
    float score[kKeys];
    float most = -INFINITY;
#pragma unroll
    for (int m = 0; m < kKeys; ++m) {
      const int j = lane + 32 * m;
      score[m] = j <= i ? dot_rows<kDim>(query, keys + j * kPitch<kDim>) * scale : -INFINITY;
      most = m == 0 ? score[0] : fmaxf(most, score[m]);
    }
    most = warp_max(most);
    float sum = 0.0f;
#pragma unroll
    for (int m = 0; m < kKeys; ++m) {
      const int j = lane + 32 * m;
      const float weight = j <= i ? expf(score[m] - most) : 0.0f;
      mine[j] = weight;
      sum += weight;
    }
    __syncwarp();
    sum = warp_sum(sum);
    float sums[kPer] = {};
#pragma unroll 8
    for (int j = 0; j <= i; ++j) {
#pragma unroll
      for (int m = 0; m < kPer; ++m)
        sums[m] = fmaf(mine[j], values[j * kPitch<kDim> + lane + 32 * m], sums[m]);
    }
    const float inverse = 1.0f / sum;
    scalar_t* out = static_cast<scalar_t*>(args.out) + ((batch * T + i) * heads + head) * kDim;
#pragma unroll
    for (int m = 0; m < kPer; ++m) out[lane + 32 * m] = from_float<scalar_t>(sums[m] * inverse);
    if (lane == 0) args.lse[(batch * heads + head) * T + i] = most + logf(sum);
    __syncwarp();  // before the next row's weights
  }
}

}  // namespace

cudaError_t launch_short_attention(const ShortAttentionArgs& args, cudaStream_t stream) {
  const ShortAttentionShape& shape = args.shape;
  constexpr int kWarps = kForwardThreads / 32;
  return dispatch_dtype(shape.dtype, [&](auto tag) {
    return dispatch_shape(shape, [&](auto dim, auto keys) {
      using scalar_t = typename decltype(tag)::type;
      const auto kernel = short_attention_kernel<scalar_t, dim.value, keys.value>;
      const int own_rows = rows_of_block(shape, kWarps, shape.num_heads);
      if (shape.B == 0 || shape.T == 0) return cudaSuccess;
      if (shape.B > INT32_MAX) return cudaErrorInvalidConfiguration;
      const dim3 grid(static_cast<unsigned>(shape.B),
                      static_cast<unsigned>(shape.num_heads),
                      static_cast<unsigned>(ceil_div(shape.T, own_rows)));
      const size_t bytes =
          ((2 * shape.T + own_rows) * kPitch<dim.value> + kWarps * 32 * keys.value) * sizeof(float);
      const cudaError_t status = allow_shared(kernel, bytes);
      if (status != cudaSuccess) return status;
      return launch_kernel(kernel,
                           grid,
                           kForwardThreads,
                           bytes,
                           stream,
                           shape.dependent_launch,
                           args,
                           own_rows,
                           1.0f / sqrtf(static_cast<float>(dim.value)));
    });
  });
}

}  // namespace bitnet_ext::cuda

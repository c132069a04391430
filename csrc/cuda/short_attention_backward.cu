// Causal attention with rotary embedding over short sequences, backward (short_attention.cu has the forward).
//
//   p_ij = exp(s_ij - lse_i),  dS_ij = p_ij (g_i . v_j - delta_i) / sqrt(D),  g = grad_out
//   delta_i = sum_j p_ij g_i . v_j = g_i . out_i
//   dq_i = sum_j dS_ij k_j,  dk_j = sum_i dS_ij q_i,  dv_j = sum_i p_ij g_i,  dq and dk rotated back
//
// One grid with two kinds of blocks: the first own queries and write dq, the others own keys and write dk and
// dv, walking through the query heads of their group in order. No atomics: equal inputs give equal bits.
// Bound by latency, as the forward is, and built like it: a warp owns a row.
#include "cuda/common/launch.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/short_attention.h"
#include "cuda/short_attention_rows.cuh"

namespace bitnet_ext::cuda {
namespace {

constexpr int kBackwardThreads = 256;
constexpr int kWarps = kBackwardThreads / 32;
constexpr int kRowsPerWarp = kMaxOwnRows / kWarps;  // at most

// Beyond 32 tokens the loads take several rounds anyway, and two blocks have to fit a multiprocessor.
template <typename scalar_t, int kKeys>
constexpr int kBackwardInFlight = kKeys == 1 ? kInFlight<kBackwardThreads, scalar_t> : 1;

// A warp's gradient of a rotated row, column lane + 32 m in values[m], turned back and written.
template <int kDim, typename scalar_t>
__device__ __forceinline__ void store_turned_back(const float (&values)[kDim / 32],
                                                  const float* __restrict__ cos,
                                                  const float* __restrict__ sin,
                                                  int position,
                                                  scalar_t* to) {
  constexpr int kPer = kDim / 32;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kPer; ++m) {
    const int column = lane + 32 * m;
    const bool low = column < kDim / 2;
    const int angle = position * kDim + column % (kDim / 2) + kDim / 2;
    const float other = kPer == 1 ? __shfl_xor_sync(kFullWarp, values[m], 16) : values[(m + kPer / 2) % kPer];
    to[column] = from_float<scalar_t>(fmaf(other, low ? sin[angle] : -sin[angle], values[m] * cos[angle]));
  }
}

// dq of the queries [first, end) of one head.
template <typename scalar_t, int kDim, int kKeys>
__device__ __forceinline__ void backward_queries(const ShortAttentionBackwardArgs& args,
                                                 int64_t batch,
                                                 int head,
                                                 int first,
                                                 int own_rows,
                                                 float scale,
                                                 float* shared) {
  constexpr int kPer = kDim / 32, kBatch = kBackwardInFlight<scalar_t, kKeys>;
  const int T = static_cast<int>(args.shape.T);
  const int heads = args.shape.num_heads, kv_heads = args.shape.num_kv_heads;
  const int kv_head = heads == kv_heads ? head : head / (heads / kv_heads);
  const int end = min(first + own_rows, T);
  float* keys = shared;
  float* values = keys + T * kPitch<kDim>;
  float* queries = values + T * kPitch<kDim>;
  float* grads = queries + own_rows * kPitch<kDim>;
  float* weights = grads + own_rows * kPitch<kDim>;

  const int pitch = (heads + 2 * kv_heads) * kDim;
  const scalar_t* tokens = static_cast<const scalar_t*>(args.qkv) + batch * (T * pitch);
  const scalar_t* grad_tokens = static_cast<const scalar_t*>(args.grad_out) + batch * T * heads * kDim;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Fetched along with the rows, not when a warp comes to need it.
  const float* all_lse = args.lse + (batch * heads + head) * T;
  float lse[kRowsPerWarp];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) lse[r] = all_lse[min(first + warp + r * kWarps, T - 1)];
  load_rows<kBackwardThreads, kBatch, kDim, false, scalar_t>(
      end + end - first, args.cos, args.sin, [&](int i) {
        const bool own = i >= end;
        const int position = own ? i - end + first : i;
        const scalar_t* token = tokens + position * pitch;
        Row<scalar_t> row;
        row.turned = token + (own ? head : heads + kv_head) * kDim;
        row.plain = own ? grad_tokens + (position * heads + head) * kDim
                        : token + (heads + kv_heads + kv_head) * kDim;
        row.out = nullptr;
        row.position = position;
        row.turned_to = (own ? queries + (i - end) * kPitch<kDim> : keys + i * kPitch<kDim>);
        row.plain_to = (own ? grads + (i - end) * kPitch<kDim> : values + i * kPitch<kDim>);
        row.dot_to = nullptr;
        return row;
      });
  __syncthreads();

  float* mine = weights + warp * (32 * kKeys);
  scalar_t* to = static_cast<scalar_t*>(args.grad_qkv) + batch * (T * pitch) + head * kDim;
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const int i = first + warp + r * kWarps;
    if (i >= end) break;
    const float* query = queries + (i - first) * kPitch<kDim>;
    const float* grad = grads + (i - first) * kPitch<kDim>;
    float p[kKeys], dp[kKeys];
    float delta = 0.0f;
#pragma unroll
    for (int m = 0; m < kKeys; ++m) {
      const int j = lane + 32 * m;
      p[m] = dp[m] = 0.0f;
      if (j <= i) {
        p[m] = expf(dot_rows<kDim>(query, keys + j * kPitch<kDim>) * scale - lse[r]);
        dp[m] = dot_rows<kDim>(grad, values + j * kPitch<kDim>);
      }
      delta = fmaf(p[m], dp[m], delta);
    }
    delta = warp_sum(delta);
#pragma unroll
    for (int m = 0; m < kKeys; ++m) mine[lane + 32 * m] = p[m] * (dp[m] - delta) * scale;
    __syncwarp();
    float sums[kPer] = {};
#pragma unroll 8
    for (int j = 0; j <= i; ++j) {
#pragma unroll
      for (int m = 0; m < kPer; ++m) sums[m] = fmaf(mine[j], keys[j * kPitch<kDim> + lane + 32 * m], sums[m]);
    }
    store_turned_back<kDim>(sums, args.cos, args.sin, i, to + i * pitch);
    __syncwarp();
  }
}

// dk and dv of the keys [first, end) of one key head.
template <typename scalar_t, int kDim, int kKeys>
__device__ __forceinline__ void backward_keys(const ShortAttentionBackwardArgs& args,
                                              int64_t batch,
                                              int kv_head,
                                              int first,
                                              int own_rows,
                                              float scale,
                                              float* shared) {
  constexpr int kPer = kDim / 32, kBatch = kBackwardInFlight<scalar_t, kKeys>;
  const int T = static_cast<int>(args.shape.T);
  const int heads = args.shape.num_heads, kv_heads = args.shape.num_kv_heads;
  const int group = heads / kv_heads;
  const int end = min(first + own_rows, T), own = end - first;
  const int seen_by = T - first;  // queries that see the first key
  float* queries = shared;        // row i is query first + i
  float* grads = queries + T * kPitch<kDim>;
  float* keys = grads + T * kPitch<kDim>;
  float* values = keys + own_rows * kPitch<kDim>;
  float* weights = values + own_rows * kPitch<kDim>;
  float* delta = weights + kWarps * (2 * 32 * kKeys);

  const int pitch = (heads + 2 * kv_heads) * kDim;
  const scalar_t* tokens = static_cast<const scalar_t*>(args.qkv) + batch * (T * pitch);
  const scalar_t* out = static_cast<const scalar_t*>(args.out) + batch * (T * heads * kDim);
  const scalar_t* grad_out = static_cast<const scalar_t*>(args.grad_out) + batch * (T * heads * kDim);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float2* mine = reinterpret_cast<float2*>(weights) + warp * (32 * kKeys);  // (p, dS)
  float dk[kRowsPerWarp][kPer] = {}, dv[kRowsPerWarp][kPer] = {};

  for (int member = 0; member < group; ++member) {
    const int head = kv_head * group + member;
    const float* all_lse = args.lse + (batch * heads + head) * T + first;
    float lse[kKeys];
#pragma unroll
    for (int m = 0; m < kKeys; ++m) lse[m] = all_lse[min(lane + 32 * m, seen_by - 1)];
    if (member > 0) __syncthreads();  // everyone is done with the last head's rows
    load_rows<kBackwardThreads, kBatch, kDim, true, scalar_t>(
        seen_by + (member == 0 ? own : 0), args.cos, args.sin, [&](int i) {
          const bool is_key = i >= seen_by;
          const int position = first + (is_key ? i - seen_by : i);
          const scalar_t* token = tokens + position * pitch;
          const int out_row = (position * heads + head) * kDim;
          Row<scalar_t> row;
          row.turned = token + (is_key ? heads + kv_head : head) * kDim;
          row.plain = is_key ? token + (heads + kv_heads + kv_head) * kDim : grad_out + out_row;
          row.out = is_key ? nullptr : out + out_row;
          row.position = position;
          row.turned_to = (is_key ? keys + (i - seen_by) * kPitch<kDim> : queries + i * kPitch<kDim>);
          row.plain_to = (is_key ? values + (i - seen_by) * kPitch<kDim> : grads + i * kPitch<kDim>);
          row.dot_to = delta + i;
          return row;
        });
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const int key = warp + r * kWarps;  // of the block's own
      if (key >= own) continue;
#pragma unroll
      for (int m = 0; m < kKeys; ++m) {
        const int i = lane + 32 * m;
        float2 weight = {0.0f, 0.0f};
        if (i >= key && i < seen_by) {
          const float s = dot_rows<kDim>(keys + key * kPitch<kDim>, queries + i * kPitch<kDim>);
          const float dp = dot_rows<kDim>(values + key * kPitch<kDim>, grads + i * kPitch<kDim>);
          weight.x = expf(s * scale - lse[m]);
          weight.y = weight.x * (dp - delta[i]) * scale;
        }
        mine[i] = weight;
      }
      __syncwarp();
#pragma unroll 4
      for (int i = key; i < seen_by; ++i) {
        const float2 weight = mine[i];
#pragma unroll
        for (int m = 0; m < kPer; ++m) {
          dk[r][m] = fmaf(weight.y, queries[i * kPitch<kDim> + lane + 32 * m], dk[r][m]);
          dv[r][m] = fmaf(weight.x, grads[i * kPitch<kDim> + lane + 32 * m], dv[r][m]);
        }
      }
      __syncwarp();
    }
  }

  scalar_t* to = static_cast<scalar_t*>(args.grad_qkv) + batch * (T * pitch) + (heads + kv_head) * kDim;
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const int key = warp + r * kWarps;
    if (key >= own) continue;
    scalar_t* row = to + (first + key) * pitch;
    store_turned_back<kDim>(dk[r], args.cos, args.sin, first + key, row);
#pragma unroll
    for (int m = 0; m < kPer; ++m) row[kv_heads * kDim + lane + 32 * m] = from_float<scalar_t>(dv[r][m]);
  }
}

template <typename scalar_t, int kDim, int kKeys>
__global__ void __launch_bounds__(kBackwardThreads, kDim == 32 ? 1 : 2)
    short_attention_backward_kernel(const ShortAttentionBackwardArgs args, int own_rows, float scale) {
  extern __shared__ __align__(16) float shared[];
  wait_for_previous_kernel();
  allow_next_kernel();
  const int heads = args.shape.num_heads, head = static_cast<int>(blockIdx.y);
  const int first = static_cast<int>(blockIdx.z) * own_rows;
  if (head < heads) {
    backward_queries<scalar_t, kDim, kKeys>(args, blockIdx.x, head, first, own_rows, scale, shared);
  } else {
    backward_keys<scalar_t, kDim, kKeys>(args, blockIdx.x, head - heads, first, own_rows, scale, shared);
  }
}

}  // namespace

cudaError_t launch_short_attention_backward(const ShortAttentionBackwardArgs& args, cudaStream_t stream) {
  const ShortAttentionShape& shape = args.shape;
  return dispatch_dtype(shape.dtype, [&](auto tag) {
    return dispatch_shape(shape, [&](auto dim, auto keys) {
      using scalar_t = typename decltype(tag)::type;
      const auto kernel = short_attention_backward_kernel<scalar_t, dim.value, keys.value>;
      const int own_rows = rows_of_block(shape, kWarps, shape.num_heads + shape.num_kv_heads);
      if (shape.B == 0 || shape.T == 0) return cudaSuccess;
      if (shape.B > INT32_MAX) return cudaErrorInvalidConfiguration;
      const dim3 grid(static_cast<unsigned>(shape.B),
                      static_cast<unsigned>(shape.num_heads + shape.num_kv_heads),
                      static_cast<unsigned>(ceil_div(shape.T, own_rows)));
      const size_t bytes =
          ((2 * shape.T + 2 * own_rows) * kPitch<dim.value> + kWarps * 2 * 32 * keys.value + shape.T) *
          sizeof(float);
      const cudaError_t status = allow_shared(kernel, bytes);
      if (status != cudaSuccess) return status;
      return launch_kernel(kernel,
                           grid,
                           kBackwardThreads,
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

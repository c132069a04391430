// Causal attention with rotary embedding over short sequences (T <= 128, T D <= 8192).
//
//   q, k: rows of qkv [B, T, (Hq + 2 Hkv) D], rotated and rounded to its type;  s_ij = q_i . k_j / sqrt(D), j
//   <= i p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp s_ij,  out_i = sum_j p_ij v_j dS_ij = p_ij (g_i .
//   v_j - delta_i) / sqrt(D),  delta_i = sum_j p_ij g_i . v_j = g_i . out_i,  g = grad_out dq_i = sum_j dS_ij
//   k_j,  dk_j = sum_i dS_ij q_i,  dv_j = sum_i p_ij g_i,  dq and dk rotated back
//
// At 4 rows x 32 tokens x 4 heads x 64 all of it is 3 MFLOP and 0.6 MB: what bounds it is the latency of one
// launch, one trip to memory and one pass through shared memory. So a head is cut into blocks of few rows, a
// warp owns a row, every load of a block is in flight before the first is used, and there is one barrier.
// Each block turns the keys it needs again, which costs less than a second kernel.
//
// Backward, one grid with two kinds of blocks: the first own queries and write dq, the others own keys and
// write dk and dv, walking through the query heads of their group in order. No atomics: equal inputs give
// equal bits. fp32 arithmetic. What lies beyond the causal mask is never touched: a NaN in a later token does
// not reach an earlier one.
#include "cuda/common/dispatch.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/dependent_launch.cuh"
#include "cuda/short_attention.h"

namespace bitnet_ext::cuda {
namespace {

constexpr int kForwardThreads = 128;
constexpr int kBackwardThreads = 256;
constexpr int kMaxOwnRows = 16;  // of a block

// Distance of rows in shared memory, in floats: 16-byte reads of the same columns by 8 neighbouring rows hit
// 32 different banks.
template <int kDim>
constexpr int kPitch = kDim + 4;

// Parts of rows that a thread has in flight: the whole of a block's rows at T = 32, D = 64.
template <int kThreads, typename scalar_t>
constexpr int kInFlight =
    static_cast<int>(ceil_div((32 + kThreads / 32) * 32 * static_cast<int>(sizeof(scalar_t)) / 16, kThreads));

// A row to be loaded. `turned` is rotated by its position, `plain` copied; `out`, if not null, is multiplied
// with `plain`.
template <typename scalar_t>
struct Row {
  const scalar_t *turned, *plain, *out;  // null: not there
  int position;
  float *turned_to, *plain_to, *dot_to;
};

// Loads `count` rows, row i being row_of(i), by all threads; no barrier. A thread holds the two parts of a
// row that rotate into each other.
template <int kThreads, int kDim, bool kDot, typename scalar_t, typename RowOf>
__device__ __forceinline__ void load_rows(int count,
                                          const float* __restrict__ cos,
                                          const float* __restrict__ sin,
                                          const RowOf& row_of) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(scalar_t));
  constexpr int kUnits = kDim / 2 / kVec;  // threads of a row, a power of two
  constexpr int kBatch = kInFlight<kThreads, scalar_t>;
  const int total = count * kUnits;
#pragma unroll 1
  for (int base = 0; base < total; base += kThreads * kBatch) {
    float a[kBatch][2][kVec], b[kBatch][2][kVec], c[kBatch][kVec], s[kBatch][kVec],
        o[kDot ? kBatch : 1][2][kVec];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int unit = base + n * kThreads + static_cast<int>(threadIdx.x);
      if (unit >= total) continue;
      const Row<scalar_t> row = row_of(unit / kUnits);
      const int i = unit % kUnits * kVec;
      const int64_t angle = static_cast<int64_t>(row.position) * kDim + kDim / 2 + i;
      load_floats(cos + angle, kVec, true, c[n]);
      load_floats(sin + angle, kVec, true, s[n]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load_floats(row.turned + i + half * (kDim / 2), kVec, true, a[n][half]);
        if (row.plain != nullptr) load_floats(row.plain + i + half * (kDim / 2), kVec, true, b[n][half]);
        if constexpr (kDot) {
          if (row.out != nullptr) load_floats(row.out + i + half * (kDim / 2), kVec, true, o[n][half]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int unit = base + n * kThreads + static_cast<int>(threadIdx.x);
      const bool valid = unit < total;
      const Row<scalar_t> row = row_of(valid ? unit / kUnits : 0);
      const int i = unit % kUnits * kVec;
      float dot = 0.0f;
      if (valid) {
        float low[kVec], high[kVec];
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          low[e] = to_float(from_float<scalar_t>(fmaf(-a[n][1][e], s[n][e], a[n][0][e] * c[n][e])));
          high[e] = to_float(from_float<scalar_t>(fmaf(a[n][0][e], s[n][e], a[n][1][e] * c[n][e])));
        }
        store_floats(row.turned_to + i, kVec, true, low);
        store_floats(row.turned_to + i + kDim / 2, kVec, true, high);
        if (row.plain != nullptr) {
          store_floats(row.plain_to + i, kVec, true, b[n][0]);
          store_floats(row.plain_to + i + kDim / 2, kVec, true, b[n][1]);
        }
        if constexpr (kDot) {
          if (row.out != nullptr) {
#pragma unroll
            for (int e = 0; e < kVec; ++e)
              dot = fmaf(b[n][0][e], o[n][0][e], fmaf(b[n][1][e], o[n][1][e], dot));
          }
        }
      }
      if constexpr (kDot) {
#pragma unroll
        for (int offset = kUnits / 2; offset > 0; offset >>= 1)
          dot += __shfl_xor_sync(kFullWarp, dot, offset);
        if (valid && row.out != nullptr && i == 0) *row.dot_to = dot;
      }
    }
  }
}

// x . y of two rows in shared memory.
template <int kDim>
__device__ __forceinline__ float dot_rows(const float* x, const float* y) {
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < kDim; i += 4) {
    const float4 u = *reinterpret_cast<const float4*>(x + i), v = *reinterpret_cast<const float4*>(y + i);
    sums[0] = fmaf(u.x, v.x, sums[0]);
    sums[1] = fmaf(u.y, v.y, sums[1]);
    sums[2] = fmaf(u.z, v.z, sums[2]);
    sums[3] = fmaf(u.w, v.w, sums[3]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

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
    const int64_t angle = static_cast<int64_t>(position) * kDim + column % (kDim / 2) + kDim / 2;
    const float other = kPer == 1 ? __shfl_xor_sync(kFullWarp, values[m], 16) : values[(m + kPer / 2) % kPer];
    to[column] = from_float<scalar_t>(fmaf(other, low ? sin[angle] : -sin[angle], values[m] * cos[angle]));
  }
}

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
    short_attention_kernel(const ShortAttentionArgs args, int own_rows, int chunks, float scale) {
  constexpr int kPer = kDim / 32, kWarps = kForwardThreads / 32;
  extern __shared__ __align__(16) float shared[];
  const int T = static_cast<int>(args.shape.T);
  const int heads = args.shape.num_heads, kv_heads = args.shape.num_kv_heads;
  const int chunk = static_cast<int>(blockIdx.x) % chunks;
  const int head = static_cast<int>(blockIdx.x) / chunks % heads;
  const int64_t batch = static_cast<int>(blockIdx.x) / chunks / heads;
  const int kv_head = head / (heads / kv_heads);
  const int first = chunk * own_rows,
            end = min(first + own_rows, T);  // queries; they see the keys before `end`

  float* keys = shared;
  float* values = keys + T * kPitch<kDim>;
  float* queries = values + T * kPitch<kDim>;
  float* weights = queries + own_rows * kPitch<kDim>;

  const int64_t pitch = static_cast<int64_t>(heads + 2 * kv_heads) * kDim;
  const scalar_t* tokens = static_cast<const scalar_t*>(args.qkv) + batch * T * pitch;

  wait_for_previous_kernel();
  allow_next_kernel();
  load_rows<kForwardThreads, kDim, false, scalar_t>(end + end - first, args.cos, args.sin, [&](int i) {
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

// dq of the queries [first, end) of one head.
template <typename scalar_t, int kDim, int kKeys>
__device__ __forceinline__ void backward_queries(const ShortAttentionBackwardArgs& args,
                                                 int64_t batch,
                                                 int head,
                                                 int first,
                                                 int own_rows,
                                                 float scale,
                                                 float* shared) {
  constexpr int kPer = kDim / 32, kWarps = kBackwardThreads / 32;
  const int T = static_cast<int>(args.shape.T);
  const int heads = args.shape.num_heads, kv_heads = args.shape.num_kv_heads;
  const int kv_head = head / (heads / kv_heads);
  const int end = min(first + own_rows, T);
  float* keys = shared;
  float* values = keys + T * kPitch<kDim>;
  float* queries = values + T * kPitch<kDim>;
  float* grads = queries + own_rows * kPitch<kDim>;
  float* weights = grads + own_rows * kPitch<kDim>;

  const int64_t pitch = static_cast<int64_t>(heads + 2 * kv_heads) * kDim;
  const scalar_t* tokens = static_cast<const scalar_t*>(args.qkv) + batch * T * pitch;
  const scalar_t* grad_tokens = static_cast<const scalar_t*>(args.grad_out) + batch * T * heads * kDim;
  load_rows<kBackwardThreads, kDim, false, scalar_t>(end + end - first, args.cos, args.sin, [&](int i) {
    const bool own = i >= end;
    const int position = own ? i - end + first : i;
    const scalar_t* token = tokens + position * pitch;
    Row<scalar_t> row;
    row.turned = token + (own ? head : heads + kv_head) * kDim;
    row.plain = own ? grad_tokens + (static_cast<int64_t>(position) * heads + head) * kDim
                    : token + (heads + kv_heads + kv_head) * kDim;
    row.out = nullptr;
    row.position = position;
    row.turned_to = (own ? queries + (i - end) * kPitch<kDim> : keys + i * kPitch<kDim>);
    row.plain_to = (own ? grads + (i - end) * kPitch<kDim> : values + i * kPitch<kDim>);
    row.dot_to = nullptr;
    return row;
  });
  __syncthreads();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* mine = weights + warp * (32 * kKeys);
  scalar_t* to = static_cast<scalar_t*>(args.grad_qkv) + batch * T * pitch + head * kDim;
  for (int i = first + warp; i < end; i += kWarps) {
    const float* query = queries + (i - first) * kPitch<kDim>;
    const float* grad = grads + (i - first) * kPitch<kDim>;
    const float lse = args.lse[(batch * heads + head) * T + i];
    float p[kKeys], dp[kKeys];
    float delta = 0.0f;
#pragma unroll
    for (int m = 0; m < kKeys; ++m) {
      const int j = lane + 32 * m;
      p[m] = dp[m] = 0.0f;
      if (j <= i) {
        p[m] = expf(dot_rows<kDim>(query, keys + j * kPitch<kDim>) * scale - lse);
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
  constexpr int kPer = kDim / 32, kWarps = kBackwardThreads / 32;
  constexpr int kRowsPerWarp = kMaxOwnRows / kWarps;
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

  const int64_t pitch = static_cast<int64_t>(heads + 2 * kv_heads) * kDim;
  const scalar_t* tokens = static_cast<const scalar_t*>(args.qkv) + batch * T * pitch;
  const int64_t out_tokens = batch * T * heads * kDim;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float2* mine = reinterpret_cast<float2*>(weights) + warp * (32 * kKeys);  // (p, dS)
  float dk[kRowsPerWarp][kPer] = {}, dv[kRowsPerWarp][kPer] = {};

  for (int member = 0; member < group; ++member) {
    const int head = kv_head * group + member;
    if (member > 0) __syncthreads();  // everyone is done with the last head's rows
    load_rows<kBackwardThreads, kDim, true, scalar_t>(
        seen_by + (member == 0 ? own : 0), args.cos, args.sin, [&](int i) {
          const bool is_key = i >= seen_by;
          const int position = first + (is_key ? i - seen_by : i);
          const scalar_t* token = tokens + position * pitch;
          const int64_t out_row = out_tokens + (static_cast<int64_t>(position) * heads + head) * kDim;
          Row<scalar_t> row;
          row.turned = token + (is_key ? heads + kv_head : head) * kDim;
          row.plain = is_key ? token + (heads + kv_heads + kv_head) * kDim
                             : static_cast<const scalar_t*>(args.grad_out) + out_row;
          row.out = is_key ? nullptr : static_cast<const scalar_t*>(args.out) + out_row;
          row.position = position;
          row.turned_to = (is_key ? keys + (i - seen_by) * kPitch<kDim> : queries + i * kPitch<kDim>);
          row.plain_to = (is_key ? values + (i - seen_by) * kPitch<kDim> : grads + i * kPitch<kDim>);
          row.dot_to = delta + i;
          return row;
        });
    __syncthreads();
    const float* lse = args.lse + (batch * heads + head) * T + first;
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
          weight.x = expf(s * scale - lse[i]);
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

  scalar_t* to = static_cast<scalar_t*>(args.grad_qkv) + batch * T * pitch + (heads + kv_head) * kDim;
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
__global__ void __launch_bounds__(kBackwardThreads, 1) short_attention_backward_kernel(
    const ShortAttentionBackwardArgs args, int own_rows, int chunks, int query_blocks, float scale) {
  extern __shared__ __align__(16) float shared[];
  wait_for_previous_kernel();
  allow_next_kernel();
  const int block = static_cast<int>(blockIdx.x);
  if (block < query_blocks) {
    const int heads = args.shape.num_heads;
    backward_queries<scalar_t, kDim, kKeys>(args,
                                            block / chunks / heads,
                                            block / chunks % heads,
                                            block % chunks * own_rows,
                                            own_rows,
                                            scale,
                                            shared);
  } else {
    const int index = block - query_blocks, kv_heads = args.shape.num_kv_heads;
    backward_keys<scalar_t, kDim, kKeys>(args,
                                         index / chunks / kv_heads,
                                         index / chunks % kv_heads,
                                         index % chunks * own_rows,
                                         own_rows,
                                         scale,
                                         shared);
  }
}

template <int N>
struct Int {
  static constexpr int value = N;
};

// Calls body(Int<head_dim>, Int<ceil(T / 32)>) for a shape that fits.
template <typename Body>
cudaError_t dispatch_shape(const ShortAttentionShape& shape, Body&& body) {
  if (!short_attention_fits(shape.T, shape.head_dim)) return cudaErrorInvalidValue;
  const auto with_dim = [&](auto dim) {
    if (shape.T <= 32) return body(dim, Int<1>{});
    if (shape.T <= 64) return body(dim, Int<2>{});
    if constexpr (dim.value <= 64) return body(dim, Int<4>{});
    return cudaErrorInvalidValue;
  };
  if (shape.head_dim == 32) return with_dim(Int<32>{});
  if (shape.head_dim == 64) return with_dim(Int<64>{});
  return with_dim(Int<128>{});
}

// Rows a block owns: one a warp while the device has room for the blocks, so that a small call spreads over
// all of it; else 16, so that the rows a block loads serve more of them.
int rows_of_block(const ShortAttentionShape& shape, int warps, int64_t heads) {
  const int64_t blocks = shape.B * heads * ceil_div(shape.T, warps);
  return blocks <= 2 * shape.num_sms ? warps : kMaxOwnRows;
}

template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
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
      const int chunks = static_cast<int>(ceil_div(shape.T, own_rows));
      const int64_t blocks = shape.B * shape.num_heads * chunks;
      if (blocks == 0) return cudaSuccess;
      if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
      const size_t bytes =
          ((2 * shape.T + own_rows) * kPitch<dim.value> + kWarps * 32 * keys.value) * sizeof(float);
      const cudaError_t status = allow_shared(kernel, bytes);
      if (status != cudaSuccess) return status;
      return launch_kernel(kernel,
                           static_cast<unsigned>(blocks),
                           kForwardThreads,
                           bytes,
                           stream,
                           shape.dependent_launch,
                           args,
                           own_rows,
                           chunks,
                           1.0f / sqrtf(static_cast<float>(dim.value)));
    });
  });
}

cudaError_t launch_short_attention_backward(const ShortAttentionBackwardArgs& args, cudaStream_t stream) {
  const ShortAttentionShape& shape = args.shape;
  constexpr int kWarps = kBackwardThreads / 32;
  return dispatch_dtype(shape.dtype, [&](auto tag) {
    return dispatch_shape(shape, [&](auto dim, auto keys) {
      using scalar_t = typename decltype(tag)::type;
      const auto kernel = short_attention_backward_kernel<scalar_t, dim.value, keys.value>;
      const int own_rows = rows_of_block(shape, kWarps, shape.num_heads + shape.num_kv_heads);
      const int chunks = static_cast<int>(ceil_div(shape.T, own_rows));
      const int64_t query_blocks = shape.B * shape.num_heads * chunks;
      const int64_t blocks = query_blocks + shape.B * shape.num_kv_heads * chunks;
      if (blocks == 0) return cudaSuccess;
      if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
      const size_t bytes =
          ((2 * shape.T + 2 * own_rows) * kPitch<dim.value> + kWarps * 2 * 32 * keys.value + shape.T) *
          sizeof(float);
      const cudaError_t status = allow_shared(kernel, bytes);
      if (status != cudaSuccess) return status;
      return launch_kernel(kernel,
                           static_cast<unsigned>(blocks),
                           kBackwardThreads,
                           bytes,
                           stream,
                           shape.dependent_launch,
                           args,
                           own_rows,
                           chunks,
                           static_cast<int>(query_blocks),
                           1.0f / sqrtf(static_cast<float>(dim.value)));
    });
  });
}

}  // namespace bitnet_ext::cuda

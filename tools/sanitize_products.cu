// Launches every product kernel with every tile, split, weight kind, scale layout and output type on buffers
// of exact size, for compute-sanitizer. No PyTorch, so that its tools need seconds and not hours.
//
//   nvcc -std=c++17 -O2 --expt-relaxed-constexpr -Icsrc -DBITNET_EXT_SM90A -gencode
//   arch=compute_90a,code=sm_90a
//        -o sanitize_products tools/sanitize_products.cu csrc/cuda/{gemv,decode,sm80_gemm,sm90_gemm}.cu
//   compute-sanitizer --tool memcheck ./sanitize_products      (initcheck, racecheck, synccheck)
//
// An argument n takes only every n-th case. Results are not looked at: python_tests/test_products.py does
// that.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/decode.h"
#include "cuda/gemv.h"
#include "cuda/heuristics.h"
#include "cuda/sm80_gemm.h"
#include "cuda/sm90_gemm.h"

namespace {

using namespace bitnet_ext;
using namespace bitnet_ext::cuda;

constexpr int kSms = 132;
constexpr size_t kSharedLimit = 227 * 1024;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// Memory of exactly `bytes` bytes, filled, as every operand has to be: initcheck would tell otherwise.
class Buffer {
 public:
  Buffer(size_t bytes, int fill) {
    check(cudaMalloc(&data_, bytes), "cudaMalloc");
    if (fill >= 0) check(cudaMemset(data_, fill, bytes), "cudaMemset");
  }
  ~Buffer() {
    cudaFree(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

struct Shape {
  int64_t M, N, K;
};

constexpr Shape kShapes[] = {{1, 17, 100},
                             {1, 2560, 2560},
                             {1, 300, 6912},
                             {3, 37, 257},
                             {8, 160, 640},
                             {16, 333, 2560},
                             {9, 2563, 1030},
                             {17, 37, 272},
                             {40, 300, 1024},
                             {100, 129, 640},
                             {130, 513, 2560},
                             {257, 520, 144},
                             {64, 4096, 1024},
                             {700, 2100, 1024},
                             {300, 2560, 512}};

int launch_sm90(ProductArgs args) {
  int launches = 0;
  if (!sm90_is_compiled() || !sm90_can_read(args)) return launches;
  const int64_t stages = divide_up(args.K, 256);
  for (const int features : {128, 256}) {
    for (const int tokens : {16, 32, 64, 128, 192}) {
      const bool compiled = is_ternary(args)
                                ? features == 128 || (tokens >= 64 && tokens <= 128)
                                : features * tokens <= 128 * 128 && (features == 128 || tokens == 64);
      if (!compiled) continue;
      for (const bool split : {false, true}) {
        Sm90Plan plan = {features, tokens, 0, 0, 0.0};
        const int64_t tiles = sm90_tiles(args, plan);
        if (split) {
          plan.split_tiles = std::min<int64_t>(tiles, 3);
          plan.blocks = static_cast<uint32_t>(std::min<int64_t>(7, plan.split_tiles * stages));
        } else {
          plan.blocks = static_cast<uint32_t>(std::min<int64_t>(tiles, kSms));
        }
        const Buffer partials(static_cast<size_t>(sm90_partials(plan)) * 4, -1);
        const Buffer flags(size_t{plan.blocks} * 2 * 4, 0);
        args.partials = partials.as<int32_t>();
        args.flags = flags.as<uint32_t>();
        check(launch_sm90_gemm(args, plan, nullptr), "sm90_gemm");
        check(cudaDeviceSynchronize(), "sm90_gemm");
        ++launches;
      }
    }
  }
  return launches;
}

int launch_all(const ProductArgs& args) {
  int launches = 0;
  if (args.M == 1) {
    check(launch_gemv(args, gemv_plan(args.N, args.K, args.kind, kSms), nullptr), "gemv");
    ++launches;
  }
  if (args.M <= kDecodeMaxTokens) {
    const DecodePlan plan = decode_plan(args.M, args.N, args.K, args.kind, kSms, kSharedLimit);
    if (plan.blocks != 0) {
      check(launch_decode(args, plan, nullptr), "decode");
      ++launches;
    }
  }
  for (const GemmTile tile : kGemmTiles) {
    check(launch_sm80_gemm(args, tile, kSms, nullptr), "sm80_gemm");
    ++launches;
  }
  launches += launch_sm90(args);
  check(cudaDeviceSynchronize(), "the products");
  return launches;
}

}  // namespace

int main(int argc, char** argv) {
  const int every = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  int cases = 0, launches = 0;
  for (const Shape& shape : kShapes) {
    for (const WeightKind kind : {WeightKind::kTernary, WeightKind::kInt8}) {
      for (int output = 0; output < 4; ++output) {  // raw, and three types
        for (const bool segments : {false, true}) {
          if (cases++ % every != 0) continue;
          const DType types[] = {DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
          const size_t block = kind == WeightKind::kTernary ? kTernaryBlockBytes : kInt8BlockBytes;
          const auto M = static_cast<size_t>(shape.M), N = static_cast<size_t>(shape.N);
          const size_t out_bytes = M * N * (output >= 2 ? 2 : 4);
          const Buffer x(M * static_cast<size_t>(shape.K), 3), act_scale(M * 4, 0x3c);
          const Buffer weight(static_cast<size_t>(block_rows(shape.N) * block_cols(shape.K)) * block, 0x41);
          const Buffer weight_scale((segments ? 2 : N) * 4, 0x3c), bias(N * 4, 0x3c), out(out_bytes, -1);
          ProductArgs args = {};
          args.x_i8 = x.as<int8_t>();
          args.weight = weight.as<void>();
          args.kind = kind;
          args.M = shape.M;
          args.N = shape.N;
          args.K = shape.K;
          args.raw = output == 0;
          args.out = out.as<void>();
          args.out_dtype = types[output];
          args.act_scale = act_scale.as<float>();
          args.weight_scale = weight_scale.as<float>();
          args.bias = segments ? bias.as<float>() : nullptr;
          args.scale_per_row = !segments;
          args.num_segments = segments ? 2 : 1;
          args.segment_end[0] = segments ? shape.N / 2 : shape.N;
          args.segment_end[1] = shape.N;
          launches += launch_all(args);
          std::vector<char> copy(out_bytes);  // initcheck: all of it has been written
          check(cudaMemcpy(copy.data(), out.as<void>(), out_bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
        }
      }
    }
  }
  std::printf("%d launches\n", launches);
  return 0;
}

// The product for one token: csrc/cuda/gemv.cu.
#pragma once

#include "cuda/product.h"

namespace bitnet_ext::cuda {

// How a gemv launch divides the work; chosen by gemv_plan (heuristics.h).
struct GemvPlan {
  int warps;        // of a block, over which K is split: 1 .. 20, or 32 with few registers
  int row_tiles;    // of 16 features that a warp works on at a time: 1 or 2
  int depth;        // blocks of 16 x 128 (times row_tiles) a warp has in flight: 1, 2 or 4
  uint32_t blocks;  // each walks over every blocks-th group of row_tiles
};

cudaError_t launch_gemv(const ProductArgs& args, const GemvPlan& plan, cudaStream_t stream);

}  // namespace bitnet_ext::cuda

// Which tiles, and which part of their K, each block of a persistent GEMM computes.
//
// The first `split_tiles` tiles are one long row of stages of K that is cut into gridDim.x equal pieces,
// wherever the cuts fall ("stream-K", Osama et al., arXiv 2301.03598); the other tiles are dealt out whole.
// int32 sums are exact, so a cut tile has the same result as a whole one. A piece that begins inside a tile
// is a contribution to it; the block whose piece has the tile's beginning collects the contributions. A block
// starts with its contribution, if it has one, so nobody waits long.
#pragma once

#include <cstdint>

namespace bitnet_ext::cuda {

struct WorkPiece {
  int tile;
  int begin, end;  // stages of K
};

// 32-bit, because registers are what a GEMM's consumers are short of; the launcher checks that it suffices.
struct WorkSplit {
  int tiles, split_tiles;
  int num_stages;  // of a tile
  int blocks;

  // Where block b's share of the row of stages begins: floor(b * total / blocks), in 32 bits because a 64-bit
  // division is a function call.
  __host__ __device__ __forceinline__ int share_begin(int b) const {
    const int total = split_tiles * num_stages;
    return b * (total / blocks) + b * (total % blocks) / blocks;
  }

  // The first block whose share begins where a split tile ends, or beyond it.
  __host__ __device__ __forceinline__ int first_block_beyond(int tile) const {
    return ((tile + 1) * blocks + split_tiles - 1) / split_tiles;
  }
};

// A block's pieces one after the other.
struct WorkCursor {
  int position, share_end;  // in the row of stages
  int whole;                // next whole tile

  __host__ __device__ __forceinline__ WorkCursor(const WorkSplit& split, int block)
      : position(split.share_begin(block)),
        share_end(split.share_begin(block + 1)),
        whole(split.split_tiles + block) {}

  __host__ __device__ __forceinline__ bool next(const WorkSplit& split, WorkPiece& piece) {
    if (position < share_end) {
      piece.tile = position / split.num_stages;
      piece.begin = position - piece.tile * split.num_stages;
      const int left = share_end - position;
      piece.end = left < split.num_stages - piece.begin ? piece.begin + left : split.num_stages;
      position += piece.end - piece.begin;
      return true;
    }
    if (whole < split.tiles) {
      piece = {whole, 0, split.num_stages};
      whole += split.blocks;
      return true;
    }
    return false;
  }
};

}  // namespace bitnet_ext::cuda

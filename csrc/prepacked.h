// The prepacked layout of a weight matrix, which every CUDA product reads. For host and device; no torch.
//
// A matrix [N, K] becomes ceil(N / 16) x ceil(K / 128) blocks of 16 rows x 128 columns, a row of blocks after
// the other. Rows beyond N and columns beyond K hold weight 0. Inside a block the bytes lie in the order in
// which tensor-core fragments want them (mma.sync m16n8k32 operand A; four of them stacked are operand A of
// wgmma m64nNk32): lane l of a warp finds all its values in vectors of 16 bytes, vector l of each 512.
//
// With g = l / 4, t = l % 4, step s = 0..3 (32 columns each), register j = 0..3 and byte i = 0..3, the value
// is
//
//     row g + 8 (j % 2),   column 32 s + 16 (j / 2) + 4 t + i                                    of the block
//
// ternary: 512 bytes a block. 32-bit word s of lane l's vector holds the 16 codes of step s; the code of
//          (j, i) is the two's complement pair at bits 8 i + 7 - 2 j and 8 i + 6 - 2 j (00 = 0, 01 = 1,
//          11 = -1). So (word << 2 j) & 0xC0C0C0C0 is register j with every weight times 64: one shift, one
//          mask, no zero point. Sums are divided by 64 at the end, exactly.
// int8:    2,048 bytes a block, as 4 x 32 vectors: vector s of lane l holds registers 0..3 of step s.
#pragma once

#include <cstdint>

namespace bitnet_ext {

enum class WeightKind : int { kTernary, kInt8 };

constexpr int kBlockRows = 16;
constexpr int kBlockCols = 128;
constexpr int kLanes = 32;
constexpr int kStepsPerBlock = 4;
constexpr int kTernaryBlockBytes = 512;
constexpr int kInt8BlockBytes = 2048;
// Sums of a ternary product are kept times 64: |acc| <= 64 * 128 * K has to fit int32.
constexpr int64_t kMaxPrepackedTernaryK = 262143;
constexpr int64_t kMaxPrepackedInt8K = 131071;  // 128 * 128 * K

constexpr int64_t block_rows(int64_t N) {
  return (N + kBlockRows - 1) / kBlockRows;
}
constexpr int64_t block_cols(int64_t K) {
  return (K + kBlockCols - 1) / kBlockCols;
}

}  // namespace bitnet_ext

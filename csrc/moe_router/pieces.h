// How CUDA cuts the tokens into work, and what it keeps of each part until the second launch adds everything up.
//
// A chunk is a fixed number of neighbouring tokens, a block's work. With the sequence-wise loss a chunk falls into pieces, one
// for each sequence in it. Bound r is entry r of cu_seqlens; a token lies in row r if r bounds are at or before it, so row r is
// sequence r - 1, and the first and the last row belong to none. Piece chunk + row: a number that no other piece has, because
// chunks and rows both rise with the token. Numbers in between stay free, and are marked so.
#pragma once

#include "moe_router/moe_router.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace router_kernels {

constexpr int kSlice = 32;           // experts that a block of the second launch adds up
constexpr int64_t kMaxChunks = 512;  // of which every block of the second launch reads the sums
constexpr int64_t kNoPiece = -2, kNoSequence = -1;

struct Pieces {
  int64_t tokens;  // of a chunk
  int64_t chunks, count;
  int slices;
  // [chunks]
  double* z;  // sums of squared log-sum-exps
  int32_t* live;
  int32_t* mismatches;
  int32_t* counts;  // [chunks, E]
  // [count]; the first two with a balance loss, the others with the sequence-wise one
  float* sums;  // [count, E], of p
  int32_t* piece_live;
  int32_t* piece_sequence;
  int32_t* chosen;  // [count, E]
  // of the slices
  double* slice_sums;  // [slices, 2]
  uint32_t* ticket;
};

// Warps that share a chunk: rows of up to 256 experts leave room for 16.
GK_HOST_DEVICE int warps_of_chunk(int experts) { return experts <= 256 ? 16 : 8; }

// `bounded`: cu_seqlens are given, of this number of sequences.
GK_HOST_DEVICE Pieces cut_tokens(int64_t tokens, int experts, bool bounded, int64_t sequences, const bool* losses) {
  Pieces p{};
  const int64_t warps = warps_of_chunk(experts);
  const int64_t each = (tokens + warps * kMaxChunks - 1) / (warps * kMaxChunks);
  p.tokens = warps * (each < 1 ? 1 : each);
  p.chunks = tokens < 1 ? 1 : (tokens + p.tokens - 1) / p.tokens;
  p.count = losses[router::kSequenceLoss] && bounded ? p.chunks + sequences + 1 : p.chunks;
  p.slices = (experts + kSlice - 1) / kSlice;
  return p;
}

// Lays the parts out from `base` on, if it is not null, and returns their bytes.
GK_HOST_DEVICE int64_t lay_out(Pieces& p, int experts, const bool* losses, void* base) {
  const bool sequences = losses[router::kSequenceLoss], balance = sequences || losses[router::kAuxLoss];
  const int64_t rows = int64_t(sizeof(int32_t)) * p.count;
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    void* begin = base == nullptr ? nullptr : static_cast<char*>(base) + end;
    end += bytes;
    return begin;
  };
  p.z = static_cast<double*>(take(p.chunks * int64_t(sizeof(double))));
  p.slice_sums = static_cast<double*>(take(p.slices * 2 * int64_t(sizeof(double))));
  p.counts = static_cast<int32_t*>(take(p.chunks * experts * int64_t(sizeof(int32_t))));
  p.live = static_cast<int32_t*>(take(p.chunks * int64_t(sizeof(int32_t))));
  p.mismatches = static_cast<int32_t*>(take(p.chunks * int64_t(sizeof(int32_t))));
  p.ticket = static_cast<uint32_t*>(take(sizeof(uint32_t)));
  p.sums = static_cast<float*>(take(balance ? rows * experts : 0));
  p.piece_live = static_cast<int32_t*>(take(sequences ? rows : 0));
  p.piece_sequence = static_cast<int32_t*>(take(sequences ? rows : 0));
  p.chosen = static_cast<int32_t*>(take(sequences ? rows * experts : 0));
  return end;
}

}  // namespace router_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels

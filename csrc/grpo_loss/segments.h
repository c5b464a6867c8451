// How the tokens of the sequences are cut into work: a row into segments of 1024 tokens, counted from its own start. Sums run
// inside a segment first, then over the segments of a row, then over rows, so no bit of a row depends on another row or on the
// number of threads.
//
// Padded rows all have the same number of segments. Packed row r starts at segment floor(start / 1024) + r: numbers that grow
// by at least the segments of each row, so the row of a segment is found by bisection and no sum over rows is needed. A few
// segments stay empty. Packed, two more rows hold the tokens before the first and after the last sequence; they are never live.
#pragma once

#include "grpo_loss/grpo_loss.h"

namespace grpo_kernels {
namespace GK_ISA {
namespace loss_kernels {

constexpr int64_t kSegment = 1024;

// A part of a row. Token i of it is token `begin` + i of the layout.
struct Segment {
  int64_t row;       // of the batch; -1 outside all sequences
  int64_t first;     // number of the first segment of the row
  int64_t segments;  // of the row
  int64_t begin;     // in [0, T), or in [0, N) when packed
  int64_t count;     // of tokens, at most kSegment
};

GK_HOST_DEVICE int64_t padded_segments(const LossLayout& l) {
  return l.tokens <= kSegment ? 1 : (l.tokens + kSegment - 1) / kSegment;
}

// At least one: a launch needs a block, if only to report that there was nothing.
GK_HOST_DEVICE int64_t count_segments(const LossLayout& l) {
  if (l.cu_seqlens != nullptr) return l.tokens / kSegment + l.batch + 2;
  return l.batch > 0 ? l.batch * padded_segments(l) : 1;
}

GK_HOST_DEVICE int64_t cu_seqlen(const LossLayout& l, int64_t index) {
  return l.wide_cu_seqlens ? static_cast<const int64_t*>(l.cu_seqlens)[index]
                           : int64_t(static_cast<const int32_t*>(l.cu_seqlens)[index]);
}

// Start of packed row r, of batch + 2: a wrong entry of cu_seqlens reads and writes inside the tensors all the same.
GK_HOST_DEVICE int64_t packed_start(const LossLayout& l, int64_t r) {
  if (r == 0) return 0;
  if (r == l.batch + 2) return l.tokens;
  const int64_t start = cu_seqlen(l, r - 1);
  return start < 0 ? 0 : (start > l.tokens ? l.tokens : start);
}

GK_HOST_DEVICE Segment make_segment(int64_t row, int64_t first, int64_t index, int64_t start, int64_t end) {
  const int64_t length = end > start ? end - start : 0;
  const int64_t begin = start + (index - first) * kSegment;
  const int64_t left = start + length - begin;
  return {row, first, (length + kSegment - 1) / kSegment, begin, left < 0 ? 0 : (left > kSegment ? kSegment : left)};
}

GK_HOST_DEVICE Segment packed_row(const LossLayout& l, int64_t r, int64_t index) {
  const int64_t start = packed_start(l, r);
  const int64_t first = start / kSegment + r;
  return make_segment(r == l.batch + 1 ? -1 : r - 1, first, index < 0 ? first : index, start, packed_start(l, r + 1));
}

GK_HOST_DEVICE Segment segment_at(const LossLayout& l, int64_t index) {
  if (l.cu_seqlens == nullptr) {
    const int64_t each = padded_segments(l), row = index / each;
    if (row >= l.batch) return {-1, 0, 0, 0, 0};
    return make_segment(row, row * each, index, 0, l.tokens);
  }
  int64_t low = 0, high = l.batch + 2;  // the last row that starts at or before the segment is in [low, high)
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (packed_start(l, middle) / kSegment + middle <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return packed_row(l, low, index);
}

// The first segment of row `row` of the batch.
GK_HOST_DEVICE Segment first_segment(const LossLayout& l, int64_t row) {
  return l.cu_seqlens == nullptr ? segment_at(l, row * padded_segments(l)) : packed_row(l, row + 1, -1);
}

// The workspace: a record of every segment and of every group of 64 segments, then the row sums of every segment.
constexpr int64_t kGroup = 64;

GK_HOST_DEVICE int64_t count_groups(const LossLayout& l) { return (count_segments(l) + kGroup - 1) / kGroup; }
GK_HOST_DEVICE int64_t workspace_size(const LossLayout& l) {
  return (count_segments(l) + count_groups(l)) * loss::kRecord + count_segments(l) * loss::kRowSums;
}
GK_HOST_DEVICE double* segment_record(const GRPOLossArgs& a, int64_t segment) { return a.workspace + segment * loss::kRecord; }
GK_HOST_DEVICE double* group_record(const GRPOLossArgs& a, int64_t group) {
  return segment_record(a, count_segments(a.layout) + group);
}
GK_HOST_DEVICE double* segment_row_sums(const GRPOLossArgs& a, int64_t segment) {
  return group_record(a, count_groups(a.layout)) + segment * loss::kRowSums;
}

// The counters: finished groups, finished segments of every group, then live, low-clipped and high-clipped tokens of every row.
GK_HOST_DEVICE int64_t count_counters(const LossLayout& l) { return 1 + count_groups(l) + 3 * l.batch; }
GK_HOST_DEVICE uint32_t* row_counters(const GRPOLossArgs& a, int64_t row) {
  return a.counters + 1 + count_groups(a.layout) + 3 * row;
}

// Where token `token` of a row lies in a tensor of type T.
template <typename T>
GK_HOST_DEVICE const T* token_address(const LossTensor& tensor, int64_t row, int64_t token) {
  return static_cast<const T*>(tensor.data) + row * tensor.row_stride + token * tensor.token_stride;
}

// Offset of the segment's first token in a contiguous per-token output.
GK_HOST_DEVICE int64_t output_offset(const LossLayout& l, const Segment& s) {
  return l.cu_seqlens == nullptr ? s.row * l.tokens + s.begin : s.begin;
}

}  // namespace loss_kernels
}  // namespace GK_ISA
}  // namespace grpo_kernels

"""Verification of drafts through the C++ CPU kernel: allocates the outputs and calls the launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _extension
from grpo_kernels._extension import DTYPE_CODE, pointer
from grpo_kernels.speculative_sampling.arguments import raise_if_faulty
from grpo_kernels.speculative_sampling.ops import MODES, empty_outputs


def _rows(logits: Tensor | None) -> tuple[tuple[int, int, int], Tensor | None]:
    """Where [B, R, V] logits lie, and the tensor that lies there: a copy if the last axis is not dense."""
    if logits is None:
        return (0, 0, 0), None
    if logits.shape[2] > 1 and logits.stride(2) != 1:
        logits = logits.contiguous()
    return (logits.data_ptr(), logits.stride(0), logits.stride(1)), logits


def verify_draft(
    target_logits: Tensor,
    draft_ids: Tensor,
    draft_logits: Tensor | None,
    draft_lengths: Tensor | None,
    temperatures: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seeds: Tensor,
    offsets: Tensor | None,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = empty_outputs(target_logits)
    (batch, drafts), vocab = draft_ids.shape, target_logits.shape[2]
    module = _extension.extension()
    device, threads = _extension.execution(target_logits)
    filters = top_k is not None or top_p is not None
    element_size = 8 if target_logits.dtype == torch.float64 else 4
    stride = module.verify_draft_workspace(drafts, vocab, element_size, filters)
    workspace = target_logits.new_empty(stride * min(threads, batch), dtype=torch.uint8)
    target, target_alive = _rows(target_logits)
    draft, draft_alive = _rows(draft_logits)
    numbers = (draft_lengths, temperatures, top_k, top_p, seeds, offsets)
    dense = tuple(None if number is None else number.contiguous() for number in numbers)
    ids = draft_ids.contiguous()
    bad_row = module.verify_draft(
        batch,
        drafts,
        vocab,
        DTYPE_CODE[target_logits.dtype],
        MODES.index(mode),
        target,
        draft,
        ids.data_ptr(),
        ids.dtype == torch.int64,
        *map(pointer, dense),
        workspace.data_ptr(),
        stride,
        *(output.data_ptr() for output in outputs),
        device,
        threads,
    )
    del target_alive, draft_alive
    if bad_row >= 0:
        raise_if_faulty(target_logits, draft_ids, draft_lengths, temperatures, top_p)
        raise RuntimeError(f"verify_draft: row {bad_row} was refused by the kernel and by no check")
    return outputs

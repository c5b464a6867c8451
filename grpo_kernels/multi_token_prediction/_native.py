"""The targets of multi-token prediction through the C++ CPU kernel: allocates the outputs and calls the launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _extension
from grpo_kernels._extension import pointer
from grpo_kernels.multi_token_prediction.ops import empty_targets


def mtp_targets(
    token_ids: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    depths: int,
    shift: int,
    sequence_length: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    outputs = empty_targets(token_ids, positions, mask, depths, shift, sequence_length, ignore_index)
    ids = token_ids.contiguous()
    places = None if positions is None else positions.contiguous()
    counted = None if mask is None else mask.contiguous()
    rows = ids.shape[0]
    _extension.extension().mtp_targets(
        ids.data_ptr(),
        ids.dtype == torch.int64,
        pointer(places),
        places is not None and places.dtype == torch.int64,
        pointer(counted),
        rows,
        depths,
        min(shift, rows),
        sequence_length,
        ignore_index,
        *(output.data_ptr() for output in outputs),
        *_extension.execution(ids),
    )
    return outputs

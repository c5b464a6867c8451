"""The targets of multi-token prediction through Triton: the launcher."""

from __future__ import annotations

import triton
from torch import Tensor

from grpo_kernels._launch import on_device
from grpo_kernels.multi_token_prediction._kernels_triton import launch_config, targets_kernel
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
    targets, counts = empty_targets(token_ids, positions, mask, depths, shift, sequence_length, ignore_index)
    counts.zero_()
    rows = token_ids.shape[0]
    if rows == 0:
        return targets, counts
    config = launch_config()
    with on_device(token_ids):
        targets_kernel[(triton.cdiv(rows, config.rows),)](
            token_ids.contiguous(),
            None if positions is None else positions.contiguous(),
            None if mask is None else mask.contiguous(),
            targets,
            counts,
            rows,
            depths,
            min(shift, rows),
            sequence_length if 0 < sequence_length < rows else None,
            ignore_index,
            ROWS=config.rows,
            num_warps=config.num_warps,
        )
    return targets, counts

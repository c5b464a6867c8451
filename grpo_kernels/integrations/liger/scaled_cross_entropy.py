"""Liger's per-token cross-entropy with temperature and entropy, by `linear_token_log_probs`."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from grpo_kernels.distributed import VocabShard
from grpo_kernels.integrations.liger.variant import live_tokens
from grpo_kernels.linear_log_probs import linear_token_log_probs

_OP = "LigerFusedLinearScaledCrossEntropyFunction"


class LigerFusedLinearScaledCrossEntropyFunction:
    """`liger_kernel.ops.fused_linear_scaled_cross_entropy.LigerFusedLinearScaledCrossEntropyFunction`."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: Tensor | float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Negative log-probs of the targets, and on request the entropies of the tokens' distributions.

        Args:
            _input: [N, H] bf16, fp16, fp32 or fp64.
            weight: [V, H].
            target: [N] int32 or int64. Rows where it is ignore_index or negative are 0.
            temperature: number, 0-d tensor, or [N] tensor, that the logits are divided by.
            m_tiles_per_cluster: without effect.
            return_entropy: return (nll, entropy).
            selected_token_ids: must be None: not served.

        Returns:
            [N] float32 (float64 for float64 inputs), each differentiable in _input and weight.

        Raises:
            TypeError, ValueError: selected_token_ids is given; and those of `linear_token_log_probs`.
        """
        if selected_token_ids is not None:
            raise ValueError(
                f"{_OP}: selected_token_ids must be None: log-probs of further ids are not served, "
                f"got {type(selected_token_ids).__name__}"
            )
        return _scaled_cross_entropy(_input, weight, target, temperature, ignore_index, return_entropy)


class LigerFusedLinearScaledCrossEntropyTPFunction:
    """`liger_kernel.ops.fused_linear_scaled_cross_entropy.LigerFusedLinearScaledCrossEntropyTPFunction`."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        tp_group: dist.ProcessGroup | None,
        temperature: Tensor | float = 1.0,
        ignore_index: int = -100,
        tiles_per_reduce: int = 1,
        return_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The same with a part of the vocabulary on each rank of tp_group (None: all ranks), on any device.

        Args:
            weight: [V / ranks, H]: ids rank * V / ranks and on.
            target: [N], ids of the whole vocabulary.
            tiles_per_reduce: without effect.
            _input, temperature, ignore_index, return_entropy: as there, equal on all ranks.

        Returns:
            As there. The gradient of _input is summed over the ranks; that of weight is of this rank's rows.

        Raises:
            TypeError, ValueError: those of `linear_token_log_probs`.
        """
        start = dist.get_rank(tp_group) * weight.shape[0]
        shard = VocabShard(start, start + weight.shape[0], tp_group)
        return _scaled_cross_entropy(
            _input, weight, target, temperature, ignore_index, return_entropy, vocab_shard=shard
        )


def _scaled_cross_entropy(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: Tensor | float,
    ignore_index: int,
    return_entropy: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    output = linear_token_log_probs(
        _input,
        weight,
        target,
        temperature=temperature,
        mask=live_tokens(target, target != ignore_index),
        outputs=("entropy",) if return_entropy else (),
        **options,
    )
    return -output.log_probs if output.entropy is None else (-output.log_probs, output.entropy)

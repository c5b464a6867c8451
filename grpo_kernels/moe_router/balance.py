"""Balancing without an auxiliary loss: experts with few tokens get a larger bias in the choice."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels._collectives import check_group

_NAME = "update_expert_bias"


@torch.no_grad()
def update_expert_bias(
    bias: Tensor,
    tokens_per_expert: Tensor,
    rate: float | Tensor = 1e-3,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> None:
    """Moves the selection biases of a router towards equal loads, in place: b_e += rate * sign(mean load - load_e).

    Call it once an optimiser step with the sum of `tokens_per_expert` over the micro-batches. In reinforcement learning
    the biases are usually left alone (rate 0), so that rollout and training choose alike.

    Args:
        bias: [..., E] float32 (or float64). `e_score_correction_bias` of a layer, or of several, stacked: one
            all-reduce serves all.
        tokens_per_expert: [..., E] int32 or int64. How many tokens each expert got; masked tokens are not in it.
        rate: >= 0, the step. A number or a 0-d tensor.
        process_group: Loads are summed over its ranks, all of which must call.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.

    Numerics:
        Loads are compared in int64 (E * load against their sum), so equality is exact and the ranks agree to the bit.
        No tokens: no change. No host synchronisation.

    Source:
        Auxiliary-loss-free load balancing (arXiv 2408.15664); DeepSeek-V3 (2412.19437) section 2.1.2, which uses 1e-3.
    """
    _checks.check_tensor(_NAME, "bias", bias)
    if bias.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{_NAME}: bias must have dtype float32 or float64, got {str(bias.dtype).removeprefix('torch.')}: steps of "
            "1e-3 vanish in 16 bits, and rounded biases choose other experts"
        )
    if bias.ndim == 0:
        raise ValueError(f"{_NAME}: bias must have shape [..., E], got []")
    _checks.check_tensor(_NAME, "tokens_per_expert", tokens_per_expert)
    _checks.check_dtype(_NAME, "tokens_per_expert", tokens_per_expert, _checks.INTEGER)
    _checks.check_shape(_NAME, "tokens_per_expert", tokens_per_expert, ("[..., E]", bias.shape))
    _checks.check_same_device(_NAME, "tokens_per_expert", tokens_per_expert, "bias", bias)
    if isinstance(rate, Tensor):
        if rate.ndim != 0:
            raise ValueError(f"{_NAME}: rate must be a number or a 0-d tensor, got shape {list(rate.shape)}")
    else:
        _checks.check_number(_NAME, "rate", rate, minimum=0.0)
    if process_group is not None:
        check_group(_NAME, "process_group", process_group)
    load = tokens_per_expert.to(torch.int64, copy=True)
    if process_group is not None:
        torch.distributed.all_reduce(load, group=process_group)
    difference = load.sum(dim=-1, keepdim=True) - load * load.shape[-1]
    bias.add_(torch.sign(difference).to(bias.dtype) * rate)  # integers times a number would be of the default dtype

"""Parameters over ranks: gradients that are summed, and experts of which each rank has its own.

Tensors of experts are known by the names of their parameters, wherever a part of the name between slashes is one:
`model/blocks.0.mlp.experts.down_proj`, `optimizer/blocks.0.mlp.experts.down_proj/exp_avg`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from examples.r1.parallel import Ranks
from grpo_kernels import MoE


def shard_names(model: nn.Module) -> frozenset[str]:
    """Parameters of which this rank has its own experts' part, along the first dimension; none without parallelism."""
    return frozenset(
        f"{prefix}.experts.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, MoE) and module.expert_parallel is not None
        for name, _ in module.experts.named_parameters()
    )


def sum_gradients(ranks: Ranks, model: nn.Module) -> None:
    """Makes every gradient that of the sum of the ranks' losses, in one all-reduce.

    Those of a rank's own experts are left alone: tokens of all ranks are in them. A parameter that has no gradient on
    a rank counts as zero there; one that has none on any rank still has none.
    """
    if ranks.process_group is None:
        return
    shards = shard_names(model)
    parameters = [parameter for name, parameter in model.named_parameters() if name not in shards]
    zero = torch.zeros((), device=ranks.device)
    present = torch.stack([zero if parameter.grad is None else zero + 1 for parameter in parameters])
    parts = [
        zero.expand(parameter.numel()) if parameter.grad is None else parameter.grad.flatten()
        for parameter in parameters
    ]
    sums = ranks.sum_(torch.cat([present, *parts]))  # float32 at least, as `present` is
    counts, *gradients = sums.split([len(parameters), *(parameter.numel() for parameter in parameters)])
    for parameter, count, gradient in zip(parameters, counts.tolist(), gradients, strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if count > 0 else None


def clip_grad_norm_(ranks: Ranks, model: nn.Module, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` of some of the model's parameters, with the experts of all ranks in the norm.

    All ranks scale by the same number, to the bit. Returns the norm before.
    """
    parameters = list(parameters)
    if ranks.process_group is None:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    named = dict(model.named_parameters())
    shards = {id(named[name]) for name in shard_names(model)}
    gradients = [(id(parameter) in shards, parameter.grad) for parameter in parameters if parameter.grad is not None]
    own = torch.nn.utils.get_total_norm([gradient for shard, gradient in gradients if shard])
    alike = torch.nn.utils.get_total_norm([gradient for shard, gradient in gradients if not shard])
    squares = own.to(ranks.device).double().square() + alike.to(ranks.device).double().square() / ranks.world
    norm = ranks.sum_(squares).sqrt().to(alike.dtype)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def full_state(ranks: Ranks, tensors: Mapping[str, Tensor], shards: frozenset[str]) -> dict[str, Tensor]:
    """The tensors with those of experts whole, so that what is saved does not depend on the number of ranks."""
    return {key: ranks.gather(tensor) if _is_part(key, tensor, shards) else tensor for key, tensor in tensors.items()}


def own_state(ranks: Ranks, tensors: Mapping[str, Tensor], shards: frozenset[str]) -> dict[str, Tensor]:
    """The reverse: of whole experts, those of this rank."""
    return {
        key: tensor[ranks.part("experts", len(tensor))] if _is_part(key, tensor, shards) else tensor
        for key, tensor in tensors.items()
    }


def _is_part(key: str, tensor: Tensor, shards: frozenset[str]) -> bool:
    """Not so the optimiser's step, which is a number."""
    return tensor.ndim > 0 and not shards.isdisjoint(key.split("/"))

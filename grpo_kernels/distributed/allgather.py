"""Every rank gets every token: equal shares, so that no rank needs to know what the others have."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from grpo_kernels._collectives import all_gather
from grpo_kernels.distributed.exchange import (
    Dispatched,
    all_to_all,
    check_rows,
    gradients_home,
    pack,
    raise_wrong_id,
    unpack,
)
from grpo_kernels.moe_permute import Permutation, build_permutation, moe_unpermute


class Shares(NamedTuple):
    """What combine needs.

    Fields:
        rows: from the rows of every rank, rank by rank, to this rank's tokens. Its "experts" are ranks.
        weights: as dispatched.
        tokens: without padding.
    """

    rows: Permutation
    weights: Tensor
    tokens: int


class AllGather:
    """`ExpertExchange` on `all_gather` and on `all_to_all_single` of equal shares. Shapes do not depend on routes."""

    def __init__(self, num_experts: int, group: torch.distributed.ProcessGroup, max_tokens: int | None) -> None:
        self.num_experts = num_experts
        self.group = group
        self.world = torch.distributed.get_world_size(group)
        self.max_tokens = max_tokens
        per_rank = num_experts // self.world
        rank = torch.distributed.get_rank(group)
        self.local_range = (rank * per_rank, rank * per_rank + per_rank)

    def dispatch(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        tokens = x.shape[0]
        if self.max_tokens is None:
            self._check_equal(x)
        else:
            if tokens > self.max_tokens:
                raise ValueError(
                    f"ExpertParallel.dispatch: x must have at most max_tokens = {self.max_tokens} rows, got {tokens}"
                )
            padding = (0, 0, 0, self.max_tokens - tokens)
            x, topk_weights = F.pad(x, padding), F.pad(topk_weights, padding)
            topk_ids = F.pad(topk_ids, padding, value=-1)
        ranks = torch.arange(self.world, dtype=torch.int32, device=x.device).expand(x.shape[0], self.world)
        rows = build_permutation(ranks, self.world)
        received, weights, ids = _Dispatch.apply(x, topk_weights, topk_ids, rows, self)  # type: ignore[no-untyped-call]
        return Dispatched(received, weights, ids, Shares(rows, weights, tokens))

    def combine(self, y: Tensor, handle: Shares) -> Tensor:
        check_rows(y, handle.rows.inv_map.shape[0])
        combined: Tensor = _Combine.apply(y, handle.weights, handle.rows, self.group)  # type: ignore[no-untyped-call]
        return combined[: handle.tokens]

    def check_ids(self, payload: Tensor) -> None:
        """On the CPU, where looking is free. All ranks look at the ids of all: they raise together."""
        if payload.device.type == "cpu" and not torch.compiler.is_compiling():
            raise_wrong_id(payload.chunk(2, dim=1)[0], self.num_experts, payload.shape[0] // self.world)

    def _check_equal(self, x: Tensor) -> None:
        """On the CPU: shares of different sizes would end the process there, and hang elsewhere."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return
        tokens = all_gather(torch.tensor([x.shape[0]]), self.group).tolist()
        if min(tokens) != max(tokens):
            raise ValueError(
                f"ExpertParallel.dispatch: x must have as many rows on every rank, got {tokens}; give max_tokens, "
                'which pads them, or take mode="alltoall"'
            )


def _result(values: Tensor) -> Tensor:
    """Of a forward. Compiled by torch 2.11, it would have gradients of zeros if its last step wrote in place, or was a
    `.to` that had nothing to do."""
    return values.view(values.shape) if torch.compiler.is_compiling() else values


class _Dispatch(torch.autograd.Function):
    """Weights pass through it as well, so that their gradients come home with those of the rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, rows: Permutation, exchange: AllGather
    ) -> tuple[Tensor, Tensor, Tensor]:
        payload = all_gather(pack(topk_weights, topk_ids), exchange.group)
        exchange.check_ids(payload)
        weights, ids = unpack(payload, topk_weights.dtype, exchange.local_range)
        ctx.save_for_backward(ids, *rows)
        ctx.group = exchange.group
        ctx.mark_non_differentiable(ids)
        return _result(all_gather(x, exchange.group)), weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_weights: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return *gradients_home(ctx, grad_x, grad_weights, ctx.group), None, None, None


class _Combine(torch.autograd.Function):
    """Takes the dispatched weights along, so that its backward runs on a rank whose y depends on nothing, too."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weights: Tensor, rows: Permutation, group: torch.distributed.ProcessGroup
    ) -> Tensor:
        ctx.group = group
        return _result(moe_unpermute(all_to_all(y, group), rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather(grad, ctx.group), None, None, None

"""Tokens travel to the ranks of their experts and nowhere else: all-to-all with counts, one host read a layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels.distributed.exchange import (
    Dispatched,
    all_to_all,
    check_rows,
    gradients_home,
    pack,
    raise_wrong_id,
    unpack,
)
from grpo_kernels.moe_permute import Permutation, build_permutation, moe_permute, moe_unpermute


@dataclass(frozen=True, eq=False)
class Routes:
    """Where a rank's tokens go: one row of a token for each rank that it goes to, whatever it finds there.

    No tuple: torch.compile would look into it, and compile again for other counts.

    Args:
        rows: from tokens to rows, which lie rank by rank, and back. Its "experts" are ranks.
        send: rows to each rank.
        receive: rows from each rank.
        weights: as dispatched.
    """

    rows: Permutation
    send: list[int]
    receive: list[int]
    weights: Tensor | None = None


class AllToAll:
    """`ExpertExchange` on `all_to_all_single`. The memory and the traffic are those of the routes."""

    def __init__(self, num_experts: int, group: torch.distributed.ProcessGroup) -> None:
        self.num_experts = num_experts
        self.group = group
        self.world = torch.distributed.get_world_size(group)
        per_rank = num_experts // self.world
        rank = torch.distributed.get_rank(group)
        self.local_range = (rank * per_rank, rank * per_rank + per_rank)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def dispatch(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        routes = self._routes(topk_ids)
        received, weights, ids = _Dispatch.apply(x, topk_weights, topk_ids, routes, self)  # type: ignore[no-untyped-call]
        return Dispatched(received, weights, ids, replace(routes, weights=weights))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def combine(self, y: Tensor, handle: Routes) -> Tensor:
        check_rows(y, sum(handle.receive))
        combined: Tensor = _Combine.apply(y, handle.weights, handle, self.group)  # type: ignore[no-untyped-call]
        return combined

    def _routes(self, topk_ids: Tensor) -> Routes:
        """Settled between all ranks, with the layer's one host read."""
        rows = build_permutation(ranks_of(topk_ids, self.num_experts, self.world), self.world)
        # A wrong id spoils the counts, which come to every rank: so that all of them raise, and none waits.
        counts = torch.where((topk_ids >= self.num_experts).any(), -1, rows.tokens_per_expert)
        send, receive = torch.stack([counts, all_to_all(counts, self.group)]).tolist()
        if min(receive) < 0:
            raise_wrong_id(topk_ids, self.num_experts)
            raise ValueError(
                f"ExpertParallel.dispatch: topk_ids must be < {self.num_experts}, the number of experts, got others on "
                f"rank {next(rank for rank, count in enumerate(receive) if count < 0)}"
            )
        return Routes(rows._replace(inv_map=rows.inv_map[: sum(send)]), send, receive)


def ranks_of(topk_ids: Tensor, num_experts: int, world: int) -> Tensor:
    """[T, K] int32: the ranks that a token goes to, ascending, each once, with -1 in the slots that are left."""
    live = (topk_ids >= 0) & (topk_ids < num_experts)
    ranks = torch.where(live, topk_ids // (num_experts // world), world).to(torch.int32).sort(dim=1).values
    first = torch.ones_like(ranks, dtype=torch.bool)
    first[:, 1:] = ranks[:, 1:] != ranks[:, :-1]
    return torch.where(first & (ranks < world), ranks, -1)


class _Dispatch(torch.autograd.Function):
    """Weights pass through it as well, so that their gradients come home with those of the rows.

    Both gradients always travel where their inputs need them: autograd fills in zeros where a rank made nothing of one
    of them, and so no rank leaves the others waiting.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, routes: Routes, exchange: AllToAll
    ) -> tuple[Tensor, Tensor, Tensor]:
        counts = (exchange.group, routes.receive, routes.send)
        tokens = routes.rows.inv_map // topk_ids.shape[1]
        payload = all_to_all(pack(topk_weights, topk_ids).index_select(0, tokens), *counts)
        weights, ids = unpack(payload, topk_weights.dtype, exchange.local_range)
        received = all_to_all(moe_permute(x, routes.rows), *counts)
        ctx.save_for_backward(ids, *routes.rows)
        ctx.back = (exchange.group, routes.send, routes.receive)
        ctx.mark_non_differentiable(ids)
        return received, weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_weights: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return *gradients_home(ctx, grad_x, grad_weights, *ctx.back), None, None, None


class _Combine(torch.autograd.Function):
    """Takes the dispatched weights along, so that its backward runs on a rank whose y depends on nothing, too."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, routes: Routes, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.save_for_backward(*routes.rows)
        ctx.there = (group, routes.receive, routes.send)
        return moe_unpermute(all_to_all(y, group, routes.send, routes.receive), routes.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_to_all(moe_permute(grad, Permutation(*ctx.saved_tensors)), *ctx.there), None, None, None

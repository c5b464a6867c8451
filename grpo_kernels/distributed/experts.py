"""Experts that are spread over ranks: tokens go to them, and what they make of the tokens comes back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels._collectives import check_group
from grpo_kernels.distributed.allgather import AllGather
from grpo_kernels.distributed.exchange import Dispatched, ExpertExchange, Local
from grpo_kernels.moe_router import RouterOutput

MODES = ("auto", "alltoall", "allgather")
FEW_RANKS = 8  # up to here all-gather moves no more than an all-to-all of each token's K copies would


class ExpertParallel:
    """The experts of a layer in equal parts on the ranks of a group; each rank keeps its own tokens.

        received = parallel.dispatch(x, router_output)
        y = moe_experts(received.x, gate_up, down, (received.topk_weights, received.topk_ids),
                        expert_range=parallel.local_range, num_experts=num_experts)      # this rank's experts
        y = parallel.combine(y, received.handle)

    y is what one process with all experts computes. Gradients flow to x and to the router's weights. Those of this
    rank's experts contain the tokens of all ranks of the group: they need no further sum within it.

    Every rank makes the same calls in the same order, also without tokens; x and topk_weights need gradients on all
    ranks or on none.

    Args:
        num_experts: of all ranks together, a multiple of their number. Rank r holds those from r * n to r * n + n.
        process_group: the ranks, such as `mesh["ep"].get_group()`; None for all.
        mode: "alltoall": a token goes once to each rank that holds one of its experts. One host read a forward.
            "allgather": every token goes to every rank. No host read, shapes that do not depend on the routes.
            "auto": "allgather" if `max_tokens` is given and there are at most 8 ranks, else "alltoall".
        max_tokens: the most tokens that a rank may have, the same number on all ranks. "allgather" pads to it; without
            it that mode needs as many tokens on every rank. "alltoall" does not use it.
        exchange: what moves the tokens, in place of a mode: your own `ExpertExchange`.

    Raises:
        TypeError, ValueError: an argument is not as described, or torch.distributed is not initialised.

    Numerics: rows are bit copies. Sums over ranks, in the forward and in the backward, are accumulated in fp32 (float64
    for float64) in the order of the ranks: deterministic. What a rank's experts make of a token is rounded once to the
    dtype of y before it travels. A slot with a negative id goes nowhere. An id >= num_experts raises on all ranks
    alike, except in "allgather" on a GPU, where it goes nowhere.
    """

    def __init__(
        self,
        num_experts: int,
        process_group: torch.distributed.ProcessGroup | None = None,
        mode: str = "auto",
        *,
        max_tokens: int | None = None,
        exchange: ExpertExchange | None = None,
    ) -> None:
        op = "ExpertParallel"
        _checks.check_integer(op, "num_experts", num_experts, minimum=1)
        _checks.check_choice(op, "mode", mode, MODES)
        if max_tokens is not None:
            _checks.check_integer(op, "max_tokens", max_tokens, minimum=1)
        if exchange is not None and mode != "auto":
            raise ValueError(f"{op}: exchange takes the place of a mode, got mode={mode!r} beside it")
        self.num_experts = num_experts
        check_group(op, "process_group", process_group)
        every_rank: Any = torch.distributed.group.WORLD
        self.process_group = every_rank if process_group is None else process_group
        self.world_size = torch.distributed.get_world_size(self.process_group)
        if num_experts % self.world_size != 0:
            raise ValueError(
                f"{op}: num_experts must be a multiple of {self.world_size}, the ranks of the group, got {num_experts}"
            )
        if mode == "auto":
            mode = "allgather" if max_tokens is not None and self.world_size <= FEW_RANKS else "alltoall"
        self.exchange = exchange if exchange is not None else self._of_mode(mode, max_tokens)

    def _of_mode(self, mode: str, max_tokens: int | None) -> ExpertExchange:
        if self.world_size == 1:
            return Local(self.num_experts)
        if mode == "allgather":
            return AllGather(self.num_experts, self.process_group, max_tokens)
        from grpo_kernels.distributed.alltoall import AllToAll  # imports torch._dynamo, which is slow

        return AllToAll(self.num_experts, self.process_group)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallel:
        """Itself: it has no state, and groups cannot be copied; modules that hold it can be."""
        return self

    def __repr__(self) -> str:
        way = type(self.exchange).__name__
        return f"ExpertParallel(num_experts={self.num_experts}, ranks={self.world_size}, exchange={way})"

    @property
    def local_range(self) -> tuple[int, int]:
        """The experts of this rank: ids from the first to one past the last, as `moe_experts` takes them."""
        per_rank = self.num_experts // self.world_size
        rank = torch.distributed.get_rank(self.process_group)
        return rank * per_rank, rank * per_rank + per_rank

    def dispatch(self, x: Tensor, router_output: RouterOutput | tuple[Tensor, Tensor]) -> Dispatched:
        """Sends this rank's tokens to the ranks of their experts.

        Args:
            x: [T, H] bf16, fp16, fp32 or fp64. T may differ from rank to rank (see `max_tokens`), and be 0.
            router_output: `RouterOutput`, or (topk_weights, topk_ids): [T, K] floating, [T, K] int32 or int64.

        Returns:
            `Dispatched(x, topk_weights, topk_ids, handle)`: the rows that came here. Rows are ordered by rank, then by
            token. In "allgather" there are rows without an expert here: their ids are all -1, and y has to be 0 there,
            as `moe_experts` makes it.
        """
        op = "ExpertParallel.dispatch"
        if not isinstance(router_output, tuple) or len(router_output) < 2:
            raise TypeError(
                f"{op}: router_output must be a RouterOutput or (topk_weights, topk_ids), got "
                f"{type(router_output).__name__}"
            )
        topk_weights, topk_ids = router_output[:2]
        for name, value in (("x", x), ("topk_weights", topk_weights), ("topk_ids", topk_ids)):
            _checks.check_tensor(op, name, value)
        _checks.check_dtype(op, "x", x)
        _checks.check_dtype(op, "topk_weights", topk_weights)
        _checks.check_dtype(op, "topk_ids", topk_ids, _checks.INTEGER)
        _checks.check_ndim(op, "x", x, "[T, H]")
        _checks.check_ndim(op, "topk_ids", topk_ids, "[T, K]")
        _checks.check_shape(op, "topk_ids", topk_ids, ("[T, K]", (x.shape[0], topk_ids.shape[1])))
        _checks.check_shape(op, "topk_weights", topk_weights, ("[T, K]", topk_ids.shape))
        _checks.check_same_device(op, "topk_weights", topk_weights, "x", x)
        _checks.check_same_device(op, "topk_ids", topk_ids, "x", x)
        return self.exchange.dispatch(x, topk_weights, topk_ids)

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        """Brings home what the ranks' experts made of this rank's tokens.

        Args:
            y: [N, H] bf16, fp16, fp32 or fp64. The weighted sum over this rank's experts for each row of `Dispatched`.
            handle: of that `Dispatched`.

        Returns:
            [T, H] in y's dtype: the sum over the ranks. 0 for tokens that went nowhere.
        """
        op = "ExpertParallel.combine"
        _checks.check_tensor(op, "y", y)
        _checks.check_dtype(op, "y", y)
        _checks.check_ndim(op, "y", y, "[N, H]")
        return self.exchange.combine(y, handle)

"""What carries tokens to the ranks of their experts and brings the results back; what the ways to do it share."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels.moe_permute import Permutation, moe_unpermute


class Dispatched(NamedTuple):
    """The tokens that came to this rank, one row each, whatever the number of its experts that they go to.

    Fields:
        x: [N, H]. Hidden states, bit copies.
        topk_weights: [N, K]. Router weights; 0 in the slots of other ranks' experts.
        topk_ids: [N, K] int32. Ids among all experts; -1 in the slots of other ranks' experts.
        handle: what `combine` needs to send results back. Opaque: only the exchange that made it reads it.
    """

    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    handle: Any


class ExpertExchange(Protocol):
    """A way to move tokens between the ranks of one group, each of which holds num_experts / ranks experts in order.

    `ExpertParallel` checks the arguments and calls it. Every rank calls both methods for every layer, also with no
    tokens. Both are differentiable: the backward of one moves data as the forward of the other does.
    """

    def dispatch(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        """Sends each token once to every rank that holds one of its experts.

        Args:
            x: [T, H].
            topk_weights: [T, K].
            topk_ids: [T, K] int32 or int64, ids among all experts; negative: the slot goes nowhere.
        """
        ...

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        """The sum over the ranks of what each made of a token, in the order of the ranks, accumulated in fp32.

        Args:
            y: [N, H]. The weighted sum over this rank's experts for every row that dispatch brought.
            handle: of that dispatch.

        Returns:
            [T, H] in y's dtype. 0 for tokens that went nowhere.
        """
        ...


class Local:
    """A group of one rank: nothing moves."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        if topk_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            raise_wrong_id(topk_ids, self.num_experts)
        if topk_ids.dtype != torch.int32:  # one of int64 that wrapped round could become that of an expert
            topk_ids = topk_ids.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)
        return Dispatched(x, topk_weights, topk_ids, None)

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        return y


def all_to_all(
    values: Tensor,
    group: torch.distributed.ProcessGroup,
    receive: list[int] | None = None,
    send: list[int] | None = None,
) -> Tensor:
    """Rows for each rank, in their order, become rows from each rank, in their order. No counts: as many for each."""
    rows = values.shape[0] if receive is None else sum(receive)
    received = values.new_empty((rows, *values.shape[1:]))
    torch.distributed.all_to_all_single(received, values.contiguous(), receive, send, group=group)
    return received


def pack(topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """[T, 2 K] integers: ids, then the bits of the weights. One message instead of two."""
    exact = torch.float64 if topk_weights.dtype == torch.float64 else torch.float32
    word = torch.int64 if exact == torch.float64 else torch.int32
    weights = topk_weights.detach().to(exact).contiguous().view(word)
    return torch.cat([topk_ids.clamp(-1, torch.iinfo(torch.int32).max).to(word), weights], dim=1)


def unpack(payload: Tensor, dtype: torch.dtype, local_range: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Weights and ids out of what `pack` made; 0 and -1 in the slots of experts outside `local_range`."""
    ids, bits = payload.chunk(2, dim=1)
    here = (ids >= local_range[0]) & (ids < local_range[1])
    weights = bits.view(torch.float64 if payload.dtype == torch.int64 else torch.float32)
    return torch.where(here, weights.to(dtype), 0), torch.where(here, ids, -1).to(torch.int32)


def gradients_home(ctx: Any, grad_x: Tensor, grad_weights: Tensor, *back: Any) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a dispatch, of x and of the weights, summed where the tokens came from.

    Args:
        ctx: saved the received ids, then the fields of the `Permutation` that sent the rows.
        grad_x, grad_weights: of what was received.
        back: the rest of the arguments of `all_to_all`, which sends them back.
    """
    ids, *rows = ctx.saved_tensors
    x_home = weights_home = None
    if ctx.needs_input_grad[0]:
        x_home = moe_unpermute(all_to_all(grad_x, *back), Permutation(*rows))
    if ctx.needs_input_grad[1]:
        # One rank holds a slot's expert, the others send 0: the sum is that rank's gradient, not rounded.
        mine = torch.where(ids >= 0, grad_weights, 0)
        weights_home = moe_unpermute(all_to_all(mine, *back), Permutation(*rows))
    return x_home, weights_home


def raise_wrong_id(topk_ids: Tensor, num_experts: int, tokens: int | None = None) -> None:
    """Raises if an id is of no expert. Reads on the host.

    Args:
        tokens: of each rank, where the ids are those of all ranks.
    """
    wrong = topk_ids >= num_experts
    if wrong.any():
        row, slot = wrong.nonzero()[0].tolist()
        where = f"topk_ids[{row}, {slot}]"
        if tokens is not None:
            where = f"topk_ids[{row % tokens}, {slot}] of rank {row // tokens}"
        raise ValueError(
            f"ExpertParallel.dispatch: {where} must be < {num_experts}, the number of experts, got "
            f"{topk_ids[row, slot].item()}"
        )


def check_rows(y: Tensor, rows: int) -> None:
    """`y` has the rows that dispatch brought."""
    _checks.check_shape("ExpertParallel.combine", "y", y, ("[N, H]", (rows, y.shape[1])))

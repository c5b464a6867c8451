"""What the sweeps over ranks compare: ours, and what trainers write with collectives in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import grpo_kernels
from grpo_kernels.distributed import ExpertParallel, VocabShard

Values = tuple[Tensor, ...]

_ROWS, _WIDTH, _VOCAB = 256, 256, 32000
_TOKENS, _HIDDEN, _EXPERTS, _TOP_K = 2048, 1024, 32, 8
_SEED = 7
HEAD, DISPATCH = "linear_token_log_probs, vocab_shard", "ExpertParallel, dispatch and combine"
HEAD_SIZES = f"N = {_ROWS}, H = {_WIDTH}, V = {_VOCAB} in parts, float32, forward and backward"
DISPATCH_SIZES = (
    f"T = {_TOKENS} of all ranks, E = {_EXPERTS}, K = {_TOP_K}, H = {_HIDDEN}, float32, forward and backward"
)


# --- a head whose vocabulary is in parts -----------------------------------------------------------------------------


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    token_ids: Tensor
    upstream: Tensor
    start: int


def _head(rank: int, world: int) -> Head:
    torch.manual_seed(_SEED)
    hidden = torch.randn(_ROWS, _WIDTH).requires_grad_()
    part = _VOCAB // world
    weight = torch.randn(_VOCAB, _WIDTH).mul_(3.0 / _WIDTH**0.5)[rank * part : (rank + 1) * part].clone()
    ids, upstream = torch.randint(_VOCAB, (_ROWS,)), torch.randn(_ROWS)
    return Head(hidden, weight.requires_grad_(), ids, upstream, rank * part)


def _ours_head(given: Head) -> Values:
    shard = VocabShard(given.start, given.start + len(given.weight), None)
    found = grpo_kernels.linear_token_log_probs(given.hidden, given.weight, given.token_ids, vocab_shard=shard)
    return _gradients(found.log_probs, given.upstream, given.hidden, given.weight)


class _ShardedLogProbs(torch.autograd.Function):
    """All local logits, and three sums over the ranks: of the maxima, the totals and the targets."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, token_ids: Tensor, start: int) -> Tensor:
        logits = hidden @ weight.T
        maximum = logits.amax(-1)
        dist.all_reduce(maximum, dist.ReduceOp.MAX)
        logits -= maximum[:, None]
        local = token_ids - start
        mine = (local >= 0) & (local < len(weight))
        local = torch.where(mine, local, 0)
        target = torch.where(mine, logits.gather(-1, local[:, None])[:, 0], 0.0)
        dist.all_reduce(target)
        probs = logits.exp_()
        total = probs.sum(-1)
        dist.all_reduce(total)
        probs /= total[:, None]
        ctx.save_for_backward(hidden, weight, probs, local, mine)
        return target - total.log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, probs, local, mine = ctx.saved_tensors
        slope = probs * -grad[:, None]
        slope.scatter_add_(-1, local[:, None], torch.where(mine, grad, 0.0)[:, None])
        of_hidden = slope @ weight
        dist.all_reduce(of_hidden)
        return of_hidden, slope.T @ hidden, None, None


def _eager_head(given: Head) -> Values:
    log_probs = _ShardedLogProbs.apply(given.hidden, given.weight, given.token_ids, given.start)
    return _gradients(log_probs, given.upstream, given.hidden, given.weight)


def _gradients(output: Tensor, upstream: Tensor, *leaves: Tensor) -> Values:
    return (output.detach(), *torch.autograd.grad(output, leaves, upstream))


# --- experts in parts ------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    x: Tensor
    weights: Tensor
    ids: Tensor
    upstream: Tensor
    world: int


def _tokens(rank: int, world: int) -> Tokens:
    torch.manual_seed(_SEED)
    every = slice(rank * (_TOKENS // world), (rank + 1) * (_TOKENS // world))
    x, upstream = torch.randn(_TOKENS, _HIDDEN)[every].clone(), torch.randn(_TOKENS, _HIDDEN)[every].clone()
    weights, ids = torch.rand(_TOKENS, _EXPERTS).topk(_TOP_K)
    chosen = weights[every].clone().requires_grad_()
    return Tokens(x.requires_grad_(), chosen, ids[every].int().contiguous(), upstream, world)


def _ours_dispatch(mode: str) -> Callable[[Tokens], Values]:
    """The experts do nothing, so that what is measured is the way there and back."""

    def run(given: Tokens) -> Values:
        parallel = ExpertParallel(_EXPERTS, None, mode, max_tokens=len(given.x) if mode == "allgather" else None)
        received = parallel.dispatch(given.x, (given.weights, given.ids))
        live = torch.where(received.topk_ids >= 0, received.topk_weights, 0).sum(1, keepdim=True)
        y = parallel.combine(received.x * live, received.handle)
        return _gradients(y, given.upstream, given.x, given.weights)

    return run


class _Move(torch.autograd.Function):
    """Rows to the ranks, so many to each, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, receive: list[int], send: list[int]) -> Tensor:
        ctx.sizes = send, receive
        moved = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(moved, rows.contiguous(), receive, send)
        return moved

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Move.apply(grad, *ctx.sizes), None, None


def _eager_dispatch(given: Tokens) -> Values:
    """A copy of a token for each of its experts, added up at home."""
    owner = (given.ids // (_EXPERTS // given.world)).flatten().long()
    counts = torch.bincount(owner, minlength=given.world)
    incoming = torch.empty_like(counts)
    dist.all_to_all_single(incoming, counts)
    receive, send = incoming.tolist(), counts.tolist()
    slots = owner.argsort(stable=True)
    token = slots // _TOP_K
    rows = _Move.apply(given.x[token], receive, send)
    weights = _Move.apply(given.weights.reshape(-1, 1)[slots], receive, send)
    back = _Move.apply(rows * weights, send, receive)
    y = torch.zeros_like(given.x).index_add(0, token, back)
    return _gradients(y, given.upstream, given.x, given.weights)


# --- all -------------------------------------------------------------------------------------------------------------

Run = Callable[[Any], Values]
PROVIDERS: dict[str, dict[str, tuple[str, Run]]] = {
    HEAD: {"ours": ("ours", _ours_head), "eager": ("eager", _eager_head)},
    DISPATCH: {
        "ours": ("ours", _ours_dispatch("alltoall")),
        "ours, all-gather": ("ours", _ours_dispatch("allgather")),
        "eager": ("eager", _eager_dispatch),
    },
}


def inputs(op: str, rank: int, world: int) -> Any:
    """What this rank holds."""
    return (_head if op == HEAD else _tokens)(rank, world)

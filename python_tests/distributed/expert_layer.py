"""A layer of experts written from its formula, and instruments, for tests of expert parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels.distributed import Dispatched, ExpertParallel


def experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, up: Tensor, down: Tensor, first: int = 0) -> Tensor:
    """sum_k w_k tanh(x up_e^T) down_e^T over the experts e = first, first + 1, ... that `up` and `down` are of."""
    y = torch.zeros_like(x)
    for index in range(up.shape[0]):
        scale = torch.where(topk_ids == first + index, topk_weights, 0).sum(1, keepdim=True).to(x.dtype)
        y = y + scale * (torch.tanh(x @ up[index].T) @ down[index].T)
    return y


def layer(parallel: ExpertParallel, x: Tensor, weights: Tensor, ids: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same over the ranks; `up` and `down` are of this rank's experts."""
    received = parallel.dispatch(x, (weights, ids))
    y = experts(received.x, received.topk_weights, received.topk_ids, up, down, parallel.local_range[0])
    return parallel.combine(y, received.handle)


class Copies:
    """An `ExpertExchange` as most trainers have it: a row for each of a token's experts, added up at home."""

    def __init__(self, num_experts: int, group: Any) -> None:
        self.group, self.world = group, dist.get_world_size(group)
        self.per_rank = num_experts // self.world

    def dispatch(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Dispatched:
        owner = torch.where(topk_ids >= 0, topk_ids // self.per_rank, self.world).reshape(-1).long()
        counts = torch.zeros(self.world + 1, dtype=torch.int64).scatter_add_(0, owner, torch.ones_like(owner))[:-1]
        receive = torch.empty_like(counts)
        dist.all_to_all_single(receive, counts, group=self.group)
        splits = (receive.tolist(), counts.tolist())
        slots = owner.argsort(stable=True)[: sum(splits[1])]
        token = slots // topk_ids.shape[1]
        ids = _Move.apply(topk_ids.reshape(-1, 1)[slots].to(torch.int32), self.group, *splits)
        weights = _Move.apply(topk_weights.reshape(-1, 1)[slots], self.group, *splits)
        return Dispatched(_Move.apply(x[token], self.group, *splits), weights, ids, (token, x.shape[0], splits))

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        token, tokens, (receive, send) = handle
        rows = _Move.apply(y, self.group, send, receive)
        return y.new_zeros(tokens, y.shape[1]).index_add(0, token, rows)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any, receive: list[int], send: list[int]) -> Tensor:
        ctx.back = (group, send, receive)
        moved = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(moved, rows.contiguous(), receive, send, group=group)
        return moved

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Move.apply(grad, *ctx.back), None, None, None


class Message(NamedTuple):
    """One collective, as this rank saw it."""

    name: str
    width: int  # of a row; 1 for counts
    rows_to_others: int


@contextmanager
def recorded(group: Any = None) -> Iterator[list[Message]]:
    """The collectives that are called meanwhile."""
    found: list[Message] = []
    gathering = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    originals = {name: getattr(dist, name) for name in ("all_to_all_single", gathering)}
    rank, world = dist.get_rank(group), dist.get_world_size(group)

    def all_to_all(output: Tensor, values: Tensor, receive: Any = None, send: Any = None, **options: Any) -> Any:
        assert output.is_contiguous()
        assert values.is_contiguous()
        kept = len(values) // world if send is None else send[rank]
        found.append(Message("all_to_all", values.shape[1] if values.ndim == 2 else 1, len(values) - kept))
        return originals["all_to_all_single"](output, values, receive, send, **options)

    def all_gather(output: Tensor, values: Tensor, **options: Any) -> Any:
        found.append(Message("all_gather", values.shape[-1], len(values) * (world - 1)))
        return originals[gathering](output, values, **options)

    dist.all_to_all_single = all_to_all
    setattr(dist, gathering, all_gather)
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: values, and shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(word in func.name() for word in self.WAITING)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> HostReads:
        self._tolist, self._compiling = Tensor.tolist, torch.compiler.is_compiling

        def tolist(tensor: Tensor) -> Any:
            self.count += 1
            return self._tolist(tensor)

        Tensor.tolist = tolist
        torch.compiler.is_compiling = lambda: True  # looking is free on the CPU: leave those checks out
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Tensor.tolist, torch.compiler.is_compiling = self._tolist, self._compiling

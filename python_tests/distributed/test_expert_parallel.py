"""Experts that are spread over ranks give what one process with all experts gives, values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from grpo_kernels.distributed import ExpertParallel
from python_tests.distributed.expert_layer import Copies, HostReads, experts, layer, recorded
from python_tests.distributed.launch import run

EXPERTS, WIDTH, INNER = 8, 7, 31  # unlike any number of tokens
NAMES = ("y", "x", "weights", "up", "down")


class Case(NamedTuple):
    """Routes of a batch; those of rank r are made from the tokens of that rank."""

    name: str
    tokens: tuple[int, int, int, int]  # of each rank
    top_k: int = 3
    lowest: int = 0  # experts are drawn from here
    highest: int = EXPERTS
    masked: float = 0.0  # part of the slots
    equal: bool = False  # an expert may stand in several slots
    ids_dtype: torch.dtype = torch.int32
    max_tokens: int | None = None
    weights_only: bool = False  # x has no gradient

    def inputs(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, topk_weights, topk_ids and the gradient of the output."""
        generator = torch.Generator().manual_seed(100 + rank)
        tokens = self.tokens[rank]
        draws = torch.rand(tokens, self.highest - self.lowest, generator=generator)
        ids = draws.argsort(dim=1)[:, : self.top_k] + self.lowest
        if self.equal:
            ids = ids[:, :1].repeat(1, self.top_k)
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < self.masked, -1)
        x = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
        weights = torch.rand(tokens, self.top_k, generator=generator, dtype=torch.float64)
        grad = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
        return x.requires_grad_(not self.weights_only), weights.requires_grad_(), ids.to(self.ids_dtype), grad


CASES = [
    Case("equal shares", (5, 5, 5, 5)),
    Case("uneven shares", (3, 7, 1, 4), max_tokens=8),
    Case("ranks without tokens", (0, 6, 3, 0), max_tokens=6),
    Case("all tokens to rank 0", (4, 2, 0, 3), top_k=2, highest=2, max_tokens=4),
    Case("all tokens to the last rank", (2, 2, 2, 2), top_k=1, lowest=7, ids_dtype=torch.int64),
    Case("masked", (6, 6, 6, 6), top_k=4, masked=0.5),
    Case("masked altogether", (2, 2, 2, 2), masked=1.0),
    Case("no tokens at all", (0, 0, 0, 0)),
    Case("one expert in all slots", (3, 3, 3, 3), equal=True),
    Case("every expert", (3, 0, 2, 5), top_k=EXPERTS, max_tokens=5),
    Case("router alone", (4, 4, 4, 4), weights_only=True),
]


def _experts() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(EXPERTS, INNER, WIDTH, generator=generator, dtype=torch.float64)
    down = torch.randn(EXPERTS, WIDTH, INNER, generator=generator, dtype=torch.float64)
    return up.requires_grad_(), down.requires_grad_()


def _local_experts(parallel: ExpertParallel) -> tuple[Tensor, Tensor]:
    first, last = parallel.local_range
    up, down = (weight.detach()[first:last].clone().requires_grad_() for weight in _experts())
    return up, down


Run = Callable[..., Tensor]


def _run(parallel: ExpertParallel, case: Case, rank: int, function: Run = layer) -> dict[str, Tensor]:
    """The output of this rank's tokens and every gradient."""
    x, weights, ids, grad = case.inputs(rank)
    up, down = _local_experts(parallel)
    y = function(parallel, x, weights, ids, up, down)
    y.backward(grad)
    found = (y.detach(), x.grad, weights.grad, up.grad, down.grad)
    return {name: tensor for name, tensor in zip(NAMES, found, strict=True) if tensor is not None}


def _dense(case: Case, ranks: list[int]) -> dict[str, Tensor]:
    """One process with the tokens of all ranks and all experts."""
    x, weights, ids, grad = (torch.cat(parts).detach() for parts in zip(*map(case.inputs, ranks), strict=True))
    x.requires_grad_(not case.weights_only), weights.requires_grad_()
    up, down = _experts()
    y = experts(x, weights, ids, up, down)
    y.backward(grad)
    found = (y.detach(), x.grad, weights.grad, up.grad, down.grad)
    return {name: tensor for name, tensor in zip(NAMES, found, strict=True) if tensor is not None}


def _crossing(case: Case, rank: int, world: int) -> tuple[int, int]:
    """Rows that leave this rank: (token, other rank) pairs, and (token, expert of another rank) pairs."""
    ids, per_rank = case.inputs(rank)[2].tolist(), EXPERTS // world
    pairs = [{e // per_rank for e in row if e >= 0} - {rank} for row in ids]
    copies = [e for row in ids for e in row if e >= 0 and e // per_rank != rank]
    return sum(map(len, pairs)), len(copies)


# on each rank ---------------------------------------------------------------------------------------------------


def _rank(rank: int, world: int) -> dict[str, Any]:
    """Everything in one set of processes, because starting them takes longest."""
    results: dict[str, Any] = {}
    for case in CASES:
        results[f"{case.name} alltoall"] = _run(ExpertParallel(EXPERTS, mode="alltoall"), case, rank)
        gathering = ExpertParallel(EXPERTS, dist.group.WORLD, "allgather", max_tokens=case.max_tokens)
        results[f"{case.name} allgather"] = _run(gathering, case, rank)
        custom = ExpertParallel(EXPERTS, exchange=Copies(EXPERTS, dist.group.WORLD))
        results[f"{case.name} copies"] = _run(custom, case, rank)
        _check_traffic(case, rank, world)
    for mode in ("alltoall", "allgather"):
        parallel = ExpertParallel(EXPERTS, mode=mode)
        _check_bits(parallel, rank, world)
        _check_host_reads(parallel, rank)
        _check_checkpoint(parallel, rank)
        _check_disconnected(parallel, rank)
        _check_wrong_ids(parallel, rank)
    _check_group_of_one(rank, world)
    _check_arguments(rank, world)
    if world == 2:
        _check_compiled(rank)
    else:
        results["groups"] = _of_groups(rank)
    return results


def _check_traffic(case: Case, rank: int, world: int) -> None:
    """A token crosses to a rank at most once, there and back, in the forward and in the backward."""
    rows, copies = _crossing(case, rank, world)
    parallel = ExpertParallel(EXPERTS, mode="alltoall")
    with recorded() as messages:
        _run(parallel, case, rank)
    names = {message.name for message in messages}
    assert names == {"all_to_all"}
    there = [message.rows_to_others for message in messages if message.width == WIDTH]
    assert there[0] == rows
    assert len(messages) == (6 if case.weights_only else 7)  # counts, ids and weights, x; y; then their gradients
    assert messages[0][1:] == (1, world - 1)
    assert messages[1][1:] == (2 * case.top_k, rows)
    assert there == ([rows, there[1], rows] if case.weights_only else [rows, there[1], rows, there[1]])
    with recorded() as messages:
        _run(ExpertParallel(EXPERTS, exchange=Copies(EXPERTS, dist.group.WORLD)), case, rank)
    assert next(message.rows_to_others for message in messages if message.width == WIDTH) == copies
    with recorded() as messages:
        _run(ExpertParallel(EXPERTS, mode="allgather", max_tokens=8), case, rank)
    assert [message for message in messages if message.name == "all_gather" and message.width == WIDTH] == [
        ("all_gather", WIDTH, 8 * (world - 1))
    ] * 2
    assert len(messages) == (5 if case.weights_only else 6)


def _check_bits(parallel: ExpertParallel, rank: int, world: int) -> None:
    """Rows travel as they are; sums over ranks are rounded once, whatever the dtype."""
    case = CASES[0]
    x, weights, ids, grad = case.inputs(rank)
    goes = torch.stack([((ids >= 0) & (ids // (EXPERTS // world) == other)).any(1) for other in range(world)], 1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        factors = [torch.tensor(0.37 * (other + 1), dtype=dtype) for other in range(world)]

        def expected(values: Tensor, wide: torch.dtype = wide, factors: list[Tensor] = factors) -> Tensor:
            total = torch.zeros(values.shape, dtype=wide)
            for other in range(world):
                total += torch.where(goes[:, other, None], (values * factors[other]).to(wide), 0)
            return total.to(values.dtype)

        leaf, up = x.detach().to(dtype).requires_grad_(), grad.to(dtype)
        chosen = weights.detach().to(dtype).requires_grad_()
        received = parallel.dispatch(leaf, (chosen, ids))
        assert received.x.is_contiguous()
        assert received.topk_weights.dtype == dtype
        assert received.topk_ids.dtype == torch.int32
        here = received.topk_ids >= 0
        assert received.topk_weights[~here].count_nonzero() == 0
        first, last = parallel.local_range
        assert ((received.topk_ids[here] >= first) & (received.topk_ids[here] < last)).all()
        y = parallel.combine(received.x * here.any(1, keepdim=True) * factors[rank], received.handle)
        assert y.dtype == dtype
        assert y.equal(expected(leaf.detach()))
        received.topk_weights.backward(received.topk_weights.detach() + 1, retain_graph=True)
        assert chosen.grad is not None
        assert chosen.grad.equal(torch.where(ids >= 0, chosen.detach() + 1, 0))
        leaf.grad = None
        y.t().backward(up.t())  # neither row is dense
        assert leaf.grad is not None
        assert leaf.grad.equal(expected(up))


def _check_host_reads(parallel: ExpertParallel, rank: int) -> None:
    x, weights, ids, grad = CASES[0].inputs(rank)
    up, down = _local_experts(parallel)
    with HostReads() as reads:
        y = layer(parallel, x, weights, ids, up, down)
    assert reads.count == (1 if type(parallel.exchange).__name__ == "AllToAll" else 0)
    with HostReads() as reads:
        y.backward(grad)
    assert reads.count == 0


def _check_checkpoint(parallel: ExpertParallel, rank: int) -> None:
    """The recomputation calls the same collectives on every rank, also on one without tokens."""
    for case in (CASES[0], CASES[5]) if type(parallel.exchange).__name__ == "AllGather" else CASES[:4]:
        expected = _run(parallel, case, rank)
        for reentrant in (False, True):

            def again(*arguments: Any, reentrant: bool = reentrant) -> Tensor:
                output = checkpoint(layer, *arguments, use_reentrant=reentrant)
                assert isinstance(output, Tensor)
                return output * 1

            found = _run(parallel, case, rank, again)
            assert found.keys() == expected.keys()
            assert all(found[name].equal(expected[name]) for name in expected)


def _check_disconnected(parallel: ExpertParallel, rank: int) -> None:
    """Experts of rank 0 that make nothing of their rows, without a graph, leave nobody waiting."""
    x, weights, ids, grad = CASES[0].inputs(rank)
    up, down = _local_experts(parallel)
    received = parallel.dispatch(x, (weights, ids))
    y = experts(received.x, received.topk_weights, received.topk_ids, up, down, parallel.local_range[0])
    y = parallel.combine(torch.zeros_like(received.x) if rank == 0 else y, received.handle)
    y.backward(grad)
    assert x.grad is not None
    assert weights.grad is not None
    per_rank = parallel.local_range[1] - parallel.local_range[0]
    assert (weights.grad[ids < per_rank] == 0).all()
    assert (weights.grad[ids >= per_rank] != 0).all()


def _check_wrong_ids(parallel: ExpertParallel, rank: int) -> None:
    x, weights, ids, _ = CASES[0].inputs(rank)
    wrong = ids.clone()
    if rank == 1:
        wrong[2, 1] = EXPERTS
    expected = rf"ExpertParallel.dispatch: topk_ids\[2, 1\] of rank 1 must be < {EXPERTS}, .* got {EXPERTS}$"
    if type(parallel.exchange).__name__ == "AllToAll":
        expected = rf"topk_ids\[2, 1\] must be < {EXPERTS}, the number of experts, got {EXPERTS}$"
        if rank != 1:
            expected = rf"topk_ids must be < {EXPERTS}, the number of experts, got others on rank 1$"
    with pytest.raises(ValueError, match=expected):
        parallel.dispatch(x, (weights, wrong))
    assert parallel.dispatch(x, (weights, ids)).x.shape[1] == WIDTH  # the ranks are still in step


def _check_group_of_one(rank: int, world: int) -> None:
    groups = [dist.new_group([member]) for member in range(world)]
    case = CASES[5]
    expected = _dense(case, [rank])
    for mode in ("auto", "alltoall", "allgather"):
        parallel = ExpertParallel(EXPERTS, groups[rank], mode, max_tokens=99)
        assert parallel.local_range == (0, EXPERTS)
        with recorded() as messages:
            found = _run(parallel, case, rank)
        assert messages == []
        assert all(found[name].equal(expected[name]) for name in NAMES)
        x, weights, ids, _ = case.inputs(rank)
        for far in (-2, -(2**31) - 1, -(2**32), -(2**32) + 1, -(2**63)):  # not an expert's where int32 wraps round
            sent = parallel.dispatch(x, (weights, torch.full_like(ids, far, dtype=torch.int64)))
            assert sent.topk_ids.dtype == torch.int32
            assert (sent.topk_ids == -1).all()
        with pytest.raises(ValueError, match=rf"topk_ids\[0, 0\] must be < {EXPERTS}"):
            parallel.dispatch(x, (weights, ids.fill_(EXPERTS)))
    other = groups[(rank + 1) % world]
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup that this rank"):
        ExpertParallel(EXPERTS, other)


def _check_arguments(rank: int, world: int) -> None:
    for experts_, match in ((world + 1, f"multiple of {world}, the ranks of the group, got"), (0, ">= 1")):
        with pytest.raises(ValueError, match=match):
            ExpertParallel(experts_)
    with pytest.raises(ValueError, match="mode must be one of 'auto', 'alltoall', 'allgather', got 'deepep'"):
        ExpertParallel(EXPERTS, None, "deepep")
    with pytest.raises(ValueError, match="exchange takes the place of a mode, got mode='alltoall'"):
        ExpertParallel(EXPERTS, None, "alltoall", exchange=Copies(EXPERTS, dist.group.WORLD))
    with pytest.raises(ValueError, match="max_tokens must be >= 1"):
        ExpertParallel(EXPERTS, max_tokens=0)
    assert repr(ExpertParallel(EXPERTS)) == f"ExpertParallel(num_experts=8, ranks={world}, exchange=AllToAll)"
    few = ExpertParallel(EXPERTS, max_tokens=2)
    assert type(few.exchange).__name__ == "AllGather"
    assert copy.deepcopy(few) is few
    x, weights, ids = torch.zeros(3, WIDTH), torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="x must have at most max_tokens = 2 rows, got 3"):
        few.dispatch(x, (weights, ids))
    part = slice(0, 3 if rank == 0 else 2)
    with pytest.raises(ValueError, match=r"as many rows on every rank, got \[3, 2.*; give max_tokens"):
        ExpertParallel(EXPERTS, mode="allgather").dispatch(x[part], (weights[part], ids[part]))
    parallel = ExpertParallel(EXPERTS)
    for arguments, error, match in (
        ((x, weights), TypeError, "router_output must be a RouterOutput"),
        ((x[0], (weights, ids)), ValueError, r"x must have shape \[T, H\]"),
        ((x, (weights[:2], ids)), ValueError, r"topk_weights must have shape \[T, K\] = \[3, 2\], got \[2, 2\]"),
        ((x[:2], (weights, ids)), ValueError, r"topk_ids must have shape \[T, K\] = \[2, 2\], got \[3, 2\]"),
        ((x, (weights, ids.short())), TypeError, "topk_ids must have dtype int64, int32, got int16"),
        ((x.int(), (weights, ids)), TypeError, "x must have dtype .* got int32"),
        ((x, (weights, ids.to("meta"))), ValueError, "topk_ids must be on cpu like x, got meta"),
    ):
        with pytest.raises(error, match=match):
            parallel.dispatch(*arguments)
    for chosen in (parallel, few):
        received = chosen.dispatch(x[:2], (weights[:2], ids[:2]))
        with pytest.raises(ValueError, match=rf"y must have shape \[N, H\] = \[{len(received.x)}, {WIDTH}\]"):
            chosen.combine(torch.zeros(len(received.x) + 1, WIDTH), received.handle)


def _check_compiled(rank: int) -> None:
    """Without a host read, one graph; with it, a graph between the two exchanges. The same for all counts."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def function(parallel: ExpertParallel, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        received = parallel.dispatch(x, (weights, ids))
        return parallel.combine(received.x.sin() * received.topk_weights.sum(1, keepdim=True), received.handle)

    for mode in ("allgather", "alltoall"):
        parallel = ExpertParallel(EXPERTS, mode=mode)
        torch._dynamo.reset()
        graphs = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, backend=graphs, dynamic=True, fullgraph=mode == "allgather")
        counts = set()
        for case in (CASES[0], CASES[8]):
            x, weights, ids, grad = case.inputs(rank)
            results = [call(parallel, x, weights, ids) for call in (function, compiled)]
            gradients = [torch.autograd.grad(y, (x, weights), grad) for y in results]
            for eager, found in zip(*zip(results, gradients, strict=True), strict=True):
                torch.testing.assert_close(found, eager, rtol=1e-14, atol=1e-14)
            counts.add(graphs.frame_count)
        assert len(counts) == 1, counts


def _of_groups(rank: int) -> dict[str, Tensor]:
    """Two groups of two ranks, side by side: rows and columns of a mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    return {
        f"{dim} {mode}": _run(ExpertParallel(EXPERTS, mesh[dim].get_group(), mode, max_tokens=8), CASES[1], rank)
        for dim in ("ep", "dp")
        for mode in ("alltoall", "allgather")
    }


# against one process --------------------------------------------------------------------------------------------


def _assert_equal(name: str, found: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        whole = torch.cat([part[key] for part in found])
        assert whole.shape == value.shape, (name, key)
        scale = value.abs().max().item() if value.numel() else 1.0
        torch.testing.assert_close(whole, value, rtol=0, atol=1e-13 * max(scale, 1.0), msg=f"{name}: {key}")
    assert all(part.keys() == expected.keys() for part in found)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_equal_one_process(world: int) -> None:
    results = run(world, _rank)
    for case in CASES:
        expected = _dense(case, list(range(world)))
        for way in ("alltoall", "allgather", "copies"):
            _assert_equal(f"{case.name} {way}", [result[f"{case.name} {way}"] for result in results], expected)
    if world == 4:
        for dim, groups in (("ep", ([0, 1], [2, 3])), ("dp", ([0, 2], [1, 3]))):
            for ranks in groups:
                expected = _dense(CASES[1], ranks)
                for mode in ("alltoall", "allgather"):
                    _assert_equal(f"{dim} {mode}", [results[r]["groups"][f"{dim} {mode}"] for r in ranks], expected)


def test_without_process_groups() -> None:
    with pytest.raises(
        ValueError, match=r"ExpertParallel: process_group needs torch\.distributed; call init_process_group first"
    ):
        ExpertParallel(EXPERTS)

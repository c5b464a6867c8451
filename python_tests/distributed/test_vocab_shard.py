"""A vocabulary spread over ranks gives every rank what one process with the whole vocabulary gets."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from grpo_kernels import token_log_probs
from grpo_kernels.distributed import VocabShard
from python_tests.distributed.launch import run

INF, NAN = float("inf"), float("nan")
EVERY_OUTPUT = ("entropy", "sum_squared_probs", "top1_ids")
ROWS = (2, 7)
VOCAB = 203

# Ends of the ranks' parts: uneven, the last short of a multiple of the others; with empty parts; one rank has it all.
CUTS = {
    2: [(0, 120, 203), (0, 0, 203), (0, 203, 203)],
    4: [(0, 51, 102, 153, 203), (0, 5, 5, 190, 203), (0, 0, 203, 203, 203)],
}


class Case(NamedTuple):
    dtype: torch.dtype = torch.float32
    cuts: int = 0  # which of CUTS
    padding: int = 0  # columns of garbage behind each part
    in_place: bool = False
    ids_dtype: torch.dtype = torch.int64
    spoil: bool = False  # masked garbage, impossible tokens
    options: tuple[tuple[str, Any], ...] = ()

    def arguments(self) -> dict[str, Any]:
        """What one process with all columns is called with, beside `options`."""
        generator = torch.Generator().manual_seed(5)
        logits = torch.randn(*ROWS, VOCAB, generator=generator) * 3
        ids = torch.randint(VOCAB, ROWS, generator=generator)
        logits[0, 0, 3], logits[0, 0, 150] = 11.0, 11.0  # equal on two ranks: the lowest id is the top one
        logits[1, 6] += 300.0  # a common offset
        mask = None
        if self.spoil:
            mask = torch.rand(ROWS, generator=generator) < 0.7
            mask[0, 1], mask[0, 2], mask[0, 3] = False, True, True
            logits[~mask], ids[~mask] = NAN, 2**30
            ids[1, 0], logits[1, 0] = -100, INF
            logits[0, 2, :120], ids[0, 2] = -INF, 150  # impossible on whole ranks
            logits[0, 3, 100:], ids[0, 3] = -INF, 7
        made: dict[str, Any] = {"logits": logits.to(self.dtype), "token_ids": ids.to(self.ids_dtype), "mask": mask}
        made.update(self.options)
        if made.get("temperature") == "per row":
            made["temperature"] = torch.rand(ROWS, generator=generator) + 0.5
        return made


CASES = [
    Case(),
    Case(cuts=1, padding=3, spoil=True),
    Case(cuts=2, options=(("softcap", 6.0), ("logit_scale", -1.3), ("temperature", 0.7))),
    Case(padding=5, in_place=True, spoil=True, ids_dtype=torch.int32),
    Case(cuts=1, in_place=True, padding=2, options=(("temperature", "per row"),)),
    Case(spoil=True, options=(("temperature", "per row"), ("softcap", 9.0))),
    Case(torch.float64, padding=4, spoil=True),
    Case(torch.bfloat16, padding=1),
]


def _upstreams() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(ROWS, generator=generator), torch.randn(ROWS, generator=generator)


def _call(arguments: dict[str, Any], in_place: bool, shard: VocabShard | None) -> list[Tensor]:
    """Every output and the gradient of the logits."""
    leaf = arguments["logits"].clone().requires_grad_()
    logits = leaf * 1 if in_place else leaf
    chosen = {**arguments, "logits": logits, "outputs": EVERY_OUTPUT, "vocab_shard": shard}
    out = token_log_probs(**chosen, inplace_backward=in_place)
    up, up_entropy = _upstreams()
    loss = (out.log_probs * up).sum() + (out.entropy * up_entropy).sum()
    gradient = torch.autograd.grad(loss, leaf, retain_graph=in_place)[0]
    if in_place:
        assert torch.equal(logits.detach(), gradient)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with torch.no_grad():
        again = token_log_probs(**{**chosen, "logits": leaf.detach()})
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
    return [*(t.detach() for t in out), gradient]


def _part(arguments: dict[str, Any], start: int, end: int, padding: int) -> dict[str, Any]:
    logits = arguments["logits"][..., start:end]
    garbage = logits.new_full((*logits.shape[:-1], padding), NAN)
    return {**arguments, "logits": torch.cat([logits, garbage], -1)}


def _rank(rank: int, world: int) -> list[list[Tensor]]:
    results = []
    for case in CASES:
        cuts = CUTS[world][case.cuts]
        shard = VocabShard(cuts[rank], cuts[rank + 1], dist.group.WORLD if case.padding else None)
        part = _part(case.arguments(), shard.start, shard.end, case.padding)
        results.append(_call(part, case.in_place, shard))
    _check_faults(rank, world)
    _check_empty_batch(rank, world)
    _check_dtensors(rank, world)
    return results


def _check_faults(rank: int, world: int) -> None:
    shard = VocabShard(rank * 10, rank * 10 + 10, None)
    logits = torch.zeros(3, 10, requires_grad=True)
    ids = torch.tensor([1, 10 * world, 99])
    with pytest.raises(ValueError, match=rf"token_ids\[1\] must be the id of a token .* got {10 * world}"):
        token_log_probs(logits, ids, vocab_shard=shard)
    out = token_log_probs(logits, ids, mask=torch.tensor([1, 0, 0]), vocab_shard=shard)  # the ranks are still in step
    torch.testing.assert_close(out.log_probs[0].exp().item(), 1 / (10 * world))
    overlapping = VocabShard(0, 5 + rank, None)
    with pytest.raises(ValueError, match=rf"token_ids\[0\] must be .* one rank's .* got 1, which {world} ranks hold"):
        token_log_probs(logits, ids, vocab_shard=overlapping)
    with torch.no_grad():  # NaN and +inf on one rank are NaN on every rank, and so is nothing but -inf
        logits = torch.zeros(4, 10)
        logits[1:3, 5] = torch.tensor([NAN, INF]) if rank == 1 else 0.0
        logits[3] = -INF
        out = token_log_probs(logits, torch.zeros(4).long(), outputs=EVERY_OUTPUT, vocab_shard=shard)
    for value in out[:3]:
        assert value.isnan().tolist() == [False, True, True, True]
    assert out.top1_ids.tolist() == [0, -1, -1, -1]
    with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup .* got int"):
        token_log_probs(logits[:3], ids, vocab_shard=shard._replace(process_group=3))


def _check_empty_batch(rank: int, world: int) -> None:
    shard = VocabShard(rank * 10, rank * 10 + 10, None)
    logits = torch.zeros(0, 10, requires_grad=True)
    out = token_log_probs(logits, torch.zeros(0).long(), outputs=EVERY_OUTPUT, vocab_shard=shard)
    assert [tuple(value.shape) for value in out] == [(0,)] * 4
    assert torch.autograd.grad(out.log_probs.sum(), logits)[0].shape == (0, 10)


def _check_dtensors(rank: int, world: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    for rows in (10, 9, 2):  # uneven and, where there are more ranks than rows, empty parts
        weight = distribute_tensor(torch.arange(rows * 3.0).view(rows, 3), mesh, [Shard(0)])
        shard = VocabShard.from_dtensor(weight, "tp")
        assert shard.end - shard.start == weight.to_local().shape[0]
        assert torch.equal(weight.full_tensor()[shard.start : shard.end], weight.to_local())
        assert dist.get_world_size(shard.process_group) == world
        assert shard.reduce_hidden_grad
    logits = distribute_tensor(torch.randn(4, 23, generator=torch.Generator().manual_seed(0)), mesh, [Shard(1)])
    shard = VocabShard.from_dtensor(logits, 0, dim=-1, reduce_hidden_grad=False)
    ids = torch.tensor([0, 22, 11, 12])
    out = token_log_probs(logits.to_local(), ids, vocab_shard=shard)
    torch.testing.assert_close(out.log_probs, token_log_probs(logits.full_tensor(), ids).log_probs)
    with pytest.raises(TypeError, match=r"logits must not be a DTensor.*S\(1\).*VocabShard.from_dtensor"):
        token_log_probs(logits, ids)
    for wrong in ([Shard(1)], [Replicate()]):
        weight = distribute_tensor(torch.zeros(8, 4), mesh, wrong)
        with pytest.raises(ValueError, match=r"VocabShard.from_dtensor: weight must be placed as Shard\(0\)"):
            VocabShard.from_dtensor(weight)
    with pytest.raises(TypeError, match="weight must be a DTensor, got Tensor"):
        VocabShard.from_dtensor(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="mesh_dim must be one of 'tp', 0, got 'dp'"):
        VocabShard.from_dtensor(weight, "dp")
    with pytest.raises(ValueError, match="mesh_dim must be < 1"):
        VocabShard.from_dtensor(weight, 1)
    if world == 4:
        _check_mesh_of_two_dimensions(rank)
    else:
        for dtype in (torch.float32, torch.float64):
            _check_compiled(rank, dtype)


def _check_compiled(rank: int, dtype: torch.dtype) -> None:
    case = Case(spoil=True, padding=2, options=(("softcap", 6.0), ("temperature", 0.7)))
    cuts = CUTS[2][0]
    shard = VocabShard(cuts[rank], cuts[rank + 1], dist.group.WORLD)
    part = _part(case.arguments(), shard.start, shard.end, case.padding)
    part["token_ids"][1, 1] = VOCAB  # of no rank: a graph cannot raise
    part["mask"][1, 1] = True

    def call(logits: Tensor, ids: Tensor, mask: Tensor) -> Any:
        options = {"outputs": EVERY_OUTPUT, **dict(case.options)}
        return token_log_probs(logits, ids, mask=mask, vocab_shard=shard, **options)

    leaf = part["logits"].to(dtype).requires_grad_()
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(leaf, part["token_ids"], part["mask"])
    gradient = torch.autograd.grad(out.log_probs.nansum() + out.entropy.nansum(), leaf)[0]
    for value in out[:3]:
        assert value[1, 1].isnan()
    part["mask"][1, 1] = False
    eager = call(leaf, part["token_ids"], part["mask"])
    expected = torch.autograd.grad(eager.log_probs.sum() + eager.entropy.sum(), leaf)[0]
    others = torch.ones(ROWS, dtype=torch.bool)
    others[1, 1] = False
    assert all(torch.equal(a[others], b[others]) for a, b in zip(out, eager, strict=True))
    assert expected[others].any()
    assert torch.equal(gradient[others], expected[others])


def _check_mesh_of_two_dimensions(rank: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    weight = distribute_tensor(torch.randn(7, 3), mesh, [Replicate(), Shard(0)])
    shard = VocabShard.from_dtensor(weight, 1)
    assert (shard.start, shard.end) == ((0, 4), (4, 7))[rank % 2]
    assert dist.get_process_group_ranks(shard.process_group) == [rank // 2 * 2, rank // 2 * 2 + 1]
    for dimension in ("tp", "dp"):
        weight = distribute_tensor(torch.randn(8, 3), mesh, [Shard(0), Shard(0)])
        with pytest.raises(ValueError, match=r"Replicate\(\) on all others"):
            VocabShard.from_dtensor(weight, dimension)


def assert_equal_to_one_process(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal to `tolerance` of the largest number; NaN and infinities lie at the same places."""
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), name
        return
    numbers = expected.isfinite()
    torch.testing.assert_close(actual[~numbers], expected[~numbers], rtol=0, atol=0, equal_nan=True)
    error = torch.where(numbers, actual.double() - expected.double(), 0.0).abs().max()
    assert error <= tolerance * expected[numbers].double().abs().amax(), (name, float(error))


@pytest.mark.parametrize("world", [2, 4])
def test_log_probs_of_a_spread_vocabulary(world: int) -> None:
    results = run(world, _rank)
    for index, case in enumerate(CASES):
        whole = _call(case.arguments(), False, None)
        # The same arithmetic in another order. A bf16 gradient may round to the other neighbour.
        tolerance = {torch.float64: 1e-14, torch.bfloat16: 2**-8}.get(case.dtype, 1e-6)
        cuts = CUTS[world][case.cuts]
        for rank in range(world):
            *values, gradient = results[rank][index]
            for name, actual, expected in zip(("log_probs", *EVERY_OUTPUT), values, whole, strict=False):
                assert actual.dtype == expected.dtype
                assert_equal_to_one_process(f"{case} {name}", actual, expected, min(tolerance, 1e-6))
            own = cuts[rank + 1] - cuts[rank]
            assert gradient[..., own:].count_nonzero() == 0
            expected = torch.zeros_like(whole[4])
            expected[..., cuts[rank] : cuts[rank + 1]] = gradient[..., :own]
            expected[..., : cuts[rank]] = whole[4][..., : cuts[rank]]
            expected[..., cuts[rank + 1] :] = whole[4][..., cuts[rank + 1] :]
            assert_equal_to_one_process(f"{case} gradient", expected, whole[4], tolerance)

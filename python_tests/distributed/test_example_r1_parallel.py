"""What the training example asks of its ranks: parts, sums, gradients with experts of one's own, whole checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from examples.r1.parallel import Ranks
from examples.r1.shards import clip_grad_norm_, full_state, own_state, shard_names, sum_gradients
from grpo_kernels import MoE
from grpo_kernels.distributed import ExpertParallel
from python_tests.distributed.launch import run

CPU = torch.device("cpu")
WORLD, EXPERTS, TOP_K, WIDTH, INNER = 2, 4, 2, 6, 5
ROWS = 8  # of both ranks together
MAX_NORM = 0.01


class Model(nn.Module):
    """A layer of experts between two others, one that only rank 1 uses, and one that nobody does."""

    def __init__(self, parallel: ExpertParallel | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.mlp = MoE(WIDTH, INNER, EXPERTS, TOP_K, shared_intermediate_size=4, expert_parallel=parallel)
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.never = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        x = self.mlp(self.first(x)).hidden
        return self.sometimes(x) if both else x


def _model(parallel: ExpertParallel | None, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    whole = Model().to(dtype)
    if parallel is None:
        return whole
    part = Model(parallel).to(dtype)
    ranks = Ranks(parallel.local_range[0] * WORLD // EXPERTS, WORLD, dist.group.WORLD, CPU)
    part.load_state_dict(own_state(ranks, whole.state_dict(), shard_names(part)))
    return part


def _rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    values, targets = torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return values, targets


def _loss(model: Model, rows: slice, dtype: torch.dtype, both: bool) -> Tensor:
    """Of some rows, divided by the number of all."""
    x, target = _rows(dtype)
    return F.mse_loss(model(x[rows], both), target[rows], reduction="sum") / ROWS


def _train(ranks: Ranks, parallel: ExpertParallel | None, dtype: torch.dtype) -> dict[str, Any]:
    """Three steps. Returns the gradients of the first, as summed and as clipped, and the state after the last."""
    model = _model(parallel, dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    shards = shard_names(model)
    found: dict[str, Any] = {"shards": sorted(shards)}
    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        if ranks.world == 1:  # the second half of the rows alone passes the layer that only rank 1 uses
            halves = [_loss(model, slice(0, 4), dtype, False), _loss(model, slice(4, 8), dtype, True)]
            torch.autograd.backward(halves[0] + halves[1])
        else:
            _loss(model, ranks.part("rows", ROWS), dtype, ranks.rank == 1).backward()
        sum_gradients(ranks, model)
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
        summed = full_state(ranks, {name: parameter.grad.clone() for name, parameter in named.items()}, shards)  # type: ignore[union-attr]
        norm = clip_grad_norm_(ranks, model, model.parameters(), MAX_NORM)
        clipped = full_state(ranks, {name: parameter.grad for name, parameter in named.items()}, shards)  # type: ignore[misc]
        if step == 0:
            found |= {"summed": summed, "clipped": clipped, "norm": norm}
        optimizer.step()
    state = {f"model/{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {})
        state |= {f"optimizer/{name}/{key}": value for key, value in moments.items()}
    full = full_state(ranks, state, shards)
    back = own_state(ranks, full, shards)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    return found | {"state": full}


def _parts(ranks: Ranks) -> dict[str, Any]:
    """What each rank gets of the same things, and what comes of putting the parts together again."""
    samples = torch.arange(24).view(12, 2)  # 3 prompts, 4 samples each
    own = ranks.own_samples(samples, 4)
    total = torch.tensor([1.0, float(ranks.rank)])
    return {
        "part": list(range(10))[ranks.part("things", 10)],
        "own": own,
        "gathered": ranks.gather(own),
        "samples": ranks.gather_samples(own, 4),
        "alone": ranks.own_samples(samples, 1),  # groups of one are not shared: prompts are
        "alone_together": ranks.gather_samples(ranks.own_samples(samples, 1), 1),
        "groups": [ranks.own_group(4), ranks.own_group(1)],
        "prompts": [ranks.own_prompts(samples, 4), ranks.own_prompts(samples, 1)],
        "flags": ranks.gather_samples(own[:, 0] % 3 == 0, 4),  # bool, and not contiguous
        "nothing": ranks.gather(own[:0]),
        "sum": ranks.sum_(total) is total and total,
        "any": [ranks.any(ranks.rank == rank) for rank in range(3)],
        "any_of_tensor": [ranks.any(torch.tensor([False, ranks.rank == rank])) for rank in range(3)],
        "main": ranks.is_main,
    }


def _error(function: Callable[[], object]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


def _from_main(ranks: Ranks) -> list[Any]:
    def wrong() -> None:
        raise ValueError(f"rank {ranks.rank} cannot")

    return [ranks.from_main(lambda: {"steps": 3, "rank": ranks.rank}), _error(lambda: ranks.from_main(wrong))]


def _rank(rank: int, world: int) -> dict[str, Any]:
    ranks = Ranks(rank, world, dist.group.WORLD, CPU)
    ranks.barrier()
    parallel = ExpertParallel(EXPERTS)
    return {
        "parts": _parts(ranks),
        "from_main": _from_main(ranks),
        "errors": [_error(lambda: ranks.part("sft_batch", 7)), _error(lambda: ranks.own_samples(torch.ones(6), 3))],
        "dense": _train(ranks, None, torch.float64),
        "experts": _train(ranks, parallel, torch.float64),
        "float32": _train(ranks, parallel, torch.float32)["state"],
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run(WORLD, _rank)


def test_parts_and_what_is_put_together(results: list[dict[str, Any]]) -> None:
    samples = torch.arange(24).view(12, 2)
    rows = ([0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11])
    for rank, result in enumerate(results):
        found = result["parts"]
        assert found["part"] == list(range(5 * rank, 5 * rank + 5))
        assert torch.equal(found["own"], samples[rows[rank]])
        assert torch.equal(found["gathered"], samples[rows[0] + rows[1]])
        assert torch.equal(found["samples"], samples)
        assert torch.equal(found["flags"], samples[:, 0] % 3 == 0)
        assert torch.equal(found["alone"], samples[6 * rank : 6 * rank + 6])
        assert torch.equal(found["alone_together"], samples)
        assert found["groups"] == [2, 1]
        assert torch.equal(found["prompts"][0], samples)
        assert torch.equal(found["prompts"][1], found["alone"])
        assert found["nothing"].shape == (0, 2)
        assert found["sum"].tolist() == [2.0, 1.0]
        assert found["any"] == [True, True, False]
        assert found["any_of_tensor"] == [True, True, False]
        assert found["main"] is (rank == 0)


def test_all_ranks_get_what_the_first_one_found_or_raise_with_it(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["from_main"] == [{"steps": 3, "rank": 0}, "rank 0 cannot"]


def test_what_cannot_be_shared_is_named(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["errors"] == [
            "sft_batch must be a multiple of 2, the number of ranks, got 7",
            "group_size must be a multiple of 2, the number of ranks, got 3",
        ]


@pytest.mark.parametrize("way", ["dense", "experts"])
def test_gradients_norms_and_steps_are_those_of_one_process(results: list[dict[str, Any]], way: str) -> None:
    alone = _train(Ranks.single(), None, torch.float64)
    for rank, result in enumerate(results):
        found = result[way]
        experts = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
        assert found["shards"] == (experts if way == "experts" else [])
        assert float(found["norm"]) > 10 * MAX_NORM
        torch.testing.assert_close(found["norm"], alone["norm"], rtol=1e-13, atol=0)
        assert torch.equal(found["norm"], results[0][way]["norm"]), rank
        for what in ("summed", "clipped", "state"):
            assert found[what].keys() == alone[what].keys()
            assert not any("never" in name for name in found[what] if not name.startswith("model/"))
            for name, value in alone[what].items():
                torch.testing.assert_close(found[what][name], value, rtol=0, atol=1e-12, msg=f"{way} {what} {name}")
                assert torch.equal(found[what][name], results[0][way][what][name]), f"{way} {what} {name}"
        assert float(alone["summed"]["sometimes.weight"].abs().min()) > 0


def test_float32_stays_float32(results: list[dict[str, Any]]) -> None:
    assert all(value.dtype == torch.float32 for result in results for value in result["float32"].values())


def test_one_process_is_left_alone() -> None:
    ranks = Ranks.single()
    found = _parts(ranks)
    samples = torch.arange(24).view(12, 2)
    assert all(torch.equal(found[name], samples) for name in ("own", "gathered", "samples", "alone", "alone_together"))
    assert found["groups"] == [4, 1]
    assert found["part"] == list(range(10))
    assert found["any"] == [True, False, False]
    assert _from_main(ranks) == [{"steps": 3, "rank": 0}, "rank 0 cannot"]
    ranks.barrier()


def test_ranks_that_torchrun_did_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for world in (None, "1"):
        if world is not None:
            monkeypatch.setenv("WORLD_SIZE", world)
        with Ranks.from_environment("cpu") as ranks:
            assert ranks == Ranks.single()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    expected = "LOCAL_RANK, MASTER_ADDR, MASTER_PORT not: several processes are started by torchrun --nproc-per-node 2"
    with pytest.raises(ValueError, match=re.escape(expected)), Ranks.from_environment("cpu"):
        pass


def test_every_rank_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    expected = "every rank needs a GPU of its own, got 2 for rank 3 of this machine"
    with pytest.raises(ValueError, match=expected), Ranks.from_environment("cuda"):
        pass

"""FP8 copies of weights under FSDP2, which writes and frees gathered weights without a version that counts it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from grpo_kernels import MoE, clear_fp8_weight_cache, fp8_quantize
from grpo_kernels.moe_experts import fp8_weights
from python_tests.distributed.launch import run
from python_tests.fp8_weight_products import Layer, quantized, same, turned

LAYERS, STEPS, BATCHES = 3, 2, 2


class _Watched(Layer):
    """Notes, with each forward, whether the copies are the weight's, and how many weights have any."""

    def __init__(self, notes: list[tuple[bool, int]]) -> None:
        super().__init__(32, 32)
        nn.init.uniform_(self.weight, -0.2, 0.2)
        self.notes = notes

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        plain, transposed = fp8_quantize(self.weight.detach().clone(), (128, 128), transpose="both")
        current = same(quantized(self.weight), plain) and same(turned(self.weight), transposed)
        self.notes.append((current, len(fp8_weights._kept)))
        return result


def _model(notes: list[tuple[bool, int]]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(_Watched(notes) for _ in range(LAYERS)))


def _x(step: int, batch: int, rank: int) -> Tensor:
    seed = 100 * step + 10 * batch + rank
    return torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def _train(model: nn.Module, rank: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        for batch in range(BATCHES):
            model(_x(step, batch, rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _rank(rank: int, world: int) -> list[dict[str, Any]]:
    results = []
    for reshard in (True, False):
        notes: list[tuple[bool, int]] = []
        model = _model(notes)
        for layer in model:
            fully_shard(layer, reshard_after_forward=reshard)
        fully_shard(model)
        _train(model, rank)
        weights = [parameter.full_tensor() for parameter in model.parameters()]  # type: ignore[attr-defined]
        most = max(kept for _, kept in notes)
        current = [current for current, _ in notes]
        results.append({"weights": weights, "current": current, "most": most, "kept": len(fp8_weights._kept)})
    return results


def _alone(world: int) -> list[Tensor]:
    """The weights that one process comes to, with the mean of the ranks' gradients."""
    model, threads = _model([]), torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(weights, 0.1)
    for step in range(STEPS):
        for batch in range(BATCHES):
            ranks = [torch.autograd.grad(model(_x(step, batch, r)).square().mean(), weights) for r in range(world)]
            for weight, *gradients in zip(weights, *ranks, strict=True):
                mean = torch.stack(gradients).sum(0) / world
                weight.grad = mean if weight.grad is None else weight.grad + mean
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("world", [1, 2])
def test_gathered_weights_are_quantised_anew_after_a_step(world: int) -> None:
    expected = _alone(world)
    for results in run(world, _rank):
        for result, most in zip(results, (2, LAYERS), strict=True):  # a layer's are dropped when the next one's come
            assert result["current"] == [True] * (LAYERS * STEPS * BATCHES)
            assert result["most"] <= most
            assert result["kept"] == 0
            assert all(map(torch.equal, result["weights"], expected))


def _load(rank: int, world: int) -> list[list[bool]]:
    """Was what was loaded seen? Did anything change? Gathered weights often come to the same address again."""
    torch.manual_seed(0)
    moe = MoE(64, 64, 2, 1, recipe="fp8_block128")
    moe.reset_parameters()
    fully_shard(moe.experts)
    fully_shard(moe)
    x, results = torch.randn(6, 64), []
    with torch.no_grad():
        for _ in range(4):
            before = moe(x).hidden
            moe.load_state_dict({name: value * 1.5 for name, value in moe.state_dict().items()})
            after = moe(x).hidden
            clear_fp8_weight_cache()
            results.append([torch.equal(after, moe(x).hidden), not torch.equal(after, before)])
    return results


def test_a_state_that_is_loaded_into_shards_is_seen() -> None:
    assert run(2, _load) == [[[True, True]] * 4] * 2

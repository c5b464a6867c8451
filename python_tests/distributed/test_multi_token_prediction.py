"""MultiTokenPrediction and its loss under FSDP2 and DDP: two processes compute what one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from grpo_kernels import FusedLMHead, MultiTokenPrediction
from python_tests.distributed.launch import run

WORLD, DEPTHS = 2, 2
VOCABULARY, WIDTH, BATCH, LENGTH = 11, 6, 2, 5  # 11 rows do not divide by 2: shards are padded


class Block(nn.Module):
    """Sums over the rows before, as attention with equal weights does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        before = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril() @ x
        return x + scale * torch.tanh(self.linear(before))


class Model(nn.Module):
    """A trunk, the modules and the head; the loss of all depths is what its forward gives."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.trunk = Block()
        self.mtp = MultiTokenPrediction(WIDTH, [Block() for _ in range(DEPTHS)], final_norm=nn.RMSNorm(WIDTH))
        self.lm_head = FusedLMHead(nn.Linear(WIDTH, VOCABULARY, bias=False))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.trunk(self.embed_tokens(ids), 0.5)
        ahead = self.mtp(hidden, ids, self.embed_tokens, block_options={"scale": 0.5})
        loss: Tensor = self.lm_head.mtp_cross_entropy((hidden, *ahead), ids, num_items=8).loss
        return loss


def _model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def _ids(rank: int) -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(rank))


def _sharded(model: Model, units: str) -> nn.Module:
    if units == "ddp":
        return DistributedDataParallel(model)
    if units == "layers":
        for layer in model.mtp.layers:
            fully_shard(layer)
        fully_shard(model.lm_head)
    fully_shard(model)
    return model


def _rank(rank: int, world: int, units: str) -> dict[str, Any]:
    model = _model()
    wrapped = _sharded(model, units)  # which reduces nothing once it is gone
    loss = wrapped(_ids(rank))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}  # type: ignore[union-attr]
    return {**whole, "loss": loss.detach()}


@pytest.mark.parametrize("units", ["whole", "layers", "ddp"])
def test_sharded_as_one_process(units: str) -> None:
    results = run(WORLD, _rank, units)
    alone = []
    for rank in range(WORLD):
        model = _model()
        loss = model(_ids(rank))
        loss.backward()
        alone.append({**{n: p.grad for n, p in model.named_parameters()}, "loss": loss.detach()})
    for rank, actual in enumerate(results):
        for name, value in actual.items():
            expected = alone[rank][name] if name == "loss" else (alone[0][name] + alone[1][name]) / WORLD
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-14)
            assert name == "loss" or value.abs().max() > 0


def _projection_alone(rank: int, world: int) -> str:
    model = _model()
    fully_shard(model.mtp.layers[0].eh_proj)  # type: ignore[arg-type]
    fully_shard(model)
    try:
        model(_ids(rank))
    except ValueError as error:
        return str(error)
    return ""


def test_a_projection_that_is_a_unit_of_its_own_is_refused() -> None:
    """Its hooks would not run: the layer multiplies by its weight."""
    for message in run(WORLD, _projection_alone):
        assert "eh_proj has forward hooks" in message
        assert "fully_shard(layer)" in message

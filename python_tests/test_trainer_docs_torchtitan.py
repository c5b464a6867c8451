"""docs/torchtitan.md, against the signatures and the documented formulas of torchtitan 0.3.0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from python_tests.trainer_docs import assert_equal_to, assert_signature, blocks, ragged, run, stand_in

# Read in the wheel of torchtitan 0.3.0, torchtitan/components/loss.py and torchtitan/experiments/rl/losses/dapo.py. The
# same at commit b5bcd76c66d0acb1a08b176d9639425bc55e0b2a (21 August 2026), where tensors are [T] in place of [B, L].
CALL = "(self, logits, labels, global_valid_tokens=None, *, generator_logprobs, advantages, loss_mask)"
CONSTRUCTOR = "(self, config, *, compile_config=None)"
COMPUTE_LOGPROBS = "(logits, labels, *, return_entropy=False)"
METRICS = [
    "loss/mean",
    "loss/ratio_mean",
    "loss/ratio_clipped_frac",
    "bit_wise/logprob_diff/mean",
    "bit_wise/ratio_tokens_different/mean",
    "bit_wise/logprob_diff/max",
    "trainer/entropy/mean",
]
BATCH, LENGTH, VOCAB = 4, 8, 23


class BaseLoss:
    @dataclass(kw_only=True, slots=True)
    class Config:
        pass


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    stand_in(monkeypatch, "torchtitan.components.loss", BaseLoss=BaseLoss)
    stand_in(monkeypatch, "torchtitan.distributed.spmd_types", spmd_mesh_size=lambda axis: {"tp": 2}[axis])
    stand_in(monkeypatch, "torchtitan.distributed.utils", get_spmd_backend=lambda: "partial_dtensor")
    return run("torchtitan.md")


def make(page: dict[str, Any], **options: Any) -> Any:
    return page["FusedDAPOLoss"](page["FusedDAPOLoss"].Config(**options))


def batch() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, labels, and what the loss takes by name; some generator log-probs are missing."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(BATCH, LENGTH, VOCAB, generator=generator)
    labels = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    data = ragged(BATCH, LENGTH)
    generated = log_softmax(logits, labels) + 0.4 * torch.randn(BATCH, LENGTH, generator=generator)
    generated[0, 0], generated[1, :3] = float("nan"), float("-inf")
    data["mask"][:2, :3] = True
    inputs = {"generator_logprobs": generated, "advantages": data["advantages"], "loss_mask": data["mask"]}
    return logits, labels, inputs


def log_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def definition(
    options: dict[str, Any], labels: Tensor, inputs: dict[str, Tensor], items: float
) -> Callable[..., Tensor]:
    """The loss as a function of the logits: over the tokens that count alone."""
    low, high = 1 - options.get("ratio_clip_low", 0.2), 1 + options.get("ratio_clip_high", 0.2)

    def value(logits: Tensor, dtype: torch.dtype) -> Tensor:
        keep = inputs["loss_mask"] & inputs["generator_logprobs"].isfinite()
        log_probs = log_softmax(logits, labels)[keep]
        advantage = inputs["advantages"][keep].to(dtype)
        ratio = (log_probs - inputs["generator_logprobs"][keep].to(dtype)).clamp(-10, 10).exp()
        if options.get("surrogate") == "cispo":
            return -(ratio.clamp(low, high).detach() * advantage * log_probs).sum() / items
        return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage).sum() / items

    return value


def test_signatures(page: dict[str, Any]) -> None:
    assert_signature(page["FusedDAPOLoss"].__call__, CALL)
    assert_signature(page["FusedDAPOLoss"].__init__, CONSTRUCTOR)
    assert_signature(page["compute_logprobs"], COMPUTE_LOGPROBS)
    with pytest.raises(TypeError):  # as torchtitan demands of a Config: fields by name alone
        page["FusedDAPOLoss"].Config(0.2)


@pytest.mark.parametrize(
    "options", [{}, {"ratio_clip_high": 0.28}, {"surrogate": "cispo", "ratio_clip_low": 0.3}], ids=str
)
@pytest.mark.parametrize("tokens", [None, 37, 0])
def test_loss_and_gradient(page: dict[str, Any], options: dict[str, Any], tokens: int | None) -> None:
    logits, labels, inputs = batch()
    loss = make(page, **options)
    expected = definition(options, labels, inputs, tokens or 1)
    assert_equal_to(lambda x: loss(x, labels, tokens, **inputs)[0], expected, logits)


def test_flat_tensors(page: dict[str, Any]) -> None:
    """torchtitan after 0.3.0 has [T, V] logits."""
    logits, labels, inputs = batch()
    flat = {name: value.flatten() for name, value in inputs.items()}
    loss = make(page)
    expected = definition({}, labels.flatten(), flat, 37)
    assert_equal_to(lambda x: loss(x, labels.flatten(), 37, **flat)[0], expected, logits.flatten(0, 1))


def test_metrics(page: dict[str, Any]) -> None:
    logits, labels, inputs = batch()
    loss, metrics = make(page)(logits, labels, 37, **inputs)
    assert list(metrics) == METRICS
    keep = inputs["loss_mask"] & inputs["generator_logprobs"].isfinite()
    gap = (log_softmax(logits, labels) - inputs["generator_logprobs"])[keep]
    probs = logits.softmax(-1)[keep]
    expected = {
        "loss/mean": loss,
        "loss/ratio_mean": gap.exp().sum() / 37,
        "loss/ratio_clipped_frac": ((gap.exp() < 0.8) | (gap.exp() > 1.2)).sum() / 37,
        "bit_wise/logprob_diff/mean": gap.sum() / 37,
        "bit_wise/ratio_tokens_different/mean": (gap != 0).sum() / 37,
        "bit_wise/logprob_diff/max": gap.abs().max(),
        "trainer/entropy/mean": -(probs * probs.log()).sum() / 37,
    }
    torch.testing.assert_close(metrics, expected)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("axis", [0, 1], ids=["micro-batches", "parts of the sequence"])
def test_parts_give_one_mean(page: dict[str, Any], axis: int) -> None:
    """Micro-batches and ranks cut axis 0, ChunkedLossWrapper axis 1; gradients are summed, metrics too."""
    logits, labels, inputs = batch()
    loss, whole = make(page), make(page)(logits, labels, 37, **inputs)[1]
    parts: list[dict[str, Tensor]] = []

    def step(logits: Tensor) -> Tensor:
        parts.clear()
        cuts = [value.chunk(4, axis) for value in (logits, labels, *inputs.values())]
        losses = []
        for piece, target, *rest in zip(*cuts, strict=True):
            value, metrics = loss(piece, target, 37, **dict(zip(inputs, rest, strict=True)))
            losses.append(value)
            parts.append(metrics)
        return torch.stack(losses).double().sum().float()

    assert_equal_to(step, definition({}, labels, inputs, 37), logits)
    for name in METRICS:
        values = torch.stack([part[name] for part in parts]).detach()
        torch.testing.assert_close(values.max() if name.endswith("/max") else values.sum(), whole[name])


def test_poison_behind_the_mask_and_beyond_the_clamp(page: dict[str, Any]) -> None:
    logits, labels, inputs = batch()
    clean = make(page)(logits, labels, 37, **inputs)[0]
    dead = ~inputs["loss_mask"]
    logits[dead], inputs["advantages"][dead] = float("nan"), float("nan")
    logits.requires_grad_()
    value = make(page)(logits, labels.masked_fill(dead, -100), 37, **inputs)[0]
    assert torch.equal(value, clean)
    assert torch.autograd.grad(value, logits)[0][dead].count_nonzero() == 0
    one = {"loss_mask": torch.ones(1, 1, dtype=torch.bool)}
    for side in (1.0, -1.0):  # a ratio far above 1 with a bad response, far below with a good one: neither is clipped
        far = torch.zeros(1, 1, 2, requires_grad=True)
        one |= {"generator_logprobs": torch.full((1, 1), -50 * side), "advantages": torch.full((1, 1), -side)}
        value = make(page)(far, torch.zeros(1, 1, dtype=torch.long), **one)[0]
        torch.testing.assert_close(value.detach(), side * torch.tensor(10 * side).exp())
        assert torch.autograd.grad(value, far)[0].count_nonzero() == 0


def test_log_probs_and_entropy(page: dict[str, Any]) -> None:
    logits, labels, _ = batch()
    labels[0, :2] = -100
    weights = torch.randn(BATCH, LENGTH, generator=torch.Generator().manual_seed(1))

    def expected(logits: Tensor, dtype: torch.dtype) -> Tensor:
        return (log_softmax(logits, labels.clamp(min=0)) * weights)[labels >= 0].sum()

    assert_equal_to(lambda x: (page["compute_logprobs"](x, labels) * weights).sum(), expected, logits)
    log_probs, entropy = page["compute_logprobs"](logits.requires_grad_(), labels, return_entropy=True)
    assert log_probs.requires_grad
    assert not entropy.requires_grad  # a metric there
    assert log_probs[0, :2].tolist() == entropy[0, :2].tolist() == [0.0, 0.0]
    probs = logits.detach().softmax(-1)
    torch.testing.assert_close(entropy[1:], -(probs * probs.log()).sum(-1)[1:])


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    dist.destroy_process_group()


def test_logits_that_ranks_share(page: dict[str, Any], mesh: Any) -> None:
    """One rank: the DTensor is taken apart and put together again; more ranks are python_tests/distributed."""
    logits, labels, inputs = batch()
    loss = make(page)

    def value(logits: Tensor) -> Tensor:
        shared = DTensor.from_local(logits, mesh["tp"], [Shard(2)])
        return loss(shared, labels, 37, **inputs)[0]

    assert_equal_to(value, definition({}, labels, inputs, 37), logits)
    both = DTensor.from_local(logits, mesh, [Shard(0), Shard(2)])
    with pytest.raises(ValueError, match=r"VocabShard.from_dtensor: weight must be placed as .* got"):
        loss(both, labels, 37, **inputs)
    replicated = DTensor.from_local(logits, mesh["tp"], [Replicate()])
    assert torch.equal(loss(replicated, labels, 37, **inputs)[0], loss(logits, labels, 37, **inputs)[0])


def test_what_is_not_served(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="FusedDAPOLoss: surrogate must be 'ppo_clip' or 'cispo', got 'sapo'"):
        make(page, surrogate="sapo")
    monkeypatch.setitem(page, "get_spmd_backend", lambda: "spmd_types")
    logits, labels, inputs = batch()
    with pytest.raises(NotImplementedError, match="tensor parallelism needs the DTensor backend"):
        make(page)(logits, labels, **inputs)


def test_the_line_in_the_config(page: dict[str, Any]) -> None:
    @dataclass
    class Wrapped:
        num_chunks: int
        loss_fn: Any

    class ChunkedLossWrapper:
        Config = Wrapped

    names = {**page, "ChunkedLossWrapper": ChunkedLossWrapper}
    exec(blocks("torchtitan.md")[1], names)
    assert names["loss"].loss_fn == page["FusedDAPOLoss"].Config(ratio_clip_high=0.28)

"""linear_cross_entropy with verl's signature, against the logits in float64."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from grpo_kernels.distributed import VocabShard
from grpo_kernels.linear_log_probs import linear_token_log_probs
from grpo_kernels.testing import assert_as_accurate
from python_tests.distributed.launch import run
from python_tests.verl.conftest import stand_in

WIDTH, VOCAB = 20, 37  # neither divisible by verl's 128 and 1024
LEADING = (3, 5)


def problem(*leading: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(*leading, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64) * 0.5
    return hidden, weight, torch.randint(VOCAB, leading, generator=generator)


def by_logits(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Any = 1.0) -> tuple[Tensor, ...]:
    """Log-probs, entropy and sum of squared probs; temperature: number, or as labels."""
    if isinstance(temperature, Tensor):
        temperature = temperature.to(hidden.dtype).unsqueeze(-1)
    log_probs = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    probs = log_probs.exp()
    chosen = log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return chosen, -(probs * log_probs).sum(-1), probs.square().sum(-1)


def gradients(outputs: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(6)
    loss = sum((torch.rand(o.shape, generator=generator, dtype=o.dtype) * o).sum() for o in outputs[:2])
    return torch.autograd.grad(loss, inputs)


TEMPERATURES = {
    "number": (0.7, 0.7),
    "integer": (2, 2),
    "0-d": (torch.tensor(0.7), torch.tensor(0.7)),
    "one": (torch.tensor([0.7]), torch.tensor(0.7)),
    "sample": (torch.tensor([0.5, 1.0, 2.0]), torch.tensor([[0.5], [1.0], [2.0]]).expand(LEADING)),
    "token": (torch.linspace(0.5, 2, 15).view(LEADING), torch.linspace(0.5, 2, 15).view(LEADING)),
    "flat": (torch.linspace(0.5, 2, 15), torch.linspace(0.5, 2, 15).view(LEADING)),
    "bf16": (torch.full(LEADING, 0.75, dtype=torch.bfloat16), torch.tensor(0.75)),
    "zero": (torch.tensor([1e-8, 0.0, 1.0]), torch.tensor([[1e-8], [1e-8], [1.0]]).expand(LEADING)),
}


@pytest.mark.parametrize("name", TEMPERATURES)
def test_values_and_gradients(adapter: ModuleType, name: str) -> None:
    hidden, weight, labels = problem(*LEADING)
    given, spread = TEMPERATURES[name]
    if name == "zero":  # verl's floor of 1e-8: the policy is that of the largest logit
        log_probs, entropy = adapter.linear_cross_entropy(hidden, weight, labels, given)
        torch.testing.assert_close(log_probs, by_logits(hidden, weight, labels, spread)[0], rtol=1e-7, atol=0)
        assert not entropy[:2].any()
        return
    for tensor in (hidden, weight):
        tensor.requires_grad_()
    actual = adapter.linear_cross_entropy_with_sum_pi_squared(hidden, weight, labels, given)
    wanted = by_logits(hidden, weight, labels, spread)
    for a, w in zip(actual, wanted, strict=True):
        assert a.shape == labels.shape
        torch.testing.assert_close(a, w, rtol=1e-6 if name == "bf16" else 1e-12, atol=1e-13)
    for a, w in zip(gradients(actual, hidden, weight), gradients(wanted, hidden, weight), strict=True):
        torch.testing.assert_close(a, w, rtol=1e-10, atol=1e-12)
    two = adapter.linear_cross_entropy(hidden, weight, labels, given)
    assert len(two) == 2
    assert all(torch.equal(a, b) for a, b in zip(two, actual, strict=False))
    assert not actual[2].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes_are_accurate(adapter: ModuleType, dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(64)
    narrow = hidden.to(dtype), weight.to(dtype)
    exact = by_logits(*(tensor.double() for tensor in narrow), labels)
    eager = by_logits(*(tensor.float() for tensor in narrow), labels)
    actual = adapter.linear_cross_entropy_with_sum_pi_squared(*narrow, labels)
    for a, e, w in zip(actual, eager, exact, strict=True):
        assert a.dtype == torch.float32
        assert_as_accurate(a, e, w)


def test_rows_as_verls_engines_have_them(adapter: ModuleType) -> None:
    hidden, weight, labels = problem(15)
    wanted = adapter.linear_cross_entropy(hidden, weight, labels)
    for rows, of_labels in (((1, 15), (1, 15)), ((15, 1), (1, 15)), ((15,), (1, 15)), ((3, 5), (3, 5))):
        shaped = adapter.linear_cross_entropy(hidden.view(*rows, WIDTH), weight, labels.view(of_labels))
        for a, w in zip(shaped, wanted, strict=True):
            assert torch.equal(a, w.view(of_labels))
    strided = torch.stack([hidden, hidden], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(adapter.linear_cross_entropy(strided, weight, labels)[0], wanted[0])


def test_reductions_and_masked_rows(adapter: ModuleType) -> None:
    hidden, weight, labels = problem(*LEADING)
    log_probs, entropy = adapter.linear_cross_entropy(hidden, weight, labels)
    for reduction, wanted in (("sum", log_probs.sum()), ("Mean", log_probs.mean()), ("NONE", log_probs)):
        reduced, same = adapter.linear_cross_entropy(hidden, weight, labels, 1.0, reduction)
        assert torch.equal(reduced, wanted)
        assert torch.equal(same, entropy)
    labels[1, 2], hidden[1, 2] = -100, float("nan")
    masked, masked_entropy, squares = adapter.linear_cross_entropy_with_sum_pi_squared(hidden, weight, labels)
    assert masked[1, 2] == masked_entropy[1, 2] == squares[1, 2] == 0
    assert torch.equal(masked[0], log_probs[0])


def test_no_rows(adapter: ModuleType) -> None:
    hidden, weight, _ = problem(0)
    outputs = adapter.linear_cross_entropy_with_sum_pi_squared(hidden, weight, torch.zeros(0, dtype=torch.long))
    assert [output.shape for output in outputs] == [(0,)] * 3


def test_errors(adapter: ModuleType) -> None:
    hidden, weight, labels = problem(*LEADING)
    call = adapter.linear_cross_entropy
    with pytest.raises(ValueError, match=r"verl.linear_cross_entropy: reduction must be one of 'none', 'sum', 'mean'"):
        call(hidden, weight, labels, 1.0, "batchmean")
    with pytest.raises(TypeError, match="reduction must be a string, got int"):
        call(hidden, weight, labels, 1.0, 0)
    with pytest.raises(TypeError, match=r"labels must be a torch.Tensor, got list"):
        call(hidden, weight, [1, 2])
    for rows in ((5, 3), (15,), (3, 4)):
        with pytest.raises(ValueError, match=r"labels must have the leading shape of hidden \[3, 5, 20\], got"):
            call(hidden, weight, torch.zeros(rows, dtype=torch.long))
    for shape in ((2,), (5,), (3, 4), (3, 1, 1, 2)):
        with pytest.raises(ValueError, match=r"temperature must be a number, one for each sample \[3\] or for each"):
            call(hidden, weight, labels, torch.ones(shape))
    with pytest.raises(ValueError, match="temperature"):
        call(hidden, weight, labels, 0.0)


def _part(rank: int, world: int) -> list[Tensor]:
    """What one rank has of values and gradients."""
    with stand_in() as adapter:
        hidden, weight, labels = problem(*LEADING)
        weight = weight[: VOCAB - 1].chunk(world)[rank].clone().requires_grad_()
        labels = labels.clamp(max=VOCAB - 2)
        hidden.requires_grad_()
        temperature = torch.tensor([0.5, 1.0, 2.0])
        outputs = adapter.linear_cross_entropy_with_sum_pi_squared(
            hidden, weight, labels, temperature, "none", dist.group.WORLD
        )
        return [*(output.detach() for output in outputs), *gradients(outputs, hidden, weight)]


def test_each_rank_has_its_rows_of_the_vocabulary(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    head = sys.modules[adapter.linear_cross_entropy.__module__]
    shards = []

    def spy(*args: Any, vocab_shard: Any, **kwargs: Any) -> Any:
        shards.append(vocab_shard)
        return linear_token_log_probs(*args, **kwargs)

    monkeypatch.setattr(head, "linear_token_log_probs", spy)
    monkeypatch.setattr(dist, "get_rank", lambda group: 2)
    hidden, weight, labels = problem(*LEADING)
    adapter.linear_cross_entropy(hidden, weight, labels, 1.0, "none", "the ranks")
    assert shards == [VocabShard(2 * VOCAB, 3 * VOCAB, "the ranks", reduce_hidden_grad=False)]


@pytest.mark.slow
def test_a_vocabulary_of_two_ranks() -> None:
    parts = run(2, _part)
    hidden, weight, labels = problem(*LEADING)
    weight = weight[: VOCAB - 1].requires_grad_()
    hidden.requires_grad_()
    temperature = TEMPERATURES["sample"][1]
    wanted = by_logits(hidden, weight, labels.clamp(max=VOCAB - 2), temperature)
    of_hidden, of_weight = gradients(wanted, hidden, weight)
    for rank, part in enumerate(parts):
        for a, w in zip(part[:3], wanted, strict=True):
            torch.testing.assert_close(a, w.detach(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(part[4], of_weight.chunk(2)[rank], rtol=1e-10, atol=1e-12)
    # Each rank has its part, as with verl's function: Megatron's layer in front of the head sums them.
    torch.testing.assert_close(parts[0][3] + parts[1][3], of_hidden, rtol=1e-10, atol=1e-12)

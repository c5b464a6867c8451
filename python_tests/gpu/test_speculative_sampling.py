"""verify_draft on a device: the law of what it emits at a real vocabulary, and how many kernels it launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from python_tests.gpu.devices import DEVICES, no_synchronization
from python_tests.gpu.test_launches import launches

ON_DEVICES = pytest.mark.parametrize("device", DEVICES)


def deviation(tokens: Tensor, probs: Tensor) -> float:
    """How far the counts of tokens are from their law: chi-square over tokens that are expected five times, the others
    together, as a standard normal (Wilson and Hilferty)."""
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    expected = probs.double() * len(tokens)
    often = expected >= 5.0
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    degrees = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    return float(((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5)


def problem(device: str, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits at two positions of target and draft, and their distributions under the filter. They agree on most of the
    vocabulary."""
    vocab = 32_000 if device == "cuda" else 300
    target = torch.randn(2, vocab, device=device) * 3
    draft = target[:1] + torch.randn(1, vocab, device=device)

    def law(logits: Tensor) -> Tensor:
        wide = logits.double()
        if top_k:
            wide = wide.masked_fill(wide < wide.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
        return torch.softmax(wide, -1)

    return target, draft, law(target), law(draft)


@ON_DEVICES
@pytest.mark.parametrize("top_k", [0, 60])
@pytest.mark.parametrize("mode", ["token", "block"])
def test_the_law(mode: str, top_k: int, device: str) -> None:
    """The first token has the target's law, and behind an accepted draft the second one."""
    count = 65_536 if device == "cuda" else 3_000
    target, draft, p, q = problem(device, top_k)
    ids = torch.multinomial(q[0], count, replacement=True)[:, None]
    options: dict[str, Any] = {"draft_logits": draft.expand(count, 1, -1), "seeds": torch.arange(count, device=device)}
    options |= {"mode": mode, "top_k": top_k or None}
    rows = target.expand(count, 2, -1)
    grpo_kernels.verify_draft(rows, ids, **options)
    with no_synchronization(device):
        found = grpo_kernels.verify_draft(rows, ids, **options)
    accepted = found.num_accepted == 1
    assert 0.3 < accepted.double().mean() < 0.9
    assert deviation(found.token_ids[:, 0], p[0]) < 4
    assert deviation(found.token_ids[accepted, 1], p[1]) < 4
    assert (found.token_ids[~accepted, 1] == -1).all()


@ON_DEVICES
def test_a_draft_of_its_own_law_is_seen(device: str) -> None:
    """The likeliest draft, verified as if it had been drawn, comes too often. As a certain one it does not."""
    count = 65_536 if device == "cuda" else 3_000
    target, draft, p, _ = problem(device, 0)
    ids = draft[0].argmax().expand(count, 1)
    rows, seeds = target.expand(count, 2, -1), torch.arange(count, device=device) + 2**40
    biased = grpo_kernels.verify_draft(rows, ids, draft_logits=draft.expand(count, 1, -1), seeds=seeds)
    assert deviation(biased.token_ids[:, 0], p[0]) > 6
    certain = grpo_kernels.verify_draft(rows, ids, seeds=seeds)
    assert deviation(certain.token_ids[:, 0], p[0]) < 4


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mode", "certain", "options", "most"),
    [
        ("token", False, {}, 4),
        ("token", True, {}, 4),
        ("token", False, {"top_p": 0.9}, 5),
        ("block", False, {}, 6),
        ("block", True, {}, 5),
        ("greedy", True, {}, 2),
    ],
)
def test_launches(mode: str, certain: bool, options: dict[str, Any], most: int) -> None:
    target = torch.randn(4, 4, 32_000, device="cuda", dtype=torch.bfloat16)
    draft = None if certain else target[:, :3] + 0.5
    ids, seeds = target[:, :3].argmax(-1), torch.arange(4, device="cuda")
    options = {name: torch.full((4,), value, device="cuda") for name, value in options.items()}
    call: dict[str, Any] = {"draft_logits": draft, "seeds": seeds, "mode": mode, **options}
    names = launches(lambda: grpo_kernels.verify_draft(target, ids, **call))
    assert len([name for name in names if "fill" not in name.lower()]) <= most, names

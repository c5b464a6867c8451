"""What verify_draft emits has exactly the law of the target, by enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from grpo_kernels.speculative_sampling import reference

EXACT = 1e-12
FILTERS: dict[str, dict[str, float]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.75, "temperature": 1.4},
    "top_k and top_p": {"top_k": 3, "top_p": 0.8},
}


# --- by enumeration: the definition's pieces, its uniforms and its race integrated ------------------------------------


class Model:
    """Logits of every context up to a length: two unrelated tables, one for the target and one for the draft."""

    def __init__(self, vocab: int, depth: int, seed: int, spread: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab = vocab
        self.tables = [torch.randn(vocab**i, vocab, generator=generator).double() * spread for i in range(depth + 1)]

    def rows(self, sequences: Tensor, count: int) -> Tensor:
        """[B, count, V]. The logits behind the first 0, 1, ... tokens of each sequence."""
        found = []
        for i in range(count):
            place = torch.zeros(len(sequences), dtype=torch.int64)
            for j in range(i):
                place = place * self.vocab + sequences[:, j]
            found.append(self.tables[i][place])
        return torch.stack(found, 1) if found else self.tables[0].new_empty(len(sequences), 0, self.vocab)


def every_sequence(vocab: int, length: int) -> Tensor:
    """Every sequence, in the order of their numbers."""
    rows = list(itertools.product(range(vocab), repeat=length))
    return torch.tensor(rows, dtype=torch.int64).reshape(vocab**length, length)


def log_probs_of(model: Model, sequences: Tensor, count: int, filters: dict[str, float]) -> Tensor:
    """[B, count, V] under the filters, by the definition."""
    batch = len(sequences)

    def filled(name: str, dtype: torch.dtype) -> Tensor | None:
        return torch.full((batch,), filters[name], dtype=dtype) if name in filters else None

    numbers = filled("temperature", torch.float64), filled("top_k", torch.int64), filled("top_p", torch.float64)
    return reference.distribution(model.rows(sequences, count), *numbers).log_probs


def law_of_target(model: Model, length: int, filters: dict[str, float]) -> Tensor:
    """[V^length]. The probability of every sequence."""
    sequences = every_sequence(model.vocab, length)
    return _of_tokens(log_probs_of(model, sequences, length, filters), sequences).sum(1).exp()


def _of_tokens(log_probs: Tensor, sequences: Tensor) -> Tensor:
    return log_probs.gather(-1, sequences[..., None]).squeeze(-1)


def _chances(mode: str, log_p: Tensor, log_q: Tensor, drafts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[B, K + 1] each: the probability over the uniforms that i drafts are accepted, and the residual's scale there.

    Only the first `count` of the K drafts count.
    """
    batch, columns = drafts.shape
    ratios = reference.log_ratios(log_p, log_q, drafts)
    if mode == "token":
        passes, weights = reference.token_thresholds(ratios), torch.ones(batch, columns + 1, dtype=torch.float64)
        accepted = reference.accepted_by_token
    else:
        weights = reference.prefix_weights(ratios)
        passes = reference.block_thresholds(log_p, log_q, weights, torch.full((batch,), count))
        accepted = reference.accepted_by_block
    chances = torch.zeros(batch, columns + 1, dtype=torch.float64)
    for outcome in itertools.product([False, True], repeat=count):
        passed = torch.tensor([outcome], dtype=torch.bool).reshape(1, count).expand(batch, count)
        chance = torch.where(passed, passes[:, :count], 1.0 - passes[:, :count]).prod(1)
        chances.scatter_add_(1, accepted(passed)[:, None], chance[:, None])
    return chances, weights


def _law_of_sampler(
    target: Model, draft: Model, count: int, length: int, mode: str, filters: dict[str, float], certain: bool
) -> tuple[Tensor, float]:
    """[V^length]: the law of what is emitted for `count` drafts and then sampled from the target; and E[accepted].

    A certain draft is the draft model's likeliest token. There are length - 1 drafts; those behind `count` are 0.
    """
    vocab = target.vocab
    drafts = torch.nn.functional.pad(every_sequence(vocab, count), (0, length - 1 - count))
    log_q = log_probs_of(draft, drafts, length - 1, filters)
    if certain:
        chance_of_drafts = (drafts == log_q.argmax(-1))[:, :count].all(1).double()
        log_q = reference.one_hot(drafts, vocab, torch.float64)
    else:
        chance_of_drafts = _of_tokens(log_q, drafts)[:, :count].sum(1).exp()
    log_p = log_probs_of(target, drafts, length, filters)
    chances, scales = _chances(mode, log_p, log_q, drafts, count)
    law = torch.zeros(vocab**length, dtype=torch.float64)
    everything = every_sequence(vocab, length)
    continued = _of_tokens(log_probs_of(target, everything, length, filters), everything)
    for accepted in range(count + 1):
        at = torch.full((len(drafts),), accepted)
        weights = reference.final_weights(log_p, log_q, scales[:, accepted], at, torch.full_like(at, count))
        last = weights / weights.sum(-1, keepdim=True)
        tail = continued[:, accepted + 1 :].sum(1).exp()
        for row, start in enumerate(drafts[:, :accepted]):
            fits = (everything[:, :accepted] == start).all(1)
            weight = chance_of_drafts[row] * chances[row, accepted] * last[row, everything[:, accepted]] * tail
            law += torch.where(fits, weight, 0.0)
    mean = (chance_of_drafts[:, None] * chances * torch.arange(length)).sum()
    return law, float(mean)


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("certain", [False, True], ids=["sampled", "certain"])
@pytest.mark.parametrize("mode", ["token", "block"])
def test_the_joint_law_is_the_target_s(mode: str, certain: bool, filters: dict[str, float]) -> None:
    """Of every number of drafts, 0 included, a row's `draft_lengths` decide, continued to one length."""
    for vocab, depth, seed in ((3, 3, 0), (5, 2, 1), (4, 2, 2)):
        target, draft = Model(vocab, depth, seed), Model(vocab, depth, seed + 100)
        expected = law_of_target(target, depth + 1, filters)
        for count in range(depth + 1):
            law, _ = _law_of_sampler(target, draft, count, depth + 1, mode, filters, certain)
            assert abs(law.sum() - 1.0) < EXACT
            assert (law - expected).abs().max() < EXACT, (vocab, count)


def test_filtered_laws_leave_tokens_out() -> None:
    """Else the test above would not have tested them."""
    for name in ("top_k", "top_p", "top_k and top_p"):
        assert (law_of_target(Model(5, 2, 1), 3, FILTERS[name]) == 0.0).sum() > 30


@pytest.mark.parametrize("fault", ["sampled rule for a certain draft", "target in place of the residual", "scale"])
def test_the_enumeration_sees_a_wrong_law(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = Model(3, 2, 0), Model(3, 2, 100)
    expected = law_of_target(target, 3, {})
    mode, certain = ("block" if fault == "scale" else "token"), fault.startswith("sampled")
    if certain:
        monkeypatch.setattr(reference, "one_hot", lambda ids, vocab, dtype: log_probs_of(draft, ids, 2, {}))
    elif fault == "scale":
        rule = reference.residual
        monkeypatch.setattr(reference, "residual", lambda p, q, scale: rule(p, q, torch.ones_like(scale)))
    else:
        monkeypatch.setattr(reference, "residual", lambda p, q, scale: p.exp())
    law, _ = _law_of_sampler(target, draft, 2, 3, mode, {}, certain)
    assert (law - expected).abs().max() > 0.01


def test_the_block_rule_accepts_at_least_as_many() -> None:
    for seed in range(20):
        target, draft = Model(3, 3, seed, spread=1.0), Model(3, 3, seed + 100, spread=1.0)
        for count in (1, 2, 3):
            means = [_law_of_sampler(target, draft, count, 4, mode, {}, False)[1] for mode in ("token", "block")]
            if count == 1:
                assert abs(means[0] - means[1]) < EXACT
            else:
                assert means[1] > means[0] + 1e-4


@pytest.mark.parametrize(("mode", "expected"), [("token", 10 / 9), ("block", 11 / 9)])
def test_accepted_drafts_of_the_block_paper_s_example(mode: str, expected: float) -> None:
    """Two drafts, p = (1/3, 2/3) and q = (2/3, 1/3) everywhere: the first section of 2403.10444."""
    target, draft = Model(2, 2, 0), Model(2, 2, 0)
    for model, probs in ((target, (1 / 3, 2 / 3)), (draft, (2 / 3, 1 / 3))):
        model.tables = [torch.tensor(probs, dtype=torch.float64).log().repeat(len(table), 1) for table in model.tables]
    assert abs(_law_of_sampler(target, draft, 2, 3, mode, {}, False)[1] - expected) < EXACT

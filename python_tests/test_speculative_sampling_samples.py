"""What verify_draft emits has the law of the target, in samples of the kernels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.speculative_sampling import reference
from python_tests.test_speculative_sampling_law import Model, every_sequence, law_of_target, log_probs_of

LIKELY, UNLIKELY = 1e-3, 1e-6
"""A right sampler's p-values are above the first for the seeds that stand here; a wrong one's are below the second."""


def _p_value(counts: Tensor, probs: Tensor) -> float:
    """Of Pearson's chi-square test. Cells in which less than 8 are expected are pooled."""
    expected = probs.double() * counts.sum()
    small = expected < 8.0
    counts, expected = (
        torch.cat([v[~small].double(), v[small].double().sum(0, keepdim=True)]) for v in (counts, expected)
    )
    inside = expected > 1e-6
    if counts[~inside].sum() > 0:
        return 0.0
    statistic = ((counts - expected)[inside].square() / expected[inside]).sum()
    return float(torch.special.gammaincc((inside.sum().double() - 1.0) / 2.0, statistic / 2.0))


def _draw(log_probs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count] tokens of one distribution, by its inverse: a sampler of its own."""
    uniform = torch.rand(count, dtype=torch.float64, generator=generator)
    return torch.searchsorted(log_probs.double().exp().cumsum(0), uniform).clamp(max=len(log_probs) - 1)


def _seeds(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**62), 2**62, (count,), generator=generator)


class Large:
    """Contexts of 32000 tokens and two drafts, shared by all rows without a copy; tokens in bins of equal mass."""

    vocab, rows, bins = 32000, 12000, 40

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(11)
        self.target = torch.randn(3, self.vocab, generator=self.generator) * 2.5
        self.draft = self.target[:2] + torch.randn(2, self.vocab, generator=self.generator)
        self.seeds = _seeds(self.rows, self.generator)

    def laws(self, **filters: float) -> tuple[Tensor, Tensor]:
        """[3, V] and [2, V] log-probs under the filters, by the definition in float64."""
        numbers = [torch.tensor([filters[n]]) if n in filters else None for n in ("temperature", "top_k", "top_p")]
        return tuple(reference.distribution(x[None].double(), *numbers).log_probs[0] for x in (self.target, self.draft))  # type: ignore[return-value]

    def drafts(self, log_q: Tensor) -> Tensor:
        return torch.stack([_draw(row, self.rows, self.generator) for row in log_q], 1)

    def verify(self, drafts: Tensor, certain: bool = False, **options: Any) -> grpo_kernels.VerifyDraftOutput:
        target, draft = (logits.expand(self.rows, *logits.shape) for logits in (self.target, self.draft))
        return grpo_kernels.verify_draft(
            target, drafts, draft_logits=None if certain else draft, seeds=self.seeds, **options
        )

    def p_values(self, out: grpo_kernels.VerifyDraftOutput, log_p: Tensor, log_q: Tensor) -> list[float]:
        """Whether each position has the target's law, where it is drawn from the target if nothing was emitted."""
        found = []
        for i in range(3):
            others = _draw(log_p[i], self.rows, self.generator)
            tokens = torch.where(out.num_accepted >= i, out.token_ids[:, i], others)
            found.append(self.p_value(tokens, log_p[i], log_q[min(i, 1)]))
        return found

    def p_value(self, tokens: Tensor, log_p: Tensor, log_q: Tensor) -> float:
        """Bins hold apart what the target likes more than the draft: where drafts go wrong."""
        ranked = (log_p - log_q).nan_to_num(0.0).argsort()
        bins = torch.empty(self.vocab, dtype=torch.int64)
        bins[ranked] = (log_p.exp()[ranked].cumsum(0) * self.bins).long().clamp(max=self.bins - 1)
        bins[log_p == -torch.inf] = self.bins
        probs = torch.zeros(self.bins + 1, dtype=torch.float64).index_add_(0, bins, log_p.exp())
        return _p_value(torch.bincount(bins[tokens], minlength=self.bins + 1), probs)


@pytest.fixture(scope="module")
def large() -> Large:
    return Large()


@pytest.mark.usefixtures("native_cpu")
@pytest.mark.parametrize(
    ("certain", "options"),
    [
        (False, {}),
        (False, {"mode": "block"}),
        (True, {}),
        (False, {"temperature": 0.8, "top_k": 400, "top_p": 0.9}),
        (True, {"temperature": 1.2, "top_p": 0.7, "mode": "block"}),
    ],
    ids=["token", "block", "certain", "filtered", "certain block filtered"],
)
def test_samples_of_32000_tokens(large: Large, certain: bool, options: dict[str, Any]) -> None:
    log_p, log_q = large.laws(**{name: value for name, value in options.items() if name != "mode"})
    drafts = log_q.argmax(-1).expand(large.rows, 2) if certain else large.drafts(log_q)
    out = large.verify(drafts, certain, **options)
    assert min(large.p_values(out, log_p, log_q)) > LIKELY
    if options.get("mode") != "block":
        chance = log_p[0, drafts[0, 0]].exp() if certain else torch.minimum(log_p[0], log_q[0].exp().log()).exp().sum()
        accepted = (out.num_accepted >= 1).sum()
        counts = torch.stack([accepted, large.rows - accepted])
        assert _p_value(counts, torch.stack([chance, 1.0 - chance])) > LIKELY


@pytest.mark.usefixtures("native_cpu")
@pytest.mark.parametrize("bias", ["sampled rule for certain drafts", "target for the residual", "residual not scaled"])
def test_samples_of_a_wrong_law_are_told_apart(large: Large, bias: str) -> None:
    log_p, log_q = large.laws()
    certain = log_q.argmax(-1).expand(large.rows, 2)
    out = large.verify(certain if bias.startswith("sampled") else large.drafts(log_q))
    tokens, rejected = out.token_ids[:, 0], out.num_accepted == 0
    if bias == "target for the residual":
        tokens = torch.where(rejected, _draw(log_p[0], large.rows, large.generator), tokens)
    elif bias == "residual not scaled":
        residual = (log_p[0].exp() - log_q[0].exp()).clamp(min=0.0)
        tokens = torch.where(rejected, _draw(residual.log(), large.rows, large.generator), tokens)
    assert large.p_value(tokens, log_p[0], log_q[0]) < UNLIKELY


@pytest.mark.parametrize(("levels", "right"), [(2**32, True), (2**8, False)])
def test_the_race_needs_fine_noise(levels: int, right: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    probs = torch.randn(100, dtype=torch.float64, generator=generator).mul(2.0).softmax(0)
    y = (torch.randint(levels, (40000, 100), generator=generator) + 0.5) / levels
    counts = torch.bincount(reference.race(probs, -torch.log1p(-y)), minlength=100)
    assert (_p_value(counts, probs) > LIKELY) if right else (_p_value(counts, probs) < UNLIKELY)


@pytest.mark.usefixtures("native_cpu")
@pytest.mark.parametrize(
    ("certain", "options"),
    [
        (False, {}),
        (False, {"mode": "block"}),
        (True, {"mode": "block", "temperature": 0.7}),
        (False, {"temperature": 1.3, "top_p": 0.8}),
    ],
    ids=["token", "block", "certain block", "filtered"],
)
def test_a_million_samples_of_a_few_tokens(certain: bool, options: dict[str, Any]) -> None:
    """The joint law of three tokens, contexts and all, continued with the target."""
    rows, vocab = 2**20, 4
    filters = {name: value for name, value in options.items() if name != "mode"}
    target, draft = Model(vocab, 2, 5, spread=1.0), Model(vocab, 2, 6, spread=1.0)
    generator = torch.Generator().manual_seed(7)

    def follow(model: Model, tokens: Tensor, likeliest: bool = False) -> Tensor:
        """The next token of every row, by the model, given its first tokens."""
        count = tokens.shape[1]
        contexts = every_sequence(vocab, count)
        log_probs = log_probs_of(model, contexts, count + 1, filters)[:, count]
        place = (tokens * vocab ** torch.arange(count - 1, -1, -1)).sum(1)
        if likeliest:
            return log_probs.argmax(-1)[place]
        uniform = torch.rand(rows, 1, dtype=torch.float64, generator=generator)
        return (uniform > log_probs.exp().cumsum(1)[place]).sum(1).clamp(max=vocab - 1)

    drafts = torch.empty(rows, 0, dtype=torch.int64)
    for _ in range(2):
        drafts = torch.cat([drafts, follow(draft, drafts, certain)[:, None]], 1)
    out = grpo_kernels.verify_draft(
        target.rows(drafts, 3).float(),
        drafts,
        draft_logits=None if certain else draft.rows(drafts, 2).float(),
        seeds=_seeds(rows, generator),
        **options,
    )
    tokens = out.token_ids[:, :1]
    for i in (1, 2):
        tokens = torch.cat(
            [tokens, torch.where(out.num_accepted >= i, out.token_ids[:, i], follow(target, tokens))[:, None]], 1
        )
    counts = torch.bincount((tokens * torch.tensor([16, 4, 1])).sum(1), minlength=64)
    assert _p_value(counts, law_of_target(target, 3, filters)) > LIKELY


@pytest.mark.usefixtures("native_cpu")
@pytest.mark.parametrize(("mode", "step", "right"), [("token", 1, True), ("block", 1, True), ("block", 0, False)])
def test_sequences_of_calls_with_one_seed(mode: str, step: int, right: bool) -> None:
    """Offsets go on by the emitted tokens, whatever a call has looked at; if they stay, noise is used again.

    All contexts are alike, so that one distribution serves every row and call: a token and the next make a pair.
    """
    rows, count, length = 2**17, 3, 4
    generator = torch.Generator().manual_seed(9)
    target, draft = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.2, 0.4, 0.4]).log()
    tokens, emitted = torch.zeros(rows, length + count + 1, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    seeds, offsets = _seeds(rows, generator), torch.zeros(rows, dtype=torch.int64)
    for _ in range(length):
        drafts = _draw(draft, rows * count, generator).view(rows, count)
        logits = target.expand(rows, count + 1, 3), draft.expand(rows, count, 3)
        out = grpo_kernels.verify_draft(
            logits[0], drafts, draft_logits=logits[1], seeds=seeds, offsets=offsets, mode=mode
        )
        offsets = offsets + step * (out.num_accepted + 1)
        open_ = emitted < length
        for i in range(count + 1):
            there = open_ & (out.num_accepted >= i)
            tokens[there, emitted[there] + i] = out.token_ids[there, i]
        emitted = torch.where(open_, emitted + out.num_accepted + 1, emitted)
    counts = torch.bincount((tokens[:, :length] * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81)
    law = target.double().exp()[every_sequence(3, length)].prod(1)
    assert (_p_value(counts, law) > LIKELY) if right else (_p_value(counts, law) < UNLIKELY)


@pytest.mark.usefixtures("native_cpu")
def test_the_loop_of_the_page() -> None:
    """It decodes what the model alone would: the joint law of four tokens, a first-order chain of three ids."""
    page = Path(__file__).parents[1] / "docs" / "speculative_sampling.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "grpo_kernels": grpo_kernels}
    exec(next(block for block in blocks if "def decode" in block), names)
    model, draft, temperature = torch.randn(3, 3) * 2, torch.randn(3, 3), 0.7
    first = torch.zeros(2**17, dtype=torch.int64)
    tokens, log_probs = names["decode"](
        lambda ids: model[ids], lambda ids: draft[ids], first, length=4, temperature=temperature
    )
    steps = (model.double() / temperature).log_softmax(-1)
    path = torch.cat([first[:, None], tokens], 1)
    torch.testing.assert_close(log_probs.double(), steps[path[:, :-1], path[:, 1:]], rtol=1e-5, atol=1e-6)
    every = every_sequence(3, 4)
    law = steps[torch.nn.functional.pad(every, (1, 0))[:, :-1], every].sum(1).exp()
    counts = torch.bincount((tokens * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81)
    assert _p_value(counts, law) > LIKELY

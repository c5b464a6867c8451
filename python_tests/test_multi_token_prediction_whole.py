"""Modules and loss together: the cross-entropies of every depth, document by document, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from grpo_kernels import FusedLMHead, MultiTokenPrediction, mtp_linear_cross_entropy
from python_tests.mtp_models import LAYOUTS, H, Layout, V, build, document_by_document, layout

WEIGHTS = (1.0, 0.5, 0.25, 0.125)


class Problem:
    """Leaves of a model of one table and a head, whose states are given."""

    def __init__(self, where: Layout) -> None:
        generator = torch.Generator().manual_seed(5)
        self.where = where
        self.ids = torch.randint(V, where.shape, generator=generator)
        self.hidden = torch.randn(*where.shape, H, generator=generator, dtype=torch.float64).requires_grad_()
        self.table = torch.randn(V, H, generator=generator, dtype=torch.float64).requires_grad_()
        self.weight = torch.randn(V, H, generator=generator, dtype=torch.float64).requires_grad_()

    def leaves(self, mtp: MultiTokenPrediction) -> list[Tensor]:
        return [self.hidden, self.table, self.weight, *mtp.parameters()]

    def loss(self, mtp: MultiTokenPrediction, shift: int, **options: Any) -> Any:
        where = self.where
        ahead = mtp(
            self.hidden, self.ids, lambda tokens: self.table[tokens],
            shift=shift, block_options=where.block_options(), **where.options,
        )  # fmt: skip
        options = {"shift": shift, "depth_weights": WEIGHTS[: len(ahead) + 1], **where.options, **options}
        return mtp_linear_cross_entropy((self.hidden, *ahead), self.weight, self.ids, **options)

    def by_document(self, mtp: MultiTokenPrediction, shift: int) -> tuple[Tensor, list[int]]:
        """The loss, each depth divided by its number of tokens; and those."""
        where, ids = self.where, self.ids.reshape(-1)
        states = [dict(enumerate(self.hidden.reshape(-1, H)))]
        states += document_by_document(mtp, self.hidden, self.ids, self.table, where, shift)
        total, counts = torch.zeros((), dtype=torch.float64), []
        for k, (by_row, weight) in enumerate(zip(states, WEIGHTS, strict=False)):
            found = torch.zeros((), dtype=torch.float64)
            count = 0
            for rows in where.documents:
                ahead = k + shift
                for row, token in zip(rows.tolist(), ids[rows[ahead:]].tolist(), strict=False):
                    found = found + F.cross_entropy((self.weight @ by_row[row])[None], torch.tensor([token]))
                    count += 1
            total = total + weight * found / max(count, 1)
            counts.append(count)
        return total, counts


def _largest_difference(problem: Problem, mtp: MultiTokenPrediction, shift: int, **options: Any) -> float:
    output = problem.loss(mtp, shift, **options)
    expected, counts = problem.by_document(mtp, shift)
    if not options:
        assert output.valid_counts.tolist() == counts
    worst = (output.loss - expected).abs().item()
    leaves = problem.leaves(mtp)
    gradients = [torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (output.loss, expected)]
    for actual, wanted in zip(*gradients, strict=True):
        if wanted is None:
            assert actual is None or actual.abs().max() == 0
        else:
            assert actual is not None
            worst = max(worst, (actual - wanted).abs().max().item())
    return worst


@pytest.mark.parametrize("name", LAYOUTS)
def test_sum_over_documents(name: str) -> None:
    """Documents shorter than there are depths among them."""
    for depths, shift, options in ((1, 1, {}), (3, 0, {"order": "hidden_first", "final_norm": True, "shared": True})):
        assert _largest_difference(Problem(layout(name)), build(depths, **options), shift) < 1e-12  # type: ignore[arg-type]


def test_planted_faults_are_found() -> None:
    packed = Problem(layout("packed"))
    assert _largest_difference(packed, build(2), 1, cu_seqlens=None) > 1e-3  # targets in the next document
    assert _largest_difference(packed, build(2), 1, normalizer="tokens") > 1e-3
    padded = Problem(layout("left"))
    assert _largest_difference(padded, build(2), 1, positions=None) > 1e-3  # padding predicts the first tokens


@pytest.mark.parametrize("detach", ["trunk", "frozen"])
def test_what_is_detached_gets_the_gradient_of_depth_0(detach: str) -> None:
    problem = Problem(layout("packed"))
    mtp = build(2, detach=detach)
    leaves = problem.leaves(mtp)
    found = torch.autograd.grad(problem.loss(mtp, 1, detach_head=True).loss, leaves, allow_unused=True)
    alone = mtp_linear_cross_entropy(
        problem.hidden[None], problem.weight, problem.ids, depth_weights=WEIGHTS[:1], **problem.where.options
    )
    trunk = torch.autograd.grad(alone.loss, [problem.hidden, problem.weight])
    assert found[1] is None
    for actual, wanted in zip((found[0], found[2]), trunk, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-13)
    modules = found[3:]
    assert all((grad is None) == (detach == "frozen") for grad in modules)
    if detach == "trunk":  # as exact as with everything trained
        full = torch.autograd.grad(problem.by_document(build(2), 1)[0], leaves[:1])  # the trunk alone would differ
        assert not torch.allclose(full[0], trunk[0])
        plain = build(2)
        expected = torch.autograd.grad(problem.by_document(plain, 1)[0], list(plain.parameters()))
        for actual, wanted in zip(modules, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def test_through_the_head_of_the_model() -> None:
    """FusedLMHead computes the same; the head of the model stays the one that is trained."""
    problem, mtp = Problem(layout("batch")), build(2)
    expected = problem.loss(mtp, 1).loss
    head = torch.nn.Linear(H, V, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(problem.weight)
    where = problem.where
    ahead = mtp(problem.hidden, problem.ids, lambda tokens: problem.table[tokens], block_options=where.block_options())
    hiddens = (problem.hidden, *ahead)
    found = FusedLMHead(head).mtp_cross_entropy(hiddens, problem.ids, depth_weights=WEIGHTS[:3]).loss
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    gradients = torch.autograd.grad(found, [head.weight, problem.table])
    wanted = torch.autograd.grad(expected, [problem.weight, problem.table])
    for actual, of in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(actual, of, rtol=0, atol=1e-13)

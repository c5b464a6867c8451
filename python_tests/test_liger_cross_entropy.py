"""Liger's cross-entropies under Liger's names: against the formulas in float64."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels.integrations.liger import (
    CrossEntropyOutput,
    LigerFusedLinearCrossEntropyLoss,
    LigerFusedLinearScaledCrossEntropyFunction,
    LigerFusedLinearScaledCrossEntropyTPFunction,
)
from grpo_kernels.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("native_cpu")

ROWS, WIDTH, VOCAB, IGNORED = 9, 8, 17, 4
EXACT = {"rtol": 1e-10, "atol": 1e-12}
Problem = dict[str, Tensor]


def problem(dtype: torch.dtype = torch.float64) -> Problem:
    """Some targets are IGNORED, one is negative, and their hidden states are NaN; `live` says which rows count."""
    target = torch.tensor([3, IGNORED, 0, 16, -100, 3, IGNORED, 11, 7])
    live = (target >= 0) & (target != IGNORED)
    hidden = torch.randn(ROWS, WIDTH).masked_fill(~live[:, None], math.nan)
    return {
        "hidden": hidden.to(dtype),
        "weight": torch.randn(VOCAB, WIDTH).to(dtype),
        "bias": torch.randn(VOCAB).to(dtype),
        "target": target,
        "live": live,
    }


def leaves_of(p: Problem) -> list[Tensor]:
    return [p[name].detach().clone().requires_grad_() for name in ("hidden", "weight", "bias")]


def formulas(p: Problem, leaves: list[Tensor], o: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, z-loss, accuracy and predicted tokens."""
    hidden, weight, bias = leaves
    live, zeros = p["live"], torch.zeros(ROWS, dtype=hidden.dtype)
    z = hidden[live] @ weight.T + bias
    z = z if o["softcap"] is None else o["softcap"] * torch.tanh(z / o["softcap"])
    log_probs = torch.log_softmax(z, -1).gather(-1, p["target"][live][:, None])[:, 0]
    squares = o["lse_square_scale"] * torch.logsumexp(z, -1) ** 2
    scale = log_probs.detach().exp() if o["use_token_scaling"] else 1.0
    hits = (z.argmax(-1) == p["target"][live]).to(hidden.dtype)
    reduce = {
        "mean": lambda x: x.mean(),
        "sum": lambda x: x.sum(),
        "none": lambda x: zeros.masked_scatter(live, x),
    }[o["reduction"]]
    accuracy = hits.mean() if o["reduction"] == "sum" else reduce(hits)
    predicted = torch.full((ROWS,), -1).masked_scatter(live, z.argmax(-1))
    return reduce(scale * (squares - log_probs)), reduce(scale * squares), accuracy, predicted


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_option(reduction: str) -> None:
    p = problem()
    for softcap, z_loss, scaled in itertools.product((None, 2.0), (0.0, 0.01), (False, True)):
        o = {"softcap": softcap, "lse_square_scale": z_loss, "use_token_scaling": scaled, "reduction": reduction}
        leaves, exact = leaves_of(p), leaves_of(p)
        loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, **o)(leaves[1], leaves[0], p["target"], leaves[2])
        wanted = formulas(p, exact, o)
        torch.testing.assert_close(loss, wanted[0], **EXACT)
        upstream = torch.randn(loss.shape).double()
        gradients = (torch.autograd.grad(x, y, upstream) for x, y in ((loss, leaves), (wanted[0], exact)))
        for gradient, other in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, other, **EXACT)
        every = LigerFusedLinearCrossEntropyLoss(
            ignore_index=IGNORED, return_z_loss=True, return_token_accuracy=True, return_predicted_tokens=True, **o
        )
        output = every(p["weight"], p["hidden"], p["target"], p["bias"])
        assert isinstance(output, CrossEntropyOutput)
        for value, other in zip(vars(output).values(), wanted, strict=True):
            torch.testing.assert_close(value, other.detach(), **EXACT)


def test_returns_what_was_asked_for() -> None:
    p = problem()
    output = LigerFusedLinearCrossEntropyLoss(return_predicted_tokens=True)(p["weight"], p["hidden"], p["target"])
    assert output.z_loss is None
    assert output.token_accuracy is None
    assert output.predicted_tokens.dtype == torch.int64


@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_float32_allows(half: torch.dtype) -> None:
    p = problem(half)
    o = {"softcap": 3.0, "lse_square_scale": 0.01, "use_token_scaling": False, "reduction": "mean"}
    loss_fn = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, accum_dtype=torch.float32, **o)
    results = []
    for dtype in (half, torch.float64, torch.float32):
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves_of(p)]
        loss = loss_fn(leaves[1], leaves[0], p["target"], leaves[2]) if not results else formulas(p, leaves, o)[0]
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert results[0][0].dtype == torch.float32
    for ours, exact, eager in zip(*results, strict=True):
        assert_as_accurate(ours, exact, eager)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_learn_from(reduction: str) -> None:
    hidden, weight = torch.full((3, 8), math.nan, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    output = LigerFusedLinearCrossEntropyLoss(reduction=reduction, return_z_loss=True, return_token_accuracy=True)(
        weight, hidden, torch.full((3,), -100)
    )
    assert not output.loss.any()
    assert not output.z_loss.any()
    assert not output.token_accuracy.any()
    assert not any(g.any() for g in torch.autograd.grad(output.loss.sum(), (hidden, weight)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"ce_weight": torch.ones(5)}, "ce_weight must be None"),
        ({"label_smoothing": 0.1}, "label_smoothing must be 0: it is not served, got 0.1"),
        ({"reduction": "max"}, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
        ({"softcap": 0.0}, "softcap must be finite and > 0"),
        ({"lse_square_scale": -1.0}, "lse_square_scale must be finite and >= 0"),
    ],
)
def test_what_is_not_served_raises(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"LigerFusedLinearCrossEntropyLoss: {message}"):
        LigerFusedLinearCrossEntropyLoss(**bad)


def test_scaled_cross_entropy() -> None:
    p = problem()
    leaves, exact = leaves_of(p)[:2], leaves_of(p)[:2]
    apply = LigerFusedLinearScaledCrossEntropyFunction.apply
    nll, entropy = apply(*leaves, p["target"], 0.7, IGNORED, 1, True)
    every = torch.log_softmax(exact[0][p["live"]] @ exact[1].T / 0.7, -1)
    zeros = torch.zeros(ROWS).double()
    wanted = zeros.masked_scatter(p["live"], -every.gather(-1, p["target"][p["live"]][:, None])[:, 0])
    wanted_entropy = zeros.masked_scatter(p["live"], -(every.exp() * every).sum(-1))
    torch.testing.assert_close((nll, entropy), (wanted, wanted_entropy), **EXACT)
    upstream = torch.randn(2, ROWS).double()
    gradients = torch.autograd.grad((nll, entropy), leaves, tuple(upstream))
    torch.testing.assert_close(
        gradients, torch.autograd.grad((wanted, wanted_entropy), exact, tuple(upstream)), **EXACT
    )
    assert torch.equal(apply(*leaves, p["target"], 0.7, IGNORED), nll)
    with pytest.raises(ValueError, match="selected_token_ids must be None"):
        apply(*leaves, p["target"], selected_token_ids=p["target"])


def test_signatures_are_those_of_liger() -> None:
    """Of version 0.8.5."""
    own = inspect.signature(LigerFusedLinearCrossEntropyLoss).parameters
    assert {name: parameter.default for name, parameter in own.items()} == {
        "ce_weight": None, "ignore_index": -100, "lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "mean",
        "softcap": None, "return_z_loss": False, "accum_dtype": None, "use_token_scaling": False,
        "return_token_accuracy": False, "return_predicted_tokens": False,
    }  # fmt: skip
    for function, names in (
        (LigerFusedLinearCrossEntropyLoss.forward, ["self", "lin_weight", "_input", "target", "bias"]),
        (
            LigerFusedLinearScaledCrossEntropyFunction.apply,
            ["_input", "weight", "target", "temperature", "ignore_index", "m_tiles_per_cluster", "return_entropy",
             "selected_token_ids"],
        ),
        (
            LigerFusedLinearScaledCrossEntropyTPFunction.apply,
            ["_input", "weight", "target", "tp_group", "temperature", "ignore_index", "tiles_per_reduce",
             "return_entropy"],
        ),
    ):  # fmt: skip
        assert list(inspect.signature(function).parameters) == names

"""linear_token_log_probs: rows that do not count, bad rows, removed tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import LoRAFactors, linear_token_log_probs
from grpo_kernels.testing import assert_as_accurate
from python_tests.test_linear_log_probs import (
    BACKENDS,
    EVERY_OUTPUT,
    LORA_SCALE,
    Problem,
    problem,
    run,
    run_eager,
    slicing,
)

__all__ = ["slicing"]

INF, NAN = float("inf"), float("nan")


# --- rows that do not count ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("slicing")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 3e38])
def test_masked_rows_contribute_nothing(backend: str, garbage: float) -> None:
    draws = [gradients_beside_garbage(backend, garbage) for _ in range(4)]
    for name in draws[0]:
        assert_as_accurate(*map(torch.cat, zip(*(draw[name] for draw in draws), strict=True)), name=name)


def gradients_beside_garbage(backend: str, garbage: float) -> dict[str, list[Tensor]]:
    """Ours, those of float64 and of eager PyTorch, each [n], for a head whose masked rows hold garbage."""
    p = problem(31, 12, 600, bias=True, lora=True)
    mask = torch.rand(31) > 0.4
    p.ids[~mask] = 10**6
    p.ids[5], mask[5] = -100, True
    dead = ~mask | (p.ids < 0)
    with torch.no_grad():
        p.leaves["hidden"][dead] = garbage
    p.upstream[0][dead], p.upstream[1][dead] = NAN, INF
    with grpo_kernels.backend(backend):
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in p.leaves.items()}
        out = linear_token_log_probs(
            leaves["hidden"], leaves["weight"], p.ids, mask=mask, bias=leaves["bias"], outputs=EVERY_OUTPUT,
            lora=LoRAFactors(leaves["a"], leaves["b"], LORA_SCALE),
        )  # fmt: skip
        for value, masked in zip(out, (0.0, 0.0, 0.0, -1), strict=True):
            assert (value[dead] == masked).all()
        gradients = torch.autograd.grad((out.log_probs, out.entropy), list(leaves.values()), p.upstream)
    assert not gradients[0][dead].any()
    clean = Problem(
        {**p.leaves, "hidden": p.leaves["hidden"][~dead].detach().requires_grad_()},
        p.ids[~dead],
        (p.upstream[0][~dead], p.upstream[1][~dead]),
    )
    _, exact = run_eager(clean, torch.float64)
    _, eager = run_eager(clean, torch.float32)
    ours = dict(zip(exact, gradients, strict=True))
    ours["hidden"] = ours["hidden"][~dead]
    return {name: [way[name].flatten() for way in (ours, exact, eager)] for name in exact}


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_live_rows(backend: str) -> None:
    for rows, ids in ((0, torch.empty(0, dtype=torch.int64)), (3, torch.full((3,), -100))):
        p = problem(rows, 6, 50, bias=True, lora=True)._replace(ids=ids)
        with grpo_kernels.backend(backend):
            out, gradients = run(p)
        assert out.log_probs.shape == (rows,)
        assert not any(value.any() for value in out[:3])
        assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.usefixtures("slicing")
def test_rows_without_upstream_gradient_are_skipped() -> None:
    """Their hidden states may even be infinite by then: 0 * inf never enters the gradient of the weight."""
    p = problem(17, 9, 400)
    p.upstream[0][::2], p.upstream[1][::2] = 0.0, 0.0
    _, expected = run(p)
    _, exact = run_eager(p, torch.float64)
    _, eager = run_eager(p, torch.float32)
    for name, gradient in expected.items():
        assert_as_accurate(gradient, exact[name], eager[name], name=name)
    assert not expected["hidden"][::2].any()


@pytest.mark.usefixtures("slicing")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_row_is_nan_and_no_other(backend: str) -> None:
    p = problem(6, 8, 520)
    with torch.no_grad():
        p.leaves["hidden"][2] = NAN
    with grpo_kernels.backend(backend):
        out, gradients = run(p)
    for value in out[:3]:
        assert value.isnan().tolist() == [False, False, True, False, False, False]
    assert out.top1_ids[2] == -1
    assert gradients["hidden"].isnan().any(1).tolist() == [False, False, True, False, False, False]


@pytest.mark.usefixtures("native_cpu", "slicing")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_removes_tokens(backend: str) -> None:
    """Whole slices of the vocabulary, the first one among them, may have probability zero."""
    p = problem(9, 8, 1200, bias=True)
    removed = torch.zeros(1200, dtype=torch.bool)
    removed[:600], removed[900:] = True, True
    with torch.no_grad():
        p.leaves["bias"][removed] = -INF
    p.ids.copy_(torch.arange(600, 609))
    kept = {name: leaf[~removed] if len(leaf) == 1200 else leaf for name, leaf in p.leaves.items()}
    small = Problem({n: leaf.detach().requires_grad_() for n, leaf in kept.items()}, p.ids - 600, p.upstream)
    exact, exact_gradients = run_eager(small, torch.float64)
    eager, eager_gradients = run_eager(small, torch.float32)
    with grpo_kernels.backend(backend):
        out, gradients = run(p)
    for actual, expected, plain in zip(out[:3], exact, eager, strict=True):
        assert_as_accurate(actual, expected, plain)
    assert_as_accurate(gradients["hidden"], exact_gradients["hidden"], eager_gradients["hidden"])
    for name in ("weight", "bias"):
        assert not gradients[name][removed].any()
        assert_as_accurate(gradients[name][~removed], exact_gradients[name], eager_gradients[name])

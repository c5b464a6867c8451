"""linear_token_log_probs: gradients and outputs that are asked for, accumulators, layouts, dtypes, autocast."""

from __future__ import annotations

import pytest
import torch

from grpo_kernels import linear_token_log_probs
from grpo_kernels.testing import assert_as_accurate
from python_tests.test_linear_log_probs import Problem, check, problem, run, run_eager, slicing

__all__ = ["slicing"]


# --- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("slicing")
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "a", "b"])
def test_gradients_only_where_they_are_wanted(frozen: str) -> None:
    p = problem(11, 7, 333, bias=True, lora=True)
    _, everything = run(p)
    p.leaves[frozen].requires_grad_(False)
    _, some = run(p)
    assert set(everything) - set(some) == {frozen}
    assert all(torch.equal(some[name], everything[name]) for name in some)


@pytest.mark.usefixtures("slicing")
@pytest.mark.parametrize("outputs", [(), ("top1_ids",), ("entropy",), ("sum_squared_probs",)])
def test_outputs_that_were_not_asked_for_are_none(outputs: tuple[str, ...]) -> None:
    p = problem(5, 4, 700)
    wanted = linear_token_log_probs(p.leaves["hidden"], p.leaves["weight"], p.ids, outputs=outputs)
    every, _ = run(p)
    for name, value in wanted._asdict().items():
        if name == "log_probs" or name in outputs:
            assert torch.equal(value, getattr(every, name))
        else:
            assert value is None
    assert wanted.sum_squared_probs is None or not wanted.sum_squared_probs.requires_grad


@pytest.mark.usefixtures("slicing")
@pytest.mark.parametrize("output", ["log_probs", "entropy"])
def test_one_of_the_gradients(output: str) -> None:
    p = problem(8, 6, 410)
    other = 1 if output == "log_probs" else 0
    p.upstream[other].zero_()
    out = linear_token_log_probs(p.leaves["hidden"], p.leaves["weight"], p.ids, outputs=("entropy",))
    found = torch.autograd.grad(getattr(out, output), (p.leaves["hidden"], p.leaves["weight"]), p.upstream[1 - other])
    _, exact = run_eager(p, torch.float64)
    _, eager = run_eager(p, torch.float32)
    for name, gradient in zip(("hidden", "weight"), found, strict=True):
        assert_as_accurate(gradient, exact[name], eager[name], name=name)


@pytest.mark.usefixtures("slicing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_grad_accumulator(dtype: torch.dtype) -> None:
    """Two micro-batches add to one buffer in float32; the weight gets no gradient of its own."""
    a, b = problem(9, 6, 600, dtype), problem(13, 6, 600, dtype)
    weight = a.leaves["weight"]
    b.leaves["weight"] = weight
    start = torch.randn(600, 6)
    buffer = start.clone()
    for p in (a, b):
        out = linear_token_log_probs(
            p.leaves["hidden"], weight, p.ids, outputs=("entropy",), weight_grad_accumulator=buffer
        )
        torch.autograd.backward((out.log_probs, out.entropy), p.upstream)
    assert weight.grad is None
    exact = start.double() + sum(run_eager(p, torch.float64)[1]["weight"] for p in (a, b))
    eager = start + sum(run_eager(p, torch.float32)[1]["weight"] for p in (a, b))
    assert_as_accurate(buffer, exact, eager)


def test_leading_shapes_and_views() -> None:
    p = problem(24, 10, 90)
    flat, _ = run(p)
    hidden = p.leaves["hidden"].detach().view(2, 3, 4, 10)
    shaped = linear_token_log_probs(hidden, p.leaves["weight"], p.ids.view(2, 3, 4).int(), outputs=("entropy",))
    assert shaped.log_probs.shape == (2, 3, 4)
    assert torch.equal(shaped.log_probs.flatten(), flat.log_probs)
    one = linear_token_log_probs(hidden[0, 0, 0], p.leaves["weight"], p.ids[0])
    assert_as_accurate(one.log_probs, flat.log_probs[0].double(), flat.log_probs[0])
    padded = torch.randn(2, 3, 5, 10)
    padded[:, :, :4] = hidden
    padded.requires_grad_()
    view = linear_token_log_probs(padded[:, :, :-1], p.leaves["weight"], p.ids.view(2, 3, 4))
    assert torch.equal(view.log_probs.flatten(), flat.log_probs)
    view.log_probs.sum().backward()
    assert padded.grad is not None
    assert not padded.grad[:, :, 4].any()
    assert padded.grad[:, :, :4].any(-1).all()


def test_transposed_weight_is_read_as_it_lies() -> None:
    p = problem(6, 5, 300)
    weight = p.leaves["weight"].detach().t().contiguous().t()
    assert weight.stride() == (1, 300)
    out = linear_token_log_probs(p.leaves["hidden"], weight, p.ids)
    expected, _ = run(p)
    assert_as_accurate(out.log_probs, run_eager(p, torch.float64)[0][0], expected.log_probs)


# --- dtypes ----------------------------------------------------------------------------------------------------------


def test_mixed_dtypes_mean_the_wider_head() -> None:
    p = problem(15, 12, 500)
    hidden = p.leaves["hidden"].detach().bfloat16().requires_grad_()
    out = linear_token_log_probs(hidden, p.leaves["weight"], p.ids)
    same = Problem({**p.leaves, "hidden": hidden}, p.ids, (p.upstream[0], torch.zeros(15)))
    values, exact = run_eager(same, torch.float64)
    eager_values, eager = run_eager(same, torch.float32)
    assert_as_accurate(out.log_probs, values[0], eager_values[0])
    found = torch.autograd.grad(out.log_probs, (hidden, p.leaves["weight"]), p.upstream[0])
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, torch.float32]
    for name, gradient in zip(("hidden", "weight"), found, strict=True):
        assert_as_accurate(gradient, exact[name], eager[name], name=name)


def test_autocast_rounds_the_operands_and_nothing_else() -> None:
    p = problem(15, 12, 500, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, gradients = run(p)
    rounded = {name: leaf.detach().bfloat16().float().requires_grad_() for name, leaf in p.leaves.items()}
    values, exact = run_eager(p._replace(leaves=rounded), torch.float64)
    eager_values, eager = run_eager(p._replace(leaves=rounded), torch.float32)
    assert out.log_probs.dtype == torch.float32
    assert_as_accurate(out.log_probs, values[0], eager_values[0])
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert_as_accurate(gradient, exact[name], eager[name], name=name)
    with torch.autocast("cpu", torch.bfloat16):
        outside = linear_token_log_probs(p.leaves["hidden"], p.leaves["weight"], p.ids, bias=p.leaves["bias"])
    assert torch.equal(outside.log_probs, out.log_probs)


def test_a_large_common_offset() -> None:
    """Logits of 1e4 + something: the difference to the maximum is formed before any sum."""
    p = problem(100, 16, 900, bias=True)
    with torch.no_grad():
        p.leaves["bias"].fill_(1e4)
    check(p)


def test_logits_far_below_zero() -> None:
    """No column beyond the vocabulary may enter with a logit of 0."""
    p = problem(100, 16, 907, bias=True)
    with torch.no_grad():
        p.leaves["bias"].sub_(500.0)
    check(p)

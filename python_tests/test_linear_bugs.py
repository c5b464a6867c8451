"""Mistakes that other heads without logits have made, as tests of the three linear ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import grpo_kernels
from grpo_kernels import GRPOLossConfig, linear_cross_entropy, linear_grpo_loss, linear_token_log_probs
from grpo_kernels.testing import accuracy_error, assert_as_accurate

pytestmark = pytest.mark.usefixtures("native_cpu")

INF, NAN = float("inf"), float("nan")
OPS = ("log_probs", "cross_entropy", "loss")
CONFIG = GRPOLossConfig(reduction="sequence_mean_token_mean", kl_coef=0.1)
Inputs = dict[str, Any]


def make(rows: int, width: int, vocab: int, *, dtype: torch.dtype = torch.float32, spread: float = 2.0) -> Inputs:
    """Two sequences, a head with a bias, and old log-probs near those of the head."""
    inputs: Inputs = {
        "hidden": torch.randn(2, rows // 2, width).to(dtype),
        "weight": (torch.randn(vocab, width) * spread / width**0.5).to(dtype),
        "bias": torch.randn(vocab).to(dtype),
        "ids": torch.randint(vocab, (2, rows // 2)),
        "advantages": torch.tensor([1.5, -0.5]),
        "mask": torch.ones(2, rows // 2, dtype=torch.bool),
    }
    with torch.no_grad():
        near = _eager_log_probs(inputs, torch.float32)
    return inputs | {"old": near + 0.05, "ref": near - 0.1}


def _logits(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    live = inputs["mask"] & (inputs["ids"] >= 0)
    hidden = torch.where(live[..., None], inputs["hidden"], 0.0)
    return F.linear(hidden.to(dtype), inputs["weight"].to(dtype), inputs["bias"].to(dtype))


def _eager_log_probs(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    live = inputs["mask"] & (inputs["ids"] >= 0)
    chosen = torch.log_softmax(_logits(inputs, dtype), -1).gather(-1, torch.where(live, inputs["ids"], 0)[..., None])
    return torch.where(live, chosen.squeeze(-1), 0.0)


def eager(op: str, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The op with all logits at once."""
    log_probs = _eager_log_probs(inputs, dtype)
    live = inputs["mask"] & (inputs["ids"] >= 0)
    if op == "log_probs":
        return log_probs
    if op == "cross_entropy":
        return -log_probs.sum() / live.sum().clamp(min=1)
    ratio = torch.exp(log_probs - inputs["old"].to(dtype))
    advantages = inputs["advantages"].to(dtype)[:, None]
    gap = inputs["ref"].to(dtype) - log_probs
    loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) + 0.1 * (gap.exp() - gap - 1)
    counts = live.sum(-1).clamp(min=1)
    return (torch.where(live, loss, 0.0).sum(-1) / counts).mean()


def ours(op: str, inputs: Inputs, dtype: torch.dtype | None = None) -> Tensor:
    """The op itself; `dtype` is there to be called as `eager` is."""
    head = (inputs["hidden"], inputs["weight"])
    ids, bias = torch.where(inputs["mask"], inputs["ids"], -100), inputs["bias"]
    if op == "log_probs":
        return linear_token_log_probs(*head, ids, bias=bias).log_probs
    if op == "cross_entropy":
        return linear_cross_entropy(*head, ids, bias=bias)
    return linear_grpo_loss(
        *head, ids, inputs["old"], inputs["advantages"], inputs["mask"],
        CONFIG, bias=bias, ref_log_probs=inputs["ref"],
    ).loss  # fmt: skip


def results(function: Callable[..., Tensor], op: str, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The value and the gradients of states, weight and bias, for an upstream gradient that differs row by row."""
    leaves = {name: inputs[name].detach().to(dtype).requires_grad_() for name in ("hidden", "weight", "bias")}
    output = function(op, {**inputs, **leaves}, dtype)
    upstream = torch.linspace(-1.5, 2.5, output.numel(), dtype=torch.float64).view(output.shape).to(output.dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream)
    return {"value": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(op: str, *draws: Inputs, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Ours within the accuracy budget, value and gradients; those of the first draw are returned for further looks.

    Small problems are judged together: eager may be exact in one by chance.
    """
    ways = ((ours, dtype), (eager, torch.float64), (eager, torch.float32))
    found = [[results(function, op, inputs, wide) for function, wide in ways] for inputs in draws]
    for name in found[0][0]:
        tensors = (torch.cat([of_draw[way][name].flatten() for of_draw in found]) for way in range(3))
        assert_as_accurate(*tensors, name=f"{op}: {name}")
    return found[0][0]


@pytest.mark.parametrize("op", OPS)
def test_every_row_gets_its_own_upstream_gradient(op: str) -> None:
    """Some multiplied all rows by the first one's, which only ones as upstream gradients hide."""
    check(op, make(200, 24, 300))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("upstream", [0.0, -3.0, 1e-3])
def test_an_upstream_gradient_other_than_one_counts(op: str, upstream: float) -> None:
    """Some ignored it: a loss scale or gradient accumulation had no effect."""
    inputs = make(20, 16, 131)
    leaf = inputs["weight"].clone().requires_grad_()
    output = ours(op, {**inputs, "weight": leaf})
    (once,) = torch.autograd.grad(output, leaf, torch.ones_like(output), retain_graph=True)
    (scaled,) = torch.autograd.grad(output, leaf, torch.full_like(output, upstream))
    torch.testing.assert_close(scaled, once * upstream)
    assert once.abs().max() > 1e-3


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("vocab", [2, 63, 257, 1025, 32003])
def test_a_vocabulary_that_no_tile_divides(op: str, vocab: int) -> None:
    """Columns beyond the vocabulary came in as logits of 0, and made log-probs that were far too low."""
    rows, draws = (12, 1) if vocab > 2000 else (40, 8)
    check(op, *(make(rows, 24, vocab) for _ in range(draws)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("vocab", [300, 32003])
def test_all_logits_below_minus_ninety(op: str, vocab: int) -> None:
    """A running maximum that begins at 0 takes e^-90 for the sum."""
    inputs = make(12, 24, vocab)
    inputs["bias"] = inputs["bias"] - 200.0
    actual = check(op, inputs)
    assert actual["value"].abs().max() < 100.0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_a_large_number_on_all_logits_cancels(op: str, offset: float) -> None:
    """The log-prob is (z_t - max) - log(sum), not z_t - (max + log(sum)). What remains is the rounding of the logits
    themselves, half of 2^-10 at 1e4: eager PyTorch, which has them too, sets the budget."""
    inputs = make(60, 24, 300)
    inputs["bias"] = inputs["bias"] + offset
    check(op, inputs)


def test_an_offset_that_is_exact_changes_nothing_but_the_logits_rounding() -> None:
    """Logits that are multiples of 1/8 stay exact under the offset, and so does every log-prob, bit for bit."""
    hidden = torch.randint(-3, 4, (30, 16)).float()
    weight = torch.randint(-3, 4, (300, 16)).float() / 8
    ids, bias = torch.randint(300, (30,)), torch.zeros(300)
    plain = linear_token_log_probs(hidden, weight, ids, bias=bias, outputs=("entropy",))
    moved = linear_token_log_probs(hidden, weight, ids, bias=bias + 8192.0, outputs=("entropy",))
    assert torch.equal(plain.log_probs, moved.log_probs)
    assert torch.equal(plain.entropy, moved.entropy)


@pytest.mark.parametrize("op", OPS)
def test_weight_gradient_of_many_rows_is_summed_in_float32(op: str) -> None:
    """Sums in bf16 stop growing after some hundred equal terms: here 8192 rows pull the same way, in many chunks."""
    rows, width, vocab = 8192, 8, 64
    inputs = make(rows, width, vocab, dtype=torch.bfloat16)
    inputs["hidden"] = (inputs["hidden"] * 0.1 + 1.0).bfloat16()
    inputs["ids"] = torch.full_like(inputs["ids"], 3)
    with torch.no_grad():
        near = _eager_log_probs(inputs, torch.float32)
    inputs |= {"old": near, "ref": near, "advantages": torch.ones(2)}
    actual, expected = (results(f, op, inputs, d) for f, d in ((ours, torch.bfloat16), (eager, torch.float64)))
    error = accuracy_error(actual["weight"], expected["weight"])
    assert error <= torch.finfo(torch.bfloat16).eps
    logits = _logits(inputs, torch.float32).view(rows, vocab).requires_grad_()
    upstream = torch.linspace(-1.5, 2.5, rows) if op == "log_probs" else torch.full((rows,), 1.0 / rows)
    (slope,) = torch.autograd.grad(torch.log_softmax(logits, -1)[:, 3], logits, upstream)
    total = torch.zeros(vocab, width, dtype=torch.bfloat16)  # what the test guards against, on these inputs
    for part, states in zip(slope.split(16), inputs["hidden"].float().view(rows, width).split(16), strict=True):
        total += (part.T @ states).bfloat16()
    whole = slope.double().T @ inputs["hidden"].double().view(rows, width)
    assert accuracy_error(total, whole) > 4 * error


@pytest.mark.parametrize("op", OPS)
def test_the_gradient_of_a_certain_target_does_not_vanish(op: str) -> None:
    """p - 1 is formed before anything is rounded. In bf16 p = 0.999 is 1, and the target's gradient would be 0."""
    rows, width, vocab = 64, 16, 50
    inputs = make(rows, width, vocab, dtype=torch.bfloat16, spread=0.1)
    inputs["bias"][7] = 10.0
    inputs["ids"] = torch.full_like(inputs["ids"], 7)
    with torch.no_grad():
        near = _eager_log_probs(inputs, torch.float32)
    inputs |= {"old": near, "ref": near}
    assert -0.01 < near.max() < -1e-4
    actual, expected = (results(f, op, inputs, d) for f, d in ((ours, torch.bfloat16), (eager, torch.float64)))
    for name in ("weight", "bias"):
        of_target = accuracy_error(actual[name][7], expected[name][7])
        assert of_target <= torch.finfo(torch.bfloat16).eps, name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_reaches_values_and_gets_its_gradient(op: str, dtype: torch.dtype) -> None:
    inputs = make(60, 24, 131, dtype=dtype)
    with_bias = check(op, inputs, dtype=dtype)
    without = ours(op, {**inputs, "bias": torch.zeros_like(inputs["bias"])})
    assert not torch.allclose(with_bias["value"], without, rtol=1e-3, atol=0.0)
    assert with_bias["bias"].dtype == dtype
    assert with_bias["bias"].abs().max() > 0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e38])
def test_garbage_behind_the_mask_reaches_nothing(op: str, garbage: float) -> None:
    """0 * NaN is NaN: the weight's gradient is a product over all rows."""
    draws = [make(40, 24, 131) for _ in range(8)]
    for inputs in draws:
        inputs["mask"][0, 3:9] = False
        inputs["mask"][1, ::2] = False
    inputs = draws[0]
    clean = check(op, *draws)
    dead = ~inputs["mask"]
    spoilt = dict(inputs)
    spoilt["hidden"] = torch.where(dead[..., None], garbage, inputs["hidden"])
    spoilt["ids"] = torch.where(dead, 2**31 - 1, inputs["ids"])
    spoilt |= {name: torch.where(dead, garbage, inputs[name]) for name in ("old", "ref")}
    for name, value in results(ours, op, spoilt, torch.float32).items():
        assert torch.equal(value, clean[name]), name
    assert clean["hidden"][dead].count_nonzero() == 0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_inputs_stay_as_they_are_and_a_later_change_is_noticed(op: str, name: str) -> None:
    inputs = make(20, 16, 131)
    before = {key: value.clone() for key, value in inputs.items()}
    leaves = {key: inputs[key].clone().requires_grad_() for key in ("hidden", "weight", "bias")}
    used = {key: leaf * 1.0 for key, leaf in leaves.items()}
    output = ours(op, {**inputs, **used})
    output.sum().backward(retain_graph=True)
    for key, value in before.items():
        assert torch.equal(used.get(key, inputs[key]), value), key
    with torch.no_grad():
        used[name].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_a_second_backward_gives_the_same(op: str) -> None:
    """Gradients that were formed in the forward are given away by the first backward."""
    inputs = make(20, 16, 131)
    leaf = inputs["weight"].clone().requires_grad_()
    output = ours(op, {**inputs, "weight": leaf}).sum()
    (first,) = torch.autograd.grad(output, leaf, torch.tensor(2.0), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(output, leaf, torch.tensor(2.0), retain_graph=True)
    (third,) = torch.autograd.grad(output, leaf, torch.tensor(1.0))
    assert torch.equal(first, kept)
    assert torch.equal(second, kept)
    torch.testing.assert_close(third * 2, kept)


@pytest.mark.parametrize("op", OPS)
def test_no_live_token_gives_zero_and_no_nan(op: str) -> None:
    inputs = make(20, 16, 131)
    inputs["mask"][:] = False
    inputs["hidden"][:] = NAN
    for name, value in results(ours, op, inputs, torch.float32).items():
        assert value.count_nonzero() == 0, name
    inputs["mask"][1, 2], inputs["hidden"][1, 2] = True, 1.0
    for name, value in check(op, inputs).items():
        assert value.count_nonzero() > 0, name


@pytest.mark.parametrize("op", OPS)
def test_more_than_65536_rows(op: str) -> None:
    """A grid's second axis ends there."""
    inputs = make(2 * 33_000, 4, 7)
    check(op, inputs)


@pytest.mark.parametrize("op", OPS)
def test_an_id_outside_the_vocabulary_raises_unless_it_is_masked(op: str) -> None:
    inputs = make(20, 16, 131)
    inputs["ids"][1, 4] = 131
    with pytest.raises(ValueError, match=r"must be < V = 131"):
        ours(op, inputs)
    inputs["mask"][1, 4] = False
    check(op, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_has_a_gradient_of_its_own(dtype: torch.dtype) -> None:
    """Some returned an entropy and dropped its gradient."""
    inputs = make(60, 24, 131)
    ids = inputs["ids"].view(-1)

    def run(wide: torch.dtype, native: bool) -> tuple[Tensor, Tensor]:
        hidden = inputs["hidden"].view(60, 24).to(dtype).to(wide).requires_grad_()
        weight = inputs["weight"].to(dtype).to(wide)
        if native:
            entropy = linear_token_log_probs(hidden, weight, ids, outputs=("entropy",)).entropy
        else:
            log_p = torch.log_softmax(hidden @ weight.T, -1)
            entropy = -(log_p.exp() * log_p).sum(-1)
        (gradient,) = torch.autograd.grad(entropy, hidden, torch.linspace(-1, 2, 60).to(entropy.dtype))
        return entropy.detach(), gradient

    actual, expected, plain = run(dtype, True), run(torch.float64, False), run(torch.float32, False)
    for a, e, p in zip(actual, expected, plain, strict=True):
        assert_as_accurate(a, e, p)


def test_a_loss_in_one_pass_and_in_two_is_the_same() -> None:
    """A copy of the loss inside the head drifts from the loss: here it is the same kernel, whatever the way."""
    inputs = make(40, 24, 131)
    once = results(ours, "loss", inputs, torch.float32)
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    log_probs = linear_token_log_probs(leaves["hidden"], leaves["weight"], inputs["ids"], bias=leaves["bias"]).log_probs
    twice = grpo_kernels.grpo_loss(
        log_probs, inputs["old"], inputs["advantages"], inputs["mask"], CONFIG, ref_log_probs=inputs["ref"]
    )
    gradients = torch.autograd.grad(twice.loss, list(leaves.values()), torch.tensor(-1.5))
    torch.testing.assert_close(once["value"], twice.loss.detach())
    for name, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(once[name], gradient)

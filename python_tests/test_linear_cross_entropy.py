"""linear_cross_entropy: one pass and two passes over the head against logits and cross_entropy in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.nn import functional as F

import grpo_kernels
from grpo_kernels import LoRAFactors, linear_cross_entropy
from grpo_kernels.linear_log_probs import chunks, cross_entropy
from grpo_kernels.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("native_cpu")

WIDTH, VOCAB, LORA_SCALE = 12, 37, 0.7
LEADING = (3, 7)
EVERY = ("hidden", "weight", "bias", "a", "b")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "z_loss": {"z_loss": 0.03},
    "softcap": {"softcap": 2.0, "logit_scale": 0.6, "z_loss": 0.1},
    "scale": {"logit_scale": -1.3},
    "ignored_id": {"ignore_index": 5},
    "ignored_zero": {"ignore_index": 0, "z_loss": 0.02},
}
Leaves = dict[str, Tensor]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows, width, vocab, device_type: 5)


@pytest.fixture(params=["one_pass", "two_passes", "reference"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two_passes":
        monkeypatch.setattr(cross_entropy, "may_form_gradients", lambda options: False)
    with grpo_kernels.backend("reference" if request.param == "reference" else "native"):
        yield request.param


def problem(leading: tuple[int, ...] = LEADING, *, scale: float = 1.0, names: tuple[str, ...] = EVERY) -> Leaves:
    """The leaves in float64, with values that float32 holds."""
    found = {
        "hidden": torch.randn(*leading, WIDTH), "weight": torch.randn(VOCAB, WIDTH) * scale, "bias": torch.randn(VOCAB),
        "a": torch.randn(3, WIDTH) * 0.3, "b": torch.randn(VOCAB, 3) * 0.3,
    }  # fmt: skip
    return {name: found[name].double() for name in names}


def targets(leading: tuple[int, ...] = LEADING) -> Tensor:
    """The first and the last id, 0 and 5 among them, and two rows that do not count."""
    found = torch.randint(VOCAB, leading).view(-1)
    found[:8] = torch.tensor([0, VOCAB - 1, 5, -100, 0, 5, -1, VOCAB - 1])[: len(found)]
    return found.view(leading)


def run(
    leaves: Leaves, target: Tensor, *, upstream: Tensor | float = -1.7, trained: tuple[str, ...] = EVERY, **options: Any
) -> tuple[Tensor, Leaves]:
    """The loss, and the gradients of the leaves."""
    leaves = {name: leaf.detach().clone().requires_grad_(name in trained) for name, leaf in leaves.items()}
    lora = LoRAFactors(leaves["a"], leaves["b"], LORA_SCALE) if "a" in leaves else None
    loss = linear_cross_entropy(
        leaves["hidden"], leaves["weight"], target, bias=leaves.get("bias"), lora=lora, **options
    )
    return loss.detach(), gradients(loss, {name: leaf for name, leaf in leaves.items() if name in trained}, upstream)


def gradients(loss: Tensor, leaves: Leaves, upstream: Tensor | float) -> Leaves:
    slope = upstream.to(loss) if isinstance(upstream, Tensor) else torch.full_like(loss, upstream)
    found = torch.autograd.grad(loss, list(leaves.values()), slope, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def definition(
    leaves: Leaves, target: Tensor, dtype: torch.dtype, *, upstream: Tensor | float = -1.7, ignore_index: int = -100,
    reduction: str = "mean", logit_scale: float = 1.0, softcap: float | None = None, z_loss: float = 0.0,
) -> tuple[Tensor, Leaves]:  # fmt: skip
    """What plain PyTorch users write. Rows that do not count are cut out before."""
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    live = (target >= 0) & (target != ignore_index)
    x = leaves["hidden"][live]
    z = F.linear(x, leaves["weight"], leaves.get("bias"))
    if "a" in leaves:
        z = z + LORA_SCALE * F.linear(F.linear(x, leaves["a"]), leaves["b"])
    z = z * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(z, target[live].long(), reduction="none") + z_loss * z.logsumexp(-1).square()
    if reduction == "none":
        loss = torch.zeros(target.shape, dtype=dtype).masked_scatter(live, losses)
    else:
        loss = losses.sum() / (max(len(losses), 1) if reduction == "mean" else 1)
    return loss.detach(), gradients(loss, leaves, upstream)


def assert_close(actual: tuple[Tensor, Leaves], expected: tuple[Tensor, Leaves]) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-10, atol=1e-12)
    for name, gradient in actual[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-10, atol=1e-12)


# --- against the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("option", OPTIONS)
def test_values_and_gradients(option: str, reduction: str, way: str) -> None:
    for leading in (LEADING, (1,), (64,), ()):
        leaves, target = problem(leading), targets(leading)
        upstream: Tensor | float = torch.randn(leading).double() if reduction == "none" else -1.7
        options = {**OPTIONS[option], "reduction": reduction, "upstream": upstream}
        assert_close(run(leaves, target, **options), definition(leaves, target, torch.float64, **options))


@pytest.mark.parametrize("option", ["plain", "z_loss", "softcap"])
def test_as_accurate_as_float32_allows(option: str, way: str) -> None:
    found: dict[str, list[tuple[Tensor, Leaves]]] = {"actual": [], "expected": [], "eager": []}
    for _ in range(12):
        leaves, target = problem(scale=0.5), targets()
        narrow = {name: leaf.float() for name, leaf in leaves.items()}
        found["actual"].append(run(narrow, target, **OPTIONS[option]))
        found["expected"].append(definition(leaves, target, torch.float64, **OPTIONS[option]))
        found["eager"].append(definition(narrow, target, torch.float32, **OPTIONS[option]))
    judge(**found)


def judge(
    actual: list[tuple[Tensor, Leaves]], expected: list[tuple[Tensor, Leaves]], eager: list[tuple[Tensor, Leaves]]
) -> None:
    for name in ("loss", *EVERY):
        a, e, plain = (
            torch.cat([(loss if name == "loss" else grads[name]).flatten() for loss, grads in results])
            for results in (actual, expected, eager)
        )
        assert_as_accurate(a, e, plain, name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Many chunks do not cost the weight's gradient its digits, and a nearly certain target keeps its p - 1."""
    for scale in (0.3, 3.0):
        leaves = {name: leaf.to(dtype) for name, leaf in problem((400,), scale=scale).items()}
        target = targets((400,))
        actual = run(leaves, target, z_loss=0.01)
        assert {gradient.dtype for gradient in actual[1].values()} == {dtype}
        assert actual[0].dtype == torch.float32
        eager = definition({name: leaf.float() for name, leaf in leaves.items()}, target, torch.float32, z_loss=0.01)
        judge([actual], [definition(leaves, target, torch.float64, z_loss=0.01)], [eager])


def test_a_common_offset_of_the_logits_changes_nothing() -> None:
    leaves, target = problem(names=("hidden", "weight", "bias")), targets()
    shifted = {**leaves, "bias": leaves["bias"] + 4096.0}
    narrow = [{name: leaf.float() for name, leaf in case.items()} for case in (leaves, shifted)]
    trained = ("hidden", "weight", "bias")
    shifted_loss, shifted_grads = run(narrow[1], target, trained=trained)
    expected, grads = definition(shifted, target, torch.float64)
    eager, eager_grads = definition(narrow[1], target, torch.float32)
    assert_as_accurate(shifted_loss, expected, eager)
    for name in trained:
        assert_as_accurate(shifted_grads[name], grads[name], eager_grads[name], name=name)


@pytest.mark.parametrize("ignore_index", [-100, 0, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torch(reduction: str, ignore_index: int, way: str) -> None:
    functions = [
        lambda x, w, b, **kw: F.cross_entropy(F.linear(x, w, b), target, **kw),
        *([lambda x, w, b, **kw: F.linear_cross_entropy(x, w, target, linear_bias=b, **kw)] if _HAS_TORCH else []),
    ]
    leaves, target = problem((20,), names=("hidden", "weight", "bias")), targets((20,))
    target[target < 0] = ignore_index
    options = {"reduction": reduction, "ignore_index": ignore_index}
    for function in functions:
        theirs = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
        loss = function(*theirs.values(), **options)
        upstream = torch.linspace(-1, 2, loss.numel()).view(loss.shape).double()
        expected = loss.detach(), gradients(loss, theirs, upstream)
        assert_close(run(leaves, target, trained=tuple(leaves), upstream=upstream, **options), expected)


_HAS_TORCH = hasattr(F, "linear_cross_entropy")


@pytest.mark.skipif(not _HAS_TORCH, reason="torch.nn.functional.linear_cross_entropy: torch 2.13 or newer")
def test_torch_has_a_linear_cross_entropy() -> None:
    """`test_equals_torch` compares with it where it is."""
    leaves = problem((4,), names=("hidden", "weight"))
    target = torch.tensor([0, 1, 2, VOCAB - 1])
    expected = F.linear_cross_entropy(leaves["hidden"], leaves["weight"], target)
    torch.testing.assert_close(linear_cross_entropy(leaves["hidden"], leaves["weight"], target), expected)


# --- edge cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_ignored_id_that_no_target_can_be(dtype: torch.dtype, way: str) -> None:
    leaves, target = problem(), targets().clamp(min=0).to(dtype)
    expected = definition(leaves, target, torch.float64)
    for ignore_index in (2**32, 2**63):
        assert_close(run(leaves, target, ignore_index=ignore_index), expected)


def test_rows_that_do_not_count_may_hold_anything(way: str) -> None:
    for ignore_index in (-100, 5):
        leaves, target = problem(), targets()
        dead = (target < 0) | (target == ignore_index)
        dirty = {**leaves, "hidden": leaves["hidden"].masked_fill(dead[..., None], math.nan)}
        options = {"ignore_index": ignore_index, "z_loss": 0.1}
        actual = run(dirty, target, **options)
        assert_close(actual, definition(leaves, target, torch.float64, **options))
        assert not actual[1]["hidden"][dead].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_that_count(reduction: str, way: str) -> None:
    for leading, target in (((4,), torch.full((4,), -100)), ((4,), torch.full((4,), 7)), ((0,), torch.zeros(0).long())):
        loss, grads = run(problem(leading), target, reduction=reduction, ignore_index=7, z_loss=0.1)
        assert loss.shape == (leading if reduction == "none" else ())
        assert not loss.any()
        assert not any(gradient.any() for gradient in grads.values())


def test_a_target_outside_the_vocabulary_raises(way: str) -> None:
    leaves, target = problem(), targets()
    target[1, 2] = VOCAB
    with pytest.raises(ValueError, match=rf"linear_cross_entropy: target\[1, 2\] must be < V = {VOCAB}, or negative"):
        run(leaves, target)
    run(leaves, target, ignore_index=VOCAB)


def test_infinite_logits(way: str) -> None:
    """A -inf in the bias takes a token out of the vocabulary."""
    leaves, target = problem(names=("hidden", "weight", "bias")), targets()
    leaves["bias"][11:15] = -math.inf
    target[(target >= 11) & (target < 15)] = 3
    trained = ("hidden", "weight", "bias")
    actual = run(leaves, target, trained=trained, z_loss=0.01)
    kept = {name: leaf if name == "hidden" else torch.cat([leaf[:11], leaf[15:]]) for name, leaf in leaves.items()}
    expected = definition(kept, torch.where(target >= 15, target - 4, target), torch.float64, z_loss=0.01)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1]["hidden"], expected[1]["hidden"])
    assert not actual[1]["weight"][11:15].any()


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("a",), ("a", "b"), ("hidden", "b")])
def test_only_what_needs_a_gradient_gets_one(trained: tuple[str, ...], way: str) -> None:
    leaves, target = problem(), targets()
    assert_close(run(leaves, target, trained=trained), definition(leaves, target, torch.float64))


def test_backward_twice(way: str) -> None:
    leaves = {name: leaf.float().requires_grad_() for name, leaf in problem(names=("hidden", "weight")).items()}
    loss = linear_cross_entropy(leaves["hidden"], leaves["weight"], targets(), z_loss=0.1)
    wanted = list(leaves.values())
    first = torch.autograd.grad(loss, wanted, torch.tensor(0.3), retain_graph=True)
    second = torch.autograd.grad(loss, wanted, torch.tensor(0.3))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        leaves["weight"].mul_(2.0)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, wanted)


def test_weight_grad_accumulator() -> None:
    leaves, target = problem(), targets()
    narrow = {name: leaf.float() for name, leaf in leaves.items()}
    expected = definition(narrow, target, torch.float32, upstream=1.0)[1]["weight"]
    for reduction in ("mean", "none"):
        accumulator = torch.ones(VOCAB, WIDTH)
        upstream = -3.0 if reduction == "mean" else -3.0 / ((target >= 0).sum().item())
        options = {"reduction": reduction, "upstream": upstream, "weight_grad_accumulator": accumulator}
        _, grads = run(narrow, target, **options)
        torch.testing.assert_close(accumulator, 1 - 3 * expected, rtol=1e-5, atol=1e-6)
        assert not grads["weight"].any()


def test_float16_forms_gradients_after_the_loss_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are too small for float16 survive where the loss is scaled."""
    monkeypatch.setattr(cross_entropy, "attach", None)  # one pass would call it
    leaves = {name: leaf.half() for name, leaf in problem((64,), scale=5e-4).items()}
    leaves["a"] *= 1e-3
    target = targets((64,))
    assert (definition(leaves, target, torch.float64, upstream=1.0)[1]["hidden"].abs().amax(-1) < 6e-5).all()
    actual = run(leaves, target, upstream=2.0**12)
    eager = definition({name: leaf.float() for name, leaf in leaves.items()}, target, torch.float32, upstream=2.0**12)
    judge([actual], [definition(leaves, target, torch.float64, upstream=2.0**12)], [eager])


def test_compiled_calls_do_not_recompile() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    leaves = {name: leaf.float().requires_grad_() for name, leaf in problem().items()}
    weight, bias, a, b = (leaves[name] for name in EVERY[1:])

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        lora = LoRAFactors(a, b, LORA_SCALE)
        return linear_cross_entropy(hidden, weight, target, bias=bias, lora=lora, z_loss=0.01) * 0.5

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for rows in range(4, 14):
        hidden = torch.randn(rows, WIDTH, requires_grad=True)
        target = targets((rows,))
        actual, expected = compiled(hidden, target), loss(hidden, target)
        torch.testing.assert_close(actual, expected)
        wanted = (hidden, weight, bias, a, b)
        for x, y in zip(*(torch.autograd.grad(value, wanted) for value in (actual, expected)), strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count <= 2

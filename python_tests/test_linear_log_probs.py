"""linear_token_log_probs: the definition against autograd, the CPU kernels against float64, slices."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import grpo_kernels
from grpo_kernels import LoRAFactors, linear_token_log_probs, token_log_probs
from grpo_kernels.linear_log_probs import head as heads
from grpo_kernels.testing import accuracy_error, assert_as_accurate

EVERY_OUTPUT = ("entropy", "sum_squared_probs", "top1_ids")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "per_row": {"temperature": "per_row"},
    "scaled": {"logit_scale": -1.3, "temperature": 1.7},
    "softcap": {"softcap": 6.0, "logit_scale": 1.1},
    "lora": {"lora": True},
    "all": {"bias": True, "lora": True, "softcap": 9.0, "logit_scale": 0.8, "temperature": "per_row"},
}
BACKENDS = ["native", "reference"]
INF, NAN = float("inf"), float("nan")
LORA_SCALE = 0.5


class Problem(NamedTuple):
    """A head, hidden states, ids, and gradients that differ from row to row."""

    leaves: dict[str, Tensor]  # hidden, weight, bias, a, b
    ids: Tensor
    upstream: tuple[Tensor, Tensor]


def problem(
    rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32, *, bias: bool = False, lora: bool = False
) -> Problem:
    leaves = {"hidden": torch.randn(rows, width), "weight": torch.randn(vocab, width) * 2 * width**-0.5}
    if bias:
        leaves["bias"] = torch.randn(vocab)
    if lora:
        leaves["a"], leaves["b"] = torch.randn(5, width) * width**-0.5, torch.randn(vocab, 5)
    return Problem(
        {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()},
        torch.randint(vocab, (rows,)),
        (torch.randn(rows), torch.randn(rows)),
    )


def make(name: str, rows: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Problem, dict[str, Any]]:
    """A problem for one of OPTIONS, and the rest of the options."""
    options = dict(OPTIONS[name])
    found = problem(rows, width, vocab, dtype, bias=options.pop("bias", False), lora=options.pop("lora", False))
    if options.get("temperature") == "per_row":
        options["temperature"] = torch.rand(rows) + 0.5
    return found, options


def run(p: Problem, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """Every output, and the gradients of sum(upstream[0] * log_probs + upstream[1] * entropy)."""
    leaves = {name: leaf.detach().clone().requires_grad_(leaf.requires_grad) for name, leaf in p.leaves.items()}
    lora = LoRAFactors(leaves["a"], leaves["b"], LORA_SCALE) if "a" in leaves else None
    out = linear_token_log_probs(
        leaves["hidden"], leaves["weight"], p.ids, bias=leaves.get("bias"), lora=lora, outputs=EVERY_OUTPUT, **options
    )
    loss = (out.log_probs * p.upstream[0]).sum() + (out.entropy * p.upstream[1]).sum()
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    return out, dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def run_eager(
    p: Problem,
    dtype: torch.dtype,
    *,
    temperature: Any = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What plain PyTorch users write, written apart from the definition. Rows that do not count are cut out first."""
    live = p.ids >= 0 if mask is None else (p.ids >= 0) & (mask != 0)
    leaves = {name: leaf.detach().to(dtype).requires_grad_(leaf.requires_grad) for name, leaf in p.leaves.items()}
    x = leaves["hidden"][live]
    logits = F.linear(x, leaves["weight"], leaves.get("bias"))
    if "a" in leaves:
        logits = logits + F.linear(F.linear(x, leaves["a"]), leaves["b"]) * LORA_SCALE
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.to(dtype)[live, None] if isinstance(temperature, Tensor) else temperature)
    log_p = torch.log_softmax(z, -1)
    values = (
        log_p.gather(-1, p.ids[live, None].long())[:, 0],
        -(log_p.exp() * log_p).sum(-1),
        log_p.exp().square().sum(-1),
    )
    loss = (values[0] * p.upstream[0][live]).sum() + (values[1] * p.upstream[1][live]).sum()
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()))
    full = [value.new_zeros(len(p.ids)).index_put((live,), value.detach()) for value in values]
    return full, dict(zip(trained, gradients, strict=True))


def check(*problems: Problem, mask: Tensor | None = None, **options: Any) -> None:
    """Values and gradients against float64, within twice the error of eager PyTorch in float32.

    Small problems are judged together: in one of a few rows eager may be exact by chance.
    """
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    names = ("log_probs", "entropy", "sum_squared_probs")
    for p in problems:
        values, gradients = run_eager(p, torch.float64, mask=mask, **options)
        eager_values, eager_gradients = run_eager(p, torch.float32, mask=mask, **options)
        out, ours = run(p, **options) if mask is None else run(p, mask=mask, **options)
        assert list(ours) == list(gradients)
        assert all(gradient.dtype == p.leaves[name].dtype for name, gradient in ours.items())
        for name, *tensors in zip(names, out[:3], values, eager_values, strict=True):
            found.setdefault(name, []).append(tuple(tensors))
        for name, gradient in ours.items():
            found.setdefault(f"gradient of {name}", []).append((gradient, gradients[name], eager_gradients[name]))
    for name, triples in found.items():
        actual, exact, eager = (torch.cat([t.flatten() for t in column]) for column in zip(*triples, strict=True))
        assert_as_accurate(actual, exact, eager, name=name)


@pytest.fixture(params=["one slice", "many slices"])
def slicing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default workspace holds every logit of a small test; a tiny one forces slices of 256 columns."""
    if request.param == "many slices":
        monkeypatch.setattr(heads, "WORKSPACE_BYTES", 1)


# --- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_definition_in_float64(options: str) -> None:
    p, rest = make(options, 7, 5, 31, torch.float64)
    with grpo_kernels.backend("reference"):
        check(p, **rest)


@pytest.mark.usefixtures("native_cpu", "slicing")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_against_float64(dtype: torch.dtype, options: str) -> None:
    """Many draws: one nearly certain row of a single one would set the scale of its sums, and eager's error with it."""
    draws = [make(options, 200, 37, 1003, dtype) for _ in range(16)]
    with grpo_kernels.backend("native"):
        check(*(p for p, _ in draws), **draws[0][1])


@pytest.mark.usefixtures("native_cpu", "slicing")
@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 257, 32003])
@pytest.mark.parametrize(("rows", "width"), [(1, 2), (2, 1), (3, 130), (65, 8)])
def test_ragged_sizes(rows: int, width: int, vocab: int) -> None:
    """Not one row of one number: eager sums that product another way, and the errors cannot be compared."""
    if vocab == 1:  # certain, whatever the logit: eager's zeros set no budget
        out, gradients = run(problem(rows, width, vocab))
        assert [t.unique().tolist() for t in out] == [[0.0], [0.0], [1.0], [0]]
        assert all(not gradient.any() for gradient in gradients.values())
        return
    check(*(problem(rows, width, vocab) for _ in range(max(1, 64 // rows) if vocab < 1000 else 8)))


@pytest.mark.usefixtures("native_cpu", "slicing")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(backend: str, options: str) -> None:
    p, rest = make(options, 4, 3, 300 if backend == "native" else 9, torch.float64)
    p.ids[1] = -100
    names = list(p.leaves)

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, leaves, strict=True))
        lora = LoRAFactors(given["a"], given["b"], LORA_SCALE) if "a" in given else None
        out = linear_token_log_probs(
            given["hidden"], given["weight"], p.ids, bias=given.get("bias"), lora=lora, outputs=("entropy",), **rest
        )
        assert out.entropy is not None
        return out.log_probs, out.entropy

    with grpo_kernels.backend(backend):
        assert torch.autograd.gradcheck(function, tuple(p.leaves.values()), fast_mode=True)


@pytest.mark.usefixtures("native_cpu")
@pytest.mark.parametrize("vocab", [129280, 151936])
def test_large_vocabularies(vocab: int) -> None:
    check(problem(64, 16, vocab))


@pytest.mark.usefixtures("slicing")
def test_equals_token_log_probs_of_the_logits() -> None:
    p = problem(19, 24, 700)
    logits = F.linear(p.leaves["hidden"], p.leaves["weight"]).detach().requires_grad_()
    out, gradients = run(p, temperature=0.8)
    row = token_log_probs(logits, p.ids, temperature=0.8, outputs=EVERY_OUTPUT)
    assert accuracy_error(out.log_probs, row.log_probs.double()) < 1e-6
    assert torch.equal(out.top1_ids, row.top1_ids)
    loss = (row.log_probs * p.upstream[0]).sum() + (row.entropy * p.upstream[1]).sum()
    (dlogits,) = torch.autograd.grad(loss, logits)
    expected = dlogits.double().t() @ p.leaves["hidden"].double()
    assert accuracy_error(gradients["weight"], expected) < 1e-6


# --- slices, bits, memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "vocab"), [(0, 7), (1, 1), (1000, 151936), (10**6, 32003), (64, 64), (3, 32000)])
def test_slices_cover_the_vocabulary(rows: int, vocab: int) -> None:
    parts = list(heads.slices(rows, vocab, 4))
    assert [start for start, _ in parts] == [0, *(end for _, end in parts[:-1])]
    assert parts[-1][1] == vocab
    widths = [end - start for start, end in parts]
    assert all(width > 0 for width in widths)
    assert max(widths) * rows * 4 <= heads.WORKSPACE_BYTES + rows * 4 * 64 or max(widths) <= 256


@pytest.mark.usefixtures("slicing")
def test_equal_calls_give_equal_bits() -> None:
    p = problem(33, 20, 801, bias=True, lora=True)
    first, gradients = run(p)
    for _ in range(3):
        again, found = run(p)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(found[name], gradients[name]) for name in found)


def test_the_ratio_to_a_pass_without_gradient_is_one() -> None:
    p = problem(64, 32, 2000, torch.bfloat16)
    with torch.no_grad():
        old = linear_token_log_probs(p.leaves["hidden"], p.leaves["weight"], p.ids).log_probs
    new = linear_token_log_probs(p.leaves["hidden"], p.leaves["weight"], p.ids).log_probs
    assert ((new - old).exp() - 1).abs().max() <= 1e-5


def test_inputs_are_neither_written_nor_used_after_a_change() -> None:
    p = problem(9, 6, 200)
    before = {name: leaf.detach().clone() for name, leaf in p.leaves.items()}
    out = linear_token_log_probs(p.leaves["hidden"], p.leaves["weight"], p.ids)
    out.log_probs.sum().backward(retain_graph=True)
    first = p.leaves["weight"].grad.clone()
    out.log_probs.sum().backward(retain_graph=True)
    assert torch.equal(p.leaves["weight"].grad, first + first)
    assert all(torch.equal(before[name], leaf) for name, leaf in p.leaves.items())
    with torch.no_grad():
        p.leaves["weight"].mul_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.log_probs.sum().backward()


def test_double_backward_is_refused() -> None:
    p = problem(3, 4, 20)
    out = linear_token_log_probs(p.leaves["hidden"], p.leaves["weight"], p.ids)
    (gradient,) = torch.autograd.grad(out.log_probs.square().sum(), p.leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- wrong arguments -------------------------------------------------------------------------------------------------


def test_an_id_outside_the_vocabulary_raises_on_the_cpu() -> None:
    for backend in BACKENDS:
        p = problem(4, 3, 10)
        p.ids[2] = 10
        with (
            grpo_kernels.backend(backend),
            pytest.raises(ValueError, match=r"linear_token_log_probs: token_ids\[2\] must be < V = 10, .* got 10"),
        ):
            run(p)


def test_an_accumulator_of_a_frozen_weight_is_refused() -> None:
    p = problem(4, 3, 10)
    with pytest.raises(ValueError, match="weight_grad_accumulator is for the gradient of weight"):
        linear_token_log_probs(
            p.leaves["hidden"], p.leaves["weight"].detach(), p.ids, weight_grad_accumulator=torch.zeros(10, 3)
        )

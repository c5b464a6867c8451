"""linear_token_log_probs: the definition against autograd, the CPU kernels against float64, options, edge cases."""

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
    p, rest = make(options, 200, 37, 1003, dtype)
    with grpo_kernels.backend("native"):
        check(p, **rest)


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

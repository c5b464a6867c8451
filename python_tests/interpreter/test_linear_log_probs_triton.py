"""The Triton kernels of linear_log_probs, run by Triton's interpreter on CPU tensors.

Gradients of logits are rounded once to the dtype of the head, as on a GPU. What plain PyTorch gets with that rounding
and float32 everywhere else sets the budget.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from grpo_kernels import LoRAFactors, linear_token_log_probs, token_log_probs
from grpo_kernels.testing import assert_as_accurate, guard_input, guarded_allocations, poisoned_allocations
from python_tests.gpu.devices import assert_identical, inputs_of
from python_tests.gpu.devices import run as run_call
from python_tests.samples import Call
from python_tests.samples import linear_log_probs as samples
from python_tests.test_linear_log_probs import EVERY_OUTPUT, LORA_SCALE, Problem, make, problem, run

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("triton_on_cpu"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# How operands are loaded -> the architecture, and a hidden size that makes it so.
LOADS = {"tma": (90, 72), "vector": (80, 64), "scalar": (90, 37)}


@pytest.fixture(params=LOADS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A hidden size whose rows are loaded in one of the ways."""
    architecture, width = LOADS[request.param]
    _on(monkeypatch, architecture)
    return width


def _on(monkeypatch: pytest.MonkeyPatch, architecture: int) -> None:
    from grpo_kernels.linear_log_probs import _triton

    monkeypatch.setattr(_triton, "architecture", lambda tensor: architecture)


def in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspace of the backward holds 256 columns."""
    from grpo_kernels.linear_log_probs import _config_triton

    monkeypatch.setattr(_config_triton, "WORKSPACE_BYTES", 1)


class _Rounds(torch.autograd.Function):
    """The gradient is rounded to a dtype on its way."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype).to(gradient.dtype), None


def eager(
    p: Problem,
    dtype: torch.dtype,
    *,
    rounding: torch.dtype | None = None,
    temperature: Any = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    log_sum_exp: Tensor | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Plain PyTorch in `dtype`, its gradient of the logits rounded to `rounding`. `log_sum_exp` is its gradient."""
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in p.leaves.items()}
    logits = F.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
    if "a" in leaves:
        logits = logits + F.linear(F.linear(leaves["hidden"], leaves["a"]), leaves["b"]) * LORA_SCALE
    z = (logits if rounding is None else _Rounds.apply(logits, rounding)) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature.to(dtype)[:, None] if isinstance(temperature, Tensor) else temperature)
    log_p = torch.log_softmax(z, -1)
    p_log_p = torch.where(log_p == -INF, 0.0, log_p) * log_p.exp()
    ids = p.ids.long()[:, None]
    values = [log_p.gather(-1, ids)[:, 0], -p_log_p.sum(-1), log_p.exp().square().sum(-1)]
    loss = (values[0] * p.upstream[0]).sum() + (values[1] * p.upstream[1]).sum()
    if log_sum_exp is not None:
        loss = loss + (z.logsumexp(-1) * log_sum_exp).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return [value.detach() for value in values], dict(zip(leaves, gradients, strict=True))


def check(p: Problem, values: Any, gradients: dict[str, Tensor], **options: Any) -> None:
    """Against float64; the budget is that of plain PyTorch in float32, whose logits' gradients are rounded as ours."""
    exact, exact_gradients = eager(p, torch.float64, **options)
    plain, plain_gradients = eager(p, torch.float32, rounding=p.leaves["weight"].dtype, **options)
    for name, actual, expected, other in zip(("log_probs", *EVERY_OUTPUT), values, exact, plain, strict=False):
        assert_as_accurate(actual, expected, other, name=name)
    for name, gradient in gradients.items():
        assert_as_accurate(gradient, exact_gradients[name], plain_gradients[name], name=f"gradient of {name}")


# --- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(width: int, dtype: torch.dtype, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of loading; neither rows nor columns fill their last tile, and the backward has several slices."""
    in_slices(monkeypatch)
    p, rest = make(options, 150, width, 700, dtype)
    out, gradients = run(p, **rest)
    check(p, out, gradients, **rest)
    z = eager_logits(p, **rest)
    assert (z.gather(1, out.top1_ids[:, None])[:, 0] >= z.amax(1) - 1e-5).all()


def eager_logits(p: Problem, *, softcap: float | None = None, logit_scale: float = 1.0, **_: Any) -> Tensor:
    leaves = {name: leaf.detach().double() for name, leaf in p.leaves.items()}
    z = F.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
    if "a" in leaves:
        z = z + leaves["hidden"] @ leaves["a"].T @ leaves["b"].T * LORA_SCALE
    return z * logit_scale if softcap is None else softcap * torch.tanh(z * logit_scale / softcap)


@pytest.mark.parametrize("options", ["bias", "temperature", "per_row", "scaled", "softcap", "lora"])
def test_options(options: str) -> None:
    p, rest = make(options, 130, 24, 300, torch.float32)
    out, gradients = run(p, **rest)
    check(p, out, gradients, **rest)


def test_temperature_on_the_device() -> None:
    p = problem(70, 16, 300)
    out, gradients = run(p, temperature=torch.tensor(0.7))
    check(p, out, gradients, temperature=0.7)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 2), (1, 257), (3, 256), (129, 31), (128, 1)])
def test_ragged_sizes(rows: int, vocab: int) -> None:
    problems = [problem(rows, 8, vocab) for _ in range(1 if rows > 3 else 8)]
    if vocab == 1:
        out, gradients = run(problems[0])
        assert [t.unique().tolist() for t in out] == [[0.0], [0.0], [1.0], [0]]
        assert all(gradient.abs().max() <= 1e-5 for gradient in gradients.values())
        return
    results = [run(p) for p in problems]
    exact = [eager(p, torch.float64) for p in problems]
    plain = [eager(p, torch.float32) for p in problems]
    for i in range(3):  # judged together: in one of a few rows eager may be exact by chance
        assert_as_accurate(*(torch.stack([of[0][i].detach() for of in column]) for column in (results, exact, plain)))
    for name in problems[0].leaves:
        assert_as_accurate(*(torch.stack([of[1][name] for of in column]) for column in (results, exact, plain)))


def test_a_large_vocabulary_fills_every_split() -> None:
    """Narrow tiles make so many that a split has two."""
    p = problem(32, 5, 9001)
    out, gradients = run(p)
    check(p, out, gradients)


def test_no_logit_behind_the_vocabulary() -> None:
    """All logits are below -90: a column that is not there would win with its 0."""
    p = problem(20, 8, 300, bias=True)
    with torch.no_grad():
        p.leaves["bias"] -= 120.0
    out, gradients = run(p)
    assert eager_logits(p).max() < -90
    check(p, out, gradients)


def test_a_common_offset_costs_no_more_than_its_rounding() -> None:
    p = problem(20, 8, 300, bias=True)
    with torch.no_grad():
        p.leaves["bias"] += 1e4
    out, gradients = run(p)
    check(p, out, gradients)


def test_removed_tokens() -> None:
    """A bias of -inf is probability zero, also where the first tiles of a row hold nothing else."""
    p = problem(9, 8, 900, bias=True)
    with torch.no_grad():
        p.leaves["bias"][:600] = -INF
    p.ids.copy_(torch.arange(600, 609))
    kept = {name: leaf[600:] if len(leaf) == 900 else leaf for name, leaf in p.leaves.items()}
    small = p._replace(leaves={n: leaf.detach().requires_grad_() for n, leaf in kept.items()}, ids=p.ids - 600)
    out, gradients = run(p)
    for name in ("weight", "bias"):
        assert not gradients[name][:600].any()
        gradients[name] = gradients[name][600:]
    check(small, out, gradients)
    assert out.top1_ids.min() >= 600


def test_ties_give_the_lowest_id() -> None:
    hidden, weight = torch.ones(1, 8), torch.zeros(2000, 8)
    for ids in ([3], [255, 256], [1999, 700, 701], [31, 32, 33]):
        weight.zero_()
        weight[ids] = 1.0
        out = linear_token_log_probs(hidden, weight, torch.tensor([0]), outputs=("top1_ids",))
        assert out.top1_ids.tolist() == [min(ids)]


# --- rows that do not count, and bad ones ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_contribute_nothing(width: int, dtype: torch.dtype) -> None:
    p = problem(300, width, 270, dtype, bias=True, lora=True)
    mask = torch.rand(300) > 0.3
    mask[128:256] = False  # a whole block
    p.ids[~mask] = 10**6
    p.ids[5], mask[5] = -100, True
    dead = ~mask | (p.ids < 0)
    with torch.no_grad():
        p.leaves["hidden"][dead] = torch.tensor([NAN, INF, -INF, 3e4]).to(dtype).repeat(75)[dead, None]
    p.upstream[0][dead], p.upstream[1][dead] = NAN, INF
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in p.leaves.items()}
    out = linear_token_log_probs(
        leaves["hidden"], leaves["weight"], p.ids, mask=mask, bias=leaves["bias"], outputs=EVERY_OUTPUT,
        lora=LoRAFactors(leaves["a"], leaves["b"], LORA_SCALE),
    )  # fmt: skip
    for value, masked in zip(out, (0.0, 0.0, 0.0, -1), strict=True):
        assert (value[dead] == masked).all()
    found = torch.autograd.grad((out.log_probs, out.entropy), list(leaves.values()), p.upstream)
    gradients = dict(zip(leaves, found, strict=True))
    assert not gradients["hidden"][dead].any()
    gradients["hidden"] = gradients["hidden"][~dead]
    clean = Problem(
        {**p.leaves, "hidden": p.leaves["hidden"][~dead].detach().requires_grad_()},
        p.ids[~dead],
        (p.upstream[0][~dead], p.upstream[1][~dead]),
    )
    check(clean, [value[~dead] for value in out], gradients)


def test_rows_without_upstream_gradient_are_skipped() -> None:
    """Their hidden states may be infinite by then."""
    p = problem(260, 9, 300)
    p.upstream[0][::2], p.upstream[1][::2] = 0.0, 0.0
    p.upstream[0][:128], p.upstream[1][:128] = 0.0, 0.0
    quiet = (p.upstream[0] == 0) & (p.upstream[1] == 0)
    out, gradients = run(p)
    check(p, out, gradients)
    assert not gradients["hidden"][quiet].any()


def test_bad_rows_are_nan_and_no_other() -> None:
    p = problem(6, 8, 520)
    with torch.no_grad():
        p.leaves["hidden"][2] = NAN
        p.leaves["hidden"][3, 1] = INF
    p.ids[4] = 520
    out, gradients = run(p)
    bad = [False, False, True, True, True, False]
    for value in out[:3]:
        assert value.isnan().tolist() == bad
    assert (out.top1_ids == -1).tolist() == bad
    assert gradients["hidden"].isnan().any(1).tolist() == bad


def test_no_rows_and_no_live_rows() -> None:
    for rows, ids in ((0, torch.empty(0, dtype=torch.int64)), (3, torch.full((3,), -100))):
        p = problem(rows, 6, 50, bias=True, lora=True)._replace(ids=ids)
        out, gradients = run(p)
        assert out.log_probs.shape == (rows,)
        assert not any(value.any() for value in out[:3])
        assert not any(gradient.any() for gradient in gradients.values())


# --- what must make no difference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(width: int, dtype: torch.dtype) -> None:
    """Not with LoRA, whose products with the hidden states are a library's."""
    p = problem(140, width, 300, dtype, bias=True)
    out, _ = run(p)
    for row in (0, 139):
        only = slice(row, row + 1)
        alone = Problem(
            {**p.leaves, "hidden": p.leaves["hidden"][only].detach().requires_grad_()},
            p.ids[only],
            (p.upstream[0][only], p.upstream[1][only]),
        )
        single, _ = run(alone)
        assert all(torch.equal(a, b[only]) for a, b in zip(single, out, strict=True))


def test_views_have_the_values_of_dense_tensors() -> None:
    p = problem(12, 16, 300)
    dense, _ = run(p)
    hidden, weight = (p.leaves[name].detach() for name in ("hidden", "weight"))
    wide = torch.full((12, 40), NAN)
    for offset in (0, 4, 5):  # a stride and a start that TMA takes; a start that it does not
        wide[:, offset : offset + 16] = hidden
        out = linear_token_log_probs(wide[:, offset : offset + 16], weight, p.ids, outputs=EVERY_OUTPUT)
        assert_as_accurate(out.log_probs, dense.log_probs.double(), dense.log_probs)
        wide.fill_(NAN)
    transposed = weight.t().contiguous().t()
    out = linear_token_log_probs(hidden, transposed, p.ids, outputs=EVERY_OUTPUT)
    assert all(torch.equal(a, b) for a, b in zip(out, dense, strict=True))


def test_the_launching_thread_needs_no_allocator_and_keeps_its_own() -> None:
    import triton
    from triton.runtime import _allocation

    mine = object()
    seen: list[object] = []

    def work() -> None:
        triton.set_allocator(mine)
        out, gradients = run(problem(4, 16, 300))
        seen.extend((_allocation._allocator.get(), out.log_probs.isfinite().all(), gradients["weight"].any()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen[0] is mine
    assert all(seen[1:])


def test_equals_token_log_probs_of_the_logits() -> None:
    p = problem(19, 24, 700)
    out, _ = run(p, temperature=0.8)
    logits = F.linear(p.leaves["hidden"], p.leaves["weight"]).detach()
    row = token_log_probs(logits, p.ids, temperature=0.8, outputs=EVERY_OUTPUT)
    exact, _ = eager(p, torch.float64, temperature=0.8)
    for a, b, c in zip(out[:3], exact, row[:3], strict=True):
        assert_as_accurate(a, b, c)
    assert torch.equal(out.top1_ids, row.top1_ids)


@pytest.mark.parametrize("call", samples.CALLS, ids=lambda call: call.name)
def test_nothing_outside_the_tensors_is_touched(call: Call) -> None:
    """Inputs lie between NaN: a read out of bounds changes a result. Allocations lie between bands that are checked."""
    inputs = inputs_of(call, "cpu")
    expected = run_call(call, inputs)
    with guarded_allocations(), poisoned_allocations():
        actual = run_call(call, [guard_input(i) if isinstance(i, Tensor) else i for i in inputs])
    assert_identical(actual, expected)

"""The Triton kernels of token_log_probs, run by Triton's interpreter on CPU tensors.

The interpreter truncates float32 to bfloat16 where a GPU rounds, and does not fuse multiply-adds: bf16 gradients get one
unit in the last place, and the shape of the tests is that of the CPU kernels' tests.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import token_log_probs
from grpo_kernels.testing import (
    accuracy_error,
    assert_as_accurate,
    guard_input,
    guarded_allocations,
    poisoned_allocations,
)
from python_tests import test_token_log_probs_parts as parts
from python_tests.gpu.devices import assert_identical, inputs_of, run
from python_tests.samples import Call
from python_tests.samples import token_log_probs as samples

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("triton_on_cpu"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

EVERY_OUTPUT = ("entropy", "sum_squared_probs", "top1_ids")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


def reference(
    logits: Tensor, ids: Tensor, dtype: torch.dtype, temperature: Any, scale: float, cap: float | None
) -> Any:
    leaf = logits.detach().to(dtype).requires_grad_()
    z = leaf * scale
    z = cap * torch.tanh(z / cap) if cap is not None else z
    z = z / (temperature.to(dtype)[:, None] if isinstance(temperature, Tensor) else temperature)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    values = log_p.gather(-1, ids.long()[:, None])[:, 0], -(p * log_p).sum(-1), p.pow(2).sum(-1)
    upstream = torch.linspace(-1, 2, len(ids)), torch.linspace(1, -0.5, len(ids))
    gradient = torch.autograd.grad((values[0] * upstream[0]).sum() + (values[1] * upstream[1]).sum(), leaf)[0]
    return [*(v.detach() for v in values), gradient], upstream


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 31, 5003])
@pytest.mark.parametrize("options", ["plain", "scaled", "per_row_softcap"])
def test_against_float64(vocab: int, dtype: torch.dtype, options: str) -> None:
    rows = 12 if vocab > 1000 else 64  # of a handful of rows eager may hit the float64 value by luck
    logits, ids = (torch.randn(rows, vocab) * 2).to(dtype), torch.randint(vocab, (rows,))
    temperature = torch.rand(rows) + 0.5 if options == "per_row_softcap" else 1.0 if options == "plain" else 0.7
    scale = -1.3 if options == "scaled" else 1.0
    cap = 6.0 if options == "per_row_softcap" else None
    expected, upstream = reference(logits, ids, torch.float64, temperature, scale, cap)
    plain, _ = reference(logits, ids, torch.float32, temperature, scale, cap)
    leaf = logits.clone().requires_grad_()
    out = token_log_probs(leaf, ids, temperature=temperature, logit_scale=scale, softcap=cap, outputs=EVERY_OUTPUT)
    gradient = torch.autograd.grad((out.log_probs, out.entropy), leaf, upstream)[0]
    if vocab == 1:
        assert [t.unique().tolist() for t in out] == [[0.0], [0.0], [1.0], [0]]
        assert gradient.abs().max() <= 1e-6
        return
    assert_as_accurate(out.log_probs, expected[0], plain[0], name="log_probs")
    assert_as_accurate(out.entropy, expected[1], plain[1], name="entropy")
    assert torch.equal(out.top1_ids, (logits.double() * scale).argmax(-1)) or cap is not None
    assert_as_accurate(out.sum_squared_probs, expected[2], plain[2], name="sum_squared_probs")
    if dtype == torch.bfloat16:  # truncated
        assert accuracy_error(gradient, expected[3]) <= torch.finfo(dtype).eps
    else:
        assert_as_accurate(gradient, expected[3], plain[3], name="gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows(dtype: torch.dtype) -> None:
    logits, ids = torch.randn(5, 5000).to(dtype), torch.randint(5000, (5,))
    logits[1], logits[3] = NAN, INF
    ids[1], ids[3] = 2**40, -100
    mask = torch.tensor([1, 0, 1, 1, 1])
    leaf = logits.requires_grad_()
    temperature = torch.tensor([1.0, NAN, 1.0, 0.0, 2.0])
    out = token_log_probs(leaf, ids, mask=mask, temperature=temperature, outputs=EVERY_OUTPUT)
    upstream = torch.tensor([1.0, NAN, 1.0, INF, 0.0])
    gradient = torch.autograd.grad((out.log_probs, out.entropy), leaf, (upstream, torch.zeros(5)))[0]
    assert [t[[1, 3]].tolist() for t in out] == [[0, 0], [0, 0], [0, 0], [-1, -1]]
    assert gradient[[1, 3, 4]].count_nonzero() == 0
    assert gradient[[0, 2]].isfinite().all()
    assert out.log_probs[[0, 2, 4]].lt(0).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_special_values(softcap: float | None) -> None:
    logits, ids = torch.randn(7, 6000), torch.zeros(7, dtype=torch.int64)
    clean = logits.clone()
    logits[0, :5000], ids[0] = -INF, 5500
    logits[1, 3], ids[1] = -INF, 3
    logits[2, 5999] = NAN
    logits[3, 10] = INF
    logits[4] = -INF
    ids[5] = 6000
    leaf = logits.requires_grad_()
    out = token_log_probs(leaf, ids, softcap=softcap, outputs=EVERY_OUTPUT)
    gradient = torch.autograd.grad((out.log_probs, out.entropy), leaf, (torch.ones(7), torch.ones(7)))[0]
    with grpo_kernels.backend("reference"):
        short = token_log_probs(logits[:1, 5000:].detach(), ids[:1] - 5000, softcap=softcap, outputs=EVERY_OUTPUT)
        plain = token_log_probs(clean[6:], ids[6:], softcap=softcap, outputs=EVERY_OUTPUT)
    for a, b, c in zip(out[:3], short[:3], plain[:3], strict=True):
        torch.testing.assert_close(a[:1], b)
        torch.testing.assert_close(a[6:], c)
    assert gradient[0, :5000].count_nonzero() == 0
    assert gradient[[0, 1, 6]].isfinite().all()
    assert out.log_probs[1] == -INF
    assert out.entropy[1].isfinite()
    for row in (2, 3, 4, 5):
        assert all(t[row].isnan() for t in out[:3])
        assert out.top1_ids[row] == -1
        assert gradient[row].isnan().all()


def test_ties_give_the_lowest_id() -> None:
    logits = torch.zeros(4, 9000)
    logits[1, [4100, 8999]] = 2.0
    logits[2, [10, 4500]] = 1.0
    logits[3, [4097, 4103]] = 1.0
    out = token_log_probs(logits, torch.zeros(4, dtype=torch.int64), outputs=("top1_ids",))
    assert out.top1_ids.tolist() == [0, 4100, 10, 4097]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_rows_alone_and_in_place(dtype: torch.dtype) -> None:
    """Shifted views, one row by itself, and the in-place backward all give the bits of the dense batch."""
    base, ids = torch.randn(2, 4, 300).to(dtype), torch.randint(300, (2, 4), dtype=torch.int32)

    def both(logits: Tensor, chosen: Tensor, **options: Any) -> tuple[Any, Tensor]:
        leaf = logits.detach().requires_grad_()
        out = token_log_probs(leaf, chosen, outputs=EVERY_OUTPUT, **options)
        return out, torch.autograd.grad(out.log_probs.sum() + 0.5 * out.entropy.sum(), leaf)[0]

    dense = both(base[:, :-1].contiguous(), ids[:, 1:])
    view = both(base[:, :-1], ids[:, 1:])
    row = both(base[1, 2].clone(), ids[1, 3])
    storage = base.clone()
    inplace = both(storage[:, :-1], ids[:, 1:], inplace_backward=True)
    for other in (view, inplace):
        assert all(torch.equal(a, b) for a, b in zip(dense[0], other[0], strict=True))
        assert torch.equal(dense[1], other[1])
    assert all(torch.equal(a, b[1, 2]) for a, b in zip(row[0], dense[0], strict=True))
    assert torch.equal(row[1], dense[1][1, 2])
    assert torch.equal(storage[:, :-1], dense[1])
    assert torch.equal(storage[:, -1], base[:, -1])


def test_empty_and_version() -> None:
    out = token_log_probs(
        torch.zeros(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.int64), outputs=EVERY_OUTPUT
    )
    assert [t.shape for t in out] == [(0,)] * 4
    out.log_probs.sum().backward()
    logits = torch.randn(2, 5, requires_grad=True) * 1.0
    out = token_log_probs(logits, torch.tensor([1, 2]), inplace_backward=True)
    out.log_probs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.log_probs.sum().backward()


@pytest.mark.parametrize("vocab", [1031, 1040])
@pytest.mark.parametrize("call", samples.CALLS, ids=lambda call: call.name)
def test_nothing_outside_the_tensors_is_touched(call: Call, vocab: int) -> None:
    """Inputs lie between NaN: a read out of bounds changes a result. Allocations lie between bands that are checked."""
    inputs = inputs_of(call, "cpu")
    shape = inputs[0].shape
    inputs[0] = inputs[0].new_empty(*shape[:-1], vocab).normal_().requires_grad_(inputs[0].requires_grad)
    expected = run(call, inputs)
    with guarded_allocations(), poisoned_allocations():
        actual = run(call, [guard_input(i) if isinstance(i, Tensor) else i for i in inputs])
    assert_identical(actual, expected)


# --- parts of a vocabulary, the gradient of the log-sum-exp ----------------------------------------------------------

OPTIONS_AND_DTYPES = pytest.mark.parametrize(
    ("options", "dtype"),
    [*((name, torch.float32) for name in parts.TRANSFORMS), ("plain", torch.bfloat16), ("softcap", torch.float16)],
    ids=str,
)


@OPTIONS_AND_DTYPES
def test_parts_make_the_whole(dtype: torch.dtype, options: str) -> None:
    parts.check_parts("triton", dtype, options)


@OPTIONS_AND_DTYPES
def test_gradient_of_the_log_sum_exp(dtype: torch.dtype, options: str) -> None:
    parts.check_z_loss("triton", dtype, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_gradient_of_the_log_sum_exp(dtype: torch.dtype) -> None:
    parts.check_no_z_loss("triton", dtype)


@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_dtype_of_the_gradient(wanted: torch.dtype) -> None:
    parts.check_grad_dtype("triton", wanted)


@OPTIONS_AND_DTYPES
def test_statistics_of_special_rows(dtype: torch.dtype, options: str) -> None:
    parts.check_special_statistics("triton", dtype, options)

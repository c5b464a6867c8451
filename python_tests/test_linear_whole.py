"""The one pass whose logits lie where the weight's gradient will: values, gradients, and that it takes no memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import linear_cross_entropy, linear_token_log_probs
from grpo_kernels.linear_log_probs import chunks, losses, whole
from grpo_kernels.linear_log_probs import head as heads
from grpo_kernels.linear_log_probs.head import Head
from grpo_kernels.linear_log_probs.sums import Gradients, Needs
from grpo_kernels.testing import assert_as_accurate, poisoned_allocations
from python_tests.test_linear_chunks import (
    FACTORS,
    LOGIT_SCALE,
    LORA_SCALE,
    RANK,
    SOFTCAP,
    TEMPERATURES,
    Z_LOSS,
    eager,
)

pytestmark = pytest.mark.usefixtures("native_cpu")

FACTOR = 0.1
WIDTH, VOCAB = 41, 803  # odd, so that no slice of a half-width gradient ends on four bytes


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slices of 256 columns; how many rows each call of the function had."""
    rows: list[int] = []

    def watched(hidden: Tensor, *arguments: Any) -> Any:
        rows.append(len(hidden))
        return whole.one_pass_within(hidden, *arguments)

    monkeypatch.setattr(whole, "_SLICE_BYTES", (1, 1))
    monkeypatch.setattr(chunks, "one_pass_within", watched)
    return rows


def head_of(rows: int, dtype: torch.dtype) -> list[Tensor]:
    sizes = ((rows, WIDTH), (VOCAB, WIDTH), (VOCAB,), (RANK, WIDTH), (VOCAB, RANK))
    return [(torch.randn(size) * 0.5).to(dtype) for size in sizes]


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(dtype: torch.dtype, share: float, taken: list[int]) -> None:
    rows = WIDTH if dtype.itemsize > 2 else WIDTH // 2
    head, target = head_of(rows, dtype), torch.randint(VOCAB, (rows,))
    mask = torch.rand(rows) < share
    head[0][~mask] = float("nan")
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    with poisoned_allocations():
        actual = losses.implementations("native")[0](
            *head, LORA_SCALE, target, mask, TEMPERATURES[:rows].to(exact), 0.0, LOGIT_SCALE, SOFTCAP,
            FACTORS[:rows].to(exact), Z_LOSS, True, *(True,) * 4, dtype, dtype,
        )  # fmt: skip
    assert taken == [rows]
    expected = eager(head, target, mask, torch.float64, torch.float64)
    plain = eager(head, target, mask, torch.float32, torch.float32)
    names = ("log_probs", "log_sum_exp", "hidden", "weight", "bias", "a", "b")
    assert torch.equal(actual[2], expected[2])
    others = (values[:2] + values[3:] for values in (list(actual), expected, plain))
    for name, result, float64, float32 in zip(names, *others, strict=True):
        assert_as_accurate(result, float64, float32, name=name)
    assert not actual[3][~mask].any()


@pytest.mark.parametrize("frozen", [0, 2, 3])
def test_gradients_only_where_they_are_wanted(frozen: int, taken: list[int]) -> None:
    head, target = head_of(20, torch.float32), torch.randint(VOCAB, (20,))
    needs = [place != frozen for place in (0, 1, 2, 3)]

    def run(needs: list[bool]) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = losses.implementations("native")[0](
            *head, LORA_SCALE, target, None, None, 1.0, LOGIT_SCALE, SOFTCAP, torch.tensor(FACTOR), Z_LOSS, False,
            *needs, torch.float32, torch.float32,
        )  # fmt: skip
        return results

    everything, some = run([True] * 4), run(needs)
    assert taken == [20, 20]
    wanted = [True, True, False, *needs, needs[3]]
    for result, complete, want in zip(some, everything, wanted, strict=True):
        assert torch.equal(result, complete) if want else result.numel() == 0


def _masked_gradients(head: list[Tensor], target: Tensor, keep: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of the cross-entropy of some rows, by eager PyTorch."""
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in head]
    x, weight, bias, a, b = leaves
    z = SOFTCAP * torch.tanh((x @ weight.T + bias + LORA_SCALE * (x @ a.T) @ b.T) * LOGIT_SCALE / SOFTCAP)
    log_probs = torch.log_softmax(z, -1).gather(-1, target[:, None])[:, 0]
    return torch.autograd.grad(-FACTOR * (log_probs * keep).sum(), leaves)


def test_rows_without_a_derivative_take_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the rows have a slope of zero, then all."""
    head, target = head_of(30, torch.float32), torch.randint(VOCAB, (30,))
    made = whole.Products
    counts: list[int] = []
    monkeypatch.setattr(
        whole, "Products", lambda hidden, *a, **k: (counts.append(len(hidden)), made(hidden, *a, **k))[1]
    )
    for keep in (torch.arange(30) % 2 == 0, torch.zeros(30, dtype=torch.bool)):
        gradients = Gradients(*(torch.empty_like(head[place]) for place in (0, 1, 2, 3, 4)))

        def slopes(values: whole.Values, start: int, end: int, keep: Tensor = keep) -> whole.Slopes:
            return whole.Slopes(-FACTOR * keep[start:end].float(), None, None)

        targets = whole.Targets(target, None, None, 1.0, LOGIT_SCALE, SOFTCAP)
        live = torch.ones(30, dtype=torch.bool)
        whole.one_pass_within(
            head[0],
            Head(*head[1:], LORA_SCALE),
            targets,
            live,
            slopes,
            Needs(True, True, True, True),
            gradients,
            False,
        )
        exact, plain = (_masked_gradients(head, target, keep, dtype) for dtype in (torch.float64, torch.float32))
        for gradient, float64, float32 in zip(gradients, exact, plain, strict=True):
            assert_as_accurate(gradient, float64, float32)
    assert counts == [15, 0]


def test_more_rows_than_fit_go_in_chunks(taken: list[int]) -> None:
    for rows, within in ((WIDTH, [WIDTH]), (WIDTH + 1, [])):
        x, weight = torch.randn(rows, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH, requires_grad=True)
        linear_cross_entropy(x, weight, torch.randint(VOCAB, (rows,))).backward()
        assert taken == within
        taken.clear()


def test_a_frozen_weight_has_no_memory_to_lend(taken: list[int]) -> None:
    x, weight = torch.randn(9, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH)
    linear_cross_entropy(x, weight, torch.randint(VOCAB, (9,))).backward()
    assert taken == []


# --- log-probs put together from slices, here and in the forward of linear_token_log_probs ---------------------------


@pytest.fixture(params=["whole", "forward"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(heads, "WORKSPACE_BYTES", 1)
    return str(request.param)


def log_probs_of(
    way: str, x: Tensor, weight: Tensor, target: Tensor, temperature: float, bias: Tensor | None = None
) -> Tensor:
    if way == "forward":
        return linear_token_log_probs(x, weight, target, temperature=temperature, bias=bias).log_probs
    found: Tensor = losses.implementations("native")[0](
        x, weight, bias, None, None, 0.0, target, None, None, temperature, 1.0, 0.0, x.new_ones(()), 0.0, False,
        False, True, False, False, x.dtype, x.dtype,
    )[0]  # fmt: skip
    return found


@pytest.mark.parametrize("likeliest", [True, False])
@pytest.mark.parametrize("vocab", [1, 257, VOCAB])
@pytest.mark.parametrize("scale", [1, 4])
def test_the_rounding_of_z_is_not_that_of_its_log_prob(scale: int, vocab: int, likeliest: bool, way: str) -> None:
    """Logits that float32 holds, up to 400, and a temperature that makes them ones that it does not."""
    x = torch.randint(-3, 4, (WIDTH, WIDTH)).float()
    weight = torch.randint(-3, 4, (vocab, WIDTH)).float() * scale
    z = x @ weight.T
    target = z.argmax(-1) if likeliest else torch.randint(vocab, (WIDTH,))
    actual = log_probs_of(way, x, weight, target, 0.7)
    exact, plain = (torch.log_softmax(logits / 0.7, -1).gather(-1, target[:, None])[:, 0] for logits in (z.double(), z))
    assert bool(((actual - exact).abs() <= torch.finfo(torch.float32).eps * (1 + exact.abs())).all())
    assert bool((actual <= 0).all())
    if vocab == 1:  # 0, which no error is relative to
        assert actual.abs().max() <= 1e-12
    else:
        assert_as_accurate(actual, exact, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_slices_of_nothing_and_rows_of_nan(dtype: torch.dtype, way: str) -> None:
    """A slice of -inf alone and single tokens of -inf, as target and beside it; a NaN; rows that do not count."""
    head, target = head_of(12, dtype), torch.arange(12) * 64
    x, weight, bias = head[:3]
    bias[256:512] = -torch.inf
    bias[[0, 3, 640]] = -torch.inf
    x[7:9] = float("nan")
    target[8] = -1
    actual = log_probs_of(way, x, weight, target, 0.7, bias)
    expected = torch.log_softmax((x.double() @ weight.double().T + bias.double()) / 0.7, -1)
    expected = expected.gather(-1, target.clamp(min=0)[:, None])[:, 0]
    expected[8] = 0.0
    torch.testing.assert_close(actual, expected.to(dtype), equal_nan=True)
    assert actual.isneginf().nonzero()[:, 0].tolist() == [0, 4, 5, 6, 10]
    assert actual.isnan().nonzero()[:, 0].tolist() == [7]

"""The chunks of the one-pass losses: where they end, and the form that reads nothing on the host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels.linear_log_probs import chunks, losses
from grpo_kernels.linear_log_probs.chunks import chunk_rows, most_rows
from grpo_kernels.linear_log_probs.sums import Sums
from grpo_kernels.testing import assert_as_accurate, poisoned_allocations
from grpo_kernels.token_log_probs import ops as row_ops

pytestmark = pytest.mark.usefixtures("native_cpu")

MIB = 1 << 20


@pytest.mark.parametrize("rows", [3, 500, 1024, 4096, 16384])
@pytest.mark.parametrize("width", [256, 4096])
@pytest.mark.parametrize("vocab", [50, 32000, 151936])
def test_chunks_on_the_cpu_take_an_eighth_of_the_memory_of_eager(rows: int, width: int, vocab: int) -> None:
    limit = chunk_rows(rows, width, vocab, "cpu")
    assert 64 <= limit <= most_rows(vocab, "cpu")
    eighth = (3 * rows - width) * vocab * 4 / 8
    assert limit == 64 or limit * vocab * 4 <= max(16 * MIB, min(128 * MIB, eighth))


def test_chunks_on_a_gpu_do_not_depend_on_the_rows() -> None:
    assert (
        chunk_rows(10, 4096, 128256, "cuda")
        == chunk_rows(10**6, 4096, 128256, "cuda")
        == most_rows(128256, "cuda")
        == 2048
    )


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("compact", [False, True])
def test_chunks_hold_every_row_once(unit: int, share: float, compact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows, width, vocab, device_type: 10)
    live = torch.rand(16 * 4) < share
    rows: list[int] = []
    for chunk in chunks._chunks(live, 7, 5, unit, compact):
        assert chunk.start % unit == chunk.end % unit == 0 or (compact and unit == 1)
        held = torch.arange(len(live))[chunk.rows]
        assert len(held) <= 10
        assert (held >= chunk.start).all()
        assert (held < chunk.end).all()
        rows += held.tolist()
    assert rows == (live.nonzero()[:, 0] if compact else torch.arange(len(live))).tolist()


def test_chunks_have_about_equal_sizes() -> None:
    sizes = [
        chunk.end - chunk.start for chunk in chunks._chunks(torch.ones(1000, dtype=torch.bool), 32000, 64, 1, False)
    ]
    assert max(sizes) - min(sizes) <= 1


# --- without a look at the data --------------------------------------------------------------------------------------

VOCAB, ROWS, RANK = 37, 30, 3
LORA_SCALE, LOGIT_SCALE, SOFTCAP, Z_LOSS = 0.5, 1.2, 4.0, 0.02
FACTORS, TEMPERATURES = torch.linspace(0.0, 0.2, 64), torch.linspace(0.5, 1.5, 64)  # of the first rows


@pytest.fixture
def device_op(monkeypatch: pytest.MonkeyPatch) -> Any:
    """linear_cross_entropy as it runs on a GPU, on the CPU's row kernels."""
    monkeypatch.setattr(chunks, "chunk_rows", lambda rows, width, vocab, device_type: 8)

    def on_cpu(name: str) -> Any:
        return lambda *arguments: getattr(row_ops, name)(*arguments[:-1], "native")

    names = ("token_log_probs", "token_log_probs_backward", "token_log_probs_backward_")
    monkeypatch.setattr(chunks, "row_ops", SimpleNamespace(**{name: on_cpu(name) for name in names}))
    return losses.implementations("device")[0]


def eager(head: list[Tensor], target: Tensor, live: Tensor, dtype: torch.dtype, narrow: torch.dtype) -> list[Tensor]:
    """Values, likeliest tokens and gradients from all logits.

    The gradient of the logits, like that of the projection, is rounded to `narrow`.
    """
    factors, temperatures = FACTORS[: len(target)].to(dtype), TEMPERATURES[: len(target), None].to(dtype)
    x, weight, bias, a, b = (tensor.to(dtype) for tensor in head)
    x = torch.where(live[:, None], x, 0)
    logits = (x @ weight.T + bias + LORA_SCALE * (x @ a.T) @ b.T).requires_grad_()
    z = SOFTCAP * torch.tanh(logits * LOGIT_SCALE / SOFTCAP) / temperatures
    log_sum_exp = z.logsumexp(-1)
    log_probs = z.gather(-1, target.clamp(min=0)[:, None])[:, 0] - log_sum_exp
    loss = (factors * (Z_LOSS * log_sum_exp.square() - log_probs))[live].sum()
    grad = torch.autograd.grad(loss, logits)[0].to(narrow).to(dtype)
    through = (LORA_SCALE * grad @ b).to(narrow).to(dtype)
    projected = (x @ a.T).to(narrow).to(dtype)
    gradients = [grad @ weight + through @ a, grad.T @ x, grad.sum(0), through.T @ x, LORA_SCALE * grad.T @ projected]
    values = [torch.where(live, value.detach(), 0) for value in (log_probs, log_sum_exp)]
    return [*values, torch.where(live, z.argmax(-1), -1), *gradients]


@pytest.mark.parametrize("width", [6, 24])
@pytest.mark.parametrize("results", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_form_that_reads_nothing_on_the_host(
    dtype: torch.dtype, results: torch.dtype, width: int, device_op: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that do not count hold NaN. Gradients of all logits are kept where they take less than a float32 weight."""
    sizes = {
        "hidden": (ROWS, width),
        "weight": (VOCAB, width),
        "bias": (VOCAB,),
        "a": (RANK, width),
        "b": (VOCAB, RANK),
    }
    head = [(torch.randn(size) * 0.5).to(dtype) for size in sizes.values()]
    target, mask = torch.randint(VOCAB, (ROWS,)), torch.rand(ROWS) < 0.7
    target[3] = -100
    live = mask & (target >= 0)
    dirty = [head[0].masked_fill(~live[:, None], float("nan")), *head[1:]]
    kept: list[bool] = []
    finish = Sums.finish
    monkeypatch.setattr(Sums, "finish", lambda self: (kept.append(self.kept is not None), finish(self))[1])
    with poisoned_allocations():
        actual = device_op(
            *dirty, LORA_SCALE, target, mask, TEMPERATURES[:ROWS], 0.0, LOGIT_SCALE, SOFTCAP, FACTORS[:ROWS], Z_LOSS,
            True, *(True,) * 4, results, results,
        )  # fmt: skip
    assert kept == [results == dtype == torch.bfloat16 and 4 * VOCAB * width > 2 * ROWS * VOCAB]
    expected = eager(head, target, live, torch.float64, torch.float64)
    plain = eager(head, target, live, torch.float32, dtype)
    assert torch.equal(actual[2], expected[2])
    for index, name in ((0, "log_probs"), (1, "log_sum_exp"), *enumerate(sizes, 3)):
        assert_as_accurate(actual[index], expected[index], plain[index], name=name)
    assert not actual[3][~live].any()

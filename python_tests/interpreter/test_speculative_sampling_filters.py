"""The threshold of top-k and top-p that the Triton kernel finds, row by row, against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels.speculative_sampling import _triton, reference
from grpo_kernels.speculative_sampling._config_triton import LaunchConfig
from grpo_kernels.testing import assert_as_accurate, guarded_allocations, poisoned_allocations
from python_tests.interpreter.quick import replaced_once

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("replaced_once"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
__all__ = ["replaced_once"]

INF, NAN = float("inf"), float("nan")
SLOTS, ROOM, VOCAB = 32, 24, 600


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tiles of 32 slots, that a short row has several of."""

    def launch_config(vocab: int, element_size: int, aligned: bool) -> LaunchConfig:
        width = 16 // element_size
        columns = SLOTS * width
        neighbours, splits = aligned and vocab % 16 == 0, -(-vocab // columns)
        return LaunchConfig(SLOTS, width, neighbours, 1, columns, splits, SLOTS, 1, ROOM * SLOTS)

    monkeypatch.setattr(_triton, "launch_config", launch_config)
    with poisoned_allocations():
        yield


def found(
    x: Tensor, top_k: Tensor | None, top_p: Tensor | None, temperatures: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """[B] thresholds, [B] masses and [B, room] copies of logits [B, V]."""
    logits, ids = x[:, None], torch.zeros(len(x), 0, dtype=torch.int64)
    config = _triton.launch_config(x.shape[1], x.element_size(), True)
    problem = _triton._Problem(logits, None, ids, None, temperatures, top_k, top_p, ids, None, config)
    with guarded_allocations():
        buffers = _triton._buffers(problem, "token")
        _triton._statistics(problem, buffers, False)
    return buffers.thresholds, buffers.masses, buffers.candidates


def check(x: Tensor, top_k: Tensor | None, top_p: Tensor | None, temperatures: Tensor | None = None) -> Tensor:
    """That the kernel keeps what the definition does; the copies."""
    thresholds, masses, copies = found(x, top_k, top_p, temperatures)
    scales = torch.ones(len(x), 1) if temperatures is None else temperatures[:, None]
    exact, single = (((x.to(t) - x.to(t).amax(1, True)) / scales.to(t)).exp() for t in (torch.float64, torch.float32))
    keep = reference.kept(x.double()[:, None], exact[:, None], top_k, None if top_p is None else top_p.double())[:, 0]
    assert torch.equal(x.float() >= thresholds[:, None], keep)
    assert_as_accurate(masses, (exact * keep).sum(1), (single * keep).sum(1))
    return copies


def spread(rows: int, vocab: int = VOCAB, width: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab) * width


@pytest.mark.parametrize(
    ("dtype", "vocab"), [(torch.float32, VOCAB), (torch.bfloat16, VOCAB), (torch.float16, 592)], ids=str
)
def test_top_k(dtype: torch.dtype, vocab: int) -> None:
    counts = torch.tensor([1, 65, 300, vocab - 1, vocab, 0])
    check(spread(len(counts), vocab).to(dtype), counts, None)


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 1.0), (torch.bfloat16, 0.01), (torch.bfloat16, 8.0), (torch.float16, 1.0)]
)
def test_top_p(dtype: torch.dtype, width: float) -> None:
    """From rows of which all that is kept is copied at once to those that take several walks first."""
    shares = torch.tensor([1e-6, 0.9, 0.999, 1.0])
    check(spread(len(shares), width=width).to(dtype), None, shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_p_of_what_top_k_leaves(dtype: torch.dtype) -> None:
    counts = torch.tensor([1, 20, 300, -1, 50])
    shares = torch.tensor([0.3, 0.9, 0.9, 0.95, 1.0])
    check(spread(5).to(dtype), counts, shares, torch.linspace(0.3, 2.0, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_ties_and_extremes(dtype: torch.dtype) -> None:
    """Every row with top-k, with top-p, and with both; where sums are exact the edges of p are, too."""
    x = torch.zeros(10, VOCAB)
    x[1, ::2] = 1.0  # half of the row tied
    x[2, 500] = 1e30  # one that is all
    smallest = 1e-39 if dtype == torch.float32 else 1e-36  # the interpreter reads no smaller bfloat16
    x[3] = torch.randn(VOCAB) * smallest
    x[4, 20:] = -INF
    x[5] = torch.arange(VOCAB) % 5 - 1e30  # all equal after rounding
    x[6, ::3] = -0.0
    x[7] = torch.where(torch.arange(VOCAB) % 7 == 0, 3.0, -INF)
    x[8, 1:] = -INF
    x[9] = -(torch.arange(VOCAB) % 60 * 0.25)  # the largest are -0.0
    x = x.to(dtype)
    check(x, torch.full((10,), 20), None)
    check(x, None, torch.full((10,), 0.75))
    check(x, torch.full((10,), 250), torch.full((10,), 0.5))


@pytest.mark.parametrize("number", [16, 17, 24, 25, 34])
def test_a_slot_that_is_full(number: int) -> None:
    """Aligned rows, whose slots are neighbours: 16 logits of one fit, and nothing is written beyond its column."""
    columns = torch.arange(1104)
    x = torch.randn(1104)
    x[columns[columns // 8 % SLOTS == 5][:number]] += 20.0
    row = x.bfloat16()[None]
    copies = check(row, torch.tensor([number]), None)
    kept = row[0][row[0] > 10.0]
    assert (torch.isin(copies, kept).sum() == number) == (number <= 24)


def test_what_may_be_kept_is_all_that_is_copied() -> None:
    """One walk over the row serves both filters: the copies are the largest logits, and few others."""
    x = spread(4, width=6.0).bfloat16()
    copies = check(x, torch.full((4,), 12), torch.full((4,), 0.9))
    largest = x.sort(descending=True).values
    for row, copy in zip(largest, copies, strict=True):
        ranked = copy[: SLOTS * 8].sort(descending=True).values
        finite = int((ranked > -INF).sum())
        assert 12 <= finite <= 40
        assert torch.equal(ranked[:finite], row[:finite])


def test_what_top_k_copied_is_not_taken_for_the_largest_of_groups() -> None:
    """Of the 128 logits that may be kept 32 are the largest of groups, whose places lie behind the copies: none counts
    twice."""
    x = -100.0 - torch.rand(1, VOCAB)
    x[0, :96] = -0.2 - torch.rand(96) * 0.1
    x[0, 512:544] = -0.1 * torch.rand(32)
    x[0, 512] = 0.0
    check(x, torch.tensor([100]), torch.tensor([0.42]))


def test_rows_without_a_softmax_are_left_alone() -> None:
    x = spread(4)
    x[0, 5], x[1, 500], x[2] = NAN, INF, -INF
    thresholds, masses, _ = found(x, torch.full((4,), 9), None)
    assert (x[3] >= thresholds[3]).sum() == 9
    assert masses[3] > 0.0


def test_a_row_s_filter_does_not_depend_on_the_others() -> None:
    x, counts = spread(3).bfloat16(), torch.tensor([7, 200, 20])
    shares = torch.tensor([0.9, 0.95, 0.5])
    together = found(x, counts, shares)
    for i in range(3):
        alone = found(x[i : i + 1], counts[i : i + 1], shares[i : i + 1])
        assert torch.equal(alone[0], together[0][i : i + 1])
        assert torch.equal(alone[1], together[1][i : i + 1])

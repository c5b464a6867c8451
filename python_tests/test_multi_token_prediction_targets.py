"""What every depth predicts: the op against a loop over rows, on every option, and the bounds of documents."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_kernels.multi_token_prediction import ops
from grpo_kernels.multi_token_prediction.documents import documents

pytestmark = pytest.mark.usefixtures("native_cpu")

BACKENDS = ("native", "reference")
MOST, LEAST = 2**63 - 1, -(2**63)


def by_loop(
    token_ids: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    depths: int,
    shift: int,
    sequence_length: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Row by row, in integers of any size: the rows between must count up by one."""
    ids = token_ids.tolist()
    places = None if positions is None else positions.tolist()
    counted = [True] * len(ids) if mask is None else mask.tolist()
    targets = torch.full((depths, len(ids)), -1)
    for i in range(len(ids)):
        for k in range(depths):
            j = i + k + shift
            if j >= len(ids) or (sequence_length > 0 and i // sequence_length != j // sequence_length):
                break
            if places is not None and (places[i] < 0 or any(places[m] != places[i] + m - i for m in range(i, j + 1))):
                break
            if ids[j] >= 0 and ids[j] != ignore_index and counted[j]:
                targets[k, i] = ids[j]
    return targets, (targets >= 0).sum(1)


def problem(seed: int, rows: int) -> tuple[Any, ...]:
    """Arguments of mtp_targets: documents of one row to many, cut ones, padding, ids that are none."""
    dice = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    places: list[int] = []
    while len(places) < rows:
        first, length = dice.choice([0, 0, 0, 3, -2]), dice.choice([1, 2, 5, 40])
        places += range(first, first + length)
    return (
        torch.randint(-2, 9, (rows,), generator=generator, dtype=dice.choice([torch.int32, torch.int64])),
        torch.tensor(places[:rows], dtype=dice.choice([torch.int32, torch.int64])) if dice.random() < 0.7 else None,
        torch.rand(rows, generator=generator) < 0.7 if dice.random() < 0.5 else None,
        dice.randint(1, 4),
        dice.choice([0, 1, 1, 2, 5]),
        dice.choice([0, 0, 1, 3, 7, 64]),
        dice.choice([-100, 3]),
    )


def assert_targets(arguments: tuple[Any, ...], backend: str, expected: tuple[Tensor, Tensor] | None = None) -> None:
    targets, counts = ops.mtp_targets(*arguments, backend)
    wanted = by_loop(*arguments) if expected is None else expected
    assert torch.equal(targets, wanted[0]), arguments
    assert torch.equal(counts, wanted[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1, 2, 17, 131])
def test_every_option_against_the_loop(rows: int, backend: str) -> None:
    for seed in range(25):
        assert_targets(problem(seed, rows), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("places", ["one document", "a start every 3000 rows", "none"])
def test_documents_longer_than_a_block_of_rows(places: str, backend: str) -> None:
    """Ends that lie in the next block, and in the one after it."""
    rows, ids = torch.arange(6500), torch.arange(6500)
    positions = {"one document": rows, "a start every 3000 rows": rows % 3000, "none": None}[places]
    for shift in (1, 2040, 4000):
        length = 6500 if places != "a start every 3000 rows" else 3000
        wanted = torch.stack(
            [torch.where(rows % length + ahead < length, rows + ahead, -1) for ahead in (shift, shift + 1)]
        )
        wanted = wanted.masked_fill(wanted >= 6500, -1)
        assert_targets((ids, positions, None, 2, shift, 0, -1), backend, (wanted, (wanted >= 0).sum(1)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [6, 7, 8, 10**6, 2**62])
def test_behind_the_last_row_there_is_no_target(shift: int, backend: str) -> None:
    ids, positions = torch.arange(7), torch.arange(7)
    for where in (positions, None):
        targets, counts = ops.mtp_targets(ids, where, None, 2, shift, 2**62, -1, backend)
        assert targets.tolist() == [[6 if shift == 6 else -1, *[-1] * 6], [-1] * 7]
        assert counts.tolist() == [int(shift == 6), 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_do_not_wrap(backend: str) -> None:
    positions = torch.tensor([MOST - 1, MOST, LEAST, LEAST + 1, -1, 0, MOST])
    assert_targets((torch.arange(7), positions, None, 3, 1, 0, -1), backend)
    narrow = torch.tensor([2**31 - 2, 2**31 - 1, -(2**31), -1, 0], dtype=torch.int32)
    assert_targets((torch.arange(5), narrow, None, 3, 1, 0, -1), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    columns = torch.arange(128).view(64, 2)
    ids, positions, mask = columns[:, 1], columns[:, 0] // 2 % 10, columns[:, 0] % 3 > 0
    assert_targets((ids, torch.arange(5).expand(13, 5).T.reshape(-1)[:64], None, 2, 1, 0, -1), backend)
    assert_targets((ids[::2], positions.flip(0)[::2], mask[::2], 2, 0, 7, -1), backend)
    assert_targets((ids[:1].expand(64), positions, mask[:1].expand(64), 2, 1, 0, -1), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_pass_whatever_the_vocabulary_is(backend: str) -> None:
    targets, counts = ops.mtp_targets(torch.tensor([MOST, 5, LEAST, -1]), None, None, 1, 0, 0, 5, backend)
    assert targets.tolist() == [[MOST, -1, -1, -1]]
    assert counts.tolist() == [1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [2**32, 2**32 + 2, -(2**32) + 1, MOST, LEAST])
def test_an_ignored_id_does_not_wrap(ignore_index: int, backend: str) -> None:
    assert_targets((torch.arange(4, dtype=torch.int32), None, None, 2, 0, 0, ignore_index), backend)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=6),
    lead=st.integers(0, 3),
    tail=st.integers(0, 3),
    depths=st.integers(1, 4),
    shift=st.integers(0, 3),
)
def test_packed_as_one_by_one(lengths: list[int], lead: int, tail: int, depths: int, shift: int) -> None:
    """Documents of cu_seqlens, rows before and behind them that are of none; depth k of a shift is depth k + 1 of the
    one before."""
    ends = torch.tensor([lead, *lengths]).cumsum(0)
    ids = torch.arange(int(ends[-1]) + tail)
    where = documents("op", ids, None, ends)
    targets, counts = ops.mtp_targets(ids, where.positions, None, depths, shift, where.sequence_length, -1, "native")
    parts = [torch.full((depths, lead), -1)]
    for first, last in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        parts.append(ops.mtp_targets(ids[first:last], None, None, depths, shift, 0, -1, "native")[0])
    parts.append(torch.full((depths, tail), -1))
    assert torch.equal(targets, torch.cat(parts, dim=1))
    assert torch.equal(counts, (targets >= 0).sum(1))
    later = ops.mtp_targets(ids, where.positions, None, depths, shift + 1, 0, -1, "native")[0]
    assert torch.equal(later[: depths - 1], targets[1:])


def test_faults_that_others_have_are_found() -> None:
    """A roll that wraps and crosses documents; the positions of the two rows alone, whatever stands between them."""
    ids, positions = torch.arange(9), torch.tensor([0, 1, 2, 0, 1, 2, 0, 4, 5])
    right = by_loop(ids, positions, None, 2, 1, 0, -1)[0]
    assert right.tolist() == [[1, 2, -1, 4, 5, -1, -1, 8, -1], [2, -1, -1, 5, -1, -1, -1, -1, -1]]
    assert not torch.equal(torch.stack([ids.roll(-1), ids.roll(-2)]), right)
    ends = torch.where(positions.roll(-3) == positions + 3, ids.roll(-3), -1)
    assert ends[4] == 7
    assert_targets((ids, positions, None, 1, 3, 0, -1), "native")
    assert by_loop(ids, positions, None, 1, 3, 0, -1)[0][0, 4] == -1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_of_packed_documents(dtype: torch.dtype) -> None:
    ids = torch.zeros(8, dtype=torch.int32)
    found = documents("op", ids, None, torch.tensor([1, 1, 4, 6], dtype=dtype))
    assert found.positions is not None
    assert found.positions.tolist() == [-1, 0, 1, 2, 0, 1, -1, -1]
    assert found.sequence_length == 0
    nothing = documents("op", ids, None, torch.tensor([0], dtype=dtype)).positions
    assert nothing is not None
    assert nothing.tolist() == [-1] * 8


def test_each_row_of_a_batch_ends_a_document() -> None:
    ids = torch.arange(6).view(2, 3)
    assert documents("op", ids, None, None) == (None, 3)
    assert documents("op", ids[0], None, None) == (None, 0)
    positions = torch.tensor([[0, 1, 2], [3, 4, 5]])
    found = documents("op", ids, positions, None)
    assert_targets((ids.reshape(-1), found.positions, None, 2, 0, found.sequence_length, -1), "native")
    assert ops.mtp_targets(ids.reshape(-1), found.positions, None, 2, 1, 3, -1, "native")[0].tolist() == [
        [1, 2, -1, 4, 5, -1],
        [2, -1, -1, 5, -1, -1],
    ]


IDS = torch.arange(6)
REFUSED = [
    ([1, 2], None, None, TypeError, "token_ids must be a torch.Tensor, got list"),
    (IDS.float(), None, None, TypeError, "token_ids must have dtype int64, int32, got float32"),
    (IDS.view(1, 2, 3), None, None, ValueError, r"token_ids must have shape \[N\] or \[B, T\], got \[1, 2, 3\]"),
    (IDS, IDS.view(2, 3), None, ValueError, r"positions must have shape \[N\] = \[6\], got \[2, 3\]"),
    (IDS, IDS.float(), None, TypeError, "positions must have dtype int64, int32, got float32"),
    (IDS, IDS.to("meta"), None, ValueError, "positions must be on cpu like token_ids, got meta"),
    (IDS, IDS, IDS, ValueError, "positions and cu_seqlens exclude each other, got both"),
    (IDS.view(2, 3), None, IDS, ValueError, r"cu_seqlens is for packed token_ids \[N\], got \[2, 3\]"),
    (IDS, None, IDS[:0], ValueError, r"cu_seqlens must have shape \[B \+ 1\], got \[0\]"),
    (IDS, None, torch.tensor([0, 4, 3]), ValueError, r"rise within \[0, N\] = \[0, 6\] .* got \[0, 4, 3\]"),
    (IDS, None, torch.tensor([0, 7]), ValueError, r"rise within \[0, N\] = \[0, 6\] .* got \[0, 7\]"),
    (IDS, None, torch.tensor([-1, 6]), ValueError, r"rise within \[0, N\] = \[0, 6\] .* got \[-1, 6\]"),
]


@pytest.mark.parametrize(("ids", "positions", "cu_seqlens", "error", "says"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(ids: Any, positions: Any, cu_seqlens: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"some_op: {says}" if "rise" not in says else says):
        documents("some_op", ids, positions, cu_seqlens)

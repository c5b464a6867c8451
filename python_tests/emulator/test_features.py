"""The emulator itself: every feature of CUDA that it offers, against its definition."""

from __future__ import annotations

import ctypes
import functools
import operator
from typing import Any

import pytest
import torch
from torch import Tensor

from python_tests.emulator import ORDERS, build

FULL = 0xFFFFFFFF
MASKS = [FULL, 0x0000FFFF, 0x5A5A00F1]


@pytest.fixture(params=ORDERS, autouse=True)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("GK_EMULATOR_ORDER", str(request.param))
    return request.param


def status(name: str, *arguments: Any) -> str:
    """Calls a function of kernels/features.cu; "" or the text of its error."""
    library = build.test_kernels()
    library.gk_error_text.restype = ctypes.c_char_p
    passed = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_uint(a) for a in arguments]
    code = getattr(library, name)(*passed)
    return library.gk_error_text(code).decode() if code else ""


def run(name: str, *arguments: Any) -> None:
    assert status(name, *arguments) == ""


def lanes_of(mask: int) -> list[int]:
    return [lane for lane in range(32) if mask >> lane & 1]


def shuffle_source(kind: int, lane: int, amount: int, width: int) -> int:
    """The lane that a shuffle reads: CUDA C++ Programming Guide, "Warp Shuffle Functions"."""
    first, last = lane // width * width, lane // width * width + width - 1
    source = [first + amount % width, lane - amount, lane + amount, lane ^ amount][kind]
    if (kind == 1 and source < first) or (kind in (2, 3) and source > last):
        return lane
    return source


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("kind", range(4), ids=["idx", "up", "down", "xor"])
def test_shuffles(kind: int, dtype: torch.dtype) -> None:
    function = "gk_shuffle_float" if dtype == torch.float32 else "gk_shuffle_int64"
    values = (torch.arange(64) + 1).to(dtype) * (1 if dtype == torch.float32 else 2**40 + 1)
    for mask in MASKS:
        for width in (32, 16, 4, 1):
            for amount in (0, 1, 3, 8, 16, 31):
                out = torch.zeros(64, dtype=dtype)
                run(function, values, out, 64, kind, mask, amount, width)
                for i in (base + lane for base in (0, 32) for lane in lanes_of(mask)):
                    source = shuffle_source(kind, i % 32, amount, width)
                    if mask >> source & 1:
                        assert out[i] == values[i // 32 * 32 + source]
                    else:  # a lane that takes no part gives nothing: NaN, or all bits set
                        assert out[i].isnan() if dtype == torch.float32 else out[i] == -1


def test_a_shuffle_of_a_ragged_warp_takes_the_lanes_that_exist() -> None:
    out = torch.zeros(37)
    run("gk_shuffle_float", torch.arange(37.0), out, 37, 3, FULL, 1, 32)
    assert out[:36].tolist() == [i ^ 1 for i in range(36)]
    assert out[36].isnan()


@pytest.mark.parametrize("mask", MASKS)
def test_votes_matches_and_reductions(mask: int) -> None:
    for values in (torch.randint(-3, 4, (64,)), torch.full((64,), 5), torch.arange(64) - 32):
        out = torch.zeros(64, 14, dtype=torch.int32)
        run("gk_vote", values.int(), out, 64, mask)
        for base in (0, 32):
            lanes = [base + lane for lane in lanes_of(mask)]
            brought = [int(values[i]) for i in lanes]
            unsigned = [value & FULL for value in brought]
            same = {v: sum(1 << i % 32 for i in lanes if values[i] == v) for v in brought}
            for i, value in zip(lanes, brought, strict=True):
                expected = [
                    sum(1 << j % 32 for j in lanes if values[j] > 0),
                    any(v > 0 for v in brought),
                    all(v > 0 for v in brought),
                    same[value],
                    mask if len(same) == 1 else 0,
                    len(same) == 1,
                    sum(brought),
                    min(brought),
                    max(brought),
                    min(unsigned),
                    max(unsigned),
                    *(functools.reduce(op, unsigned) for op in (operator.and_, operator.or_, operator.xor)),
                ]
                assert [v & FULL for v in out[i].tolist()] == [int(v) & FULL for v in expected]


def test_halves_of_a_warp_go_their_own_ways() -> None:
    values, out = torch.randint(-9, 9, (32,), dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    run("gk_halves", values, out)
    assert (out == values[:16].sum() + values[16:].max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("threads", "n"), [(1, 1), (32, 31), (100, 100), (1024, 1000)])
def test_shared_memory_is_a_blocks_own(threads: int, n: int, dtype: torch.dtype) -> None:
    values = torch.randn(7, n, dtype=dtype)
    out = torch.empty_like(values)
    run(f"gk_reverse_{'float' if dtype == torch.float32 else 'double'}", values, out, 7, threads, n)
    assert torch.equal(out, values.flip(1))


def test_shared_memory_starts_as_nan() -> None:
    out = torch.zeros(2)
    run("gk_poison", out)
    assert out.isnan().all()


@pytest.mark.parametrize("threads", [1, 33, 128])
def test_votes_of_a_block(threads: int) -> None:
    for values in (torch.randint(-1, 2, (threads,)), torch.ones(threads), torch.zeros(threads)):
        out = torch.zeros(3, threads, dtype=torch.int32)
        run("gk_block_vote", values.int(), out, threads)
        positive = values > 0
        assert out.tolist() == [[int(v)] * threads for v in (positive.sum(), positive.any(), positive.all())]


def test_every_thread_of_every_block_runs_once() -> None:
    out = torch.zeros(12, 24, dtype=torch.int32)
    run("gk_index", out)
    assert torch.equal(out, 100 * torch.arange(12)[:, None].int() + torch.arange(24).int())


@pytest.mark.parametrize(("blocks", "threads"), [(1, 33), (7, 64)])
def test_atomics(blocks: int, threads: int) -> None:
    values = torch.randint(-1000, 1000, (blocks * threads,), dtype=torch.int32)
    start = torch.tensor([3, 4, 2000, -2000, -1, 0, 0, 1, 0], dtype=torch.int32)
    wide = torch.tensor([2**40])
    out = start.clone()
    run("gk_atomic", values, out, wide, blocks, threads)
    v = values.tolist()
    product = functools.reduce(lambda a, b: a * (2 * b + 1) % 2**32, v, 1)
    bits = [functools.reduce(op, v, begin) for op, begin in ((operator.and_, -1), (operator.or_, 0), (operator.xor, 0))]
    expected = [3 + sum(v), 4 - sum(v), min(v), max(v), *bits, product - 2**32 * (product >= 2**31), 77]
    assert out.tolist() == expected
    assert wide.item() == 2**40 + sum(v)


@pytest.mark.parametrize("order", ORDERS[2:], indirect=True)
def test_a_lock_keeps_others_out(order: int) -> None:
    """A thread that spins for another one needs an order that takes turns."""
    lock, count = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    run("gk_lock", lock, count, 6, 40)
    assert count.item() == 240


def test_vector_loads() -> None:
    values, out = torch.randn(32, 4), torch.empty(32, 4)
    run("gk_vector", values, out, 32)
    assert torch.equal(out, values.flip(1))


def test_bits() -> None:
    values = torch.tensor([0, 1, -1, 0x12345678, -(2**31), 6, 1 << 20], dtype=torch.int32)
    out = torch.zeros(len(values), 8, dtype=torch.int32)
    run("gk_bits", values, out, len(values))
    for value, row in zip(values.tolist(), out.tolist(), strict=True):
        word, wide = value & FULL, value & (2**64 - 1)
        first = (word & -word).bit_length()
        expected = [
            word.bit_count(),
            first,
            32 - word.bit_length(),
            int(f"{word:032b}"[::-1], 2),
            word,
            int.from_bytes(bytes([word & 0xFF, 0xFF * (word >> 15 & 1), word >> 8 & 0xFF, 0x77]), "little"),
            wide.bit_count() + 64 - wide.bit_length() + (wide & -wide).bit_length(),
            min(value, 5) + max(value, 5),
        ]
        assert [v & FULL for v in row] == [v & FULL for v in expected]


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((0, 1, 32, 4), "a launch of (0, 1, 1) blocks of 32 threads"),
        ((1, 65536, 32, 4), "a launch of (1, 65536, 1) blocks of 32 threads"),
        ((1, 1, 0, 4), "a launch of (1, 1, 1) blocks of 0 threads"),
        ((1, 1, 1025, 4), "a launch of (1, 1, 1) blocks of 1025 threads"),
        ((1, 1, 32, 232449), "232449 bytes of dynamic shared memory, of at most 232448"),
    ],
)
def test_launches_that_a_gpu_refuses(shape: tuple[int, ...], says: str) -> None:
    out = torch.zeros(2)
    assert status("gk_launch", *shape, out) == says
    assert not out.any()
    run("gk_launch", 1, 1, 32, 232448, torch.zeros(2))  # the error is gone; this much is allowed

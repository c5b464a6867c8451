"""The registered ops behind linear_log_probs in Triton's interpreter: parts, accumulators, configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from grpo_kernels import linear_token_log_probs
from grpo_kernels.linear_log_probs import ops
from grpo_kernels.testing import assert_as_accurate
from python_tests.interpreter.test_linear_log_probs_triton import eager, in_slices
from python_tests.test_linear_log_probs import LORA_SCALE, Problem, problem

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("triton_on_cpu"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
INF, NAN = float("inf"), float("nan")


# --- the registered ops ----------------------------------------------------------------------------------------------

_PLAIN = (None, None, 1.0, 1.0, 0.0)


def _raw(p: Problem, part: slice = slice(None)) -> tuple[Any, ...]:
    leaves = {name: leaf.detach() for name, leaf in p.leaves.items()}
    bias = leaves["bias"][part] if "bias" in leaves else None
    return leaves["hidden"], leaves["weight"][part], bias, None, None, 1.0


def test_statistics_are_those_of_the_row_kernels() -> None:
    p = problem(40, 16, 600, bias=True)
    with torch.no_grad():
        p.leaves["bias"][100:] = -INF
        p.leaves["bias"][:100] += 50.0
    p.ids[7], p.ids[8] = -1, 600
    (*_, ours) = ops.linear_token_log_probs(*_raw(p), p.ids, *_PLAIN, True, False, False, True, "triton")
    for row, exact, plain in zip(
        ours, *(_statistics(p, dtype) for dtype in (torch.float64, torch.float32)), strict=True
    ):
        assert_as_accurate(row, exact, plain)


def _statistics(p: Problem, dtype: torch.dtype) -> Tensor:
    logits = F.linear(*(p.leaves[name].detach().to(dtype) for name in ("hidden", "weight", "bias")))
    top = logits.amax(1)
    u = logits - top[:, None]
    target = logits.gather(1, p.ids.clamp(0, 599)[:, None])[:, 0]
    found = torch.stack([top, u.exp().sum(1), target, (u.exp() * u.nan_to_num(neginf=0)).sum(1)])
    found[:, 7] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    found[:, 8] = NAN
    return found


def test_a_part_with_nothing_but_minus_infinity() -> None:
    """Its statistics are those of an empty part; the rows themselves have no log-prob."""
    p = problem(3, 8, 40, bias=True)
    with torch.no_grad():
        p.leaves["bias"].fill_(-INF)
    p.ids[2] = -1
    results = ops.linear_token_log_probs(*_raw(p), p.ids, *_PLAIN, True, True, True, True, "triton")
    assert results[4].T.tolist() == [[-INF, 0.0, -INF, 0.0]] * 2 + [[0.0, 1.0, 0.0, 0.0]]
    for value in results[:3]:
        assert value.isnan().tolist() == [True, True, False]
    assert results[3].tolist() == [-1] * 3


@pytest.mark.parametrize("upstream", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 1)], ids=str)
def test_parts_of_a_vocabulary(upstream: tuple[int, int, int]) -> None:
    """The backward of each part takes the statistics of all; a target in another part has no term in this one."""
    p = problem(20, 8, 700)
    grads = [torch.randn(20) if wanted else None for wanted in upstream]
    whole = ops.linear_token_log_probs(*_raw(p), p.ids, *_PLAIN, True, False, False, True, "triton")[4]
    hidden, weight = torch.zeros(20, 8), []
    for part in (slice(0, 300), slice(300, 700)):
        local = torch.where((p.ids >= part.start) & (p.ids < part.stop), p.ids - part.start, part.stop - part.start)
        found = ops.linear_token_log_probs_backward(
            *_raw(p, part), local, *_PLAIN, whole, *grads, None, True, True, False, False,
            torch.float32, torch.float32, "triton",
        )  # fmt: skip
        hidden += found[0]
        weight.append(found[1])
    zeros = torch.zeros(20)
    first, second, third = (zeros if grad is None else grad for grad in grads)
    same = p._replace(upstream=(first, second))
    _, exact = eager(same, torch.float64, log_sum_exp=third.double())
    _, plain = eager(same, torch.float32, log_sum_exp=third)
    assert_as_accurate(hidden, exact["hidden"], plain["hidden"])
    assert_as_accurate(torch.cat(weight), exact["weight"], plain["weight"])


def test_only_what_is_needed() -> None:
    p = problem(10, 8, 300, bias=True, lora=True)
    leaves = {name: leaf.detach() for name, leaf in p.leaves.items()}
    head = (*(leaves[name] for name in ("hidden", "weight", "bias", "a", "b")), LORA_SCALE)
    statistics = ops.linear_token_log_probs(*head, p.ids, *_PLAIN, True, False, False, True, "triton")[4]

    def backward(*needs: bool) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = ops.linear_token_log_probs_backward(
            *head, p.ids, *_PLAIN, statistics, *p.upstream, None, None, *needs, torch.float32, torch.float32, "triton"
        )
        return found

    everything = backward(True, True, True, True)
    for needs in ((True, False, False, False), (False, True, False, False), (False, False, True, True)):
        wanted = (*needs, needs[3])
        for some, full, want in zip(backward(*needs), everything, wanted, strict=True):
            assert torch.equal(some, full) if want else some.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_grad_accumulator(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches add to one buffer in float32; whoever saved it sees that it changed."""
    in_slices(monkeypatch)
    a, b = problem(9, 16, 600, dtype), problem(13, 16, 600, dtype)
    weight = b.leaves["weight"] = a.leaves["weight"]
    start = torch.randn(600, 16)
    buffer, version = start.clone(), 0
    for p in (a, b):
        out = linear_token_log_probs(
            p.leaves["hidden"], weight, p.ids, outputs=("entropy",), weight_grad_accumulator=buffer
        )
        torch.autograd.backward((out.log_probs, out.entropy), p.upstream)
        assert buffer._version > version
        version = buffer._version
    assert weight.grad is None
    exact = start.double() + sum(eager(p, torch.float64)[1]["weight"] for p in (a, b))
    plain = start + sum(eager(p, torch.float32, rounding=dtype)[1]["weight"] for p in (a, b))
    assert_as_accurate(buffer, exact, plain)


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 255, 32003, 129280, 151936])
@pytest.mark.parametrize(("size", "architecture", "loads"), [(2, 90, "tma"), (2, 80, "vector"), (4, 100, "scalar")])
def test_splits_hold_the_vocabulary(vocab: int, size: int, architecture: int, loads: str) -> None:
    from grpo_kernels.linear_log_probs._config_triton import COLUMNS, MAX_SPLITS, launch_config, slice_width

    config = launch_config(vocab, 4096, size, architecture, loads)
    columns = config.tiles_per_split * config.block_n
    assert (config.splits - 1) * columns < vocab <= config.splits * columns
    assert config.splits <= MAX_SPLITS
    for rows in (1, 8192, 10**7):
        width = slice_width(rows, vocab, size)
        assert width % COLUMNS == width % config.block_n == 0
        assert width == COLUMNS or rows * width * size <= 256 << 20


def test_rows_far_apart_are_gathered() -> None:
    """Within a tile the kernels count in 32 bits: 128 rows of the last token of long sequences lie further apart."""
    far = torch.empty(300, 2**25, device="meta")[:, :64]
    near = torch.empty(300, 4096, device="meta")[:, :64]
    from grpo_kernels._launch import matrix

    assert matrix(far).stride == 64
    assert matrix(near).stride == 4096


def test_parts_of_large_numbers_stay_finite() -> None:
    from grpo_kernels.linear_log_probs import _triton as launchers

    values = torch.tensor([1.5e5, -1.0e5, 1e-3, 3.14159])
    assert torch.equal(launchers._parts(values, torch.bfloat16).float().sum(0), values)
    assert torch.equal(launchers._parts(values[:2], torch.float16).float().sum(0), values[:2])

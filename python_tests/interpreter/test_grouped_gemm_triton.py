"""The Triton kernels of grouped_gemm, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.grouped_gemm import ops, reference
from grpo_kernels.testing import assert_as_accurate, guard_input, guarded_allocations
from python_tests.gpu.devices import assert_identical, inputs_of
from python_tests.gpu.devices import run as run_call
from python_tests.samples import Call, assert_gradients_agree
from python_tests.samples import grouped_gemm as samples
from python_tests.test_grouped_gemm import SEGMENTS, Problem, check, eager, problem, run

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("triton_on_cpu"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# How operands are loaded -> the architecture, K and N that make it so.
LOADS = {"tma": (90, 72, 136), "vector": (80, 64, 80), "scalar": (90, 37, 75)}
BAD_OFFSETS = [[5, 3, 90], [-2, 40, 200], [2**31 - 1, 0, 7]]


@pytest.fixture(params=LOADS)
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """K and N whose rows are loaded in one of the ways."""
    architecture, width, columns = LOADS[request.param]
    _on(monkeypatch, architecture)
    return width, columns


def _on(monkeypatch: pytest.MonkeyPatch, architecture: int) -> None:
    from grpo_kernels.grouped_gemm import _triton

    monkeypatch.setattr(_triton, "architecture", lambda tensor: architecture)


# --- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "turned"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True), (torch.float16, False)],
    ids=str,
)
def test_against_float64(sizes: tuple[int, int], dtype: torch.dtype, turned: bool) -> None:
    """Every way of loading, both layouts of the weight. Segments of less than a tile, of more, of none; NaN behind."""
    p = problem([3, 3, 90, 110], 130, *sizes, dtype, bias=True, turned=turned)
    out, gradients = run(p)
    check(p, out, gradients)
    assert gradients["weight"].stride() == p.leaves["weight"].stride()


@pytest.mark.parametrize("name", SEGMENTS)
def test_segments(name: str) -> None:
    ends, rows = SEGMENTS[name]
    p = problem(ends[-40:], rows, 20, 12, bias=True)  # the interpreter takes its time with every expert
    check(p, *run(p))


@pytest.mark.parametrize("rows", [150, 600])
def test_tiles_of_few_and_of_many_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert gets all, over several groups of row blocks."""
    from grpo_kernels.grouped_gemm import _config_triton

    monkeypatch.setattr(_config_triton, "L2_BYTES", 3 * 128 * 16 * 2)
    p = problem([0, rows - 1, rows - 1, rows], rows, 16, 24, torch.float16)
    check(p, *run(p))


def test_any_number_of_programs_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_kernels.grouped_gemm import _triton

    p = problem([66, 66, 70], 71, 24, 70, bias=True)
    results = []
    for count in (1, 2, 1000):
        monkeypatch.setattr(_triton, "programs", lambda tensor, items, on_each, count=count: min(count, items))
        out, gradients = run(p)
        results.append([out, *gradients.values()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_results_and_a_float32_accumulator(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """Experts without rows leave their part of the accumulator alone, in either layout."""
    start = torch.randn(4, sizes[1], sizes[0])
    buffer = start.mT.contiguous().mT if dtype == torch.bfloat16 else start.clone()
    p = problem([3, 3, 40, 70], 75, *sizes, dtype)
    version = buffer._version
    out, gradients = run(p, out_dtype=torch.float32, weight_grad_accumulator=buffer)
    assert buffer._version > version
    assert gradients.pop("weight") is None
    check(p, out, gradients)
    exact, plain = (eager(p, of)[1]["weight"] for of in (torch.float64, torch.float32))
    assert_as_accurate(buffer, start.double() + exact, start + plain)
    assert torch.equal(buffer[1], start[1])


def test_operands_that_need_a_copy() -> None:
    p = problem([3, 30, 40], 47, 24, 16)
    for leaf in ("x", "weight"):
        values = p.leaves[leaf].detach()
        p.leaves[leaf] = values.repeat_interleave(2, -1)[..., ::2].requires_grad_()
    check(p, *run(p))
    shared = p.leaves["weight"][:1].detach().expand(3, -1, -1)
    p.leaves["weight"] = shared.requires_grad_()
    check(p, *run(p))


def test_one_expert_with_a_view_of_any_stride() -> None:
    p = problem([5], 7, 24, 16)
    p.leaves["weight"] = p.leaves["weight"].detach().as_strided((1, 16, 24), (1, 24, 1)).requires_grad_()
    check(p, *run(p))


@pytest.mark.parametrize(("architecture", "width", "columns"), [(90, 1, 9), (90, 8, 1), (80, 9, 1), (80, 1, 1)])
def test_sizes_of_one(architecture: int, width: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _on(monkeypatch, architecture)
    p = problem([3, 8], 9, width, columns, bias=True)
    check(p, *run(p))


# --- what is not there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", BAD_OFFSETS, ids=str)
def test_bad_offsets_are_cut_off_as_in_the_definition(sizes: tuple[int, int], offsets: list[int]) -> None:
    """Nothing out of bounds is read or written, and every row has one owner."""
    rows, (width, columns) = 90, sizes
    x, weight = torch.randn(rows, width), torch.randn(3, columns, width)
    grad = torch.randn(rows, columns)
    bad = torch.tensor(offsets)
    ends = reference.segment_ends(bad, rows)
    with guarded_allocations():
        given = (guard_input(x), guard_input(weight), guard_input(grad))
        out = ops.grouped_gemm(given[0], given[1], bad, None, torch.float32, "triton")
        wgrad = ops.grouped_gemm_wgrad(given[0], given[2], bad, torch.float32, "triton")
        sums = ops.grouped_row_sum(given[2], bad, "triton")
    good = Problem({"x": x.requires_grad_(), "weight": weight.requires_grad_()}, ends, grad)
    (exact, gradients), (plain, plain_gradients) = eager(good, torch.float64), eager(good, torch.float32)
    assert_as_accurate(out, exact, plain)
    assert_as_accurate(wgrad, gradients["weight"], plain_gradients["weight"])
    own = torch.nn.functional.one_hot(torch.bucketize(torch.arange(rows), ends, right=True), 4)[:, :3].T
    assert_as_accurate(sums, own.double() @ grad.double(), own.float() @ grad)


def test_nan_stays_with_its_expert(sizes: tuple[int, int]) -> None:
    p = problem([4, 4, 9, 12], 12, *sizes, bias=True)
    with torch.no_grad():
        p.leaves["x"][5] = NAN
        p.leaves["weight"][1], p.leaves["bias"][1] = NAN, NAN
    out, gradients = run(p)
    assert out.isnan().any(1).nonzero()[:, 0].tolist() == [5]
    assert gradients["x"].isfinite().all()
    assert gradients["bias"].isfinite().all()
    assert gradients["weight"].isnan().flatten(1).any(1).tolist() == [False, False, True, False]


def test_no_access_out_of_bounds(sizes: tuple[int, int]) -> None:
    with guarded_allocations():
        p = problem(*SEGMENTS["tail"], *sizes, bias=True)
        p = p._replace(
            leaves={key: guard_input(leaf.detach()).requires_grad_() for key, leaf in p.leaves.items()},
            upstream=guard_input(p.upstream),
        )
        out, gradients = run(p)
    check(p, out, gradients)


# --- the library's product -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("ends", [[0, 3, 200, 200, 270], [300] * 5, [0] * 5, [0, 100, 50, 400, 7]], ids=str)
def test_what_the_library_leaves_is_cleared(ends: list[int], turned: bool) -> None:
    """PyTorch's own grouped product, here that of the CPU, with everything around it that runs on a GPU."""
    from grpo_kernels.grouped_gemm import _library_triton as library

    sound = reference.segment_ends(torch.tensor(ends), 300)
    p = problem(sound.tolist(), 300, 64, 80, torch.bfloat16, turned=turned)
    x, weight = (leaf.detach() for leaf in p.leaves.values())
    out = library.grouped_gemm(x, weight, torch.tensor(ends))
    wgrad = library.grouped_gemm_wgrad(x, p.upstream, torch.tensor(ends))
    dgrad = library.grouped_gemm(p.upstream, weight.transpose(1, 2), torch.tensor(ends))
    check(p, out, {"x": dgrad, "weight": wgrad})
    assert out.is_contiguous()
    assert wgrad.is_contiguous()


def test_what_the_library_can_load() -> None:
    from grpo_kernels.grouped_gemm._library_triton import _aligned, suits

    rows = torch.empty(40, 64, dtype=torch.bfloat16)
    weight = torch.empty(3, 24, 64, dtype=torch.bfloat16)
    assert all(_aligned(t) for t in (rows, rows[:, 8:48], rows[::2], weight, weight.mT, weight[:, 8:, 16:]))
    assert not any(_aligned(t) for t in (rows.T, rows[:, 4:], rows[:, ::2], weight[..., 1:], weight[..., ::2]))
    assert not _aligned(torch.empty(3, 5, 12, dtype=torch.bfloat16))
    assert not _aligned(rows[:1].expand(40, -1))
    assert not suits(rows, weight, 3, torch.bfloat16)  # not on the CPU


# --- the registered ops and their samples ----------------------------------------------------------------------------


@pytest.mark.parametrize("call", samples.CALLS, ids=lambda call: call.name)
def test_samples(call: Call) -> None:
    """As on the CPU, and twice the same."""
    ours = run_call(call, inputs_of(call, "cpu"))
    assert_identical(run_call(call, inputs_of(call, "cpu")), ours)
    with grpo_kernels.backend("reference"):
        plain = run_call(call, inputs_of(call, "cpu"))
    assert [(a.shape, a.dtype) for a in ours] == [(b.shape, b.dtype) for b in plain]
    assert_gradients_agree(call, ours, plain)


@pytest.mark.parametrize("op", samples.OPS)
def test_fakes_describe_the_outputs(op: str) -> None:
    function = getattr(torch.ops.grpo_kernels, op).default
    for arguments in samples.OPS[op]:
        real = function(*(a.clone() if isinstance(a, Tensor) else a for a in arguments), "triton")
        meta = function(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments), "triton")
        described = [(t.shape, t.dtype, t.stride()) for t in (real, meta) if t is not None]
        assert len(described) == 2 * (not op.endswith("_"))  # what writes into its argument returns nothing
        assert described[:1] == described[1:]

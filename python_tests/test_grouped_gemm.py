"""grouped_gemm: the definition, the CPU products against float64, segments of every kind."""

from __future__ import annotations

import inspect
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import grouped_gemm
from grpo_kernels.grouped_gemm import _native, ops, reference
from grpo_kernels.grouped_gemm._config_triton import FEW_ROWS, launch_config, library_suits, segments, wgrad_config
from grpo_kernels.testing import assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["native", "reference"]
NAN = float("nan")
# end rows of the experts, rows
SEGMENTS: dict[str, tuple[list[int], int]] = {
    "ragged": ([3, 20, 21, 90], 90),
    "empty_experts": ([0, 7, 7, 7, 30, 30], 30),
    "one_gets_all": ([0, 0, 64, 64], 64),
    "one_expert": ([70], 70),
    "one_row": ([0, 1, 1], 1),
    "tail": ([10, 10, 31], 47),
    "only_tail": ([0, 0, 0], 9),
    "no_rows": ([0, 0], 0),
    "many_experts": ([2 * (e // 100) for e in range(256)], 7),
}


class Problem(NamedTuple):
    """Experts and their rows. What no expert has is NaN, in x and in the upstream gradient."""

    leaves: dict[str, Tensor]  # x, weight, bias
    offsets: Tensor
    upstream: Tensor

    @property
    def end(self) -> int:
        return int(self.offsets[-1])


def problem(
    ends: list[int], rows: int, width: int = 24, columns: int = 16, dtype: torch.dtype = torch.float32, *,
    bias: bool = False, turned: bool = False,
) -> Problem:  # fmt: skip
    experts = len(ends)
    weight = torch.randn(experts, columns, width) * width**-0.5
    leaves = {"x": torch.randn(rows, width), "weight": weight}
    if turned:
        leaves["weight"] = weight.transpose(1, 2).contiguous().transpose(1, 2)
    if bias:
        leaves["bias"] = torch.randn(experts, columns)
    upstream = torch.randn(rows, columns).to(dtype)
    leaves["x"][ends[-1] :], upstream[ends[-1] :] = NAN, NAN
    return Problem(
        {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}, torch.tensor(ends), upstream
    )


def run(p: Problem, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The result, and the gradients for the upstream one."""
    leaves = {name: leaf.detach().requires_grad_(leaf.requires_grad) for name, leaf in p.leaves.items()}
    out = grouped_gemm(leaves["x"], leaves["weight"], p.offsets, bias=leaves.get("bias"), **options)
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(out, list(trained.values()), p.upstream.to(out.dtype), allow_unused=True)
    return out.detach(), dict(zip(trained, gradients, strict=True))


def eager(p: Problem, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The same by a weight for every row, written apart from the definition."""
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in p.leaves.items()}
    rows, end = len(leaves["x"]), p.end
    own = torch.bucketize(torch.arange(end), p.offsets, right=True)
    out = torch.einsum("rk,rnk->rn", leaves["x"][:end], leaves["weight"][own])
    if "bias" in leaves:
        out = out + leaves["bias"][own]
    gradients = torch.autograd.grad(out, list(leaves.values()), p.upstream[:end].to(dtype))
    full = torch.cat([out.detach(), out.new_zeros(rows - end, out.shape[1])])
    found = dict(zip(leaves, gradients, strict=True))
    found["x"][end:] = 0
    return full, found


def check(p: Problem, out: Tensor, gradients: dict[str, Tensor]) -> None:
    """Within twice the error of eager PyTorch in float32; what has no rows is exactly zero."""
    exact, exact_gradients = eager(p, torch.float64)
    plain, plain_gradients = eager(p, torch.float32)
    assert_as_accurate(out, exact, plain)
    assert not out[p.end :].any()
    for name, gradient in gradients.items():
        assert_as_accurate(gradient, exact_gradients[name], plain_gradients[name], name=f"gradient of {name}")
        assert (gradient.shape, gradient.dtype) == (p.leaves[name].shape, p.leaves[name].dtype)
    assert not gradients["x"][p.end :].any()
    empty = p.offsets.diff(prepend=torch.zeros(1, dtype=torch.int64)) == 0
    for name in {"weight", "bias"} & set(gradients):
        assert not gradients[name][empty].any()


# --- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SEGMENTS)
def test_against_float64(name: str, dtype: torch.dtype, backend: str) -> None:
    for bias in (False, True):
        p = problem(*SEGMENTS[name], dtype=dtype, bias=bias)
        with grpo_kernels.backend(backend):
            check(p, *run(p))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    p = problem([2, 2, 5], 5, 3, 4, torch.float64, bias=True)
    with grpo_kernels.backend(backend):
        torch.autograd.gradcheck(lambda x, w, b: grouped_gemm(x, w, p.offsets, bias=b), tuple(p.leaves.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_problems(backend: str) -> None:
    """Any sizes, of which none is a multiple of anything."""
    generator = torch.Generator().manual_seed(3)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    found: list[tuple[list[Tensor], ...]] = []
    for _ in range(25):
        ends = sorted(number(0, 40) for _ in range(number(1, 9)))
        p = problem(ends, ends[-1] + number(0, 5), number(1, 40), number(1, 40), bias=True)
        with grpo_kernels.backend(backend):
            results = (run(p), eager(p, torch.float64), eager(p, torch.float32))
        found.append(tuple([out, *gradients.values()] for out, gradients in results))
    for of_all in zip(
        *([list(zip(*of, strict=True)) for of in found]), strict=True
    ):  # judged together, lest one be exact
        assert_as_accurate(*(torch.cat([t.reshape(-1) for t in column]) for column in zip(*of_all, strict=True)))


def test_one_definition_where_offsets_may_be_read_and_where_not() -> None:
    for ends, rows in SEGMENTS.values():
        p = problem(ends, rows, dtype=torch.float64, bias=True)
        leaves = [leaf.detach() for leaf in p.leaves.values()]
        found = []
        for way in (reference._by_segments, reference._by_masks):
            x, weight, bias = (leaf.clone().requires_grad_() for leaf in leaves)
            experts = zip(weight.unbind(), bias.unbind(), strict=True)
            out = way(x, experts, reference.segment_ends(p.offsets, rows), 16)
            found.append([out, *torch.autograd.grad(out, [x, weight, bias], p.upstream, allow_unused=True)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_offsets_of_a_gpu_that_make_no_sense_are_cut_off() -> None:
    """There they are not looked at: segments stay within the rows and apart."""
    for given, ends in (([5, 3, 9], [5, 5, 9]), ([-2, 4, 50], [0, 4, 10]), ([50, 3, 4], [10, 10, 10])):
        assert reference.segment_ends(torch.tensor(given, dtype=torch.int32), 10).tolist() == ends


@pytest.mark.parametrize("op", ["grouped_gemm", "grouped_gemm_wgrad", "grouped_gemm_wgrad_add_", "grouped_row_sum"])
def test_bad_offsets_raise_on_the_cpu(op: str) -> None:
    p = problem([3, 9], 9)
    x, weight = (p.leaves[name].detach() for name in ("x", "weight"))
    bad = torch.tensor([3, 10])
    arguments = {
        "grouped_gemm": (x, weight, bad, None, torch.float32),
        "grouped_gemm_wgrad": (x, p.upstream, bad, torch.float32),
        "grouped_gemm_wgrad_add_": (x, p.upstream, bad, torch.zeros_like(weight)),
        "grouped_row_sum": (p.upstream, bad),
    }
    with pytest.raises(ValueError, match=rf"{op}: offsets\[1\] must be >= 3, where the segment begins, and <= R = 9"):
        getattr(ops, op)(*arguments[op], "native")


# --- what must stay where it is --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_with_its_expert(backend: str) -> None:
    """0 * NaN is NaN: rows of one expert, and weights of one without rows, enter no other result."""
    p = problem([4, 4, 9, 12], 12, bias=True)
    with torch.no_grad():
        p.leaves["x"][5] = NAN
        p.leaves["weight"][1], p.leaves["bias"][1] = NAN, NAN
    with grpo_kernels.backend(backend):
        out, gradients = run(p)
    assert out.isnan().any(1).nonzero()[:, 0].tolist() == [5]
    assert gradients["x"].isfinite().all()
    assert gradients["bias"].isfinite().all()
    assert gradients["weight"].isnan().flatten(1).any(1).tolist() == [False, False, True, False]


def test_compilation_knows_no_rows_and_no_offsets() -> None:
    """New numbers of rows and new segments are the same graph."""
    torch._dynamo.reset()
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(lambda x, w, o: grouped_gemm(x, w, o), fullgraph=True, backend=count)
    for rows in range(8, 18):
        p = problem([rows // 3, rows - 4, rows - rows % 2], rows)
        out = compiled(p.leaves["x"], p.leaves["weight"], p.offsets)
        assert torch.equal(out, run(p)[0])
    assert graphs <= 2


def test_the_cpu_multiplies_narrow_only_where_sums_stay_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways are exact to the last rounding; which one a machine takes is its own affair."""
    for dtype in (torch.bfloat16, torch.float16):
        for narrow in (True, False):
            monkeypatch.setattr(_native, "_as_it_is", lambda *_, narrow=narrow: narrow)
            p = problem([0, 2, 150], 150, 700, 40, dtype)
            check(p, *run(p))


def test_what_is_widened_follows_from_the_sizes_of_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where instructions for bfloat16 are no faster than float32's: what multiplies an element often, whichever of its
    sizes are the large ones."""
    for where, small, large in (("always", True, True), ("small", True, False), ("never", False, False)):
        monkeypatch.setattr(_native, "_narrow", lambda _, where=where: where)
        for n, k, m in itertools.permutations((64, 360, 720)):
            assert _native._as_it_is(torch.bfloat16, n, k, m) == small
        for n, k, m in itertools.permutations((256, 1024, 2048)):
            assert _native._as_it_is(torch.bfloat16, n, k, m) == large
        assert _native._as_it_is(torch.float32, 256, 1024, 2048)


# --- rules of the GPU kernels ----------------------------------------------------------------------------------------


def test_launch_config_follows_from_what_the_host_knows() -> None:
    assert list(inspect.signature(launch_config).parameters) == [
        "rows", "experts", "width", "element_size", "architecture", "loads",
    ]  # fmt: skip
    assert launch_config(128 * 1024, 128, 4096, 2, 90, "tma")[:3] == (128, 256, 64)
    assert launch_config(128 * FEW_ROWS, 128, 4096, 2, 90, "tma")[:3] == (64, 128, 64)
    for rows in (1, 100, 10**6):  # neither the rows nor their number change the order of a sum
        for loads, size in (("tma", 2), ("vector", 2), ("scalar", 4)):
            assert (
                launch_config(rows, 8, 4096, size, 90, loads).block_k
                == launch_config(9, 1, 64, size, 90, loads).block_k
            )
            assert wgrad_config(rows, 8, size, 90, loads).block_k == wgrad_config(9, 1, size, 90, loads).block_k
    for architecture in (80, 86, 89, 120):  # 99 KiB of shared memory are enough for the operands of all stages
        for rows, size in ((8, 2), (10**5, 2), (10**5, 4)):
            for loads in ("tma", "vector", "scalar") if architecture >= 90 else ("vector", "scalar"):
                forward = launch_config(rows, 8, 4096, size, architecture, loads)
                for c in (forward, wgrad_config(rows, 8, size, architecture, loads)):
                    assert (c.block_m + c.block_n) * c.block_k * size * c.num_stages < 99 * 1024
    assert 1 <= launch_config(10, 1, 10**8, 2, 90, "tma").group <= 1024
    assert [segments(experts) for experts in (1, 15, 16, 128, 255, 256, 1024)] == [16, 16, 32, 256, 256, 512, 2048]


def test_when_the_library_multiplies() -> None:
    many = {"rows": 8 * (FEW_ROWS + 1), "experts": 8, "aligned": True}
    bf16 = torch.bfloat16
    assert library_suits(90, bf16, bf16, **many)
    assert not library_suits(90, bf16, torch.float32, **many)
    assert not library_suits(90, torch.float16, torch.float16, **many)
    assert not library_suits(90, bf16, bf16, **{**many, "aligned": False})
    assert not library_suits(90, bf16, bf16, **{**many, "rows": 8 * FEW_ROWS})
    assert not library_suits(90, bf16, bf16, **{**many, "rows": 1 << 20, "experts": 1024})  # more groups than it takes
    for architecture in (80, 89, 100, 103, 120):
        assert not library_suits(architecture, bf16, bf16, **many)

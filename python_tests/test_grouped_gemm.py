"""grouped_gemm: the definition, the CPU products against float64, segments of every kind, what may hold anything."""

from __future__ import annotations

import inspect
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "columns"), [(24, 16), (16, 16)], ids=["oblong", "square"])
def test_a_transposed_view_is_another_layout_of_the_same_weight(width: int, columns: int, dtype: torch.dtype) -> None:
    """Also where both sizes are equal and only the strides tell (2I = H). Its gradient has its layout."""
    p = problem(*SEGMENTS["tail"], width, columns, dtype, turned=True, bias=True)
    out, gradients = run(p)
    check(p, out, gradients)
    assert gradients["weight"].transpose(1, 2).is_contiguous()
    dense = p._replace(leaves={name: leaf.detach().contiguous().requires_grad_() for name, leaf in p.leaves.items()})
    torch.testing.assert_close(out, run(dense)[0])
    assert run(dense)[1]["weight"].is_contiguous()


def test_the_gradient_of_a_parameter_behind_a_view_is_not_copied() -> None:
    p = problem(*SEGMENTS["ragged"], turned=True)
    parameter = p.leaves["weight"].detach().transpose(1, 2).requires_grad_()
    grouped_gemm(p.leaves["x"], parameter.transpose(1, 2), p.offsets).backward(p.upstream)
    assert parameter.grad is not None
    assert parameter.grad.is_contiguous()
    assert_as_accurate(parameter.grad.mT, eager(p, torch.float64)[1]["weight"], eager(p, torch.float32)[1]["weight"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_larger_tensors(backend: str) -> None:
    p = problem(*SEGMENTS["tail"], bias=True)
    wide, tall = torch.full((47, 60), NAN), torch.full((3, 20, 50), NAN)
    for base, view, leaf in (
        (wide, wide[:, 5:29], "x"),
        (tall, tall[:, 3:19, 1:49:2], "weight"),  # no axis is dense
    ):
        view.copy_(p.leaves[leaf].detach())
        p.leaves[leaf] = view.requires_grad_()
        assert base.isnan().any()
    with grpo_kernels.backend(backend):
        check(p, *run(p))


def test_one_weight_for_all_experts() -> None:
    p = problem(*SEGMENTS["ragged"])
    shared = p.leaves["weight"][:1].detach().expand(4, -1, -1)
    p.leaves["weight"] = shared.requires_grad_()
    check(p, *run(p))


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_dtype(dtype: torch.dtype, out_dtype: torch.dtype, backend: str) -> None:
    """The sum is rounded once, to that."""
    for bias in (False, True):
        p = problem(*SEGMENTS["tail"], dtype=dtype, bias=bias)
        p = p._replace(upstream=p.upstream.to(torch.bfloat16).to(torch.float16).nan_to_num(NAN))
        with grpo_kernels.backend(backend):
            out, gradients = run(p, out_dtype=out_dtype)
        assert out.dtype == out_dtype
        if dtype != torch.float16 or out_dtype != torch.bfloat16:
            check(p, out, gradients)


def test_mixed_dtypes_multiply_as_the_wider() -> None:
    p = problem(*SEGMENTS["tail"], bias=True)
    p.leaves["x"] = p.leaves["x"].detach().bfloat16().requires_grad_()
    out, gradients = run(p)
    assert out.dtype == torch.float32
    check(p, out, gradients)


def test_autocast_multiplies_narrow_and_keeps_the_parameters() -> None:
    p = problem(*SEGMENTS["tail"], bias=True)
    saved: list[Tensor] = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        out, gradients = run(p)
    assert out.dtype == torch.bfloat16
    narrow = p._replace(
        leaves={name: leaf.detach().bfloat16().float().requires_grad_() for name, leaf in p.leaves.items()},
        upstream=p.upstream.bfloat16(),
    )
    check(narrow, out, gradients)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in (*p.leaves.values(), p.offsets)}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_grad_accumulator(dtype: torch.dtype, turned: bool) -> None:
    """Two micro-batches add to one buffer; whoever saved it sees that it changed."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = (problem(*SEGMENTS["empty_experts"], dtype=dtype, turned=turned) for _ in range(2))
    b.leaves["weight"] = a.leaves["weight"]
    start = torch.randn(6, 16, 24, dtype=exact)
    buffer = start.mT.contiguous().mT if turned else start.clone()
    version = 0
    for p in (a, b):
        _, gradients = run(p, weight_grad_accumulator=buffer)
        assert gradients["weight"] is None
        assert buffer._version > version
        version = buffer._version
    expected = start.double() + sum(eager(p, torch.float64)[1]["weight"] for p in (a, b))
    plain = start.float() + sum(eager(p, torch.float32)[1]["weight"] for p in (a, b))
    assert_as_accurate(buffer, expected, plain)
    assert torch.equal(buffer[[0, 2, 3, 5]], start[[0, 2, 3, 5]])


def test_the_reference_has_no_accumulator() -> None:
    p = problem(*SEGMENTS["tail"])
    with grpo_kernels.backend("reference"), pytest.raises(grpo_kernels.BackendUnavailable, match="needs kernels"):
        run(p, weight_grad_accumulator=torch.zeros(3, 16, 24))


class _Calls(TorchDispatchMode):
    """Names of our ops, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.namespace == "grpo_kernels":
            self.names.append(function._schema.name.partition("::")[2])
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    ("trained", "calls"),
    [
        (("x", "weight", "bias"), ["grouped_gemm", "grouped_row_sum", "grouped_gemm", "grouped_gemm_wgrad"]),
        (("x",), ["grouped_gemm", "grouped_gemm"]),
        (("weight",), ["grouped_gemm", "grouped_gemm_wgrad"]),
        (("bias",), ["grouped_gemm", "grouped_row_sum"]),
    ],
)
def test_only_gradients_that_are_needed_are_computed(trained: tuple[str, ...], calls: list[str]) -> None:
    p = problem(*SEGMENTS["tail"], bias=True)
    everything = run(p)[1]
    for name, leaf in p.leaves.items():
        leaf.requires_grad_(name in trained)
    with _Calls() as made:
        _, gradients = run(p)
    assert made.names == calls
    for name in trained:
        assert torch.equal(gradients[name], everything[name])


def test_nothing_is_kept_where_nothing_is_trained() -> None:
    p = problem(*SEGMENTS["tail"])
    for leaf in p.leaves.values():
        leaf.requires_grad_(False)
    assert grouped_gemm(p.leaves["x"], p.leaves["weight"], p.offsets).grad_fn is None


def test_a_second_backward_gives_the_same() -> None:
    p = problem(*SEGMENTS["tail"], bias=True)
    out = grouped_gemm(p.leaves["x"], p.leaves["weight"], p.offsets, bias=p.leaves["bias"])
    leaves = list(p.leaves.values())
    first = torch.autograd.grad(out, leaves, p.upstream, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, leaves, p.upstream), strict=True):
        assert torch.equal(a, b)


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

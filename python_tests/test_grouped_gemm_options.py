"""grouped_gemm: layouts of the weights, dtypes, autocast, accumulators, gradients that are needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_kernels
from grpo_kernels import grouped_gemm
from grpo_kernels.testing import assert_as_accurate
from python_tests.test_grouped_gemm import BACKENDS, DTYPES, SEGMENTS, check, eager, problem, run

NAN = float("nan")


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

"""For every op that FP8 experts are made of: are its results right, given its arguments?

What moves, counts or quantises gives the definition's bits. Sums have bounds by the sizes of what they add: n roundings
of 2^-23 for n terms in float32, whose adders in tensor cores may truncate; the accumulator's for products of FP8.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.fp8_quantize import ScaledTensor
from grpo_kernels.fp8_quantize import reference as fp8
from grpo_kernels.grouped_gemm.reference import segment_ends
from grpo_kernels.moe_experts.ops import QuantizedGradients
from grpo_kernels.moe_experts.reference import Activation
from grpo_kernels.moe_permute import quantize_reference
from grpo_kernels.moe_permute import reference as moves
from python_tests.fp8_products import Problem, WgradProblem, exact, exact_wgrad
from python_tests.gpu.fuzz.compare import quantized, same_bits, within
from python_tests.gpu.fuzz.glu import UNIT, Bounded, glu, joined, masked

ACCUMULATOR = 2.0**-11
"""Of 14 bits that sums of 128 products have in the tensor core of sm_90, relative to all that is summed."""
SUM = 2 * UNIT
"""Of one addition in float32 that may truncate."""

TF32X3 = 3 * 2.0**-20
"""Of a product of float32 numbers, each cut into two of 11 bits: what is left of both, and the product of the rests."""

Check = Callable[[Sequence[Any], Sequence[Tensor]], None]


def _as(name: str, definition: Callable[..., Any]) -> Check:
    """Bit for bit what a definition in PyTorch gives."""

    def check(arguments: Sequence[Any], found: Sequence[Tensor]) -> None:
        expected = definition(*arguments)
        expected = [expected] if isinstance(expected, Tensor) else expected
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            same_bits(f"{name}[{index}]", a, b)

    return check


# --- products --------------------------------------------------------------------------------------------------------


def _sizes(scaled: ScaledTensor) -> ScaledTensor:
    return scaled._replace(data=scaled.data.float().abs().to(scaled.data.dtype))


def _largest(sizes: Tensor) -> Tensor:
    """Of a row: its sums share the row's operand, and an accumulator that is aligned to the largest of them."""
    return sizes.nan_to_num(0.0).amax(-1, keepdim=True) if sizes.numel() else sizes


def _fp8_product(arguments: Sequence[Any], found: Sequence[Tensor]) -> None:
    *parts, offsets, bias, _ = arguments
    x, weight = ScaledTensor(*parts[:2]), ScaledTensor(*parts[2:])
    ends = segment_ends(offsets, len(x.data))
    value = exact(Problem(x, weight, ends))
    bound = ACCUMULATOR * _largest(exact(Problem(_sizes(x), _sizes(weight), ends)))
    if bias is not None:
        value[: ends[-1]] += _of_rows(bias, ends)
        bound = bound + UNIT * value.abs()
    same_bits("rows of no expert", found[0][ends[-1] :], torch.zeros_like(found[0][ends[-1] :]))
    within("product", found[0], Bounded(value, bound.expand_as(value)))


def _of_rows(per_expert: Tensor, ends: Tensor) -> Tensor:
    """For each row that has an expert, what its expert has, in float64."""
    return per_expert.double().repeat_interleave(ends.diff(prepend=ends.new_zeros(1)), 0)


def _wgrad_bounds(arguments: Sequence[Any]) -> Bounded:
    *parts, offsets = arguments
    x, grad = ScaledTensor(*parts[:2]), ScaledTensor(*parts[2:])
    p = WgradProblem(x, grad, segment_ends(offsets, x.data.shape[1]))
    bound = ACCUMULATOR * _largest(exact_wgrad(WgradProblem(_sizes(x), _sizes(grad), p.offsets)))
    value = exact_wgrad(p)
    return Bounded(value, bound.expand_as(value))


def _fp8_wgrad(arguments: Sequence[Any], found: Sequence[Tensor]) -> None:
    within("weight's gradient", found[0], _wgrad_bounds(arguments[:5]))


def _plus(before: Tensor, added: Bounded) -> Bounded:
    value = before.double() + added.value
    return Bounded(value, added.bound + UNIT * value.abs())


def _fp8_wgrad_add(arguments: Sequence[Any], found: Sequence[Tensor]) -> None:
    within("accumulator", found[0], _plus(arguments[5], _wgrad_bounds(arguments[:5])))


def _segments(offsets: Tensor, rows: int) -> list[slice]:
    return [slice(*pair) for pair in itertools.pairwise([0, *segment_ends(offsets, rows).tolist()])]


def _summed(terms: int, value: Tensor, sizes: Tensor, operand: torch.dtype | None = None) -> Bounded:
    products = TF32X3 if operand == torch.float32 else 0.0
    return Bounded(value, ((terms + 2) * SUM + products) * sizes)


def _product(arguments: Sequence[Any], found: Sequence[Tensor]) -> None:
    x, weight, offsets, bias, _ = arguments
    value, sizes = (torch.zeros(len(x), weight.shape[1], dtype=torch.float64) for _ in range(2))
    for expert, rows in enumerate(_segments(offsets, len(x))):
        a, b = x[rows].double(), weight[expert].double().t()
        value[rows], sizes[rows] = a @ b, a.abs() @ b.abs()
        if bias is not None:
            value[rows] += bias[expert]
            sizes[rows] += bias[expert].abs()
    within("product", found[0], _summed(x.shape[1], value, sizes, x.dtype))


def _wgrad(arguments: Sequence[Any], found: Sequence[Tensor]) -> None:
    x, grad, offsets, target = arguments
    rows = _segments(offsets, len(x))
    value = torch.stack([grad[r].double().t() @ x[r].double() for r in rows])
    sizes = torch.stack([grad[r].double().abs().t() @ x[r].double().abs() for r in rows])
    expected = _summed(max(r.stop - r.start for r in rows), value, sizes, x.dtype)
    within("weight's gradient", found[0], _plus(target, expected) if isinstance(target, Tensor) else expected)


def _row_sum(arguments: Sequence[Any], found: Sequence[Tensor]) -> None:
    rows = _segments(arguments[1], len(arguments[0]))
    grad = [arguments[0][r].double() for r in rows]
    value, sizes = torch.stack([g.sum(0) for g in grad]), torch.stack([g.abs().sum(0) for g in grad])
    within("sum of rows", found[0], _summed(max(map(len, grad)), value, sizes))


def _unpermute(arguments: Sequence[Any], found: Sequence[Tensor]) -> None:
    y, places, weights = arguments
    here = (places >= 0)[..., None]
    terms = (
        torch.where(here, y[places.clamp(min=0)].double(), 0.0) if len(y) else y.new_zeros(*places.shape, y.shape[1])
    )
    terms = terms if weights is None else torch.where(here, terms * weights.double()[..., None], 0.0)
    within("sum of slots", found[0], _summed(places.shape[1], terms.sum(1), terms.abs().sum(1)))


# --- activation ------------------------------------------------------------------------------------------------------


def _glu_quantize(arguments: Sequence[Any], found: Sequence[Tensor]) -> None:
    preact, inv_map, *activation, keep, eps = arguments
    live = (inv_map >= 0)[:, None]
    expected = masked(glu(preact, Activation(*activation)).activated, live)
    quantized("activation", *found[:2], expected, eps)
    kept = fp8.fp8_quantize(torch.where(live, preact, 0.0).float(), False, True, keep, False, eps)
    for name, a, b in zip(("kept data", "kept scale"), found[2:], kept, strict=False):
        same_bits(name, a, b)


def _turned(expected: Bounded) -> Bounded:
    return Bounded(*(part.t() for part in expected))


def _glu_backward_quantize(arguments: Sequence[Any], found: Sequence[Tensor]) -> None:
    data, scale, upstream, inv_map, weights, terms, *rest = arguments
    activation, needs, (eps, grad_eps, _) = Activation(*rest[:4]), rest[4:10], rest[10:]
    out = QuantizedGradients(*found)
    live = (inv_map >= 0) & (inv_map < weights.numel())
    slot = torch.where(live, inv_map, 0).long()
    weight = weights.reshape(-1)[slot, None].double() if weights.numel() else weights.new_zeros(len(slot), 1).double()
    preact = torch.where(live[:, None], fp8.fp8_dequantize(data, scale, torch.float32), 0.0)
    here = glu(preact, activation)
    scaled = masked(here.activated * weight, live[:, None])
    absent = [name for name, wanted in zip(_WANTED, needs, strict=True) if not wanted]
    assert not any(getattr(out, name).numel() for name in absent), "an output that nobody asked for"
    if needs[3]:
        quantized("transposed activation", out.activated_data_t, out.activated_scale_t, _turned(scaled), eps)
    if needs[4]:
        within("activation", out.activated_wide, scaled)
    if upstream is None:
        return
    given = torch.where(live[:, None], upstream.double(), 0.0)
    upwards = given * weight
    halves = (
        masked(here.of_gate * upwards, here.gate_passes & live[:, None]),
        masked(here.of_up * upwards, here.up_passes & live[:, None]),
    )
    grad = joined(*halves, activation.interleaved)
    grad = Bounded(grad.value, grad.bound + 2 * UNIT * grad.value.abs())  # times two numbers in turn
    if needs[0]:
        quantized("gradient", out.data, out.scale, grad, grad_eps)
    if needs[1]:
        quantized("transposed gradient", out.data_t, out.scale_t, _turned(grad), grad_eps)
    if needs[2]:
        within("gradient", out.wide, grad)
    if needs[5]:
        _grad_weights(
            out.weights, Bounded(given * here.activated.value, given.abs() * here.activated.bound), terms, slot, live
        )


_WANTED = ("data", "data_t", "wide", "activated_data_t", "activated_wide", "weights")


def _grad_weights(found: Tensor, products: Bounded, terms: Tensor | None, slot: Tensor, live: Tensor) -> None:
    """Gradients of the router's weights; 0 where a slot has no row."""
    value, bound = products
    added = value.new_zeros(len(value)) if terms is None else torch.where(live, terms.double(), 0.0)
    sizes = value.abs().sum(1) + added.abs()
    of_rows = Bounded(value.sum(1) + added, bound.sum(1) + (value.shape[1] + 2) * SUM * sizes)
    expected = [
        torch.zeros(found.numel(), dtype=torch.float64).index_put((slot[live],), part[live]) for part in of_rows
    ]
    within("gradient of the weights", found.flatten(), Bounded(*expected))


CHECKS: dict[str, Check] = {
    "build_permutation": _as("build_permutation", moves.build_permutation),
    "moe_permute": _as("moe_permute", moves.moe_permute),
    "moe_permute_quantize": _as("moe_permute_quantize", quantize_reference.moe_permute_quantize),
    "fp8_quantize": _as("fp8_quantize", fp8.fp8_quantize),
    "fp8_dequantize": _as("fp8_dequantize", fp8.fp8_dequantize),
    "moe_unpermute": _unpermute,
    "fp8_grouped_gemm": _fp8_product,
    "fp8_grouped_gemm_wgrad": _fp8_wgrad,
    "fp8_grouped_gemm_wgrad_add_": _fp8_wgrad_add,
    "grouped_gemm": _product,
    "grouped_gemm_wgrad": _wgrad,
    "grouped_gemm_wgrad_add_": _wgrad,
    "grouped_row_sum": _row_sum,
    "moe_glu_quantize": _glu_quantize,
    "moe_glu_backward_quantize": _glu_backward_quantize,
}
"""By the name of the registered op: its arguments without the backend, and what it returned or wrote."""

"""The activation that quantises: its numbers beside float64's, and what tiles with anything in them become."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from grpo_kernels.moe_experts import glu_reference
from grpo_kernels.moe_experts.reference import Activation, glu
from grpo_kernels.testing import accuracy_budget, accuracy_error, assert_as_accurate
from python_tests.glu_problems import (
    ACTIVATIONS,
    EPS,
    EVERYTHING,
    GPT_OSS,
    GRAD_EPS,
    INF,
    NAN,
    SWIGLU,
    Problem,
    assert_same,
    backward,
    bits,
    composed_backward,
    composed_forward,
    dequantised,
    forward,
    problem,
    tiles,
    turned_tiles,
)

pytestmark = pytest.mark.usefixtures("native_cpu")

# --- float64 ----------------------------------------------------------------------------------------------------------


def check_tiles(scaled: tuple[Tensor, Tensor], expected: Tensor, eager: Tensor, eps: float) -> None:
    """Each number is within half a step of e4m3 from float64's, and the budget of float32; scales are the smallest."""
    data, scale = scaled
    wide = scale.double().repeat_interleave(128, 1)[:, : data.shape[1]]
    assert torch.equal(scale.log2(), scale.log2().round())
    slack = accuracy_budget(torch.float32, accuracy_error(eager, expected)) * expected.abs().max()
    largest = torch.nn.functional.pad(expected.abs(), (0, -data.shape[1] % 128)).unflatten(1, (-1, 128)).amax(2)
    assert (largest - slack <= 448.0 * scale).all()
    assert ((largest + slack).clamp(min=eps) > 224.0 * scale).all()
    inside = (expected.abs() / wide).clamp(max=448.0)
    step = torch.exp2(inside.clamp(min=2.0**-6).log2().floor() - 3)
    error = (data.double() * wide - expected).abs()
    assert (error <= step / 2 * wide + 1.01 * slack).all()


class Exact(NamedTuple):
    activation: Tensor
    grad: Tensor
    activated: Tensor
    weights: Tensor


def definition(preact: Tensor, p: Problem, activation: Any, dtype: torch.dtype) -> Exact:
    """Plain PyTorch and its autograd, in `dtype`."""
    live, slot = (p.inv_map >= 0)[:, None], p.inv_map.long().clamp(min=0)
    preact, grad = (torch.where(live, tensor.to(dtype), 0.0) for tensor in (preact, p.grad))
    preact.requires_grad_()
    weight = p.weights.view(-1)[slot].to(dtype).requires_grad_()
    value = glu(preact, Activation(*activation))
    activated = value * torch.where(live, weight[:, None], 0.0)
    of_preact, of_weight = torch.autograd.grad(activated, (preact, weight), grad)
    rows = p.inv_map >= 0
    weights = torch.zeros(p.weights.numel(), dtype=dtype)
    weights[slot[rows]] = (of_weight + p.row_terms.to(dtype))[rows]
    return Exact(value.detach(), of_preact, activated.detach(), weights.view_as(p.weights))


@ACTIVATIONS
@pytest.mark.parametrize("shape", [(130, 7), (129, 130), (40, 300)], ids=str)
def test_values_against_float64(shape: tuple[int, int], activation: Any) -> None:
    p = problem(*shape)
    found = backward(p, activation)
    kept = dequantised(*p.kept)
    exact, eager = (definition(kept, p, activation, dtype) for dtype in (torch.float64, torch.float32))
    assert_as_accurate(found.wide, exact.grad, eager.grad)
    assert_as_accurate(found.activated_wide, exact.activated, eager.activated)
    assert_as_accurate(found.weights, exact.weights, eager.weights)
    check_tiles((found.data, found.scale), exact.grad, eager.grad, GRAD_EPS)
    check_tiles((found.data_t, found.scale_t), exact.grad.t(), eager.grad.t(), GRAD_EPS)
    check_tiles((found.activated_data_t, found.activated_scale_t), exact.activated.t(), eager.activated.t(), EPS)
    exact, eager = (definition(p.preact, p, activation, dtype) for dtype in (torch.float64, torch.float32))
    check_tiles(forward(p, activation)[:2], exact.activation, eager.activation, EPS)


@ACTIVATIONS
def test_the_definition_in_words_of_pytorch(activation: Any) -> None:
    """Its float32 values are as good; its tiles are those of its values."""
    p = problem(130, 70, torch.bfloat16)
    kept = dequantised(*p.kept)
    exact, eager = (definition(kept, p, activation, dtype) for dtype in (torch.float64, torch.float32))
    arguments = (*p.kept, *p[1:], *activation, *EVERYTHING, EPS, GRAD_EPS, torch.float32)
    found = glu_reference.moe_glu_backward_quantize(*arguments)
    assert_as_accurate(found.wide, exact.grad, eager.grad)
    assert_as_accurate(found.activated_wide, exact.activated, eager.activated)
    assert_as_accurate(found.weights, exact.weights, eager.weights)
    tiled = (*tiles(found.wide, GRAD_EPS), *turned_tiles(found.wide, GRAD_EPS))
    assert_same(found[:4], tiled)
    assert_same(found[5:7], turned_tiles(found.activated_wide, EPS))
    quantised = glu_reference.moe_glu_quantize(p.preact, p.inv_map, *activation, True, EPS)
    assert_same(quantised[2:], forward(p, activation)[2:])
    plain = definition(p.preact, p, activation, torch.float64).activation
    check_tiles(quantised[:2], plain, definition(p.preact, p, activation, torch.float32).activation, EPS)


# --- rows with anything in them ---------------------------------------------------------------------------------------


def one_row(gate: float, up: float, grad: float, width: int = 2) -> Problem:
    preact = torch.tensor([[gate] * width + [up] * width])
    zero = torch.zeros(1)
    return Problem(preact, torch.full((1, width), grad), torch.zeros(1, dtype=torch.int32), torch.ones(1, 1), zero)


def test_padding_is_zeros_with_the_scale_of_eps() -> None:
    p = problem(130, 70)._replace(inv_map=torch.full((130,), -1, dtype=torch.int32))
    p = p._replace(preact=torch.full_like(p.preact, NAN), grad=torch.full_like(p.grad, NAN))
    found = backward(p, SWIGLU)
    for data in (found.data, found.data_t, found.activated_data_t, *forward(p, SWIGLU)[::2]):
        assert bits(data).eq(0).all()
    assert found.scale.unique().tolist() == found.scale_t.unique().tolist() == [2.0**-108]  # 448 * 2^-108 >= 1e-30
    for scale in (found.activated_scale_t, *forward(p, SWIGLU)[1::2]):
        assert scale.unique().tolist() == [2.0**-48]
    for values in (found.wide, found.activated_wide, found.weights):
        assert values.eq(0).all()


def test_a_tile_below_eps_gets_its_scale() -> None:
    p = one_row(1.0, 1e-3, 1e-3)
    assert forward(p, SWIGLU, eps=1.0)[1].item() == 2.0**-8
    assert backward(one_row(1.0, 1.0, 0.0), SWIGLU).scale.item() == 2.0**-108


@pytest.mark.parametrize("size", [1e-25, 1e-10, 1e10, 1e25])
def test_huge_and_tiny_gradients_keep_their_precision(size: float) -> None:
    p = problem(130, 130, padding=False)
    p = p._replace(grad=p.grad.sign() * size, weights=torch.ones_like(p.weights))
    found = backward(p, SWIGLU)
    for scaled, values in (((found.data, found.scale), found.wide), ((found.data_t, found.scale_t), found.wide.t())):
        assert values.abs().max() > size
        largest = torch.nn.functional.pad(values.abs(), (0, -values.shape[1] % 128)).unflatten(1, (-1, 128)).amax(2)
        assert (scaled[1] <= 2 * largest / 448).all()
        assert ((dequantised(*scaled) - values).abs() <= values.abs() / 16 + largest.max() * 2.0**-16).all()


def test_what_overflows_is_a_tile_of_nan() -> None:
    p = one_row(3e38, 3e38, 1.0)
    data, scale, _, kept_scale = forward(p, SWIGLU)
    assert scale.isnan().all()
    assert bits(data).eq(0x7F).all()
    assert kept_scale.isfinite().all()
    found = backward(p, SWIGLU)
    assert found.activated_wide.isposinf().all()
    assert found.activated_scale_t.isnan().all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_number_spoils_its_tiles_and_no_others(bad: float, interleaved: bool) -> None:
    """A tile of [R, 2I] may hold gates and ups: here the second of three holds both."""
    activation = (False, 1.0, 1.0, interleaved)
    p = problem(140, 192, padding=False)
    good, clean = backward(p, activation), forward(p, activation)
    preact = p.preact.clone()
    preact[130, 2 * 150 if interleaved else 150] = bad
    found = forward(p._replace(preact=preact), activation)
    assert found[1].isnan().nonzero().tolist() == [[130, 1]]
    assert found[3].isnan().nonzero().tolist() == [[130, 2 if interleaved else 1]]
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(bits(a[:130]), bits(b[:130]))
    spoiled = backward(p._replace(preact=preact), activation)
    # In halves: lost ups 0 to 63 spoil the gradients of their gates; lost gates 128 to 191 those of their ups as well.
    columns = [*range(256, 384)] if interleaved else [*range(64), *range(128, 192), *range(320, 384)]
    assert spoiled.wide.isnan().nonzero().tolist() == [[130, column] for column in columns]
    assert spoiled.scale.isnan().nonzero().tolist() == [[130, i] for i in ([2] if interleaved else [0, 1, 2])]
    assert spoiled.scale_t.isnan().nonzero().tolist() == [[column, 1] for column in columns]
    assert bits(spoiled.data_t)[columns, 128:].eq(0x7F).all()
    assert torch.equal(bits(spoiled.data_t[:, :128]), bits(good.data_t[:, :128]))
    assert torch.equal(bits(spoiled.data[:130]), bits(good.data[:130]))


def test_every_size_of_numbers_composes() -> None:
    p = problem(150, 96)
    p = p._replace(preact=p.preact * torch.exp2(torch.randint(-60, 120, (150, 1)).float()))
    p = p._replace(grad=p.grad * torch.exp2(torch.randint(-120, 100, (150, 1)).float()))
    for activation in (SWIGLU, GPT_OSS):
        assert_same(forward(p, activation), composed_forward(p, activation))
        assert_same(backward(p, activation), composed_backward(p, activation, torch.float32))

"""DeepSeek-V3's FP8 recipe for the experts in eager PyTorch, forward and backward: what the cases of
`recipe="fp8_block128"` are compared with. In float64 it is exact but for the roundings that the recipe asks for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .bench_fp8_quantize import eager_rows, eager_square
from .case import Inputs
from .moe_definitions import Model, Values, activation, counts_of, maps, route, router_logits

_BIASES = ("gate_up_bias", "down_bias")
_TENSORS = ("gate_up", "down", *_BIASES)


def rows_in_fp8(x: Tensor) -> Tensor:
    """What tiles of 1 x 128 make of [M, K], in its dtype."""
    codes, scale = eager_rows(x)
    return codes.to(x.dtype) * scale.to(x.dtype).repeat_interleave(128, -1)[:, : x.shape[1]]


def weight_in_fp8(weight: Tensor) -> Tensor:
    """What tiles of 128 x 128 make of [N, K], in its dtype."""
    codes, scale = eager_square(weight)
    wide = scale.to(weight.dtype).repeat_interleave(128, -1).repeat_interleave(128, -2)
    return codes.to(weight.dtype) * wide[: weight.shape[0], : weight.shape[1]]


class _Experts(torch.autograd.Function):
    """Sums in the dtype of the tokens; what products give is rounded to `dtype`, as is what wide gradients take."""

    @staticmethod
    def forward(ctx: Any, model: Model, dtype: torch.dtype, fp8_wgrad: bool, ids: Tensor, *tensors: Any) -> Tensor:
        x, weights, gate_up, down, gate_up_bias, down_bias = tensors
        row_id_map, inv_map, *_ = maps(ids, len(gate_up))
        sizes = counts_of(ids, len(gate_up)).tolist()
        tokens, token = rows_in_fp8(x), inv_map // model.top_k
        preact = _product(tokens[token], _turned(gate_up, model), gate_up_bias, sizes, dtype)
        activated = rows_in_fp8(activation(preact, model))
        results = _product(activated, _turned(down, model), down_bias, sizes, dtype)
        ctx.save_for_backward(tokens, rows_in_fp8(preact), weights, gate_up, down, down_bias, row_id_map, inv_map)
        ctx.model, ctx.dtype, ctx.fp8_wgrad, ctx.sizes = model, dtype, fp8_wgrad, sizes
        return (results[row_id_map] * weights.to(x.dtype)[..., None]).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, preact, weights, gate_up, down, down_bias, row_id_map, inv_map = ctx.saved_tensors
        model, dtype, sizes = ctx.model, ctx.dtype, ctx.sizes
        token, weight = inv_map // model.top_k, weights.to(grad.dtype).flatten()[inv_map][:, None]
        grad_activated = _product(rows_in_fp8(grad)[token], _turned(down, model).transpose(1, 2), None, sizes, dtype)
        with torch.enable_grad():
            preact = preact.detach().requires_grad_()
            activated = activation(preact, model)
            (grad_preact,) = torch.autograd.grad(activated, preact, grad_activated * weight)
        activated = activated.detach()
        terms = (grad_activated * activated).sum(1)
        if down_bias is not None:
            pairs = zip(grad[token].split(sizes), down_bias, strict=True)
            terms = terms + torch.cat([rows @ bias for rows, bias in pairs])
        grad_rows = _product(rows_in_fp8(grad_preact), _turned(gate_up, model).transpose(1, 2), None, sizes, dtype)
        wgrad = partial(_weight_gradient, sizes, dtype, ctx.fp8_wgrad, model)
        of_gate_up, of_down = wgrad(tokens[token], grad_preact), wgrad(activated * weight, grad[token])
        biases = (grad_preact.to(dtype), (grad[token] * weight).to(dtype))
        sums = [None if down_bias is None else _sums(rows.to(grad.dtype), sizes) for rows in biases]
        return (None, None, None, None, grad_rows[row_id_map].sum(1), terms[row_id_map], of_gate_up, of_down, *sums)


def _turned(weight: Tensor, model: Model) -> Tensor:
    """[E, N, K], as a product takes it."""
    return weight.transpose(1, 2) if model.clamped else weight


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int], dtype: torch.dtype) -> Tensor:
    """The experts in turn, rounded to `dtype`."""
    found = [part @ weight_in_fp8(weight[e]).t() for e, part in enumerate(rows.split(sizes))]
    if bias is not None:
        found = [part + own for part, own in zip(found, bias, strict=True)]
    return torch.cat(found).to(dtype).to(rows.dtype)


def _weight_gradient(
    sizes: list[int], dtype: torch.dtype, fp8: bool, model: Model, rows: Tensor, grad: Tensor
) -> Tensor:
    """Of operands in tiles of 128 rows of their expert, or rounded to `dtype`; as the parameter lies."""
    found = []
    for x, g in zip(rows.split(sizes), grad.split(sizes), strict=True):
        if fp8:
            x, g = (rows_in_fp8(value.t()).t() if len(value) else value for value in (x, g))
        else:
            x, g = (value.to(dtype).to(value.dtype) for value in (x, g))
        found.append(x.t() @ g if model.clamped else g.t() @ x)
    return torch.stack(found)


def _sums(rows: Tensor, sizes: list[int]) -> Tensor:
    return torch.stack([part.sum(0) for part in rows.split(sizes)])


def layer(model: Model, dtype: torch.dtype, fp8_wgrad: bool, inputs: Inputs) -> Values:
    """Router and experts; `dtype` is that of the products."""
    weights, ids = route(router_logits(inputs), model, inputs.get("correction"))
    tensors = [inputs.get(name) for name in _TENSORS]
    result: Tensor = _Experts.apply(model, dtype, fp8_wgrad, ids, inputs["x"], weights, *tensors)  # type: ignore[no-untyped-call]
    return (result,)

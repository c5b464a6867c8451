"""Definition of the activation that quantises, forward and backward, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels.fp8_quantize import reference as fp8
from grpo_kernels.moe_experts.ops import QuantizedGradients, QuantizedNeeds, empty_quantized_gradients
from grpo_kernels.moe_experts.reference import Activation, glu


def _tiles(values: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return fp8.fp8_quantize(values, False, True, True, False, eps)[:2]


def _live(inv_map: Tensor, slots: int | None = None) -> Tensor:
    """[R, 1] rows that belong to a slot."""
    live = inv_map >= 0 if slots is None else (inv_map >= 0) & (inv_map < slots)
    return live[:, None]


def moe_glu_quantize(
    preact: Tensor,
    inv_map: Tensor,
    clamped: bool,
    alpha: float,
    limit: float,
    interleaved: bool,
    keep_preact: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """data, scale of the activation, and of the pre-activations where they are kept, else [0]."""
    values = torch.where(_live(inv_map), preact, 0.0).to(torch.float32)
    activated = _tiles(glu(values, Activation(clamped, alpha, limit, interleaved)), eps)
    absent = fp8.fp8_quantize(values, False, True, False, False, eps)[:2]
    return (*activated, *(_tiles(values, eps) if keep_preact else absent))


def _gradients(preact: Tensor, grad: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """The activation, and the gradient of the pre-activations: the derivative of `glu`."""
    clamped, alpha, limit, interleaved = activation
    gate, up = (preact[:, ::2], preact[:, 1::2]) if interleaved else preact.chunk(2, dim=-1)
    bounded = gate.clamp(max=limit) if clamped else gate
    factor = up.clamp(-limit, limit) + 1.0 if clamped else up
    slope = alpha * bounded if clamped else bounded
    sigmoid = torch.sigmoid(slope)
    of_gate = grad * factor * (sigmoid * (1.0 + slope * torch.sigmoid(-slope)))
    of_up = grad * (bounded * sigmoid)
    if clamped:  # a clamp passes the gradient at its limit, and stops it beyond and for NaN
        of_gate = torch.where(gate <= limit, of_gate, 0.0)
        of_up = torch.where((up >= -limit) & (up <= limit), of_up, 0.0)
    both = torch.stack((of_gate, of_up), -1).flatten(1) if interleaved else torch.cat((of_gate, of_up), 1)
    return bounded * sigmoid * factor, both


def moe_glu_backward_quantize(
    preact_data: Tensor,
    preact_scale: Tensor,
    grad_activated: Tensor | None,
    inv_map: Tensor,
    topk_weights: Tensor,
    row_terms: Tensor | None,
    clamped: bool,
    alpha: float,
    limit: float,
    interleaved: bool,
    rows: bool,
    columns: bool,
    wide: bool,
    activated_columns: bool,
    activated_wide: bool,
    need_weights: bool,
    eps: float,
    grad_eps: float,
    dtype: torch.dtype,
) -> QuantizedGradients:
    """Every output is formed from the same float32 values."""
    needs = QuantizedNeeds(rows, columns, wide, activated_columns, activated_wide, need_weights)
    out = empty_quantized_gradients(preact_data, topk_weights, needs, dtype)
    slots = topk_weights.numel()
    live = _live(inv_map, slots)
    slot = inv_map.to(torch.int64).clamp(0, max(slots - 1, 0))
    weight = topk_weights.reshape(-1)[slot, None] if slots else topk_weights.new_zeros(len(inv_map), 1)
    weight = torch.where(live, weight, 0.0)
    preact = torch.where(live, fp8.fp8_dequantize(preact_data, preact_scale, torch.float32), 0.0)
    upstream = preact.new_zeros(len(preact), preact.shape[1] // 2)
    if grad_activated is not None:
        upstream = torch.where(live, grad_activated.to(torch.float32), 0.0)
    activated, grad = _gradients(preact, upstream, Activation(clamped, alpha, limit, interleaved))
    if need_weights:
        terms = (upstream * activated).sum(1) + (0.0 if row_terms is None else row_terms)
        places = torch.where(live[:, 0], slot, slots)  # those of padding: behind the last
        found = terms.new_zeros(slots + 1).index_put((places,), terms)
        out = out._replace(weights=found[:slots].view(topk_weights.shape))
    grad, activated = grad * weight, activated * weight
    if rows:
        out = out._replace(**dict(zip(("data", "scale"), _tiles(grad, grad_eps), strict=True)))
    if columns:
        out = out._replace(**dict(zip(("data_t", "scale_t"), _tiles(grad.t(), grad_eps), strict=True)))
    if activated_columns:
        turned = dict(zip(("activated_data_t", "activated_scale_t"), _tiles(activated.t(), eps), strict=True))
        out = out._replace(**turned)
    return out._replace(
        wide=grad.to(dtype) if wide else out.wide,
        activated_wide=activated.to(dtype) if activated_wide else out.activated_wide,
    )

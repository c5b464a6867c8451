"""The activation of experts that compute in FP8, between their products: what moe_glu_quantize and
moe_glu_backward_quantize do in one pass, against eager PyTorch.

Bytes are each operand once and each result once. Codes are compared as e4m3 numbers: rounding may tip one to its
neighbour, not further.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import _dispatch
from grpo_kernels.moe_experts import ops

from . import moe_definitions as definitions
from .bench_fp8_quantize import eager_rows
from .case import Case, Inputs, Provider, compiled
from .moe_definitions import DEEPSEEK, GPT_OSS_SMALL, QWEN, Model, Values
from .target import copy_bandwidth, speedup

_EPS, _GRAD_EPS = 1e-12, 1e-30
_TILE = 128
_GPU_ROWS, _CPU_ROWS = 32768, 2048


def _make(model: Model, rows: int, backward: bool, device: str, size: str) -> Inputs:
    """Every token has one slot, and every row is of one."""
    if size != "full":
        model, rows = definitions.tiny(model), _TILE
    preact = torch.randn(rows, 2 * model.width, device=device).bfloat16()
    slots = torch.randperm(rows, device=device)
    if not backward:
        return {"preact": preact, "inv_map": slots.int()}
    kept = grpo_kernels.fp8_quantize(preact)
    made = {"grad": torch.randn(rows, model.width, device=device).bfloat16(), "inv_map": slots.int()}
    made |= {"codes": kept.data.view(torch.uint8), "scale": kept.scale}
    return made | {"weights": torch.rand(rows, 1, device=device)}


def _options(model: Model) -> tuple[bool, float, float, bool]:
    """Clamped or not, alpha, limit, interleaved or not."""
    return model.clamped, definitions.ALPHA, definitions.LIMIT, model.clamped


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _forward(model: Model, inputs: Inputs) -> Values:
    preact = inputs["preact"]
    backend = _dispatch.resolve("moe_experts", preact)
    found: Values = ops.moe_glu_quantize(preact, inputs["inv_map"], *_options(model), True, _EPS, backend)
    return found


def _forward_eager(model: Model, inputs: Inputs) -> Values:
    preact = _wide(inputs["preact"])
    return (*eager_rows(definitions.activation(preact, model)), *eager_rows(preact))


def _backward(model: Model, fp8_wgrad: bool, inputs: Inputs) -> Values:
    backend = _dispatch.resolve("moe_experts", inputs["grad"])
    needs = ops.QuantizedNeeds(True, fp8_wgrad, not fp8_wgrad, fp8_wgrad, not fp8_wgrad, True)
    kept = inputs["codes"].view(torch.float8_e4m3fn), inputs["scale"]
    found = ops.moe_glu_backward_quantize(
        *kept, inputs["grad"], inputs["inv_map"], inputs["weights"], None, *_options(model), *needs, _EPS, _GRAD_EPS,
        torch.bfloat16, backend,
    )  # fmt: skip
    return tuple(value for value in found if value.numel())


def _gradient(grad: Tensor, preact: Tensor, model: Model) -> Tensor:
    """Of the pre-activations, given that of the activation: as `definitions.activation` is differentiated."""
    if not model.clamped:
        gate, up = preact.chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        return torch.cat((grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid), -1)
    gate, up = preact[:, ::2], preact[:, 1::2]
    bounded, limit = gate.clamp(max=definitions.LIMIT), definitions.LIMIT
    sigmoid = torch.sigmoid(definitions.ALPHA * bounded)
    slope = sigmoid * (1 + definitions.ALPHA * bounded * (1 - sigmoid))
    of_gate = torch.where(gate <= limit, grad * (up.clamp(-limit, limit) + 1) * slope, 0.0)
    of_up = torch.where(up.abs() <= limit, grad * bounded * sigmoid, 0.0)
    return torch.stack((of_gate, of_up), -1).flatten(1)


def _backward_eager(model: Model, fp8_wgrad: bool, inputs: Inputs) -> Values:
    grad, scale = _wide(inputs["grad"]), _wide(inputs["scale"])
    width, slots = 2 * grad.shape[1], inputs["inv_map"].long()
    codes = inputs["codes"].view(torch.float8_e4m3fn).to(grad.dtype)
    preact = codes * scale.repeat_interleave(_TILE, -1)[:, :width]
    activated = definitions.activation(preact, model)
    weight = _wide(inputs["weights"]).flatten()[slots, None]
    grad_preact, scaled = _gradient(grad * weight, preact, model), activated * weight
    weights = torch.zeros_like(weight).index_put((slots,), (grad * activated).sum(1, keepdim=True))
    rows = eager_rows(grad_preact)
    if fp8_wgrad:
        return (*rows, *eager_rows(grad_preact.t()), *eager_rows(scaled.t()), weights)
    return (*rows, grad_preact.bfloat16(), scaled.bfloat16(), weights)


def _sample(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Some rows of each tensor, and of their transposes; e4m3 numbers stay what they are."""
    found = []
    for output in outputs:
        step = max(1, len(output) // 256)
        found.append(output.detach()[::step].contiguous())
    return found


def _tiles_bytes(rows: int, width: int) -> int:
    """Codes and scales."""
    return rows * (width + 4 * -(-width // _TILE))


def _bytes(rows: int, width: int, backward: bool, fp8_wgrad: bool) -> int:
    preact, activated = _tiles_bytes(rows, 2 * width), _tiles_bytes(rows, width)
    if not backward:
        return 4 * rows * width + 4 * rows + activated + preact
    read = preact + 2 * rows * width + 8 * rows  # with a map and a weight
    turned = _tiles_bytes(2 * width, rows) + _tiles_bytes(width, rows)
    return read + preact + (turned if fp8_wgrad else 6 * rows * width) + 4 * rows


def _case(device: str, model: Model, *, backward: bool = False, fp8_wgrad: bool = False) -> Case:
    rows = _GPU_ROWS if device == "cuda" else _CPU_ROWS
    if backward:
        ours, eager = (partial(run, model, fp8_wgrad) for run in (_backward, _backward_eager))
    else:
        ours, eager = partial(_forward, model), partial(_forward_eager, model)
    op = "moe_glu_backward_quantize" if backward else "moe_glu_quantize"
    parts = (", FP8 wgrad" if fp8_wgrad else ", bfloat16 wgrad") if backward else ""
    target = speedup(2)
    if device == "cuda":
        target = copy_bandwidth(85)
    return Case(
        op="moe_experts",
        name=f"{op} {model.name} R={rows} I={model.width}{parts}",
        make=partial(_make, model, rows, backward),
        providers=(
            Provider("ours", ours, "ours"),
            Provider("eager", eager, "eager"),
            Provider("torch.compile", compiled(eager), "compile"),
        ),
        bytes_moved=_bytes(rows, model.width, backward, fp8_wgrad),
        targets=(target,),
        definition=lambda inputs: _sample(eager(inputs)),
        sample_outputs=_sample,
        quick=model is DEEPSEEK and not fp8_wgrad,
    )


def cases(device: str) -> list[Case]:
    """Three models; the transposes for FP8 gradients of the weights for one."""
    found = [
        _case(device, model, backward=backward)
        for backward in (False, True)
        for model in (DEEPSEEK, QWEN, GPT_OSS_SMALL)
    ]
    return [*found, _case(device, DEEPSEEK, backward=True, fp8_wgrad=True)]

"""Products of FP8 operands: their problems and how a configuration reaches the launcher."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch import Tensor

from bench.case import Inputs
from bench.tune.candidates import Choice
from bench.tune.experts import Experts
from grpo_kernels.fp8_quantize.layout import DATA_DTYPE, empty_scale, tiles
from grpo_kernels.grouped_gemm import ops
from grpo_kernels.grouped_gemm._fp8_config_triton import LaunchConfig, row_blocks

OPS = ("product", "wgrad")


def _codes(device: str, *shape: int) -> Tensor:
    return (torch.randn(shape, device=device, dtype=torch.bfloat16) * 100).clamp_(-448, 448).to(DATA_DTYPE)


def _scales(data: Tensor, *shape: int) -> Tensor:
    return torch.exp2(torch.randint(-8, 8, shape, device=data.device).float())


def _rows(device: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Quantised by tiles of 1 x 128."""
    data = _codes(device, height, width)
    scale = empty_scale(data, (), height, width, square=False)
    return data, scale.copy_(_scales(data, height, tiles(width)))


def make(op: str, size: str, problem: Experts, device: str) -> Inputs:
    """Random operands; as many rows for every expert."""
    experts, rows, width, columns = problem.shape
    offsets = (torch.arange(1, experts + 1, device=device) * problem.rows).int()
    if op == "product":
        x, scale = _rows(device, rows, width)
        weight = _codes(device, experts, columns, width)
        weight_scale = _scales(weight, experts, tiles(columns), tiles(width))
        return {"x": x, "scale": scale, "weight": weight, "weight_scale": weight_scale, "offsets": offsets}
    x, scale = _rows(device, width, rows)
    grad, grad_scale = _rows(device, columns, rows)
    made = {"x": x, "scale": scale, "grad": grad, "grad_scale": grad_scale, "offsets": offsets}
    if size == "narrow":
        made["accumulator"] = torch.zeros(experts, columns, width + 1, device=device)
    return made


def using(op: str, choice: Choice, width: int) -> contextlib.AbstractContextManager[object]:
    """Makes the launcher take this configuration, whatever the table says."""
    module = "_fp8_triton.launch_config" if op == "product" else "_fp8_wgrad_triton.wgrad_config"
    *head, mib = choice
    config = LaunchConfig(*head, row_blocks(mib, choice.block_m, width))
    return mock.patch(f"grpo_kernels.grouped_gemm.{module}", return_value=config)


def run(op: str, size: str, inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    """The op. An accumulator is not returned."""
    *operands, offsets = (value for name, value in inputs.items() if name != "accumulator")
    if op == "product":
        return (ops.fp8_grouped_gemm(*operands, offsets, None, torch.bfloat16, backend),)
    if size == "aligned":
        return (ops.fp8_grouped_gemm_wgrad(*operands, offsets, torch.bfloat16, backend),)
    ops.fp8_grouped_gemm_wgrad_add_(*operands, offsets, inputs["accumulator"][..., :-1], backend)
    return ()

"""Tokens to the FP8 rows of their experts, against eager PyTorch that quantises first and moves bytes, and against the
two ops one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

import grpo_kernels

from . import moe_definitions as definitions
from .case import Case, Inputs, Provider, compiled
from .moe_definitions import DEEPSEEK, QWEN, Model, Values
from .target import copy_bandwidth, speedup

_GPU_TOKENS, _CPU_TOKENS = 8192, 1024
_TILE = 128


def _make(model: Model, tokens: int, alignment: int, device: str, size: str) -> Inputs:
    """Different experts for a token's slots; the permutation, which other cases measure."""
    experts, width = (model.experts, model.hidden) if size == "full" else (8, 2 * _TILE)
    tokens = tokens if size == "full" else 24
    ids = torch.rand(tokens, experts, device=device).topk(model.top_k).indices.int()
    permutation = grpo_kernels.build_permutation(ids, experts, alignment=alignment)
    x = torch.randn(tokens, width, device=device).to(torch.bfloat16)
    return {"x": x, **permutation._asdict()}


def _permutation(inputs: Inputs) -> grpo_kernels.Permutation:
    return grpo_kernels.Permutation(*(inputs[name] for name in grpo_kernels.Permutation._fields))


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of [N, H] in tiles of 1 x 128, and their scales, powers of two."""
    tiles = x.to(torch.promote_types(x.dtype, torch.float32)).view(len(x), -1, _TILE)
    amax = tiles.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448.0)))
    return (tiles / scale).view(x.shape).to(torch.float8_e4m3fn), scale[..., 0].float()


def _rows(inputs: Inputs, top_k: int) -> Values:
    codes, scale = _quantize(inputs["x"])
    source = inputs["inv_map"] // top_k
    rows = codes.view(torch.uint8).index_select(0, source).view(torch.float8_e4m3fn)
    return rows, scale.index_select(0, source).t().contiguous().t()


def _both(inputs: Inputs, top_k: int) -> Values:
    """Rows and their transpose, from the rows in full."""
    live = inputs["inv_map"] >= 0
    x = torch.where(live[:, None], definitions.permute(inputs["x"], inputs["inv_map"].clamp(min=0), top_k), 0.0)
    return (*_quantize(x), *_quantize(x.t().contiguous()))


def _sample(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Some rows of numbers, in float32: codes as the numbers they stand for."""
    return definitions.sample([output.float() for output in outputs])


def _case(device: str, model: Model, both: bool) -> Case:
    tokens, alignment = _GPU_TOKENS if device == "cuda" else _CPU_TOKENS, _TILE if both else 1

    def ours(inputs: Inputs) -> Values:
        if not both:
            return tuple(grpo_kernels.moe_permute_quantize(inputs["x"], _permutation(inputs)))
        plain, transposed = grpo_kernels.moe_permute_quantize(inputs["x"], _permutation(inputs), transpose="both")
        return (*plain, *transposed)

    def one_after_the_other(inputs: Inputs) -> Values:
        rows = grpo_kernels.moe_permute(inputs["x"], _permutation(inputs))
        if not both:
            return tuple(grpo_kernels.fp8_quantize(rows))
        plain, transposed = grpo_kernels.fp8_quantize(rows, transpose="both")
        return (*plain, *transposed)

    eager = partial(_both if both else _rows, top_k=model.top_k)
    rows = tokens * model.top_k
    if both:  # padding is written, too; the tokens are read once for each of their rows
        rows += model.experts * (_TILE - 1)
    code = model.hidden + 4 * model.hidden // _TILE
    read = 2 * model.hidden * tokens
    target = speedup(1)
    if device == "cuda":
        target = copy_bandwidth(85)
    return Case(
        op="moe_permute_quantize",
        name=f"{model.name} T={tokens} H={model.hidden} K={model.top_k} bfloat16{', both' if both else ''}",
        make=partial(_make, model, tokens, alignment),
        providers=(
            Provider("ours", ours, "ours"),
            Provider("eager", eager, "eager"),
            Provider("torch.compile", compiled(eager), "compile"),
            Provider("moe_permute, fp8_quantize", one_after_the_other, "peer"),
        ),
        bytes_moved=read + rows * code * (1 + both),
        targets=(target,),
        sample_outputs=_sample,
        definition=lambda inputs: _sample(eager(inputs)),
        quick=model is DEEPSEEK and not both,
    )


def cases(device: str) -> list[Case]:
    """Two models; the smaller one with the transpose, too."""
    return [_case(device, DEEPSEEK, False), _case(device, QWEN, False), _case(device, QWEN, True)]

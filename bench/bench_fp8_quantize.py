"""Quantisation of activations and weights to e4m3, and back, against the formula in eager PyTorch with its own cast.

Codes and scales are compared as they are: a code that differs by one is far outside the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import grpo_kernels

from . import fp8_peers as peers
from .case import Case, Inputs, Provider, compiled
from .target import Target, copy_bandwidth, speedup

Values = tuple[Tensor, ...]
Forward = Callable[[Inputs], Values]

ROWS, SQUARE = (1, 128), (128, 128)
_CHECKED_ROWS = 256
_EPS = 1e-12


def _padded(x: Tensor, multiple: int) -> Tensor:
    """float32, with zeros up to a multiple of 128 columns, and of `multiple` rows."""
    short = (-x.shape[-1] % 128, -x.shape[-2] % multiple)
    return F.pad(x.float(), (0, short[0], 0, short[1])) if any(short) else x.float()


def _scaled(tiles: Tensor, axes: tuple[int, ...]) -> Values:
    """The codes of tiles along `axes`, and their scales: the next power of two, by rounding the bits up."""
    amax = tiles.abs().amax(axes, keepdim=True).clamp(min=_EPS)
    scale = ((((amax / 448.0).view(torch.int32) + 0x7FFFFF) >> 23) << 23).view(torch.float32)
    return (tiles / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


def eager_rows(x: Tensor) -> Values:
    """Tiles of 1 x 128 of [..., M, K]."""
    codes, scale = _scaled(_padded(x, 1).unflatten(-1, (-1, 128)), (-1,))
    return codes.flatten(-2)[..., : x.shape[-1]], scale.squeeze(-1)


def eager_square(x: Tensor) -> Values:
    """Tiles of 128 x 128 of [..., M, K]."""
    tiles = _padded(x, 128).unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))
    codes, scale = _scaled(tiles, (-3, -1))
    return codes.flatten(-2).flatten(-3, -2)[..., : x.shape[-2], : x.shape[-1]], scale.squeeze(-1).squeeze(-2)


def eager_dequantize(data: Tensor, scale: Tensor) -> Tensor:
    """In bf16, of tiles of 1 x 128."""
    width = data.shape[-1]
    if width % 128 == 0:
        return (data.float().unflatten(-1, (-1, 128)) * scale[..., None]).flatten(-2).bfloat16()
    return (data.float() * scale.repeat_interleave(128, -1)[..., :width]).bfloat16()


def _eager(square: bool, both: bool, inputs: Inputs) -> Values:
    x = inputs["x"]
    plain = (eager_square if square else eager_rows)(x)
    if not both:
        return plain
    if square:
        return (*plain, plain[0].transpose(-1, -2).contiguous(), plain[1].transpose(-1, -2).contiguous())
    return (*plain, *eager_rows(x.transpose(-1, -2)))


def _ours(square: bool, both: bool, inputs: Inputs) -> Values:
    block = SQUARE if square else ROWS
    if not both:
        return tuple(grpo_kernels.fp8_quantize(inputs["x"], block))
    plain, transposed = grpo_kernels.fp8_quantize(inputs["x"], block, transpose="both")
    return (*plain, *transposed)


def sample(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Some rows of each tensor; codes as the numbers 0 to 255."""
    found = []
    for output in outputs:
        value = output.detach()
        value = value.view(torch.uint8).float() if value.element_size() == 1 else value
        rows = value.flatten(0, -2)
        step = max(1, len(rows) // _CHECKED_ROWS)
        found.append(rows[::step])
    return found


def _make(shape: tuple[int, ...], dtype: torch.dtype, device: str, size: str) -> Inputs:
    """Rows and columns of different sizes, as activations have them."""
    if size == "smoke":
        shape = (*(2 for _ in shape[:-2]), *((132, 200) if shape[-1] % 128 else (256, 384)))
    x = torch.randn(shape, device=device)
    x *= torch.exp2(torch.randint(-6, 3, (shape[-1],), device=device).float())
    return {"x": x.to(dtype)}


def _make_scaled(shape: tuple[int, ...], device: str, size: str) -> Inputs:
    data, scale = eager_rows(_make(shape, torch.bfloat16, device, size)["x"])
    return {"codes": data.contiguous().view(torch.uint8), "scale": scale.mT.contiguous().mT}


def _target(device: str) -> Target:
    if device == "cuda":
        return copy_bandwidth(85)
    return speedup(2)


def _bytes(shape: tuple[int, ...], element: int, square: bool, both: bool) -> int:
    """x once, each code once, and the scales."""
    batch = shape[0] if len(shape) == 3 else 1
    rows, width = shape[-2:]
    down, across = -(-rows // 128), -(-width // 128)
    scales = down * across * (1 + both) if square else rows * across + both * width * down
    return batch * (rows * width * (element + 1 + both) + 4 * scales)


def _case(
    device: str, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, square: bool = False, both: bool = False
) -> Case:
    eager = partial(_eager, square, both)
    peer = None if square else peers.torchao_rows(device, shape, both)
    block = "128x128" if square else "1x128"
    parts = " and of the transpose" if both else ""
    return Case(
        op="fp8_quantize",
        name=f"{name} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} {block}{parts}",
        make=partial(_make, shape, dtype),
        providers=(
            Provider("ours", partial(_ours, square, both), "ours"),
            Provider("eager", eager, "eager"),
            Provider("torch.compile", compiled(eager), "compile"),
            *((Provider("torchao", peer, "peer"),) if peer else ()),
        ),
        bytes_moved=_bytes(shape, torch.empty((), dtype=dtype).element_size(), square, both),
        targets=(_target(device),),
        definition=lambda inputs: sample(eager(inputs)),
        sample_outputs=sample,
        quick=name.startswith("DeepSeek"),
        absent=() if peer or square else ("torchao",),
    )


def _back_case(device: str, name: str, shape: tuple[int, ...]) -> Case:
    def ours(inputs: Inputs) -> Values:
        data = inputs["codes"].view(torch.float8_e4m3fn)
        return (grpo_kernels.fp8_dequantize(grpo_kernels.ScaledTensor(data, inputs["scale"])),)

    def eager(inputs: Inputs) -> Values:
        return (eager_dequantize(inputs["codes"].view(torch.float8_e4m3fn), inputs["scale"].float()),)

    rows, width = shape
    return Case(
        op="fp8_dequantize",
        name=f"{name} {rows}x{width} to bfloat16",
        make=partial(_make_scaled, shape),
        providers=(
            Provider("ours", ours, "ours"),
            Provider("eager", eager, "eager"),
            Provider("torch.compile", compiled(eager), "compile"),
        ),
        bytes_moved=3 * rows * width + 4 * rows * -(-width // 128),
        targets=(_target(device),),
        definition=lambda inputs: [rows.double() for rows in sample(eager(inputs))],
        sample_outputs=sample,
        quick=name.startswith("DeepSeek"),
    )


def cases(device: str) -> list[Case]:
    """Activations and weights of three models; on a CPU fewer rows and experts."""
    gpu = device == "cuda"
    rows = 32768 if gpu else 2048
    other = torch.bfloat16 if gpu else torch.float32
    activations = [
        _case(device, "DeepSeek-V3", (rows, 7168), torch.bfloat16),
        _case(device, "DeepSeek-V3", (rows, 7168), torch.bfloat16, both=True),
        _case(device, "Qwen3-30B", (rows, 2048), other, both=True),
        _case(device, "gpt-oss", (rows, 2880), torch.bfloat16),
    ]
    weights = [
        _case(device, "DeepSeek-V3", (8 if gpu else 1, 4096, 7168), torch.bfloat16, square=True, both=True),
        _case(device, "Qwen3-30B", (128 if gpu else 8, 1536, 2048), other, square=True, both=True),
        _case(device, "gpt-oss", (32 if gpu else 1, 5760, 2880), torch.bfloat16, square=True),
    ]
    return [*activations, *weights, _back_case(device, "DeepSeek-V3", (rows, 7168))]

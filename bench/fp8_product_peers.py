"""Other people's products of FP8 operands, where they are installed and the GPU has them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Inputs
from .moe_definitions import Values
from .moe_peers import attribute

Peer = Callable[[Inputs], Values]


def _on_hopper(device: str) -> bool:
    return device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9


def scaled_mm_loop(device: str) -> Peer | None:
    """PyTorch's own product with scales of blocks, for one expert after another; sizes have to be known on the host."""
    if not _on_hopper(device) or not hasattr(F, "scaled_mm"):
        return None
    recipes = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128

    def run(inputs: Inputs) -> Values:
        sizes = inputs["sizes"].tolist()
        rows = zip(inputs["data"].split(sizes), inputs["scale"].split(sizes), strict=True)
        weights = zip(inputs["weight_data"].unbind(), inputs["weight_scale"].unbind(), strict=True)
        return (
            torch.cat(
                [
                    # Its scales of rows have the rows adjacent in memory, like ours, but those of the segment alone.
                    F.scaled_mm(x, w.t(), s.t().contiguous().t(), recipes[0], v.t(), recipes[1])
                    for (x, s), (w, v) in zip(rows, weights, strict=True)
                ]
            ),
        )

    return run


def scaled_mm_wgrad_loop(device: str) -> Peer | None:
    """The same, both operands in tiles of 1 x 128 of their transposes."""
    if not _on_hopper(device) or not hasattr(F, "scaled_mm"):
        return None
    recipe = F.ScalingType.BlockWise1x128

    def run(inputs: Inputs) -> Values:
        sizes = inputs["sizes"].tolist()
        tiles = [size // 128 for size in sizes]
        names = ("grad", "x")
        data = zip(*(inputs[f"{name}_data"].split(sizes, 1) for name in names), strict=True)
        scales = zip(*(inputs[f"{name}_scale"].split(tiles, 1) for name in names), strict=True)
        return (
            torch.stack(
                [F.scaled_mm(g, x.t(), s, recipe, v.t(), recipe) for (g, x), (s, v) in zip(data, scales, strict=True)]
            ),
        )

    return run


def deep_gemm_wgrad(device: str) -> Peer | None:
    """DeepGEMM's, into zeros of float32; it wants the codes of one expert behind those of the other."""
    function = attribute("deep_gemm", "k_grouped_fp8_gemm_nt_contiguous")
    if function is None or not _on_hopper(device):
        return None

    def run(inputs: Inputs) -> Values:
        sizes, widths = inputs["sizes"], [len(inputs[f"{name}_data"]) for name in ("grad", "x")]
        out = torch.zeros(len(sizes), *widths, device=sizes.device)
        operands = ((inputs[f"{name}_by_expert"], inputs[f"{name}_scale"].t()) for name in ("grad", "x"))
        function(*operands, out, sizes.tolist(), sizes.int(), out)
        return (out,)

    return run


def deep_gemm(device: str) -> Peer | None:
    """DeepGEMM's, for segments that are multiples of 128 rows."""
    function = attribute("deep_gemm", "m_grouped_fp8_gemm_nt_contiguous")
    if function is None or not _on_hopper(device):
        return None

    def run(inputs: Inputs) -> Values:
        weight, rows = inputs["weight_data"], len(inputs["data"])
        out = torch.empty(rows, weight.shape[1], device=weight.device, dtype=torch.bfloat16)
        expert = torch.repeat_interleave(inputs["sizes"], output_size=rows)
        operands = (inputs["data"], inputs["scale"]), (weight, inputs["weight_scale"])
        function(*operands, out, expert.int())
        return (out,)

    return run


def torchao(device: str) -> Peer | None:
    """torchao's, which casts rows and weights itself; it calls DeepGEMM."""
    package, name = "torchao.prototype.moe_training.blockwise_fp8", "_to_fp8_blockwise_then_scaled_grouped_mm"
    function = attribute(package, name) or attribute(f"{package}.grouped_mm", name)
    if function is None or not _on_hopper(device):
        return None

    def run(inputs: Inputs) -> Values:
        result: Tensor = function(inputs["x"], inputs["weight"].transpose(1, 2), inputs["offsets"])
        return (result,)

    return run

"""Other people's quantisation to FP8, where it is installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .case import Inputs
from .moe_peers import attribute

Peer = Callable[[Inputs], tuple[Tensor, ...]]

_TORCHAO = "torchao.prototype.blockwise_fp8_training.kernels"


def torchao_rows(device: str, shape: tuple[int, ...], both: bool) -> Peer | None:
    """torchao's tiles of 1 x 128 of a matrix, and in a second pass of its transpose; scales are no powers of two."""
    rows = attribute(_TORCHAO, "triton_fp8_blockwise_act_quant_lhs")
    transposed = attribute(_TORCHAO, "triton_fp8_blockwise_act_quant_transposed_lhs")
    fits = len(shape) == 2 and all(size % 128 == 0 for size in shape)
    if device != "cuda" or torch.version.hip is not None or rows is None or transposed is None or not fits:
        return None
    return lambda inputs: (*rows(inputs["x"], 128), *(transposed(inputs["x"], 128) if both else ()))

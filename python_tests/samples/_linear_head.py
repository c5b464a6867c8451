"""The head of the linear ops' samples, and what a loss on it takes."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH, VOCAB, RANK = 9, 37, 2
_GENERATOR = torch.Generator().manual_seed(0)


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=_GENERATOR) * scale


HIDDEN = _normal(2, 3, WIDTH)
WEIGHT = _normal(VOCAB, WIDTH)
BIAS = _normal(VOCAB)
BIAS[:7] = float("-inf")
BIAS[1] = 0.5
A, B = _normal(RANK, WIDTH, scale=0.5), _normal(VOCAB, RANK, scale=0.5)
OLD = torch.linspace(-4.5, -2.5, 6).view(2, 3)
ADVANTAGES = torch.tensor([1.0, -0.5])

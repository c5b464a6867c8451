"""The sampler's noise in plain PyTorch: a function of a row's seed and of a token's place in its sequence, and of
nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

ACCEPTANCE, RACE = 0, 1
"""Streams: the uniform of a draft, and the exponentials of the tokens that may be drawn."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the product of two words, without leaving 63 bits."""
    low = word * (factor & 0xFFFF)
    high = word * (factor >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of Salmon et al. (2011): four random words of four counter words and two key words, all int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _words(seeds: Tensor, places: Tensor, blocks: Tensor, stream: int) -> tuple[Tensor, ...]:
    """The words of `blocks`, the first counter word, for each seed and place. All broadcast."""
    counter = (blocks, torch.full_like(blocks, stream), places & _WORD, (places >> 32) & _WORD)
    return philox(counter, (seeds & _WORD, (seeds >> 32) & _WORD))


def uniforms(seeds: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """In [0, 1), multiples of 2^-24: the uniform of the draft at each place.

    Args:
        seeds: [B] int64.
        places: [B, K] int64. Number of tokens before it in its sequence.
    """
    word = _words(seeds[:, None], places, torch.zeros_like(places), ACCEPTANCE)[0]
    return (word >> 8).to(dtype) * 2.0**-24


def exponentials(seeds: Tensor, places: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """[B, V] > 0: standard exponential variables, one for each token that may be drawn at a row's place.

    Args:
        seeds: [B] int64.
        places: [B] int64.
    """
    blocks = torch.arange((vocab + 3) // 4, device=seeds.device)
    words = torch.stack(_words(seeds[:, None], places[:, None], blocks[None], RACE), dim=-1).flatten(1)[:, :vocab]
    y = ((words.to(dtype) + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)
    return -torch.log1p(-y)

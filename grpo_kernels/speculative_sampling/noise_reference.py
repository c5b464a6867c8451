"""The sampler's noise in plain PyTorch: a function of a row's seed and of places in its sequence, and of nothing else.

The uniforms of a call's drafts belong to the place where the call begins, the exponentials of a drawn token to that of
the token. So two calls of a sequence share no noise, wherever the first of them ended: not even that which decided on
drafts behind the end, as the block rule's does.
"""

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


def uniforms(seeds: Tensor, offsets: Tensor, drafts: int, dtype: torch.dtype) -> Tensor:
    """[B, K] in [0, 1), multiples of 2^-24: the uniform of each of the K drafts of a call.

    Args:
        seeds: [B] int64.
        offsets: [B] int64. Number of tokens of the sequence before the call.
        drafts: K.
    """
    index = torch.arange(drafts, device=seeds.device)
    word = _words(seeds[:, None], offsets[:, None], index[None], ACCEPTANCE)[0]
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

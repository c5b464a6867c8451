"""A key-value cache whose rows are of different lengths: some samples get more tokens from a pass than others."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.r1.policy.model import Cache, SharedPrefix


class RaggedCache(Cache):
    """Keys and values [layers, B, heads, capacity, width / heads], written at each row's own place.

    `begin` says where the next pass writes. What a row wrote behind that place counts no longer: queries see what
    stands before and among the new tokens, and what stands behind is overwritten before any query gets there.
    """

    def __init__(self, prefix: SharedPrefix, capacity: int, last_position: int) -> None:
        """Every row starts as its prompt in `prefix`. No position is beyond `last_position`, where nothing counts."""
        group_size = prefix.group_size
        self._keys = [_with_room(keys, group_size, capacity) for keys, _ in prefix.layers]
        self._values = [_with_room(values, group_size, capacity) for _, values in prefix.layers]
        self._rows = torch.arange(len(self._keys[0]), device=self._keys[0].device).unsqueeze(1)
        self._places: Tensor | None = None  # [B, T] of the next pass
        self._last_position = last_position

    def begin(self, starts: Tensor, count: int, end: int) -> None:
        """The next pass brings `count` tokens a row, from place starts [B] on. Keys from `end` on are left aside."""
        self._places = starts.unsqueeze(1) + torch.arange(count, device=starts.device)
        keys = torch.arange(end, device=starts.device)
        self.visible = (keys <= self._places.unsqueeze(-1)).unsqueeze(1)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        places, visible = self._begun()
        end = visible.shape[-1]
        for memory, new in ((self._keys[layer], keys), (self._values[layer], values)):
            memory[self._rows, :, places] = new.transpose(1, 2)
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def positions(self, count: int, device: torch.device) -> Tensor:
        return self._begun()[0].clamp(max=self._last_position)

    def advance(self, count: int) -> None:
        """`begin` says where each row goes on."""

    def _begun(self) -> tuple[Tensor, Tensor]:
        """Where the pass writes, and what its queries see."""
        if self._places is None or self.visible is None:
            raise RuntimeError("begin() says where a pass writes, and comes before it")
        return self._places, self.visible


def _with_room(prefix: Tensor, group_size: int, capacity: int) -> Tensor:
    """The prompts' rows [N, heads, P, d], each `group_size` times, in [N * group_size, heads, capacity, d]."""
    prompts, heads, length, width = prefix.shape
    memory = prefix.new_zeros((prompts * group_size, heads, capacity, width))
    memory[:, :, :length] = prefix.repeat_interleave(group_size, dim=0)
    return memory

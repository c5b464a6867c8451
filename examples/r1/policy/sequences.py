"""The batch that training reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, overload

import torch
from torch import Tensor

from examples.r1.policy import vocabulary


class Sequences(NamedTuple):
    """Prompts with G completions each; completion i belongs to prompt i // G."""

    prompts: Tensor  # [N, P] int64, padded on the left
    completions: Tensor  # [N * G, C] int64, END, then padding
    mask: Tensor  # [N * G, C] bool, True up to and with END

    @property
    def group_size(self) -> int:
        return len(self.completions) // max(len(self.prompts), 1)

    def select(self, groups: Tensor | slice) -> Sequences:
        """The prompts of these indices with all their completions."""
        rows = rows_of_groups(groups, self.group_size)
        return Sequences(self.prompts[groups], self.completions[rows], self.mask[rows])


@overload
def rows_of_groups(groups: Tensor, group_size: int) -> Tensor: ...


@overload
def rows_of_groups(groups: Tensor | slice, group_size: int) -> Tensor | slice: ...


def rows_of_groups(groups: Tensor | slice, group_size: int) -> Tensor | slice:
    """Where the samples of these groups are: indices, or of a slice (without steps) a slice."""
    if isinstance(groups, slice):
        return slice(groups.start * group_size, groups.stop * group_size)
    return (groups.unsqueeze(1) * group_size + torch.arange(group_size, device=groups.device)).flatten()


def concatenate(parts: Iterable[Sequences]) -> Sequences:
    """The groups of all parts, one after the other."""
    return Sequences(*(torch.cat(column) for column in zip(*parts, strict=True)))


def make_sequences(prompts: Tensor, completions: Tensor) -> Sequences:
    """Adds the mask: END counts; what follows it does not."""
    is_end = completions == vocabulary.END
    return Sequences(prompts, completions, (is_end.cumsum(dim=1) - is_end.long()) == 0)

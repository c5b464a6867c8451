"""How the Triton kernels of speculative_sampling cut a row of logits: a pure function, the same for every batch."""

from __future__ import annotations

from typing import NamedTuple

MAX_SPLITS = 32
"""Most parts of a row that are reduced on their own: lanes of the warp that merges them."""

_CANDIDATES = 24
"""Logits that a thread of a filter has room for; splits * slots largest logits fit there, too."""

MAX_RACES = 256
"""Most parts of the row that a token is drawn from."""
_WARPS = 4096
"""As many as 132 multiprocessors hold of the race at a time, about."""


class LaunchConfig(NamedTuple):
    """Tiles of [slots, width], whole slots a thread. Depends on V, dtype and alignment, so that a row's bits do not
    depend on the batch."""

    slots: int
    width: int  # neighbouring elements that a thread loads at once, if rows are aligned
    neighbours: bool  # whether a slot's elements lie side by side; else every thread's neighbour has the next one
    num_warps: int
    columns: int  # of a part of the row
    splits: int
    filter_slots: int  # of the kernel that has a row to itself
    filter_warps: int
    room: int  # logits of a row that its filter may copy; 0 where it reads the row as often as it has to


def launch_config(vocab: int, element_size: int, aligned: bool) -> LaunchConfig:
    """Tiles of 4 KiB, two or more a part, 16 bytes a thread.

    16 rows of 32000 bfloat16 at two positions, and their drafts, are then three programs for each of 132
    multiprocessors; rows of 152064 are cut in 19 parts.
    """
    width = 16 // element_size
    slots = min(256, max(32, _power_of_two(-(-vocab // width))))
    tiles = -(-vocab // (slots * width))
    each = max(2, -(-tiles // 24)) if tiles < 64 else max(4, -(-tiles // 24))
    columns = each * slots * width
    filter_slots = min(512, max(32, _power_of_two(-(-vocab // width))))
    splits = -(-vocab // columns)
    room = _CANDIDATES * filter_slots if vocab > 3 * filter_slots * width else 0
    return LaunchConfig(
        slots, width, aligned and vocab % 16 == 0, slots // 32, columns, splits, filter_slots, filter_slots // 32, room
    )


def race_config(batch: int, vocab: int, element_size: int) -> tuple[int, int]:
    """Columns of a part of the race, and how many parts. A warp has one; the longer it is, the fewer of its tiles may
    hold a winner. No result depends on it."""
    tile = 32 * 16 // element_size
    tiles = -(-vocab // tile)
    wanted = min(tiles, MAX_RACES, max(1, _WARPS // batch))
    columns = -(-tiles // wanted) * tile
    return columns, -(-vocab // columns)


def _power_of_two(number: int) -> int:
    """The least that is not smaller."""
    return 1 << (number - 1).bit_length()

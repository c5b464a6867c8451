"""Floors of grpo_loss: B rows of T tokens, in float32 with a mask of a byte; a block owns 1024 tokens."""

from __future__ import annotations

from bench.floors.floor import Floor, Part

_SHAPE = {"B": 64, "T": 4096}
_BLOCKS = "B*ceil(T/1024)"
_TOKEN = Part(r"LDG\..*|DADD", "B*T/32", loop=r"STG\..*")  # with every option at once

_ONE_BY_ONE = (
    "A thread's four tokens wait for memory one after another, half of the chain: loading the next one before the "
    "arithmetic of this one would hide three of the eight trips, about 2 us."
)

FLOORS = (
    Floor(
        kernel="row_sums_kernel",
        form="sequence-level ratios",
        shape=_SHAPE,
        read="9*B*T",
        written=f"40*{_BLOCKS}",
        operations="3*B*T",
        unit="fp64",
        programs=_BLOCKS,
        rounds=5,  # the row, and its four tokens one after another
        parts=(Part(r"LDG\..*|DADD", "B*T/32"),),
        threads=256,
    ),
    Floor(
        kernel="loss_kernel",
        form="clip, k3, metrics",
        shape=_SHAPE,
        read="13*B*T + 4*B",
        written=f"4*B*T + 256*{_BLOCKS}",
        operations="30*B*T",
        unit="fp32",
        programs=_BLOCKS,
        rounds=8,  # the row, four tokens one after another, two counters, the records
        parts=(_TOKEN,),
        threads=256,
        finding=_ONE_BY_ONE,
    ),
    Floor(
        kernel="special_loss_kernel",
        form="another surrogate, metrics",
        shape=_SHAPE,
        read="13*B*T + 4*B",
        written=f"4*B*T + 256*{_BLOCKS}",
        operations="40*B*T",
        unit="fp32",
        programs=_BLOCKS,
        rounds=8,
        parts=(_TOKEN,),
        threads=256,
        finding=_ONE_BY_ONE,
    ),
    Floor(
        kernel="share_kernel",
        form="sequence-level ratios",
        shape=_SHAPE,
        read="13*B*T",
        written="4*B*T",
        operations="3*B*T",
        unit="fp32",
        programs=_BLOCKS,
        rounds=3,
        threads=256,
    ),
)

"""Floors of group_advantages: B samples in groups of G, float32 rewards."""

from __future__ import annotations

from bench.floors.floor import Floor, Part

_SHAPE = {"B": 4096, "G": 8}

FLOORS = (
    Floor(
        kernel="group_advantages_kernel",
        form="one reward, mean and std of the group",
        shape=_SHAPE,
        read="4*B",
        written="12*B",
        operations="8*B",
        unit="fp64",
        programs="ceil(B/G/4)",
        rounds=1,
        threads=128,
    ),
    Floor(
        kernel="informative_groups_kernel",
        form="one reward",
        shape=_SHAPE,
        read="4*B",
        written="B",
        operations="2*B",
        unit="fp64",
        programs="ceil(B/G/4)",
        rounds=1,
        threads=128,
    ),
    Floor(
        kernel="group_rank_kernel",
        form="one score",
        shape=_SHAPE,
        read="4*B",
        written="4*B",
        operations="B*G",
        unit="fp64",
        programs="ceil(B/G/4)",
        rounds=1,
        parts=(Part(r"DSETP\..*", "B/G*G/m"),),
        threads=128,
    ),
)

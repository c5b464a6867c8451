"""Floors of multi_token_prediction: T rows, D depths. The loss runs on the kernels of linear_log_probs."""

from __future__ import annotations

from bench.floors.floor import Floor, Part

FLOORS = (
    Floor(
        kernel="targets_kernel",
        form="int64 ids and positions, mask",
        shape={"T": 65536, "D": 1},
        read="17*T",
        written="8*T*D + 8*D",
        operations="0",
        unit="fp32",
        programs="ceil(T/128)",
        rounds=3,
        parts=(Part(r"STG\.E\.64", "T*D/(32*m)"),),
        where={},
        types={"token_ids": "*i64", "positions": "*i64", "mask": "*"},
    ),
)

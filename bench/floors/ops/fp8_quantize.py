"""Floors of fp8_quantize: M rows of K numbers of bfloat16, E such matrices; a scale for each 128 of them."""

from __future__ import annotations

from bench.floors.floor import Floor, Part

_SHAPE = {"M": 32768, "K": 7168}
_WEIGHTS = {"E": 8, "M": 4096, "K": 7168}
_ENCODE = {"ENCODE": "hardware", "POWER_OF_TWO": True}
_LOADS = Part(r"LDG\.E\.128", "M*K/(256*m)", level=None)

FLOORS = (
    Floor(
        kernel="quantize_rows_kernel",
        form="1x128",
        shape=_SHAPE,
        read="2*M*K",
        written="M*K + 4*M*ceil(K/128)",
        operations="3*M*K",
        unit="fp32",
        programs="ceil(M/32)*ceil(K/128)",
        rounds=1,
        parts=(_LOADS,),
        where=_ENCODE,
        types={"x": "*bf16"},
    ),
    Floor(
        kernel="quantize_tiles_kernel",
        form="1x128 and the transpose",
        shape=_SHAPE,
        read="2*M*K",
        written="2*M*K + 4*M*ceil(K/128) + 4*K*ceil(M/128)",
        operations="6*M*K",
        unit="fp32",
        programs="ceil(M/128)*ceil(K/128)",
        rounds=1,
        parts=(_LOADS,),
        where={**_ENCODE, "SQUARE": False, "ON_ROWS": True, "ON_COLUMNS": True},
        types={"x": "*bf16"},
    ),
    Floor(
        kernel="quantize_tiles_kernel",
        form="the transpose alone",
        shape=_SHAPE,
        read="2*M*K",
        written="M*K + 4*K*ceil(M/128)",
        operations="3*M*K",
        unit="fp32",
        programs="ceil(M/128)*ceil(K/64)",
        rounds=1,
        parts=(_LOADS,),
        where={"SQUARE": False, "ON_ROWS": False, "ON_COLUMNS": True, "POWER_OF_TWO": False},
        types={"x": "*bf16"},
    ),
    Floor(
        kernel="quantize_tiles_kernel",
        form="128x128 and the transpose",
        shape=_WEIGHTS,
        read="2*E*M*K",
        written="2*E*M*K + 8*E*ceil(M/128)*ceil(K/128)",
        operations="3*E*M*K",
        unit="fp32",
        programs="E*ceil(M/128)*ceil(K/128)",
        rounds=1,
        parts=(Part(r"LDG\.E\.128", "E*M*K/(256*m)", level=None),),
        where={"SQUARE": True, "ON_ROWS": True, "ON_COLUMNS": True, "POWER_OF_TWO": False},
        types={"x": "*bf16"},
    ),
    Floor(
        kernel="dequantize_kernel",
        form="1x128 to bfloat16",
        shape=_SHAPE,
        read="M*K + 4*M*ceil(K/128)",
        written="2*M*K",
        operations="M*K",
        unit="fp32",
        programs="ceil(M/32)*ceil(K/128)",
        rounds=1,
        parts=(Part(r"LDG\.E\.128", "M*K/(512*m)", level=None),),
        where={"ROW_TILES": False, "COLUMN_TILES": True, "ENCODE": "hardware"},
        types={"out": "*bf16"},
    ),
)

"""Floors of moe_experts: R rows of experts of width I, each with a gate and an up; e4m3 codes have a scale for 128."""

from __future__ import annotations

from bench.floors.floor import Floor, Part

_SHAPE = {"R": 65536, "I": 2048}
_PLAIN = {"CLAMPED": False, "INTERLEAVED": False}
_FP8 = {**_PLAIN, "ENCODE": "hardware", "WHOLE": True}

FLOORS = (
    Floor(
        kernel="glu_kernel",
        form="bfloat16",
        shape=_SHAPE,
        read="4*R*I + 4*R",
        written="2*R*I",
        operations="5*R*I",
        unit="fp32",
        programs="ceil(R/8)*ceil(I/128)",
        rounds=2,
        parts=(Part(r"STG\.E\.128", "R*I/(256*m)", level=None),),
        where={**_PLAIN, "WEIGHTED": False},
        types={"preact": "*bf16"},
    ),
    Floor(
        kernel="glu_backward_kernel",
        form="bfloat16, all gradients",
        shape=_SHAPE,
        read="6*R*I + 8*R",
        written="6*R*I + 4*R",
        operations="14*R*I",
        unit="fp32",
        programs="ceil(R/8)",
        rounds=3,
        parts=(Part(r"STG\.E\.128", "3*R*I/(256*m)"),),
        where={**_PLAIN, "PREACT": True, "ACTIVATED": True, "WEIGHTS": True, "HAS_TERMS": False},
        types={"preact": "*bf16"},
    ),
    Floor(
        kernel="glu_quantize_kernel",
        form="bfloat16, pre-activations kept",
        shape=_SHAPE,
        read="4*R*I + 4*R",
        written="3*R*I + 12*R*ceil(I/128)",
        operations="14*R*I",
        unit="fp32",
        programs="ceil(R/8)*ceil(I/128)",
        rounds=2,
        parts=(Part(r"LDG\.E\.128", "2*R*I/(256*m)", level=None),),
        where={**_FP8, "KEEP": True},
        types={"preact": "*bf16"},
    ),
    Floor(
        kernel="glu_backward_rows_kernel",
        form="FP8 products of weights",
        shape=_SHAPE,
        read="2*R*I + 8*R*ceil(I/128) + 2*R*I + 8*R",
        written="2*R*I + 8*R*ceil(I/128) + 4*R",
        operations="20*R*I",
        unit="fp32",
        programs="ceil(R/8)",
        rounds=3,
        parts=(Part(r"LDG\.E\.128", "R*I/(256*m)"),),  # the gradient's
        where={**_FP8, "TILES": True, "WIDE": False, "ACTIVATED": False, "WEIGHTS": True, "HAS_TERMS": False},
        types={"grad_activated": "*bf16"},
    ),
    Floor(
        kernel="glu_backward_columns_kernel",
        form="FP8 products of weights",
        shape=_SHAPE,
        read="2*R*I + 8*R*ceil(I/128) + 2*R*I + 8*R",
        written="3*R*I + 12*I*ceil(R/128)",
        operations="24*R*I",
        unit="fp32",
        programs="ceil(R/128)*ceil(I/32)",
        rounds=3,
        parts=(Part(r"STG\.E\.128", "3*R*I/(512*m)", level=None),),
        where={**_FP8, "GRADIENT": True, "ACTIVATED": True},
        types={"grad_activated": "*bf16"},
        finding=(
            "88 instructions an activation: a thread has 16 of them, exchanges 60 maxima with others, stores codes to "
            "shared memory a byte at a time, and computes the gradients that the rows' kernel has computed. "
            "Twice the activations a thread would halve the exchange; the clamp before the conversion to e4m3, which "
            "saturates by itself, is 3 % of the instructions."
        ),
    ),
)

"""Gates of fp8_quantize on Triton."""

from __future__ import annotations

from typing import NamedTuple

from bench.gates.gate import WIDE_LOADS, WIDE_STORES, Gate, Instructions
from bench.gates.triton_kernels import Specialisation, TritonKernels

_BOTH = frozenset({False, True})


class Form(NamedTuple):
    """What is quantised, and into what."""

    square: bool = False
    rows: bool = True
    columns: bool = False
    power_of_two: bool = True
    dtype: str = "bfloat16"
    shape: tuple[int, ...] = (4096, 7168)


FORMS = (
    Form(),
    Form(power_of_two=False, dtype="float16"),
    Form(dtype="float32"),
    Form(shape=(3, 1000, 1031)),  # rows that are not aligned
    Form(rows=False, columns=True, power_of_two=False),
    Form(rows=False, columns=True, dtype="float32"),
    Form(columns=True),
    Form(columns=True, power_of_two=False, dtype="float16"),
    Form(columns=True, dtype="float32"),
    Form(columns=True, shape=(1000, 1031)),
    Form(square=True, shape=(8, 2880, 2880)),
    Form(square=True, rows=False, columns=True, power_of_two=False, shape=(8, 4096, 7168)),
    Form(square=True, columns=True, dtype="float32", shape=(8, 4096, 7168)),
    Form(square=True, columns=True, power_of_two=False, shape=(8, 4096, 7168)),
    Form(square=True, columns=True, shape=(3, 1000, 1031)),
)
_FEW = (FORMS[0], FORMS[6], FORMS[13])


def _launch(form: Form) -> None:
    import torch

    from grpo_kernels.fp8_quantize import _triton

    x = torch.empty(form.shape, dtype=getattr(torch, form.dtype), device="meta")
    data, scale, data_t, scale_t = _triton.fp8_quantize(
        x, form.square, form.power_of_two, form.rows, form.columns, 1e-12
    )
    if form.power_of_two:
        pair = (data, scale) if form.rows else (data_t, scale_t)
        _triton.fp8_dequantize(*pair, x.dtype)
    if form.columns and not form.rows and not form.square:
        _triton.fp8_dequantize(data_t.mT, scale_t.mT, x.dtype)


def launch(quick: bool) -> None:
    for form in _FEW if quick else FORMS:
        _launch(form)


CONVERSION = Instructions("F2FP.E4M3", r"F2FP\..*E4M3.*", at_least=1)


def _limits(of: Specialisation, aligned: bool) -> tuple[str, int, int]:
    """What is written, registers and bytes of shared memory.

    A multiprocessor holds two blocks; one, where numbers are divided twice or codes are computed with integers twice,
    and with older compilers, which encode a tile anew for its transpose.
    """
    if of.kernel == "quantize_rows_kernel":
        return "", 64 if aligned else 96, 128
    if of.kernel == "dequantize_kernel":
        return "", 80 if aligned else 224, 16 * 1024
    if of.constant("SQUARE"):
        return "128x128", 176 if aligned else 240, 32 * 1024
    if not of.constant("ON_ROWS"):
        return "the transpose", 160, 16 * 1024
    if not of.constant("POWER_OF_TWO"):
        return "both, divided", 255, 16 * 1024
    return "both", 192 if aligned else 255, 16 * 1024


def gate(of: Specialisation) -> Gate:
    """Aligned rows are read and written 16 bytes a thread. Codes come from the processor's conversion where it has one,
    and go back through it."""
    aligned = of.aligned("columns", *(("rows",) if of.kernel == "quantize_tiles_kernel" else ()))
    variant, registers, shared = _limits(of, aligned)
    instructions = (WIDE_LOADS, WIDE_STORES) if aligned else ()
    if of.constant("ENCODE") == "hardware":
        instructions += (CONVERSION,)
    if not aligned:
        variant = f"{variant}, other rows" if variant else "other rows"
    return Gate(of.kernel, registers, of.warps * 32, shared, instructions, variant)


TRITON = TritonKernels(
    launch,
    gate,
    {
        "quantize_rows_kernel": {
            "POWER_OF_TWO": _BOTH,
            "ENCODE": frozenset({"hardware", "integer"}),
            "ROWS": frozenset({32}),
        },
        "quantize_tiles_kernel": {
            "SQUARE": _BOTH,
            "ON_ROWS": _BOTH,
            "ON_COLUMNS": _BOTH,
            "POWER_OF_TWO": _BOTH,
            "ENCODE": frozenset({"hardware", "integer"}),
            "COLUMNS": frozenset({64, 128}),
        },
        "dequantize_kernel": {
            "ROW_TILES": _BOTH,
            "COLUMN_TILES": _BOTH,
            "ENCODE": frozenset({"hardware", "integer"}),
            "ROWS": frozenset({32}),
        },
    },
)

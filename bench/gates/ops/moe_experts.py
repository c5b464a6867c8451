"""Gates of the Triton kernels of moe_experts: the activation and its gradients, in the operands' dtype and in FP8."""

from __future__ import annotations

from typing import NamedTuple

from bench.gates.gate import NO_BARRIER, WIDE_LOADS, WIDE_STORES, Gate, Instructions
from bench.gates.ops.fp8_quantize import CONVERSION
from bench.gates.triton_kernels import Specialisation, TritonKernels

_BOTH = frozenset({False, True})


class Form(NamedTuple):
    """What the code depends on."""

    dtype: str = "bfloat16"
    width: int = 768
    clamped: bool = False
    interleaved: bool = False
    weighted: bool = False  # s * A instead of A, in the forward
    terms: bool = False  # of a bias, in the gradient of the weights
    needs: tuple[bool, bool, bool] = (
        True,
        True,
        True,
    )  # gradient of the pre-activations, s * A, gradient of the weights


GPT_OSS = Form(width=2880, clamped=True, interleaved=True, terms=True)
FORMS = (
    Form(),
    GPT_OSS,
    *(Form(dtype, interleaved=interleaved) for dtype in ("float16", "float32") for interleaved in (False, True)),
    Form(clamped=True, weighted=True),
    Form(interleaved=True, weighted=True),
    Form(needs=(True, True, False)),
    Form(needs=(True, False, False)),
    Form(needs=(False, False, True), terms=True),
    Form(needs=(False, True, True), width=100, weighted=True),
    Form("float32", width=100, clamped=True, interleaved=True, terms=True),
)


def _launch(form: Form) -> None:
    import torch

    from grpo_kernels.moe_experts import _triton

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, dtype = 640, getattr(torch, form.dtype)
    preact, inv_map = empty(rows, 2 * form.width, dtype=dtype), empty(rows, dtype=torch.int32)
    weights, activation = empty(100, 6), (form.clamped, 1.702, 7.0, form.interleaved)
    _triton.moe_glu(preact, inv_map, weights if form.weighted else None, *activation)
    grad, terms = empty(rows, form.width, dtype=dtype), empty(rows) if form.terms else None
    _triton.moe_glu_backward(preact, grad, inv_map, weights, terms, *activation, *form.needs)


class Quantized(NamedTuple):
    """What the code depends on where FP8 is written."""

    dtype: str = "bfloat16"
    width: int = 2048
    clamped: bool = False
    interleaved: bool = False
    keep: bool = True  # the pre-activations, in the forward
    terms: bool = False
    needs: str = "rows columns wide activated_columns activated_wide weights"  # of the backward
    rows: int = 640


_WIDE_WGRAD, _FP8_WGRAD = "rows wide activated_wide weights", "rows columns activated_columns weights"
QUANTIZED = (
    Quantized(needs=_WIDE_WGRAD),
    Quantized(width=2880, clamped=True, interleaved=True, terms=True, needs=_FP8_WGRAD),
    Quantized(needs=_FP8_WGRAD),
    Quantized(width=2880, clamped=True, interleaved=True, terms=True, needs=_WIDE_WGRAD),
    Quantized(width=2880, keep=False),  # a tile of gates and ups
    Quantized(width=2880, clamped=True, needs=_FP8_WGRAD),
    Quantized(interleaved=True, keep=False, needs="rows"),
    *(Quantized(dtype, interleaved=interleaved) for dtype in ("float16", "float32") for interleaved in (False, True)),
    Quantized(clamped=True, needs="rows weights"),
    Quantized(needs="activated_wide activated_columns"),
    Quantized(needs="columns"),
    Quantized(width=1031, rows=1000),  # rows that are not aligned
    Quantized("float32", width=1031, clamped=True, interleaved=True, rows=1000),
)


def _launch_quantized(form: Quantized) -> None:
    import torch

    from grpo_kernels.moe_experts import _triton

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    dtype, rows = getattr(torch, form.dtype), form.rows
    preact, inv_map = empty(rows, 2 * form.width, dtype=dtype), empty(rows, dtype=torch.int32)
    activation = (form.clamped, 1.702, 7.0, form.interleaved)
    *_, data, scale = _triton.moe_glu_quantize(preact, inv_map, *activation, True, 1e-12)
    if not form.keep:
        _triton.moe_glu_quantize(preact, inv_map, *activation, False, 1e-12)
    outputs = ("rows", "columns", "wide", "activated_columns", "activated_wide", "weights")
    needs = [name in form.needs.split() for name in outputs]
    alone = form.needs.startswith("activated")
    grad = None if alone else empty(rows, form.width, dtype=dtype)
    terms = empty(rows) if form.terms else None
    _triton.moe_glu_backward_quantize(
        data, scale, grad, inv_map, empty(100, 6), terms, *activation, *needs, 1e-12, 1e-30, dtype
    )


def launch(quick: bool) -> None:
    for form in FORMS[:2] if quick else FORMS:
        _launch(form)
    for quantized in QUANTIZED[:2] if quick else QUANTIZED:
        _launch_quantized(quantized)


_PAIR_OF_STORES = Instructions("STG.64", r"STG\..*\b(64|128|256)\b.*", at_least=1)  # one for each 16 bytes of pairs
_FEW_BARRIERS = Instructions("BAR", r"BAR\..*", at_most=4)


_HALF_WIDE_LOADS = Instructions("LDG.64", r"LDG\..*\b(64|128|256)\b.*", at_least=1)
_HALF_WIDE_STORES = Instructions("STG.64", r"STG\..*\b(64|128|256)\b.*", at_least=1)
_SCALES_BARRIERS = Instructions("BAR", r"BAR\..*", at_most=8)  # two for the scales of each tile, and those of the sums


def _quantized_gate(of: Specialisation) -> Gate:
    """Eight codes a thread, beside 16 bytes of bfloat16; in float32 four. Threads exchange the scales of rows, to store
    them side by side. Transposes go through shared memory, and come out 16 bytes a thread."""
    converts = (CONVERSION,) if of.constant("ENCODE") == "hardware" else ()
    if of.kernel == "glu_backward_columns_kernel":
        aligned = of.aligned("width", "rows")
        instructions = (WIDE_STORES, *converts) if aligned else converts
        if aligned and of.constant("GRADIENT"):
            instructions += (_HALF_WIDE_LOADS,)
        variant = "aligned rows" if aligned else "other rows"
        return Gate(of.kernel, 192, of.warps * 32, 8 * 1024, instructions, variant)
    if not of.aligned("width"):
        return Gate(of.kernel, 128, of.warps * 32, 4096, converts, "other rows")
    if of.kernel == "glu_quantize_kernel":
        instructions = (WIDE_LOADS, _HALF_WIDE_STORES, _SCALES_BARRIERS, *converts)
        shared = (
            128 if of.constant("KEEP") else 1024
        )  # without those of pairs, codes of half a tile are few for a thread
        return Gate(of.kernel, 80, of.warps * 32, shared, instructions, "aligned rows")
    instructions = (_SCALES_BARRIERS, *converts)
    if of.constant("ROWS") == 8:
        instructions += (_HALF_WIDE_LOADS,)
    return Gate(of.kernel, 96, of.warps * 32, 128, instructions, "aligned rows")


def gate(of: Specialisation) -> Gate:
    """Rows of a width that is a multiple of 16 are read and written 16 bytes a thread, and threads exchange nothing but
    the sums of the backward, after its loop."""
    if of.kernel not in ("glu_kernel", "glu_backward_kernel"):
        return _quantized_gate(of)
    backward, aligned = of.kernel == "glu_backward_kernel", of.aligned("width")
    summed = backward and of.constant("WEIGHTS")
    if not aligned:
        return Gate(of.kernel, 96, of.warps * 32, 2048, (), "other rows")
    wide = [WIDE_LOADS]
    if not backward:
        wide.append(_PAIR_OF_STORES if of.constant("INTERLEAVED") else WIDE_STORES)
    elif of.constant("PREACT"):
        wide.append(WIDE_STORES)
    barriers = _FEW_BARRIERS if summed else NO_BARRIER
    return Gate(
        of.kernel, 72 if backward else 64, of.warps * 32, 128 if summed else 0, (*wide, barriers), "aligned rows"
    )


_ACTIVATION = {"CLAMPED": _BOTH, "INTERLEAVED": _BOTH}
_SHARED = {**_ACTIVATION, "ROWS": frozenset({2, 4, 8}), "BLOCK": frozenset({128})}
_FP8 = {**_ACTIVATION, "WHOLE": _BOTH, "ENCODE": frozenset({"hardware", "integer"})}

TRITON = TritonKernels(
    launch,
    gate,
    {
        "glu_kernel": {**_SHARED, "WEIGHTED": _BOTH},
        "glu_backward_kernel": {**_SHARED, **dict.fromkeys(("HAS_TERMS", "PREACT", "ACTIVATED", "WEIGHTS"), _BOTH)},
        "glu_quantize_kernel": {**_FP8, "KEEP": _BOTH, "ROWS": frozenset({8, 16})},
        "glu_backward_rows_kernel": {
            **_FP8,
            **dict.fromkeys(("HAS_TERMS", "TILES", "WIDE", "ACTIVATED", "WEIGHTS"), _BOTH),
            "ROWS": frozenset({4, 8}),
        },
        "glu_backward_columns_kernel": {
            **_FP8,
            **dict.fromkeys(("GRADIENT", "ACTIVATED"), _BOTH),
            "COLUMNS": frozenset({32}),
        },
    },
)

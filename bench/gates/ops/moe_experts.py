"""Gates of the Triton kernels of moe_experts: the activation and its gradients."""

from __future__ import annotations

from typing import NamedTuple

from bench.gates.gate import NO_BARRIER, WIDE_LOADS, WIDE_STORES, Gate, Instructions
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


def launch(quick: bool) -> None:
    for form in FORMS[:2] if quick else FORMS:
        _launch(form)


_PAIR_OF_STORES = Instructions("STG.64", r"STG\..*\b(64|128|256)\b.*", at_least=1)  # one for each 16 bytes of pairs
_FEW_BARRIERS = Instructions("BAR", r"BAR\..*", at_most=4)


def gate(of: Specialisation) -> Gate:
    """Rows of a width that is a multiple of 16 are read and written 16 bytes a thread, and threads exchange nothing but
    the sums of the backward, after its loop."""
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


_SHARED = {"CLAMPED": _BOTH, "INTERLEAVED": _BOTH, "ROWS": frozenset({2, 4, 8}), "BLOCK": frozenset({128})}

TRITON = TritonKernels(
    launch,
    gate,
    {
        "glu_kernel": {**_SHARED, "WEIGHTED": _BOTH},
        "glu_backward_kernel": {**_SHARED, **dict.fromkeys(("HAS_TERMS", "PREACT", "ACTIVATED", "WEIGHTS"), _BOTH)},
    },
)

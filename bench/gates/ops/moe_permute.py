"""Gates of moe_permute: the map in CUDA C++; on Triton the rows of tokens to those of experts, and back."""

from __future__ import annotations

from typing import NamedTuple

from bench.gates.gate import NO_BARRIER, WIDE_LOADS, WIDE_STORES, Gate, Instructions
from bench.gates.ops.fp8_quantize import CONVERSION
from bench.gates.triton_kernels import Specialisation, TritonKernels

_BOTH = frozenset({False, True})


CUDA = (
    # Four blocks a multiprocessor or more. Shared, without the counters, which are dynamic: 8 sums of 64 bits.
    Gate("count_tiles_kernel", registers=32, threads=256),
    Gate("place_slots_kernel", registers={80: 40, 90: 40, 100: 64}, threads=256, shared=64),
)


class Rows(NamedTuple):
    """What the code depends on."""

    hidden: int
    top_k: int
    dtype: str = "bfloat16"
    stride: int = 0  # from row to row, if not `hidden`
    plain: bool = False  # without weights too


ROWS = (
    Rows(7168, 8, plain=True),
    Rows(7168, 8, "float16", 3 << 30, plain=True),  # a stride beyond 2^31
    Rows(7168, 8, "float32", plain=True),
    Rows(1031, 8, plain=True),  # rows that are not aligned
    Rows(256, 1),  # one warp
    Rows(512, 2),  # two
    Rows(128, 4, "float32"),
)
_FEW = (ROWS[0], ROWS[3])


def _launch(form: Rows) -> None:
    import torch

    from grpo_kernels.moe_permute import _triton

    def rows(count: int) -> torch.Tensor:
        shape, strides = (count, form.hidden), (form.stride or form.hidden, 1)
        return torch.empty_strided(shape, strides, dtype=getattr(torch, form.dtype), device="meta")

    def table(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens = 48
    row_id_map, inv_map = table(tokens, form.top_k), table(tokens * form.top_k)
    weights = table(tokens, form.top_k, dtype=torch.float32)
    x, y = rows(tokens), rows(tokens * form.top_k)
    for optional in (None, weights) if form.plain else (weights,):
        _triton.moe_permute(x, row_id_map, inv_map, optional)
        _triton.moe_unpermute(y, row_id_map, optional)
    _triton.moe_unpermute_backward(x, y, row_id_map, inv_map, weights)


class Quantized(NamedTuple):
    """What the code depends on where tokens are quantised on the way."""

    hidden: int
    top_k: int
    dtype: str = "bfloat16"
    power_of_two: bool = True
    transpose: bool = True  # the transpose, too


QUANTIZED = (
    Quantized(7168, 8),
    Quantized(2880, 4, power_of_two=False),
    Quantized(512, 2, "float32"),
    Quantized(1024, 1, "float16", transpose=False),
    Quantized(1031, 8),  # rows that are not aligned
)


def _launch_quantized(form: Quantized) -> None:
    import torch

    from grpo_kernels.moe_permute import _triton

    tokens = 64
    x = torch.empty(tokens, form.hidden, dtype=getattr(torch, form.dtype), device="meta")
    row_id_map = torch.empty(tokens, form.top_k, dtype=torch.int32, device="meta")
    inv_map = torch.empty(128 * form.top_k, dtype=torch.int32, device="meta")
    for columns in (False, True)[: 1 + form.transpose]:
        _triton.moe_permute_quantize(x, row_id_map, inv_map, form.power_of_two, columns, 1e-12)


def launch(quick: bool) -> None:
    for form in _FEW if quick else ROWS:
        _launch(form)
    for quantized in QUANTIZED[:1] if quick else QUANTIZED:
        _launch_quantized(quantized)


_FEW_BARRIERS = Instructions("BAR", r"BAR\..*", at_most=8)  # older compilers add through shared memory


def _quantized_gate(of: Specialisation) -> Gate:
    """Rows that are gathered have both their codes in registers, as fp8_quantize has them."""
    aligned = of.aligned("hidden")
    instructions = (WIDE_LOADS, WIDE_STORES) if aligned else ()
    if of.constant("ENCODE") == "hardware":
        instructions += (CONVERSION,)
    variant = "aligned rows" if aligned else "other rows"
    if of.kernel == "permute_quantize_kernel":
        return Gate(of.kernel, 96, of.warps * 32, 256, instructions, variant)
    registers = 192 if aligned else 255
    if not of.constant("POWER_OF_TWO"):
        variant, registers = f"{variant}, divided", 255
    return Gate(of.kernel, registers, of.warps * 32, 16 * 1024, instructions, variant)


def gate(of: Specialisation) -> Gate:
    """Aligned rows are read and written 16 bytes a thread. Threads exchange the sums of the backward alone, after its
    loop; its warps are fewer than those of the others, and each has the rows of eight slots under way."""
    if "quantize" in of.kernel:
        return _quantized_gate(of)
    backward = of.kernel == "unpermute_backward_kernel"
    shared, barriers = (2304, _FEW_BARRIERS) if backward else (0, NO_BARRIER)
    if not of.aligned("hidden"):
        return Gate(of.kernel, 128, of.warps * 32, shared, (barriers,), "other rows")
    registers = 112 if backward else 56
    return Gate(of.kernel, registers, of.warps * 32, shared, (WIDE_LOADS, WIDE_STORES, barriers), "aligned rows")


_BLOCKS = frozenset({128, 256, 512, 1024})
_SLOTS = {"SLOTS": frozenset({1, 2, 4, 8})}
_ENCODE = frozenset({"hardware", "integer"})
_PADDING = {"PADDING": frozenset({32})}

TRITON = TritonKernels(
    launch,
    gate,
    {
        "permute_kernel": {"WEIGHTED": _BOTH, **_SLOTS, **_PADDING, "BLOCK": _BLOCKS},
        "unpermute_kernel": {"WEIGHTED": _BOTH, **_SLOTS, "BLOCK": _BLOCKS},
        "unpermute_backward_kernel": {
            **_SLOTS,
            **_PADDING,
            "LANES": frozenset({32, 64, 128}),
            "WIDTH": frozenset({4, 8}),
            "NEIGHBOURS": _BOTH,
        },
        "permute_quantize_kernel": {
            "POWER_OF_TWO": _BOTH,
            "ENCODE": _ENCODE,
            **_SLOTS,
            **_PADDING,
            "TILES": frozenset({4, 8}),
        },
        "gather_quantize_kernel": {"POWER_OF_TWO": _BOTH, "ENCODE": _ENCODE},
    },
)

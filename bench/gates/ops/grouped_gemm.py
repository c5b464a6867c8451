"""Gates of the Triton kernels of grouped_gemm."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from bench.gates.gate import WIDE_LOADS, WIDE_STORES, Gate, Instructions
from bench.gates.triton_kernels import Specialisation, TritonKernels

if TYPE_CHECKING:
    import torch

_BOTH = frozenset({False, True})
_OPERANDS = {
    "LOADS": frozenset({"tma", "vector", "scalar"}),
    "PRECISION": frozenset({"ieee", "tf32x3"}),
    "PIECES": frozenset({1, 2, 4}),
}


class Case(NamedTuple):
    """A layer of experts, what is asked of it, and what its code depends on."""

    width: int = 4096  # K: 4104 is a multiple of 8, 4095 of nothing
    columns: int = 1536
    dtype: str = "bfloat16"
    experts: int = 128
    few: bool = False  # rows for every expert
    bias: bool = False
    out: str = ""  # dtype of the result; "": that of the operands
    accumulate: bool = False
    offsets: str = "int32"
    library: bool = False  # also the kernels around that of PyTorch


def _cases() -> Iterator[Case]:
    yield Case(library=True)
    yield Case(few=True, bias=True, offsets="int64")
    yield Case(bias=True, out="float32", accumulate=True)
    yield Case(4104, dtype="float16", experts=8)
    yield Case(
        columns=1, experts=256, few=True, out="float32"
    )  # as gpt-oss' bias of the down-projection, by a gradient
    yield Case(dtype="float32", bias=True)
    yield Case(4095, 1537, bias=True, few=True)
    yield Case(4095, 1537, "float32", accumulate=True)


class Fp8Case(NamedTuple):
    """The same of FP8 operands."""

    width: int = 7168
    columns: int = 4096
    stride: int = 0  # of the rows, 0: the width
    experts: int = 8
    few: bool = False
    bias: str = ""  # its dtype; "": there is none
    out: str = "bfloat16"
    offsets: str = "int32"


def _fp8_cases(quick: bool) -> Iterator[Fp8Case]:
    yield Fp8Case()
    yield Fp8Case(200, 1537, 208, few=True, out="float16", bias="float32", offsets="int64")
    if not quick:
        yield Fp8Case(2880, 5760, experts=32, bias="bfloat16")
        yield Fp8Case(2880, 2880, experts=32, out="float32")
        yield Fp8Case(2880, 2880, experts=32, out="float32", bias="float32")
        yield Fp8Case(2048, 1536, experts=128, few=True)
        yield Fp8Case(2880, 5760, experts=32, few=True, bias="bfloat16")
        yield Fp8Case(200, 1537, 208, out="float32", bias="float64")


def _few() -> Iterator[Case]:
    yield Case(library=True)
    yield Case(4095, 1537, "float32", bias=True, accumulate=True)


def _launch(case: Case) -> None:
    import torch

    from grpo_kernels.grouped_gemm import _library_triton as library
    from grpo_kernels.grouped_gemm import _triton

    dtype = getattr(torch, case.dtype)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    functions = (_triton.grouped_gemm, _triton.grouped_gemm_wgrad, _triton.grouped_gemm_wgrad_add_)
    forward, wgrad, wgrad_add = (inspect.unwrap(function) for function in functions)
    rows = case.experts * (64 if case.few else 1024)
    x, weight = empty(rows, case.width), empty(case.experts, case.columns, case.width)
    offsets = empty(case.experts, dtype=getattr(torch, case.offsets))
    bias = empty(case.experts, case.columns) if case.bias else None
    out = forward(x, weight, offsets, bias, getattr(torch, case.out or case.dtype))
    grad = out.to(dtype)
    forward(grad, weight.transpose(1, 2), offsets, None, dtype)
    if case.accumulate:
        wgrad_add(x, grad, offsets, empty(*weight.shape, dtype=torch.float32))
    else:
        wgrad(x, grad, offsets, dtype)
    if case.bias:
        _triton.grouped_row_sum(out, offsets)
    if case.library:
        library.grouped_gemm(x, weight, offsets)
        library.grouped_gemm_wgrad(x, grad, offsets)


def _launch_fp8(case: Fp8Case) -> None:
    import torch

    from grpo_kernels.fp8_quantize.layout import empty_scale, tiles
    from grpo_kernels.grouped_gemm import _triton

    rows, stride = case.experts * (64 if case.few else 1024), case.stride or case.width

    def data(*shape: int) -> torch.Tensor:
        return torch.empty((*shape, stride), dtype=torch.float8_e4m3fn, device="meta")[..., : case.width]

    x, weight = data(rows), data(case.experts, case.columns)
    scale = empty_scale(x, (), rows, case.width, square=False)
    weight_scale = torch.empty((case.experts, tiles(case.columns), tiles(case.width)), device="meta")
    offsets = torch.empty(case.experts, dtype=getattr(torch, case.offsets), device="meta")
    bias = None
    if case.bias:
        bias = torch.empty((case.experts, case.columns), dtype=getattr(torch, case.bias), device="meta")
    operands = x, scale, weight, weight_scale, offsets, bias
    inspect.unwrap(_triton.fp8_grouped_gemm)(*operands, getattr(torch, case.out))
    _launch_fp8_wgrad(case, offsets)


def _launch_fp8_wgrad(case: Fp8Case, offsets: torch.Tensor) -> None:
    import torch

    from grpo_kernels.fp8_quantize.layout import empty_data, empty_scale
    from grpo_kernels.grouped_gemm import _triton

    rows = case.experts * 1024
    operands = []
    for height in (case.width, case.columns):
        data = empty_data(offsets, (), height, rows)
        operands += [data, empty_scale(data, (), height, rows, square=False)]
    if case.few:
        accumulator = torch.empty((case.experts, case.columns, case.width), device="meta")
        _triton.fp8_grouped_gemm_wgrad_add_(*operands, offsets, accumulator)
    else:
        _triton.fp8_grouped_gemm_wgrad(*operands, offsets, getattr(torch, case.out))


def launch(quick: bool) -> None:
    for case in _few() if quick else _cases():
        _launch(case)
    for fp8_case in _fp8_cases(quick):
        _launch_fp8(fp8_case)


_ASYNCHRONOUS = (
    Instructions("HGMMA or UTCMMA", r"(HGMMA|UTC\w*MMA)\b.*", at_least=1),
    Instructions("UTMALDG", r"UTMALDG\b.*", at_least=1),
)
_OTHER = (Instructions("MMA", r"(HMMA|HGMMA|UTC\w*MMA)\b.*", at_least=1),)
_WIDE_COPIES = (
    Instructions("LDGSTS.128", r"LDGSTS\..*\b128\b.*", at_least=1),
    Instructions("narrower LDGSTS", r"LDGSTS\.(?!.*\b128\b).*", at_most=0),
    Instructions("LDG.U16", r"LDG\..*\bU16\b.*", at_most=0),
)


def gate(of: Specialisation) -> Gate:
    """The products have as many registers as there are; what counts is that they keep their sums in them."""
    if of.kernel == "ends_kernel":
        return Gate(of.kernel, 64, of.warps * 32, 4096)
    if of.kernel.startswith("clear_"):
        return Gate(of.kernel, 64, of.warps * 32, 0, (WIDE_STORES,))
    if of.kernel == "row_sum_kernel":
        wide = of.aligned("stride")
        return Gate(
            of.kernel, 128, of.warps * 32, 16 * 1024, (WIDE_LOADS,) if wide else (), "" if wide else "narrow loads"
        )
    if of.kernel == "tile_table_kernel":
        return Gate(of.kernel, 64, of.warps * 32, 4096)
    if of.kernel.startswith("fp8_"):
        return _fp8_gate(of)
    loads = of.constant("LOADS")
    instructions = {"tma": _ASYNCHRONOUS, "vector": (*_OTHER, *_WIDE_COPIES), "scalar": _OTHER}[loads]
    wide = of.aligned("columns" if of.kernel == "grouped_kernel" else "stride_n")
    variant = {"tma": "TMA", "vector": "16-byte loads", "scalar": "narrow loads"}[loads]
    shared = (220 if loads == "tma" else 99) * 1024
    return Gate(of.kernel, 255, of.warps * 32, shared, (*instructions, WIDE_STORES) if wide else instructions, variant)


_QMMA = Instructions("QMMA", r"QMMA\b.*", at_least=32)


def _fp8_gate(of: Specialisation) -> Gate:
    """Products of FP8 numbers, and warps that give up registers where they are said to be specialised."""
    wgrad, specialized = of.kernel == "fp8_wgrad_kernel", of.constant("SPECIALIZED")
    loads = "tma" if wgrad else of.constant("LOADS")
    asynchronous = Instructions("QGMMA or UTCQMMA", r"(QGMMA|UTCQMMA)\b.*", at_least=4)
    instructions = {
        "tma": (asynchronous, _ASYNCHRONOUS[1]),
        "vector": (_QMMA, *_WIDE_COPIES[:2]),
        "scalar": (_QMMA,),
    }[loads]
    variant = {"tma": "TMA", "vector": "16-byte loads", "scalar": "narrow loads"}[loads]
    registers, warps = 255, of.warps
    if specialized:
        instructions += (Instructions("USETMAXREG", r"USETMAXREG\b.*", at_least=1),)
        variant, registers, warps = "TMA, specialised warps", 168, 3 * of.warps
    if of.aligned("stride_n" if wgrad else "columns"):
        instructions += (WIDE_STORES,)
    shared = 232448 if loads == "tma" else 99 * 1024
    return Gate(of.kernel, registers, warps * 32, shared, instructions, variant)


TRITON = TritonKernels(
    launch,
    gate,
    {
        "grouped_kernel": {
            **_OPERANDS,
            "TURNED": _BOTH,
            "HAS_BIAS": _BOTH,
            "SEGMENTS": frozenset({16, 256, 512}),
            "BLOCK_M": frozenset({64, 128}),
            "BLOCK_N": frozenset({64, 128, 256}),
            "BLOCK_K": frozenset({16, 32, 64}),
        },
        "wgrad_kernel": {
            **_OPERANDS,
            "ACCUMULATE": _BOTH,
            "SEGMENTS": frozenset({16, 256, 512}),
            "BLOCK_N": frozenset({128}),
            "BLOCK_K": frozenset({64, 128, 256}),
            "BLOCK_R": frozenset({16, 32, 64}),
        },
        "row_sum_kernel": {
            "SEGMENTS": frozenset({256}),
            "BLOCK_R": frozenset({32}),
            "BLOCK_N": frozenset({64}),
        },
        "ends_kernel": {"SEGMENTS": frozenset({16, 64, 256})},
        "clear_tail_kernel": {"BLOCK": frozenset({2048})},
        "clear_empty_kernel": {"BLOCK": frozenset({2048})},
        "tile_table_kernel": {
            "SEGMENTS": frozenset({16, 64, 256}),
            "BLOCK_M": frozenset({64, 128}),
            "BLOCK": frozenset({128}),
        },
        "fp8_wgrad_kernel": {
            "ACCUMULATE": _BOTH,
            "PRECISION": frozenset({"ieee"}),
            "SPECIALIZED": _BOTH,
            "TILE": frozenset({128}),
            "PIECES": frozenset({1, 2}),
        },
        "fp8_grouped_kernel": {
            "LOADS": _OPERANDS["LOADS"],
            "HAS_BIAS": _BOTH,
            "PRECISION": frozenset({"ieee"}),
            "SPECIALIZED": _BOTH,
            "BLOCK_M": frozenset({64, 128}),
            "TILE": frozenset({128}),
            "PIECES": frozenset({1, 2}),
        },
    },
    first={"tile_table_kernel": 89, "fp8_grouped_kernel": 89, "fp8_wgrad_kernel": 90},
)

"""Candidates compiled ahead of time for an architecture, without a GPU: what they need at most."""

from __future__ import annotations

import inspect
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.gates import triton_kernels
from bench.gates.gate import Measured, largest_block
from bench.tune.tiles import TABLES, Tiles, candidates, element_size

_KERNELS = {
    "forward": "forward_kernel",
    "dlogits": "dlogits_kernel",
    "grouped": "grouped_kernel",
    "grouped_wgrad": "wgrad_kernel",
}
_REGISTERS = 65536


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launch_head(size: str, backward: bool) -> None:
    """With a bias, a mask, a temperature for each row and every output."""
    from grpo_kernels.linear_log_probs import _triton

    dtype = torch.bfloat16 if element_size(size) == 2 else torch.float32
    rows, vocab, width, rank = 1000, 128256, 4096, 64
    lora = "lora" in size
    factors = (_empty(rank, width, dtype=dtype), _empty(vocab, rank, dtype=dtype)) if lora else (None, None)
    head = (_empty(rows, width, dtype=dtype), _empty(vocab, width, dtype=dtype), _empty(vocab, dtype=dtype), *factors)
    options: tuple[Any, ...] = (2.0, _empty(rows, dtype=torch.int64), _empty(rows, dtype=torch.bool), _empty(rows))
    options += (1.0, 1.0, 30.0 if "capped" in size else 0.0)
    if not backward:
        inspect.unwrap(_triton.linear_token_log_probs)(*head, *options, True, True, True, True)
        return
    inspect.unwrap(_triton.linear_token_log_probs_backward)(
        *head, *options, _empty(4, rows), _empty(rows), _empty(rows), _empty(rows), None, False, False, False, False,
        dtype, dtype,
    )  # fmt: skip


def _launch_experts(size: str, wgrad: bool) -> None:
    from grpo_kernels.grouped_gemm import _triton

    dtype = torch.bfloat16 if element_size(size) == 2 else torch.float32
    experts, rows, width, columns = 32, 32 * (64 if "few" in size else 1024), 2880, 5760
    x, offsets = _empty(rows, width, dtype=dtype), _empty(experts, dtype=torch.int32)
    if wgrad:
        accumulator = _empty(experts, columns, width)
        inspect.unwrap(_triton.grouped_gemm_wgrad_add_)(x, _empty(rows, columns, dtype=dtype), offsets, accumulator)
        return
    weight, bias = _empty(experts, columns, width, dtype=dtype), _empty(experts, columns, dtype=dtype)
    inspect.unwrap(_triton.grouped_gemm)(x, weight, offsets, bias, dtype)


def _launch(op: str, size: str) -> None:
    if op in ("forward", "dlogits"):
        _launch_head(size, op == "dlogits")
    else:
        _launch_experts(size, op == "grouped_wgrad")


def compile_choice(op: str, architecture: int, size: str, choice: Tiles) -> Measured:
    """What Triton makes of a kernel with this configuration."""
    with mock.patch.dict(TABLES[op], {(architecture, size): tuple(choice)}):
        launches = triton_kernels.record(lambda: _launch(op, size), architecture)
    (launch,) = [launch for launch in launches if launch.specialisation.kernel == _KERNELS[op]]
    return triton_kernels.compile_launch(launch, architecture)


def problems(choice: Tiles, measured: Measured, architecture: int) -> list[str]:
    """Why it cannot be a candidate, in words; empty if it can."""
    threads = 32 * choice.num_warps
    registers = choice.on_each * threads * (-(-measured.registers // 8) * 8)
    shared = choice.on_each * (measured.shared + 1024)
    limits = (
        ("bytes of spills", measured.spills, 0),
        ("bytes of stack", measured.stack, 0),
        ("bytes of shared memory of a program", measured.shared, largest_block(architecture)),
        ("bytes of shared memory of all programs", shared, largest_block(architecture) + 1024),
        ("registers of all programs", registers, _REGISTERS),
    )
    return [f"{value} {name}, at most {limit}" for name, value, limit in limits if value > limit]


def report(architecture: int, chosen: list[tuple[str, str]]) -> int:
    """Compiles every candidate of these (op, size) and prints what it needs; returns how many cannot be candidates."""
    failed = 0
    for op, size in chosen:
        tried = candidates(op, architecture, size)
        for choice in dict.fromkeys(choice._replace(mib=tried[0].mib) for choice in tried):  # no part of the code
            try:
                measured = compile_choice(op, architecture, size, choice)
                found = problems(choice, measured, architecture)
                words = f"{measured.registers} registers, {measured.shared} bytes"
            except Exception as error:  # Triton's own, of many types
                found, words = [" ".join(str(error).split())[:200]], "does not compile"
            failed += bool(found)
            print(f"{op} {size} {tuple(choice)}: {'; '.join(found) or words}", flush=True)
    return failed

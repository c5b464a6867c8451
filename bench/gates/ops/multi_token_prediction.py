"""Gates of multi_token_prediction, on Triton: the targets of every depth. The loss runs on linear_log_probs."""

from __future__ import annotations

from typing import NamedTuple

from bench.gates.gate import Gate, Instructions
from bench.gates.triton_kernels import Specialisation, TritonKernels


class Rows(NamedTuple):
    """What the code depends on."""

    ids: str = "int64"
    positions: str = ""  # none
    mask: bool = False
    rows: int = 8192
    batch: bool = True


ROWS = (
    Rows("int64", "int64", mask=True),
    Rows("int32", "int32", mask=True),
    Rows("int64", "int32"),
    Rows("int32", "int64"),
    Rows("int64", mask=True),
    Rows("int32"),
    Rows("int64", "int64", mask=True, rows=3 << 30),  # more than 32 bits count
    Rows("int64", mask=True, rows=3 << 30),
    Rows("int64", "int64", mask=True, batch=False),
    Rows("int32", "int32", rows=3 << 30, batch=False),
    Rows("int32", batch=False),
)


def _launch(form: Rows) -> None:
    import torch

    from grpo_kernels.multi_token_prediction import _triton

    def row_of(dtype: str) -> torch.Tensor:
        return torch.empty(form.rows, dtype=getattr(torch, dtype), device="meta")

    positions = row_of(form.positions) if form.positions else None
    mask = row_of("bool") if form.mask else None
    _triton.mtp_targets(row_of(form.ids), positions, mask, 3, 1, 4096 if form.batch else 0, -100)


def launch(quick: bool) -> None:
    for form in ROWS[:1] if quick else ROWS:
        _launch(form)


_ADDITION = Instructions("RED/ATOM.64", r"(RED|ATOM)\w*\..*64.*", at_least=1)


def gate(of: Specialisation) -> Gate:
    """A row a thread; 40 registers keep three quarters of the warps resident. Warps meet to add up their counts."""
    return Gate(of.kernel, 40, of.warps * 32, 64, (_ADDITION,))


TRITON = TritonKernels(launch, gate, {"targets_kernel": {"ROWS": frozenset({128})}})

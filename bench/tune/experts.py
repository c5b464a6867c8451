"""Products of experts: the problems, and those of 16 and 32 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench import moe_definitions as definitions
from bench.case import Inputs
from bench.moe_definitions import Model
from grpo_kernels.grouped_gemm import ops

OPS = ("grouped", "grouped_wgrad")


@dataclass(frozen=True)
class Experts:
    """One product of a model's experts, each with so many rows."""

    model: Model
    down: bool
    rows: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(E, R, K, N)."""
        model = self.model
        width, columns = (model.width, model.hidden) if self.down else (model.hidden, 2 * model.width)
        return model.experts, model.experts * self.rows, width, columns

    @property
    def text(self) -> str:
        experts, rows, width, columns = self.shape
        return f"{self.model.name} E={experts} {rows}x{width}x{columns}"

    def on(self, device: str) -> Experts:
        """A tiny one on a CPU, to see that everything runs."""
        return self if device == "cuda" else Experts(definitions.tiny(self.model), self.down, 128)


def dtype_of(size: str) -> torch.dtype:
    return torch.bfloat16 if size.startswith("16-bit") else torch.float32


def offsets_of(problem: Experts, device: str) -> Tensor:
    """As many rows for every expert."""
    return (torch.arange(1, problem.shape[0] + 1, device=device) * problem.rows).int()


def make(op: str, size: str, problem: Experts, device: str) -> Inputs:
    """A product has a bias: PyTorch's kernel, which takes products without one, is not ours to tune. Gradients of many
    rows are added to an accumulator, for the same reason."""
    experts, rows, width, columns = problem.shape
    made = {"x": torch.randn(rows, width, device=device, dtype=dtype_of(size)), "offsets": offsets_of(problem, device)}
    if op == "grouped":
        made["weight"] = torch.randn(experts, columns, width, device=device, dtype=dtype_of(size)) / width**0.5
        return made | {"bias": torch.randn(experts, columns, device=device, dtype=dtype_of(size))}
    made["grad"] = torch.randn(rows, columns, device=device, dtype=dtype_of(size))
    if "many" in size:
        made["accumulator"] = torch.zeros(experts, columns, width, device=device)
    return made


def run(op: str, size: str, inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    """The op. An accumulator is not returned."""
    x, offsets = inputs["x"], inputs["offsets"]
    if op == "grouped":
        return (ops.grouped_gemm(x, inputs["weight"], offsets, inputs["bias"], x.dtype, backend),)
    if "accumulator" not in inputs:
        return (ops.grouped_gemm_wgrad(x, inputs["grad"], offsets, x.dtype, backend),)
    ops.grouped_gemm_wgrad_add_(x, inputs["grad"], offsets, inputs["accumulator"], backend)
    return ()

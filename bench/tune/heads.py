"""Linear heads: the problems, and how exact their log-probs are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.case import Inputs
from bench.tune.experts import dtype_of
from grpo_kernels.linear_log_probs import ops
from grpo_kernels.testing import accuracy_budget, accuracy_error

OPS = ("forward", "dlogits")
RANK, SCALE, SOFTCAP = 64, 2.0, 30.0
CHECKED_ROWS = 64
_COLUMNS = 8192  # of the vocabulary that are widened to float64 at a time


@dataclass(frozen=True)
class Head:
    """The head of a model, and rows."""

    name: str
    vocab: int
    width: int
    rows: int

    @property
    def text(self) -> str:
        return f"{self.name} {self.rows}x{self.width}x{self.vocab}"

    def on(self, device: str) -> Head:
        """A tiny one on a CPU, to see that everything runs."""
        return self if device == "cuda" else replace(self, name=f"tiny {self.name}", vocab=320, width=64, rows=40)


def _softcap(size: str) -> float:
    return SOFTCAP if "capped" in size else 0.0


def _head(size: str, inputs: Inputs) -> tuple[object, ...]:
    """The arguments that both ops begin with."""
    factors = (inputs.get("lora_a"), inputs.get("lora_b"), SCALE)
    return (
        inputs["hidden"], inputs["weight"], None, *factors, inputs["token_ids"], None, None, 1.0, 1.0, _softcap(size)
    )  # fmt: skip


def _forward(size: str, inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    """(log-probs, entropy, .., .., statistics)."""
    found: tuple[Tensor, ...] = ops.linear_token_log_probs(*_head(size, inputs), True, False, False, True, backend)
    return found


def make(op: str, size: str, problem: Head, device: str, backend: str) -> Inputs:
    """Random rows; logits of about unit variance."""
    rows, width, vocab, dtype = problem.rows, problem.width, problem.vocab, dtype_of(size)
    made = {"hidden": torch.randn(rows, width, device=device, dtype=dtype)}
    made["weight"] = torch.randn(vocab, width, device=device, dtype=dtype) / width**0.5
    if "lora" in size:
        made["lora_a"] = torch.randn(RANK, width, device=device, dtype=dtype) / width**0.5
        made["lora_b"] = torch.randn(vocab, RANK, device=device, dtype=dtype) / RANK**0.5
    made["token_ids"] = torch.randint(0, vocab, (rows,), device=device)
    if op == "dlogits":
        made["statistics"] = _forward(size, made, backend)[4]
        made["grad_log_probs"] = torch.randn(rows, device=device)
    return made


def run(op: str, size: str, inputs: Inputs, backend: str, summed: bool = False) -> tuple[Tensor, ...]:
    """The forward, or the gradients of all logits alone: the products that follow are the same whatever is tried.

    Args:
        summed: gives the gradients' sums over the rows, by which they are compared.
    """
    if op == "forward":
        return _forward(size, inputs, backend)[:2]
    dtype = inputs["hidden"].dtype
    found: tuple[Tensor, ...] = ops.linear_token_log_probs_backward(
        *_head(size, inputs), inputs["statistics"], inputs["grad_log_probs"], None, None, None, False, False, summed,
        False, dtype, dtype, backend,
    )  # fmt: skip
    return (found[2],) if summed else ()


def _definition(size: str, inputs: Inputs, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[2, rows] log-probs and entropy of some rows, in plain PyTorch."""
    hidden, parts = inputs["hidden"][rows].to(dtype), []
    for start in range(0, len(inputs["weight"]), _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        logits = hidden @ inputs["weight"][columns].to(dtype).t()
        if "lora_a" in inputs:
            logits += SCALE * (hidden @ inputs["lora_a"].to(dtype).t()) @ inputs["lora_b"][columns].to(dtype).t()
        parts.append(logits)
    logits = torch.cat(parts, 1)
    if cap := _softcap(size):
        logits = cap * torch.tanh(logits / cap)
    every = torch.log_softmax(logits, 1)
    chosen = every.gather(1, inputs["token_ids"][rows, None])[:, 0]
    return torch.stack([chosen, -(every.exp() * every).sum(1)])


class Judge:
    """Tells whether [2, N] log-probs and entropies may be a candidate's: they are as exact as the accuracy budget asks
    for, and the first rows have the same bits without the others."""

    def __init__(self, size: str, inputs: Inputs) -> None:
        count = len(inputs["hidden"])
        self._rows = torch.linspace(0, count - 1, min(CHECKED_ROWS, count), device=inputs["hidden"].device).long()
        self._expected = _definition(size, inputs, self._rows, torch.float64)
        eager = _definition(size, inputs, self._rows, torch.float32)
        errors = [accuracy_error(*pair) for pair in zip(eager, self._expected, strict=True)]
        self._budgets = [accuracy_budget(torch.float32, error) for error in errors]
        self._fewer = count // 2 - 3
        self._first = {**inputs, **{name: inputs[name][: self._fewer] for name in ("hidden", "token_ids")}}

    def verdict(self, found: Tensor, run: Callable[[Inputs], Tensor]) -> dict[str, Any]:
        """`run` gives the result of the same candidate for other inputs."""
        errors = [accuracy_error(*pair) for pair in zip(found[:, self._rows], self._expected, strict=True)]
        if any(error > budget for error, budget in zip(errors, self._budgets, strict=True)):
            return {"held": False, "why": "less exact than the budget", "difference": max(errors)}
        alone = run(self._first)
        if not torch.equal(alone, found[:, : self._fewer]):
            difference = (alone - found[:, : self._fewer]).abs().max() / found.abs().max()
            return {"held": False, "why": "bits depend on the number of rows", "difference": float(difference)}
        return {"held": True}

"""Results of several ops in turn, checked one op at a time.

Rounding to 3 bits makes two runs whose sums differ in the last bit differ in whole codes further on, so the results of
two devices have no useful bound. Instead every op that runs is written down with its arguments, and what it gave is
checked given these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from python_tests.gpu.fuzz.checks import CHECKS
from python_tests.samples import tensors


class Ran(NamedTuple):
    """One op: its arguments and what it returned or wrote, on the CPU."""

    op: str
    arguments: tuple[Any, ...]
    results: list[Tensor]


def copies(values: Sequence[Any]) -> list[Any]:
    return [value.detach().cpu().clone() if isinstance(value, Tensor) else value for value in values]


class Recorder(TorchDispatchMode):
    """Writes down the package's ops that run in the block, those of the backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[Ran] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "grpo_kernels":
            return func(*args, **(kwargs or {}))
        arguments = (*args, *(kwargs or {}).values())[:-1]  # without the backend
        before = copies(arguments)
        returned = func(*args, **(kwargs or {}))
        described = func._schema.arguments
        written = [a for a, d in zip(arguments, described, strict=False) if d.alias_info and d.alias_info.is_write]
        self.ran.append(
            Ran(func._schema.name.rpartition("::")[2], tuple(before), copies(tensors([returned, *written])))
        )
        return returned


def check_stages(ran: Sequence[Ran]) -> None:
    """Every op that was written down."""
    for position, (op, arguments, results) in enumerate(ran):
        if op not in CHECKS:
            raise AssertionError(f"{op}: no check is known for it")
        try:
            CHECKS[op](arguments, results)
        except AssertionError as error:
            raise AssertionError(f"op {position}, {op}: {error}") from error

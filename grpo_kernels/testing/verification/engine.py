"""Runs a case on a backend and judges it: against float64, against itself, and by what it left in its inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels.testing.accuracy import accuracy_budget, accuracy_error
from grpo_kernels.testing.poison import poisoned_allocations
from grpo_kernels.testing.verification.case import GRADIENT, ROWS, Case, Inputs, Outputs


@dataclass(frozen=True)
class Target:
    """A backend of an op on a device."""

    op: str
    backend: str
    device: torch.device

    def problem(self, dtype: torch.dtype = torch.float32) -> str:
        """Why it cannot be verified, or "" if it can."""
        index = -1 if self.device.index is None else self.device.index
        return _dispatch.problem(self.op, self.backend, self.device.type, index, dtype)


@dataclass(frozen=True)
class Outcome:
    """What came of one case on one target in one dtype; `tensor` is the one that came closest to its budget."""

    target: Target
    dtype: torch.dtype
    case: str
    comparisons: int
    tensor: str
    error: float
    budget: float
    problem: str

    @property
    def severity(self) -> tuple[bool, float]:
        """Orders outcomes: failures last, then by the share of the budget that the error takes."""
        return bool(self.problem), share(self.error, self.budget)


def share(error: float, budget: float) -> float:
    """Error over budget; nothing is allowed where the budget is 0."""
    return error / budget if budget else (float("inf") if error else 0.0)


def targets(op: str, device: torch.device) -> list[Target]:
    """Every backend that the op may take on a device, and Triton's interpreter where it was asked for."""
    names = list(_dispatch.candidates(op, device.type))
    interpretable = _dispatch.public_ops()[op].interpretable and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and interpretable:
        names.insert(-1, "triton")
    return [Target(op, name, device) for name in names]


def check(case: Case, on: Sequence[Target], dtypes: Sequence[torch.dtype]) -> Iterator[Outcome]:
    """The case on every target in every dtype that it takes; what raises is an outcome, too."""
    oracles: dict[torch.dtype, _Oracle] = {}
    for dtype in dtypes:
        able = [target for target in on if not target.problem(dtype)]
        try:
            rounding = torch.float32 if dtype == torch.float64 else dtype
            if rounding not in oracles and able:
                oracles[rounding] = _Oracle(case, rounding)
        except Exception as error:
            message = f"the definition in float64: {_message(error)}"
            yield from (_failure(case, target, dtype, message) for target in able)
            continue
        for target in able:
            try:
                yield oracles[rounding].judge(target, dtype)
            except Exception as error:
                yield _failure(case, target, dtype, _message(error))


def _failure(case: Case, target: Target, dtype: torch.dtype, problem: str) -> Outcome:
    return Outcome(target, dtype, case.name, 0, "", 0.0, 0.0, problem)


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]


class _Oracle:
    """The inputs of a case, rounded to a dtype, and what the definition makes of them in float64 and in float32."""

    def __init__(self, case: Case, rounding: torch.dtype) -> None:
        self.case = case
        made = [case.make(torch.Generator().manual_seed(seed)) for seed in range(case.seeds)]
        self._inputs = [_placed(inputs, rounding) for inputs in made]
        self._definition = Target(case.op, "reference", torch.device("cpu"))
        self._known: dict[tuple[Target, torch.dtype], list[Outputs]] = {}
        self._expected = self._first(self._definition, torch.float64)
        self._eager = self._first(self._definition, torch.float32)
        self._pooled = {name: _pool(self._expected, name) for name in self._expected[0]}
        self._errors = self._errors_of(self._eager)

    def _errors_of(self, outputs: list[Outputs]) -> dict[str, float]:
        return {name: accuracy_error(_pool(outputs, name), expected) for name, expected in self._pooled.items()}

    def _first(self, target: Target, dtype: torch.dtype) -> list[Outputs]:
        """The outputs of the target's first run."""
        key = (target, dtype)
        if key not in self._known:
            self._known[key] = self._outputs(target, dtype)
        return self._known[key]

    def _standard(self, target: Target, dtype: torch.dtype) -> dict[str, float]:
        """The errors of eager float32 that set the target's budgets: those on the CPU for kernels.

        The definition is eager PyTorch itself, which adds in another order on each device. There float64 is the test.
        """
        on_cpu = target.backend != "reference" or target == self._definition
        if self.case.rounds_between and dtype in (torch.bfloat16, torch.float16):
            return self._errors_of(self._first(self._definition if on_cpu else target, dtype))
        return self._errors if on_cpu else self._errors_of(self._first(target, torch.float32))

    def _outputs(self, target: Target, dtype: torch.dtype) -> list[Outputs]:
        """What the target makes of every batch, on the CPU.

        Raises:
            ValueError: an input was modified.
        """
        results = []
        for given in self._inputs:
            inputs, before = _placed(given, dtype, target.device), _placed(given, dtype)
            with _dispatch.backend(target.backend), torch.enable_grad():
                results.append({name: value.detach().cpu() for name, value in self.case.run(inputs).items()})
            for name, value in inputs.items():
                if isinstance(value, Tensor) and not identical(value.detach().cpu(), before[name]):
                    raise ValueError(f"it modified its input {name}")
        return results

    def judge(self, target: Target, dtype: torch.dtype) -> Outcome:
        """Compares values and gradients with float64; kernels must also repeat them, in poisoned memory, bit by bit."""
        actual, standard = self._first(target, dtype), self._standard(target, dtype)
        problem = self._form(actual, dtype)
        worst, error, budget = "", 0.0, 0.0
        if not problem:
            for name in self._pooled:
                found = self._compare(name, _pool(actual, name), standard[name])
                if share(*found) > share(error, budget) or not worst:
                    worst, (error, budget) = name, found
            if not error <= budget:
                problem = f"{worst}: {_describe(error, budget)}"
            elif target.backend != "reference":
                problem = _repeats(actual, lambda: self._outputs(target, dtype))
        return Outcome(target, dtype, self.case.name, len(self._pooled), worst, error, budget, problem)

    def _form(self, actual: list[Outputs], dtype: torch.dtype) -> str:
        """What is wrong with names, shapes and dtypes."""
        for outputs, expected, eager in zip(actual, self._expected, self._eager, strict=True):
            if list(outputs) != list(expected):
                return f"returned {', '.join(outputs)} where the definition returns {', '.join(expected)}"
            for name, value in outputs.items():
                # Gradients and rows have the dtype of the inputs; values float32, or float64 for float64 inputs.
                like = expected if dtype == torch.float64 else eager
                wanted = dtype if name.startswith((GRADIENT, ROWS)) else like[name].dtype
                if value.shape != like[name].shape or value.dtype != wanted:
                    shape = list(like[name].shape)
                    return f"{name}: must be {wanted} {shape}, got {value.dtype} {list(value.shape)}"
        return ""

    def _compare(self, name: str, actual: Tensor, eager_error: float) -> tuple[float, float]:
        """Error and budget; integers and flags must be equal."""
        expected = self._pooled[name]
        if not expected.is_floating_point():
            return 0.0 if torch.equal(actual, expected) else float("inf"), 0.0
        return accuracy_error(actual, expected), accuracy_budget(actual.dtype, eager_error)


def _describe(error: float, budget: float) -> str:
    """What is wrong with a tensor, in words."""
    if error == float("inf"):
        return "differs" if budget == 0.0 else "NaN, infinity or a value that should be 0"
    return f"error {error:.2e} exceeds the budget {budget:.2e}"


def _repeats(actual: list[Outputs], again: Callable[[], list[Outputs]]) -> str:
    """Which output a second run in poisoned memory does not repeat, and why."""
    with poisoned_allocations():
        poisoned = again()
    name = _difference(actual, poisoned)
    if not name:
        return ""
    repeated = _difference(actual, again())
    return f"{repeated}: differs from run to run" if repeated else f"{name}: depends on memory that nothing wrote"


def _difference(first: list[Outputs], second: list[Outputs]) -> str:
    """The first output that is not the same in both."""
    for a, b in zip(first, second, strict=True):
        for name, value in a.items():
            if not identical(value, b[name]):
                return name
    return ""


def identical(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, except that every NaN is the same."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    if torch.equal(_bits(a), _bits(b)):
        return True
    a, b = (value.masked_fill(value.isnan(), float("nan")) for value in (a, b))
    return torch.equal(_bits(a), _bits(b))


def _bits(value: Tensor) -> Tensor:
    return value.reshape(-1).contiguous().view(torch.uint8)


def _placed(inputs: Inputs, dtype: torch.dtype, device: torch.device | None = None) -> Inputs:
    """Copies of the tensors, the floating ones in a dtype, on a device."""
    return {
        name: value.detach().to(device or value.device, dtype if value.is_floating_point() else None, copy=True)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def _pool(results: list[Outputs], name: str) -> Tensor:
    return torch.cat([result[name].flatten() for result in results])

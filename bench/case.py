"""What a benchmark is: a case with its inputs, the providers that compete in it, and the targets set for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.testing import accuracy_budget, accuracy_error

from .target import Target

Inputs = dict[str, Tensor]
Record = dict[str, Any]

SIZES = ("smoke", "full")
compile_backend = "inductor"


@dataclass(frozen=True)
class Provider:
    """One implementation in the competition.

    Attributes:
        name: what the table calls it.
        run: does the work on one set of inputs and returns results, then gradients.
        kind: "ours", "eager" (the baseline of every ratio), "compile", "peer", or "part" (of the work, or what no
            op can undercut: it is neither compared with float64 nor given a rate).
        overwrites: inputs that `run` destroys; they are restored outside the measured time.
        capturable: whether a CUDA graph of calls does what the calls do; not of those that find something kept.
    """

    name: str
    run: Callable[[Inputs], Sequence[Tensor]]
    kind: str
    overwrites: tuple[str, ...] = ()
    capturable: bool = True


def _identity(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Case:
    """One row group of the table.

    Attributes:
        op: the public function. The first floating input, or else the first, decides its backend.
        name: shape, dtype and variant; unique within the op.
        make: inputs for a device and a size ("smoke": tiny, only to see that everything runs).
        providers: who competes; exactly one is of kind "eager".
        bytes_moved: fewest bytes that the work has to move; None where bandwidth says nothing.
        operations: fewest floating-point operations that the work takes (a multiply-add counts as two); None where
            their rate says nothing.
        matmul_dtype: operands of the matrix product whose measured rate is the limit of `operations`.
        beside_bfloat16: whether the rate is put beside the measured one of bfloat16, too: products of FP8.
        targets: what the design promises.
        clock: "device" (CUDA graph on a GPU, wall clock on a CPU) or "host" (what a call costs the calling thread).
        sample_inputs, sample_outputs: the part that is compared with float64, where the whole would take too long.
        definition: gives that part of the outputs at once, where the baseline in float64 would not fit into memory.
        quick: whether `--quick` keeps the case.
        memory: whether peak memory is measured, and the bytes that it is put in proportion to.
        results_are_extra: whether peak memory includes what a provider returns; not where everybody has to return
            gradients of the size of the inputs.
        absent: providers that would compete if they were installed here.
    """

    op: str
    name: str
    make: Callable[[str, str], Inputs]
    providers: tuple[Provider, ...]
    bytes_moved: int | None = None
    operations: int | None = None
    matmul_dtype: torch.dtype | None = None
    beside_bfloat16: bool = False
    targets: tuple[Target, ...] = ()
    clock: str = "device"
    sample_inputs: Callable[[Inputs], Inputs] = _identity
    sample_outputs: Callable[[Sequence[Tensor]], Sequence[Tensor]] = _identity
    definition: Callable[[Inputs], Sequence[Tensor]] | None = None
    quick: bool = False
    memory: int | None = None
    results_are_extra: bool = True
    absent: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.operations is None) != (self.matmul_dtype is None):
            raise ValueError(f"{self.op}, {self.name}: operations and matmul_dtype go together")
        if self.beside_bfloat16 and self.matmul_dtype in (None, torch.bfloat16):
            raise ValueError(f"{self.op}, {self.name}: beside_bfloat16 is for products of another dtype")

    @property
    def limit_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes whose measured matmul rates the row names."""
        own = () if self.matmul_dtype is None else (self.matmul_dtype,)
        return (*own, torch.bfloat16) if self.beside_bfloat16 else own

    def provider(self, name: str) -> Provider:
        return next(provider for provider in self.providers if provider.name == name)

    @property
    def eager(self) -> Provider:
        return next(provider for provider in self.providers if provider.kind == "eager")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at the first call, for that call's shapes; a graph break is an error."""
    cached: dict[str, Callable[..., Any]] = {}

    def call(*arguments: Any) -> Any:
        if compile_backend not in cached:
            cached[compile_backend] = torch.compile(function, backend=compile_backend, fullgraph=True, dynamic=False)
        return cached[compile_backend](*arguments)

    return call


def copy_inputs(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Fresh leaves with the same values; floating tensors become `dtype` if it is given."""
    copies = {}
    for name, value in inputs.items():
        floating = value.dtype.is_floating_point and dtype is not None
        copy = value.detach().to(dtype if floating else value.dtype, copy=True)
        copies[name] = copy.requires_grad_(value.requires_grad)
    return copies


def with_gradients(outputs: Sequence[Tensor], upstreams: Sequence[Tensor], leaf: Tensor) -> tuple[Tensor, ...]:
    """The outputs, detached, and the gradient of `leaf` for these upstream gradients."""
    upstreams = [upstream.to(output.dtype) for upstream, output in zip(upstreams, outputs, strict=True)]
    (gradient,) = torch.autograd.grad(outputs, leaf, upstreams)
    return (*(output.detach() for output in outputs), gradient)


class Gate:
    """The accuracy budget of a case: the baseline evaluated in float64 and in float32 on the same values."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._case = case
        define = case.definition or case.eager.run
        sample = inputs if case.definition else case.sample_inputs(inputs)
        self._expected = [t.detach().cpu() for t in define(copy_inputs(sample, torch.float64))]
        eager = define(copy_inputs(sample, torch.float32))
        errors = [accuracy_error(t, expected) for t, expected in zip(eager, self._expected, strict=True)]
        # The rounding errors of a single number may cancel by luck: it is held to those of the call's other outputs.
        self._eager_errors = [
            max(errors) if expected.numel() == 1 else error
            for error, expected in zip(errors, self._expected, strict=True)
        ]

    def problem(self, provider: Provider, inputs: Inputs) -> str:
        """How the provider misses the budget on these inputs (which it may overwrite), or ""."""
        outputs = [t.detach().cpu() for t in self._case.sample_outputs(provider.run(inputs))]
        if len(outputs) != len(self._expected):
            return f"returned {len(outputs)} tensors, expected {len(self._expected)}"
        for index, (actual, expected, eager) in enumerate(
            zip(outputs, self._expected, self._eager_errors, strict=True)
        ):
            try:
                error = accuracy_error(actual, expected)
            except ValueError as mismatch:
                return str(mismatch)
            budget = accuracy_budget(actual.dtype, eager)
            if not error <= budget:
                return f"tensor {index}: error {error:.3e} exceeds the budget {budget:.3e} (eager float32: {eager:.3e})"
        return ""

"""What is timed: products of the benchmarks' models, with segments of equal sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from bench import moe_definitions as definitions
from bench.case import Inputs
from bench.moe_definitions import DEEPSEEK, GPT_OSS_SMALL, QWEN, Model
from bench.tune.candidates import Choice
from grpo_kernels.fp8_quantize.layout import DATA_DTYPE, empty_scale, tiles
from grpo_kernels.grouped_gemm import ops
from grpo_kernels.grouped_gemm._fp8_config_triton import LARGE_MEMORY, LaunchConfig, family, row_blocks


@dataclass(frozen=True)
class Problem:
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

    def on(self, device: str) -> Problem:
        """A tiny one on a CPU, to see that everything runs."""
        return self if device == "cuda" else Problem(definitions.tiny(self.model), self.down, 128)


@dataclass(frozen=True)
class Group:
    """Problems that share an entry of a table."""

    op: str  # "product", "wgrad"
    size: str  # "few" or "many" rows of an expert; "aligned" or "narrow" rows of the accumulator
    problems: tuple[Problem, ...]

    @property
    def text(self) -> str:
        return f"{self.op} {self.size}"


_RANK = DEEPSEEK.fewer(32)
_FIRST, _SECOND = Problem(_RANK, False, 1024), Problem(_RANK, True, 1024)
GROUPS = (
    Group("product", "many", (_FIRST, _SECOND, Problem(GPT_OSS_SMALL, False, 512))),
    Group("product", "few", (Problem(QWEN, False, 256), Problem(GPT_OSS_SMALL, True, 128))),
    Group("wgrad", "aligned", (_FIRST, Problem(QWEN, True, 256))),
    Group("wgrad", "narrow", (Problem(QWEN.fewer(8), False, 1024),)),
)
"""In order of value: what there is no time for stays as it is."""


def groups(architecture: int) -> list[Group]:
    """Those whose kernels an architecture has."""
    has = {"product": architecture >= 89, "wgrad": architecture in LARGE_MEMORY}
    return [group for group in GROUPS if has[group.op]]


def _codes(device: str, *shape: int) -> Tensor:
    return (torch.randn(shape, device=device, dtype=torch.bfloat16) * 100).clamp_(-448, 448).to(DATA_DTYPE)


def _scales(data: Tensor, *shape: int) -> Tensor:
    return torch.exp2(torch.randint(-8, 8, shape, device=data.device).float())


def _rows(device: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Quantised by tiles of 1 x 128."""
    data = _codes(device, height, width)
    scale = empty_scale(data, (), height, width, square=False)
    return data, scale.copy_(_scales(data, height, tiles(width)))


def make(group: Group, problem: Problem, device: str) -> Inputs:
    """Random operands; as many rows for every expert."""
    experts, rows, width, columns = problem.shape
    offsets = (torch.arange(1, experts + 1, device=device) * problem.rows).int()
    if group.op == "product":
        x, scale = _rows(device, rows, width)
        weight = _codes(device, experts, columns, width)
        weight_scale = _scales(weight, experts, tiles(columns), tiles(width))
        return {"x": x, "scale": scale, "weight": weight, "weight_scale": weight_scale, "offsets": offsets}
    x, scale = _rows(device, width, rows)
    grad, grad_scale = _rows(device, columns, rows)
    made = {"x": x, "scale": scale, "grad": grad, "grad_scale": grad_scale, "offsets": offsets}
    if group.size == "narrow":
        made["accumulator"] = torch.zeros(experts, columns, width + 1, device=device)
    return made


@contextlib.contextmanager
def using(group: Group, choice: Choice, width: int) -> Iterator[None]:
    """Makes the launcher take this configuration, whatever the table says."""
    module = "_fp8_triton.launch_config" if group.op == "product" else "_fp8_wgrad_triton.wgrad_config"
    *head, mib = choice
    config = LaunchConfig(*head, row_blocks(mib, choice.block_m, width))
    with mock.patch(f"grpo_kernels.grouped_gemm.{module}", return_value=config):
        yield


def run(group: Group, inputs: Inputs, choice: Choice) -> tuple[Tensor, ...]:
    """The op with this configuration. An accumulator is not returned."""
    backend = "triton" if inputs["x"].is_cuda else "native"
    *operands, offsets = (value for name, value in inputs.items() if name != "accumulator")
    with using(group, choice, inputs["x"].shape[-1]):
        if group.op == "product":
            return (ops.fp8_grouped_gemm(*operands, offsets, None, torch.bfloat16, backend),)
        if group.size == "aligned":
            return (ops.fp8_grouped_gemm_wgrad(*operands, offsets, torch.bfloat16, backend),)
        ops.fp8_grouped_gemm_wgrad_add_(*operands, offsets, inputs["accumulator"][..., :-1], backend)
        return ()


def result(group: Group, inputs: Inputs, choice: Choice) -> Tensor:
    """What one run of it gives, also where that is added to an accumulator."""
    if "accumulator" not in inputs:
        return run(group, inputs, choice)[0]
    inputs["accumulator"].zero_()
    run(group, inputs, choice)
    return inputs["accumulator"].clone()


def family_of(capability: str) -> int:
    """Of a compute capability such as "9.0", or 0 where there is nothing to tune."""
    major, minor = map(int, capability.split("."))
    architecture = 10 * major + minor
    return family(architecture) if groups(architecture) else 0

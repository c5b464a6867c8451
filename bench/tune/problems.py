"""What is timed, in order of value, and how a configuration reaches its kernel."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.case import Inputs
from bench.moe_definitions import DEEPSEEK, GPT_OSS_SMALL, QWEN
from bench.tune import experts, fp8, heads, tiles
from bench.tune.candidates import AnyChoice
from bench.tune.experts import Experts
from bench.tune.heads import Head
from grpo_kernels.grouped_gemm._config_triton import LARGE_MEMORY

Problem = Experts | Head


@dataclass(frozen=True)
class Group:
    """Problems that share an entry of a table."""

    op: str  # "product", "wgrad": of FP8; "grouped", "grouped_wgrad"; "forward", "dlogits": of a linear head
    size: str  # the class: rows of an expert, rows of the accumulator, or bits and what a head has
    problems: tuple[Problem, ...]

    @property
    def text(self) -> str:
        return f"{self.op} {self.size}"

    @property
    def package(self) -> str:
        """Whose table it is."""
        return "linear_log_probs" if self.op in heads.OPS else "grouped_gemm"


_RANK = DEEPSEEK.fewer(32)
_FIRST, _SECOND = Experts(_RANK, False, 1024), Experts(_RANK, True, 1024)
_FEW = (Experts(QWEN, False, 64), Experts(GPT_OSS_SMALL, True, 64))
_LLAMA, _QWEN = Head("Llama-3.1-8B", 128256, 4096, 4096), Head("Qwen3-4B", 151936, 2560, 4096)
_GEMMA = Head("Gemma-2-9B", 256000, 3584, 2048)
_SHORT = Head("Llama-3.1-8B", 128256, 4096, 512)
GROUPS = (
    Group("forward", "16-bit plain", (_LLAMA, _QWEN)),
    Group("dlogits", "16-bit plain", (_LLAMA,)),
    Group("product", "many", (_FIRST, _SECOND, Experts(GPT_OSS_SMALL, False, 512))),
    Group("grouped", "16-bit many", (Experts(GPT_OSS_SMALL, False, 512), _SECOND)),
    Group("grouped_wgrad", "16-bit many", (_FIRST, Experts(QWEN, True, 256))),
    Group("product", "few", (Experts(QWEN, False, 256), Experts(GPT_OSS_SMALL, True, 128))),
    Group("grouped", "16-bit few", _FEW),
    Group("grouped_wgrad", "16-bit few", _FEW[:1]),
    Group("wgrad", "aligned", (_FIRST, Experts(QWEN, True, 256))),
    Group("wgrad", "narrow", (Experts(QWEN.fewer(8), False, 1024),)),
    Group("forward", "16-bit lora", (_LLAMA,)),
    Group("dlogits", "16-bit lora", (_LLAMA,)),
    Group("forward", "16-bit capped", (_GEMMA,)),
    Group("dlogits", "16-bit capped", (_GEMMA,)),
    Group("forward", "32-bit plain", (_SHORT,)),
    Group("dlogits", "32-bit plain", (_SHORT,)),
    Group("grouped", "32-bit many", (Experts(QWEN.fewer(8), False, 256),)),
    Group("grouped_wgrad", "32-bit many", (Experts(QWEN.fewer(8), False, 256),)),
)
"""In order of value: what there is no time for stays as it is."""


def groups(architecture: int) -> list[Group]:
    """Those whose kernels an architecture has."""
    has = {"product": architecture >= 89, "wgrad": architecture in LARGE_MEMORY}
    return [group for group in GROUPS if has.get(group.op, architecture >= 80)]


def backend_of(tensor: Tensor) -> str:
    """Triton's kernels on a GPU and in its interpreter; else the CPU's own, which take no configuration."""
    return "triton" if tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1" else "native"


def architecture_of(tensor: Tensor) -> int:
    """Whose entry is tried; in a rehearsal that of sm_90."""
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def make(group: Group, problem: Problem, device: str) -> Inputs:
    """Random operands."""
    if isinstance(problem, Head):
        return heads.make(group.op, group.size, problem, device, backend_of(torch.empty(0, device=device)))
    module = fp8 if group.op in fp8.OPS else experts
    return module.make(group.op, group.size, problem, device)


def using(group: Group, choice: AnyChoice, inputs: Inputs) -> contextlib.AbstractContextManager[object]:
    """Makes the launcher take this configuration, whatever the table says."""
    first = next(iter(inputs.values()))
    if group.op in fp8.OPS:
        return fp8.using(group.op, choice, first.shape[-1])
    return mock.patch.dict(tiles.TABLES[group.op], {(architecture_of(first), group.size): tuple(choice)})


def run(group: Group, inputs: Inputs, choice: AnyChoice) -> tuple[Tensor, ...]:
    """The op with this configuration. An accumulator is not returned."""
    backend = backend_of(next(iter(inputs.values())))
    module: Any = fp8 if group.op in fp8.OPS else heads if group.op in heads.OPS else experts
    with using(group, choice, inputs):
        found: tuple[Tensor, ...] = module.run(group.op, group.size, inputs, backend)
        return found


def result(group: Group, inputs: Inputs, choice: AnyChoice) -> Tensor:
    """What one run of it gives, also where that is added to an accumulator."""
    if group.op in heads.OPS:
        backend = backend_of(inputs["hidden"])
        with using(group, choice, inputs):
            return torch.stack(heads.run(group.op, group.size, inputs, backend, summed=True))
    if "accumulator" not in inputs:
        return run(group, inputs, choice)[0]
    inputs["accumulator"].zero_()
    run(group, inputs, choice)
    return inputs["accumulator"].clone()


def _same_bits(found: Tensor, wanted: Tensor) -> dict[str, Any]:
    if torch.equal(found, wanted):
        return {"held": True}
    error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    return {"held": False, "why": "other bits", "difference": float(error)}


def judge(group: Group, inputs: Inputs, first: AnyChoice) -> Callable[[AnyChoice], dict[str, Any]]:
    """What tells whether a candidate's result may be used.

    The log-probs of a head: as exact as the accuracy budget asks for, and the same however many rows there are; their
    configuration is chosen by the head, never by the rows. All else: the default's bits, since there the number of rows
    chooses, or the backward has to form the logits of the forward again.
    """
    if group.op == "forward":
        exact = heads.Judge(group.size, inputs)
        return lambda choice: exact.verdict(
            result(group, inputs, choice), lambda fewer: result(group, fewer, choice)
        )  # fmt: skip
    wanted = result(group, inputs, first)
    return lambda choice: _same_bits(result(group, inputs, choice), wanted)

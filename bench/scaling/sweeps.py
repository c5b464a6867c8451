"""The sweeps of one process: cases of the benchmarks with one size that changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from .. import (
    bench_group_advantages,
    bench_grpo_loss,
    bench_linear_log_probs,
    bench_moe_experts,
    bench_moe_permute,
    bench_moe_router,
    bench_token_log_probs,
)
from ..bench_linear_log_probs import LOSS
from ..case import Case
from ..moe_definitions import DEEPSEEK, QWEN

_KINDS = ("ours", "eager")
_THIN = dataclasses.replace(QWEN, hidden=256, width=128)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One op along one axis.

    Attributes:
        axis: the letter of the size that changes.
        what: what it counts.
        fixed: the sizes that do not change.
        make: the case of a size.
        compiled: whether torch.compile takes part: each size is a compilation.
        memory: whether peak memory is measured; not where a few kilobytes say nothing.
    """

    op: str
    axis: str
    what: str
    fixed: str
    sizes: tuple[int, ...]
    make: Callable[[int], Case]
    compiled: bool = False
    memory: bool = False

    def case(self, size: int) -> Case:
        """The case of a size, with the providers that are compared."""
        made = self.make(size)
        kinds = (*_KINDS, "compile") if self.compiled else _KINDS
        kept = tuple(p for p in made.providers if p.kind in kinds and p.name != "ours, save=input")
        name = f"{self.axis}={size}"
        return dataclasses.replace(made, name=name, providers=kept, targets=(), memory=int(self.memory), absent=())

    def tiny(self) -> Sweep:
        """The first two sizes."""
        return dataclasses.replace(self, sizes=self.sizes[:2])


def _doubled(first: int, last: int, factor: int = 2) -> tuple[int, ...]:
    found = [first]
    while found[-1] * factor <= last:
        found.append(found[-1] * factor)
    return tuple(found)


def _token_log_probs() -> Iterator[Sweep]:
    def case(rows: int, vocab: int) -> Case:
        return bench_token_log_probs.case("cpu", (4, rows // 4, vocab), torch.float32, True)

    both = {"compiled": True, "memory": True}
    yield Sweep(
        "token_log_probs", "N", "rows", "V = 32000, float32, with entropy, forward and backward",
        _doubled(64, 1024), lambda rows: case(rows, 32000), **both,
    )  # fmt: skip
    yield Sweep(
        "token_log_probs", "V", "vocabulary", "N = 256, float32, with entropy, forward and backward",
        _doubled(4096, 262144, 4), lambda vocab: case(256, vocab), **both,
    )  # fmt: skip


def _linear_grpo_loss() -> Iterator[Sweep]:
    def case(rows: int, width: int, vocab: int) -> Case:
        return bench_linear_log_probs.case(LOSS, "cpu", (rows, width, vocab), torch.float32)

    parts = "float32, clip + k3, forward and backward"
    yield Sweep(
        "linear_grpo_loss", "N", "rows", f"H = 512, V = 32000, {parts}",
        _doubled(32, 512), lambda rows: case(rows, 512, 32000), memory=True,
    )  # fmt: skip
    yield Sweep(
        "linear_grpo_loss", "V", "vocabulary", f"N = 128, H = 512, {parts}",
        _doubled(8000, 128000), lambda vocab: case(128, 512, vocab), memory=True,
    )  # fmt: skip
    yield Sweep(
        "linear_grpo_loss", "H", "hidden width", f"N = 128, V = 32000, {parts}",
        _doubled(128, 2048), lambda width: case(128, width, 32000), memory=True,
    )  # fmt: skip


def _grpo_loss() -> Iterator[Sweep]:
    def case(batch: int, tokens: int) -> Case:
        return bench_grpo_loss.case("cpu", (batch, tokens), "clip + k3")

    parts = "clip + k3, forward and backward"
    yield Sweep(
        "grpo_loss", "T", "tokens of a sequence", f"B = 16, {parts}",
        _doubled(128, 32768, 4), lambda tokens: case(16, tokens), compiled=True, memory=True,
    )  # fmt: skip
    yield Sweep(
        "grpo_loss", "B", "sequences", f"T = 1024, {parts}",
        _doubled(2, 512, 4), lambda batch: case(batch, 1024), compiled=True, memory=True,
    )  # fmt: skip


def _group_advantages() -> Iterator[Sweep]:
    group = bench_group_advantages.GROUP
    yield Sweep(
        "group_advantages", "groups", "groups", f"{group} samples each",
        _doubled(16, 65536, 8), lambda groups: bench_group_advantages.case("cpu", group * groups), compiled=True,
    )  # fmt: skip


def _moe_router() -> Iterator[Sweep]:
    def case(tokens: int, experts: int) -> Case:
        model = dataclasses.replace(DEEPSEEK, experts=experts)
        return bench_moe_router.case("cpu", model, torch.float32, tokens=tokens)

    parts = "K = 8, the gate of DeepSeek-V3, forward and backward"
    yield Sweep("moe_router", "T", "tokens", f"E = 256, {parts}", _doubled(256, 16384, 4), lambda t: case(t, 256))
    yield Sweep("moe_router", "E", "experts", f"T = 4096, {parts}", _doubled(32, 512), lambda e: case(4096, e))


def _build_permutation() -> Iterator[Sweep]:
    def case(tokens: int, experts: int) -> Case:
        return bench_moe_permute.map_case("cpu", dataclasses.replace(QWEN, experts=experts), tokens)

    yield Sweep("build_permutation", "T", "tokens", "E = 128, K = 8", _doubled(256, 65536, 4), lambda t: case(t, 128))
    yield Sweep("build_permutation", "E", "experts", "T = 4096, K = 8", _doubled(16, 512), lambda e: case(4096, e))


def _moe_permute() -> Iterator[Sweep]:
    def case(tokens: int, experts: int) -> Case:
        model = dataclasses.replace(QWEN, experts=experts)
        return bench_moe_permute.move_case("cpu", model, tokens, torch.bfloat16, back=False, backward=True)

    parts = "K = 8, H = 2048, bfloat16, forward and backward"
    yield Sweep("moe_permute", "T", "tokens", f"E = 128, {parts}", _doubled(64, 4096, 4), lambda t: case(t, 128))
    yield Sweep("moe_permute", "E", "experts", f"T = 1024, {parts}", _doubled(16, 512), lambda e: case(1024, e))


def _moe_experts() -> Iterator[Sweep]:
    def case(tokens: int, experts: int) -> Case:
        model = dataclasses.replace(_THIN, experts=experts)
        return bench_moe_experts.case("cpu", model, tokens, torch.float32)

    parts = "K = 8, H = 256, I = 128, float32, forward and backward"
    yield Sweep(
        "moe_experts", "T", "tokens", f"E = 64, {parts}", _doubled(64, 4096, 4), lambda t: case(t, 64), memory=True
    )
    yield Sweep(
        "moe_experts", "E", "experts", f"T = 1024, {parts}", _doubled(16, 256), lambda e: case(1024, e), memory=True
    )


OPS: dict[str, Callable[[], Iterator[Sweep]]] = {
    "token_log_probs": _token_log_probs,
    "linear_grpo_loss": _linear_grpo_loss,
    "grpo_loss": _grpo_loss,
    "group_advantages": _group_advantages,
    "moe_router": _moe_router,
    "build_permutation": _build_permutation,
    "moe_permute": _moe_permute,
    "moe_experts": _moe_experts,
}


def of(ops: Sequence[str]) -> list[Sweep]:
    """The sweeps of these ops."""
    return [sweep for op in ops for sweep in OPS[op]()]


def choose(device: str, ops: Sequence[str], quick: bool) -> list[Case]:
    """Every case of these ops, as a process that measures memory asks for them."""
    return [sweep.case(size) for sweep in of(ops) for size in sweep.sizes]

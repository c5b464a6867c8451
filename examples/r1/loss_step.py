"""The loss step by itself, from hidden states to gradients: this package against eager PyTorch on the same tensors."""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from examples.r1.grpo import GRPOStage, LossInputs
from grpo_kernels import FusedLMHead


class LossStepResult(NamedTuple):
    """The loss, and its gradients with respect to the hidden states and the head's weight."""

    loss: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


LossStep = Callable[[GRPOStage, FusedLMHead, Tensor, LossInputs], LossStepResult]
"""Settings, head, hidden states [B, C, width] that require a gradient, and the rest."""


class LossStepComparison(NamedTuple):
    """Measurements of one loss step. Memory is what the step needs beyond its inputs at its peak."""

    rows: int
    columns: int
    width: int
    vocabulary: int
    seconds: float
    eager_seconds: float
    peak_bytes: int
    eager_peak_bytes: int


def fused_step(stage: GRPOStage, head: FusedLMHead, hidden: Tensor, inputs: LossInputs) -> LossStepResult:
    """The loss step as training does it."""
    return _with_gradients(stage.loss(head, hidden, inputs).loss, head, hidden)


def eager_step(stage: GRPOStage, head: FusedLMHead, hidden: Tensor, inputs: LossInputs) -> LossStepResult:
    """The same in plain PyTorch, in the dtype of the head: what a trainer writes that does not use this package."""
    settings, mask = stage.settings, inputs.sequences.mask
    all_log_probs = torch.log_softmax(F.linear(hidden, head.weight) / settings.temperature, dim=-1)
    log_probs = all_log_probs.gather(-1, inputs.sequences.completions.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():  # a metric that trainers log
        entropy = -(all_log_probs.exp() * all_log_probs).sum(dim=-1)
        _ = (entropy * mask).sum() / mask.sum()
    ratio = torch.exp(log_probs - inputs.old_log_probs)
    clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
    advantages = inputs.advantages.to(hidden.dtype).unsqueeze(1)
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages)
    gap = inputs.ref_log_probs - log_probs
    kl = torch.exp(gap) - gap - 1
    per_token = (policy_loss + settings.kl_coef * kl) * mask
    loss = (per_token.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()
    return _with_gradients(loss, head, hidden)


def _with_gradients(loss: Tensor, head: FusedLMHead, hidden: Tensor) -> LossStepResult:
    return LossStepResult(loss.detach(), *torch.autograd.grad(loss, (hidden, head.weight)))


def in_float64(head: FusedLMHead, hidden: Tensor, inputs: LossInputs) -> tuple[FusedLMHead, Tensor, LossInputs]:
    """Arguments of a loss step in float64."""
    numbers = ("old_log_probs", "ref_log_probs", "advantages")
    double = inputs._replace(**{name: getattr(inputs, name).double() for name in numbers})
    return copy.deepcopy(head).double(), _leaf(hidden.double()), double


def assert_same(stage: GRPOStage, hidden: Tensor, inputs: LossInputs) -> None:
    """Raises unless loss and gradients equal those of eager PyTorch in float64; see `assert_close`."""
    head = stage.model.head
    expected = eager_step(stage, *in_float64(head, hidden, inputs))
    eager = eager_step(stage, head, _leaf(hidden), inputs)
    actual = fused_step(stage, head, _leaf(hidden), inputs)
    assert_close(actual, expected, eager)


def assert_close(actual: LossStepResult, expected: LossStepResult, eager: LossStepResult) -> None:
    """Raises unless loss and gradients in `actual` are as good as those of eager PyTorch in float32.

    A gradient may be twice as far from float64 as that of eager PyTorch, plus one rounding, in the Euclidean norm.
    The loss is a sum that nearly cancels (advantages have mean zero): it gets PyTorch's usual tolerance.
    """
    torch.testing.assert_close(actual.loss, expected.loss.to(actual.loss.dtype))
    for name, gradient, exact, plain in zip(actual._fields[1:], actual[1:], expected[1:], eager[1:], strict=True):
        error, eager_error = relative_error(gradient, exact), relative_error(plain, exact)
        budget = 2 * eager_error + torch.finfo(gradient.dtype).eps
        if not error <= budget:
            raise AssertionError(f"{name}: the error {error:.2e} exceeds {budget:.2e} (eager: {eager_error:.2e})")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, Euclidean, in float64."""
    return float(torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected))


def compare(stage: GRPOStage, index: int, repeats: int = 20) -> LossStepComparison:
    """Checks, then measures, the loss step on the samples of step `index`. The two take turns."""
    inputs = stage.loss_inputs(stage.sample(index), index)
    with torch.no_grad():
        hidden = stage.model.completion_hidden(inputs.sequences.prompts, inputs.sequences.completions, inputs.routes)
    assert_same(stage, hidden, inputs)
    steps = (fused_step, eager_step)
    peaks = [_peak_bytes(step, stage, hidden, inputs) for step in steps]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for step, seconds in zip(steps, times, strict=True):
            seconds.append(_seconds(step, stage, hidden, inputs))
    sizes = (*hidden.shape, stage.model.head.out_features)
    return LossStepComparison(*sizes, *map(median, times), *peaks)


def _leaf(hidden: Tensor) -> Tensor:
    """A copy that gets a gradient."""
    return hidden.clone().requires_grad_()


def _seconds(step: LossStep, stage: GRPOStage, hidden: Tensor, inputs: LossInputs) -> float:
    leaf = _leaf(hidden)
    if hidden.is_cuda:
        torch.cuda.synchronize()
    start = perf_counter()
    step(stage, stage.model.head, leaf, inputs)
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return perf_counter() - start


def _peak_bytes(step: LossStep, stage: GRPOStage, hidden: Tensor, inputs: LossInputs) -> int:
    leaf, head = _leaf(hidden), stage.model.head
    if hidden.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(stage, head, leaf, inputs)
        return torch.cuda.max_memory_allocated() - before
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(stage, head, leaf, inputs)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    level = peak = 0
    for event in memory:
        level += event["args"]["Bytes"]
        peak = max(peak, level)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Some builds of the profiler announce themselves on the process's standard error."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)

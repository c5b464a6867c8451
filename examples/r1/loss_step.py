"""The loss step by itself, from logits to their gradient: this package against eager PyTorch on the same tensors."""

from __future__ import annotations

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
from torch.profiler import ProfilerActivity, profile

from examples.r1.grpo import GRPOStage, LossInputs
from grpo_kernels import token_log_probs

LossStep = Callable[[GRPOStage, Tensor, LossInputs], tuple[Tensor, Tensor]]
"""Settings, logits [B, C, V] and the rest -> loss and d loss / d logits."""


class LossStepComparison(NamedTuple):
    """Measurements of one loss step. Memory is what the step needs beyond its inputs at its peak."""

    rows: int
    columns: int
    vocabulary: int
    seconds: float
    eager_seconds: float
    peak_bytes: int
    eager_peak_bytes: int


def fused_step(stage: GRPOStage, logits: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """The loss step as training does it."""
    policy = token_log_probs(
        logits,
        inputs.sequences.completions,
        temperature=stage.settings.temperature,
        mask=inputs.sequences.mask,
        outputs=("entropy",),
        inplace_backward=True,
    )
    loss = stage.loss(policy.log_probs, policy.entropy, inputs).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


def eager_step(stage: GRPOStage, logits: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, in the dtype of the logits: what a trainer writes that does not use this package."""
    settings, mask = stage.settings, inputs.sequences.mask
    all_log_probs = torch.log_softmax(logits / settings.temperature, dim=-1)
    log_probs = all_log_probs.gather(-1, inputs.sequences.completions.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():  # a metric that trainers log
        entropy = -(all_log_probs.exp() * all_log_probs).sum(dim=-1)
        _ = (entropy * mask).sum() / mask.sum()
    ratio = torch.exp(log_probs - inputs.old_log_probs)
    clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
    advantages = inputs.advantages.to(logits.dtype).unsqueeze(1)
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages)
    gap = inputs.ref_log_probs - log_probs
    kl = torch.exp(gap) - gap - 1
    per_token = (policy_loss + settings.kl_coef * kl) * mask
    loss = (per_token.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


def assert_same(stage: GRPOStage, logits: Tensor, inputs: LossInputs) -> None:
    """Raises unless loss and gradient equal those of eager PyTorch in float64; see `assert_close`."""
    double = LossInputs(inputs.sequences, *(tensor.double() for tensor in inputs[1:]))
    expected = eager_step(stage, _leaf(logits.double()), double)
    eager = eager_step(stage, _leaf(logits), inputs)
    actual = fused_step(stage, _leaf(logits), inputs)
    assert_close(actual, expected, eager)


def assert_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], eager: tuple[Tensor, Tensor]) -> None:
    """Raises unless loss and gradient in `actual` are as good as those of eager PyTorch in float32.

    The gradient may be twice as far from float64 as that of eager PyTorch, plus one rounding, in the Euclidean norm.
    The loss is a sum that nearly cancels (advantages have mean zero): it gets PyTorch's usual tolerance.
    """
    torch.testing.assert_close(actual[0], expected[0].to(actual[0].dtype))
    error, eager_error = (relative_error(gradient, expected[1]) for gradient in (actual[1], eager[1]))
    budget = 2 * eager_error + torch.finfo(actual[1].dtype).eps
    if not error <= budget:
        raise AssertionError(f"the gradient's error {error:.2e} exceeds {budget:.2e} (eager: {eager_error:.2e})")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, Euclidean, in float64."""
    return float(torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected))


def compare(stage: GRPOStage, index: int, repeats: int = 20) -> LossStepComparison:
    """Checks, then measures, the loss step on the samples of step `index`. The two take turns."""
    inputs = stage.loss_inputs(stage.sample(index), index)
    with torch.no_grad():
        logits = stage.model.completion_logits(inputs.sequences.prompts, inputs.sequences.completions)
    assert_same(stage, logits, inputs)
    steps = (fused_step, eager_step)
    peaks = [_peak_bytes(step, stage, logits, inputs) for step in steps]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for step, seconds in zip(steps, times, strict=True):
            seconds.append(_seconds(step, stage, logits, inputs))
    return LossStepComparison(*logits.shape, *map(median, times), *peaks)


def _leaf(logits: Tensor) -> Tensor:
    """A fresh copy, which the step may overwrite."""
    return logits.clone().requires_grad_()


def _seconds(step: LossStep, stage: GRPOStage, logits: Tensor, inputs: LossInputs) -> float:
    leaf = _leaf(logits)
    if logits.is_cuda:
        torch.cuda.synchronize()
    start = perf_counter()
    step(stage, leaf, inputs)
    if logits.is_cuda:
        torch.cuda.synchronize()
    return perf_counter() - start


def _peak_bytes(step: LossStep, stage: GRPOStage, logits: Tensor, inputs: LossInputs) -> int:
    leaf = _leaf(logits)
    if logits.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(stage, leaf, inputs)
        return torch.cuda.max_memory_allocated() - before
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(stage, leaf, inputs)
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

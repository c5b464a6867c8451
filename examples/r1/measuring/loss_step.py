"""The loss step by itself, from hidden states to gradients: this package against eager PyTorch on the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import grpo_kernels
from examples.r1.measuring.allocations import peak_bytes
from examples.r1.randomness import torch_rng
from examples.r1.stages.grpo import LossInputs, RLStage
from grpo_kernels import FusedLMHead

EAGER_PRESET = "grpo"  # whose loss `eager_step` writes out
_OFF_POLICY = 0.1  # nats a token; on policy, where all ratios are 1, rounding decides about kinks


class LossStepResult(NamedTuple):
    """The loss, and its gradients with respect to the hidden states and the head's weight."""

    loss: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


LossStep = Callable[[RLStage, FusedLMHead, Tensor, LossInputs], LossStepResult]
"""Stage, head, hidden states [B, C, width] that require a gradient, and the rest."""


class LossStepComparison(NamedTuple):
    """Measurements of one loss step. Memory is what the step needs beyond its inputs at its peak.

    Without an eager step for the preset, its figures are None and the note says so.
    """

    rows: int
    columns: int
    width: int
    vocabulary: int
    seconds: float
    eager_seconds: float | None
    peak_bytes: int
    eager_peak_bytes: int | None
    note: str = ""


def fused_step(stage: RLStage, head: FusedLMHead, hidden: Tensor, inputs: LossInputs) -> LossStepResult:
    """The loss step as training does it."""
    return _with_gradients(stage.loss(head, hidden, inputs).loss, head, hidden)


def eager_step(stage: RLStage, head: FusedLMHead, hidden: Tensor, inputs: LossInputs) -> LossStepResult:
    """The same in plain PyTorch, in the dtype of the head: what a trainer writes that does not use this package.

    It knows the loss of the preset "grpo" and no other.
    """
    config, mask = stage.loss_config, inputs.sequences.mask
    all_log_probs = torch.log_softmax(F.linear(hidden, head.weight) / stage.temperature, dim=-1)
    log_probs = all_log_probs.gather(-1, inputs.sequences.completions.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():  # a metric that trainers log
        entropy = -(all_log_probs.exp() * all_log_probs).sum(dim=-1)
        _ = (entropy * mask).sum() / mask.sum()
    ratio = torch.exp(log_probs - inputs.old_log_probs)
    clipped = ratio.clamp(1 - config.clip_low, 1 + (config.clip_low if config.clip_high is None else config.clip_high))
    advantages = inputs.advantages.to(hidden.dtype).unsqueeze(1)
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages)
    gap = inputs.ref_log_probs - log_probs
    kl = torch.exp(gap) - gap - 1
    per_token = (policy_loss + config.kl_coef * kl) * mask
    of_all_ranks = len(mask) * stage.run.ranks.world
    loss = (per_token.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / of_all_ranks
    return _with_gradients(loss, head, hidden)


def reference_step(stage: RLStage, head: FusedLMHead, hidden: Tensor, inputs: LossInputs) -> LossStepResult:
    """The definition of the loss, in the dtype of the head."""
    torch.manual_seed(0)  # clip_cov draws tokens
    with grpo_kernels.backend("reference"):
        return fused_step(stage, head, hidden, inputs)


def _with_gradients(loss: Tensor, head: FusedLMHead, hidden: Tensor) -> LossStepResult:
    return LossStepResult(loss.detach(), *torch.autograd.grad(loss, (hidden, head.weight)))


def in_float64(head: FusedLMHead, hidden: Tensor, inputs: LossInputs) -> tuple[FusedLMHead, Tensor, LossInputs]:
    """Arguments of a loss step in float64."""
    numbers = ("old_log_probs", "ref_log_probs", "advantages")
    double = inputs._replace(**{name: getattr(inputs, name).double() for name in numbers})
    return copy.deepcopy(head).double(), _leaf(hidden.double()), double


def assert_same(stage: RLStage, head: FusedLMHead, hidden: Tensor, inputs: LossInputs) -> None:
    """Raises unless loss and gradients equal those of the definition in float64; see `assert_close`.

    The yardstick is eager PyTorch in float32; for a preset that it does not know, the definition in float32.
    """
    expected = reference_step(stage, *in_float64(head, hidden, inputs))
    plain = eager_step if has_eager(stage) else reference_step
    eager = plain(stage, head, _leaf(hidden), inputs)
    torch.manual_seed(0)
    actual = fused_step(stage, head, _leaf(hidden), inputs)
    assert_close(actual, expected, eager)


def has_eager(stage: RLStage) -> bool:
    """Whether `eager_step` is the loss of this stage."""
    return stage.settings.preset == EAGER_PRESET


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


def compare(stage: RLStage, index: int, repeats: int = 20) -> LossStepComparison:
    """Checks, then measures, the loss step on the samples of step `index`. This package and eager PyTorch take turns.

    Where `eager_step` does not know the preset's loss, the step is checked and measured all the same, by itself.
    """
    hidden, inputs = _samples(stage, index)
    noise = torch.randn_like(inputs.old_log_probs) * _OFF_POLICY
    inputs = inputs._replace(old_log_probs=inputs.old_log_probs + noise * inputs.sequences.mask)
    return _measure(stage, stage.model.head, hidden, inputs, repeats)


def compare_at(stage: RLStage, index: int, vocabulary: int, samples: int = 16, repeats: int = 5) -> LossStepComparison:
    """The same for a head of `vocabulary` tokens, as real models have, behind the policy's own hidden states.

    Head, tokens and log-probs of the old and the reference policy are random: they cost what others cost.
    """
    hidden, inputs = _samples(stage, index)
    inputs = inputs.select(slice(0, max(1, samples * len(inputs.sequences.prompts) // len(hidden))))
    rows = len(inputs.advantages)
    generator = torch_rng(hidden.device, stage.settings.seed, "vocabulary", vocabulary)
    head = FusedLMHead(nn.Linear(hidden.shape[-1], vocabulary, bias=False, device=hidden.device))
    head.weight.data.normal_(std=hidden.shape[-1] ** -0.5, generator=generator)
    hidden = hidden[:rows]
    tokens = torch.randint(vocabulary, hidden.shape[:2], generator=generator, device=hidden.device)
    with torch.no_grad():
        own = head.token_log_probs(hidden, tokens, temperature=stage.temperature).log_probs
    old, ref = (own + _OFF_POLICY * torch.randn(own.shape, generator=generator, device=own.device) for _ in range(2))
    drawn = inputs.sequences._replace(completions=tokens)
    inputs = inputs._replace(sequences=drawn, old_log_probs=old, ref_log_probs=ref)
    return _measure(stage, head, hidden, inputs, repeats)


def _samples(stage: RLStage, index: int) -> tuple[Tensor, LossInputs]:
    """Hidden states of the samples of step `index`, and what the loss needs beside them."""
    inputs = stage.loss_inputs(stage.sample(index), index)
    if not bool(inputs.advantages.any()):  # all samples earned the same: gradients of nothing are nothing to compare
        inputs = inputs._replace(advantages=torch.randn_like(inputs.advantages))
    with torch.no_grad():
        hidden = stage.model.completion_hidden(inputs.sequences.prompts, inputs.sequences.completions, inputs.routes)
    return hidden, inputs


def _measure(stage: RLStage, head: FusedLMHead, hidden: Tensor, inputs: LossInputs, repeats: int) -> LossStepComparison:
    inputs = inputs._replace(num_items=stage.num_items(inputs.sequences.mask))  # no talk among ranks in what is timed
    assert_same(stage, head, hidden, inputs)
    steps = (fused_step, eager_step) if has_eager(stage) else (fused_step,)
    leaf = _leaf(hidden)
    peaks = [peak_bytes(partial(step, stage, head, leaf, inputs), hidden.device) for step in steps]
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        for step, seconds in zip(steps, times, strict=True):
            seconds.append(_seconds(step, stage, head, hidden, inputs))
    own, eager = [*zip(map(median, times), peaks, strict=True), (None, None)][:2]
    note = "" if has_eager(stage) else f"no eager step for the preset {stage.settings.preset!r}"
    sizes = (*hidden.shape, head.out_features)
    return LossStepComparison(*sizes, own[0], eager[0], own[1], eager[1], note)


def _leaf(hidden: Tensor) -> Tensor:
    """A copy that gets a gradient."""
    return hidden.clone().requires_grad_()


def _seconds(step: LossStep, stage: RLStage, head: FusedLMHead, hidden: Tensor, inputs: LossInputs) -> float:
    leaf = _leaf(hidden)
    if hidden.is_cuda:
        torch.cuda.synchronize()
    start = perf_counter()
    step(stage, head, leaf, inputs)
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return perf_counter() - start

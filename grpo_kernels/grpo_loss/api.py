"""The public loss: argument checks, the choice of a backend, and the autograd function around the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels import _checks, _direct, _dispatch
from grpo_kernels.grpo_loss import ops, reference
from grpo_kernels.grpo_loss.batch_statistics import with_batch_statistics
from grpo_kernels.grpo_loss.config import GRPOLossConfig
from grpo_kernels.grpo_loss.inputs import Subject, check_cu_seqlens, loss_inputs
from grpo_kernels.grpo_loss.metrics import GRPOMetrics
from grpo_kernels.grpo_loss.rows import LossInputs
from grpo_kernels.grpo_loss.upstream import times_upstream

_OP = "grpo_loss"
_DEFAULT_CONFIG = GRPOLossConfig()


class GRPOLossOutput(NamedTuple):
    """What the loss returns.

    Args:
        loss: 0-d, or the shape of log_probs with reduction "none". Differentiable.
        metrics: statistics on the device; ``metrics.to_dict()`` reads them.
        log_probs: None here; `linear_grpo_loss` returns its log-probs, detached.
        entropy: None here; likewise.
    """

    loss: Tensor
    metrics: GRPOMetrics
    log_probs: Tensor | None = None
    entropy: Tensor | None = None


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    config: GRPOLossConfig = _DEFAULT_CONFIG,
    *,
    ref_log_probs: Tensor | None = None,
    sampler_log_probs: Tensor | None = None,
    token_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    kl_coef: Tensor | float | None = None,
    entropy_coef: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
    num_items: Tensor | float | None = None,
    max_length: int | None = None,
) -> GRPOLossOutput:
    """The GRPO policy loss and its published variants, from the log-probs of the sampled tokens.

    Every variant is a map from a token's log-probs and advantage to a loss and its derivative; ``config`` picks it.
    With the default, loss = mean over live tokens of -min(r A, clip(r, 0.8, 1.2) A), r = exp(log_prob -
    old_log_prob). In general::

        token loss = token_weight * sampler_weight * keep * policy(r, A) + kl_coef * KL(log_prob, ref_log_prob)
        loss       = reduction(token loss) - entropy_coef * mean(entropy)

    Sequences are rows of [B, T], or packed: all tensors [N] and ``cu_seqlens`` says where each sequence starts.
    Tokens outside [cu_seqlens[0], cu_seqlens[-1]) count as masked.

    Args:
        log_probs: [B, T] or [N] floating. Log-probs of the sampled tokens under the policy, nats. Differentiable.
        old_log_probs: same shape, or None. Under the policy that the ratio refers to. None means on-policy: log_probs
            without gradient.
        advantages: [B] or [B, T] ([B] or [N] packed; where B = N it is [B]). Floating.
        mask: same shape as log_probs, or None for all. True or non-zero = the token counts. Masked tokens may hold
            anything.
        config: the variant.
        ref_log_probs: same shape. Under the reference policy. Needed with a KL coefficient; otherwise only the KL
            metric uses it.
        sampler_log_probs: same shape. As the inference engine reported them; NaN = not reported, no correction there.
        token_weights: [B, T], [B, 1] or [B] ([N], [B, 1] or [B] packed). Factor of the policy term, not of the KL.
        entropy: same shape as log_probs, nats. For the bonus (differentiable), the entropy mask and the metric.
        kl_coef: number or 0-d tensor. Overrides the config's.
        entropy_coef: number or 0-d tensor. Overrides the config's.
        cu_seqlens: [B + 1] int32 or int64, non-decreasing. Start of each packed sequence, and the end of the last.
        num_items: number or 0-d tensor. What the sum is divided by instead of the count in this call: the number of
            live tokens for "token_mean", of sequences for "sequence_*". For gradient accumulation and data
            parallelism. 0 means not given.
        max_length: length in the denominator of "sequence_mean_token_sum_norm". Overrides the config's; the default
            is T.

    Returns:
        GRPOLossOutput. float32; float64 if log_probs are. Metrics are always float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device, is missing, or contradicts the
            config. On the CPU also when cu_seqlens decreases or leaves [0, N]; on CUDA such bounds give undefined
            values, but nothing out of bounds is read or written.

    Numerics:
        Token terms in float32 (float64 for float64 inputs), all sums in float64 and in a fixed order in the kernels.
        A masked token contributes exactly zero to value, gradient and metrics. A token whose advantage or weight is
        zero has a policy term of exactly zero, also when its ratio overflows. NaN in a live token makes the scalar
        loss NaN; with reduction "none" it stays in its token, or in its sequence where the ratio or weight is the
        sequence's. Equal infinite log-probs have ratio 1. An empty batch gives 0.

    Source:
        DeepSeekMath (arXiv 2402.03300) and the papers listed at the presets; conventions of TRL 1.16.
    """
    given = (
        log_probs,
        old_log_probs,
        advantages,
        mask,
        ref_log_probs,
        sampler_log_probs,
        token_weights,
        entropy,
        cu_seqlens,
    )
    numbers = (kl_coef, entropy_coef, num_items, max_length)
    plain = kl_coef is None and entropy_coef is None and num_items is None and max_length is None
    alike = _direct.signature(given) if plain and type(config) is GRPOLossConfig else None
    found = None if alike is None else _known.get((alike, config))
    if found is None:
        inputs = _checked(given, config, *numbers)
        if alike is not None:
            _remember((alike, config), given, inputs)
    else:
        inputs = _like_before(given, found)
    backend = _dispatch.resolve(_OP, log_probs)
    loss, values = evaluate(with_batch_statistics(inputs, config), config, backend, alike is not None)
    return GRPOLossOutput(loss, GRPOMetrics(values))


_Given = tuple[
    Tensor,
    Tensor | None,
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
]
"""The tensors of a call: those of `LossInputs` but the two that are made from others, in their order."""


class _Found(NamedTuple):
    """What the checks of a call found that no tensor holds, where they changed no tensor but for a second axis."""

    advantages_per_sequence: bool
    weights_per_sequence: bool
    kl_coef: float
    entropy_coef: float
    num_items: float
    max_length: int


_known: dict[tuple[bytes, GRPOLossConfig], _Found] = {}


def _checked(
    given: _Given,
    config: GRPOLossConfig,
    kl_coef: Tensor | float | None,
    entropy_coef: Tensor | float | None,
    num_items: Tensor | float | None,
    max_length: int | None,
) -> LossInputs:
    log_probs, old_log_probs, advantages, mask, ref, sampler, token_weights, entropy, cu_seqlens = given
    batch = _check_log_probs(log_probs, cu_seqlens)
    return loss_inputs(
        Subject(_OP, log_probs),
        config,
        batch,
        old_log_probs,
        advantages,
        mask,
        ref_log_probs=ref,
        sampler_log_probs=sampler,
        token_weights=token_weights,
        entropy=entropy,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        cu_seqlens=cu_seqlens,
        num_items=num_items,
        max_length=max_length,
    )


def _remember(call: tuple[bytes, GRPOLossConfig], given: _Given, inputs: LossInputs) -> None:
    """Keeps what the checks found, where the next call like it can take its tensors as they are."""
    longer = []
    for tensor, taken in zip(given, (*inputs[:8], inputs.cu_seqlens), strict=True):
        longer.append(tensor is not taken)
        if tensor is taken:
            continue
        if tensor is None or taken is None or tensor.requires_grad or tensor.dtype != taken.dtype:
            return
        if taken.ndim != tensor.ndim + 1:
            return
    numbers = (inputs.kl_coef, inputs.entropy_coef, inputs.num_items)
    kl_coef, entropy_coef, num_items = (float(number) for number in numbers)  # none was given: they are the config's
    found = _Found(longer[2], longer[6], kl_coef, entropy_coef, num_items, inputs.max_length)
    _direct.remember(_known, call, found)


def _like_before(given: _Given, found: _Found) -> LossInputs:
    log_probs, old_log_probs, advantages, mask, ref, sampler, weights, entropy, cu_seqlens = given
    advantages_per_sequence, weights_per_sequence, kl_coef, entropy_coef, num_items, max_length = found
    if advantages_per_sequence:
        advantages = advantages.unsqueeze(1)
    if weights_per_sequence and weights is not None:
        weights = weights.unsqueeze(1)
    tensors = (log_probs, old_log_probs, advantages, mask, ref, sampler, weights, entropy, None, None, cu_seqlens)
    return LossInputs(*tensors, kl_coef, entropy_coef, num_items, max_length)


def _check_log_probs(log_probs: Tensor, cu_seqlens: Tensor | None) -> int:
    """Returns the number of sequences."""
    _checks.check_tensor(_OP, "log_probs", log_probs)
    _checks.check_dtype(_OP, "log_probs", log_probs)
    if cu_seqlens is None:
        _checks.check_ndim(_OP, "log_probs", log_probs, "[B, T]")
        return log_probs.shape[0]
    _checks.check_ndim(_OP, "log_probs", log_probs, "[N]")
    return check_cu_seqlens(_OP, cu_seqlens, "log_probs", log_probs)


def evaluate(
    inputs: LossInputs, config: GRPOLossConfig, backend: str, unwatched: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss, differentiable in log_probs and entropy, and the values of its metrics.

    Args:
        unwatched: the tensors have a `_direct.signature`.
    """
    if backend == "reference":
        return reference.grpo_loss(inputs, config)
    log_probs, entropy = inputs.log_probs, inputs.entropy
    numbers: list[Any] = []
    for value in inputs[11:14]:
        numbers += (value, 0.0) if isinstance(value, Tensor) else (None, value)
    fixed = (inputs[1:7], inputs[8:11], (*numbers, inputs[14], *config.pack()), backend)
    if torch.is_grad_enabled() and (log_probs.requires_grad or (entropy is not None and entropy.requires_grad)):
        loss, values = _GRPOLoss.apply(log_probs, entropy, fixed, config.reduction == "none", unwatched)  # type: ignore[no-untyped-call]
    else:
        loss, _, _, _, values = _call(unwatched, log_probs, entropy, fixed, None, False, False)
    return loss, values


_Fixed = tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...], tuple[Any, ...], str]
"""The op's arguments without a gradient: before `entropy`, before `upstream`, the numbers and options, the backend."""


def _call(
    unwatched: bool,
    log_probs: Tensor,
    entropy: Tensor | None,
    fixed: _Fixed,
    upstream: Tensor | None,
    need_log_probs: bool,
    need_entropy: bool,
) -> Any:
    tensors, statistics, options, backend = fixed
    op = ops.grpo_loss_unwatched if unwatched else ops.grpo_loss
    return op(log_probs, *tensors, entropy, *statistics, upstream, *options, need_log_probs, need_entropy, backend)


class _GRPOLoss(torch.autograd.Function):
    """The forward computes the derivative as well, so the backward is at most one multiplication by a scalar.

    Per-token losses may have any upstream gradient, and a sequence's ratio couples its tokens: there the backward
    runs the kernel again with the upstream gradient as weights, and nothing but the inputs is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, log_probs: Tensor, entropy: Tensor | None, fixed: _Fixed, per_token: bool, unwatched: bool
    ) -> tuple[Tensor, Tensor]:
        need_log_probs, need_entropy, *_ = ctx.needs_input_grad
        if per_token:
            loss, _, _, _, values = _call(unwatched, log_probs, entropy, fixed, None, False, False)
            tensors, statistics, (kl, kl_coef, bonus, entropy_coef, items, *others), backend = fixed
            ctx.save_for_backward(log_probs, entropy, kl, bonus, items, *statistics, *tensors)
            ctx.again = (kl_coef, entropy_coef, others, backend)
        else:
            loss, grad_log_probs, grad_entropy, scale, values = _call(
                unwatched, log_probs, entropy, fixed, None, need_log_probs, need_entropy
            )
            ctx.save_for_backward(grad_log_probs, grad_entropy, scale)
            ctx.again = None
        ctx.mark_non_differentiable(values)
        ctx.set_materialize_grads(False)  # the metrics have none
        return loss, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:  # whoever took the loss has no gradient for it
            return None, None, None, None, None
        need_log_probs, need_entropy, *_ = ctx.needs_input_grad
        if ctx.again is not None:
            log_probs, entropy, kl, bonus, items, *tensors = ctx.saved_tensors
            kl_coef, entropy_coef, others, backend = ctx.again
            options = (kl, kl_coef, bonus, entropy_coef, items, *others)
            fixed = (tuple(tensors[3:]), tuple(tensors[:3]), options, backend)
            _, grad_log_probs, grad_entropy, _, _ = _call(
                False, log_probs, entropy, fixed, upstream, need_log_probs, need_entropy
            )
        else:
            grad_log_probs, grad_entropy, scale = ctx.saved_tensors
            grad_log_probs, grad_entropy = times_upstream(
                grad_log_probs if need_log_probs else None, grad_entropy if need_entropy else None, scale, upstream
            )
        return grad_log_probs if need_log_probs else None, grad_entropy if need_entropy else None, None, None, None
